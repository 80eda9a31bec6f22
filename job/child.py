"""What runs in a child process: one stage, its errors turned into a last event and an exit status.

`python -m job.child STAGE SPEC.json` (check, fetch, measure, prepare, train, evaluate, merge), with the writing end of a pipe in
JOB_EVENTS_FD and a pipe on standard input that the supervisor never writes to: when it closes, the supervisor is gone, and so are
we. SIGUSR1 writes the stacks of all threads to standard error, while training to a file. JOB_FAULT breaks a training on purpose
(train/faults.py).
"""

import faulthandler
import os
import signal
import sys
import threading
import traceback
from pathlib import Path

from job.errors import (
    DISK_ERRORS,
    DivergedError,
    JobError,
    MachineError,
    PlanError,
    PreemptedError,
)
from job.events import EVENTS_FD, EventWriter, Failed, Stopped
from job.train.preempt import StopSignal
from job.train.spec import FetchSpec, MeasureSpec, MergeSpec, PrepareSpec, TrainSpec


def main(stage: str, spec_file: Path) -> int:
    """Run one stage; the returned status is one of errors.py."""
    threading.Thread(target=_die_with_the_supervisor, daemon=True).start()
    fd = int(os.environ[EVENTS_FD]) if EVENTS_FD in os.environ else None
    events = EventWriter(fd, only_last=os.environ.get("LOCAL_RANK", "0") != "0")
    faulthandler.register(signal.SIGUSR1, file=sys.stderr, all_threads=True)
    stop = StopSignal()
    events.shield = stop.shielded
    try:
        return _run(stage, spec_file.read_text("utf-8"), events, stop)
    except JobError as error:
        stopped = {PreemptedError: Stopped.PREEMPTED, DivergedError: Stopped.DIVERGED, PlanError: Stopped.OUT_OF_MEMORY}
        return _fail(events, error.exit_status, str(error), stopped.get(type(error), Stopped.CRASHED))
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            traceback.print_exc()
            return _fail(events, 1, f"{type(error).__name__}: {error}", Stopped.CRASHED)
        return _fail(
            events, MachineError.exit_status, f"the local disk: {error}; free it or name another WORK_DIR", Stopped.CRASHED
        )
    except Exception as error:  # the boundary of the process: a bug is told with its traceback
        traceback.print_exc()
        return _fail(events, 1, f"{type(error).__name__}: {error}", Stopped.CRASHED)


def _run(stage: str, spec: str, events: EventWriter, stop: StopSignal) -> int:
    if stage != "prepare":  # its workers and shards want to be put away
        stop.exit_at_once(lambda text: _last_words(events, text))
    # Each stage imports what it needs: torch takes seconds.
    if stage == "check":
        from job.preflight.questions import CheckSpec, answer

        answer(CheckSpec.model_validate_json(spec), events)
    elif stage == "fetch":
        from job.train.fetch import fetch

        fetch(FetchSpec.model_validate_json(spec), events)
    elif stage == "measure":
        from job.train.measure import measure

        measure(MeasureSpec.model_validate_json(spec))
    elif stage == "prepare":
        from job.prepared import make_prepared

        try:
            make_prepared(PrepareSpec.model_validate_json(spec), events)
        except Exception as error:
            stop.hold()  # the last word is not to be torn
            if stop.received is None:
                raise
            # What stopped it may have come out of a library as an error of its own.
            raise PreemptedError(f"stopped by {stop.received}") from error
    elif stage == "evaluate":
        from job.train.evaluation import evaluate

        return evaluate(TrainSpec.model_validate_json(spec), events, stop, os.environ.get("JOB_FAULT", ""))
    elif stage == "merge":
        from job.train.merge import merge

        merge(MergeSpec.model_validate_json(spec), events)
    else:
        from job.train.ranks import Ranks
        from job.train.trainer import train

        ranks = Ranks.from_environ(os.environ)
        return train(TrainSpec.model_validate_json(spec), events, stop, os.environ.get("JOB_FAULT", ""), ranks)
    return 0


def _fail(events: EventWriter, status: int, message: str, stopped: Stopped) -> int:
    events.write(Failed(exit_status=status, message=message, stopped=stopped))
    return status


def _last_words(events: EventWriter, text: str) -> None:
    _fail(events, PreemptedError.exit_status, text, Stopped.PREEMPTED)


def _die_with_the_supervisor() -> None:
    while os.read(sys.stdin.fileno(), 1):  # not through sys.stdin: its lock would stop a normal exit
        pass
    os._exit(1)  # nobody is left to tell, and a GPU that trains for nobody still bills


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
