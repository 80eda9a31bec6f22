"""Chosen pieces of shards in, a folder that `datasets.load_from_disk` reads out: input_ids, labels, source, row.

Written directly, in one pass and with fixed names, so that the same examples give the same bytes.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow

from job.data.merge import Kept
from job.data.shards import read_shard
from job.data.split import Places

_FILE = "data-00000-of-00001.arrow"
_BATCH = 1_000


def write_set(folder: Path, kept: Kept, order: Places, *, shards: list[Path], sources: list[str]) -> None:
    """Write the pieces at the places `order`; memory holds one shard at a time."""
    import datasets

    features = datasets.Features(
        {
            "input_ids": datasets.List(datasets.Value("int32")),
            "labels": datasets.List(datasets.Value("int32")),
            "source": datasets.Value("string"),
            "row": datasets.Value("int64"),
        }
    )
    folder.mkdir(parents=True)
    schema = features.arrow_schema
    in_sequence = bool(np.all(order[1:] > order[:-1]))
    natural = folder / (_FILE if in_sequence else "natural.arrow")
    unique = order if in_sequence else np.unique(order)
    _write(natural, schema, _tables(kept if len(unique) == len(kept.row) else kept.select(unique), shards, sources, schema))
    if not in_sequence:
        inverse = np.searchsorted(unique, order)
        view = datasets.Dataset.from_file(str(natural)).select(inverse).with_format("arrow")
        _write(folder / _FILE, schema, (table.cast(schema) for table in view.iter(batch_size=_BATCH)))
        del view
        natural.unlink()
    datasets.DatasetInfo(features=features).write_to_directory(str(folder))
    state: dict[str, Any] = {
        "_data_files": [{"filename": _FILE}],
        "_fingerprint": _fingerprint(order, kept.key),
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    (folder / "state.json").write_text(json.dumps(state, indent=2, sort_keys=True), "utf-8")


def _fingerprint(*arrays: Any) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()[:16]


def _tables(kept: Kept, shards: list[Path], sources: list[str], schema: pyarrow.Schema) -> Iterator[pyarrow.Table]:
    for shard, pieces in kept.by_shard():
        table = read_shard(shards[shard]).select(["input_ids", "labels", "row"]).take(pieces.position)
        name = pyarrow.array([sources[pieces.source[0]]] * len(pieces.row), pyarrow.string())
        yield table.add_column(2, "source", name).cast(schema)


def _write(path: Path, schema: pyarrow.Schema, tables: Iterator[pyarrow.Table]) -> None:
    with pyarrow.ipc.new_stream(path, schema) as writer:
        for table in tables:
            writer.write_table(table.combine_chunks())
