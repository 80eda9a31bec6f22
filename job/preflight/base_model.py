"""MODEL_ID in; whether it is there, may be read and can be fine-tuned out. Of a Hub model config.json is read, and no weights."""

import json
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from job.errors import NetworkError, Problem, SettingsError
from job.events import Need
from job.preflight.outcome import WARNING, Found
from job.settings import ModelSettings, is_hub_id, package_file
from job.train.fetch import WEIGHTS, find_cached, hub_errors, not_needed

CONFIG = "config.json"
TIMEOUT_SECONDS = 5.0
_WRITES_TEXT = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
"""How transformers' classes end that can be trained to continue a text."""


def check_base_model(model: ModelSettings) -> Found:
    """Find the base model where it is, and say how much of it is still to be downloaded.

    Raises:
        SettingsError: there is no such model or revision, no access to it, or it is none that transformers loads.
        NetworkError: the Hub does not answer, and the model is not on this machine.
    """
    if not is_hub_id(model.model_id):
        return Found(text=_check_local(model.model_id))
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        folder = find_cached(model, reason="HF_HUB_OFFLINE is set")
        return Found(text=_describe(folder / CONFIG, "in the cache; the Hub is not asked"))
    try:
        return _check_hub(model)
    except NetworkError as error:
        try:
            folder = find_cached(model, reason="the Hub does not answer")
        except SettingsError:
            raise error from None
        return Found(text=f"{WARNING}the Hub does not answer; MODEL_ID={model.model_id} is taken from the cache")


def _check_local(model_id: str) -> str:
    path = package_file(model_id) if model_id.startswith("pkg:") else Path(model_id).expanduser()
    if path.is_file():
        return f"a file of {path.stat().st_size / 1e9:.1f} GB"
    if not (path / CONFIG).is_file():
        raise _refused(model_id, f"the folder has no {CONFIG}", "name a model's folder, a .gguf file in it, or a Hub id")
    if not any(found for pattern in WEIGHTS for found in path.glob(pattern)):
        raise _refused(model_id, "the folder has no weights (*.safetensors)", "copy or download the model whole")
    return _describe(path / CONFIG, "a folder")


def _check_hub(model: ModelSettings) -> Found:
    from huggingface_hub import HfApi, constants, hf_hub_download, try_to_load_from_cache

    with hub_errors(model):
        info = HfApi().model_info(model.model_id, revision=model.model_revision, files_metadata=True, timeout=TIMEOUT_SECONDS)
    sizes: dict[str, int] = {file.rfilename: file.size or 0 for file in info.siblings or []}
    if CONFIG not in sizes:
        rule = f"is no model that transformers loads: it has no {CONFIG}"
        if any(name.endswith(".gguf") for name in sizes):
            raise _refused(model.model_id, rule, "name the model that its .gguf files were made of, or download one of them")
        raise _refused(model.model_id, rule, "name the base model, with its weights")
    if not any(_matches(name, WEIGHTS) for name in sizes):
        raise _refused(model.model_id, "has no weights", "name a repository with *.safetensors files")
    with hub_errors(model):  # gated models list their files to anybody; asking for one tells
        config = hf_hub_download(model.model_id, CONFIG, revision=info.sha)
    ignored = not_needed(sizes)
    missing = {
        name: size
        for name, size in sizes.items()
        if not _matches(name, ignored) and not isinstance(try_to_load_from_cache(model.model_id, name, revision=info.sha), str)
    }
    num_bytes = sum(missing.values())
    lacks_weights = any(_matches(name, WEIGHTS) for name in missing)
    where = f"{num_bytes / 1e9:,.2f} GB to download" if lacks_weights else "in the cache"
    need = Need(setting="HF_HOME", folder=constants.HF_HUB_CACHE, what="the base model", num_bytes=num_bytes)
    return Found(text=_describe(Path(config), f"at {info.sha[:8]}, {where}"), needs=(need,))


def _matches(name: str, patterns: list[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def _describe(config: Path, where: str) -> str:
    try:
        value: Any = json.loads(config.read_text("utf-8"))
    except (OSError, ValueError):
        return f"{WARNING}its {config.name} cannot be read"
    names = value.get("architectures") if isinstance(value, dict) else None
    if not names:
        return where
    if not any(name.endswith(_WRITES_TEXT) for name in map(str, names)):
        return f"{WARNING}MODEL_ID: {', '.join(map(str, names))} is no causal language model, and may not load as one"
    return f"{names[0]}, {where}"


def _refused(model_id: str, rule: str, way_out: str) -> SettingsError:
    return SettingsError([Problem(setting="MODEL_ID", value=model_id, rule=rule, way_out=way_out)])
