"""Weights shared among ranks (FSDP2): an adapter and its optimizer gathered whole for a checkpoint, and spread out again.

A checkpoint has the same form whether its ranks shared the weights or each had them all, so the next start may do either. What is
not handled: 8-bit and paged optimizers, whose states are no plain tensors. Documented path: docs.pytorch.org, distributed
checkpoint, `torch.distributed.checkpoint.state_dict`; with 4-bit weights it was never run.
"""

from collections.abc import Mapping
from typing import Any

import torch
from peft import get_peft_model_state_dict
from torch.distributed.checkpoint import state_dict

WHOLE = state_dict.StateDictOptions(full_state_dict=True, cpu_offload=True)


def is_shared(trainer: Any) -> bool:
    return bool(trainer.is_fsdp_enabled)


def gather(trainer: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The adapter's tensors and the optimizer's state, whole on the first rank; every rank calls it at the same step."""
    model, optimizer = trainer.accelerator.unwrap_model(trainer.model_wrapped), _inner(trainer.optimizer)
    weights = {name: _whole(parameter.detach()) for name, parameter in model.named_parameters() if parameter.requires_grad}
    named = state_dict.get_optimizer_state_dict(model, optimizer, options=WHOLE)
    adapter = get_peft_model_state_dict(model, state_dict=weights, save_embedding_layers=False)
    return adapter, _by_number(named)


def spread_adapter(trainer: Any, tensors: Mapping[str, torch.Tensor]) -> None:
    """Give each rank its share of the adapter's tensors."""
    model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    known = {name: name.replace(".default.", ".") for name, parameter in model.named_parameters() if parameter.requires_grad}
    own = {name: tensors[stored] for name, stored in known.items()}
    options = state_dict.StateDictOptions(full_state_dict=True, strict=False)
    state_dict.set_model_state_dict(model, own, options=options)


def spread_optimizer(trainer: Any, numbered: dict[str, Any]) -> None:
    """Give each rank its share of the optimizer's state."""
    model, optimizer = trainer.accelerator.unwrap_model(trainer.model_wrapped), _inner(trainer.optimizer)
    names = _trained_names(model, optimizer)
    state = {names[number]: values for number, values in numbered["state"].items()}
    groups = [{**group, "params": [names[number] for number in group["params"]]} for group in numbered["param_groups"]]
    options = state_dict.StateDictOptions(full_state_dict=True)
    state_dict.set_optimizer_state_dict(model, optimizer, {"state": state, "param_groups": groups}, options=options)


def _by_number(named: Mapping[str, Any]) -> dict[str, Any]:
    """As `Optimizer.state_dict` has it: parameters go by their number in the groups, and not by their name."""
    if not named:  # only the first rank is given it
        return {}
    order = [name for group in named["param_groups"] for name in group["params"]]
    numbers = {name: number for number, name in enumerate(order)}
    groups = [{**group, "params": [numbers[name] for name in group["params"]]} for group in named["param_groups"]]
    return {"state": {numbers[name]: values for name, values in named["state"].items()}, "param_groups": groups}


def _trained_names(model: Any, optimizer: Any) -> list[str]:
    """In the order of the optimizer's groups."""
    by_id = {id(parameter): name for name, parameter in model.named_parameters()}
    return [by_id[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]


def _whole(tensor: Any) -> torch.Tensor:
    found: torch.Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return found.cpu()


def _inner(optimizer: Any) -> Any:
    return getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
