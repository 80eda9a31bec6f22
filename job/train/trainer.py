"""The training run itself: TRL's SFTTrainer from the latest whole checkpoint to the last step, then the adapter and samples."""

import resource
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import PrinterCallback
from trl import SFTConfig, SFTTrainer

from job.data.tokens import IGNORED
from job.errors import JobError, MachineError, PlanError, Problem, SettingsError
from job.events import Ended, EventWriter, Loaded, Progress, Sampled, Stopped, Warned
from job.settings import is_hub_id
from job.train.guards import StopSignal, Watch, clear_scratch, saved_step
from job.train.model import check_lora_targets, load_model, load_tokenizer, lora_config, pick_dtype, train_in_fp32
from job.train.spec import TrainSpec

SAMPLE_TOKENS = 48
NUM_SAMPLES = 2
PLAIN_LOGITS = 2**27
"""Tokens x vocabulary up to which logits are computed whole: 512 MiB in fp32. Above, TRL's fused head never holds them; below,
its tiles cost more than they save."""


class _Trainer(SFTTrainer):
    """TRL's trainer, with the loss computed from plain logits where they are small."""

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        vocabulary = self.model.config.get_text_config().vocab_size
        if return_outputs or inputs["input_ids"].numel() * vocabulary > PLAIN_LOGITS:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = inputs["labels"][:, 1:]  # (B, T-1)
        logits = model(**{name: value for name, value in inputs.items() if name != "labels"}, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum"
        )
        counted = (labels != IGNORED).sum() if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)
        return loss / counted.clamp(min=1)

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Our own card is written at the end; TRL's would name paths of this machine at every save."""


def train(spec: TrainSpec, events: EventWriter) -> None:
    """Train to the end or until stopped; ends with an `Ended` event.

    Raises:
        PlanError: the GPU's memory does not suffice.
        DivergedError: the loss is not finite.
        PreemptedError: stopped while nothing could be lost.
    """
    stop = StopSignal()
    try:
        _train(spec, events, stop)
    except torch.OutOfMemoryError as error:
        raise PlanError(
            f"PER_DEVICE_TRAIN_BATCH_SIZE={spec.micro_batch}: out of GPU memory ({str(error).splitlines()[0]}); "
            "lower it or set ACTIVATION_CHECKPOINTING=1 to continue this run; a lower MAX_LENGTH starts a new one"
        ) from error


def _train(spec: TrainSpec, events: EventWriter, stop: StopSignal) -> None:
    if spec.expect_gpu and not torch.cuda.is_available():
        raise MachineError("the driver shows a GPU that torch cannot use; update the driver (580 or newer for CUDA 13)")
    events.write(Progress(text="loading the model"))
    clear_scratch(spec.scratch_dir)
    tokenizer, model = load_tokenizer(spec), load_model(spec)
    check_lora_targets(model, spec.lora)
    train_set = _load(spec.data_dir / "train")
    eval_set = _load(spec.data_dir / "eval") if (spec.data_dir / "eval").is_dir() else None
    watch = Watch(spec, events, stop)
    trainer = _Trainer(
        model=model,
        args=_arguments(spec, has_eval=eval_set is not None),
        train_dataset=train_set,
        eval_dataset=eval_set,
        processing_class=tokenizer,
        peft_config=lora_config(spec.lora),
        callbacks=[watch],
    )
    trainer.remove_callback(PrinterCallback)  # it prints each log line once more
    train_in_fp32(trainer.model)
    counted = [(parameter.numel(), parameter.requires_grad) for parameter in trainer.model.parameters()]
    events.write(
        Loaded(
            device=torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            num_parameters=trainer.model.num_parameters(),
            num_trainable=sum(count for count, trained in counted if trained),
            dtype=str(pick_dtype(spec.model.dtype)).removeprefix("torch."),
        )
    )
    step = saved_step(spec.resume_from)
    if step < spec.num_steps:
        trainer.train(resume_from_checkpoint=str(spec.resume_from) if spec.resume_from else None)
        step = trainer.state.global_step
    else:  # killed after the last step: only what follows it is left
        trainer.state.global_step = step
        trainer.model.load_adapter(str(spec.resume_from), "default", is_trainable=True)
    if step < spec.num_steps:
        events.write(Ended(stopped=Stopped.PREEMPTED, step=step, peak_memory_bytes=_peak_memory_bytes()))
        return
    if eval_set is not None and watch.last_evaluated != step:
        events.write(Progress(text="evaluating"))
        trainer.evaluate()
    _save_adapter(trainer.model, tokenizer, spec)
    events.write(Progress(text="writing samples"))
    try:
        _sample(trainer.model, tokenizer, spec, events)
    except Exception as error:  # the adapter is saved: a sample that fails must not cost it
        if isinstance(error, JobError):
            raise
        events.write(Warned(text=f"no samples: {type(error).__name__}: {error}"))
    events.write(Ended(stopped=Stopped.FINISHED, step=step, peak_memory_bytes=_peak_memory_bytes()))


