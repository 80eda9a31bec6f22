"""A footprint and a layout in, the memory that one GPU (or this machine's, on a CPU) needs out: what to expect, and what is safe.

An under-prediction costs the user an out-of-memory error at hour three, so two numbers are given. Pure arithmetic; the tensors
were counted by `train/dry_run.py`.
"""

from pydantic import BaseModel, ConfigDict, computed_field

from job.plan.footprint import Footprint
from job.plan.sharing import Parallel, share
from job.settings import TrainSettings

CONTEXT_BYTES = 0.5 * 2**30
"""CUDA's own memory in a process that has loaded torch's and bitsandbytes' kernels. An assumption: 0.3-0.6 GiB is usual for CUDA
12 and 13 (nvidia-smi of an idle process, as reported in pytorch/pytorch#20532 and its like)."""
WORKSPACE_BYTES = 2 * 32 * 2**20
"""cuBLAS: 32 MiB a handle on Hopper, and a second one for the backward pass's thread (docs.nvidia.com/cuda/cublas, 2026)."""
SLACK = 0.04
"""Of what comes and goes: the allocator rounds sizes and cannot always join what is free. An assumption, for expandable
segments."""
SAFE_SLACK = 0.25
"""The same where one must not be wrong: fragmentation before the segments have grown, and what a trace cannot see (kernels'
workspaces, masks). Chosen so that no published peak of benchmarks/forecast.py lies above the safe number."""
FORMULA_SLACK = 0.3
"""On top where the model could not be traced: the formula is coarse."""
SAFE_BYTES = 0.25 * 2**30
"""Beside it: another process's context, a display."""
CPU_PROCESS_BYTES = 0.5 * 2**30
"""Python with torch, transformers, peft and bitsandbytes before a model: 0.45-0.55 GiB resident on Linux, 2026-11, n=3."""

CPU_SLACK = 0.35
"""Of what comes and goes on a CPU: glibc gives little back between steps (SmolLM2-135M: 1.36 times the trace, 2026-11, n=1)."""


class MemoryEstimate(BaseModel):
    """Bytes at the peak of a training step, by purpose."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    weights_bytes: int
    """The base model, quantisation state included; a GPU's share of it with fsdp."""
    adapter_bytes: int
    gradients_bytes: int
    """The adapter's, twice with ddp."""
    optimizer_bytes: int
    activations_bytes: int
    """What autograd keeps from the forward pass for the backward pass."""
    logits_bytes: int
    """Of the loss, when the peak lies there."""
    transient_bytes: int
    """What is alive beside at the peak: a layer's recomputation, gradients on their way, unpacked and gathered weights."""
    reserved_bytes: int
    """What the framework takes beside tensors: context, workspaces, gaps between them."""
    safe_peak_bytes: int
    """Plan with this: the peak with what is uncertain at its worst."""

    @computed_field  # type: ignore[prop-decorator]
    @property
    def peak_bytes(self) -> int:
        """What to expect: the sum."""
        return (
            self.weights_bytes
            + self.adapter_bytes
            + self.gradients_bytes
            + self.optimizer_bytes
            + self.activations_bytes
            + self.logits_bytes
            + self.transient_bytes
            + self.reserved_bytes
        )

    def corrected(self, factor: float) -> "MemoryEstimate":
        """The same with what is uncertain scaled, as a measured step says."""
        names = ("activations_bytes", "logits_bytes", "transient_bytes")
        changed: dict[str, int] = {name: round(getattr(self, name) * factor) for name in names}
        more = sum(changed.values()) - sum(getattr(self, name) for name in names)
        return self.model_copy(update={**changed, "safe_peak_bytes": self.safe_peak_bytes + more})


