"""Every setting, declared once: name, type, default, rule and the line of documentation that the user reads.

A field `max_length` is the setting `MAX_LENGTH`. Names that pass through to transformers, TRL or peft keep the library's
name. What is not handled here: reading the values (`read.py`), showing them (`describe.py`).
"""

import json
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    SecretStr,
    model_validator,
)

from job.settings.dataset_spec import DatasetSpec, package_file, split_list
from job.settings.train_args import check_train_args


class Neutral:
    """Marks a setting that changes how a run goes and not what it makes: it is left out of the run's identity."""


NEUTRAL = Neutral()


class Section(BaseModel):
    """A group of settings that one stage takes."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, hide_input_in_errors=True, allow_inf_nan=False
    )
    title: ClassVar[str]


def _split_text(value: Any) -> Any:
    return tuple(split_list(value)) if isinstance(value, str) else value


def _parse_datasets(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    specs, complaints = [], []
    for entry in split_list(value):
        try:
            specs.append(DatasetSpec.parse(entry))
        except ValueError as error:
            complaints.append(str(error))
    if complaints or not specs:
        raise ValueError("; ".join(complaints) or "names no data set")
    return tuple(specs)


def _parse_json_object(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    parsed = json.loads(value)  # JSONDecodeError is a ValueError: pydantic reports it as this field's
    if not isinstance(parsed, dict):
        raise ValueError("must be a JSON object")
    return parsed


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


def _check_output_uri(value: str) -> str:
    scheme, separator, rest = value.partition("://")
    if separator and scheme != "s3":
        raise ValueError("must be a folder or s3://bucket/prefix")
    if separator and not rest.partition("/")[0]:
        raise ValueError("names no bucket (s3://bucket/prefix)")
    return value.rstrip("/") or "/"


Texts = Annotated[tuple[str, ...], BeforeValidator(_split_text)]


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
    chat_template: str | None = None
    """A Jinja file to use instead of the tokenizer's own chat template; models without one get ChatML."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model; leave off unless you have read that code."""

    @model_validator(mode="after")
    def _one_quantisation(self) -> "ModelSettings":
        if self.load_in_4bit and self.load_in_8bit:
            raise ValueError("LOAD_IN_8BIT=1: weights load in 4 or in 8 bits, not both; set LOAD_IN_4BIT=0")
        if self.chat_template and not Path(self.chat_template).is_file():
            raise ValueError(f"CHAT_TEMPLATE={self.chat_template}: no such file; name a Jinja file or leave it out")
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


class DataSettings(Section):
    title = "Data"

    datasets: Annotated[tuple[DatasetSpec, ...], BeforeValidator(_parse_datasets)]
    """Data sets, separated by commas or lines, each `where[?option=value&...]`; the README shows the options."""
    system_prompt: str | None = None
    """System message put before every conversation that has none."""
    learn: Literal["assistant", "all"] = "assistant"
    """Which tokens the loss counts: the assistant's replies, or every token."""
    language: Texts = ()
    """Keep only these languages (`tr,en`); empty keeps all. Code and raw addresses are not judged."""
    language_min_confidence: Annotated[float, Field(ge=0, le=1)] = 0.5
    """How sure the detector must be that an example is in one of LANGUAGE."""
    min_tokens: PositiveInt = 1
    """Examples shorter than this many tokens are dropped."""
    max_length: Annotated[int, Field(ge=8)] = 2048
    """Longest example in tokens; memory grows with it."""
    overlong: Literal["drop", "truncate"] = "drop"
    """What happens to an example longer than MAX_LENGTH; truncated ones may lose the end of the reply."""
    dedup: Literal["off", "exact"] = "exact"
    """Drop an example whose text was seen before, in any data set."""
    max_samples: PositiveInt | None = None
    """Stop reading when this many examples have survived."""
    min_samples: PositiveInt = 8
    """Refuse to train on fewer surviving examples than this."""
    eval_fraction: Annotated[float, Field(ge=0, le=0.5)] = 0.05
    """Share of examples held out to measure the loss on; 0 turns evaluation off."""


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
    """Micro-batch: examples per forward pass; must divide EFFECTIVE_BATCH_SIZE; auto picks a safe one."""
    gradient_accumulation_steps: PositiveInt | None = None
    """Set with PER_DEVICE_TRAIN_BATCH_SIZE to give the effective batch as their product instead."""
    activation_checkpointing: Annotated[bool | Literal["auto"], Field(union_mode="left_to_right"), NEUTRAL] = "auto"
    """Recompute activations in the backward pass: about 30% slower, far less memory; auto: on with a GPU."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42  # numpy takes 32 bits
    """Seed of the adapter's start, the order of the data and dropout."""
    logging_steps: Annotated[PositiveInt, NEUTRAL] = 1
    """Report the loss every this many steps."""
    eval_steps: PositiveInt | None = None
    """Measure the held-out loss every this many steps; always at the start and at the end."""
    eval_prompts: Annotated[tuple[str, ...], BeforeValidator(lambda v: _prompts(v)), NEUTRAL] = ()
    """Prompts answered before and after training, one a line, or a file of them; else two held-out ones."""
    train_args: Annotated[dict[str, Any], BeforeValidator(_parse_json_object), AfterValidator(lambda v: _check_train_args(v))] = (
        Field(default_factory=dict)
    )
    """Any other field of TRL's SFTConfig, as a JSON object."""

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


