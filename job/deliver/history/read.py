"""A prefix of the store in, all its runs and what they say together out: as tables, as JSON or as a page.

Nothing is written to the store. What is not handled: starts that the checks refused, for they leave no record.
"""

import re
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path, PurePath
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict

from job.deliver.history.figures import Figures, count_figures
from job.deliver.history.groups import Pace
from job.deliver.history.records import AttemptFile, ReportFile, SettingsFile, SpeedFile, parse_record, parse_settings, plain
from job.deliver.history.runs import Run, make_run
from job.errors import Problem, SettingsError
from job.keep.store import FolderStore, MissingError, Store, read_bytes

NUM_THREADS = 8
"""Requests at a time to a server far away; boto3 keeps ten connections."""
QUIET_SECONDS = 10.0
_RECORD = re.compile(
    r"(?P<name>(?:(?P<folder>.+?)/)?(?:attempts/(?P<number>\d{1,9})\.json|(?P<kind>report|settings)\.json))(?:/.*)?", re.DOTALL
)
"""A record, or a file in a folder that has its name."""
_DONE = re.compile(r"(?:(?P<folder>.+)/)?DONE", re.DOTALL)
_SPEED = re.compile(r"(?P<within>(?:.+/)?)\.measured/[^/]+/(?P<run_id>[^/]+)\.json")
_NO_RUN = re.compile(r"(?:^|/)(?:\.[^/]*|checkpoints|data|adapter|budget-adapter|attempts)(?:/|$)")
"""Folders that belong to a run, or to no run: what lies in them is no run's record."""

T = TypeVar("T")
R = TypeVar("R", bound=BaseModel)


class Unread(BaseModel):
    """A record that could not be read, or not all of it."""

    model_config = ConfigDict(frozen=True)

    name: str
    why: str


class History(BaseModel):
    """What `python -m job history --json` prints."""

    model_config = ConfigDict(frozen=True, json_schema_extra={"title": "History of qlora-job runs"})

    schema_version: int = 1
    """Grows when a field changes its meaning or goes; new fields do not change it."""
    uri: str
    read_at: datetime
    runs: list[Run]
    """The newest first."""
    unread: list[Unread]
    """Records that could not be read, or not all of them; what could be read counts."""
    figures: Figures


@dataclass(kw_only=True)
class _Found:
    """Names of one run's records."""

    attempts: dict[int, str] = field(default_factory=dict)
    report: str | None = None
    settings: str | None = None
    is_done: bool = False


class _Reader:
    """Reads single records, from several threads at once, and remembers which could not be read."""

    def __init__(self, store: Store, scratch: Path) -> None:
        self._store, self._scratch = store, scratch
        self._complaints: dict[str, list[str]] = {}

    def read(self, kind: type[R], name: str | None) -> R | None:
        """None for no name, and for what cannot be read."""
        if name is None:
            return None
        try:
            content = self._content(name)
        except (MissingError, FileNotFoundError, IsADirectoryError, NotADirectoryError):
            self.complain(name, "is a folder, or was deleted since it was listed")
            return None
        except OSError as error:
            self.complain(name, f"cannot be read ({error.strerror or error})")
            return None
        record, complaint = parse_record(kind, content)
        if complaint:
            self.complain(name, complaint)
        return record

    def _content(self, name: str) -> bytes:
        if isinstance(self._store, FolderStore):  # `get` makes a copy and waits until it is on the disk, 10 ms for each record
            return (self._store.root / name).read_bytes()
        return read_bytes(self._store, name, self._scratch)

    def complain(self, name: str, why: str) -> None:
        self._complaints.setdefault(plain(name), []).append(plain(why))

    def unread(self) -> list[Unread]:
        return [Unread(name=name, why="; ".join(why)) for name, why in sorted(self._complaints.items())]


def run_history(store: Store, *, scratch: Path, html: Path | None, as_json: bool, redact: Callable[[str], str]) -> int:
    """Read all runs and show them on standard output, and as a page when `html` names a file; returns the exit status.

    Raises:
        SettingsError: there is no such folder, or the page cannot be written there.
        JobError: the store cannot be read.
    """
    history = redacted(read_history(store, scratch, tell=lambda text: print(redact(text), file=sys.stderr)), redact)
    if html is not None:
        from job.deliver.history.page import write_page

        write_page(history, html)
        print(redact(f"the history is in {html}"), file=sys.stderr)
    if as_json:
        print(history.model_dump_json(indent=1))
    else:
        from rich.console import Console

        from job.deliver.history.show import show_history
        from job.display import LOG_WIDTH

        console = Console(highlight=False)
        show_history(history, console if console.is_terminal else Console(highlight=False, width=LOG_WIDTH))
    return 0


