"""MAX_COST_USD and MAX_HOURS: what is left of them, and what a run does at their end, with real processes."""

import json
import math
import os
import re
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from conftest import Job, small_run
from hub_server import HubServer
from hypothesis import given
from hypothesis import strategies as st
from test_run import SLOW, TOKEN, manifests, wait_for

from job.deliver.record import Record
from job.display import Display
from job.errors import BudgetError, PreemptedError, SettingsError
from job.events import Ended, Loaded, Stepped, Stopped
from job.foresight import Foresight
from job.keep.budget import END_SECONDS, RESERVE, Budget, reserve_seconds, seconds_left
from job.keep.checkpoints import check
from job.keep.ledger import Attempt, Ledger
from job.keep.store import open_store, write_text
from job.plan.forecast import Plan, Work, forecast
from job.plan.nodes import Nodes
from job.settings import BudgetSettings, Settings, read_settings
from job.stopping import StopRequest
from job.supervise import ChildFailedError
from job.training import Training

A_DOLLAR_A_SECOND = "3600"
BEGUN = datetime(2026, 1, 1, tzinfo=UTC)


def attempt(seconds: float, price: float | None) -> Attempt:
    return Attempt(started=BEGUN, ended=BEGUN + timedelta(seconds=seconds), machine="m", price_usd_per_hour=price)


def cost(attempts: list[Attempt]) -> float:
    return sum(one.seconds / 3600 * (one.price_usd_per_hour or 0) for one in attempts)


prices = st.floats(0.01, 100)
attempts_made = st.lists(st.builds(attempt, st.floats(0, 1e6), st.none() | prices), max_size=6)
limits_set = st.builds(BudgetSettings, max_cost_usd=st.none() | st.floats(0.01, 1e5), max_hours=st.none() | st.floats(0.001, 1e4))


@given(attempts=attempts_made, limits=limits_set, price=prices, reserve=st.floats(0, 1e3))
def test_whoever_spends_what_is_left_stays_within_each_limit(
    attempts: list[Attempt], limits: BudgetSettings, price: float, reserve: float
) -> None:
    left = seconds_left(attempts, limits, price, reserve)
    if left > 1e9:
        assert limits.max_cost_usd is None or cost(attempts) <= limits.max_cost_usd
        assert limits.max_hours is None
        return
    after = [*attempts, attempt(max(left, 0) + reserve, price)]
    if left > 0 and limits.max_cost_usd is not None:
        assert cost(after) <= limits.max_cost_usd * (1 + 1e-6) + 1e-3
    if left > 0 and limits.max_hours is not None:
        assert sum(one.seconds for one in after) <= limits.max_hours * 3600 + 1e-3
    if left > 0:
        assert seconds_left(after, limits, price) == pytest.approx(0, abs=1e-3 + left * 1e-6), "some of it cannot be spent"


@given(attempts=attempts_made, another=st.builds(attempt, st.floats(0, 1e6), prices), limits=limits_set, price=prices)
def test_another_attempt_never_leaves_more_and_a_higher_limit_never_less(
    attempts: list[Attempt], another: Attempt, limits: BudgetSettings, price: float
) -> None:
    left = seconds_left(attempts, limits, price)
    assert seconds_left([*attempts, another], limits, price) <= left
    raised = {name: value * 2 for name, value in limits if name in ("max_cost_usd", "max_hours") and value is not None}
    assert seconds_left(attempts, limits.model_copy(update=raised), price) >= left
    assert seconds_left(attempts, limits, price, 5.0) <= left


measured = st.none() | st.floats(0, 1e4)


@given(save=measured, upload=measured, step=st.floats(0, 100), trained=st.none() | st.integers(0, 10**10), more=st.floats(0, 10))
def test_the_reserve_covers_each_of_its_parts(
    save: float | None, upload: float | None, step: float, trained: int | None, more: float
) -> None:
    def reserve(step_seconds: float = step, publishes: bool = False) -> float:
        return reserve_seconds(
            save_seconds=save, upload_seconds=upload, step_seconds=step_seconds, num_trained=trained, publishes=publishes
        )

    assert reserve() >= END_SECONDS + (save or 0) + (upload or 0) + step - 1e-6
    assert reserve(step + more) >= reserve()
    assert reserve(publishes=True) > reserve()


def test_what_an_unmeasured_checkpoint_costs_goes_by_its_size() -> None:
    small, large = (reserve_seconds(save_seconds=None, upload_seconds=None, num_trained=count) for count in (10**5, 10**9))
    assert small < 8 and large > 12e9 / 50e6


