"""What there is to train on, a footprint, a GPU and a price in; steps, memory, hours and dollars out.

One pure function, called before anything is downloaded with what is then known, and again with counted tokens: nothing is
opened, measured or asked here.
"""

import math
from functools import reduce
from operator import add
from typing import Any

from pydantic import BaseModel, ConfigDict

from job.plan.footprint import Footprint
from job.plan.hardware import Gpu
from job.plan.layout import Layout, choose_layout, unweighed_layout
from job.plan.memory import MemoryEstimate, optimizer_name
from job.plan.price import Price
from job.plan.retreat import Fit
from job.plan.throughput import (
    DOWNLOAD_BYTES_PER_SECOND,
    END_SECONDS,
    LOAD_BYTES_PER_SECOND,
    PADDING,
    PREPARED_TOKENS_PER_SECOND,
    START_SECONDS,
    Range,
    Speed,
    at_rates,
    measured_seconds,
    step_seconds,
)
from job.settings import ModelSettings, TrainSettings


class Work(BaseModel):
    """What there is to train on."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    num_examples: int
    num_tokens: int
    """Of one pass over them."""
    longest_tokens: int
    num_eval_tokens: int = 0
    all_steps_tokens: int | None = None
    """Counted over all steps in their order; None when that is not known, which matters only where the last epoch is cut."""
    basis: str = "counted"
    """How this is known."""
    error: float = 0.0
    """Share by which `num_tokens` may be off."""


class Circumstances(BaseModel):
    """What else a forecast depends on, beside the work and the GPU."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    download_bytes: float = 0.0
    """Still to come from the Hub."""
    disk_bytes: float = 0.0
    num_saves: int = 1
    save_seconds: float = 5.0


