"""What runs in a child process: one stage, its errors turned into a last event and an exit status.

`python -m job.child fetch|prepare|train SPEC.json`, with the writing end of a pipe in JOB_EVENTS_FD and a pipe on standard
input that the supervisor never writes to: when it closes, the supervisor is gone, and so are we.
"""

import os
import shutil
import signal
import sys
import threading
import traceback
from pathlib import Path
from types import FrameType

from job.errors import (
    DISK_ERRORS,
    DivergedError,
    JobError,
    MachineError,
    PlanError,
    PreemptedError,
    Problem,
    SettingsError,
)
from job.events import EVENTS_FD, EventWriter, Failed, Progress, Stopped
from job.train.spec import FetchSpec, PrepareSpec, TrainSpec


def main(stage: str, spec_file: Path) -> int:
    """Run one stage; the returned status is one of errors.py."""
    threading.Thread(target=_die_with_the_supervisor, daemon=True).start()
    events = EventWriter(int(os.environ[EVENTS_FD]) if EVENTS_FD in os.environ else None)
    signal.signal(signal.SIGTERM, _stop_now)
    signal.signal(signal.SIGINT, _stop_now)
    try:
        _run(stage, spec_file.read_text("utf-8"), events)
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
    return 0


def _run(stage: str, spec: str, events: EventWriter) -> None:
    # Each stage imports what it needs: torch takes seconds.
    if stage == "fetch":
        from job.train.fetch import fetch

        fetch(FetchSpec.model_validate_json(spec), events)
    elif stage == "prepare":
        _prepare(PrepareSpec.model_validate_json(spec), events)
    else:
        from job.train.trainer import train

        train(TrainSpec.model_validate_json(spec), events)


def _prepare(spec: PrepareSpec, events: EventWriter) -> None:
    from transformers import AutoTokenizer

    from job.data.prepare import prepare, set_default_template
    from job.keep.checkpoints import seal

    try:
        tokenizer = AutoTokenizer.from_pretrained(spec.model_dir, trust_remote_code=spec.trust_remote_code)
    except (OSError, ValueError, ImportError) as error:
        way_out = "choose a model with a tokenizer that transformers knows"
        rule = f"its tokenizer cannot be loaded: {str(error).strip().splitlines()[0]}"
        raise SettingsError([Problem(setting="MODEL_ID", value=str(spec.model_dir), rule=rule, way_out=way_out)]) from error
    set_default_template(tokenizer, spec.chat_template)
    partial = spec.folder.with_name(spec.folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    prepare(
        spec.data,
        tokenizer,
        folder=partial,
        cache_dir=spec.cache_dir,
        seed=spec.seed,
        report_progress=lambda text, done: events.write(Progress(text=text, done=done)),
    )
    seal(partial, step=0)
    partial.replace(spec.folder)


def _fail(events: EventWriter, status: int, message: str, stopped: Stopped) -> int:
    events.write(Failed(exit_status=status, message=message, stopped=stopped))
    return status


def _stop_now(number: int, _frame: FrameType | None) -> None:
    raise PreemptedError(f"stopped by {signal.Signals(number).name}")


def _die_with_the_supervisor() -> None:
    while os.read(sys.stdin.fileno(), 1):  # not through sys.stdin: its lock would stop a normal exit
        pass
    os._exit(1)  # nobody is left to tell, and a GPU that trains for nobody still bills


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
