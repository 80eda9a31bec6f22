"""Finished runs in; the best of those that may be compared, the pace of each GPU, and how good the forecasts were, out."""

import json
from collections.abc import Iterable, Sequence
from functools import cache
from statistics import median
from typing import Any

from pydantic import BaseModel, ConfigDict

from job.deliver.history.runs import Run
from job.settings import DataSettings, LoraSettings, ModelSettings, TrainSettings
from job.settings.section import NEUTRAL, Section

FORECASTS = ("memory_bytes", "seconds", "cost_usd")
_SECTIONS: dict[str, type[Section]] = {"model": ModelSettings, "lora": LoraSettings, "data": DataSettings, "train": TrainSettings}
_DATA = {"model": ("model_id", "model_revision", "chat_template"), "train": ("seed",)}
"""What decides the held-out examples and their tokens, beside the whole data section."""


class Compared(BaseModel):
    """One of the runs that were measured on the same held-out data."""

    model_config = ConfigDict(frozen=True)

    run_id: str
    eval_loss: float
    cost_usd: float | None
    seconds: float | None
    settings: dict[str, str]
    """Those in which the runs differ, as they are written."""
    has_diverged: bool
    """On the way: then a part of it was trained with a lower learning rate than the setting says."""


class Value(BaseModel):
    """A value of a setting, and the runs that had it."""

    model_config = ConfigDict(frozen=True)

    value: str
    num_runs: int
    lowest_loss: float
    median_loss: float


class Difference(BaseModel):
    """A setting in which the runs differ; what went with it is a fact, and no proof that it is the cause."""

    model_config = ConfigDict(frozen=True)

    setting: str
    values: list[Value]
    """The lowest loss first."""


class BestRun(BaseModel):
    """Finished runs of one model, measured on the same held-out data: the lowest loss first."""

    model_config = ConfigDict(frozen=True)

    model: str
    data: list[str]
    runs: list[Compared]
    differences: list[Difference]


class Pace(BaseModel):
    """Tokens a second of one run."""

    model_config = ConfigDict(frozen=True)

    folder: str
    gpu: str
    """Or cpu."""
    model: str
    tokens_per_second: float


class Speed(BaseModel):
    """Tokens a second of all runs of one model on one GPU, in the middle and at the edges."""

    model_config = ConfigDict(frozen=True)

    gpu: str
    model: str
    num_runs: int
    median: float
    lowest: float
    highest: float


class Forecast(BaseModel):
    """Actual over planned, over the finished runs that were planned: 1 is a perfect forecast."""

    model_config = ConfigDict(frozen=True)

    what: str
    """memory_bytes, seconds or cost_usd."""
    num_runs: int
    median: float
    lowest: float
    highest: float


def best_runs(runs: Sequence[Run]) -> list[BestRun]:
    """Compare finished runs of the same model and data, wherever there are at least two; the largest group first."""
    alike: dict[str, list[Run]] = {}
    for run in runs:
        if run.outcome.is_finished and run.eval_loss is not None and run.model and run.settings:
            alike.setdefault(_held_out(run), []).append(run)
    groups = [_compare(those) for those in alike.values() if len(those) > 1]
    return sorted(groups, key=lambda group: -len(group.runs))


def paces(runs: Sequence[Run], measured: Iterable[Pace] = ()) -> list[Speed]:
    """The pace of each model on each GPU; what a run has written down goes before what its curve says, for it leaves out
    evaluations and saves."""
    found = {
        run.folder: Pace(folder=run.folder, gpu=run.device, model=run.model, tokens_per_second=run.tokens_per_second)
        for run in runs
        if run.device and run.model and run.tokens_per_second
    }
    found |= {pace.folder: pace for pace in measured}
    alike: dict[tuple[str, str], list[float]] = {}
    for pace in found.values():
        alike.setdefault((pace.gpu, pace.model), []).append(pace.tokens_per_second)
    return [
        Speed(gpu=gpu, model=model, num_runs=len(speeds), median=median(speeds), lowest=min(speeds), highest=max(speeds))
        for (gpu, model), speeds in sorted(alike.items(), key=lambda item: (-len(item[1]), item[0]))
    ]


def forecasts(runs: Sequence[Run]) -> list[Forecast]:
    """How near the plans came; quantities that were never planned are left out."""
    found = []
    for what in FORECASTS:
        ratios = [run.ratios[what] for run in runs if run.outcome.is_finished and what in run.ratios]
        if ratios:
            found.append(
                Forecast(what=what, num_runs=len(ratios), median=median(ratios), lowest=min(ratios), highest=max(ratios))
            )
    return found


def _held_out(run: Run) -> str:
    """The same for runs whose held-out losses may be compared."""
    told = {name: value for name, value in _section(run, "data").items() if name not in _neutral("data")}
    others = {section: [_section(run, section).get(name) for name in names] for section, names in _DATA.items()}
    return json.dumps([told, others, run.num_rows], sort_keys=True, default=str)


def _compare(runs: Sequence[Run]) -> BestRun:
    settings = {run.folder: _decisive(run) for run in runs}
    names = dict.fromkeys(name for values in settings.values() for name in values)
    differing = [name for name in names if len({values.get(name, "not set") for values in settings.values()}) > 1]
    ranked = sorted(runs, key=lambda run: run.eval_loss or 0.0)
    return BestRun(
        model=runs[0].model or "",
        data=runs[0].data,
        runs=[
            Compared(
                run_id=run.run_id,
                eval_loss=run.eval_loss or 0.0,
                cost_usd=run.cost_usd,
                seconds=run.seconds,
                settings={name: settings[run.folder].get(name, "not set") for name in differing},
                has_diverged="diverged" in run.survived,
            )
            for run in ranked
        ],
        differences=[
            _difference(name, [(settings[run.folder].get(name, "not set"), run.eval_loss or 0.0) for run in ranked])
            for name in differing
        ],
    )


def _difference(name: str, ranked: Sequence[tuple[str, float]]) -> Difference:
    losses: dict[str, list[float]] = {}
    for value, loss in ranked:
        losses.setdefault(value, []).append(loss)
    values = [
        Value(value=value, num_runs=len(those), lowest_loss=min(those), median_loss=median(those))
        for value, those in losses.items()
    ]
    return Difference(setting=name, values=sorted(values, key=lambda value: value.lowest_loss))


def _decisive(run: Run) -> dict[str, str]:
    """The settings that may change the result, by their upper-case names, as text."""
    micro, accumulation = (
        _section(run, "train").get(name) for name in ("per_device_train_batch_size", "gradient_accumulation_steps")
    )
    found = {
        name.upper(): _written(value)
        for section in ("model", "lora", "train")
        for name, value in _section(run, section).items()
        if name not in _neutral(section) and name not in _DATA.get(section, ())
    }
    if isinstance(micro, int) and isinstance(accumulation, int):  # their product is the effective batch then
        found["EFFECTIVE_BATCH_SIZE"] = _written(micro * accumulation)
    found.pop("GRADIENT_ACCUMULATION_STEPS", None)
    return found


def _section(run: Run, name: str) -> dict[str, Any]:
    section = run.settings.get(name)
    return section if isinstance(section, dict) else {}


def _written(value: Any) -> str:
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, float):
        return f"{value:.10g}"
    if value is None:
        return "not set"
    if isinstance(value, list) and all(isinstance(one, str) for one in value):
        return ",".join(value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


@cache
def _neutral(section: str) -> frozenset[str]:
    """Settings that change how a run goes and not what it makes."""
    fields = _SECTIONS[section].model_fields
    return frozenset(name for name, field in fields.items() if NEUTRAL in field.metadata)
