"""What there is to train on, a footprint, a GPU and a price in; steps, memory, hours and dollars out.

One pure function, called before anything is downloaded with what is then known, and again with counted tokens: nothing is
opened, measured or asked here.
"""

import math
from functools import reduce
from operator import add

from pydantic import BaseModel, ConfigDict

from job.plan.footprint import Footprint
from job.plan.hardware import Gpu
from job.plan.layout import Layout
from job.plan.memory import MemoryEstimate
from job.plan.price import Price
from job.plan.retreat import Fit
from job.plan.sharing import EFFICIENCY, Parallel, speed_up
from job.plan.spread import effective_batch, lay_out, shared_batch
from job.plan.throughput import (
    DOWNLOAD_BYTES_PER_SECOND,
    END_SECONDS,
    LOAD_BYTES_PER_SECOND,
    PADDING,
    PREPARED_TOKENS_PER_SECOND,
    START_SECONDS,
    Range,
    Speed,
    at_rates,
    measured_seconds,
    step_seconds,
)
from job.settings import ModelSettings, TrainSettings


class Work(BaseModel):
    """What there is to train on."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    num_examples: int
    num_tokens: int
    """Of one pass over them."""
    longest_tokens: int
    num_eval_tokens: int = 0
    all_steps_tokens: int | None = None
    """Counted over all steps in their order; None when that is not known, which matters only where the last epoch is cut."""
    basis: str = "counted"
    """How this is known."""
    error: float = 0.0
    """Share by which `num_tokens` may be off."""


class Circumstances(BaseModel):
    """What else a forecast depends on, beside the work and the GPU."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    download_bytes: float = 0.0
    """Still to come from the Hub."""
    disk_bytes: float = 0.0
    num_saves: int = 1
    save_seconds: float = 5.0


