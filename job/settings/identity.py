"""Which run this is: settings in, a name out that is the same wherever the same settings are given.

The fingerprint covers everything that changes the result and nothing else: settings marked NEUTRAL (hardware, budget,
logging) are left out, and files count by what they hold, not by where they lie. Of a local model only file names and sizes
are read (weights are many gigabytes); its configuration and tokenizer count in full.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from job.settings.chat_template import find_template
from job.settings.dataset_spec import DatasetSpec, Where, data_suffixes, package_file
from job.settings.read import Settings, sections
from job.settings.section import NEUTRAL, Section

_READ_IN_FULL = ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def result_fingerprint(settings: Settings) -> str:
    """32 hex digits over everything that changes the result."""
    identity: dict[str, Any] = {}
    for name, _ in sections():
        identity |= _section_identity(getattr(settings, name))
    identity["model_id"] = _model_identity(settings.model.model_id)
    identity["datasets"] = [data_identity(spec) for spec in settings.data.datasets]
    identity["eval_datasets"] = [data_identity(spec) for spec in settings.data.eval_datasets]
    identity["chat_template"] = _template(settings)
    if settings.train.gradient_accumulation_steps:  # then the micro-batch decides the effective batch
        identity["per_device_train_batch_size"] = settings.train.per_device_train_batch_size
    return _digest(identity)


def data_fingerprint(settings: Settings) -> str:
    """16 hex digits over everything that changes the prepared data: the data section, the tokenizer and the seed."""
    identity = _section_identity(settings.data) | {
        "datasets": [data_identity(spec) for spec in settings.data.datasets],
        "model_id": _model_identity(settings.model.model_id),
        "model_revision": settings.model.model_revision,
        "eval_datasets": [data_identity(spec) for spec in settings.data.eval_datasets],
        "chat_template": _template(settings),
        "seed": settings.train.seed,
    }
    return _digest(identity)[:16]


def default_run_id(settings: Settings) -> str:
    """`<model-name>-<8 hex>`."""
    name = Path(settings.model.model_id).name.removesuffix(".gguf")
    slug = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-._") or "model"
    return f"{slug[:60]}-{result_fingerprint(settings)[:8]}"


def data_identity(spec: DatasetSpec) -> str:
    """What identifies a data set: the content of files, the address of everything else, and how it is read."""
    options = str(spec).removeprefix(spec.where)
    if spec.kind not in (Where.LOCAL, Where.PACKAGE):
        return str(spec)
    digests = {}
    for name, path in spec.local_files().items():
        with path.open("rb") as file:
            digests[name] = hashlib.file_digest(file, "sha256").hexdigest()
    if spec.local_path.is_file():
        kind, _ = data_suffixes(spec.where)
        return f"sha256:{next(iter(digests.values()))}.{kind}{options}"
    return f"sha256:{_digest(digests)}{options}"


def is_hub_id(model_id: str) -> bool:
    """Whether a model's name is a Hub id, and not a file or folder of this machine."""
    local = model_id.startswith(("pkg:", "/", ".", "~")) or model_id.endswith(".gguf") or Path(model_id).exists()
    return not local


def _section_identity(section: Section) -> dict[str, Any]:
    fields = type(section).model_fields
    return {name: value for name, value in section.model_dump(mode="json").items() if NEUTRAL not in fields[name].metadata}


def _model_identity(model_id: str) -> str:
    path = package_file(model_id) if model_id.startswith("pkg:") else Path(model_id).expanduser()
    if not path.exists():
        return model_id  # a Hub id
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    sizes = [f"{file.name} {file.stat().st_size}" for file in files if file.is_file()]
    return _digest([sizes, *(_text(path / name) for name in _READ_IN_FULL)])


def _template(settings: Settings) -> str | None:
    return find_template(settings.model.chat_template) if settings.model.chat_template else None


def _text(path: Path) -> str:
    return path.read_text("utf-8") if path.is_file() else ""


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:32]
