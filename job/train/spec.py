"""What the supervisor tells its child processes: one JSON file per stage. Imports nothing heavy, holds no secret."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from job.data.tally import Estimate
from job.plan.footprint import Footprint
from job.settings import DataSettings, EvaluateSettings, LoraSettings, ModelSettings, TrainSettings

TOKENIZER = "tokenizer"
"""Folder in scratch_dir with the tokenizer, for an adapter that is delivered before the training has ended."""


class _Spec(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FetchSpec(_Spec):
    """Bring the base model onto this machine."""

    model: ModelSettings
    models_dir: Path
    """Where converted models are cached."""
    tokenizer_only: bool = False
    """Leave the weights of a Hub model where they are."""


class PrepareSpec(_Spec):
    """Make the training set."""

    data: DataSettings
    model_dir: Path
    chat_template: str | None
    trust_remote_code: bool
    folder: Path
    """Where the prepared set goes; appears whole or not at all."""
    cache_dir: Path
    seed: int


class TrainSpec(_Spec):
    """Train from a checkpoint, or from the start."""

    model: ModelSettings
    lora: LoraSettings
    train: TrainSettings
    evaluate: EvaluateSettings
    system_prompt: str | None
    model_dir: Path
    data_dir: Path
    checkpoints_dir: Path
    adapter_dir: Path
    """Where the trained adapter and the tokenizer go."""
    scratch_dir: Path
    resume_from: Path | None
    micro_batch: int
    gradient_accumulation_steps: int
    num_steps: int
    save_interval_seconds: float
    save_steps: int | None
    save_total_limit: int = 3
    """Checkpoints that are kept, beside the best one: each answers the prompts at the end."""
    num_devices: int = 1
    """Processes (ranks) that train together; accumulation is of each."""
    parallel: Literal["ddp", "fsdp"] | None = None
    """How several share the work: the model on each, or its weights among them."""
    order_id: str = ""
    """Names this start; ranks with another one belong to an earlier start."""
    expect_gpu: bool
    """Whether the driver showed a GPU; training on the CPU at a GPU's price is refused."""
    is_shuffled: bool = True
    """Whether the examples are drawn in a new order each epoch, or as they lie."""
    activation_checkpointing: bool | None = None
    """Instead of what the settings say, when memory forces it."""
    activation_offloading: bool = False
    """Keep activations in host memory between forward and backward: the last resort of a run out of memory."""
    learning_rate_scale: float = 1.0
    """LEARNING_RATE is multiplied by it from the first step of this attempt on, whatever the checkpoint says."""
    skip_steps: tuple[int, ...] = ()
    """Optimizer steps (the first is 1) whose examples are passed over: the step counts, nothing is learned."""
    run_id: str = "run"
    tracker_id: str | None = None
    """Names the run's curve at trackers, the same for all attempts; RUN_ID alone may be another run's elsewhere."""
    trackers_dir: Path | None = None
    """Where trackers keep what they have not sent."""


class MeasureSpec(_Spec):
    """Find out what a model takes, and how much data there is; without weights."""

    model: ModelSettings
    lora: LoraSettings
    model_dir: Path
    """Holds config.json and the tokenizer; or the `.gguf` file that holds both."""
    on_gpu: bool
    length: int
    """Tokens of the longest example that is planned for."""
    data: DataSettings | None
    """To be estimated from its first rows; None when its size is known or not asked for."""
    with_footprint: bool
    cache_dir: Path
    result: Path
    """File that gets a `Measurements` as JSON."""


class Measurements(_Spec):
    """What was found; a part that failed says why."""

    footprint: Footprint | None = None
    estimate: Estimate | None = None
    estimate_failed: str | None = None


class MergeSpec(_Spec):
    """Merge a trained adapter into the base model's own weights."""

    model: ModelSettings
    model_dir: Path
    """The base model, not quantised."""
    adapter_dir: Path
    """The adapter and its tokenizer."""
    target: Path
    """Folder that gets the merged model; an older one is replaced."""
    public_name: str
    """What the base model is called in what is written: a Hub id, or the last part of a path."""
