"""The training run itself: from the latest whole checkpoint to the last step, then the adapter and samples.

However it ends, the last completed step is saved first when its state is sound, and the last event says why it ended.
"""

import faulthandler
import gc
import resource
import shutil
import signal
from pathlib import Path

import datasets
import pyarrow.compute
import torch
from transformers import PrinterCallback

from job.errors import DivergedError, JobError, MachineError, PlanError, PreemptedError
from job.events import Ended, EventWriter, Failed, Loaded, Ordered, Phase, Progress, Saved, Stopped, Warned
from job.keep.checkpoints import STORED, DamagedError, check, seal, step_name
from job.settings import is_hub_id
from job.train.arguments import make_arguments
from job.train.faults import Faults
from job.train.guards import DivergenceError
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
from job.train.order import tokens_of_steps
from job.train.preempt import StoppedError, StopSignal
from job.train.sample import sample, time_samples
from job.train.spec import TOKENIZER, TrainSpec
from job.train.state import load_adapter
from job.train.watch import Watch

STACKS = "stacks.txt"
"""File in scratch_dir that gets the stacks of all threads at SIGUSR1."""
MAX_EXAMPLES = 64
"""Of a window that diverged, named in the event."""


def train(spec: TrainSpec, events: EventWriter, stop: StopSignal, fault: str = "") -> int:
    """Train to the end or until stopped; ends with an `Ended` or a `Failed` event, and returns the exit status.

    Args:
        fault: what to break on purpose; see faults.py.

    Raises:
        JobError: what is no matter of memory, signals or losses.
    """
    stop.exit_at_once(lambda text: events.write(_preempted(text)))
    faults = Faults(fault, spec.checkpoints_dir.parent)
    watch = Watch(spec, events, stop, faults)
    try:
        ended = _train(spec, events, watch, stop, faults)
        events.write(ended)
        return 0
    except StoppedError:
        failed = None
    except DivergenceError as error:
        failed = _diverged(error, spec, watch)
    except Exception as error:
        failed = _out_of_memory(error, spec, watch)
        if failed is None:
            raise
    # Outside the except block: what the frames of the failed step held is free again.
    stop.hold()
    if failed is not None:
        gc.collect()
        torch.cuda.empty_cache()
    if not watch.is_updating and not (failed and failed.stopped is Stopped.DIVERGED):
        try:
            watch.save()
        except Exception as error:
            if failed is None:
                raise
            events.write(Warned(text=f"the last step could not be saved: {type(error).__name__}: {error}"))
    if failed is not None:
        events.write(failed)
        return failed.exit_status
    events.write(Ended(stopped=Stopped.PREEMPTED, step=watch.step, peak_memory_bytes=_peak_memory_bytes()))
    return PreemptedError.exit_status


def _train(spec: TrainSpec, events: EventWriter, watch: Watch, stop: StopSignal, faults: Faults) -> Ended:
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
    events.write(Ordered(num_tokens=_count_tokens(trainer, spec), sample_seconds=time_samples(trainer.model, tokenizer, spec)))
    if spec.resume_from is not None and (watch.step >= spec.num_steps or watch.lacks_evaluation() or watch.has_stopped_early):
        load_adapter(trainer, spec.resume_from)
        _evaluate(trainer, watch, events, has_eval=has_eval)
        _seal_with_loss(spec.resume_from, watch, events)
    if watch.step < spec.num_steps and not watch.has_stopped_early:
        trainer.train(resume_from_checkpoint=str(spec.resume_from) if spec.resume_from else None)
        stop.exit_at_once(lambda text: events.write(_preempted(text)))
        _evaluate(trainer, watch, events, has_eval=has_eval)
    best = _load_best(trainer, watch, spec, events) if watch.has_stopped_early else None
    watch.phase = Phase.SAVE
    trainer.model.save_pretrained(str(spec.adapter_dir))
    tokenizer.save_pretrained(str(spec.adapter_dir))
    (spec.adapter_dir / "README.md").unlink(missing_ok=True)
    watch.phase = Phase.SAMPLE
    events.write(Progress(text="writing samples"))
    try:
        faults.strike("sample", watch.step)
        sample(trainer.model, tokenizer, spec, events)
    except Exception as error:  # the adapter is saved: a sample that fails, for memory too, must not cost it
        if isinstance(error, JobError):
            raise
        events.write(Warned(text=f"no samples: {type(error).__name__}: {error}"))
    return Ended(stopped=Stopped.FINISHED, step=watch.step, peak_memory_bytes=_peak_memory_bytes(), best_step=best)