def estimate_memory(
    footprint: Footprint,
    *,
    rows: int,
    length: int,
    activation_checkpointing: bool,
    optimizer: str,
    on_gpu: bool,
    num_devices: int = 1,
    parallel: Parallel | None = None,
) -> MemoryEstimate:
    """What one training step needs on one device.

    Args:
        footprint: the model's, for the machine's number format.
        rows: the micro-batch.
        length: tokens of its longest row.
        optimizer: transformers' name.
        on_gpu: whether it trains on a GPU, or in this machine's own memory.
        num_devices: that share the step.
    """
    num_tokens = rows * length
    body = footprint.body(rows, activation_checkpointing=activation_checkpointing)
    saved = footprint.saved_bytes(rows, length, activation_checkpointing=activation_checkpointing)
    kept = body.after_forward.at(rows, length)
    head = footprint.head_bytes(num_tokens)
    update = _update_bytes(footprint, optimizer)
    optimizer_bytes = optimizer_state_bytes(footprint, optimizer)
    held = share(footprint, optimizer_bytes, num_devices=num_devices, parallel=parallel, on_gpu=on_gpu)
    coming = max(body.peak.at(rows, length), kept + head, update)
    logits = max(0.0, kept + head - saved) if kept + head >= coming else 0.0
    coming += held.gathered
    steady = held.weights + held.adapter + held.gradients + held.optimizer
    slack = SAFE_SLACK if footprint.method == "traced" else SAFE_SLACK + FORMULA_SLACK
    if on_gpu:
        fixed = CONTEXT_BYTES + WORKSPACE_BYTES + held.reserved
        reserved = fixed + SLACK * coming
        safe = steady + fixed + held.safe + SAFE_BYTES + (1 + slack) * coming
    else:
        reserved = CPU_PROCESS_BYTES + CPU_SLACK * coming
        safe = steady + held.safe + (1 + slack) * (coming + reserved)
    return MemoryEstimate(
        weights_bytes=held.weights,
        adapter_bytes=held.adapter,
        gradients_bytes=held.gradients,
        optimizer_bytes=held.optimizer,
        activations_bytes=round(saved),
        logits_bytes=round(logits),
        transient_bytes=max(0, round(coming - saved - logits)),
        reserved_bytes=round(reserved),
        safe_peak_bytes=round(safe),
    )


def memory_alone(
    footprint: Footprint, train: TrainSettings, *, length: int, num_devices: int = 1, parallel: Parallel | None = None
) -> MemoryEstimate:
    """The least that a GPU needs: one example at a time, activations recomputed."""
    return estimate_memory(
        footprint,
        rows=1,
        length=length,
        activation_checkpointing=True,
        optimizer=optimizer_name(train, on_gpu=True),
        on_gpu=True,
        num_devices=num_devices,
        parallel=parallel,
    )


def optimizer_name(train: TrainSettings, *, on_gpu: bool) -> str:
    """The optimizer that OPTIM stands for."""
    if train.optim != "auto":
        return train.optim
    return "paged_adamw_8bit" if on_gpu else "adamw_torch"


def optimizer_state_bytes(footprint: Footprint, optimizer: str) -> int:
    """What the optimizer keeps of each trained parameter; a paged one is counted in full, since it is used at each step."""
    trained = footprint.num_trainable
    if "8bit" in optimizer:
        return round(trained * (2 + 2 * 4 / 256))  # two moments and their scales, one in 256 (bitsandbytes, blockwise)
    if "4bit" in optimizer:
        return round(trained * (1 + 2 * 4 / 128))  # torchao's, one scale in 128
    if optimizer.startswith(("sgd", "lion", "adafactor")):
        return 4 * trained
    return 8 * trained


def checkpoint_bytes(footprint: Footprint, optimizer: str) -> int:
    """What one checkpoint takes on a disk: adapter, optimizer and a little beside."""
    return 4 * footprint.num_trainable + optimizer_state_bytes(footprint, optimizer) + 2**20


def _update_bytes(footprint: Footprint, optimizer: str) -> float:
    """The optimizer's step, when activations are gone: torch's own works on all tensors at once."""
    return 0.0 if "8bit" in optimizer or "4bit" in optimizer else 8.0 * footprint.num_trainable
