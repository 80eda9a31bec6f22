"""A run that diverges stops at the step that shows it and keeps nothing of it; a run that overfits ends early."""

import math
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st
from trainer_child import Attempt, Training, write_data

from job.events import Ended, Failed, Stopped
from job.keep.checkpoints import best_step, local_losses
from job.train.guards import MAX_OVERFLOWS, MIN_CALM, NUM_HIGH, DivergenceError, LossGuard


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("prepared"))


def guard(**options: Any) -> LossGuard:
    return LossGuard(**{"has_scaler": False, "is_shuffled": True, **options})


def first_alarm(losses: list[float], **options: Any) -> DivergenceError | None:
    judge = guard(**options)
    try:
        for step, loss in enumerate(losses, 1):
            judge.check(step, loss, 1.0)
    except DivergenceError as error:
        return error
    return None


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_loss_or_norm_that_is_not_finite_is_enough(bad: float) -> None:
    with pytest.raises(DivergenceError) as caught:
        guard().check(1, bad, 1.0)
    assert (caught.value.first_step, caught.value.step) == (1, 1)
    with pytest.raises(DivergenceError):
        guard().check(1, 1.0, bad)
    with pytest.raises(DivergenceError):
        guard(has_scaler=True).check(1, bad, 1.0)


def test_gradients_that_overflow_in_float16_are_skips_until_the_scale_is_used_up() -> None:
    judge = guard(has_scaler=True)
    for step in range(1, MAX_OVERFLOWS):
        judge.check(step, 1.0, math.inf)
    judge.check(MAX_OVERFLOWS, 1.0, 1.0)
    for step in range(100, 99 + MAX_OVERFLOWS):
        judge.check(step, 1.0, math.inf)
    with pytest.raises(DivergenceError) as caught:
        judge.check(99 + MAX_OVERFLOWS, 1.0, math.inf)
    assert (caught.value.first_step, caught.value.step) == (100, 99 + MAX_OVERFLOWS)


def test_a_loss_far_above_its_median_for_long_is_an_alarm_with_its_window() -> None:
    alarm = first_alarm([1.0] * MIN_CALM + [6.0] * NUM_HIGH)
    assert alarm is not None and (alarm.first_step, alarm.step) == (MIN_CALM + 1, MIN_CALM + NUM_HIGH)
    assert first_alarm([1.0] * MIN_CALM + [6.0] * (NUM_HIGH - 1) + [1.0] + [6.0] * (NUM_HIGH - 1)) is None
    assert first_alarm([1.0] * MIN_CALM + [6.0] * NUM_HIGH, is_shuffled=False) is None


@given(st.lists(st.floats(0.0, 8.0), max_size=300), st.integers(2, 24))
def test_spikes_with_calm_steps_between_them_are_no_alarm(spikes: list[float], distance: int) -> None:
    assert first_alarm([1.0 + (spike if number % distance else 0.0) for number, spike in enumerate(spikes)]) is None


@given(st.lists(st.floats(0.01, 2.0), max_size=300))
def test_noise_below_two_nats_is_no_alarm(losses: list[float]) -> None:
    assert first_alarm(losses) is None


@given(st.lists(st.floats(0.5, 9.0), min_size=60, max_size=120), st.integers(0, 119))
def test_a_guard_that_was_saved_and_loaded_judges_as_before(losses: list[float], cut: int) -> None:
    straight, resumed = guard(), guard()
    for step, loss in enumerate(losses):
        outcomes = list[tuple[int, int] | None]()
        if step == cut:
            state, resumed = resumed.state(), guard()
            resumed.load(state)
        for judge in (straight, resumed):
            try:
                judge.check(step, loss, 1.0)
                outcomes.append(None)
            except DivergenceError as error:
                outcomes.append((error.first_step, error.step))
        assert outcomes[0] == outcomes[1]


def diverged(attempt: Attempt) -> Failed:
    status, last, output = attempt.end()
    assert status == 7, output
    assert isinstance(last, Failed) and (last.exit_status, last.stopped) == (7, Stopped.DIVERGED)
    return last


def num_tokens(data: Path, examples: tuple[tuple[str, int], ...]) -> int:
    lengths = {(row["source"], row["row"]): len(row["input_ids"]) for row in datasets.load_from_disk(str(data / "train"))}
    return sum(lengths[example] for example in examples)


def test_a_step_that_is_not_finite_is_noticed_at_once_and_can_be_skipped(tmp_path: Path, tiny_model: Path, data: Path) -> None:
    options = {"save_steps": 2, "train": {"logging_steps": 50}}
    training = Training(tmp_path / "run", tiny_model, data, **options)
    failed = diverged(training.start(fault="nan@7*"))
    assert (failed.first_step, failed.step) == (7, 7)
    assert training.steps() == [2, 4, 6]
    assert len(set(failed.examples)) == 8
    tokens = Training(tmp_path / "counted", tiny_model, data).run().losses
    assert num_tokens(data, failed.examples) == tokens[7][3] - tokens[6][3], "not the examples of that step"
    rest = training.run(fault="nan@7*", skip_steps=(7,), learning_rate_scale=0.5)
    assert rest.losses and training.steps()[-1] == 14


def test_a_broken_adapter_shows_in_the_step_after_it(tmp_path: Path, tiny_model: Path, data: Path) -> None:
    train = {"learning_rate": 1e30, "max_grad_norm": 1e30, "warmup_steps": 0, "lr_scheduler_type": "constant"}
    training = Training(tmp_path, tiny_model, data, train=train, save_steps=100)
    assert diverged(training.start()).step in (2, 3)
    assert training.steps() == []


def test_nothing_is_saved_while_the_loss_is_far_too_high(tmp_path: Path, tiny_model: Path, data: Path) -> None:
    training = Training(tmp_path, tiny_model, data, num_steps=90, save_steps=2)
    failed = diverged(training.start(fault=f"spike@{MIN_CALM + 6}"))
    assert (failed.first_step, failed.step) == (MIN_CALM + 6, MIN_CALM + 5 + NUM_HIGH)
    assert training.steps()[-1] == MIN_CALM + 5
    assert len(failed.examples) == 64


OVERFIT = {"learning_rate": 0.05, "eval_steps": 2, "early_stopping_patience": 2}


def test_a_held_out_loss_that_rises_ends_the_run_with_the_best_checkpoint_kept(
    tmp_path: Path, tiny_model: Path, data: Path
) -> None:
    whole = Training(tmp_path / "whole", tiny_model, data, train=OVERFIT, num_steps=60)
    attempt = whole.run()
    last = attempt.events[-1]
    assert isinstance(last, Ended) and last.step < 60
    trained = {step: loss for step, loss in attempt.evaluations.items() if step > 0}
    assert last.chosen_step == min(trained, key=lambda step: trained[step]) == last.step - 4
    assert local_losses(whole.checkpoints) == trained
    assert best_step(local_losses(whole.checkpoints)) == last.chosen_step

    parts = Training(tmp_path / "parts", tiny_model, data, train=OVERFIT, num_steps=60)
    stopped = parts.start(fault=f"term-eval@{last.step}")  # in the evaluation that decides
    assert stopped.end()[0] == 75
    resumed = parts.run()
    assert not resumed.losses and resumed.evaluations == {last.step: trained[last.step]}
    assert parts.adapter() == whole.adapter()