class Plan(BaseModel):
    """What the run will do, need and cost; what is not known is None."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    micro_batch: int
    gradient_accumulation_steps: int
    """Of each device."""
    effective_batch_size: int
    """Examples of a step: micro-batch x accumulation x devices."""
    num_devices: int = 1
    """Trainer processes (ranks) in all, each with a GPU of its own if there are any."""
    num_nodes: int = 1
    """Machines that they are in."""
    parallel: Parallel | None = None
    """How several devices share the model; None with one."""
    num_examples: int
    num_steps: int
    num_tokens: int
    """Tokens in all steps together, padding not counted; rounded where the last epoch is cut and its order is not known."""
    activation_checkpointing: bool | None = None
    memory: MemoryEstimate | None = None
    gpu: str | None = None
    """None for a CPU."""
    memory_bytes: int | None = None
    """What there is, on each device."""
    fits: bool | None = None
    seconds_low: float | None = None
    seconds_high: float | None = None
    training_seconds_low: float | None = None
    training_seconds_high: float | None = None
    """Of the steps alone."""
    cost_usd_low: float | None = None
    cost_usd_high: float | None = None
    price_usd_per_hour: float | None = None
    price_source: str | None = None
    assumptions: list[str]

    @property
    def fit(self) -> Fit:
        """How it lays a step out."""
        return Fit(
            micro_batch=self.micro_batch,
            gradient_accumulation_steps=self.gradient_accumulation_steps,
            activation_checkpointing=self.activation_checkpointing,
            num_devices=self.num_devices,
            parallel=self.parallel,
        )


def forecast(
    train: TrainSettings,
    model: ModelSettings,
    work: Work,
    *,
    footprint: Footprint | None = None,
    gpu: Gpu | None = None,
    memory_bytes: int | None = None,
    price: Price | None = None,
    speed: Speed | None = None,
    circumstances: Circumstances | None = None,
    before: Fit | None = None,
    num_devices: int = 1,
    num_nodes: int = 1,
) -> Plan:
    """Plan the run on one machine, or on several that are alike.

    Args:
        footprint: of the model in the number format of that machine; without it memory and time stay unknown.
        gpu: what it trains on; None for a CPU.
        memory_bytes: what each device may use of its memory; None for all of the GPU's.
        price: of all machines.
        speed: measured on this GPU with this model; takes the place of the range.
        before: how earlier attempts of the run laid their steps out.
        num_devices: ranks in all; a batch that they cannot share evenly is rounded, `check_shares` refuses it.
        num_nodes: machines that they are in.
    """
    around = circumstances or Circumstances()
    effective, assumptions = _effective_batch(train, work, num_devices)
    available = memory_bytes if memory_bytes is not None else gpu.memory_bytes if gpu else None
    layout = lay_out(
        train,
        footprint,
        effective=effective,
        length=work.longest_tokens,
        memory_bytes=available,
        on_gpu=gpu is not None,
        num_devices=num_devices,
        before=before,
        can_shard=not model.load_in_8bit,
    )
    each = f" on each of {num_devices} {'GPUs' if gpu else 'processes'}" if num_devices > 1 else ""
    assumptions.append(f"micro-batch {layout.micro_batch} x {layout.gradient_accumulation_steps}{each}: {layout.reason}")
    per_step = layout.micro_batch * layout.gradient_accumulation_steps * num_devices
    steps_per_epoch = math.ceil(work.num_examples / per_step)
    num_steps = math.ceil(train.num_train_epochs * steps_per_epoch)
    if train.max_steps is not None:
        num_steps = min(num_steps, train.max_steps)
    num_tokens = work.all_steps_tokens
    if num_tokens is None:
        num_tokens = round(work.num_tokens * num_steps / steps_per_epoch)
    if work.basis != "counted":
        assumptions.append(f"tokens are {work.basis}, {work.error:.0%} more or less")
    training = _training_seconds(layout, work, num_tokens, footprint, gpu, speed, model, num_devices, num_nodes)
    whole = training and training + _other_seconds(train, work, num_steps, footprint, around, training)
    if training and gpu:
        assumptions.append(
            f"speed {speed.source}" if speed else f"20-50% of {gpu.peak_flops / 1e12:.0f} TFLOP/s, as published runs reach"  # type: ignore[operator]
        )
    assumptions += _sharing(layout, gpu, speed if training else None, num_devices, num_nodes)
    if footprint:
        assumptions += footprint.notes
        if footprint.method == "formula":
            assumptions.append("memory by formula: the model could not be traced; the safe number has 30% more")
    cost = (
        [price.cost_usd(second, storage_bytes=around.disk_bytes) for second in (whole.low, whole.high)] if price and whole else []
    )
    return Plan(
        micro_batch=layout.micro_batch,
        gradient_accumulation_steps=layout.gradient_accumulation_steps,
        effective_batch_size=per_step,
        num_devices=num_devices,
        num_nodes=num_nodes,
        parallel=layout.parallel,
        num_examples=work.num_examples,
        num_steps=num_steps,
        num_tokens=num_tokens,
        activation_checkpointing=layout.activation_checkpointing if footprint else None,
        memory=layout.memory,
        gpu=gpu.name if gpu else None,
        memory_bytes=available,
        fits=layout.fits,
        seconds_low=whole.low if whole else None,
        seconds_high=whole.high if whole else None,
        training_seconds_low=training.low if training else None,
        training_seconds_high=training.high if training else None,
        cost_usd_low=cost[0] if cost else None,
        cost_usd_high=cost[1] if cost else None,
        price_usd_per_hour=price.usd_per_hour if price else None,
        price_source=price.source if price else None,
        assumptions=assumptions,
    )


def bits_of(model: ModelSettings) -> int:
    return 4 if model.load_in_4bit else 8 if model.load_in_8bit else 16


def _effective_batch(train: TrainSettings, work: Work, num_devices: int) -> tuple[int, list[str]]:
    asked, found = effective_batch(train, train.effective_batch_size), effective_batch(train, work.num_examples)
    told = [f"EFFECTIVE_BATCH_SIZE lowered to the {work.num_examples} examples there are"] if found < asked else []
    shared = shared_batch(found, num_devices)
    if shared != found:
        told.append(f"a step of {shared} examples, which {num_devices} devices can share")
    return shared, told


def _sharing(layout: Layout, gpu: Gpu | None, speed: Speed | None, num_devices: int, num_nodes: int) -> list[str]:
    """What is assumed of several devices."""
    if layout.parallel is None:
        return []
    where = f" in {num_nodes} machines" if num_nodes > 1 else ""
    told = []
    if gpu is None and num_nodes == 1:
        told.append(f"{num_devices} processes share the cores of one CPU, and are no faster than one")
    elif speed is None or speed.num_devices != num_devices:
        low, high = (round(100 * share) for share in EFFICIENCY[layout.parallel, num_nodes > 1])
        number = num_devices if gpu else num_nodes
        told.append(
            f"{number} {'GPUs' if gpu else 'CPUs'}{where} with {layout.parallel}: {low}-{high}% of {number} times one's speed"
        )
    if gpu and layout.parallel == "fsdp":
        told.append("fsdp: each GPU holds a share of the weights and gathers two layers at a time; never run by us")
    elif gpu:
        told.append(f"ddp: each of {num_devices} GPUs holds the whole model; NCCL's buffers are 0.5 GiB, 1.6 to be safe")
    return told


def _training_seconds(
    layout: Layout,
    work: Work,
    num_tokens: int,
    footprint: Footprint | None,
    gpu: Gpu | None,
    speed: Speed | None,
    model: ModelSettings,
    num_devices: int,
    num_nodes: int,
) -> Range | None:
    slow, fast = speed_up(num_devices if gpu else num_nodes, layout.parallel, num_nodes=num_nodes)  # one CPU stays one
    if speed is not None and speed.num_devices == num_devices:
        slow = fast = 1.0
    spread = Range(low=max(1 - work.error, 0.1) / fast, high=(1 + work.error) / slow)
    if speed is not None:
        seconds = measured_seconds(num_tokens, speed)
        return Range(low=seconds.low * spread.low, high=seconds.high * spread.high)
    if footprint is None or gpu is None or not gpu.peak_flops:
        return None
    mean = max(1, round(work.num_tokens / work.num_examples))
    padding = min(PADDING, work.longest_tokens / mean) if layout.micro_batch > 1 else 1.0
    per_row = footprint.flops(1, mean, activation_checkpointing=layout.activation_checkpointing)
    seconds = step_seconds(
        per_row / mean * num_tokens * padding,
        layout.micro_batch * mean * padding,
        peak_flops=gpu.peak_flops,
        bits=bits_of(model),
    )
    return Range(low=seconds.low * spread.low, high=seconds.high * spread.high)


def _other_seconds(
    train: TrainSettings,
    work: Work,
    num_steps: int,
    footprint: Footprint | None,
    around: Circumstances,
    training: Range,
) -> Range:
    """Start, download, load, preparation, evaluations, checkpoints and end."""
    parts = [Range(low=START_SECONDS[0], high=START_SECONDS[1]), Range(low=END_SECONDS[0], high=END_SECONDS[1])]
    parts.append(at_rates(around.download_bytes, DOWNLOAD_BYTES_PER_SECOND))
    if footprint:
        parts.append(at_rates(2.0 * footprint.num_parameters, LOAD_BYTES_PER_SECOND))
    if work.basis != "counted":
        parts.append(at_rates(work.num_tokens, PREPARED_TOKENS_PER_SECOND))
    parts.append(Range(low=around.save_seconds * around.num_saves, high=2 * around.save_seconds * around.num_saves))
    total_tokens = max(1.0, work.num_tokens * train.num_train_epochs)
    num_evaluations = 2 + (num_steps // train.eval_steps if train.eval_steps else 0)
    parts.append(training.times(num_evaluations * work.num_eval_tokens / total_tokens / 3))  # forward only: a third of a step
    return reduce(add, parts)
