"""Has the run diverged? The loss and gradient norm of each step in, a DivergenceError out, before the step is applied.

Three rules:
- a loss or a gradient norm that is not finite. In float16 a norm that overflows is part of the method (the scaler skips the
  step and halves its scale), so there it takes `MAX_OVERFLOWS` in a row: 2**16, the first scale, is used up after 16.
- a loss that is far above its running median for long: `NUM_HIGH` steps in a row above twice the median and more than
  `HIGH_NATS` above it. The median is of the last `NUM_CALM` steps that were not high; the rule is silent before there are
  `MIN_CALM`. Examples are shuffled, so noise or a hard part of the data does not raise that many steps in a row; where the user
  turned shuffling off the rule is off as well.
- a held-out loss that is not finite.
"""

import math
from statistics import median
from typing import Any

MAX_OVERFLOWS = 25
NUM_HIGH = 25
HIGH_NATS = 2.0
NUM_CALM = 100
MIN_CALM = 25


class DivergenceError(Exception):
    """The steps from `first_step` to `step` ruined the run, or were about to."""

    def __init__(self, what: str, *, first_step: int, step: int) -> None:
        self.what, self.first_step, self.step = what, first_step, step
        super().__init__(what)


class LossGuard:
    """Remembers what losses were like; goes into checkpoints, so that a resumed run judges as an undisturbed one would."""

    def __init__(self, *, has_scaler: bool, is_shuffled: bool) -> None:
        self.has_scaler, self._is_shuffled = has_scaler, is_shuffled
        self._calm: list[float] = []
        self._num_high = 0
        self._num_overflows = 0

    def check(self, step: int, loss: float, norm: float) -> None:
        """Judge one step. Raises DivergenceError."""
        # `nan > limit` is False: test for finiteness itself.
        if not math.isfinite(loss):
            raise DivergenceError(f"the loss is {loss}", first_step=step, step=step)
        self._num_overflows = 0 if math.isfinite(norm) else self._num_overflows + 1
        if self._num_overflows and not self.has_scaler:
            raise DivergenceError(f"the gradient norm is {norm}", first_step=step, step=step)
        if self._num_overflows >= MAX_OVERFLOWS:
            what = f"the gradient norm is {norm} for the {MAX_OVERFLOWS}th step in a row"
            raise DivergenceError(what, first_step=step - MAX_OVERFLOWS + 1, step=step)
        usual = median(self._calm) if len(self._calm) >= MIN_CALM else math.inf
        if self._is_shuffled and loss > 2 * usual and loss > usual + HIGH_NATS:
            self._num_high += 1
        else:
            self._num_high = 0
            self._calm = [*self._calm[1 - NUM_CALM :], loss]
        if self._num_high >= NUM_HIGH:
            what = f"the loss is {loss:.3g}, far above its running median of {usual:.3g} for {NUM_HIGH} steps"
            raise DivergenceError(what, first_step=step - NUM_HIGH + 1, step=step)

    @property
    def is_suspicious(self) -> bool:
        """Whether the newest step may be one of a divergence: no moment for a periodic checkpoint."""
        return self._num_high > 0 or self._num_overflows > 1

    def state(self) -> dict[str, Any]:
        return {"calm": list(self._calm), "num_high": self._num_high, "num_overflows": self._num_overflows}

    def load(self, state: dict[str, Any]) -> None:
        self._calm, self._num_high = list(state["calm"]), int(state["num_high"])
        self._num_overflows = int(state["num_overflows"])