def read_history(store: Store, scratch: Path, *, tell: Callable[[str], None] = lambda _: None) -> History:
    """Read every run below the prefix, at any depth; a damaged record stops nothing, and is named.

    Args:
        tell: called with a line now and then while it takes long.

    Raises:
        SettingsError: there is no such folder.
        JobError: the store cannot be read.
    """
    if isinstance(store, FolderStore) and not store.root.is_dir():
        rule, way_out = "there is no such folder", "mount the volume, or correct the name"
        raise SettingsError([Problem(setting="OUTPUT_URI", value=store.uri, rule=rule, way_out=way_out)])
    now, reader = datetime.now(UTC), _Reader(store, scratch)
    found, speeds = _sort(_watched(store.list(), "names listed", tell))

    def read_run(folder: str) -> Run | None:
        return _read_run(reader, folder or PurePath(store.uri).name, found[folder], now=now)

    with _Pool() as pool:
        runs = list(_watched(pool.map(read_run, found), f"of {len(found):,} runs read", tell))
        paces = list(_watched(pool.map(partial(_read_pace, reader), speeds), f"of {len(speeds):,} measured speeds read", tell))
    long_ago = datetime.min.replace(tzinfo=UTC)
    known = sorted((run for run in runs if run), key=lambda run: (run.started or long_ago, run.folder), reverse=True)
    return History(
        uri=plain(store.uri),
        read_at=now,
        runs=known,
        unread=reader.unread(),
        figures=count_figures(known, [pace for pace in paces if pace]),
    )


def redacted(history: History, redact: Callable[[str], str]) -> History:
    """The same with every text redacted: before texts are cut short, wrapped or escaped."""

    def inside(value: Any) -> Any:
        if type(value) is str:  # no enum
            return redact(value)
        if isinstance(value, BaseModel):
            return value.model_copy(update={name: inside(one) for name, one in value})
        if isinstance(value, list):
            return [inside(one) for one in value]
        return {inside(name): inside(one) for name, one in value.items()} if isinstance(value, dict) else value

    told: History = inside(history)
    return told


class _Pool(ThreadPoolExecutor):
    """Does not wait for what was not begun when it is left by an error or a signal."""

    def __init__(self) -> None:
        super().__init__(NUM_THREADS, thread_name_prefix="history")

    def __exit__(self, *_: object) -> None:
        self.shutdown(wait=False, cancel_futures=True)


def _watched(items: Iterable[T], what: str, tell: Callable[[str], None]) -> Iterator[T]:
    told_at = time.monotonic()
    for number, item in enumerate(items, start=1):
        if time.monotonic() - told_at >= QUIET_SECONDS:
            told_at = time.monotonic()
            tell(f"{number:,} {what}")
        yield item


def _sort(names: Iterable[str]) -> tuple[dict[str, _Found], list[str]]:
    """The records of each run by its folder, and the names of measured speeds, of all that lies in the store."""
    found: dict[str, _Found] = defaultdict(_Found)
    speeds = []
    for name in names:
        if _SPEED.fullmatch(name):
            speeds.append(name)
        elif match := _RECORD.fullmatch(name):
            run = found[match["folder"] or ""]
            if match["number"]:
                run.attempts.setdefault(int(match["number"]), match["name"])
            else:
                setattr(run, match["kind"], match["name"])
        elif match := _DONE.fullmatch(name):
            found[match["folder"] or ""].is_done = True
    with_attempts = {folder for folder, run in found.items() if run.attempts}
    return {folder: run for folder, run in found.items() if _is_run(folder, run, with_attempts)}, speeds


def _is_run(folder: str, run: _Found, with_attempts: set[str]) -> bool:
    """Whether a folder may hold a run: not inside another run, and the prefix itself only when attempts lie in it."""
    if not folder:
        return bool(run.attempts)
    if _NO_RUN.search(folder) or not (run.attempts or run.report or run.settings):
        return False
    return not any(("" if parent == PurePath() else str(parent)) in with_attempts for parent in PurePath(folder).parents)


def _read_run(reader: _Reader, folder: str, found: _Found, *, now: datetime) -> Run | None:
    """Read no more than is needed; None when what lies there is whole, and another program's."""
    report = reader.read(ReportFile, found.report)
    attempts: dict[int, AttemptFile | None] = dict.fromkeys(found.attempts)
    if report is None or not _tells_all(report, len(attempts), is_done=found.is_done):
        for number, name in found.attempts.items():
            attempts[number] = file = reader.read(AttemptFile, name)
            if file is not None and not file.has_time:
                reader.complain(name, "does not say when it was")
    settings = None
    if report is None or not report.settings or not parse_settings(report.settings).is_ours:
        settings = reader.read(SettingsFile, found.settings)
    is_foreign = not (report and report.is_ours) and not (settings and settings.is_ours) and bool(report or settings)
    if is_foreign and not attempts:
        return None
    return make_run(folder, report=report, attempts=attempts, settings=settings, is_done=found.is_done, now=now)


def _tells_all(report: ReportFile, num_attempts: int, *, is_done: bool) -> bool:
    """Whether the report takes the place of the attempts' records: it is of the last one, and that ended as it says."""
    is_last = len(report.attempts or ()) == num_attempts
    return is_last and report.has_all_attempts and (is_done or report.stopped != "finished")


def _read_pace(reader: _Reader, name: str) -> Pace | None:
    speed, match = reader.read(SpeedFile, name), _SPEED.fullmatch(name)
    if speed is None or match is None or not (speed.tokens_per_second and speed.gpu and speed.model):
        return None
    folder = plain(match["within"] + match["run_id"])
    return Pace(folder=folder, gpu=speed.gpu, model=speed.model, tokens_per_second=speed.tokens_per_second)