def _count_tokens(trainer: Loop, spec: TrainSpec) -> int | None:
    """Of all steps of the run; None when TRAIN_ARGS draws the examples in an order of its own."""
    if trainer.args.train_sampling_strategy not in ("random", "sequential"):
        return None
    lengths = pyarrow.compute.list_value_length(trainer.train_dataset.data.column("input_ids")).to_numpy()
    return tokens_of_steps(
        lengths,
        num_steps=spec.num_steps,
        examples_per_step=spec.micro_batch * spec.gradient_accumulation_steps,
        seed=trainer.args.data_seed,
        is_shuffled=trainer.args.train_sampling_strategy == "random",
    )


def _load_best(trainer: Loop, watch: Watch, spec: TrainSpec, events: EventWriter) -> int | None:
    """Put the weights with the lowest held-out loss into the model; returns their step, None when they are gone."""
    best = watch.best_step
    assert best is not None
    try:
        check(spec.checkpoints_dir / step_name(best))
    except DamagedError as error:
        events.write(Warned(text=f"the adapter is that of the last step: the best, of step {best}, is gone ({error})"))
        return None
    load_adapter(trainer, spec.checkpoints_dir / step_name(best))
    return best


def _seal_with_loss(checkpoint: Path, watch: Watch, events: EventWriter) -> None:
    """Write a held-out loss that was measured only now into the manifest: what is kept goes by the manifests."""
    loss = watch.evaluations.get(watch.step)
    if loss is not None and check(checkpoint).eval_loss is None:
        seal(checkpoint, watch.step, eval_loss=loss)
        (checkpoint / STORED).unlink(missing_ok=True)
        events.write(Saved(step=watch.step, path=str(checkpoint), seconds=0.0))


def _evaluate(trainer: Loop, watch: Watch, events: EventWriter, *, has_eval: bool) -> None:
    """Measure the held-out loss of the last completed step, unless that was done."""
    if has_eval and watch.step not in watch.evaluations:
        trainer.state.global_step = watch.step
        events.write(Progress(text="evaluating"))
        trainer.evaluate()


def _preempted(text: str) -> Failed:
    return Failed(exit_status=PreemptedError.exit_status, message=text, stopped=Stopped.PREEMPTED)


def _diverged(error: DivergenceError, spec: TrainSpec, watch: Watch) -> Failed:
    rows = datasets.load_from_disk(str(spec.data_dir / "train"))
    newest_first = (step for step in range(error.step, error.first_step - 1, -1))
    indices = [index for step in newest_first for index in watch.trainer.examples_of(step, step)][:MAX_EXAMPLES]
    examples = [(str(row["source"]), int(row["row"])) for row in rows.select_columns(["source", "row"]).select(indices)]
    message = (
        f"LEARNING_RATE={spec.train.learning_rate * spec.learning_rate_scale}: {error.what} at step {error.step}; lower it, or "
        "look at the examples of that step; the last checkpoint before it is kept"
    )
    return Failed(
        exit_status=DivergedError.exit_status,
        message=message,
        stopped=Stopped.DIVERGED,
        step=error.step,
        first_step=error.first_step,
        examples=tuple(examples),
    )


def _out_of_memory(error: Exception, spec: TrainSpec, watch: Watch) -> Failed | None:
    """The last word of a trainer whose memory did not suffice; None when that is not what happened."""
    text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in text:
        message = f"host memory does not suffice ({text}); choose a machine with more"
        return Failed(exit_status=MachineError.exit_status, message=message, phase=watch.phase, step=watch.step)
    # cuBLAS, cuDNN and bitsandbytes allocate by themselves, and complain in their own words.
    is_gpu = isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and ("out of memory" in text or "ALLOC_FAILED" in text)
    )
    if not is_gpu:
        return None
    message = (
        f"PER_DEVICE_TRAIN_BATCH_SIZE={spec.micro_batch}: out of GPU memory ({text}); "
        "lower it or set ACTIVATION_CHECKPOINTING=1 to continue this run; a lower MAX_LENGTH starts a new one"
    )
    return Failed(
        exit_status=PlanError.exit_status,
        message=message,
        stopped=Stopped.OUT_OF_MEMORY,
        phase=watch.phase,
        step=watch.step,
    )


def _load(folder: Path) -> datasets.Dataset:
    rows = datasets.load_from_disk(str(folder))
    return rows.select_columns([name for name in rows.column_names if name in ("input_ids", "labels", "seq_lengths")])


def _peak_memory_bytes() -> int:
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_reserved())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
