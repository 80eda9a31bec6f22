"""The bytes of a run's records in, what they say out, as far as it can be made out.

Records are years old, of other versions, cut short by a dying machine or no records of ours at all: every field is optional,
and one that is not as expected is None and is named. Nothing here raises for what a record holds.
"""

import re
from datetime import UTC, datetime
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, OnErrorOmit, ValidationError, ValidationInfo, WrapValidator

MOST_CHARACTERS = 2000
"""Of a text: a reason is a sentence or two, and a record may hold anything."""
MOST = 10**15
"""A count or an amount beyond is none."""
MOST_LEVELS = 6
"""Of lists and objects in a setting; TRAIN_ARGS may hold some."""

T = TypeVar("T")
R = TypeVar("R", bound=BaseModel)


_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]+")
"""Control characters, and what turns the direction of writing: a text could move the cursor, or seem to say something else."""


def plain(text: str) -> str:
    """The text on one line, without what a terminal would obey, and of a bounded length."""
    shown = " ".join(_UNPRINTABLE.sub(" ", text[:MOST_CHARACTERS]).encode("utf-8", "replace").decode("utf-8").split())
    return shown if len(text) <= MOST_CHARACTERS else f"{shown}…"


def _or_none(value: Any, validate: Any, info: ValidationInfo) -> Any:
    """None for what is not as expected; its field's name goes to the complaints that the caller has passed as context."""
    if value is None:
        return None
    try:
        return validate(value)
    except ValidationError:
        if isinstance(info.context, list) and info.field_name:
            info.context.append(info.field_name)
        return None


def _in_utc(value: datetime) -> datetime:
    try:
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)
    except OverflowError as error:
        raise ValueError("is no date") from error


def _tame(value: Any, depth: int = 0) -> Any:
    """Any JSON with its texts plain, and without numbers that neither JSON nor arithmetic can take."""
    if isinstance(value, dict) and depth < MOST_LEVELS:
        return {plain(name): _tame(one, depth + 1) for name, one in value.items()}
    if isinstance(value, list) and depth < MOST_LEVELS:
        return [_tame(one, depth + 1) for one in value]
    if isinstance(value, (int, float)):
        return value if abs(value) < MOST else None  # NaN is not
    return plain(value) if isinstance(value, str) else None


Loose = Annotated[T | None, WrapValidator(_or_none)]
Several = list[OnErrorOmit[T]]
Count = Annotated[int, Field(ge=0, le=MOST)]
Amount = Annotated[float, Field(ge=0, le=MOST, allow_inf_nan=False)]
Number = Annotated[float, Field(ge=-MOST, le=MOST, allow_inf_nan=False)]
Text = Annotated[str, AfterValidator(plain)]
Values = Annotated[dict[str, Any], AfterValidator(_tame)]
Moment = Annotated[datetime, AfterValidator(_in_utc)]


