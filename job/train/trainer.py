"""The training run itself: from the latest whole checkpoint to the last step, then the adapter and samples.

However it ends, the last completed step is saved first when its state is sound, and the last event says why it ended.
"""

import gc
from pathlib import Path
from typing import Any

import torch

from job.errors import PreemptedError
from job.events import Ended, EventWriter, Ordered, Progress, Saved, Stopped, Warned
from job.keep.checkpoints import STORED, check, local_steps, seal, step_name
from job.train.answer import time_answers
from job.train.build import build, evaluate_step, lengths, room_tokens
from job.train.choose import Choice, choose, deliver_saved
from job.train.curves import Curves
from job.train.faults import Faults
from job.train.guards import DivergenceError
from job.train.last_words import diverged, out_of_memory, peak_memory_bytes, peer_lost, preempted
from job.train.loop import Loop
from job.train.order import tokens_of_steps
from job.train.preempt import StoppedError, StopSignal, end_process
from job.train.ranks import Ranks
from job.train.spec import TrainSpec
from job.train.state import load_adapter
from job.train.watch import Watch


def train(spec: TrainSpec, events: EventWriter, stop: StopSignal, fault: str = "", ranks: Ranks | None = None) -> int:
    """Train to the end or until stopped; ends with an `Ended` or a `Failed` event, and returns the exit status.

    Args:
        fault: what to break on purpose; see faults.py.
        ranks: which of several trainer processes this is.

    Raises:
        JobError: what is no matter of memory, signals or losses.
    """
    stop.exit_at_once(lambda text: events.write(preempted(text)))
    faults = Faults(fault, spec.checkpoints_dir.parent)
    ranks = ranks or Ranks()
    if ranks.local_rank:
        spec = spec.model_copy(update={"scratch_dir": spec.scratch_dir.with_name(f"{spec.scratch_dir.name}-{ranks.local_rank}")})
    watch = Watch(spec, events, stop, faults, ranks)
    ranks.meet(watch.beat, order_id=spec.order_id)
    curves = Curves(spec if ranks.is_first else _untracked(spec), lambda text: events.write(Warned(text=text)))
    try:
        ended = _train(spec, events, watch, curves, stop, faults)
        is_free = curves.close(is_finished=True)
        events.write(ended)
        return 0 if is_free else end_process(0)
    except StoppedError:
        failed = None
    except DivergenceError as error:
        failed = diverged(error, spec, watch)
    except Exception as error:
        failed = out_of_memory(error, spec, watch) or peer_lost(error, watch)
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
    is_free = curves.close(is_finished=False, last=watch.last)
    events.write(failed or Ended(stopped=Stopped.PREEMPTED, step=watch.step, peak_memory_bytes=peak_memory_bytes()))
    status = failed.exit_status if failed else PreemptedError.exit_status
    return status if is_free else end_process(status)


def _train(spec: TrainSpec, events: EventWriter, watch: Watch, curves: Curves, stop: StopSignal, faults: Faults) -> Ended:
    tokenizer, trainer, has_eval = build(spec, events, watch, faults)
    trainer.add_callback(curves)
    sample_seconds = 0.0
    if _answers(spec, watch):
        sample_seconds = time_answers(
            trainer.model, tokenizer, spec, room_tokens=room_tokens(trainer, spec), num_models=_num_models(spec)
        )
    events.write(Ordered(num_tokens=_count_tokens(trainer, spec), sample_seconds=sample_seconds))
    if spec.resume_from is not None and (watch.step >= spec.num_steps or watch.lacks_evaluation() or watch.has_stopped_early):
        load_adapter(trainer, spec.resume_from)
        evaluate_step(trainer, watch, events, has_eval=has_eval)
        _seal_with_loss(spec.resume_from, watch, events)
    if watch.step < spec.num_steps and not watch.has_stopped_early:
        events.write(Progress(text="training"))
        trainer.train(resume_from_checkpoint=str(spec.resume_from) if spec.resume_from else None)
        stop.exit_at_once(lambda text: events.write(preempted(text)))
        evaluate_step(trainer, watch, events, has_eval=has_eval)
    if not watch.ranks.is_first:
        return Ended(stopped=Stopped.FINISHED, step=watch.step, peak_memory_bytes=peak_memory_bytes())
    if spec.parallel == "fsdp":
        return _deliver_shared(spec, watch, tokenizer, events)
    choice = Choice(
        trainer, tokenizer, spec, events, last_step=watch.step, losses=watch.evaluations, room_tokens=room_tokens(trainer, spec)
    )
    choose(choice, watch, events, lambda: faults.strike("sample", watch.step))
    return Ended(
        stopped=Stopped.FINISHED,
        step=watch.step,
        peak_memory_bytes=peak_memory_bytes(),
        chosen_step=choice.step,
        chosen_by=choice.by,
    )


def _deliver_shared(spec: TrainSpec, watch: Watch, tokenizer: Any, events: EventWriter) -> Ended:
    """Deliver without the model, which no rank has whole: the best checkpoint's adapter, and no answers."""
    best = watch.best_step if spec.evaluate.select_by != "last" else None
    saved = local_steps(spec.checkpoints_dir)
    step, by = (best, "eval_loss") if best in saved else (watch.step, "last")
    assert step is not None
    deliver_saved(spec.checkpoints_dir / step_name(step), spec.adapter_dir, tokenizer)
    events.write(Warned(text="no answers: the weights are shared among the ranks; `evaluate` answers on one GPU that holds them"))
    return Ended(stopped=Stopped.FINISHED, step=watch.step, peak_memory_bytes=peak_memory_bytes(), chosen_step=step, chosen_by=by)


def _answers(spec: TrainSpec, watch: Watch) -> bool:
    """Whether this rank answers prompts at the end: alone, so weights that are shared among several give no answers."""
    return watch.ranks.is_first and spec.parallel != "fsdp"


def _untracked(spec: TrainSpec) -> TrainSpec:
    return spec.model_copy(update={"train": spec.train.model_copy(update={"report_to": ()})})


def _num_models(spec: TrainSpec) -> int:
    """The base model and as many checkpoints as there will be: the kept ones and the best."""
    num_saves = spec.num_steps // spec.save_steps if spec.save_steps else spec.save_total_limit
    return 1 + max(1, min(num_saves, spec.save_total_limit + 1))


def _count_tokens(trainer: Loop, spec: TrainSpec) -> int | None:
    """Of all steps of the run; None when TRAIN_ARGS draws the examples in an order of its own."""
    if trainer.args.train_sampling_strategy not in ("random", "sequential"):
        return None
    return tokens_of_steps(
        lengths(trainer),
        num_steps=spec.num_steps,
        examples_per_step=spec.micro_batch * spec.gradient_accumulation_steps * spec.num_devices,
        seed=trainer.args.data_seed,
        is_shuffled=trainer.args.train_sampling_strategy == "random",
    )


def _seal_with_loss(checkpoint: Path, watch: Watch, events: EventWriter) -> None:
    """Write a held-out loss that was measured only now into the manifest: what is kept goes by the manifests."""
    loss = watch.evaluations.get(watch.step)
    if loss is not None and check(checkpoint).eval_loss is None:
        seal(checkpoint, watch.step, eval_loss=loss)
        (checkpoint / STORED).unlink(missing_ok=True)
        events.write(Saved(step=watch.step, path=str(checkpoint), seconds=0.0))
