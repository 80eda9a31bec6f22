"""A finished training's kept checkpoints in; the adapter of one of them, and all their answers side by side, out.

The adapter is written before anything is answered: an answer that fails, for memory too, must not cost it. What is not handled:
checkpoints that are not on this machine; whoever starts this has brought them.
"""

import os
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict

from job.errors import JobError, PreemptedError
from job.events import Answer, Answered, EventWriter, Phase, Progress, Warned
from job.keep.checkpoints import DamagedError, best_step, check, local_losses, step_name, surplus_steps
from job.scoring.scorers import Score, score
from job.train.answer import Prompt, answer, find_prompts
from job.train.spec import TrainSpec
from job.train.state import ADAPTER, load_adapter

BASE_STEP = 0
MAX_SCORERS = 8
"""Programs of answers that run at the same time, each in up to 1 GiB."""


class Choice:
    """Which checkpoint becomes the adapter.

    Args:
        trainer: holds the model with the weights of its last step.
        losses: held-out loss by step.
        room_tokens: of one batch of answers; see answer.py.
    """

    def __init__(
        self,
        trainer: Any,
        tokenizer: Any,
        spec: TrainSpec,
        events: EventWriter,
        *,
        last_step: int,
        losses: Mapping[int, float],
        room_tokens: int,
    ) -> None:
        self._trainer, self._tokenizer, self._spec, self._events = trainer, tokenizer, spec, events
        self._last_step, self._room_tokens = last_step, room_tokens
        model = trainer.accelerator.unwrap_model(trainer.model)
        # The vocabulary is never changed, so no base weights belong to an adapter.
        weights = get_peft_model_state_dict(model, save_embedding_layers=False)
        self._last = {name: tensor.detach().to("cpu", copy=True) for name, tensor in weights.items()}
        here = {step: loss for step, loss in local_losses(spec.checkpoints_dir).items() if step <= last_step}
        going = surplus_steps(here, spec.save_total_limit)  # deleted by the supervisor any moment
        kept = {step for step in here if step > 0 and step not in going} | {last_step}
        self._steps = sorted(kept)
        self._losses = {step: loss for step, loss in losses.items() if step in kept}
        self.step, self.by = last_step, "last"

    def deliver(self) -> None:
        """Write the adapter that the losses speak for, or the last one."""
        best = best_step(self._losses) if self._spec.evaluate.select_by != "last" else None
        if best is not None and self._load(best):
            self.step, self.by = best, "eval_loss"
        else:
            self._load(self._last_step)
        self._save()

    def answer(self, watch: Any) -> None:
        """Answer the prompts with the base model and with every kept checkpoint; a better score moves the choice."""
        prompts = find_prompts(self._tokenizer, self._spec)
        if not prompts:
            return
        answers: dict[int, list[Answer]] = {}
        for step in [BASE_STEP, *self._steps]:
            if step != BASE_STEP and not self._load(step):
                continue
            who = "the base model" if step == BASE_STEP else f"the checkpoint of step {step}"
            self._events.write(Progress(text=f"answering {len(prompts)} prompts with {who}"))
            answers[step] = self._answer(prompts, step, watch)
        for index, prompt in enumerate(prompts):
            scorer = prompt.asked.scorer if prompt.asked else None
            told = tuple(found[index] for found in answers.values())
            self._events.write(Answered(prompt=prompt.shown, scorer=scorer, answers=told))
        if self._spec.evaluate.select_by == "score":
            self._choose_by_score(answers)

    def _choose_by_score(self, answers: Mapping[int, list[Answer]]) -> None:
        scores = {step: [one.score for one in found if one.score is not None] for step, found in answers.items() if step}
        means = {step: fmean(known) for step, known in scores.items() if known}
        if not means:
            return
        # Of equal scores the lower loss counts, then the later step.
        best = max(means, key=lambda step: (means[step], -self._losses.get(step, float("inf")), step))
        if best != self.step and self._load(best):
            self._save()
            self.step = best
        if best == self.step:
            self.by = "score"

    def _answer(self, prompts: list[Prompt], step: int, watch: Any) -> list[Answer]:
        model = self._trainer.model
        options = {"max_new_tokens": self._spec.evaluate.eval_max_new_tokens, "room_tokens": self._room_tokens}

        def beat() -> None:
            watch.beat(f"answering prompts after step {step}")

        if step == BASE_STEP:
            with model.disable_adapter():
                texts = answer(model, self._tokenizer, prompts, **options, beat=beat)
        else:
            texts = answer(model, self._tokenizer, prompts, **options, beat=beat)
        scores = []
        with ThreadPoolExecutor(min(MAX_SCORERS, len(os.sched_getaffinity(0)))) as pool:  # each waits for a process of its own
            for found in pool.map(_score, prompts, texts):
                scores.append(found)
                beat()
        return [
            Answer(step=step, text=text, score=found.value if found else None, reason=found.reason if found else "")
            for text, found in zip(texts, scores, strict=True)
        ]

    def _load(self, step: int) -> bool:
        """Put the weights of a step into the model; False when its checkpoint is gone."""
        if step == self._last_step:
            set_peft_model_state_dict(self._trainer.accelerator.unwrap_model(self._trainer.model), self._last)
            return True
        checkpoint = self._spec.checkpoints_dir / step_name(step)
        try:
            check(checkpoint)
            load_adapter(self._trainer, checkpoint)
        except (DamagedError, JobError) as error:
            self._events.write(Warned(text=f"the checkpoint of step {step} is passed over: it is gone ({error})"))
            self._steps = [one for one in self._steps if one != step]
            return False
        return True

    def _save(self) -> None:
        """Write the adapter that is in the model; the one before stays until this one is whole."""
        folder = self._spec.adapter_dir.with_name(f"{self._spec.adapter_dir.name}.partial")
        shutil.rmtree(folder, ignore_errors=True)
        self._trainer.model.save_pretrained(str(folder), save_embedding_layers=False)
        self._tokenizer.save_pretrained(str(folder))
        (folder / "README.md").unlink(missing_ok=True)
        shutil.rmtree(self._spec.adapter_dir, ignore_errors=True)
        folder.rename(self._spec.adapter_dir)


def deliver_saved(checkpoint: Path, adapter_dir: Path, tokenizer: Any) -> None:
    """Write the adapter of a checkpoint as it lies there; the one before stays until this one is whole.

    Raises:
        DamagedError: it is not whole.
    """
    check(checkpoint)
    folder = adapter_dir.with_name(f"{adapter_dir.name}.partial")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in (ADAPTER, "adapter_config.json"):
        shutil.copyfile(checkpoint / name, folder / name)
    tokenizer.save_pretrained(str(folder))
    shutil.rmtree(adapter_dir, ignore_errors=True)
    folder.rename(adapter_dir)


def choose(choice: Choice, watch: Any, events: EventWriter, strike: Any) -> None:
    """Write the adapter, then the answers; `strike` breaks it on purpose (faults.py)."""
    watch.phase = Phase.SAVE
    choice.deliver()
    watch.phase = Phase.SAMPLE
    events.write(Progress(text="answering prompts"))
    try:
        strike()
        choice.answer(watch)
    except PreemptedError:
        raise
    except Exception as error:
        text = str(error).strip().splitlines()
        events.write(Warned(text=f"no answers: {type(error).__name__}: {text[0] if text else ''}"))
        if isinstance(error, torch.OutOfMemoryError):
            torch.cuda.empty_cache()


def _score(prompt: Prompt, text: str) -> Score | None:
    return score(prompt.asked, text) if prompt.asked else None
