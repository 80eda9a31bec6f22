"""What the summary tells at the end, and how the plan counts steps."""

from datetime import UTC, datetime, timedelta

import pytest

from job.data.tally import SourceTally, Tally
from job.deliver.report import Chosen, Report, Sample, count_actual, summarise
from job.events import Stopped
from job.keep.ledger import Attempt
from job.plan.forecast import Work, forecast
from job.settings import ModelSettings, Settings, TrainSettings, read_settings


def attempt(hours: float, price: float | None) -> Attempt:
    start = datetime(2026, 1, 1, tzinfo=UTC)
    return Attempt(
        started=start, ended=start + timedelta(hours=hours), machine="m", price_usd_per_hour=price, stopped=Stopped.FINISHED
    )


def report_for(settings: Settings, price: float | None = 2.0) -> Report:
    attempts = [attempt(0.5, price), attempt(1.0, price)]
    source = SourceTally(source="s", shape="text", revision=None, num_rows=9, num_kept=7, dropped={"duplicate": 2}, num_tokens=70)
    return Report(
        run_id="r-1",
        stopped=Stopped.FINISHED,
        exit_status=0,
        reason=None,
        plan=None,
        actual=count_actual(attempts, num_tokens=70, num_steps=3, peak_memory_bytes=1, device="cpu"),
        data=Tally(sources=[source], num_train=6, num_eval=1, num_train_tokens=60, num_learned_tokens=30, longest_tokens=20),
        attempts=attempts,
        evaluations=[{"step": 0, "eval_loss": 3.0}, {"step": 3, "eval_loss": 2.0}],
        chosen=Chosen(step=3, eval_loss=2.0),
        publication=None,
        samples=[Sample(prompt="p", before="b", after="a")],
        model={"id": settings.model.model_id, "revision": None},
        settings=settings.without_secrets(),
        versions={"torch": "2"},
    )


def test_the_summary_tells_where_everything_is() -> None:
    settings = read_settings({"MODEL_ID": "owner/base", "DATASETS": "owner/data"}, {}).settings
    text = summarise(report_for(settings), adapter="/store/adapter", report_file="/store/report.json")
    for part in ("2 attempt(s)", "$3.00", "1 h 30 min", "3.000 before, 2.000 after", "7 of 9 rows", "/store/adapter"):
        assert part in text
    unknown = summarise(report_for(settings, price=None), adapter="", report_file="")
    assert "cost unknown" in unknown and "$0" not in unknown


@pytest.mark.parametrize(
    ("given", "num_examples", "longest", "expected"),
    [
        ({}, 100, 512, (4, 4, 7)),
        ({}, 100, 4000, (1, 16, 7)),
        ({}, 5, 10, (5, 1, 1)),
        ({"num_train_epochs": 2.5}, 100, 512, (4, 4, 18)),
        ({"max_steps": 3}, 100, 512, (4, 4, 3)),
        ({"per_device_train_batch_size": 2}, 100, 10, (2, 8, 7)),
        ({"per_device_train_batch_size": 3, "gradient_accumulation_steps": 5}, 100, 10, (3, 5, 7)),
    ],
)
def test_the_plan_counts_batches_and_steps(
    given: dict[str, float], num_examples: int, longest: int, expected: tuple[int, int, int]
) -> None:
    settings = TrainSettings.model_validate(given)
    work = Work(num_examples=num_examples, num_tokens=num_examples * 5, longest_tokens=longest)
    plan = forecast(settings, ModelSettings(model_id="owner/model"), work)
    assert (plan.micro_batch, plan.gradient_accumulation_steps, plan.num_steps) == expected
    assert plan.effective_batch_size == plan.micro_batch * plan.gradient_accumulation_steps
