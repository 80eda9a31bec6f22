"""What a checkpoint holds and how it comes back: adapter, optimizer, schedule, random numbers, counters.

Pickles are only ever read with `weights_only=True`, onto the CPU first. Of several ranks each holds the same, and the first
writes it; their random numbers need no place, see `Ranks.throw_dice`.
"""

import copy
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load, save
from transformers import TrainerState

from job.errors import MachineError, Problem, SettingsError
from job.keep.checkpoints import discard, make_room, seal, step_name
from job.train.shards import gather, is_shared, spread_adapter, spread_optimizer

ADAPTER, OPTIMIZER, SCHEDULER, SCALER = "adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "scaler.pt"
RNG, STATE = "rng_state.pth", "trainer_state.json"
OURS = "job"
"""Under this name our own counters lie in trainer_state.json, among those of callbacks."""
NUM_HISTORY = 20
"""Logged steps that trainer_state.json keeps: metrics.jsonl has them all, and a long run's would take longer to write
than the tensors."""


def take_rng() -> dict[str, Any]:
    """The state of every random generator that training draws from: plain numbers and tensors."""
    name, keys, *rest = np.random.get_state()
    numpy = (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest)
    rng = {"python": random.getstate(), "numpy": numpy, "cpu": torch.random.get_rng_state()}
    if torch.cuda.is_available():
        rng["cuda"] = torch.cuda.get_rng_state()
    return rng


def put_rng(rng: Mapping[str, Any]) -> None:
    name, keys, *rest = rng["numpy"]
    random.setstate(rng["python"])
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.random.set_rng_state(rng["cpu"])
    if torch.cuda.is_available() and "cuda" in rng:
        torch.cuda.set_rng_state(rng["cuda"])


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """What moves on while the next step is under way, as it was right after a step; the rest changes only in a step's end."""

    step: int
    epoch: float
    num_tokens: int
    num_flos: float
    rng: Mapping[str, Any]
    guard: Mapping[str, Any]


def save_checkpoint(
    trainer: Any, snapshot: Snapshot, evaluations: Mapping[int, float], *, scratch: Path, folder: Path
) -> Path | None:
    """Write a whole checkpoint of the snapshot's step below `folder`; returns it, and None where another rank writes it.

    Raises:
        MachineError, OSError: the disk is full. What was there before is untouched, and nothing half written is sealed.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    if is_shared(trainer):
        adapter, optimizer = gather(trainer)
    if not trainer.accelerator.is_main_process:
        return None
    if not is_shared(trainer):
        optimizer, adapter = trainer.optimizer.state_dict(), get_peft_model_state_dict(model, save_embedding_layers=False)
    make_room(folder, 2 * (_num_bytes(adapter) + _num_bytes(optimizer)))  # twice: its neighbours want to live as well
    written = scratch / f"checkpoint-{snapshot.step}"
    discard(written)
    written.mkdir(parents=True)
    try:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in adapter.items()}
        (written / ADAPTER).write_bytes(save(tensors, metadata={"format": "pt"}))
        model.peft_config["default"].save_pretrained(str(written))
        _save(optimizer, written / OPTIMIZER)
        _save(trainer.lr_scheduler.state_dict(), written / SCHEDULER)
        _save(dict(snapshot.rng), written / RNG)
        if (scaler := trainer.accelerator.scaler) is not None:
            _save(scaler.state_dict(), written / SCALER)
        state = copy.copy(trainer.state)
        state.global_step, state.epoch = snapshot.step, snapshot.epoch
        state.num_input_tokens_seen, state.total_flos = snapshot.num_tokens, snapshot.num_flos
        state.log_history = state.log_history[-NUM_HISTORY:]
        state.stateful_callbacks = {OURS: {"guard": snapshot.guard, "evaluations": evaluations}}
        state.save_to_json(str(written / STATE))
        seal(written, snapshot.step, eval_loss=evaluations.get(snapshot.step))
        target = folder / step_name(snapshot.step)
        discard(target)
        written.rename(target)
    except BaseException:
        discard(written)  # room for another attempt
        raise
    return target


def saved_state(checkpoint: Path) -> TrainerState:
    return TrainerState.load_from_json(str(checkpoint / STATE))


def load_adapter(trainer: Any, checkpoint: Path) -> None:
    """Copy the adapter's weights into the model, one tensor at a time."""
    try:
        tensors = load((checkpoint / ADAPTER).read_bytes())
    except (OSError, SafetensorError) as error:
        raise _refused(checkpoint / ADAPTER, error) from error
    if is_shared(trainer):
        spread_adapter(trainer, tensors)
    else:
        set_peft_model_state_dict(trainer.accelerator.unwrap_model(trainer.model), tensors)


