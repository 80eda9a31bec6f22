"""Settings of the model, the adapter and the training run; one line of documentation at each."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from job.settings.chat_template import find_template
from job.settings.dataset_spec import package_file
from job.settings.section import NEUTRAL, Section, Texts
from job.settings.train_args import check_train_args

TRACKERS = ("wandb", "trackio", "tensorboard", "mlflow")


def _parse_json_object(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    parsed = json.loads(value)  # JSONDecodeError is a ValueError: pydantic reports it as this field's
    if not isinstance(parsed, dict):
        raise ValueError("must be a JSON object")
    return parsed


def _check_template(value: str | None) -> str | None:
    if value is not None:
        find_template(value)
    return value


def _check_model_exists(value: str) -> str:
    if value.startswith("pkg:"):
        try:
            package_file(value)
        except FileNotFoundError as error:
            raise ValueError(str(error)) from None
    elif value.startswith((".", "/", "~")) or value.endswith(".gguf"):
        if not Path(value).expanduser().exists():
            raise ValueError(f"no such file or folder (looked in {Path.cwd()})")
    elif value.count("/") > 1:
        raise ValueError("is neither a folder that exists nor a Hub id (owner/name)")
    return value


class ModelSettings(Section):
    title = "Model"

    model_id: Annotated[str, AfterValidator(_check_model_exists)]
    """What to fine-tune: a Hub id, a local folder, or a `.gguf` file (`pkg:package/file.gguf` for one inside a package)."""
    model_revision: str | None = None
    """Branch, tag or commit of a Hub model; pin a commit to make the run repeatable."""
    load_in_4bit: bool = True
    """QLoRA: base weights in 4-bit NF4 with double quantisation, about 0.6 bytes a parameter."""
    load_in_8bit: bool = False
    """Base weights in 8 bits instead; set LOAD_IN_4BIT=0 with it."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Number format of computation; auto: bfloat16 where the GPU has it, else float16; float32 on a CPU."""
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention kernel; flash_attention_2 needs its package and a GPU of 2020 or newer."""
    chat_template: Annotated[str | None, AfterValidator(lambda v: _check_template(v))] = None
    """Instead of the tokenizer's own template: a Jinja file, or a family that TRL ships (`qwen3`, `gemma3`, ...) or `chatml`."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model; leave off unless you have read that code."""

    @model_validator(mode="after")
    def _one_quantisation(self) -> "ModelSettings":
        if self.load_in_4bit and self.load_in_8bit:
            raise ValueError("LOAD_IN_8BIT=1: weights load in 4 or in 8 bits, not both; set LOAD_IN_4BIT=0")
        return self