def budget_of(folder: Path, price: float | None = 3600.0, **limits: Any) -> tuple[Budget, Ledger]:
    ledger = Ledger(open_store(str(folder / "store")), folder, price_usd_per_hour=price)
    return Budget(BudgetSettings(**limits), ledger), ledger


def test_a_limit_in_dollars_without_a_price_is_refused_with_the_way_out(tmp_path: Path) -> None:
    budget, _ = budget_of(tmp_path, None, max_cost_usd=30.0)
    with pytest.raises(SettingsError, match="MAX_COST_USD=30: the price of this machine is not known; set GPU_HOURLY_RATE"):
        budget.check_start()
    budget_of(tmp_path, None, max_hours=30.0)[0].check_start()


def test_attempts_that_are_not_known_count_as_nothing_and_are_told(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "store"))
    write_text(store, "attempts/0001.json", "{", tmp_path)
    write_text(store, "attempts/0002.json", attempt(10, None).model_dump_json(), tmp_path)
    write_text(store, "attempts/0003.json", attempt(10, 3600).model_dump_json(), tmp_path)
    budget, _ = budget_of(tmp_path, max_cost_usd=30.0)
    assert budget.seconds_left(keeps_reserve=False) == pytest.approx(20, abs=1)
    warning = budget.warning() or ""
    assert "the record of 1 attempt" in warning and "the price of 1 attempt" in warning
    assert "price" not in (budget_of(tmp_path, max_hours=1.0)[0].warning() or "")
    assert budget_of(tmp_path)[0].warning() is None


def test_a_start_may_not_keep_back_less_than_the_stop_before_it_did(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "store"))
    stopped = attempt(20, 3600).model_copy(update={"stopped": Stopped.BUDGET, "notes": {RESERVE: 12.0}})
    write_text(store, "attempts/0001.json", stopped.model_dump_json(), tmp_path)
    with pytest.raises(BudgetError, match=r"MAX_COST_USD=30: .*\$20.* nothing is started"):
        budget_of(tmp_path, max_cost_usd=30.0)[0].check_start()
    budget_of(tmp_path, max_cost_usd=33.0)[0].check_start()


@contextmanager
def stop_request() -> Iterator[StopRequest]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield StopRequest()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_what_comes_first_decides_the_status_a_signal_or_the_budget(tmp_path: Path) -> None:
    budget, _ = budget_of(tmp_path, max_hours=0.1 / 3600)
    with stop_request() as stop:
        stop.limit(budget)
        assert stop.is_asked()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.count == 1 and stop.stopped is Stopped.BUDGET
        assert isinstance(stop.error(), BudgetError)
        assert stop.seconds_left(30) > 0, "one signal does not cut the saving off"
    with stop_request() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        stop.limit(budget)
        assert stop.is_asked() and stop.stopped is Stopped.PREEMPTED
        assert isinstance(stop.error(), PreemptedError)


def test_a_download_is_left_when_the_budget_ends(tmp_path: Path) -> None:
    budget, _ = budget_of(tmp_path, max_hours=(END_SECONDS + 0.4) / 3600)
    with stop_request() as stop:
        stop.limit(budget)
        begun = time.monotonic()
        with pytest.raises(BudgetError, match="MAX_HOURS="), stop.at_once():
            time.sleep(10)
        assert 0.2 < time.monotonic() - begun < 2
        stop.limit(None)
        with stop.at_once():
            assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


