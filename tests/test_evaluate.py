"""Which checkpoint becomes the adapter, and what all of them say to the prompts: real trainers, tiny models."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from trainer_child import Attempt, Training, write_data

from job.events import Answered, Ended, Warned
from job.keep.checkpoints import local_losses, step_name
from job.settings import EvalPrompt
from job.train.answer import MAX_ROWS, Prompt, _num_rows, answer, find_prompts
from job.train.model import load_model, load_tokenizer

PROMPTS = ("What follows 7?", "Say it again, please.", "And?")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("prepared"))


def asked(**options: Any) -> dict[str, Any]:
    prompts = options.pop("prompts", [EvalPrompt(prompt=text) for text in PROMPTS])
    return {"eval_prompts": tuple(prompts), "eval_max_new_tokens": 8, **options}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, data: Path) -> tuple[Training, Attempt]:
    """A run with four checkpoints that answered three prompts."""
    folder = tmp_path_factory.mktemp("trained")
    options = {"save_steps": 4, "save_total_limit": 9, "evaluate": asked(select_by="last")}
    training = Training(folder, tiny_model, data, train={"learning_rate": 0.03}, **options)
    return training, training.run()


def ended(attempt: Attempt) -> Ended:
    last = attempt.events[-1]
    assert isinstance(last, Ended)
    return last


def answers(attempt: Attempt) -> list[Answered]:
    return [event for event in attempt.events if isinstance(event, Answered)]


def is_adapter_of(training: Training, step: int) -> bool:
    adapter = load_file(training.folder / "adapter" / "adapter_model.safetensors")
    saved = load_file(training.checkpoints / step_name(step) / "adapter_model.safetensors")
    return adapter.keys() == saved.keys() and all(torch.equal(adapter[name].float(), saved[name].float()) for name in saved)


def test_the_base_model_and_every_kept_checkpoint_answer_every_prompt(trained: tuple[Training, Attempt]) -> None:
    training, attempt = trained
    told = answers(attempt)
    assert [one.prompt for one in told] == list(PROMPTS)
    for one in told:
        assert [found.step for found in one.answers] == [0, 4, 8, 12, 14]
        assert all(found.score is None for found in one.answers)
    assert len({found.text for one in told for found in one.answers}) > 3, "all checkpoints say the same"
    assert (ended(attempt).chosen_step, ended(attempt).chosen_by) == (14, "last")
    assert is_adapter_of(training, 14)


def test_the_best_score_moves_the_choice(trained: tuple[Training, Attempt], tmp_path: Path) -> None:
    training, attempt = trained
    texts = {found.step: found.text for found in answers(attempt)[0].answers}
    wanted = next(step for step in (4, 8, 12) if texts[step] != texts[14])
    right = EvalPrompt(prompt=PROMPTS[0], scorer="exact_match", expected=(texts[wanted],))
    again = training.run(evaluate=asked(prompts=[right], select_by="score"))
    best = [found.step for found in answers(again)[0].answers if found.score == 1.0]
    assert wanted in best and 14 not in best
    assert ended(again).chosen_by == "score" and ended(again).chosen_step == best[-1]
    assert is_adapter_of(training, best[-1]) and not is_adapter_of(training, 14)


def test_a_lower_loss_is_saved_where_it_is_measured_and_delivered(tmp_path: Path, tiny_model: Path, data: Path) -> None:
    train = {"learning_rate": 0.05, "eval_steps": 3}
    training = Training(tmp_path, tiny_model, data, train=train, num_steps=30, save_steps=100, save_total_limit=1)
    attempt = training.run()
    losses = {step: loss for step, loss in attempt.evaluations.items() if step}
    best = min(losses, key=lambda step: losses[step])
    assert best < 30 and local_losses(training.checkpoints)[best] == losses[best]
    assert (ended(attempt).chosen_step, ended(attempt).chosen_by) == (best, "eval_loss")
    assert is_adapter_of(training, best)


def test_an_evaluation_measures_what_the_training_did_not(trained: tuple[Training, Attempt]) -> None:
    training, attempt = trained
    assert set(attempt.evaluations) == {0, 14}
    later = training.run(stage="evaluate", evaluate=asked(), num_steps=14)
    assert set(later.evaluations) == {4, 8, 12, 14}, "that of the untrained model is known"
    losses = {**attempt.evaluations, **later.evaluations}
    best = min((step for step in losses if step), key=lambda step: losses[step])
    assert (ended(later).chosen_step, ended(later).chosen_by) == (best, "eval_loss") and is_adapter_of(training, best)
    assert all(math.isfinite(loss) for loss in losses.values()) and not later.losses


def test_a_kept_checkpoint_that_is_damaged_is_passed_over(trained: tuple[Training, Attempt], tmp_path: Path) -> None:
    training, _ = trained
    file = training.checkpoints / step_name(8) / "adapter_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:100])
    try:
        attempt = training.run(evaluate=asked())
    finally:
        file.write_bytes(whole)
    assert {found.step for one in answers(attempt) for found in one.answers} == {0, 4, 12, 14}
    assert any("step 8" in event.text for event in attempt.events if isinstance(event, Warned))


def test_answers_that_fail_do_not_cost_the_adapter(trained: tuple[Training, Attempt]) -> None:
    training, _ = trained
    attempt = training.run(fault="oom-sample@14", evaluate=asked(select_by="last"))
    assert not answers(attempt) and is_adapter_of(training, 14)
    assert any("no answers" in event.text for event in attempt.events if isinstance(event, Warned))


def test_an_adapter_that_cannot_be_written_leaves_the_one_before_and_ends_the_run(
    trained: tuple[Training, Attempt],
) -> None:
    training, _ = trained
    training.run(evaluate=asked(select_by="last"))
    blocked = training.folder / "adapter.partial"
    blocked.write_text("in the way")  # rmtree leaves a file, and a folder cannot be made there
    try:
        status, _, _ = training.start(evaluate=asked(select_by="last")).end()
    finally:
        blocked.unlink()
    assert status != 0 and is_adapter_of(training, 14)


def test_answers_whose_tests_hang_are_beaten_for(trained: tuple[Training, Attempt]) -> None:
    training, _ = trained
    hanging = EvalPrompt(prompt="Loop.", scorer="python", tests="while True: pass")
    attempt = training.run(evaluate=asked(prompts=[hanging, EvalPrompt(prompt="Hi")], select_by="last"))
    scores = {found.step: found for found in answers(attempt)[0].answers}
    assert set(scores) == {0, 4, 8, 12, 14} and all(found.score == 0.0 for found in scores.values())


def test_a_template_without_a_system_role_gets_it_before_the_prompt(tiny_model: Path, tmp_path: Path) -> None:
    spec = Training(tmp_path, tiny_model, tmp_path, evaluate=asked(prompts=[EvalPrompt(prompt="Hi", system="Be brief")])).spec()
    tokenizer = load_tokenizer(spec)
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    tokenizer.chat_template = refusing + tokenizer.chat_template
    (prompt,) = find_prompts(tokenizer, spec)
    assert tokenizer.decode(prompt.ids).count("Be brief\n\nHi") == 1 and prompt.shown == "Hi"


def test_prompts_of_different_lengths_are_answered_together_as_each_alone(tiny_model: Path, tmp_path: Path) -> None:
    spec = Training(tmp_path, tiny_model, tmp_path).spec()
    model, tokenizer = load_model(spec), load_tokenizer(spec)
    prompts = [Prompt(shown="", ids=tokenizer(text)["input_ids"]) for text in (*PROMPTS, "x" * 40)]
    beats: list[int] = []

    def ask(some: list[Prompt], room: int) -> list[str]:
        return answer(model, tokenizer, some, max_new_tokens=6, room_tokens=room, beat=lambda: beats.append(1))

    alone = [ask([prompt], 1)[0] for prompt in prompts]
    beats.clear()
    assert ask(prompts, 10_000) == alone and 1 <= len(beats) <= 6, "one batch of at most six tokens"
    beats.clear()
    assert ask(prompts, 1) == alone and len(beats) > 6, "one prompt always goes"
    assert len(set(alone)) > 1


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=90), st.integers(1, 512), st.integers(1, 60_000))
def test_a_batch_of_answers_takes_no_more_tokens_than_there_is_room_for(
    lengths: list[int], max_new_tokens: int, room_tokens: int
) -> None:
    lengths.sort()
    rows = _num_rows(lengths, max_new_tokens, room_tokens, MAX_ROWS)
    assert 1 <= rows <= min(len(lengths), MAX_ROWS)
    assert rows == 1 or rows * (lengths[rows - 1] + max_new_tokens) <= room_tokens
