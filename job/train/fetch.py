"""A model's name in, a local folder that transformers can load out.

A Hub model is downloaded to the Hub's own cache, a local folder is used where it lies, and a `.gguf` file is dequantised
once into an ordinary model folder.
"""

import hashlib
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from job.errors import NetworkError, Problem, SettingsError
from job.events import EventWriter, Fetched, Progress
from job.settings import ModelSettings, package_file
from job.train.spec import FetchSpec

# Weights in formats that are not loaded when safetensors are there, and other engines' copies of the model.
_NOT_NEEDED = ["*.gguf", "*.onnx", "onnx/*", "*.h5", "*.msgpack", "*.tflite", "original/*", "*.pth", "consolidated*"]
WEIGHTS = ["*.safetensors", "*.bin", "*.pt"]


def fetch(spec: FetchSpec, events: EventWriter) -> None:
    """Find or bring the model; ends with a `Fetched` event.

    Raises:
        SettingsError: no such model, or access to it is not granted.
        NetworkError: the Hub does not answer.
    """
    model_id = spec.model.model_id
    path = package_file(model_id) if model_id.startswith("pkg:") else Path(model_id).expanduser()
    revision = None
    if path.suffix == ".gguf":
        folder = _convert_gguf(path, spec.models_dir, events)
    elif path.is_dir():
        folder = path
    else:
        events.write(Progress(text=f"downloading {model_id}"))
        folder = _download(spec.model, tokenizer_only=spec.tokenizer_only)
        revision = folder.name  # the Hub's cache names a snapshot after its commit
    events.write(Fetched(model_dir=str(folder.absolute()), revision=revision))


def _download(model: ModelSettings, *, tokenizer_only: bool) -> Path:
    from huggingface_hub import HfApi, constants, snapshot_download

    if constants.HF_HUB_OFFLINE:
        return find_cached(model, tokenizer_only=tokenizer_only, reason="HF_HUB_OFFLINE is set")
    where = {"revision": model.model_revision}
    try:
        with hub_errors(model):
            files = [file.rfilename for file in HfApi().model_info(model.model_id, timeout=10.0, **where).siblings or []]
    except NetworkError:
        with suppress(SettingsError):
            return find_cached(model, tokenizer_only=tokenizer_only, reason="the Hub does not answer")
        with hub_errors(model):
            files = HfApi().list_repo_files(model.model_id, **where)  # asks for half a minute, again and again
    with hub_errors(model):
        ignored = not_needed(files, tokenizer_only=tokenizer_only)
        return Path(snapshot_download(model.model_id, ignore_patterns=ignored, **where))


def not_needed(files: Iterable[str], *, tokenizer_only: bool = False) -> list[str]:
    """Patterns of a Hub model's files that are not downloaded."""
    ignored = [*_NOT_NEEDED, *([*WEIGHTS, "*.safetensors.index.json"] if tokenizer_only else ())]
    if any(file.endswith(".safetensors") for file in files):
        ignored.append("*.bin")
    return ignored


def find_cached(model: ModelSettings, *, tokenizer_only: bool = False, reason: str) -> Path:
    """The whole copy of a Hub model in the Hub's cache on this machine; asks nobody.

    Raises:
        SettingsError: there is none; says the reason why the Hub is not asked.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    for files in (["model.safetensors"], []):  # as most models have it, then those with .bin files alone
        ignored = not_needed(files, tokenizer_only=tokenizer_only)
        try:
            where = {"revision": model.model_revision, "ignore_patterns": ignored, "local_files_only": True}
            folder = Path(snapshot_download(model.model_id, **where))
        except LocalEntryNotFoundError:
            continue
        if tokenizer_only or any(path for pattern in WEIGHTS for path in folder.rglob(pattern)):
            return folder
    way_out = "let it be downloaded once with the network and the same HF_HOME, or name a folder"
    rule = f"{reason}, and the cache on this machine does not hold it whole"
    raise _refused("MODEL_ID", model.model_id, rule, way_out)


@contextmanager
def hub_errors(model: ModelSettings) -> Iterator[None]:
    """Turn what the Hub's library raises inside into SettingsError (the Hub refuses) or NetworkError (it does not answer)."""
    import httpx2  # huggingface_hub lets its connection errors through
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except GatedRepoError as error:
        way_out = f"accept its conditions at huggingface.co/{model.model_id} and set HF_TOKEN to a token of that account"
        raise _refused("MODEL_ID", model.model_id, "this model is gated and the token has no access", way_out) from error
    except RevisionNotFoundError as error:
        way_out = "name a branch, tag or commit of the model"
        raise _refused("MODEL_REVISION", str(model.model_revision), "no such revision", way_out) from error
    except RepositoryNotFoundError as error:
        way_out = "correct the id, or set HF_TOKEN when the model is private"
        raise _refused("MODEL_ID", model.model_id, "no such model on the Hub", way_out) from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        if status in (401, 403):
            raise _refused("HF_TOKEN", "***", "the Hub does not accept it", "make a new token, or leave it out") from error
        raise NetworkError(f"MODEL_ID={model.model_id}: the Hub answered {status}; start again when it is well") from error
    except (LocalEntryNotFoundError, ConnectionError, TimeoutError, httpx2.HTTPError) as error:
        raise NetworkError(f"MODEL_ID={model.model_id}: the Hub does not answer ({error}); start again later") from error


def _refused(setting: str, value: str, rule: str, way_out: str) -> SettingsError:
    return SettingsError([Problem(setting=setting, value=value, rule=rule, way_out=way_out)])


def _convert_gguf(path: Path, models_dir: Path, events: EventWriter) -> Path:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:12]
    folder = models_dir / f"{path.stem}-{digest}"
    if folder.is_dir():
        return folder
    events.write(Progress(text=f"dequantising {path.name}, once"))
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    model.save_pretrained(partial)
    AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(partial)
    partial.replace(folder)
    return folder