class Trainer:
    """Stands for the trainer's process: reports the steps, and does as it is asked between them."""

    def __init__(self, settings: Settings, folder: Path, stop: StopRequest, plan: Plan) -> None:
        self.stop, self.num_starts, self.num_steps = stop, 0, plan.num_steps
        self.stops_at_the_end = False
        store = open_store(str(folder / "store"))
        record = Record(settings, "r", store, folder)
        self.ledger = Ledger(store, folder, price_usd_per_hour=None)
        self.budget = Budget(settings.budget, self.ledger)
        self.record = record
        display = Display(usd_per_hour=None, redact=str)
        self.training = Training(
            settings,
            run_id="r",
            store=store,
            work=folder,
            environ={"CUDA_VISIBLE_DEVICES": ""},
            display=display,
            stop=stop,
            record=record,
            ledger=self.ledger,
            budget=self.budget,
            foresight=Foresight(
                plan,
                None,
                longest_tokens=10,
                optimizer="adamw_torch",
                eval_steps=None,
                has_eval=False,
                ledger=self.ledger,
                display=display,
            ),
            start_child=self.start,
            nodes=Nodes(),
        )

    def start(self, *_: Any, **__: Any) -> None:
        self.num_starts += 1
        self._tell(Loaded(device="cpu", num_parameters=10, num_trainable=10, dtype="float32"))
        for step in range(1, self.num_steps + 1):
            row = {"loss": 1.0, "learning_rate": 0.1, "grad_norm": 1.0, "num_tokens": step, "seconds": step / 100}
            self._tell(Stepped(step=step, num_steps=self.num_steps, **row))
            if step < self.num_steps and self.stop.is_asked():
                raise ChildFailedError(self.stop.error(), self.stop.stopped)
        if self.stops_at_the_end and self.num_starts == 1:
            raise ChildFailedError(BudgetError("it was asked in its last step"), Stopped.BUDGET)
        while self.budget.seconds_left(keeps_reserve=False) > 0:
            time.sleep(0.1)
        assert not self.stop.is_asked(), "all is trained, and it was stopped"
        self._tell(Ended(stopped=Stopped.FINISHED, step=self.num_steps, peak_memory_bytes=1))

    def _tell(self, event: Any) -> None:
        for hear in (self.record.add, self.budget.add, self.training.on_event):
            hear(event)


@pytest.mark.parametrize("stops_at_the_end", [False, True])
def test_training_that_is_over_is_not_thrown_away(tmp_path: Path, tiny_model: Path, stops_at_the_end: bool) -> None:
    given_settings = {"MODEL_ID": str(tiny_model), "DATASETS": "owner/data", "MAX_STEPS": "3"}
    settings = read_settings(given_settings | {"MAX_HOURS": str((END_SECONDS + 3) / 3600)}, {}, folder=tmp_path).settings
    work = Work(num_examples=100, num_tokens=1000, longest_tokens=10)
    plan = forecast(settings.train, settings.model, work)
    with stop_request() as stop:
        trainer = Trainer(settings, tmp_path, stop, plan)
        trainer.stops_at_the_end = stops_at_the_end
        trainer.training.run(tmp_path, plan)
        assert trainer.num_starts == 1 + stops_at_the_end
        assert re.match(r"MAX_HOURS=.* exceeded by", trainer.budget.overrun() or "")


def spent_seconds(job: Job) -> list[float]:
    records = [path.read_text("utf-8") for path in sorted(job.kept.glob("attempts/*.json"))]
    return [Attempt.model_validate_json(record).seconds for record in records]


def hub_settings(job: Job, hub: HubServer) -> dict[str, str]:
    fixed = {"HF_HUB_OFFLINE": "0", "HF_HOME": str(job.folder / "hf"), "HF_TOKEN": TOKEN, "HUB_MODEL_ID": "tester/tuned"}
    return {**fixed, "HF_ENDPOINT": hub.url}


def newest(job: Job) -> Path:
    return max(path.parent for path in manifests(job))


@pytest.fixture(scope="module")
def enough(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, conversations: Path) -> int:
    """Seconds in which a run gets well into its steps, however busy this machine is: a start takes 8 s, or 30."""
    job = Job(tmp_path_factory.mktemp("start"), small_run(tiny_model, conversations))
    begun = time.monotonic()
    process = job.start("run", **SLOW)
    wait_for(lambda: manifests(job), process)
    seconds = time.monotonic() - begun
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    return math.ceil(1.5 * seconds + 8)


