"""A TrainSpec in, TRL's SFTConfig out."""

from typing import Any

import torch
from trl import SFTConfig

from job.errors import Problem, SettingsError
from job.plan.memory import optimizer_name
from job.train.model import pick_dtype
from job.train.spec import TrainSpec


def make_arguments(spec: TrainSpec, *, has_eval: bool) -> SFTConfig:
    """Raise a SettingsError when SFTConfig refuses one of TRAIN_ARGS."""
    settings, gpu = spec.train, torch.cuda.is_available()
    dtype = pick_dtype(spec.model.dtype)
    checkpointing = gpu if settings.activation_checkpointing == "auto" else settings.activation_checkpointing
    recomputes = checkpointing if spec.activation_checkpointing is None else spec.activation_checkpointing
    shares = spec.parallel == "fsdp"
    values: dict[str, Any] = {
        "output_dir": str(spec.scratch_dir),
        "per_device_train_batch_size": spec.micro_batch,
        "per_device_eval_batch_size": spec.micro_batch,
        "gradient_accumulation_steps": spec.gradient_accumulation_steps,
        "max_steps": spec.num_steps,
        "learning_rate": settings.learning_rate * spec.learning_rate_scale,
        "lr_scheduler_type": settings.lr_scheduler_type,
        "warmup_steps": settings.warmup_steps,
        "weight_decay": settings.weight_decay,
        # Shared parameters are DTensors, which 8-bit optimizers do not know (bitsandbytes 0.50).
        "optim": "adamw_torch" if spec.parallel == "fsdp" and settings.optim == "auto" else optimizer_name(settings, on_gpu=gpu),
        "max_grad_norm": settings.max_grad_norm,
        "seed": settings.seed,
        "data_seed": settings.seed,
        "train_sampling_strategy": "random" if spec.is_shuffled else "sequential",
        "bf16": gpu and dtype == torch.bfloat16,
        "fp16": gpu and dtype == torch.float16,
        "use_cpu": not gpu,
        "activation_checkpointing": recomputes and not shares,  # FSDP has its own, which gathers no layer twice
        "fsdp": shares or None,
        "fsdp_config": {"version": 2, "activation_checkpointing": recomputes} if shares else None,
        # 8-bit layers hold their input where only a recomputation from scratch lets go of it (bitsandbytes 0.50, MatMul8bitLt).
        "activation_checkpointing_kwargs": {"use_reentrant": True} if spec.model.load_in_8bit else None,
        "activation_offloading": spec.activation_offloading and gpu,  # on a CPU there is nowhere else to put them
        "eval_strategy": "steps" if has_eval and settings.eval_steps else "no",
        "eval_steps": settings.eval_steps,
        "eval_on_start": has_eval and spec.resume_from is None,
        "logging_steps": settings.logging_steps,
        "logging_nan_inf_filter": False,  # it would hide a NaN
        "include_num_input_tokens_seen": "non_padding",
        "save_strategy": "no",  # Watch decides when
        "report_to": "none",  # Curves does it; transformers' own callbacks would fail and wait inside the loop
        "disable_tqdm": True,
        "ddp_find_unused_parameters": False,
        "max_length": None,  # the examples are within MAX_LENGTH already
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "dataloader_pin_memory": gpu,
    }
    try:
        return SFTConfig(**{**values, **settings.train_args})
    except (TypeError, ValueError) as error:
        problem = Problem(setting="TRAIN_ARGS", value=str(settings.train_args), rule=str(error), way_out="correct the value")
        raise SettingsError([problem]) from error
