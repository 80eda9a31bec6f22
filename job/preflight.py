"""Everything that could fail later and can be asked now, before a download or a GPU second is spent."""

import os
from collections.abc import Callable
from pathlib import Path

from job.deliver.publish import ensure_repo
from job.errors import JobError, MachineError, NetworkError, Problem, SettingsError
from job.keep.store import Store, read_text, write_text
from job.settings import Settings


def check_everything(settings: Settings, store: Store, scratch: Path) -> list[tuple[str, JobError | None]]:
    """Run every check; each comes with its error, or None when it passed."""
    checks: dict[str, Callable[[], None]] = {
        "local disk": lambda: _check_work_dir(scratch),
        "store": lambda: check_store(store, scratch),
    }
    if settings.publish.hub_model_id:
        token = settings.secrets.hf_token
        checks["Hub repository"] = lambda: ensure_repo(settings.publish, token.get_secret_value() if token else None)
    results: list[tuple[str, JobError | None]] = []
    for name, check in checks.items():
        try:
            check()
            results.append((name, None))
        except JobError as error:
            results.append((name, error))
            if name == "local disk":  # the other checks need it
                break
    return results


def check_store(store: Store, scratch: Path) -> None:
    """Write, read and delete a small file.

    Raises:
        SettingsError: the credentials lack one of the three rights.
        NetworkError: the store does not answer.
        MachineError: its disk is full or read-only, or it forgets what was written.
    """
    name, text = f".preflight-{os.getpid()}", "may be deleted"
    write_text(store, name, text, scratch)
    try:
        if read_text(store, name, scratch) != text:
            raise MachineError(f"OUTPUT_URI={store.uri}: what was written is not what is read back; use another store")
    finally:
        store.delete(name)


def raise_first(results: list[tuple[str, JobError | None]]) -> None:
    """Raise all settings' problems together, else the first other error; a network error comes last."""
    errors = [error for _, error in results if error is not None]
    problems: list[Problem | str] = [p for error in errors if isinstance(error, SettingsError) for p in error.problems]
    if problems:
        raise SettingsError(problems)
    for error in sorted(errors, key=lambda error: isinstance(error, NetworkError)):
        raise error


def _check_work_dir(scratch: Path) -> None:
    try:
        scratch.mkdir(parents=True, exist_ok=True)
        probe = scratch / f".probe-{os.getpid()}"
        probe.write_text("may be deleted", "utf-8")
        probe.unlink()
    except OSError as error:
        raise MachineError(f"WORK_DIR={scratch}: cannot be written ({error.strerror}); name a folder on a local disk") from error
