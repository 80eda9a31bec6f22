"""Counted examples and tokens in, the steps and batches of the run out. Memory, time and price come with a later forecast.

One pure function: nothing is opened, measured or asked here.
"""

import math

from pydantic import BaseModel, ConfigDict

from job.settings import TrainSettings

TOKENS_PER_MICRO_BATCH = 2048
"""One long example at a time, or several short ones: fits wherever the model does, and hides what each pass costs."""


class Plan(BaseModel):
    """What the run will do."""

    model_config = ConfigDict(frozen=True)

    micro_batch: int
    gradient_accumulation_steps: int
    effective_batch_size: int
    num_examples: int
    num_steps: int
    num_tokens: int
    """Tokens in all steps together, padding not counted; rounded where the last epoch is cut."""
    assumptions: list[str]


def forecast(settings: TrainSettings, *, num_examples: int, num_tokens: int, longest_tokens: int) -> Plan:
    """Choose the micro-batch and count the steps.

    Args:
        settings: the training section.
        num_examples: examples to train on.
        num_tokens: tokens of one pass over them.
        longest_tokens: tokens of the longest of them.
    """
    assumptions = []
    if settings.gradient_accumulation_steps is not None and settings.per_device_train_batch_size != "auto":
        micro, accumulation = settings.per_device_train_batch_size, settings.gradient_accumulation_steps
    else:
        effective = min(settings.effective_batch_size, num_examples)
        if effective < settings.effective_batch_size:
            assumptions.append(f"EFFECTIVE_BATCH_SIZE lowered to the {num_examples} examples there are")
        if settings.per_device_train_batch_size == "auto":
            fitting = max(1, TOKENS_PER_MICRO_BATCH // longest_tokens)
            micro = max(size for size in range(1, effective + 1) if effective % size == 0 and size <= fitting)
            assumptions.append(f"micro-batch {micro}: the longest example has {longest_tokens} tokens")
        else:
            micro = math.gcd(settings.per_device_train_batch_size, effective)
        accumulation = effective // micro
    steps_per_epoch = math.ceil(num_examples / (micro * accumulation))
    num_steps = math.ceil(settings.num_train_epochs * steps_per_epoch)
    if settings.max_steps is not None:
        num_steps = min(num_steps, settings.max_steps)
    return Plan(
        micro_batch=micro,
        gradient_accumulation_steps=accumulation,
        effective_batch_size=micro * accumulation,
        num_examples=num_examples,
        num_steps=num_steps,
        num_tokens=round(num_tokens * num_steps / steps_per_epoch),
        assumptions=assumptions,
    )
