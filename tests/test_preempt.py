"""A trainer that is told to stop, runs out of memory or disk, or hangs: what is whole is kept, and the status says why."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, write_conversations
from trainer_child import Attempt, Training, write_data

from job.events import EVENTS_FD, Ended, Failed, Phase, Progress, Saved, Stopped, Warned, read_events
from job.keep.checkpoints import step_name
from job.settings import DataSettings
from job.train.build import STACKS
from job.train.faults import Faults
from job.train.spec import PrepareSpec
from job.train.state import _save


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("prepared"))


@pytest.fixture
def training(tmp_path: Path, tiny_model: Path, data: Path) -> Training:
    return Training(tmp_path, tiny_model, data)


def assert_stopped(attempt: Attempt, step: int) -> None:
    status, last, output = attempt.end()
    assert status == 75, output
    assert isinstance(last, Ended) and (last.stopped, last.step) == (Stopped.PREEMPTED, step), output


def test_a_stop_while_loading_ends_at_once(training: Training) -> None:
    attempt = training.start()
    attempt.wait_for(lambda event: isinstance(event, Progress))
    begun = time.monotonic()
    attempt.signal(signal.SIGTERM)
    status, last, output = attempt.end()
    assert time.monotonic() - begun < 5
    assert status == 75 and isinstance(last, Failed) and last.stopped is Stopped.PREEMPTED, output
    assert training.steps() == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_within_a_step_does_not_wait_for_its_end(number: signal.Signals, training: Training) -> None:
    attempt = training.start(fault="hang@4")  # a step that never ends
    attempt.wait_for_step(3)
    time.sleep(0.3)
    attempt.signal(number)
    assert_stopped(attempt, 3)
    assert training.steps() == [3]


def test_a_stop_before_the_first_step_saves_nothing(training: Training) -> None:
    attempt = training.start(fault="term@1")
    assert_stopped(attempt, 0)
    assert training.steps() == [] and not attempt.saved


def test_a_stop_with_nothing_new_keeps_the_checkpoint_that_is_there(training: Training) -> None:
    assert_stopped(training.start(fault="term@4"), 3)
    before = (training.checkpoints / step_name(3) / "manifest.json").stat().st_mtime_ns
    again = training.start(fault="term@4*")
    assert_stopped(again, 3)
    assert not again.saved
    assert (training.checkpoints / step_name(3) / "manifest.json").stat().st_mtime_ns == before


def test_a_large_state_is_whole_on_the_disk_in_a_second(training: Training, tmp_path: Path) -> None:
    attempt = training.start(fault="hang@3", lora={"lora_r": 2048})
    attempt.wait_for_step(2)
    time.sleep(0.2)
    begun = time.time()
    attempt.signal(signal.SIGTERM)
    saved = attempt.wait_for(lambda event: isinstance(event, Saved))
    assert isinstance(saved, Saved)
    files = list(Path(saved.path).iterdir())
    seconds = (Path(saved.path) / "manifest.json").stat().st_mtime - begun
    print(f"\n{sum(file.stat().st_size for file in files) / 1e6:.0f} MB, SIGTERM to whole checkpoint: {seconds * 1000:.0f} ms")
    assert sum(file.stat().st_size for file in files) > 45e6
    assert seconds < 2.0  # 1 s on an idle machine
    assert_stopped(attempt, 2)
    assert training.steps() == [2]


def test_the_same_signal_from_two_sides_is_one(training: Training) -> None:
    attempt = training.start(fault="hang@3")
    attempt.wait_for_step(2)
    for _ in range(3):
        attempt.signal(signal.SIGTERM)
        time.sleep(0.01)
    assert_stopped(attempt, 2)
    assert training.steps() == [2]


def test_a_stop_in_a_save_lets_it_finish(training: Training) -> None:
    assert_stopped(training.start(fault="term-save@4", save_steps=2), 4)
    assert training.steps() == [2, 4]


def test_a_second_signal_ends_a_save_that_hangs_and_leaves_nothing_half_written(training: Training) -> None:
    attempt = training.start(fault="hang-save@4", save_steps=2)
    attempt.wait_for_step(3)
    time.sleep(0.5)
    attempt.signal(signal.SIGTERM)
    time.sleep(1.5)
    assert attempt.process.is_alive(), "the save was not protected"
    attempt.signal(signal.SIGTERM)
    assert attempt.end()[0] == 75
    assert training.steps() == [2]
    training.run()


def test_a_stop_after_training_ends_at_once_and_the_next_start_finishes(training: Training) -> None:
    attempt = training.start(fault="hang-sample@14")
    attempt.wait_for(lambda event: isinstance(event, Progress) and event.text == "answering prompts")
    time.sleep(0.2)
    attempt.signal(signal.SIGTERM)
    status, last, output = attempt.end()
    assert status == 75 and isinstance(last, Failed) and last.stopped is Stopped.PREEMPTED, output
    assert not training.run().losses


@pytest.mark.parametrize(
    ("fault", "phase", "steps"),
    [
        ("oom-load@0", Phase.LOAD, []),
        ("oom@1", Phase.TRAIN, []),
        ("oom@6", Phase.TRAIN, [4, 5]),
        ("oom-update@6", Phase.TRAIN, [4, 5]),  # half updated weights must not be saved; 5 was the lowest held-out loss
        ("oom-eval@5", Phase.EVALUATE, [4, 5]),
        ("oom-save@4", Phase.SAVE, [4]),
    ],
)
def test_out_of_memory_is_told_with_its_phase_after_what_is_sound_was_saved(
    fault: str, phase: Phase, steps: list[int], training: Training
) -> None:
    attempt = training.start(fault=fault, train={"eval_steps": 5}, save_steps=4)
    status, last, output = attempt.end()
    assert status == 4, output
    assert isinstance(last, Failed) and (last.exit_status, last.stopped, last.phase) == (4, Stopped.OUT_OF_MEMORY, phase)
    assert training.steps() == steps
    training.run(train={"eval_steps": 5})


def test_out_of_memory_in_a_sample_costs_only_the_samples(training: Training) -> None:
    attempt = training.run(fault="oom-sample@14")
    assert [event.text for event in attempt.events if isinstance(event, Warned)] == ["no answers: OutOfMemoryError: injected"]


def test_a_leaner_attempt_fits_where_a_larger_micro_batch_did_not(training: Training) -> None:
    faults = "oom-above@1"
    assert training.start(fault=faults).end()[0] == 4
    leaner = {"micro_batch": 1, "gradient_accumulation_steps": 8, "activation_checkpointing": True, "activation_offloading": True}
    assert sorted(training.run(fault=faults, **leaner).losses) == list(range(1, 15))


def test_a_full_disk_in_a_save_is_the_machines_fault_and_the_checkpoint_before_it_is_whole(training: Training) -> None:
    attempt = training.start(fault="full-save@6*", save_steps=3)
    status, last, output = attempt.end()
    assert status == 5, output
    assert isinstance(last, Failed) and "No space left" in last.message
    assert training.steps() == [3]
    assert list((training.folder / "trainer").glob("checkpoint-*")) == []


def test_a_disk_that_fills_under_torch_is_named_as_such() -> None:
    for numel in (10, 10_000_000):
        with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
            _save({"tensor": torch.zeros(numel)}, Path("/dev/full"))


def test_a_trainer_that_hangs_is_silent_and_shows_where_it_stands(training: Training) -> None:
    attempt = training.start(fault="hang@3")
    attempt.wait_for_step(2)
    time.sleep(0.5)
    count = len(attempt.events)
    attempt.signal(signal.SIGUSR1)
    time.sleep(1.0)
    assert len(attempt.events) == count
    stacks = (training.folder / "trainer" / STACKS).read_text("utf-8")
    assert "faults.py" in stacks and "training_step" in stacks and stacks.count("hread 0x") >= 2
    attempt.signal(signal.SIGTERM)
    assert_stopped(attempt, 2)


def test_a_wrong_order_for_a_fault_is_no_silence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JOB_FAULT=omm@3"):
        Faults("omm@3", tmp_path)
    Faults("oom@17,nan@23*,kill-save@12,oom-above@2", tmp_path)


def test_a_stop_in_preparation_is_told_in_one_last_word_without_a_traceback(tmp_path: Path, tiny_model: Path) -> None:
    rows = write_conversations(tmp_path / "rows.jsonl", 200_000)  # some twenty seconds of work
    spec = PrepareSpec(
        data=DataSettings.model_validate({"datasets": str(rows)}),
        model_dir=tiny_model,
        chat_template=None,
        trust_remote_code=False,
        folder=tmp_path / "prepared",
        cache_dir=tmp_path,
        seed=0,
    )
    (tmp_path / "prepare.json").write_text(spec.model_dump_json(), "utf-8")
    reader, writer = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-m", "job.child", "prepare", str(tmp_path / "prepare.json")],
        env={**os.environ, "HF_HUB_OFFLINE": "1", EVENTS_FD: str(writer)},
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        pass_fds=(writer,),
        text=True,
    )
    os.close(writer)
    with os.fdopen(reader, encoding="utf-8") as pipe:
        events = read_events(pipe)
        assert isinstance(next(events), Progress)
        process.terminate()
        words = [event for event in events if isinstance(event, Failed)]
    _, printed = process.communicate(timeout=60)
    assert process.returncode == 75 and "Traceback" not in printed, printed
    assert [(word.exit_status, word.stopped) for word in words] == [(75, Stopped.PREEMPTED)]
    assert not spec.folder.exists()
