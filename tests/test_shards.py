"""Weights that are shared among ranks: FSDP2 on two CPU processes gives and takes the checkpoints of one.

transformers takes FSDP on a GPU only, so a model is sharded here by torch itself, and the job's own part is run on it.
"""

import multiprocessing
import os
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

from job.settings import EvaluateSettings, LoraSettings, ModelSettings, TrainSettings
from job.train.arguments import make_arguments
from job.train.model import quantization
from job.train.shards import gather, spread_adapter, spread_optimizer
from job.train.spec import TrainSpec


def build(folder: str) -> tuple[Any, Any]:
    torch.manual_seed(1)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), LoraConfig(r=4, target_modules="all-linear"))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return model, torch.optim.AdamW(trained, lr=0.01)


def step(model: Any, optimizer: Any, number: int) -> float:
    ids = torch.tensor([[number + 3, 7, 11, 2 * number + 1]])
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def as_trainer(model: Any, optimizer: Any) -> Any:
    """What the job asks of a Trainer here."""
    return SimpleNamespace(model_wrapped=model, optimizer=optimizer, accelerator=SimpleNamespace(unwrap_model=lambda one: one))


def work(rank: int, port: int, folder: str, checkpoint: str, results: Any) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    distributed.init_process_group("gloo", rank=rank, world_size=2)
    model, _ = build(folder)
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.base_model.model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.01)
    trainer, saved = as_trainer(model, optimizer), torch.load(checkpoint, weights_only=True)
    spread_adapter(trainer, saved["adapter"])
    spread_optimizer(trainer, saved["optimizer"])
    losses = [step(model, optimizer, number) for number in (2, 3)]
    adapter, state = gather(trainer)
    if rank == 0:
        torch.save({"adapter": adapter, "optimizer": state, "losses": losses}, results)
    distributed.barrier()
    distributed.destroy_process_group()


def test_two_ranks_that_share_the_weights_continue_a_checkpoint_of_one_and_write_one_alike(
    tmp_path: Path, tiny_model: Path
) -> None:
    model, optimizer = build(str(tiny_model))
    for number in (0, 1):
        step(model, optimizer, number)
    adapter = get_peft_model_state_dict(model, save_embedding_layers=False)
    torch.save({"adapter": adapter, "optimizer": optimizer.state_dict()}, tmp_path / "checkpoint.pt")
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    arguments = (port, str(tiny_model), str(tmp_path / "checkpoint.pt"), str(tmp_path / "after.pt"))
    ranks = [context.Process(target=work, args=(rank, *arguments)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(120)
    assert [rank.exitcode for rank in ranks] == [0, 0]
    losses = [step(model, optimizer, number) for number in (2, 3)]
    after = torch.load(tmp_path / "after.pt", weights_only=True)
    assert after["losses"] == pytest.approx(losses, rel=1e-5)
    expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    assert after["adapter"].keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(after["adapter"][name], tensor, msg=name)
    alone, once_more = build(str(tiny_model))
    set_peft_model_state_dict(alone, after["adapter"])
    once_more.load_state_dict(after["optimizer"])  # one rank continues what two have written
    assert step(alone, once_more, 4) == pytest.approx(step(model, optimizer, 4), rel=1e-5)


def spec(**changes: Any) -> TrainSpec:
    folders = dict.fromkeys(("model_dir", "data_dir", "checkpoints_dir", "adapter_dir", "scratch_dir"), Path("/nowhere"))
    options = {
        "model": ModelSettings(model_id="org/model"),
        "lora": LoraSettings(),
        "train": TrainSettings(),
        "evaluate": EvaluateSettings(),
        "system_prompt": None,
        **folders,
        "resume_from": None,
        "micro_batch": 1,
        "gradient_accumulation_steps": 2,
        "num_devices": 2,
        "num_steps": 4,
        "save_interval_seconds": 1e6,
        "save_steps": None,
        "expect_gpu": False,
    }
    return TrainSpec(**{**options, **changes})


def test_shared_weights_are_asked_for_as_the_libraries_document_it() -> None:
    train = TrainSettings(activation_checkpointing=True)
    arguments = make_arguments(spec(parallel="fsdp", train=train), has_eval=False)
    assert arguments.fsdp and arguments.fsdp_plugin_args["fsdp_version"] == 2
    assert arguments.fsdp_plugin_args["activation_checkpointing"] and not arguments.activation_checkpointing
    assert arguments.optim == "adamw_torch"
    assert not make_arguments(spec(parallel="ddp"), has_eval=False).fsdp


def test_4_bit_weights_that_are_shared_are_stored_in_the_format_of_computation() -> None:
    settings = ModelSettings(model_id="org/model")
    shared = quantization(settings, torch.bfloat16, is_shared=True)
    alone = quantization(settings, torch.bfloat16)
    assert shared is not None and alone is not None
    assert (shared.bnb_4bit_quant_storage, alone.bnb_4bit_quant_storage) == (torch.bfloat16, torch.uint8)