class _File(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class HappeningFile(_File):
    text: Loose[Text] = None


class NotesFile(_File):
    happenings: Loose[Several[HappeningFile]] = None


class AttemptFile(_File):
    """`attempts/0001.json`, or the same inside a report."""

    started: Loose[Moment] = None
    ended: Loose[Moment] = None
    machine: Loose[Text] = None
    price_usd_per_hour: Loose[Amount] = None
    first_step: Loose[Count] = None
    last_step: Loose[Count] = None
    stopped: Loose[Text] = None
    notes: Loose[NotesFile] = None
    is_unreadable: Loose[bool] = None

    @property
    def has_time(self) -> bool:
        """Whether it says when it was: without that it is no record of anything."""
        return self.started is not None and self.ended is not None and not self.is_unreadable


class SourceFile(_File):
    source: Loose[Text] = None
    num_rows: Loose[Count] = None
    held_out: Loose[bool] = None


class DataFile(_File):
    sources: Loose[Several[SourceFile]] = None
    num_eval: Loose[Count] = None


class ActualFile(_File):
    seconds: Loose[Amount] = None
    num_tokens: Loose[Count] = None
    num_steps: Loose[Count] = None
    peak_memory_bytes: Loose[Count] = None
    device: Loose[Text] = None


class PlanFile(_File):
    gpu: Loose[Text] = None


class ModelFile(_File):
    id: Loose[Text] = None


class ComparisonFile(_File):
    what: Loose[Text] = None
    ratio_to_plan: Loose[Amount] = None
    ratio_to_reforecast: Loose[Amount] = None


class EvaluationFile(_File):
    step: Loose[Number] = None
    eval_loss: Loose[Number] = None


class PublicationFile(_File):
    repo_id: Loose[Text] = None
    url: Loose[Text] = None


class ReportFile(_File):
    """`report.json`: what the history needs of it."""

    run_id: Loose[Text] = None
    stopped: Loose[Text] = None
    exit_status: Loose[int] = None
    reason: Loose[Text] = None
    plan: Loose[PlanFile] = None
    comparison: Loose[Several[ComparisonFile]] = None
    actual: Loose[ActualFile] = None
    data: Loose[DataFile] = None
    attempts: Loose[Several[AttemptFile]] = None
    curve: Loose[list[Any]] = None
    evaluations: Loose[Several[EvaluationFile]] = None
    chosen: Loose[EvaluationFile] = None
    happenings: Loose[Several[HappeningFile]] = None
    publication: Loose[PublicationFile] = None
    model: Loose[ModelFile] = None
    settings: Loose[dict[str, Any]] = None

    @property
    def is_ours(self) -> bool:
        """Whether it says how a run ended; other programs write a report.json too."""
        return self.stopped is not None or self.exit_status is not None

    @property
    def has_all_attempts(self) -> bool:
        """Whether it says of each attempt as much as the attempt's own record: one that vanished is "crashed" here."""
        return bool(self.attempts) and all(
            attempt.has_time and attempt.stopped not in (None, "crashed") for attempt in self.attempts or ()
        )


class SettingsFile(_File):
    """`settings.json`, or the same inside a report; the sections as they are."""

    model: Loose[Values] = None
    lora: Loose[Values] = None
    data: Loose[Values] = None
    train: Loose[Values] = None

    @property
    def is_ours(self) -> bool:
        return bool(self.model and "model_id" in self.model)

    @property
    def model_id(self) -> str | None:
        value = (self.model or {}).get("model_id")
        return plain(value) if isinstance(value, str) else None

    @property
    def data_names(self) -> list[str]:
        """Of the data sets that are trained on, as they were asked for."""
        specs = (self.data or {}).get("datasets")
        wheres = [spec.get("where") if isinstance(spec, dict) else spec for spec in specs] if isinstance(specs, list) else []
        return [plain(where) for where in wheres if isinstance(where, str)]


class SpeedFile(_File):
    """`.measured/<key>/<RUN_ID>.json`."""

    tokens_per_second: Loose[Amount] = None
    gpu: Loose[Text] = None
    model: Loose[Text] = None


def parse_record(kind: type[R], content: bytes) -> tuple[R | None, str | None]:
    """What the bytes hold, and what is wrong with them; None when it is nothing of this kind, or when nothing is wrong."""
    complaints: list[str] = []
    try:
        record = kind.model_validate_json(content, context=complaints)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        if first["type"] != "json_invalid":
            return None, "is no JSON object"
        return None, "is empty" if not content.strip(b" \r\n\t\0") else "is cut short or no JSON"
    return record, f"not as expected: {', '.join(dict.fromkeys(complaints))}" if complaints else None


def parse_settings(sections: dict[str, Any]) -> SettingsFile:
    """The settings inside a report."""
    return SettingsFile.model_validate(sections)


def curve_speed(curve: list[Any] | None, first_steps: list[int]) -> float | None:
    """Tokens a second over a run's logged steps; None without two of them that belong together.

    Args:
        curve: rows of `step`, `num_tokens` (of the whole run) and `seconds` (of one attempt: a new one begins at 0).
        first_steps: the last step before each attempt.
    """
    begins = sorted((first for first in first_steps if first), reverse=True)
    tokens = seconds = 0.0
    last: tuple[float, float, float] | None = None
    for row in curve or ():
        try:
            now = step, num_tokens, so_far = row["step"], row["num_tokens"], row["seconds"]
            if not (0 <= step < MOST and 0 <= num_tokens < MOST and 0 <= so_far < MOST):  # NaN is not
                continue
        except (TypeError, KeyError):
            continue
        is_new = False
        while begins and begins[-1] < step:
            begins.pop()
            is_new = True
        if last is not None and not is_new and num_tokens > last[1] and so_far > last[2]:
            tokens, seconds = tokens + num_tokens - last[1], seconds + so_far - last[2]
        last = now
    return tokens / seconds if seconds > 0 else None


_PATHS = re.compile(r"(?:\b[a-z][a-z0-9+.-]*://|(?<![\w.])[~.]{0,2}/)[^\s,;:()\"'<>]+", re.IGNORECASE)
_HEX = re.compile(r"\b(?:0x[0-9a-f]+|(?=[0-9a-f]*[a-f])(?=[a-f]*\d)[0-9a-f]{8,})\b", re.IGNORECASE)
_NUMBERS = re.compile(r"(?<![A-Za-z_])[-+]?\d+(?:[,_]\d{3})*(?:\.\d+)?(?:e[-+]?\d+)?", re.IGNORECASE)


def without_particulars(text: str) -> str:
    """A reason with paths, digests and numbers taken out, so that those of the same kind are the same."""
    for pattern, stand_in in ((_PATHS, "<path>"), (_HEX, "#"), (_NUMBERS, "#")):
        text = pattern.sub(stand_in, text)
    parts = text.split(", ")
    return ", ".join(part for index, part in enumerate(parts) if not index or part != parts[index - 1])
