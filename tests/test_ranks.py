"""Several ranks: the losses of one, whole checkpoints that any number of ranks continues, and an end that all of them share.

Two processes on a CPU over gloo stand for two GPUs over NCCL.
"""

import json
import random
import signal
import socket
import time
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from conftest import Job
from hypothesis import given
from hypothesis import strategies as st
from trainer_child import Attempt, Training, losses_of, write_data

from job.events import Ended, Evaluated, Failed, Loaded, Stepped, Stopped
from job.keep.checkpoints import list_steps
from job.keep.store import open_store
from job.train.ranks import Ranks, Shares

EVALUATED = {"eval_steps": 3}
UNDROPPED = {"lora_dropout": 0.0}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class Pair:
    """Two ranks of one attempt."""

    def __init__(self, training: Training, faults: Mapping[int, str] | None = None) -> None:
        place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        self.first, self.second = (
            training.start(
                environ={**place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                fault=(faults or {}).get(rank, ""),
                num_devices=2,
                parallel="ddp",
                gradient_accumulation_steps=2,
            )
            for rank in range(2)
        )

    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter((self.first, self.second))

    def run(self) -> "Pair":
        for one in self:
            status, last, output = one.end()
            assert status == 0, output
            assert isinstance(last, Ended) and last.stopped is Stopped.FINISHED
        return self

    def end_of_first(self) -> tuple[int, Ended | Failed]:
        """How the first rank ends; the other is killed then, as the supervisor does."""
        status, last, output = self.first.end()
        assert isinstance(last, Ended | Failed), output
        self.second.process.kill()
        self.second.end()
        return status, last


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("prepared"))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, data: Path) -> Attempt:
    return Training(tmp_path_factory.mktemp("alone"), tiny_model, data, train=EVALUATED, lora=UNDROPPED).run()


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, data: Path) -> tuple[Training, Pair]:
    """An undisturbed run of two ranks, with dropout."""
    training = Training(tmp_path_factory.mktemp("together"), tiny_model, data, train=EVALUATED)
    return training, Pair(training).run()


def assert_near(losses: Mapping[int, tuple[float, float, float, int]], expected: Mapping[int, tuple[float, ...]]) -> None:
    assert losses.keys() == expected.keys()
    for step, (loss, norm, rate, num_tokens) in losses.items():
        assert (loss, norm) == pytest.approx(expected[step][:2], rel=1e-4), step
        assert (rate, num_tokens) == expected[step][2:], step


def test_two_ranks_have_the_losses_of_one(tmp_path: Path, tiny_model: Path, data: Path, alone: Attempt) -> None:
    training = Training(tmp_path, tiny_model, data, train=EVALUATED, lora=UNDROPPED)
    pair = Pair(training).run()
    assert_near(pair.first.losses, alone.losses)
    assert pair.first.evaluations == pytest.approx(alone.evaluations, rel=1e-5)
    assert [type(event) for event in pair.second.events] == [Ended], "only one tells what all do"


@pytest.mark.parametrize("order", ["one, then two", "two, then one"])
def test_what_one_number_of_ranks_saves_another_continues(
    order: str, tmp_path: Path, tiny_model: Path, data: Path, alone: Attempt
) -> None:
    training = Training(tmp_path, tiny_model, data, train=EVALUATED, lora=UNDROPPED)
    if order == "one, then two":
        before = training.start(fault="term@7")
        assert before.end()[0] == 75
        after = Pair(training).run().first
    else:
        pair = Pair(training, {0: "term@7"})
        assert pair.end_of_first()[0] == 75
        before, after = pair.first, training.run()
    assert max(before.losses) < min(after.losses)
    assert_near(losses_of([before, after]), alone.losses)


def test_a_run_that_is_stopped_and_killed_at_random_moments_ends_as_an_undisturbed_one(
    tmp_path: Path, tiny_model: Path, data: Path, together: tuple[Training, Pair]
) -> None:
    dice, attempts = random.Random(3), list[Attempt]()
    training = Training(tmp_path, tiny_model, data, train=EVALUATED, save_steps=2)
    for _ in range(3):
        pair = Pair(training)
        attempts.append(pair.first)
        pair.first.wait_for(lambda event: isinstance(event, Loaded))
        time.sleep(dice.random() * 0.6)
        if dice.random() < 0.4:
            for one in pair:
                one.process.kill()
        for one in pair:
            one.process.terminate()
        pair.first.end()
        pair.second.process.kill()
    attempts.append(Pair(training).run().first)
    assert losses_of(attempts) == together[1].first.losses
    assert training.adapter() == together[0].adapter()


def test_a_signal_to_all_ranks_gives_one_whole_checkpoint_at_one_step(tmp_path: Path, tiny_model: Path, data: Path) -> None:
    training = Training(tmp_path, tiny_model, data)
    pair = Pair(training)
    pair.first.wait_for_step(3)
    begun = time.monotonic()
    for one in pair:
        one.signal(signal.SIGTERM)
    status, last = pair.end_of_first()
    assert time.monotonic() - begun < 5
    assert (status, last.stopped) == (75, Stopped.PREEMPTED)
    assert training.steps() == [last.step] == [max(pair.first.losses)]


