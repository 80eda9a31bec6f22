"""Everything that could fail later and can be asked now, before a download or a GPU second is spent.

All questions are asked at the same time: those for this machine and the store in threads here, those for the Hub and the data
sets in a child process (questions.py says why). More checks plug in as `more`.
"""

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from job.keep.store import FolderStore, Store, hurried
from job.plan.hardware import find_devices
from job.plan.nodes import find_nodes
from job.preflight.clock import Clock, check_clock
from job.preflight.gpus import check_gpus
from job.preflight.keeping import check_store, check_volume, is_container
from job.preflight.outcome import WARNING, Check, Result, judge, raise_first, start, summary
from job.preflight.questions import BASE_MODEL, SHORT_TIMEOUTS, Answers, make_spec
from job.preflight.room import check_room, check_work_dir, checkpoint_needs
from job.preflight.sandbox import check_sandbox
from job.preflight.table import results_table
from job.preflight.trackers import check_trackers
from job.settings import Settings
from job.stopping import StopRequest
from job.supervise import ChildFailedError, child_environ, run_child

__all__ = ["Result", "check_everything", "check_store", "raise_first", "results_table", "summary"]

_MOUNTS = Path("/proc/self/mountinfo")
_CHILD_SECRETS = ("hf_token", "aws_access_key_id", "aws_secret_access_key", "aws_session_token")


def check_everything(
    settings: Settings,
    store: Store,
    work: Path,
    *,
    environ: Mapping[str, str],
    stop: StopRequest,
    has_data: bool = False,
    is_trained: bool = False,
    checkpoint_bytes: int | None = None,
    more: Mapping[str, Callable[[], str]] | None = None,
    on_idle: Callable[[], None] = lambda: None,
) -> list[Result]:
    """Do every check that the rest of the run depends on.

    Args:
        settings: all that was asked for.
        store: the run's folder in the store.
        work: the run's folder on this machine.
        environ: the process's environment.
        stop: asked while the child process works.
        has_data: the prepared data is there already, so the data sets are not asked for.
        is_trained: the adapter is there already, so only the store and the Hub are.
        checkpoint_bytes: adapter and optimizer, when that is known.
        more: further checks by name; each says in a few words what it found (`warning: ...` when somebody should know), or
            raises a JobError. They begin with the others; nobody waits for them when settings, data, model or WORK_DIR are wrong.
        on_idle: called about once a second.

    Returns:
        A result for each check, in the order of the table.

    Raises:
        JobError: the child process itself failed; everything else is in the results.
    """
    clock, folder = Clock(), _resolved_folder(store)
    work_dir = judge("local disk", lambda: check_work_dir(work))
    try:  # not in WORK_DIR where that cannot be written: the other mistakes are to be told all the same
        scratch_dir = tempfile.TemporaryDirectory(dir=None if work_dir.error else work, prefix=".check-")
    except FileNotFoundError:  # nothing here can be written
        return [work_dir]
    with scratch_dir as scratch:
        first = [work_dir]
        if folder is not None:
            mounts = _MOUNTS.read_text("utf-8") if _MOUNTS.exists() else ""
            inside = is_container(environ)
            first.append(judge("volume", lambda: check_volume(folder, environ, mounts, in_container=inside)))
        checks: dict[str, Check] = {}
        if first[-1].name != "volume" or first[-1].error is None:  # else nothing is to be written there
            checks["store"] = lambda: check_store(hurried(store, clock.read), Path(scratch))
        if not is_trained:
            checks["GPU"] = lambda: _check_gpus(settings, environ)
            checks |= _checks_of_the_end(settings, environ)
        collect, further = start(checks), {} if is_trained else dict(more or {})
        collect_further = start(further)
        answers = Answers(clock)
        _ask_in_child(settings, Path(scratch), answers, folder, has_data, is_trained, environ, stop, on_idle)
        own = collect(None)
        # What costs a trial of the model is not waited for where it could not change whose fault comes first.
        if work_dir.error or any(_is_decisive(result) for result in (*own, *answers.results)):
            own += [Result(name=name, found=f"{WARNING}not waited for: mend the rest first") for name in further]
        else:
            own += collect_further(None)
    needs = [need for result in (*own, *answers.results) for need in result.needs]
    if not is_trained:
        needs += checkpoint_needs(settings, work, folder, checkpoint_bytes)
    last = [judge("room", lambda: check_room(needs, work))]
    if clock.ahead_seconds is not None:
        ahead = clock.ahead_seconds
        last.append(judge("clock", lambda: check_clock(ahead)))
    return [*first, *own, *answers.results, *last]


def _check_gpus(settings: Settings, environ: Mapping[str, str]) -> str:
    """Those of this machine; how many of them are used may be for an engine of several machines to say."""
    devices, asked = find_devices(environ), settings.train.nproc_per_node
    nodes = find_nodes(environ, num_gpus=len(devices), per_node=None if asked == "auto" else asked)
    found = check_gpus(settings.model, devices, num_used=nodes.processes_per_node, parallel=settings.train.parallel)
    if nodes.num_nodes == 1:
        return found
    return f"{found}; machine {nodes.node_rank} of 0 to {nodes.num_nodes - 1}, as {nodes.engine} says"


def _checks_of_the_end(settings: Settings, environ: Mapping[str, str]) -> dict[str, Check]:
    """What is asked only when the settings want it."""
    checks: dict[str, Check] = {}
    if settings.train.report_to:
        has_key = settings.secrets.wandb_api_key is not None
        checks["trackers"] = lambda: check_trackers(settings.train, environ, has_wandb_key=has_key)
    if any(prompt.scorer in ("python", "regex") for prompt in settings.evaluate.eval_prompts):
        checks["sandbox"] = check_sandbox
    return checks


def _is_decisive(result: Result) -> bool:
    """Whether the settings or the data are wrong, or there is no model to try."""
    return result.error is not None and (result.error.exit_status in (2, 3) or result.name == BASE_MODEL)


def _ask_in_child(
    settings: Settings,
    scratch: Path,
    answers: Answers,
    folder: Path | None,
    has_data: bool,
    is_trained: bool,
    environ: Mapping[str, str],
    stop: StopRequest,
    on_idle: Callable[[], None],
) -> None:
    spec = make_spec(settings, store_folder=folder, has_data=has_data, is_trained=is_trained)
    if spec.is_empty:
        return
    values = {name: getattr(settings.secrets, name) for name in _CHILD_SECRETS}
    secrets = {name.upper(): value.get_secret_value() for name, value in values.items() if value is not None}
    try:
        run_child(
            "check",
            spec,
            folder=scratch,
            environ={**SHORT_TIMEOUTS, **child_environ(environ, secrets, tuple(secrets))},
            stop=stop,
            grace_seconds=settings.keep.grace_seconds,
            on_event=answers.take,
            on_idle=on_idle,
        )
    except ChildFailedError as failure:
        raise failure.error from None


def _resolved_folder(store: Store) -> Path | None:
    return store.root.resolve() if isinstance(store, FolderStore) else None
