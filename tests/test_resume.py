"""An interrupted run ends as an undisturbed one, bit for bit: data order, dropout, losses, evaluations, adapter."""

import itertools
import os
import random
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from trainer_child import Attempt, Training, losses_of, write_data

from job.events import Ended, Failed, Loaded
from job.keep.checkpoints import step_name
from job.train.state import put_rng, take_rng

EVALUATED = {"eval_steps": 3}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("prepared"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, data: Path) -> tuple[Training, Attempt]:
    training = Training(tmp_path_factory.mktemp("undisturbed"), tiny_model, data, train=EVALUATED)
    return training, training.run()


def assert_same(training: Training, attempts: list[Attempt], undisturbed: tuple[Training, Attempt]) -> None:
    assert losses_of(attempts) == undisturbed[1].losses
    assert {step: loss for one in attempts for step, loss in one.evaluations.items()} == undisturbed[1].evaluations
    assert training.adapter() == undisturbed[0].adapter()


def test_an_undisturbed_run_has_what_makes_resuming_hard(undisturbed: tuple[Training, Attempt]) -> None:
    training, attempt = undisturbed
    assert sorted(attempt.losses) == list(range(1, 15)) and sorted(attempt.evaluations) == [0, 3, 6, 9, 12, 14]
    tokens = [0, *(attempt.losses[step][3] for step in range(1, 15))]
    sizes = [after - before for before, after in itertools.pairwise(tokens)]
    assert max(sizes[3], sizes[7], sizes[11]) < 50 < min(sizes[:3]), "each fourth step is the last, partial one of an epoch"
    assert len({tuple(sizes[first : first + 3]) for first in (0, 4, 8)}) == 3, "each epoch has its own order"
    assert attempt.spec.lora.lora_dropout > 0
    assert training.steps() == [3, 6, 9, 12, 14], "each new lowest held-out loss is saved, and the end"


# In the middle of an epoch, at its last step, at the first of the next one, in an evaluation, in the optimizer's step, in a save.
@pytest.mark.parametrize("faults", [("term@2", "term@3", "term@7"), ("term@4", "term@5", "term-eval@9", "term-update@11")])
def test_a_run_that_is_stopped_at_awkward_moments_ends_as_an_undisturbed_one(
    faults: tuple[str, ...], tmp_path: Path, tiny_model: Path, data: Path, undisturbed: tuple[Training, Attempt]
) -> None:
    training = Training(tmp_path, tiny_model, data, train=EVALUATED)
    attempts = []
    for fault in faults:
        attempts.append(training.start(fault=fault))
        status, last, output = attempts[-1].end()
        assert (status, isinstance(last, Ended)) == (75, True), output
        steps_done = max(attempts[-1].losses)
        assert isinstance(last, Ended) and last.step == steps_done == training.steps()[-1], "a completed step was lost"
    attempts.append(training.run())
    assert_same(training, attempts, undisturbed)


@pytest.mark.parametrize("seed", [1, 2])
def test_a_run_that_is_stopped_and_killed_at_random_moments_ends_as_an_undisturbed_one(
    seed: int, tmp_path: Path, tiny_model: Path, data: Path, undisturbed: tuple[Training, Attempt]
) -> None:
    dice, attempts = random.Random(seed), list[Attempt]()
    training = Training(tmp_path, tiny_model, data, train=EVALUATED, save_steps=2)
    for _ in range(4):
        attempt = training.start()
        attempts.append(attempt)
        attempt.wait_for(lambda event: isinstance(event, Loaded))
        time.sleep(dice.random() * 0.5)
        attempt.process.kill() if dice.random() < 0.5 else attempt.process.terminate()
        status, last, output = attempt.end()
        assert status in (0, 75, -9), output
        if status == 75 and attempt.losses:
            assert isinstance(last, Ended) and last.step == max(attempt.losses) == training.steps()[-1]
    attempts.append(training.run())
    assert_same(training, attempts, undisturbed)


def test_a_checkpoint_holds_what_a_resume_needs_and_no_pickle_of_objects(undisturbed: tuple[Training, Attempt]) -> None:
    folder = undisturbed[0].checkpoints / step_name(14)
    files = {path.name for path in folder.iterdir()}
    tensors = {"adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"}
    assert files == tensors | {"adapter_config.json", "trainer_state.json", "manifest.json"}
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.load(folder / name, weights_only=True)


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_checkpoint_with_code_in_it_is_refused(
    name: str, tmp_path: Path, tiny_model: Path, data: Path, undisturbed: tuple[Training, Attempt]
) -> None:
    training = Training(tmp_path, tiny_model, data, num_steps=16)
    shutil.copytree(undisturbed[0].checkpoints, training.checkpoints)
    torch.save({"state": Payload(tmp_path / "owned")}, training.checkpoints / step_name(14) / name)
    status, last, output = training.start().end()
    assert status == 2 and isinstance(last, Failed), output
    assert f"step-000014/{name} is refused" in last.message
    assert not (tmp_path / "owned").exists()


