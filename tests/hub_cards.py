"""The metadata of a model's card in, what the Hub would refuse in it out.

Sources: espnet_model_zoo pull request 102 (languages, empty keys and names of data sets that were refused); hub-docs
modelcard.md; huggingface_hub's repocard. What is not handled: what the Hub only warns of.
"""

import re
from contextlib import suppress
from typing import Any

import yaml

from job.deliver.card.licence import KNOWN_LICENCES

# The expression with which the Hub itself finds the block, as huggingface_hub.repocard quotes it.
BLOCK = re.compile(r"^(\s*---(?:\r\n|\r|\n))([\S\s]*?)((?:\r\n|\r|\n)---[ \t]*(\r\n|\n|$))")
TEXTS = ("library_name", "pipeline_tag", "license_name", "license_link", "base_model_relation")
LISTS = ("language", "license", "base_model", "datasets", "tags")
FORMS = {
    "language": re.compile(r"[a-z]{2,3}|code|multilingual"),
    "base_model": re.compile(r"[\w.-]+/[\w.-]+|[\w.-]+"),
    "datasets": re.compile(r"[\w.-]+/[\w.-]+|[\w.-]+"),
    "tags": re.compile(r".{1,100}"),
}
RELATIONS = ("adapter", "merge", "quantized", "finetune")


def card_data(content: str) -> dict[str, Any] | None:
    """A card's metadata as the Hub tells it; None where it has none that can be read."""
    block = BLOCK.match(content)
    with suppress(yaml.YAMLError):
        data = yaml.safe_load(block[2]) if block else None
        return data if isinstance(data, dict) else None
    return None


def card_errors(content: str) -> list[str]:
    """What the Hub would say; a card without metadata is only warned of."""
    if (block := BLOCK.match(content)) is None:
        return []
    try:
        data = yaml.safe_load(block[2])
    except yaml.YAMLError as error:
        return [f"the YAML cannot be read: {error}"]
    if not isinstance(data, dict):
        return ["the metadata is no mapping"]
    wrong = [f'"{key}" must have a value' for key, value in data.items() if value is None]
    wrong += [f'"{key}" must be a string' for key in TEXTS if key in data and not isinstance(data[key], str)]
    for key in LISTS:
        values = data.get(key, [])
        for value in values if isinstance(values, list) else [values]:
            if not isinstance(value, str):
                wrong.append(f'"{key}" must be a string or an array of strings')
            elif key in FORMS and not FORMS[key].fullmatch(value):
                wrong.append(f'"{key}" with value "{value}" is not valid')
            elif key == "license" and value not in KNOWN_LICENCES:
                wrong.append(f'"license" must be one of [{", ".join(sorted(KNOWN_LICENCES))}]')
    if data.get("license") == "other" and not ("license_name" in data and "license_link" in data):
        wrong.append('"license_name" and "license_link" are required where "license" is "other"')
    if data.get("base_model_relation", "adapter") not in RELATIONS:
        wrong.append(f'"base_model_relation" must be one of [{", ".join(RELATIONS)}]')
    return wrong + [text for model in data.get("model-index", []) for text in _index_errors(model)]


def _index_errors(model: Any) -> list[str]:
    """What is wrong in one model of a model-index."""
    if not isinstance(model, dict) or not isinstance(model.get("name"), str) or not isinstance(model.get("results"), list):
        return ['"model-index[0]" needs a name and results']
    wrong = []
    for result in model["results"]:
        if not (result.get("task") or {}).get("type"):
            wrong.append('"model-index[0].results[0].task.type" is required')
        dataset, metrics = result.get("dataset") or {}, result.get("metrics") or [{}]
        if not (dataset.get("type") and dataset.get("name")):
            wrong.append('"model-index[0].results[0].dataset" needs a name and a type')
        if any("type" not in metric or metric.get("value") is None for metric in metrics):
            wrong.append('"model-index[0].results[0].metrics" need a type and a value')
    return wrong
