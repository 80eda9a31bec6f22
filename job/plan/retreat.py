"""What to give up when memory runs out or the loss diverges; pure rules, the supervisor acts on them."""

from pydantic import BaseModel, ConfigDict

from job.plan.sharing import Parallel

LEARNING_RATE_FACTOR = 0.5
"""Each roll-back halves the learning rate: PaLM skipped the batches alone (arXiv 2204.02311, section 5.1), which does not help a
rate that is simply too high."""
MAX_ROLLBACKS = 2


class Fit(BaseModel):
    """How an optimizer step is laid out in memory; every layout takes the same examples in the same order."""

    model_config = ConfigDict(frozen=True)

    micro_batch: int
    gradient_accumulation_steps: int
    """Of each device."""
    activation_checkpointing: bool | None = None
    """None: as the settings say."""
    activation_offloading: bool = False
    num_devices: int = 1
    """Ranks in all."""
    parallel: Parallel | None = None
    """None with one device."""

    @property
    def effective_batch_size(self) -> int:
        """Examples of a step over all devices."""
        return self.micro_batch * self.gradient_accumulation_steps * self.num_devices


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
    if fit.micro_batch > 1:
        return _with_micro_batch(fit, fit.micro_batch // 2)
    if not is_checkpointing:
        return fit.model_copy(update={"activation_checkpointing": True})
    if can_offload and not fit.activation_offloading:
        return fit.model_copy(update={"activation_offloading": True})
    return None


def relaid(fit: Fit, *, num_devices: int, parallel: Parallel | None) -> Fit | None:
    """The same step on another number of devices, with a micro-batch that is no larger; None when it does not divide."""
    if fit.effective_batch_size % num_devices:
        return None
    examples = fit.effective_batch_size // num_devices
    spread = {"micro_batch": 1, "gradient_accumulation_steps": examples, "num_devices": num_devices, "parallel": parallel}
    return _with_micro_batch(fit.model_copy(update=spread), fit.micro_batch)


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


def _with_micro_batch(fit: Fit, most: int) -> Fit:
    """The largest micro-batch up to `most` that divides what a device has to do in a step."""
    examples = fit.micro_batch * fit.gradient_accumulation_steps
    size = max(size for size in range(1, min(most, examples) + 1) if examples % size == 0)
    return fit.model_copy(update={"micro_batch": size, "gradient_accumulation_steps": examples // size})