class LoraSettings(Section):
    title = "LoRA"

    lora_r: PositiveInt = 16
    """Rank: width of the adapter; 8-64 is usual, more learns more and costs memory."""
    lora_alpha: PositiveInt = 32
    """Scale: the adapter counts alpha/r; twice the rank is the common start."""
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of adapter inputs dropped while training; 0 is a little faster."""
    lora_target_modules: Texts = ("all-linear",)
    """Layers that get an adapter: `all-linear`, or names such as `q_proj,v_proj`."""
    use_rslora: bool = False
    """Scale by alpha/sqrt(r): steadier at ranks above 64 (arXiv 2312.03732)."""
    use_dora: bool = False
    """Weight-decomposed LoRA: a little better at small ranks, slower (arXiv 2402.09353)."""

    @property
    def adapts_all_linear(self) -> bool:
        return self.lora_target_modules == ("all-linear",)


class TrainSettings(Section):
    title = "Training"

    num_train_epochs: PositiveFloat = 1.0
    """Passes over the data; 1-3 is usual, more overfits small sets."""
    max_steps: PositiveInt | None = None
    """Stop after this many optimizer steps whatever NUM_TRAIN_EPOCHS says."""
    learning_rate: PositiveFloat = 2e-4
    """Peak learning rate; 2e-4 is QLoRA's for 7-13B models, 1e-4 above (arXiv 2305.14314, table 9)."""
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup", "cosine_with_restarts"] = "cosine"
    """How the learning rate falls."""
    warmup_steps: NonNegativeFloat = 0.03
    """Steps over which the learning rate rises; below 1 it is a share of all steps."""
    weight_decay: NonNegativeFloat = 0.0
    """Pull of adapter weights towards zero."""
    optim: str = "auto"
    """Optimizer by transformers' name; auto: paged_adamw_8bit on a GPU, adamw_torch on a CPU."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients are clipped to this norm."""
    effective_batch_size: PositiveInt = 16
    """Examples per optimizer step over all devices; the micro-batch and accumulation follow from it."""
    per_device_train_batch_size: Annotated[PositiveInt | Literal["auto"], Field(union_mode="left_to_right"), NEUTRAL] = "auto"
    """Micro-batch: examples per forward pass; must divide EFFECTIVE_BATCH_SIZE; auto: the largest that fits into memory."""
    gradient_accumulation_steps: PositiveInt | None = None
    """Set with PER_DEVICE_TRAIN_BATCH_SIZE to give the effective batch as their product instead; all GPUs together do it."""
    nproc_per_node: Annotated[PositiveInt | Literal["auto"], Field(union_mode="left_to_right"), NEUTRAL] = "auto"
    """Trainer processes on each machine; auto: one for each GPU, and one on a CPU. EFFECTIVE_BATCH_SIZE is a multiple of all."""
    parallel: Annotated[Literal["auto", "ddp", "fsdp"], NEUTRAL] = "auto"
    """Several GPUs: ddp keeps the model on each, fsdp shares its weights out (never run by us on a GPU); auto: ddp if it fits."""
    activation_checkpointing: Annotated[bool | Literal["auto"], Field(union_mode="left_to_right"), NEUTRAL] = "auto"
    """Recompute activations in the backward pass: about 30% slower, far less memory; auto: only where they do not fit."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42  # numpy takes 32 bits
    """Seed of the adapter's start, the order of the data and dropout."""
    logging_steps: Annotated[PositiveInt, NEUTRAL] = 1
    """Report the loss every this many steps."""
    eval_steps: PositiveInt | None = None
    """Measure the held-out loss every this many steps; always at the start and at the end."""
    early_stopping_patience: PositiveInt | None = None
    """Stop after this many evaluations in a row without a lower held-out loss; the best checkpoint is kept. Needs EVAL_STEPS."""
    report_to: Annotated[Texts, AfterValidator(lambda v: _check_trackers(v)), NEUTRAL] = ()
    """Trackers that get the curves too: wandb, trackio, tensorboard, mlflow; a resumed run continues its curve there."""
    train_args: Annotated[dict[str, Any], BeforeValidator(_parse_json_object), AfterValidator(lambda v: _check_train_args(v))] = (
        Field(default_factory=dict)
    )
    """Any other field of TRL's SFTConfig, as a JSON object."""

    @model_validator(mode="after")
    def _patience_needs_evaluations(self) -> "TrainSettings":
        if self.early_stopping_patience is not None and self.eval_steps is None:
            raise ValueError(
                f"EARLY_STOPPING_PATIENCE={self.early_stopping_patience}: counts evaluations, and without EVAL_STEPS there is "
                "none on the way; set EVAL_STEPS"
            )
        return self

    @model_validator(mode="after")
    def _batches_divide(self) -> "TrainSettings":
        micro, accumulation = self.per_device_train_batch_size, self.gradient_accumulation_steps
        if accumulation is not None and micro == "auto":
            raise ValueError(
                f"GRADIENT_ACCUMULATION_STEPS={accumulation}: means nothing while PER_DEVICE_TRAIN_BATCH_SIZE is auto; "
                "set both, or set EFFECTIVE_BATCH_SIZE alone"
            )
        if accumulation is None and micro != "auto" and self.effective_batch_size % micro:
            raise ValueError(
                f"PER_DEVICE_TRAIN_BATCH_SIZE={micro}: must divide EFFECTIVE_BATCH_SIZE={self.effective_batch_size}; "
                "choose a divisor, or set GRADIENT_ACCUMULATION_STEPS too"
            )
        return self


def _check_train_args(value: dict[str, Any]) -> dict[str, Any]:
    if complaints := check_train_args(value, TrainSettings.model_fields) if value else []:
        raise ValueError("; ".join(complaints))
    return value


def _check_trackers(value: tuple[str, ...]) -> tuple[str, ...]:
    asked = tuple(dict.fromkeys(name for name in value if name != "none"))
    if unknown := [name for name in asked if name not in TRACKERS]:
        raise ValueError(f"knows no tracker {', '.join(unknown)}: choose of {', '.join(TRACKERS)}")
    return asked
