"""Prepared data as a folder that is whole or absent, shared by all runs on this machine that ask for the same data.

What it is named after (`data_fingerprint`) covers the settings and the content of local files. What lies elsewhere can move on
without a change of name, so its revision is asked again before another run may use what one has prepared; and what else it was
made with (the tokenizer's files, the language detector, this program) is written down beside it (`origin.json`) and compared.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from job.data.tally import DROPPED, TALLY, Tally, load_tally
from job.errors import DataError, Problem, SettingsError
from job.events import EventWriter, Progress
from job.keep.checkpoints import MANIFEST, DamagedError, check, discard, seal
from job.keep.mirror import is_whole
from job.keep.store import MissingError, Store, read_text
from job.settings import DatasetSpec, Settings, Where, data_fingerprint
from job.train.spec import PrepareSpec

ORIGIN = "origin.json"
_WAIT_SECONDS = 2.0
_TOKENIZER_FILES = ("*token*", "vocab*", "merges.txt", "*.jinja", "*.model")


def make_prepared(spec: PrepareSpec, events: EventWriter) -> None:
    """Prepare the data into `spec.folder`, unless it is there already and still what its sources hold.

    Raises:
        SettingsError: the tokenizer cannot be loaded.
        DataError, NetworkError, MachineError: as `prepare`; DataError too when a file changed meanwhile.
    """
    from job.data.prepare import (
        prepare,  # pyarrow with it: the supervisor, which only asks whether a folder is whole, stays small
    )

    with locked(spec.folder, lambda: events.write(Progress(text="waiting for another run that prepares the same data"))):
        if _is_current(spec):
            events.write(Progress(text="the data was prepared before"))
            return
        partial = spec.folder.with_name(f"{spec.folder.name}.partial")  # keeps the shards of an interrupted start
        before, origin = _states(spec), _origin(spec)
        prepare(
            spec.data,
            _load_tokenizer(spec),
            folder=partial,
            cache_dir=spec.cache_dir,
            seed=spec.seed,
            report_progress=lambda text, done: events.write(Progress(text=text, done=done)),
        )
        after = _states(spec)
        if changed := [str(path) for path in before | after if before.get(path) != after.get(path)]:
            names = ", ".join(changed[:5])
            raise DataError(f"DATASETS: {names} changed while the data was prepared; start again when nothing writes there")
        (partial / ORIGIN).write_text(origin, "utf-8")
        seal(partial, step=0)
        if _is_whole(spec.folder) and (spec.folder / MANIFEST).read_bytes() == (partial / MANIFEST).read_bytes():
            discard(partial)  # another run may be training from what is there
            return
        discard(spec.folder)
        partial.replace(spec.folder)


def prepared_name(settings: Settings) -> str:
    """Of the data in a run's store."""
    return f"data/{data_fingerprint(settings)}"


def prepared_folder(settings: Settings) -> Path:
    """Of the data on this machine, for all runs that ask for the same."""
    return settings.keep.work_dir.expanduser().absolute() / prepared_name(settings)


def has_prepared(settings: Settings, store: Store) -> bool:
    """Whether the data lies in the store, or on this machine for another run that asked for the same."""
    return (prepared_folder(settings) / MANIFEST).is_file() or is_whole(store, prepared_name(settings))


def known_tally(settings: Settings, store: Store, scratch: Path) -> Tally | None:
    """Of data that was prepared already, by this run or by another one on this machine."""
    folder = prepared_folder(settings)
    if (folder / MANIFEST).is_file():
        return load_tally(folder)
    try:
        return Tally.model_validate_json(read_text(store, f"{prepared_name(settings)}/{TALLY}", scratch))
    except (MissingError, ValueError):
        return None


@contextmanager
def locked(folder: Path, on_wait: Callable[[], None] = lambda: None) -> Iterator[None]:
    """No other process on this machine prepares or downloads the folder meanwhile.

    Args:
        on_wait: called every two seconds while another one does; what it raises ends the wait.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.with_name(f"{folder.name}.lock"))
    while True:
        try:
            held = lock.acquire(timeout=_WAIT_SECONDS)
            break
        except Timeout:
            on_wait()
    with held:
        yield


def is_same(store: Store, name: str, folder: Path) -> bool:
    """Whether the local folder is undamaged and the one that the store holds under this name.

    Raises:
        MissingError: the store holds none.
    """
    text = read_text(store, f"{name}/{MANIFEST}", folder.parent)
    return _is_whole(folder) and (folder / MANIFEST).read_text("utf-8") == text


def _is_whole(folder: Path) -> bool:
    try:
        check(folder)
    except DamagedError:
        return False
    return True


def _is_current(spec: PrepareSpec) -> bool:
    if not _is_whole(spec.folder) or (spec.data.keep_dropped and not (spec.folder / DROPPED).is_file()):
        return False
    if not (spec.folder / ORIGIN).is_file() or (spec.folder / ORIGIN).read_text("utf-8") != _origin(spec):
        return False
    revisions = {source.source: source.revision for source in load_tally(spec.folder).sources}
    return all(
        _is_unmoved(one, revisions.get(str(one)), spec.cache_dir) for one in (*spec.data.eval_datasets, *spec.data.datasets)
    )


def _origin(spec: PrepareSpec) -> str:
    """What the prepared data depends on and its folder's name does not tell, as JSON."""
    from job.data.shards import VERSION

    files = sorted({path for pattern in _TOKENIZER_FILES for path in spec.model_dir.glob(pattern) if path.is_file()})
    made_with = {"version": str(VERSION)} | {path.name: _digest(path) for path in files}
    if (detector := Path(spec.data.language_model).expanduser()).is_file():
        made_with["language_model"] = _digest(detector)
    return json.dumps(made_with, indent=1)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _states(spec: PrepareSpec) -> dict[Path, tuple[int, int]]:
    """Size and time of change of every local data file."""
    local = (one for one in (*spec.data.eval_datasets, *spec.data.datasets) if one.kind in (Where.LOCAL, Where.PACKAGE))
    files = (path for one in local for path in one.local_files().values())
    return {path: ((found := path.stat()).st_size, found.st_mtime_ns) for path in files}


def _is_unmoved(spec: DatasetSpec, revision: str | None, cache_dir: Path) -> bool:
    if spec.kind in (Where.LOCAL, Where.PACKAGE):
        return True  # its content is in the folder's name
    from job.data.sources import open_source

    return spec.kind is Where.HUB and revision is not None and open_source(spec, cache_dir).revision == revision


def _load_tokenizer(spec: PrepareSpec) -> Any:
    from transformers import AutoTokenizer

    from job.data.templates import set_template

    try:
        tokenizer = AutoTokenizer.from_pretrained(spec.model_dir, trust_remote_code=spec.trust_remote_code)
    except (OSError, ValueError, ImportError) as error:
        way_out = "choose a model with a tokenizer that transformers knows"
        rule = f"its tokenizer cannot be loaded: {str(error).strip().splitlines()[0]}"
        raise SettingsError([Problem(setting="MODEL_ID", value=str(spec.model_dir), rule=rule, way_out=way_out)]) from error
    set_template(tokenizer, spec.chat_template)
    return tokenizer
