"""Prompts in, what the model says to them out: several at once, in no more memory than a training step has.

A generated token keeps its keys and values in every layer, which is less than a training step keeps of it for the backward
pass (recomputed activations: the input of every layer). So as many tokens as a micro-batch holds fit here too.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import datasets
import torch
from jinja2 import TemplateError
from transformers import StoppingCriteria, StoppingCriteriaList

from job.settings import EvalPrompt
from job.train.spec import TrainSpec
from job.train.state import put_rng, take_rng

NUM_HELD_OUT = 2
"""Prompts taken from held-out examples where EVAL_PROMPTS names none."""
MAX_ROWS = 64
GENERATION_FACTOR = 1.3
"""A generated token over a forward pass of one: cache and choice come on top (SmolLM2 on a CPU, 2026-11)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    shown: str
    ids: list[int]
    """Tokens to continue."""
    asked: EvalPrompt | None = None
    """What makes an answer right; None for a held-out example."""


def find_prompts(tokenizer: Any, spec: TrainSpec) -> list[Prompt]:
    """The user's prompts, else held-out ones, else none."""
    prompts = []
    for asked in spec.evaluate.eval_prompts:
        text = _render(tokenizer, asked.system or spec.system_prompt, asked.prompt)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        prompts.append(Prompt(shown=asked.prompt, ids=ids, asked=asked))
    if not prompts and (spec.data_dir / "eval").is_dir():
        for row in datasets.load_from_disk(str(spec.data_dir / "eval")).take(NUM_HELD_OUT):
            learned = next((index for index, label in enumerate(row["labels"]) if label >= 0), 0)
            ids = row["input_ids"][: max(learned, 8)]
            prompts.append(Prompt(shown=tokenizer.decode(ids, skip_special_tokens=True), ids=ids))
    return prompts


def _render(tokenizer: Any, system: str | None, prompt: str) -> str:
    """The text to continue; a template that knows no system message gets it before the prompt."""
    told = [{"role": "system", "content": system}] if system else []
    try:
        text = tokenizer.apply_chat_template(
            [*told, {"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
    except TemplateError:
        if not system:
            raise
        folded = {"role": "user", "content": f"{system}\n\n{prompt}"}
        text = tokenizer.apply_chat_template([folded], tokenize=False, add_generation_prompt=True)
    return str(text)


def answer(
    model: Any, tokenizer: Any, prompts: list[Prompt], *, max_new_tokens: int, room_tokens: int, beat: Callable[[], None]
) -> list[str]:
    """Continue each prompt greedily, as far as its end or `max_new_tokens`.

    Args:
        room_tokens: prompts and answers of one batch, padding included, that memory has room for; one prompt always goes.
        beat: called after each token of a batch: whoever watches must not take a long answer for a hang.
    """
    texts = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index].ids))  # little padding
    max_rows = MAX_ROWS
    with _generating(model):
        while order:
            rows = _num_rows([len(prompts[index].ids) for index in order], max_new_tokens, room_tokens, max_rows)
            batch, order = order[:rows], order[rows:]
            try:
                found = _generate(model, tokenizer, [prompts[index].ids for index in batch], max_new_tokens, beat)
            except torch.OutOfMemoryError:
                if rows == 1:
                    raise
                torch.cuda.empty_cache()
                max_rows, order = rows // 2, [*batch, *order]
                continue
            for index, text in zip(batch, found, strict=True):
                texts[index] = text
    return texts


def time_answers(model: Any, tokenizer: Any, spec: TrainSpec, *, room_tokens: int, num_models: int) -> float:
    """How many seconds answering with so many checkpoints will take, from one token; leaves no trace in the random numbers."""
    lengths = sorted(len(prompt.ids) for prompt in find_prompts(tokenizer, spec))
    max_new_tokens, num_batches = spec.evaluate.eval_max_new_tokens, 0
    while lengths:
        num_batches, lengths = num_batches + 1, lengths[_num_rows(lengths, max_new_tokens, room_tokens, MAX_ROWS) :]
    rng, was_training = take_rng(), model.training
    model.eval()
    token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    seconds = 0.0
    with torch.no_grad():
        for _ in range(2):  # the first one warms up
            begun = time.monotonic()
            model(input_ids=token, use_cache=False).logits.sum().item()
            seconds = time.monotonic() - begun
    model.train(was_training)
    put_rng(rng)
    return GENERATION_FACTOR * seconds * max_new_tokens * num_models * num_batches


class _Beat(StoppingCriteria):
    """Stops nothing."""

    def __init__(self, beat: Callable[[], None]) -> None:
        self._beat = beat

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self._beat()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _num_rows(lengths: list[int], max_new_tokens: int, room_tokens: int, max_rows: int) -> int:
    """How many of the prompts, in order of growing length, go together."""
    rows = 1
    while rows < min(len(lengths), max_rows) and (rows + 1) * (lengths[rows] + max_new_tokens) <= room_tokens:
        rows += 1
    return rows


@contextmanager
def _generating(model: Any) -> Iterator[None]:
    """The model as generation wants it, and back."""
    was_training, was_recomputing = model.training, getattr(model, "is_activation_checkpointing", False)
    model.eval()
    model.config.use_cache = True
    if was_recomputing:
        model.activation_checkpointing_disable()
    try:
        yield
    finally:
        model.train(was_training)


def _generate(model: Any, tokenizer: Any, prompts: list[list[int]], max_new_tokens: int, beat: Callable[[], None]) -> list[str]:
    longest = max(len(ids) for ids in prompts)
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None:
        max_new_tokens = max(1, min(max_new_tokens, limit - longest))
    padding = tokenizer.pad_token_id
    inputs = torch.tensor([[padding] * (longest - len(ids)) + ids for ids in prompts], device=model.device)  # (B, T)
    mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts], device=model.device)
    with torch.no_grad():
        output = model.generate(
            input_ids=inputs,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=padding,
            eos_token_id=tokenizer.eos_token_id,
            stopping_criteria=StoppingCriteriaList([_Beat(beat)]),
        )
    return [tokenizer.decode(row[longest:], skip_special_tokens=True).strip() for row in output]