def load_rng(checkpoint: Path) -> None:
    put_rng(_load(checkpoint / RNG))


def load_optimizer(trainer: Any, checkpoint: Path) -> None:
    """Bring optimizer, schedule and scaler to where they were, with the learning rate that is asked for now."""
    optimizer, scheduler = trainer.optimizer, trainer.lr_scheduler
    inner = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
    state, base_rates = _load(checkpoint / OPTIMIZER), list(scheduler.base_lrs)
    if is_shared(trainer):
        spread_optimizer(trainer, state)
    elif getattr(inner, "is_paged", False):
        _load_paged(inner, state)
    else:
        optimizer.load_state_dict(state)
    scheduler.load_state_dict(_load(checkpoint / SCHEDULER))
    # A schedule takes its rates from the checkpoint; after a roll-back they are lower now. Computed as LambdaLR does.
    scheduler.base_lrs = base_rates
    for group, rate, share in zip(inner.param_groups, base_rates, scheduler.lr_lambdas, strict=True):
        group["initial_lr"], group["lr"] = rate, rate * share(scheduler.last_epoch)
    scheduler._last_lr = [group["lr"] for group in inner.param_groups]
    if trainer.accelerator.scaler is not None and (checkpoint / SCALER).is_file():
        trainer.accelerator.scaler.load_state_dict(_load(checkpoint / SCALER))


def _load_paged(optimizer: Any, state: dict[str, Any]) -> None:
    """Put the state of a paged bitsandbytes optimizer into pages again.

    Its own `load_state_dict` would make plain GPU tensors of them, and a resumed run would need more memory than the first
    start. What is not paged moves to the GPU in the first step (bitsandbytes 0.50.2; never run on a GPU here).
    """
    optimizer.load_state_dict(state, move_to_device=False)
    for parameter, values in optimizer.state.items():
        for name in ("state1", "state2"):
            if name in values and parameter.device.type != "cpu":
                buffer = optimizer.get_state_buffer(parameter, dtype=values[name].dtype)
                values[name] = buffer.copy_(values[name])


def _save(value: Any, path: Path) -> None:
    try:
        with path.open("wb") as file:
            torch.save(value, file)
    except RuntimeError as error:  # torch's own complaint follows the disk's
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise MachineError(f"WORK_DIR: {path} cannot be written ({error}); free the disk, or name another one") from error


def _load(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, OSError, EOFError, RuntimeError, ValueError) as error:
        raise _refused(path, error) from error


def _refused(path: Path, error: Exception) -> SettingsError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    problem = Problem(
        setting="OUTPUT_URI",
        value=None,
        rule=f"{path.parent.name}/{path.name} is refused: it is missing, or not made of tensors and numbers alone ({reason})",
        way_out="delete that checkpoint to continue from the one before it",
    )
    return SettingsError([problem])


def _num_bytes(value: Any) -> int:
    """Bytes of the tensors in nested dicts and lists."""
    if isinstance(value, torch.Tensor):
        return int(value.numel() * value.element_size())
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return sum(_num_bytes(one) for one in inside)