def _arguments(spec: TrainSpec, *, has_eval: bool) -> SFTConfig:
    settings, gpu = spec.train, torch.cuda.is_available()
    dtype = pick_dtype(spec.model.dtype)
    checkpointing = gpu if settings.activation_checkpointing == "auto" else settings.activation_checkpointing
    values: dict[str, Any] = {
        "output_dir": str(spec.scratch_dir),
        "per_device_train_batch_size": spec.micro_batch,
        "per_device_eval_batch_size": spec.micro_batch,
        "gradient_accumulation_steps": spec.gradient_accumulation_steps,
        "max_steps": spec.num_steps,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": settings.lr_scheduler_type,
        "warmup_steps": settings.warmup_steps,
        "weight_decay": settings.weight_decay,
        "optim": ("paged_adamw_8bit" if gpu else "adamw_torch") if settings.optim == "auto" else settings.optim,
        "max_grad_norm": settings.max_grad_norm,
        "seed": settings.seed,
        "data_seed": settings.seed,
        "bf16": gpu and dtype == torch.bfloat16,
        "fp16": gpu and dtype == torch.float16,
        "use_cpu": not gpu,
        "activation_checkpointing": checkpointing,
        "eval_strategy": "steps" if has_eval and settings.eval_steps else "no",
        "eval_steps": settings.eval_steps,
        "eval_on_start": has_eval and spec.resume_from is None,
        "logging_steps": settings.logging_steps,
        "logging_nan_inf_filter": False,  # it would hide a NaN
        "include_num_input_tokens_seen": "non_padding",
        "save_strategy": "no",  # Watch decides when
        "report_to": "none",
        "disable_tqdm": True,
        "max_length": None,  # the examples are within MAX_LENGTH already
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "dataloader_pin_memory": gpu,
    }
    try:
        return SFTConfig(**{**values, **settings.train_args})
    except (TypeError, ValueError) as error:
        problem = Problem(setting="TRAIN_ARGS", value=str(settings.train_args), rule=str(error), way_out="correct the value")
        raise SettingsError([problem]) from error


def _load(folder: Path) -> datasets.Dataset:
    return datasets.load_from_disk(str(folder)).select_columns(["input_ids", "labels"])


def _save_adapter(model: Any, tokenizer: Any, spec: TrainSpec) -> None:
    # The folder of this machine must not be published; the name under which the user knows the model is.
    name = spec.model.model_id if is_hub_id(spec.model.model_id) else Path(spec.model.model_id).name
    model.peft_config["default"].base_model_name_or_path = name
    model.save_pretrained(str(spec.adapter_dir))
    tokenizer.save_pretrained(str(spec.adapter_dir))
    (spec.adapter_dir / "README.md").unlink(missing_ok=True)


def _sample(model: Any, tokenizer: Any, spec: TrainSpec, events: EventWriter) -> None:
    """Answer each prompt with the adapter off and on."""
    model.eval()
    model.config.use_cache = True
    model.gradient_checkpointing_disable()
    for shown, prompt_ids in _sample_prompts(tokenizer, spec):
        inputs = torch.tensor([prompt_ids], device=model.device)  # (1, T)
        with model.disable_adapter():
            before = _answer(model, tokenizer, inputs)
        events.write(Sampled(prompt=shown, before=before, after=_answer(model, tokenizer, inputs)))


def _sample_prompts(tokenizer: Any, spec: TrainSpec) -> list[tuple[str, list[int]]]:
    """(text to show, ids to continue): the user's prompts, else held-out ones, else none."""
    system = [{"role": "system", "content": spec.system_prompt}] if spec.system_prompt else []
    prompts = []
    for prompt in spec.train.eval_prompts:
        text = tokenizer.apply_chat_template(
            [*system, {"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        prompts.append((prompt, tokenizer(text, add_special_tokens=False)["input_ids"]))
    if not prompts and (spec.data_dir / "eval").is_dir():
        for row in _load(spec.data_dir / "eval").take(NUM_SAMPLES):
            learned = next((index for index, label in enumerate(row["labels"]) if label >= 0), 0)
            ids = row["input_ids"][: max(learned, 8)]
            prompts.append((tokenizer.decode(ids, skip_special_tokens=True), ids))
    return prompts


def _answer(model: Any, tokenizer: Any, inputs: torch.Tensor) -> str:
    with torch.no_grad():
        output = model.generate(
            input_ids=inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=SAMPLE_TOKENS,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    text: str = tokenizer.decode(output[0, inputs.shape[1] :], skip_special_tokens=True)
    return text.strip()


def _peak_memory_bytes() -> int:
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_reserved())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
