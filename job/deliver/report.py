"""What was planned beside what happened: `report.json`, and a short summary for the screen."""

from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from job.data.tally import Tally
from job.deliver.compare import Comparison, comparison_lines
from job.events import Answer, Stopped
from job.keep.ledger import Attempt, cost_usd
from job.plan.forecast import Plan
from job.plan.progress import Reforecast

MAX_CURVE = 1000
"""Points of a curve: more than a screen has columns."""

ENERGY = "energy_kwh"
"""Note in the ledger of what an attempt's GPUs have drawn."""

PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "datasets", "huggingface_hub", "accelerate")


class Actual(BaseModel):
    """What happened, over all attempts."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    seconds: float
    cost_usd: float | Literal["unknown"]
    num_tokens: int
    num_steps: int
    peak_memory_bytes: int | None
    device: str | None
    energy_kwh: float | None = None
    """Of the GPUs alone, by nvidia-smi; None where it does not tell."""


class Candidate(BaseModel):
    """A checkpoint that could have become the adapter, or the base model (step 0)."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    step: int
    eval_loss: float | None = None
    perplexity: float | None = None
    """e to the power of `eval_loss`; None where that is more than a float holds."""
    score: float | None = None
    """Mean over the prompts that are scored, 0 to 1."""


class Chosen(Candidate):
    """The checkpoint that became the adapter."""

    by: str = "last"
    """What decided: eval_loss, score or last."""


class Sample(BaseModel):
    """One prompt with its answers side by side."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    prompt: str
    before: str
    """Of the base model."""
    after: str
    """Of the adapter."""
    scorer: str | None = None
    answers: list[Answer] = []
    """Of the base model (step 0) and of each kept checkpoint, in order of their steps."""


class Publication(BaseModel):
    """Where the adapter was published."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    repo_id: str
    revision: str
    commit: str
    url: str
    step: int | None = None
    """Of an adapter that was published where the budget ended the training; None when it is the finished one."""
    merged_repo_id: str | None = None
    """Where the merged model went."""
    merged_commit: str | None = None


class Happening(BaseModel):
    """Something out of the ordinary on the way: a retreat, a roll-back, a restart."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    at: datetime
    step: int | None
    """The last step that was logged before."""
    text: str


class Report(BaseModel):
    """`report.json`."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True, title="Report of a qlora-job run")

    schema_version: int = 1
    """Grows when a field changes its meaning or goes; new fields do not change it."""

    run_id: str
    stopped: Stopped
    exit_status: int
    reason: str | None
    plan: Plan | None
    reforecast: Reforecast | None = None
    """What the first 5% of the steps foretold."""
    memory_factor: float | None = None
    """What the first micro-batch kept for its backward pass (on a GPU: what came and went at its peak), over the plan."""
    comparison: list[Comparison] = []
    """Plan, re-forecast and actual side by side."""
    actual: Actual
    data: Tally | None
    attempts: list[Attempt]
    curve: list[dict[str, float | None]] = []
    """Logged steps as in metrics.jsonl, thinned to MAX_CURVE: {"step", "loss", "learning_rate", "grad_norm", "num_tokens",
    "seconds", "memory_bytes", "eval_loss"?}."""
    evaluations: list[dict[str, float]]
    """Held-out loss by step, in order: {"step", "eval_loss"}."""
    candidates: list[Candidate] = []
    """The base model and the kept checkpoints, in order of their steps."""
    chosen: Chosen | None
    happenings: list[Happening] = []
    """Of all attempts, in order."""
    publication: Publication | None
    samples: list[Sample]
    model: dict[str, str | None]
    """Id and resolved revision of the base model."""
    settings: dict[str, Any]
    versions: dict[str, str]


def count_actual(
    attempts: list[Attempt], *, num_tokens: int, num_steps: int, peak_memory_bytes: int | None, device: str | None
) -> Actual:
    cost = cost_usd(attempts)
    return Actual(
        seconds=round(sum(attempt.seconds for attempt in attempts), 1),
        cost_usd="unknown" if cost is None else round(cost, 4),
        num_tokens=num_tokens,
        num_steps=num_steps,
        peak_memory_bytes=peak_memory_bytes,
        device=device,
        energy_kwh=_energy_kwh(attempts),
    )


def _energy_kwh(attempts: list[Attempt]) -> float | None:
    """Of all attempts; None when none of them could measure it."""
    known = [value for attempt in attempts if isinstance(value := attempt.notes.get(ENERGY), (int, float))]
    return round(sum(known), 4) if known else None


def find_versions() -> dict[str, str]:
    """Versions of the packages that shape the result."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def summarise(report: Report, *, adapter: str, report_file: str) -> str:
    """The last lines on the screen: how it went, where everything is, and two answers before and after."""
    actual = report.actual
    cost = "cost unknown (set GPU_HOURLY_RATE)" if actual.cost_usd == "unknown" else f"${actual.cost_usd:.2f}"
    lines = [
        "",
        f"run {report.run_id}: {report.stopped} after {actual.num_steps} steps, {actual.num_tokens:,} tokens, "
        f"{_duration(actual.seconds)} in {len(report.attempts)} attempt(s), {cost}",
    ]
    if len(report.evaluations) > 1:
        first, last = report.evaluations[0]["eval_loss"], report.evaluations[-1]["eval_loss"]
        after = report.chosen.eval_loss if report.chosen and report.chosen.eval_loss is not None else last
        lines.append(f"held-out loss: {first:.3f} before, {after:.3f} after")
    if report.data is not None:
        rows = sum(source.num_rows for source in report.data.sources)
        kept = sum(source.num_kept for source in report.data.sources)
        lines.append(f"data: {kept} of {rows} rows kept ({report.data.num_train} to train, {report.data.num_eval} held out)")
    if len(told := candidate_lines(report)) > 2 or any(one.score is not None for one in report.candidates):
        lines += ["", *told]
    if told := comparison_lines(report.comparison):
        lines += ["", *told]
    for sample in report.samples:
        lines += ["", f"prompt   {_one_line(sample.prompt)}"]
        lines += [f"  before {_one_line(sample.before)}", f"  after  {_one_line(sample.after)}"]
    lines += ["", f"adapter  {adapter}", f"report   {report_file}"]
    if report.publication is not None:
        lines.append(f"Hub      {report.publication.url}")
    return "\n".join(lines)


def candidate_lines(report: Report) -> list[str]:
    """The base model and the kept checkpoints, a line each; none where nothing was measured."""
    lines = []
    for one in report.candidates:
        parts = [f"held-out loss {one.eval_loss:.4f}" if one.eval_loss is not None else ""]
        parts += [f"perplexity {one.perplexity:.2f}" if one.perplexity is not None else ""]
        parts += [f"score {one.score:.3f}" if one.score is not None else ""]
        if told := ", ".join(part for part in parts if part):
            chosen = f" <- the adapter, by {report.chosen.by}" if report.chosen and report.chosen.step == one.step else ""
            lines.append(f"{'base model' if one.step == 0 else f'step {one.step}':<12} {told}{chosen}")
    return lines


def _one_line(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= 160 else flat[:159] + "…"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
