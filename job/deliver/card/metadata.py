"""A report in, the metadata that the Hub reads at the top of a card out: only what the Hub accepts, for it refuses the rest."""

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import yaml

from job.deliver.card.licence import Licence
from job.deliver.report import Report
from job.settings import Settings, Where, is_hub_id

MIN_SHARE, MAX_LANGUAGES = 0.1, 5
"""Of the examples, for a language to be named where LANGUAGE does not say it; and how many are."""
_LANGUAGE = re.compile(r"[a-z]{2,3}")  # `es-ES` is refused
_REPO_ID = re.compile(r"[\w.-]+(?:/[\w.-]+)?", re.ASCII)


def adapter_metadata(report: Report, settings: Settings, licence: Licence, *, redact: Callable[[str], str]) -> str:
    """The metadata block of an adapter.

    Args:
        redact: applied to each value: in a whole block, what takes a secret's place could make it unreadable.
    """
    tags = ["lora", *(["qlora"] if settings.model.load_in_4bit else []), "sft", "trl", "qlora-job"]
    if base := base_id(settings):
        tags.append(f"base_model:adapter:{base}")
    return _block({"library_name": "peft", **_shared(report, settings, licence, relation="adapter"), "tags": tags}, redact)


def merged_metadata(
    report: Report, settings: Settings, licence: Licence, *, adapter: str | None, redact: Callable[[str], str]
) -> str:
    """The metadata block of a merged model.

    Args:
        adapter: Hub id of the adapter, where it was published.
        redact: applied to each value.
    """
    tags = ["sft", "trl", "qlora-job", *([f"base_model:finetune:{base}"] if (base := base_id(settings)) else [])]
    tags += [f"adapter:{adapter}"] if adapter else []
    return _block(
        {"library_name": "transformers", **_shared(report, settings, licence, relation="finetune"), "tags": tags}, redact
    )


def base_id(settings: Settings) -> str | None:
    """The base model's Hub id; None for one that lies on this machine."""
    name = settings.model.model_id
    return name if is_hub_id(name) and _REPO_ID.fullmatch(name) else None


def dataset_ids(settings: Settings) -> list[str]:
    specs = (*settings.data.datasets, *settings.data.eval_datasets)
    return sorted({spec.where for spec in specs if spec.kind is Where.HUB and _REPO_ID.fullmatch(spec.where)})


def find_languages(report: Report, settings: Settings) -> list[str]:
    """What LANGUAGE asked for, else the languages of a good part of the examples."""
    if settings.data.language:
        return [code for code in settings.data.language if _LANGUAGE.fullmatch(code)]
    counts: Counter[str] = Counter()
    for source in report.data.sources if report.data else []:
        counts.update(source.languages)
    common = [code for code, count in counts.most_common(MAX_LANGUAGES) if count >= MIN_SHARE * counts.total()]
    return [code for code in common if _LANGUAGE.fullmatch(code)]


def _shared(report: Report, settings: Settings, licence: Licence, *, relation: str) -> dict[str, Any]:
    base = base_id(settings)
    is_other = licence.id == "other"
    return {
        "pipeline_tag": "text-generation",
        "base_model": base,
        "base_model_relation": relation if base else None,
        "license": licence.id,
        "license_name": licence.name if is_other else None,
        "license_link": licence.link if is_other else None,
        "language": find_languages(report, settings),
        "datasets": dataset_ids(settings),
        "model-index": _model_index(report, settings),
    }


def _model_index(report: Report, settings: Settings) -> list[dict[str, Any]]:
    chosen, ids = report.chosen, dataset_ids(settings)
    if chosen is None or chosen.eval_loss is None:
        return []
    metrics: list[dict[str, Any]] = [{"type": "loss", "name": "held-out loss", "value": round(chosen.eval_loss, 4)}]
    if chosen.perplexity is not None:
        metrics.append({"type": "perplexity", "name": "held-out perplexity", "value": chosen.perplexity})
    result = {
        "task": {"type": "text-generation", "name": "text generation"},
        "dataset": {"type": ids[0] if len(ids) == 1 else "held-out", "name": "held-out examples of the training data"},
        "metrics": metrics,
    }
    if settings.data.eval_datasets:
        result["dataset"] = {"type": "held-out", "name": "EVAL_DATASETS of the run"}
    return [{"name": report.run_id, "results": [result]}]


def _block(values: dict[str, Any], redact: Callable[[str], str]) -> str:
    known = {key: _redacted(value, redact) for key, value in values.items() if value not in (None, [])}
    text = yaml.safe_dump(known, sort_keys=False, allow_unicode=True, width=1000)
    return f"---\n{text}---\n"


def _redacted(value: Any, redact: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, list):
        return [_redacted(one, redact) for one in value]
    return {key: _redacted(one, redact) for key, one in value.items()} if isinstance(value, dict) else value
