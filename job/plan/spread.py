"""Settings, what there is to train on and the devices in, how a step is spread over them out: ddp or fsdp, and each one's part.

The examples of a step are the same on any number of devices; a batch that they cannot share evenly is refused, since another
one would be another run.
"""

import math
from typing import Any

from job.errors import Problem, SettingsError
from job.plan.footprint import Footprint
from job.plan.layout import Layout, choose_layout, unweighed_layout
from job.plan.memory import optimizer_name
from job.plan.retreat import Fit
from job.plan.sharing import Parallel
from job.settings import TrainSettings


def effective_batch(train: TrainSettings, num_examples: int) -> int:
    """Examples of a step over all devices: what was asked for, or all there are."""
    if train.gradient_accumulation_steps is not None and train.per_device_train_batch_size != "auto":
        return train.per_device_train_batch_size * train.gradient_accumulation_steps
    return min(train.effective_batch_size, num_examples)


def check_shares(
    train: TrainSettings,
    num_processes: int,
    *,
    num_nodes: int = 1,
    num_examples: int | None = None,
    on_gpu: bool = True,
    setting: str = "NPROC_PER_NODE",
) -> None:
    """Raise a SettingsError when the devices cannot share the examples of a step evenly.

    Args:
        num_processes: on all machines together.
        num_examples: counted; None when that is not known yet.
        setting: which one says how many there are on a machine.
    """
    asked = effective_batch(train, train.effective_batch_size)
    batch = asked if num_examples is None else effective_batch(train, num_examples)
    if batch % num_processes == 0:
        return
    what = f"{num_processes} {'GPUs' if on_gpu else 'processes'}{f' of {num_nodes} machines' if num_nodes > 1 else ''}"
    below = batch - batch % num_processes
    ways = [str(size) for size in (below, below + num_processes) if size and (batch == asked or size < batch)]
    fewer = next((each for each in range(num_processes // num_nodes - 1, 0, -1) if batch % (each * num_nodes) == 0), None)
    way_out = " or ".join(ways)
    if train.gradient_accumulation_steps is not None:
        name, value = "GRADIENT_ACCUMULATION_STEPS", str(train.gradient_accumulation_steps)
        rule = f"makes {batch} examples a step with PER_DEVICE_TRAIN_BATCH_SIZE, which must be a multiple of the {what}"
        way_out = f"make it {way_out} with another product" if way_out else ""
    else:
        name, value = "EFFECTIVE_BATCH_SIZE", str(train.effective_batch_size)
        rule = f"must be a multiple of the {what}"
        if batch != asked:
            rule = f"is lowered to the {batch} examples there are, which {rule}"
        way_out = f"take {way_out}" if way_out else ""
    if fewer is not None:
        way_out += f"{', or ' if way_out else 'take '}{setting}={fewer}"
    elif num_nodes > 1:
        way_out += f"{', or ' if way_out else 'take '}fewer machines"
    raise SettingsError([Problem(setting=name, value=value, rule=rule, way_out=way_out)])


def shared_batch(effective: int, num_devices: int) -> int:
    """The multiple of the devices next to it: what a forecast goes by where the batch is not known or will be refused."""
    return max(1, effective // num_devices) * num_devices


def lay_out(
    train: TrainSettings,
    footprint: Footprint | None,
    *,
    effective: int,
    length: int,
    memory_bytes: int | None,
    on_gpu: bool,
    num_devices: int,
    before: Fit | None,
    can_shard: bool = True,
) -> Layout:
    """How to lay a step out: as the attempts before, where that fits and the user asks for nothing else.

    Args:
        effective: examples of a step over all devices, a multiple of them.
        length: tokens of the longest example.
        memory_bytes: of each device; None when that is not known.
        can_shard: whether fsdp can share these weights.
    """
    if before is not None and (before.num_devices, before.effective_batch_size) != (num_devices, effective):
        before = None  # other examples, or other devices: nothing of it could be the same

    def arranged(parallel: Parallel | None) -> Layout:
        return _arranged(
            train,
            footprint,
            examples=effective // num_devices,
            length=length,
            memory_bytes=memory_bytes,
            on_gpu=on_gpu,
            num_devices=num_devices,
            parallel=parallel,
            before=before,
        )

    if num_devices == 1:
        return arranged(None)
    if train.parallel != "auto":
        return arranged(train.parallel)
    whole = arranged("ddp")
    if whole.fits is not False or not on_gpu or not can_shard:
        return whole
    shared = arranged("fsdp")
    assert whole.memory is not None and shared.memory is not None
    if shared.fits or shared.memory.safe_peak_bytes < whole.memory.safe_peak_bytes:
        return shared
    return whole


def _arranged(
    train: TrainSettings,
    footprint: Footprint | None,
    *,
    examples: int,
    length: int,
    memory_bytes: int | None,
    on_gpu: bool,
    num_devices: int,
    parallel: Parallel | None,
    before: Fit | None,
) -> Layout:
    asked = None if train.per_device_train_batch_size == "auto" else math.gcd(train.per_device_train_batch_size, examples)
    recomputes = None if train.activation_checkpointing == "auto" else train.activation_checkpointing

    def laid_out(micro: int | None, checkpointing: bool | None) -> Layout:
        options: dict[str, Any] = {"micro_batch": micro, "activation_checkpointing": checkpointing, "parallel": parallel}
        options |= {"effective_batch": examples, "length": length}
        if footprint is None or memory_bytes is None:
            return unweighed_layout(**options)
        options |= {"optimizer": optimizer_name(train, on_gpu=on_gpu), "on_gpu": on_gpu, "num_devices": num_devices}
        return choose_layout(footprint, memory_bytes=memory_bytes, **options)

    if before is not None:
        same = laid_out(asked or before.micro_batch, before.activation_checkpointing if recomputes is None else recomputes)
        if same.fits is not False:
            return same if asked else same.model_copy(update={"reason": "as the attempts before: the run stays bitwise the same"})
    return laid_out(asked, recomputes)
