"""Settings in; the env file that makes the same adapter again out, without secrets and folders of this machine.

What is not handled: settings that change only how a run goes (where it is kept, what it may cost), and EVAL_PROMPTS, which may
be many: they are named.
"""

import json
import re
from pathlib import Path, PurePath
from typing import Any

from job.settings import DatasetSpec, Settings, Where, is_hub_id
from job.settings.section import NEUTRAL, Section

SECTIONS = ("model", "lora", "data", "train", "evaluate")
LAYOUT = ("per_device_train_batch_size", "activation_checkpointing", "select_by", "eval_scorer", "eval_max_new_tokens")
"""Settings that leave the result's identity as it is, and yet tell how it came about."""
_PLAIN = re.compile(r"[\w./:@%+,=&?*-]+", re.ASCII)


def env_block(settings: Settings, *, revision: str | None, data_revisions: dict[str, str] | None = None) -> list[str]:
    """Lines of an env file with everything that differs from the defaults and shapes the result.

    Args:
        revision: of a base model on the Hub, as it was found.
        data_revisions: commit of each Hub data set, by the set as DATASETS writes it.
    """
    lines, local = [], []
    for name in SECTIONS:
        section: Section = getattr(settings, name)
        for field, info in type(section).model_fields.items():
            value = getattr(section, field)
            is_neutral = NEUTRAL in info.metadata and field not in LAYOUT
            default = None if info.is_required() else info.get_default(call_default_factory=True, validated_data={})
            if field == "model_revision" and revision is not None:
                value = revision
            if is_neutral or value == default:
                continue
            shown = _public(field, value, data_revisions or {})
            if shown != value:
                local.append(field.upper())
            lines.append(f"{field.upper()}={_quoted(_text(shown))}")
    if settings.evaluate.eval_prompts:
        lines.append(f"# EVAL_PROMPTS: {len(settings.evaluate.eval_prompts)} prompts, not repeated here")
    if local := [name for name in local if name not in ("DATASETS", "EVAL_DATASETS") or _has_local(settings, name)]:
        lines.append(f"# {', '.join(local)}: what lay on the machine is named by its last part only")
    return lines


def _has_local(settings: Settings, name: str) -> bool:
    return any(spec.kind in (Where.LOCAL, Where.S3) for spec in getattr(settings.data, name.lower()))


def _public(field: str, value: Any, data_revisions: dict[str, str]) -> Any:
    """The same value without a folder of this machine, data sets at the commit that was read."""
    if field == "model_id":
        return value if is_hub_id(value) or value.startswith("pkg:") else PurePath(value).name
    if field in ("datasets", "eval_datasets"):
        return tuple(_public_data(spec, data_revisions) for spec in value)
    if field in ("chat_template", "language_model"):
        return PurePath(value).name if _is_path(value) else value
    if isinstance(value, dict):
        return {key: PurePath(one).name if isinstance(one, str) and _is_path(one) else one for key, one in value.items()}
    return value


def _is_path(value: str) -> bool:
    return value.startswith(("/", "~", ".")) or ("/" in value and Path(value).exists())


def _public_data(spec: DatasetSpec, data_revisions: dict[str, str]) -> str:
    if spec.kind is Where.HUB:
        return str(spec.model_copy(update={"revision": data_revisions.get(str(spec), spec.revision)}))
    if spec.kind is Where.S3:  # whose bucket it is, is nobody's business
        return str(spec.model_copy(update={"where": PurePath(spec.where).name}))
    return spec.label


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "1" if value else "0"
    if isinstance(value, tuple):
        return ",".join(_text(one) for one in value)
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else str(value)


def _quoted(text: str) -> str:
    """As python-dotenv reads it."""
    if _PLAIN.fullmatch(text):
        return text
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t")
    return f'"{escaped}"'