def _prompts(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    text = Path(value).read_text("utf-8") if "\n" not in value and len(value) < 255 and Path(value).is_file() else value
    return tuple(line.strip() for line in text.splitlines() if line.strip())


class KeepSettings(Section):
    title = "Keeping"

    output_uri: Annotated[str, AfterValidator(_check_output_uri), NEUTRAL] = "runs"
    """Where runs are kept: a folder (a mounted volume on a rented machine) or `s3://bucket/prefix`."""
    run_id: Annotated[str | None, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,95}$"), NEUTRAL] = None
    """Name of the run; by default `<model>-<fingerprint>`, so the same settings continue the same run."""
    save_interval: Annotated[PositiveFloat, NEUTRAL] = 300.0
    """Seconds between checkpoints; what a lost machine costs at most."""
    save_steps: Annotated[PositiveInt | None, NEUTRAL] = None
    """Save every this many optimizer steps instead."""
    save_total_limit: Annotated[PositiveInt, NEUTRAL] = 3
    """Checkpoints kept, the newest ones."""
    grace_seconds: Annotated[PositiveFloat, NEUTRAL] = 30.0
    """How long a stopping trainer may take to save before it is killed; keep below the machine's own limit."""
    work_dir: Annotated[Path, NEUTRAL] = Path("~/.cache/qlora-job")
    """Fast local disk for converted models and for checkpoints on their way to OUTPUT_URI."""


class BudgetSettings(Section):
    title = "Budget"

    gpu_hourly_rate: Annotated[PositiveFloat | None, NEUTRAL] = None
    """What the machine costs in US dollars an hour; the report says "unknown" without it, never 0."""


class PublishSettings(Section):
    title = "Publishing"

    hub_model_id: Annotated[str | None, Field(pattern=r"^[\w.-]+/[\w.-]+$"), NEUTRAL] = None
    """Hub repository (owner/name) that gets the adapter; without it the adapter stays in the store."""
    hub_private_repo: Annotated[bool, NEUTRAL] = True
    """Create the repository private; an existing one keeps its visibility."""
    hub_revision: Annotated[str, NEUTRAL] = "main"
    """Branch that is pushed to."""


class Secrets(Section):
    """Credentials. Each may also be given as the name of a file that holds it: `HF_TOKEN_FILE=/run/secrets/hf`."""

    title = "Secrets"

    hf_token: Annotated[SecretStr | None, NEUTRAL] = None
    """Hugging Face token: gated models and data sets, and publishing (needs write permission)."""
    aws_access_key_id: Annotated[SecretStr | None, NEUTRAL] = None
    """Key for `s3://` (any S3 service; name its address in AWS_ENDPOINT_URL_S3)."""
    aws_secret_access_key: Annotated[SecretStr | None, NEUTRAL] = None
    """Secret of that key."""
    aws_session_token: Annotated[SecretStr | None, NEUTRAL] = None
    """Session token of temporary AWS credentials."""
    runpod_api_key: Annotated[SecretStr | None, NEUTRAL] = None
    """RunPod key; kept from every child process."""
    wandb_api_key: Annotated[SecretStr | None, NEUTRAL] = None
    """Weights & Biases key; reaches the trainer only when TRAIN_ARGS reports there."""
