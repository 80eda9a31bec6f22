"""A footprint and a card's memory in, how an optimizer step is laid out in it: micro-batch, accumulation, recomputation."""

from pydantic import BaseModel, ConfigDict

from job.plan.footprint import Footprint
from job.plan.memory import MemoryEstimate, estimate_memory
from job.plan.sharing import Parallel

FULL_TOKENS = 2048
"""Tokens in a micro-batch beyond which a larger one hardly speeds a GPU up: see HALF_SPEED_TOKENS in throughput.py."""
CPU_TOKENS = 2048
"""The most in a micro-batch on a CPU, which gains nothing from more."""


class Layout(BaseModel):
    """How the examples of one optimizer step go through the model."""

    model_config = ConfigDict(frozen=True)

    micro_batch: int
    gradient_accumulation_steps: int
    activation_checkpointing: bool
    memory: MemoryEstimate | None
    """None without a footprint."""
    fits: bool | None
    """None without a footprint."""
    reason: str
    parallel: Parallel | None = None
    """None with one device."""


def choose_layout(
    footprint: Footprint,
    *,
    memory_bytes: int,
    effective_batch: int,
    length: int,
    micro_batch: int | None,
    activation_checkpointing: bool | None,
    optimizer: str,
    on_gpu: bool,
    num_devices: int = 1,
    parallel: Parallel | None = None,
) -> Layout:
    """The layout to train with; where nothing fits, the leanest that may be chosen, to show by how much.

    Of what fits by the safe estimate the largest micro-batch is taken. Activations are kept when that leaves a micro-batch
    that keeps the GPU busy, because recomputing them costs a third of the time; else they are recomputed.

    Args:
        memory_bytes: what may be used.
        effective_batch: examples per optimizer step and device.
        length: tokens of the longest example.
        micro_batch: what the user asked for; None to choose.
        activation_checkpointing: what the user asked for; None to choose.
    """
    sizes = [micro_batch] if micro_batch else _divisors(effective_batch)
    if not on_gpu and not micro_batch:
        sizes = [size for size in sizes if size * length <= CPU_TOKENS] or [1]

    def layout(size: int, recomputes: bool, reason: str = "") -> Layout:
        memory = estimate_memory(
            footprint,
            rows=size,
            length=length,
            activation_checkpointing=recomputes,
            optimizer=optimizer,
            on_gpu=on_gpu,
            num_devices=num_devices,
            parallel=parallel,
        )
        return Layout(
            micro_batch=size,
            gradient_accumulation_steps=-(-effective_batch // size),
            activation_checkpointing=recomputes,
            memory=memory,
            fits=memory.safe_peak_bytes <= memory_bytes,
            parallel=parallel,
            reason=reason,
        )

    def largest(recomputes: bool) -> Layout:
        """The largest that fits, else the smallest."""
        found = (layout(size, recomputes) for size in sizes)
        return next((one for one in found if one.fits), None) or layout(sizes[-1], recomputes)

    if activation_checkpointing is not None:
        word = "recomputed" if activation_checkpointing else "kept"
        chosen, reason = largest(activation_checkpointing), f"activations {word}, as ACTIVATION_CHECKPOINTING says"
    else:
        kept, recomputed = largest(False), largest(True)
        enough = min(FULL_TOKENS, sizes[0] * length)
        is_enough = kept.micro_batch * length >= enough or kept.micro_batch == recomputed.micro_batch
        if kept.fits and (is_enough or not recomputed.fits):
            chosen, reason = kept, "activations kept: there is memory for them, and recomputing costs a third more"
        else:
            room = f"would leave room for a micro-batch of {kept.micro_batch} only" if kept.fits else "do not fit"
            chosen, reason = recomputed, f"activations recomputed: kept ones {room}"
    if not chosen.fits and chosen.memory is not None:
        reason = f"does not fit, {(chosen.memory.safe_peak_bytes - memory_bytes) / 2**30:.1f} GiB are missing"
    return chosen.model_copy(update={"reason": reason})


def unweighed_layout(
    *,
    effective_batch: int,
    length: int,
    micro_batch: int | None,
    activation_checkpointing: bool | None,
    parallel: Parallel | None = None,
) -> Layout:
    """Without a footprint: one long example at a time, or several short ones, which fits wherever the model does."""
    fitting = max(1, CPU_TOKENS // length)
    size = micro_batch or next(size for size in _divisors(effective_batch) if size <= fitting)
    return Layout(
        micro_batch=size,
        gradient_accumulation_steps=-(-effective_batch // size),
        activation_checkpointing=activation_checkpointing is True,
        memory=None,
        fits=None,
        parallel=parallel,
        reason=f"the longest example has {length} tokens",
    )


def _divisors(number: int) -> list[int]:
    """The largest first."""
    return [size for size in range(number, 0, -1) if number % size == 0]