def test_a_signal_to_one_rank_stops_all_after_the_same_step(tmp_path: Path, tiny_model: Path, data: Path) -> None:
    training = Training(tmp_path, tiny_model, data, num_steps=400)
    pair = Pair(training)
    pair.first.wait_for_step(3)
    pair.second.signal(signal.SIGTERM)
    ends = [one.end() for one in pair]
    assert [status for status, _, _ in ends] == [75, 75]
    assert [last.step for _, last, _ in ends if isinstance(last, Ended)] == 2 * training.steps()


def test_a_rank_that_is_killed_costs_no_completed_step(tmp_path: Path, tiny_model: Path, data: Path) -> None:
    training = Training(tmp_path, tiny_model, data, num_steps=400)
    pair = Pair(training)
    pair.first.wait_for_step(3)
    pair.second.process.kill()
    status, last, _ = pair.first.end()
    assert status == 5 and isinstance(last, Failed) and "another trainer process" in last.message
    assert training.steps() == [last.step] == [max(pair.first.losses)]


def test_memory_that_runs_out_on_one_rank_is_told_by_that_one_and_saved_by_the_first(
    tmp_path: Path, tiny_model: Path, data: Path
) -> None:
    training = Training(tmp_path, tiny_model, data)
    pair = Pair(training, {1: "oom@5"})
    status, last, _ = pair.second.end()
    assert status == 4 and isinstance(last, Failed) and last.stopped is Stopped.OUT_OF_MEMORY
    pair.first.end()
    assert training.steps() == [4]


def test_a_loss_that_diverges_on_one_rank_stops_all_before_the_step_is_applied(
    tmp_path: Path, tiny_model: Path, data: Path
) -> None:
    training = Training(tmp_path, tiny_model, data, save_steps=3)
    ends = [one.end() for one in Pair(training, {1: "nan@5"})]
    assert [status for status, _, _ in ends] == [7, 7]
    last = ends[0][1]
    assert isinstance(last, Failed) and (last.step, last.stopped) == (5, Stopped.DIVERGED)
    assert len(last.examples) == 8, "the examples of all ranks"
    assert training.steps() == [3]


@given(
    num_rows=st.integers(1, 200),
    rows=st.integers(1, 5),
    num=st.integers(2, 8),
    epoch=st.integers(0, 3),
    is_shuffled=st.booleans(),
)
def test_each_real_row_is_in_exactly_one_share_and_all_shares_are_equal(
    num_rows: int, rows: int, num: int, epoch: int, is_shuffled: bool
) -> None:
    shares = Shares(num_rows, multiple=rows * num, seed=7 if is_shuffled else None, epoch=lambda: epoch)
    order = list(shares)
    assert len(order) == len(shares) and len(order) % (rows * num) == 0 and len(order) - num_rows < rows * num
    assert order[num_rows:] == [num_rows] * shares.num_fillers
    assert sorted(order[:num_rows]) == list(range(num_rows))


def test_the_dice_of_a_step_are_a_ranks_own_and_do_not_depend_on_what_was_before() -> None:
    def thrown(rank: int, step: int, num: int = 2) -> tuple[float, float, float]:
        Ranks(rank=rank, num=num).throw_dice(7, step)
        return random.random(), float(np.random.rand()), float(torch.rand(1))

    first = [thrown(rank, step) for rank in range(2) for step in range(3)]
    assert len({value for values in first for value in values}) == 3 * len(first), "no two alike"
    assert [thrown(rank, step) for rank in range(2) for step in range(3)] == first
    assert thrown(0, 0, num=1) != thrown(0, 0, num=1), "one rank goes on as it would"


def test_losses_and_tokens_grow_as_they_are_told(together: tuple[Training, Pair]) -> None:
    events = [event for event in together[1].first.events if isinstance(event, Stepped | Evaluated)]
    steps = [event.step for event in events]
    assert all(before <= after for before, after in pairwise(steps)) and steps[-1] == 14


@pytest.mark.slow
def test_a_run_of_two_processes_retreats_stops_and_is_finished_by_one(job: Job) -> None:
    two = {"NPROC_PER_NODE": "2", "MAX_STEPS": "10", "JOB_FAULT": "oom@3,term@7", "LORA_DROPOUT": "0"}
    status, output = job.run("run", **two)
    assert status == 75, output
    assert "out of memory: continuing with micro-batch 1 x 2 on each of 2 devices" in output
    assert output.count("model loaded on cpu") == 2, "one of the two processes tells it, at each of two starts"
    assert max(list_steps(open_store(str(job.kept)))) in (6, 7), "the signal reached the first process, or the other one"
    assert not [process for process in psutil.process_iter(["cmdline"]) if str(job.folder) in str(process.info["cmdline"])]
    status, output = job.run("run", **two | {"NPROC_PER_NODE": "1", "JOB_FAULT": ""})
    assert status == 0, output
    rows = [json.loads(line) for line in (job.kept / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 11))