def test_attempts_that_were_killed_count_and_a_raised_budget_continues(job: Job, enough: int) -> None:
    settings = {**SLOW, "GPU_HOURLY_RATE": A_DOLLAR_A_SECOND, "MAX_COST_USD": "10000"}
    for number in (1, 2):
        process = job.start("run", **settings)
        wait_for(partial(_is_counted, job, number), process)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    limit = math.ceil(sum(spent_seconds(job))) + enough + 10
    with HubServer({TOKEN: "tester"}) as hub:
        hub.fail("POST", "/commit/", status=403, times=50)
        settings |= {"MAX_COST_USD": str(limit), "PUBLISH_ON_BUDGET": "1"}
        to_hub = hub_settings(job, hub)
        status, output = job.run("run", **settings, **to_hub)
        assert status == 8, output
        assert "warning: PUBLISH_ON_BUDGET=1: HUB_MODEL_ID=tester/tuned: the adapter could not be published" in output
    assert job.report()["publication"] is None
    spent = spent_seconds(job)
    assert len(spent) == 3 and min(spent) > 0
    # No slack: what a killed attempt cost after its last beat is in no record (10 s each at most), so the ledger counts less
    # than was spent, and never more.
    assert limit - job.report()["attempts"][2]["notes"][RESERVE] <= sum(spent) <= limit
    last_step = check(newest(job)).step
    assert last_step == job.report()["attempts"][2]["last_step"] > 0
    assert check(job.kept / "budget-adapter").step == last_step

    begun = time.monotonic()
    status, output = job.run("run", **settings)
    assert status == 8 and f"MAX_COST_USD={limit}" in output and "nothing is started" in output, output
    assert "fetching" not in output and time.monotonic() - begun < 8
    assert spent_seconds(job) == spent

    shutil.rmtree(job.folder / "work")  # another machine
    raised = {**settings, "MAX_COST_USD": "10000", "MAX_STEPS": str(last_step + 3)}
    status, output = job.run("run", **raised)
    assert status == 0, output
    assert job.report()["attempts"][3]["first_step"] == last_step
    assert job.report()["actual"]["num_steps"] == last_step + 3


def _is_counted(job: Job, number: int) -> bool:
    """Whether the first attempt's record was brought up to date in training, and the second one has begun to train."""
    record = job.kept / f"attempts/000{number}.json"
    steps = json.loads(record.read_text("utf-8"))["last_step"] if record.exists() else None
    return bool(manifests(job)) and bool(steps)


def test_a_budget_that_ends_before_training_says_so_and_starts_nothing_more(job: Job) -> None:
    status, output = job.run("run", MAX_HOURS=str((END_SECONDS + 2.5) / 3600))
    assert status == 8 and "nothing was trained yet" in output, output
    assert job.report()["stopped"] == "budget" and "loading the model" not in output
    status, output = job.run("run", MAX_HOURS=str((END_SECONDS + 2.5) / 3600))
    assert status == 8 and "nothing is started" in output, output
    assert len(list(job.kept.glob("attempts/*.json"))) == 1


def test_a_budget_stops_the_run_before_its_end_and_publishes_and_a_raised_one_goes_on(job: Job, enough: int) -> None:
    limit = enough + 10
    with HubServer({TOKEN: "tester"}) as hub:
        settings = {**hub_settings(job, hub), **SLOW, "PUBLISH_ON_BUDGET": "1", "GPU_HOURLY_RATE": A_DOLLAR_A_SECOND}
        begun = time.monotonic()
        status, output = job.run("run", **settings, MAX_COST_USD=str(limit))
        seconds = time.monotonic() - begun
        assert status == 8, output
        assert seconds < limit, "the process itself, with Python's start and end, cost more than the budget"
        report = job.report()
        assert (report["stopped"], report["exit_status"]) == ("budget", 8)
        assert limit - 18 < report["actual"]["cost_usd"] <= limit
        [done] = report["attempts"]
        step = done["last_step"]
        assert done["stopped"] == "budget" and step > 0
        assert check(newest(job)).step == step == report["actual"]["num_steps"]
        assert f"of ${limit}.00" in output
        assert re.search(rf"MAX_COST_USD={limit}: .*the checkpoint of step {step} is saved; raise it", output)
        assert report["publication"]["step"] == report["chosen"]["step"] == step
        files = hub.files("model", "tester/tuned")
        assert files["adapter_model.safetensors"] == (newest(job) / "adapter_model.safetensors").read_bytes()
        assert {"adapter_config.json", "tokenizer.json", "tokenizer_config.json"} <= files.keys()
        assert f"Not finished:** its budget ended the training at step {step} of 3000" in files["README.md"].decode()
        assert str(job.folder).encode() not in b"".join(files.values())
        message = hub.repos["model", "tester/tuned"].branches["main"][-1].message
        assert f"step {step}" in message and "budget" in message
        assert check(job.kept / "budget-adapter").step == step

        status, output = job.run("run", **settings | {"MAX_STEPS": str(step + 3)}, MAX_COST_USD="10000", MAX_HOURS="1")
        assert status == 0, output
        assert job.report()["attempts"][1]["first_step"] == step
        assert job.report()["publication"]["step"] is None
        final = hub.files("model", "tester/tuned")
        assert final["adapter_model.safetensors"] == (job.kept / "adapter/adapter_model.safetensors").read_bytes()
        assert final["adapter_model.safetensors"] != files["adapter_model.safetensors"]
        assert "Not finished" not in final["README.md"].decode()
