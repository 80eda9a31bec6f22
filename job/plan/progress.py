"""Steps as they come in, what is left of the run out: the first measured steps take the place of the forecast.

The pace is seconds per token over steps that no evaluation and no save came between. Pure
arithmetic on numbers that others measured.
"""

from dataclasses import dataclass, field

from pydantic import BaseModel, ConfigDict

MIN_SHARE = 0.05
"""Of all steps, after which a re-forecast is kept for the report."""
MIN_STEPS = 2
"""The first step warms up, and is no measure."""


class Reforecast(BaseModel):
    """What the run will take, as the steps so far say; of all attempts together."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    at_step: int
    seconds: float
    cost_usd: float | None
    num_tokens: int
    memory_bytes: int | None
    """The peak, scaled by what the first step really kept; None where that was not measured."""
    seconds_per_token: float


@dataclass
class Pace:
    """What the steps of one attempt have shown."""

    num_steps: int
    """Of the whole run."""
    num_tokens: int
    """Of the whole run, as planned."""
    num_evaluations_left: int = 0
    _steps: list[tuple[float, int]] = field(default_factory=list)
    """(seconds, tokens) of steps that nothing interrupted."""
    _interrupted: list[tuple[float, int]] = field(default_factory=list)
    """Of the others, for want of better."""
    _last: tuple[float, int, int] | None = None
    """Seconds, tokens and number of the last step."""
    _was_interrupted: bool = False
    _evaluations: list[float] = field(default_factory=list)

    def step(self, *, step: int, num_tokens: int, seconds: float) -> None:
        """A step, or several since the last report, is done; tokens and seconds since the run's and the attempt's begin."""
        if self._last is not None:
            took, tokens = seconds - self._last[0], num_tokens - self._last[1]
            if tokens > 0:
                (self._interrupted if self._was_interrupted else self._steps).append((took, tokens))
        self._last, self._was_interrupted = (seconds, num_tokens, step), False

    def interrupted(self) -> None:
        """An evaluation or a save has come in between."""
        self._was_interrupted = True

    def evaluated(self, seconds: float) -> None:
        self._evaluations.append(seconds)
        self.interrupted()

    @property
    def seconds_per_token(self) -> float | None:
        """None until there is a step to go by."""
        steps = self._steps or self._interrupted
        tokens = sum(tokens for _, tokens in steps)
        return sum(seconds for seconds, _ in steps) / tokens if tokens else None

    @property
    def tokens_per_second(self) -> float | None:
        return 1 / self.seconds_per_token if self.seconds_per_token else None

    @property
    def num_measured(self) -> int:
        """Steps that the pace goes by."""
        return len(self._steps or self._interrupted)

    @property
    def last_step(self) -> int:
        return self._last[2] if self._last else 0

    def is_known(self) -> bool:
        """Whether enough steps are done for a re-forecast that is worth keeping."""
        return self.num_measured >= MIN_STEPS and self.last_step >= MIN_SHARE * self.num_steps

    def seconds_left(self, end_seconds: float) -> float | None:
        """Until the end of the run: steps, evaluations at their mean, and what comes after the last step."""
        pace = self.seconds_per_token
        if pace is None or self._last is None:
            return None
        evaluations = self.num_evaluations_left * (sum(self._evaluations) / len(self._evaluations) if self._evaluations else 0.0)
        return max(0, self.num_tokens - self._last[1]) * pace + evaluations + end_seconds
