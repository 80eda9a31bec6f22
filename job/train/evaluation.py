"""Evaluation after training: the kept checkpoints in, their held-out losses, answers and the choice among them out.

Trains nothing. What is not handled: checkpoints that are not on this machine; whoever starts this has brought them.
"""

from job.errors import JobError
from job.events import Ended, EventWriter, Stopped, Warned
from job.keep.checkpoints import DamagedError, check, local_steps, step_name
from job.train.build import build, evaluate_step, room_tokens
from job.train.choose import Choice, choose
from job.train.faults import Faults
from job.train.last_words import peak_memory_bytes, preempted
from job.train.preempt import StopSignal
from job.train.spec import TrainSpec
from job.train.state import load_adapter
from job.train.watch import Watch


def evaluate(spec: TrainSpec, events: EventWriter, stop: StopSignal, fault: str = "") -> int:
    """Measure the base model and every kept checkpoint, then write the chosen adapter; ends with an `Ended` event.

    Args:
        spec: its `resume_from` is the newest checkpoint, and `num_steps` that one's step.
    """
    stop.exit_at_once(lambda text: events.write(preempted(text)))
    faults = Faults(fault, spec.checkpoints_dir.parent)
    watch = Watch(spec, events, stop, faults)
    last = watch.step
    tokenizer, trainer, has_eval = build(spec, events, watch, faults)
    for step in [0, *sorted(local_steps(spec.checkpoints_dir))]:  # the adapter of step 0 adds nothing yet
        if step > last:
            continue
        if step:
            try:
                check(spec.checkpoints_dir / step_name(step))
                load_adapter(trainer, spec.checkpoints_dir / step_name(step))
            except (DamagedError, JobError) as error:
                events.write(Warned(text=f"the checkpoint of step {step} is passed over: it is gone ({error})"))
                continue
        watch.step = step
        evaluate_step(trainer, watch, events, has_eval=has_eval)
    watch.step = last
    load_adapter(trainer, spec.checkpoints_dir / step_name(last))
    choice = Choice(
        trainer, tokenizer, spec, events, last_step=last, losses=watch.evaluations, room_tokens=room_tokens(trainer, spec)
    )
    choose(choice, watch, events, lambda: faults.strike("sample", last))
    events.write(
        Ended(
            stopped=Stopped.FINISHED,
            step=last,
            peak_memory_bytes=peak_memory_bytes(),
            chosen_step=choice.step,
            chosen_by=choice.by,
        )
    )
    return 0
