"""A model's name in, a local folder that transformers can load out.

A Hub model is downloaded to the Hub's own cache, a local folder is used where it lies, and a `.gguf` file is dequantised
once into an ordinary model folder.
"""

import hashlib
import shutil
from pathlib import Path

from job.errors import NetworkError, Problem, SettingsError
from job.events import EventWriter, Fetched, Progress
from job.settings import ModelSettings, package_file
from job.train.spec import FetchSpec

# Weights in formats that are not loaded when safetensors are there, and other engines' copies of the model.
_NOT_NEEDED = ["*.gguf", "*.onnx", "onnx/*", "*.h5", "*.msgpack", "*.tflite", "original/*", "*.pth", "consolidated*"]
_WEIGHTS = ["*.safetensors", "*.bin", "*.pt", "*.safetensors.index.json"]


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
    import httpx2  # huggingface_hub lets its connection errors through
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    def refused(setting: str, value: str, rule: str, way_out: str) -> SettingsError:
        return SettingsError([Problem(setting=setting, value=value, rule=rule, way_out=way_out)])

    ignored = [*_NOT_NEEDED, *(_WEIGHTS if tokenizer_only else ())]
    try:
        if not constants.HF_HUB_OFFLINE:
            files = HfApi().list_repo_files(model.model_id, revision=model.model_revision)
            if any(file.endswith(".safetensors") for file in files):
                ignored.append("*.bin")
        return Path(snapshot_download(model.model_id, revision=model.model_revision, ignore_patterns=ignored))
    except GatedRepoError as error:
        way_out = f"accept its conditions at huggingface.co/{model.model_id} and set HF_TOKEN to a token of that account"
        raise refused("MODEL_ID", model.model_id, "this model is gated and the token has no access", way_out) from error
    except RevisionNotFoundError as error:
        way_out = "name a branch, tag or commit of the model"
        raise refused("MODEL_REVISION", str(model.model_revision), "no such revision", way_out) from error
    except RepositoryNotFoundError as error:
        way_out = "correct the id, or set HF_TOKEN when the model is private"
        raise refused("MODEL_ID", model.model_id, "no such model on the Hub", way_out) from error
    except HfHubHTTPError as error:
        if error.response is not None and error.response.status_code in (401, 403):
            raise refused("HF_TOKEN", "***", "the Hub does not accept it", "make a new token, or leave it out") from error
        raise NetworkError(f"MODEL_ID={model.model_id}: the download failed ({error})") from error
    except (LocalEntryNotFoundError, ConnectionError, TimeoutError, httpx2.HTTPError) as error:
        raise NetworkError(f"MODEL_ID={model.model_id}: the download failed ({error})") from error


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
