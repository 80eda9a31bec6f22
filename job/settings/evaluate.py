"""Settings of choosing and showing: which checkpoint becomes the adapter, and which prompts are answered."""

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, ValidationInfo, field_validator, model_validator

from job.settings.eval_prompts import EvalPrompt, read_eval_prompts
from job.settings.section import NEUTRAL, Section


class EvaluateSettings(Section):
    title = "Evaluation"

    select_by: Annotated[Literal["eval_loss", "score", "last"], NEUTRAL] = "eval_loss"
    """Checkpoint that becomes the adapter: the lowest held-out loss, the best score on EVAL_PROMPTS, or the last step."""
    eval_scorer: Annotated[Literal["exact_match", "contains", "regex", "json", "python"] | None, NEUTRAL] = None
    """How answers are scored where a prompt has something expected and names no scorer of its own; contains by default."""
    eval_prompts: Annotated[tuple[EvalPrompt, ...], NEUTRAL] = ()
    """Prompts that the base model and every kept checkpoint answer: lines, or a file of lines or of JSON with `expected`."""
    eval_max_new_tokens: Annotated[PositiveInt, Field(le=8192), NEUTRAL] = 128
    """Longest answer to an evaluation prompt, in tokens."""

    @field_validator("eval_prompts", mode="before")
    @classmethod
    def _read_prompts(cls, value: Any, info: ValidationInfo) -> Any:
        return read_eval_prompts(value, info.data.get("eval_scorer")) if isinstance(value, str) else value

    @property
    def is_scored(self) -> bool:
        """Whether any answer gets a score."""
        return any(prompt.scorer for prompt in self.eval_prompts)

    @model_validator(mode="after")
    def _score_needs_scorers(self) -> "EvaluateSettings":
        if self.select_by == "score" and not self.is_scored:
            raise ValueError(
                "SELECT_BY=score: no prompt of EVAL_PROMPTS has a score; give them `expected` answers or `tests`, or select by "
                "eval_loss"
            )
        return self
