"""A footprint and a card's memory in, how an optimizer step is laid out in it: micro-batch, accumulation, recomputation."""

from pydantic import BaseModel, ConfigDict

from job.plan.footprint import Footprint
from job.plan.memory import MemoryEstimate, estimate_memory

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
    reason: str


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
    factor: float = 1.0,
) -> Layout | None:
    """The layout to train with; None when nothing fits.

    Of what fits by the safe estimate the largest micro-batch is taken. Activations are kept when that leaves a micro-batch
    that keeps the GPU busy, because recomputing them costs a third of the time; else they are recomputed.

    Args:
        memory_bytes: what may be used.
        effective_batch: examples per optimizer step and device.
        length: tokens of the longest example.
        micro_batch: what the user asked for; None to choose.
        activation_checkpointing: what the user asked for; None to choose.
        factor: by how much a measured step was above the estimate of what is uncertain.
    """
    sizes = [micro_batch] if micro_batch else [size for size in range(effective_batch, 0, -1) if effective_batch % size == 0]
    if not on_gpu and not micro_batch:
        sizes = [size for size in sizes if size * length <= CPU_TOKENS] or [1]

    def largest(recomputes: bool) -> tuple[int, MemoryEstimate] | None:
        for size in sizes:
            estimate = estimate_memory(
                footprint, rows=size, length=length, activation_checkpointing=recomputes, optimizer=optimizer, on_gpu=on_gpu
            ).corrected(factor)
            if estimate.safe_peak_bytes <= memory_bytes:
                return size, estimate
        return None

    def layout(found: tuple[int, MemoryEstimate], recomputes: bool, reason: str) -> Layout:
        size, memory = found
        return Layout(
            micro_batch=size,
            gradient_accumulation_steps=-(-effective_batch // size),
            activation_checkpointing=recomputes,
            memory=memory,
            reason=reason,
        )

    if activation_checkpointing is not None:
        asked = largest(activation_checkpointing)
        word = "recomputed" if activation_checkpointing else "kept"
        return layout(asked, activation_checkpointing, f"activations {word}, as ACTIVATION_CHECKPOINTING says") if asked else None
    kept, recomputed = largest(False), largest(True)
    enough = min(FULL_TOKENS, sizes[0] * length)
    if kept and (kept[0] * length >= enough or not recomputed or recomputed[0] == kept[0]):
        return layout(kept, False, "activations kept: there is memory for them, and recomputing costs a third more")
    if recomputed:
        why = "do not fit even for one example" if not kept else f"would leave room for a micro-batch of {kept[0]} only"
        return layout(recomputed, True, f"activations recomputed: kept ones {why}")
    return None
