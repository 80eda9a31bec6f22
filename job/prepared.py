"""Prepared data as a folder that is whole or absent, shared by all runs on this machine that ask for the same data.

What it is named after (`data_fingerprint`) covers the settings, the tokenizer and the content of local files. What lies elsewhere
can move on without a change of name, so its revision is asked again before another run may use what one has prepared.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock

from job.data.prepare import prepare
from job.data.sources import open_source
from job.data.tally import load_tally
from job.data.templates import set_template
from job.errors import Problem, SettingsError
from job.events import EventWriter, Progress
from job.keep.checkpoints import MANIFEST, DamagedError, check, discard, seal
from job.keep.store import Store, read_text
from job.settings import DatasetSpec, Where
from job.train.spec import PrepareSpec

DROPPED = "dropped.jsonl"


def make_prepared(spec: PrepareSpec, events: EventWriter) -> None:
    """Prepare the data into `spec.folder`, unless it is there already and still what its sources hold.

    Raises:
        SettingsError: the tokenizer cannot be loaded.
        DataError, NetworkError, MachineError: as `prepare`.
    """
    with locked(spec.folder):
        if _is_current(spec):
            events.write(Progress(text="the data was prepared before"))
            return
        partial = spec.folder.with_name(f"{spec.folder.name}.partial")  # keeps the shards of an interrupted start
        prepare(
            spec.data,
            _load_tokenizer(spec),
            folder=partial,
            cache_dir=spec.cache_dir,
            seed=spec.seed,
            report_progress=lambda text, done: events.write(Progress(text=text, done=done)),
        )
        seal(partial, step=0)
        discard(spec.folder)
        partial.replace(spec.folder)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """No other process on this machine prepares or downloads the folder meanwhile."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f"{folder.name}.lock")):
        yield


def is_same(store: Store, name: str, folder: Path) -> bool:
    """Whether the local folder is undamaged and the one that the store holds under this name.

    Raises:
        MissingError: the store holds none.
    """
    text = read_text(store, f"{name}/{MANIFEST}", folder.parent)
    try:
        check(folder)
    except DamagedError:
        return False
    return (folder / MANIFEST).read_text("utf-8") == text


def _is_current(spec: PrepareSpec) -> bool:
    if not (spec.folder / MANIFEST).is_file() or (spec.data.keep_dropped and not (spec.folder / DROPPED).is_file()):
        return False
    try:
        check(spec.folder)
    except DamagedError:
        return False
    revisions = {source.source: source.revision for source in load_tally(spec.folder).sources}
    return all(
        _is_unmoved(one, revisions.get(str(one)), spec.cache_dir) for one in (*spec.data.eval_datasets, *spec.data.datasets)
    )


def _is_unmoved(spec: DatasetSpec, revision: str | None, cache_dir: Path) -> bool:
    if spec.kind in (Where.LOCAL, Where.PACKAGE):
        return True  # its content is in the folder's name
    return spec.kind is Where.HUB and revision is not None and open_source(spec, cache_dir).revision == revision


def _load_tokenizer(spec: PrepareSpec) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(spec.model_dir, trust_remote_code=spec.trust_remote_code)
    except (OSError, ValueError, ImportError) as error:
        way_out = "choose a model with a tokenizer that transformers knows"
        rule = f"its tokenizer cannot be loaded: {str(error).strip().splitlines()[0]}"
        raise SettingsError([Problem(setting="MODEL_ID", value=str(spec.model_dir), rule=rule, way_out=way_out)]) from error
    set_template(tokenizer, spec.chat_template)
    return tokenizer
