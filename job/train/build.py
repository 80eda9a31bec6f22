"""A TrainSpec in; the model with its adapter, the tokenizer and the loop around them out, ready to train or to evaluate."""

import faulthandler
import shutil
import signal
from pathlib import Path
from typing import Any

import datasets
import pyarrow.compute
import torch
from transformers import PrinterCallback

from job.errors import MachineError
from job.events import EventWriter, Loaded, Progress
from job.settings import is_hub_id
from job.train.arguments import make_arguments
from job.train.faults import Faults
from job.train.loop import Loop
from job.train.model import (
    check_lora_targets,
    load_model,
    load_tokenizer,
    lora_config,
    pick_dtype,
    told_while_loading,
    train_in_fp32,
)
from job.train.spec import TOKENIZER, TrainSpec
from job.train.watch import Watch

STACKS = "stacks.txt"
"""File in scratch_dir that gets the stacks of all threads at SIGUSR1."""


def build(spec: TrainSpec, events: EventWriter, watch: Watch, faults: Faults) -> tuple[Any, Loop, bool]:
    """Load everything; returns (tokenizer, loop, whether anything is held out).

    Raises:
        MachineError: torch cannot use the GPU that the driver shows.
        SettingsError: the model, or the layers to adapt, are not what the settings say.
    """
    if spec.expect_gpu and not torch.cuda.is_available():
        raise MachineError("the driver shows a GPU that torch cannot use; update the driver (580 or newer for CUDA 13)")
    events.write(Progress(text="loading the model"))
    shutil.rmtree(spec.scratch_dir, ignore_errors=True)  # what a killed attempt left half written
    spec.scratch_dir.mkdir(parents=True)
    stacks = (spec.scratch_dir / STACKS).open("w")
    faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
    faults.strike("load", 0)
    with told_while_loading(watch.beat):
        tokenizer, model = load_tokenizer(spec), load_model(spec)
    tokenizer.save_pretrained(str(spec.scratch_dir / TOKENIZER))
    check_lora_targets(model, spec.lora)
    has_eval = (spec.data_dir / "eval").is_dir()
    trainer = Loop(
        watch=watch,
        faults=faults,
        skip_steps=spec.skip_steps,
        model=model,
        args=make_arguments(spec, has_eval=has_eval),
        train_dataset=_load(spec.data_dir / "train"),
        eval_dataset=_load(spec.data_dir / "eval") if has_eval else None,
        processing_class=tokenizer,
        peft_config=lora_config(spec.lora),
    )
    trainer.remove_callback(PrinterCallback)  # it prints each log line once more
    train_in_fp32(trainer.model)
    # The folder of this machine must not be published; the name under which the user knows the model is.
    name = spec.model.model_id if is_hub_id(spec.model.model_id) else Path(spec.model.model_id).name
    trainer.model.peft_config["default"].base_model_name_or_path = name
    counted = [(parameter.numel(), parameter.requires_grad) for parameter in trainer.model.parameters()]
    events.write(
        Loaded(
            device=torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            num_parameters=trainer.model.num_parameters(),
            num_trainable=sum(count for count, trained in counted if trained),
            dtype=str(pick_dtype(spec.model.dtype)).removeprefix("torch."),
        )
    )
    return tokenizer, trainer, has_eval


def lengths(trainer: Loop) -> Any:
    """Tokens of each training example."""
    found = pyarrow.compute.list_value_length(trainer.train_dataset.data.column("input_ids")).to_numpy()
    return found[:-1] if trainer.are_several else found  # the last one is a filler


def room_tokens(trainer: Loop, spec: TrainSpec) -> int:
    """Tokens of the largest micro-batch: what the memory was planned for."""
    return spec.micro_batch * int(lengths(trainer).max())


def evaluate_step(trainer: Loop, watch: Watch, events: EventWriter, *, has_eval: bool) -> None:
    """Measure the held-out loss of the last completed step, unless that was done."""
    if has_eval and watch.step not in watch.evaluations:
        trainer.state.global_step = watch.step
        events.write(Progress(text="evaluating"))
        trainer.evaluate()


def _load(folder: Path) -> datasets.Dataset:
    rows = datasets.load_from_disk(str(folder))
    return rows.select_columns([name for name in rows.column_names if name in ("input_ids", "labels", "seq_lengths")])
