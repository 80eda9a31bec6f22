"""A few prompts answered by the base model and by the tuned one."""

import time
from typing import Any

import datasets
import torch

from job.events import EventWriter, Sampled
from job.train.spec import TrainSpec
from job.train.state import put_rng, take_rng

SAMPLE_TOKENS = 48
NUM_SAMPLES = 2
GENERATION_FACTOR = 1.3
"""A generated token over a forward pass of one: cache and choice come on top (SmolLM2 on a CPU, 2026-11)."""


def sample(model: Any, tokenizer: Any, spec: TrainSpec, events: EventWriter) -> None:
    """Answer each prompt with the adapter off and on."""
    model.eval()
    model.config.use_cache = True
    model.gradient_checkpointing_disable()
    for shown, prompt_ids in _prompts(tokenizer, spec):
        inputs = torch.tensor([prompt_ids], device=model.device)  # (1, T)
        with model.disable_adapter():
            before = _answer(model, tokenizer, inputs)
        events.write(Sampled(prompt=shown, before=before, after=_answer(model, tokenizer, inputs)))


def time_samples(model: Any, tokenizer: Any, spec: TrainSpec) -> float:
    """How many seconds `sample` will take, from one token; leaves no trace in the random numbers."""
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
    return GENERATION_FACTOR * seconds * SAMPLE_TOKENS * 2 * len(_prompts(tokenizer, spec))


def _prompts(tokenizer: Any, spec: TrainSpec) -> list[tuple[str, list[int]]]:
    """(text to show, ids to continue): the user's prompts, else held-out ones, else none."""
    system = [{"role": "system", "content": spec.system_prompt}] if spec.system_prompt else []
    prompts = []
    for prompt in spec.train.eval_prompts:
        text = tokenizer.apply_chat_template(
            [*system, {"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        prompts.append((prompt, tokenizer(text, add_special_tokens=False)["input_ids"]))
    if not prompts and (spec.data_dir / "eval").is_dir():
        for row in datasets.load_from_disk(str(spec.data_dir / "eval")).take(NUM_SAMPLES):
            learned = next((index for index, label in enumerate(row["labels"]) if label >= 0), 0)
            ids = row["input_ids"][: max(learned, 8)]
            prompts.append((tokenizer.decode(ids, skip_special_tokens=True), ids))
    return prompts


def _answer(model: Any, tokenizer: Any, inputs: torch.Tensor) -> str:
    with torch.no_grad():
        output = model.generate(
            input_ids=inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=SAMPLE_TOKENS,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    text: str = tokenizer.decode(output[0, inputs.shape[1] :], skip_special_tokens=True)
    return text.strip()