def test_the_state_of_an_8_bit_paged_optimizer_comes_back_as_it_was(tmp_path: Path, tiny_model: Path, data: Path) -> None:
    options = {"train": {"optim": "paged_adamw_8bit"}, "lora": {"lora_r": 128}, "num_steps": 8}  # 8 bits from 4,096 elements on
    whole, parts = (Training(tmp_path / name, tiny_model, data, **options) for name in ("whole", "parts"))
    attempts = [whole.run(), parts.start(fault="term@3")]
    assert attempts[1].end()[0] == 75
    kept = torch.load(parts.checkpoints / step_name(2) / "optimizer.pt", weights_only=True)
    assert torch.uint8 in {tensor.dtype for state in kept["state"].values() for tensor in _tensors(state)}
    attempts.append(parts.run())
    assert losses_of(attempts[1:]) == attempts[0].losses and parts.adapter() == whole.adapter()


def _tensors(value: Any) -> list[torch.Tensor]:
    inside = value.values() if isinstance(value, dict) else []
    return [value] if isinstance(value, torch.Tensor) else [tensor for one in inside for tensor in _tensors(one)]


def test_every_random_generator_comes_back_as_it_was() -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.random()), float(torch.rand(()))

    before = take_rng()
    drawn = [draw() for _ in range(3)]
    put_rng(before)
    assert [draw() for _ in range(3)] == drawn


def test_a_run_that_was_killed_after_the_last_step_only_does_what_follows_it(
    tmp_path: Path, tiny_model: Path, data: Path, undisturbed: tuple[Training, Attempt]
) -> None:
    training = Training(tmp_path, tiny_model, data, train=EVALUATED)
    first = training.start(fault="kill-sample@14")
    assert first.end()[0] == -9
    shutil.rmtree(tmp_path / "adapter")
    second = training.run()
    assert not second.losses
    assert_same(training, [first, second], undisturbed)


@pytest.mark.parametrize(("micro_batch", "accumulation"), [(4, 2), (1, 8)])
def test_another_split_of_the_batch_trains_on_the_same_examples(
    micro_batch: int, accumulation: int, tmp_path: Path, tiny_model: Path, data: Path, still: Attempt
) -> None:
    training = Training(tmp_path, tiny_model, data, lora={"lora_dropout": 0.0})
    first = training.start(fault="oom@6")
    assert first.end()[0] == 4 and training.steps() == [5]
    second = training.run(micro_batch=micro_batch, gradient_accumulation_steps=accumulation)
    assert sorted(second.losses) == list(range(6, 15))
    for step, (loss, norm, rate, tokens) in losses_of([first, second]).items():
        expected = still.losses[step]
        assert (rate, tokens) == (expected[2], expected[3]), "not the same examples"
        assert loss == pytest.approx(expected[0], abs=1e-3) and norm == pytest.approx(expected[1], abs=1e-2)


@pytest.fixture(scope="module")
def still(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, data: Path) -> Attempt:
    """An undisturbed run without dropout."""
    return Training(tmp_path_factory.mktemp("still"), tiny_model, data, lora={"lora_dropout": 0.0}).run()


def test_steps_that_are_skipped_count_and_teach_nothing(
    tmp_path: Path, tiny_model: Path, data: Path, undisturbed: tuple[Training, Attempt]
) -> None:
    whole = Training(tmp_path / "whole", tiny_model, data, save_steps=1, skip_steps=(3, 4, 5))
    attempt = whole.run()
    rates = {step: rate for step, (_, _, rate, _) in attempt.losses.items()}
    expected = {step: rate for step, (_, _, rate, _) in undisturbed[1].losses.items() if step not in (3, 4, 5)}
    assert rates == expected, "the schedule goes on"
    adapters = [(whole.checkpoints / step_name(step) / "adapter_model.safetensors").read_bytes() for step in range(1, 7)]
    assert adapters[1] == adapters[2] == adapters[3] == adapters[4] != adapters[5] and adapters[0] == adapters[0]

    parts = Training(tmp_path / "parts", tiny_model, data, skip_steps=(3, 4, 5), save_steps=1)
    assert parts.start(fault="kill-save@4").end()[0] == -9 and parts.steps() == [1, 2, 3]
    parts.run()
    assert parts.adapter() == whole.adapter()


def test_a_lower_learning_rate_counts_from_the_checkpoint_on_and_once(
    tmp_path: Path, tiny_model: Path, data: Path, undisturbed: tuple[Training, Attempt]
) -> None:
    training = Training(tmp_path, tiny_model, data)
    attempts = []
    for scale, fault in ((1.0, "term@4"), (0.5, "term@8"), (0.5, "")):
        attempts.append(training.start(learning_rate_scale=scale, fault=fault))
        attempts[-1].end()
    rates = {step: rate for step, (_, _, rate, _) in losses_of(attempts).items()}
    for step, (_, _, rate, _) in undisturbed[1].losses.items():
        assert rates[step] == pytest.approx(rate * (1.0 if step < 4 else 0.5), rel=1e-12)