class Plan(BaseModel):
    """What the run will do, need and cost; what is not known is None."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    micro_batch: int
    gradient_accumulation_steps: int
    effective_batch_size: int
    num_examples: int
    num_steps: int
    num_tokens: int
    """Tokens in all steps together, padding not counted; rounded where the last epoch is cut and its order is not known."""
    activation_checkpointing: bool | None = None
    memory: MemoryEstimate | None = None
    gpu: str | None = None
    """None for a CPU."""
    memory_bytes: int | None = None
    """What there is."""
    fits: bool | None = None
    seconds_low: float | None = None
    seconds_high: float | None = None
    training_seconds_low: float | None = None
    training_seconds_high: float | None = None
    """Of the steps alone."""
    cost_usd_low: float | None = None
    cost_usd_high: float | None = None
    price_usd_per_hour: float | None = None
    price_source: str | None = None
    assumptions: list[str]

    @property
    def fit(self) -> Fit:
        """How it lays a step out."""
        return Fit(
            micro_batch=self.micro_batch,
            gradient_accumulation_steps=self.gradient_accumulation_steps,
            activation_checkpointing=self.activation_checkpointing,
        )


def forecast(
    train: TrainSettings,
    model: ModelSettings,
    work: Work,
    *,
    footprint: Footprint | None = None,
    gpu: Gpu | None = None,
    memory_bytes: int | None = None,
    price: Price | None = None,
    speed: Speed | None = None,
    circumstances: Circumstances | None = None,
    before: Fit | None = None,
) -> Plan:
    """Plan the run on one machine.

    Args:
        footprint: of the model in the number format of that machine; without it memory and time stay unknown.
        gpu: what it trains on; None for a CPU.
        memory_bytes: what may be used of its memory; None for all of the GPU's.
        price: of the machine.
        speed: measured on this GPU with this model; takes the place of the range.
        before: how earlier attempts of the run laid their steps out.
    """
    around = circumstances or Circumstances()
    effective, assumptions = _effective_batch(train, work)
    available = memory_bytes if memory_bytes is not None else gpu.memory_bytes if gpu else None
    layout = _layout(train, work, footprint, gpu, available, effective, before)
    assumptions.append(f"micro-batch {layout.micro_batch} x {layout.gradient_accumulation_steps}: {layout.reason}")
    per_step = layout.micro_batch * layout.gradient_accumulation_steps
    steps_per_epoch = math.ceil(work.num_examples / per_step)
    num_steps = math.ceil(train.num_train_epochs * steps_per_epoch)
    if train.max_steps is not None:
        num_steps = min(num_steps, train.max_steps)
    num_tokens = work.all_steps_tokens
    if num_tokens is None:
        num_tokens = round(work.num_tokens * num_steps / steps_per_epoch)
    if work.basis != "counted":
        assumptions.append(f"tokens are {work.basis}, {work.error:.0%} more or less")
    training = _training_seconds(layout, work, num_tokens, footprint, gpu, speed, model)
    whole = training and training + _other_seconds(train, work, num_steps, footprint, around, training)
    if training and gpu:
        assumptions.append(
            f"speed {speed.source}" if speed else f"20-50% of {gpu.peak_flops / 1e12:.0f} TFLOP/s, as published runs reach"  # type: ignore[operator]
        )
    if footprint:
        assumptions += footprint.notes
        if footprint.method == "formula":
            assumptions.append("memory by formula: the model could not be traced; the safe number has 30% more")
    cost = (
        [price.cost_usd(second, storage_bytes=around.disk_bytes) for second in (whole.low, whole.high)] if price and whole else []
    )
    return Plan(
        micro_batch=layout.micro_batch,
        gradient_accumulation_steps=layout.gradient_accumulation_steps,
        effective_batch_size=per_step,
        num_examples=work.num_examples,
        num_steps=num_steps,
        num_tokens=num_tokens,
        activation_checkpointing=layout.activation_checkpointing if footprint else None,
        memory=layout.memory,
        gpu=gpu.name if gpu else None,
        memory_bytes=available,
        fits=layout.fits,
        seconds_low=whole.low if whole else None,
        seconds_high=whole.high if whole else None,
        training_seconds_low=training.low if training else None,
        training_seconds_high=training.high if training else None,
        cost_usd_low=cost[0] if cost else None,
        cost_usd_high=cost[1] if cost else None,
        price_usd_per_hour=price.usd_per_hour if price else None,
        price_source=price.source if price else None,
        assumptions=assumptions,
    )


def bits_of(model: ModelSettings) -> int:
    return 4 if model.load_in_4bit else 8 if model.load_in_8bit else 16


def _effective_batch(train: TrainSettings, work: Work) -> tuple[int, list[str]]:
    if train.gradient_accumulation_steps is not None and train.per_device_train_batch_size != "auto":
        return train.per_device_train_batch_size * train.gradient_accumulation_steps, []
    effective = min(train.effective_batch_size, work.num_examples)
    if effective < train.effective_batch_size:
        return effective, [f"EFFECTIVE_BATCH_SIZE lowered to the {work.num_examples} examples there are"]
    return effective, []


def _layout(
    train: TrainSettings,
    work: Work,
    footprint: Footprint | None,
    gpu: Gpu | None,
    available: int | None,
    effective: int,
    before: Fit | None,
) -> Layout:
    """How to lay a step out: as the attempts before, where that fits and the user asks for nothing else."""
    asked = None if train.per_device_train_batch_size == "auto" else math.gcd(train.per_device_train_batch_size, effective)
    recomputes = None if train.activation_checkpointing == "auto" else train.activation_checkpointing

    def lay_out(micro: int | None, checkpointing: bool | None) -> Layout:
        options: dict[str, Any] = {"micro_batch": micro, "activation_checkpointing": checkpointing}
        options |= {"effective_batch": effective, "length": work.longest_tokens}
        if footprint is None or available is None:
            return unweighed_layout(**options)
        on_gpu = gpu is not None
        optimizer = optimizer_name(train, on_gpu=on_gpu)
        return choose_layout(footprint, memory_bytes=available, optimizer=optimizer, on_gpu=on_gpu, **options)

    if before is not None and before.micro_batch * before.gradient_accumulation_steps == effective:
        same = lay_out(asked or before.micro_batch, before.activation_checkpointing if recomputes is None else recomputes)
        if same.fits is not False:
            return same if asked else same.model_copy(update={"reason": "as the attempts before: the run stays bitwise the same"})
    return lay_out(asked, recomputes)


def _training_seconds(
    layout: Layout,
    work: Work,
    num_tokens: int,
    footprint: Footprint | None,
    gpu: Gpu | None,
    speed: Speed | None,
    model: ModelSettings,
) -> Range | None:
    spread = Range(low=max(1 - work.error, 0.1), high=1 + work.error)
    if speed is not None:
        seconds = measured_seconds(num_tokens, speed)
        return Range(low=seconds.low * spread.low, high=seconds.high * spread.high)
    if footprint is None or gpu is None or not gpu.peak_flops:
        return None
    mean = max(1, round(work.num_tokens / work.num_examples))
    padding = min(PADDING, work.longest_tokens / mean) if layout.micro_batch > 1 else 1.0
    per_row = footprint.flops(1, mean, activation_checkpointing=layout.activation_checkpointing)
    seconds = step_seconds(
        per_row / mean * num_tokens * padding,
        layout.micro_batch * mean * padding,
        peak_flops=gpu.peak_flops,
        bits=bits_of(model),
    )
    return Range(low=seconds.low * spread.low, high=seconds.high * spread.high)


def _other_seconds(
    train: TrainSettings,
    work: Work,
    num_steps: int,
    footprint: Footprint | None,
    around: Circumstances,
    training: Range,
) -> Range:
    """Start, download, load, preparation, evaluations, checkpoints and end."""
    parts = [Range(low=START_SECONDS[0], high=START_SECONDS[1]), Range(low=END_SECONDS[0], high=END_SECONDS[1])]
    parts.append(at_rates(around.download_bytes, DOWNLOAD_BYTES_PER_SECOND))
    if footprint:
        parts.append(at_rates(2.0 * footprint.num_parameters, LOAD_BYTES_PER_SECOND))
    if work.basis != "counted":
        parts.append(at_rates(work.num_tokens, PREPARED_TOKENS_PER_SECOND))
    parts.append(Range(low=around.save_seconds * around.num_saves, high=2 * around.save_seconds * around.num_saves))
    total_tokens = max(1.0, work.num_tokens * train.num_train_epochs)
    num_evaluations = 2 + (num_steps // train.eval_steps if train.eval_steps else 0)
    parts.append(training.times(num_evaluations * work.num_eval_tokens / total_tokens / 3))  # forward only: a third of a step
    return reduce(add, parts)
