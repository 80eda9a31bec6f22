"""One training step of the real model without its numbers: bytes and FLOPs of a micro-batch, on any machine, in seconds.

The tensors are fake: they have shapes and no content, so neither weights nor GPU are needed. Forward pass, recomputation and
backward pass run through autograd as they would (`dry_pass.py`); a few layers are run, and the rest is added up. Fake tensors
lie on the CPU also where a GPU is planned for (a CPU build of torch knows no other), with autocast as on a GPU; what differs
there is told apart: TRL's fused head by formula, allocator and context by the planner.

What is not handled: several devices, images, activations kept in host memory.
"""

import gc
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from job.data.workers import start_worker
from job.plan.footprint import Body, Footprint, Growth, body_name
from job.settings import LoraSettings, ModelSettings
from job.train.dry_model import (
    Cut,
    build,
    drop_attention_dropout,
    keep_layers,
    layer_kinds,
    make_fake,
    plan_cuts,
    strip,
    weigh,
    with_adapters,
)
from job.train.dry_pass import Amount, Pass, one_pass, plain_head

MAX_SECONDS = 240.0
"""Of all passes: then the formula has to do. Most models take 5."""
MIN_LENGTH = 64
LINEAR_LENGTH = 512


@dataclass(frozen=True, kw_only=True)
class Plant:
    """What is to be measured; equal for all passes.

    Args:
        config: the model's transformers configuration.
        dtype: the number format of computation.
        length: tokens of the longest row that is planned for.
        on_gpu: whether it is to train on a GPU, with autocast, or on a CPU.
        upcasts: whether what is not quantised is fp32, as after PEFT's `prepare_model_for_kbit_training`; we do not, others do.
    """

    config: Any
    model: ModelSettings
    lora: LoraSettings
    dtype: torch.dtype
    length: int
    on_gpu: bool
    upcasts: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One pass through one cut of the model."""

    cut: Cut
    length: int
    recomputes: bool
    is_padded: bool

    @property
    def name(self) -> str:
        return body_name(is_padded=self.is_padded, activation_checkpointing=self.recomputes)


_plant: Plant | None = None


def dry_run(plant: Plant, *, num_processes: int = 1) -> Footprint:
    """Measure a model.

    Args:
        num_processes: more than one only in a process that has run nothing of torch yet: they are forked, and torch's threads
            do not survive that.

    Raises:
        Exception: whatever a model does that fake tensors cannot follow, or TimeoutError.
    """
    whole, problems = build(plant.config, plant.model, plant.dtype)
    kinds, weights = layer_kinds(whole), weigh(whole)
    if plant.upcasts:
        weights = weights.model_copy(update={"unquantised_bytes": weights.unquantised_bytes * 4 // plant.dtype.itemsize})
    text, embedding = whole.config.get_text_config(), whole.get_input_embeddings().weight
    num_parameters = sum(parameter.numel() for parameter in whole.parameters())
    num_beside = strip(whole, plant.lora)
    del whole
    cuts, length = plan_cuts(kinds), _traced_length(plant.length, kinds)
    # The largest first, so that no process ends long after the others. Recomputed layers keep their input, masked or not.
    tasks = [
        Task(cut=cut, length=length, recomputes=r, is_padded=p)
        for cut in reversed(cuts)
        for r in (False, True)
        for p in (False, True)
        if cut is cuts[0] or not (r and p)
    ]
    tasks += [Task(cut=cuts[0], length=length // 2, recomputes=r, is_padded=False) for r in (False, True)]
    found = dict(zip(tasks, _run(plant, tasks, num_processes), strict=True))
    passes = {(task.cut, task.length, task.name): result.one for task, result in found.items()}
    trained = {task.cut: result.trained for task, result in found.items()}
    problems += dict.fromkeys(text for result in found.values() for text in result.refused)
    bodies, base = {}, cuts[0]
    for recomputes in (False, True):
        straight = body_name(is_padded=False, activation_checkpointing=recomputes)
        full, half = (passes[base, tokens, straight] for tokens in (length, length // 2))
        for is_padded in (False, True):
            name = body_name(is_padded=is_padded, activation_checkpointing=recomputes)
            total, like = passes[base, length, name], straight if recomputes else name
            for cut in cuts[1:]:
                total = total.plus(passes[cut, length, like], passes[base, length, like], cut.more)
            bodies[name] = _body(total, full, half, length)
    in_base = sum(trained[base])
    head_peak, head_saved = plain_head(plant.dtype, text.vocab_size)
    return Footprint(
        num_parameters=num_parameters,
        num_trainable=num_beside + in_base + sum(cut.more * (sum(trained[cut]) - in_base) for cut in cuts[1:]),
        largest_trainable=max(max(sizes) for sizes in trained.values()),
        num_embedding_parameters=embedding.numel(),
        num_layers=len(kinds),
        hidden_size=text.hidden_size,
        vocab_size=text.vocab_size,
        max_length=getattr(text, "max_position_embeddings", None),
        compute_itemsize=plant.dtype.itemsize,
        weights=weights,
        bodies=bodies,
        plain_head_bytes_per_logit=head_peak,
        plain_head_saved_bytes_per_logit=head_saved,
        method="traced",
        notes=tuple(_notes(weights, plant.model)),
        problems=tuple(problems),
    )


def _traced_length(planned: int, kinds: list[str]) -> int:
    """Even, no width of a model (those are multiples of 16), and short where a loop in Python goes over the row, as linear
    attention's does without its GPU kernels.
    """
    longest = LINEAR_LENGTH if any("linear" in kind for kind in kinds) else planned
    length = max(MIN_LENGTH, min(planned, longest) // 2 * 2)
    return length if length % 16 else length + 2


def dtype_of(asked: str, *, on_gpu: bool) -> torch.dtype:
    """The number format of computation, on a GPU that has bfloat16 or on a CPU."""
    if asked == "auto":
        return torch.bfloat16 if on_gpu else torch.float32
    dtype: torch.dtype = getattr(torch, asked)
    return dtype


@dataclass(frozen=True, kw_only=True, slots=True)
class _Result:
    one: Pass
    trained: tuple[int, ...]
    """Elements of each trained tensor of the cut."""
    refused: tuple[str, ...]


def _run(plant: Plant, tasks: list[Task], num_processes: int) -> list[_Result]:
    global _plant
    _plant = plant  # inherited by the fork, not pickled
    _fake_model.cache_clear()
    if num_processes == 1:
        return [_measure(task) for task in tasks]
    pool = ProcessPoolExecutor(
        num_processes, multiprocessing.get_context("fork"), initializer=start_worker, initargs=(os.getpid(),)
    )
    try:
        return list(pool.map(_measure, tasks, timeout=MAX_SECONDS))
    finally:
        processes = list((pool._processes or {}).values())
        pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:  # one that hangs, or whose result nobody waits for
            process.kill()


def _measure(task: Task) -> _Result:
    plant = _plant
    assert plant is not None
    model, fake_mode, refused = _fake_model(task.cut)
    with fake_mode:
        found = one_pass(
            model,
            task.length,
            recomputes=task.recomputes,
            is_padded=task.is_padded,
            autocasts=plant.on_gpu and plant.dtype != torch.float32,
            use_reentrant=plant.model.load_in_8bit,
        )
    trained = tuple(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return _Result(one=found, trained=trained, refused=tuple(refused))


@cache
def _fake_model(cut: Cut) -> tuple[Any, FakeTensorMode, list[str]]:
    plant = _plant
    assert plant is not None

    def make() -> Any:
        model, _ = build(plant.config, plant.model, plant.dtype)
        strip(model, plant.lora)
        keep_layers(model, cut.layers)
        return model

    model, refused = with_adapters(make, plant.lora)
    if plant.on_gpu:
        drop_attention_dropout(model)
    fake_mode = FakeTensorMode(allow_non_fake_inputs=True)  # the passes must run in the same one, or all weights are made anew
    with fake_mode:
        make_fake(model, plant.dtype, upcasts=plant.upcasts)
    gc.freeze()  # no pass has to look through it for cycles
    return model, fake_mode, refused


def _body(found: Pass, at_length: Pass, at_half: Pass, length: int) -> Body:
    """What does not grow with the tokens is told by the smallest cut at two lengths; the layers have it in common."""

    def growth(whole: Amount, full: Amount, half: Amount) -> Growth:
        constant = max(0.0, 2 * (half.total - half.squared) - (full.total - full.squared))
        return Growth(
            constant=constant,
            per_token=(whole.total - whole.squared - constant) / length,
            per_pair=whole.squared / length**2,
        )

    return Body(
        saved=growth(found.saved, at_length.saved, at_half.saved),
        after_forward=growth(found.after_forward, at_length.after_forward, at_half.after_forward),
        peak=growth(found.peak, at_length.peak, at_half.peak),
        flops_per_token=(found.flops - found.attention_flops) / length,
        attention_flops_per_pair=found.attention_flops / length**2,
    )


def _notes(weights: Any, settings: ModelSettings) -> Iterator[str]:
    if weights.unquantised_experts_bytes and (settings.load_in_4bit or settings.load_in_8bit):
        yield (
            "its experts are fused into tensors that bitsandbytes does not quantise: "
            f"{weights.unquantised_experts_bytes / 2**30:.1f} of {weights.total_bytes / 2**30:.1f} GiB of weights stay in 16 bits"
        )
