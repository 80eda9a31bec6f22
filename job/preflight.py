"""Everything that could fail later and can be asked now, before a download or a GPU second is spent."""

import os
from collections.abc import Callable
from pathlib import Path

from job.data.language import Languages
from job.deliver.publish import ensure_repo
from job.errors import JobError, MachineError, NetworkError, Problem, SettingsError
from job.keep.store import MissingError, Store, read_text, write_text
from job.settings import Settings

WRITE = "write (s3:PutObject)"


def check_everything(settings: Settings, store: Store, scratch: Path) -> list[tuple[str, JobError | None]]:
    """Run every check; each comes with its error, or None when it passed."""
    checks: dict[str, Callable[[], None]] = {
        "local disk": lambda: _check_work_dir(scratch),
        "store": lambda: check_store(store, scratch),
    }
    if settings.data.language:
        checks["languages"] = lambda: _check_languages(settings)
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
    """Write, read, list and delete a small file, and judge each.

    Raises:
        SettingsError: names every right that the credentials lack, or says once what is wrong with all of them.
        NetworkError: the store does not answer.
        MachineError: its disk is full or read-only, this machine's clock is wrong, or it forgets what was written.
    """
    name, text = ".preflight", f"may be deleted ({os.getpid()})"
    checks: dict[str, Callable[[], object]] = {
        WRITE: lambda: write_text(store, name, text, scratch),
        "read (s3:GetObject)": lambda: _expect(store, _text_of(store, name, scratch) == text),
        "list (s3:ListBucket)": lambda: _expect(store, name in store.list(name)),
        "delete (s3:DeleteObject)": lambda: store.delete(name),
    }
    refused: dict[str, SettingsError] = {}
    for right, check in checks.items():
        try:
            check()
        except SettingsError as error:
            refused[right] = error
        except MachineError:
            if WRITE not in refused:  # else nothing is there to be read or listed
                raise
    if len(refused) == len(checks):  # the key, the bucket or the region, and no single right
        raise next(iter(refused.values()))
    if refused:
        way_out = "give the credentials this right, or others to the job; a run needs all four"
        problems = [
            Problem(setting="OUTPUT_URI", value=store.uri, rule=f"the credentials may not {right}", way_out=way_out)
            for right in refused
        ]
        raise SettingsError(problems) from next(iter(refused.values()))


def _expect(store: Store, is_kept: bool) -> None:
    if not is_kept:
        raise MachineError(f"OUTPUT_URI={store.uri}: what was written is not what is read back; use another store")


def _text_of(store: Store, name: str, scratch: Path) -> str | None:
    try:
        return read_text(store, name, scratch)
    except (MissingError, UnicodeDecodeError):
        return None


def raise_first(results: list[tuple[str, JobError | None]]) -> None:
    """Raise all settings' problems together, else the first other error; a network error comes last."""
    errors = [error for _, error in results if error is not None]
    problems: list[Problem | str] = [p for error in errors if isinstance(error, SettingsError) for p in error.problems]
    if problems:
        raise SettingsError(problems)
    for error in sorted(errors, key=lambda error: isinstance(error, NetworkError)):
        raise error


def _check_languages(settings: Settings) -> None:
    Languages(settings.data)  # refuses what its detector does not know


def _check_work_dir(scratch: Path) -> None:
    try:
        scratch.mkdir(parents=True, exist_ok=True)
        probe = scratch / f".probe-{os.getpid()}"
        probe.write_text("may be deleted", "utf-8")
        probe.unlink()
    except OSError as error:
        raise MachineError(f"WORK_DIR={scratch}: cannot be written ({error.strerror}); name a folder on a local disk") from error
