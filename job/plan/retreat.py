"""What to give up when memory runs out or the loss diverges; pure rules, the supervisor acts on them."""

from pydantic import BaseModel, ConfigDict

LEARNING_RATE_FACTOR = 0.5
"""Each roll-back halves the learning rate: PaLM skipped the batches alone (arXiv 2204.02311, section 5.1), which does not help a
rate that is simply too high."""
MAX_ROLLBACKS = 2


class Fit(BaseModel):
    """How an optimizer step is laid out in memory; every layout takes the same examples in the same order."""

    model_config = ConfigDict(frozen=True)

    micro_batch: int
    gradient_accumulation_steps: int
    activation_checkpointing: bool | None = None
    """None: as the settings say."""
    activation_offloading: bool = False


class Rollback(BaseModel):
    """What is different after the loss diverged."""

    model_config = ConfigDict(frozen=True)

    num_rollbacks: int = 0
    learning_rate_scale: float = 1.0
    skip_steps: tuple[int, ...] = ()
    """Optimizer steps that are passed over, the first is 1."""


def leaner(fit: Fit, *, is_checkpointing: bool, can_offload: bool) -> Fit | None:
    """The next smaller layout: half the micro-batch, then recomputed activations, then activations in host memory; None when
    nothing is left.

    Args:
        is_checkpointing: whether activations are recomputed already.
        can_offload: whether there is another memory than the one that ran out.
    """
    effective = fit.micro_batch * fit.gradient_accumulation_steps
    if fit.micro_batch > 1:
        half = max(size for size in range(1, fit.micro_batch // 2 + 1) if effective % size == 0)
        return fit.model_copy(update={"micro_batch": half, "gradient_accumulation_steps": effective // half})
    if not is_checkpointing:
        return fit.model_copy(update={"activation_checkpointing": True})
    if can_offload and not fit.activation_offloading:
        return fit.model_copy(update={"activation_offloading": True})
    return None


def roll_back(before: Rollback, *, first_step: int, last_step: int) -> Rollback | None:
    """The next roll-back: a lower learning rate, and the window of steps that diverged is skipped; None after the last one."""
    if before.num_rollbacks >= MAX_ROLLBACKS:
        return None
    skipped = sorted({*before.skip_steps, *range(first_step, last_step + 1)})
    return Rollback(
        num_rollbacks=before.num_rollbacks + 1,
        learning_rate_scale=before.learning_rate_scale * LEARNING_RATE_FACTOR,
        skip_steps=tuple(skipped),
    )
