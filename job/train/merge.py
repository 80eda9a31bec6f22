"""A base model and an adapter in; a model of its own in bfloat16 out, for servers that take no adapters. On the CPU.

The adapter goes into the base model's own weights, never into quantised ones: that would round them twice. What is not
handled: a base model that is only there quantised, which is refused.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from job.errors import Problem, PublishError, SettingsError
from job.events import EventWriter, Progress
from job.train.merge_room import check_merge_room
from job.train.spec import MergeSpec

MAX_SHARD = "5GB"
"""As the Hub's own models have it: a download that breaks begins a file anew."""


def merge(spec: MergeSpec, events: EventWriter) -> None:
    """Make `spec.target`, a folder that is there whole or not at all.

    Raises:
        MachineError: memory or disk do not suffice; nothing was loaded.
        SettingsError: the base model's weights are quantised.
        PublishError: the merged weights are not finite.
    """
    _refuse_quantised(spec)
    spec.target.parent.mkdir(parents=True, exist_ok=True)
    partial = spec.target.with_name(spec.target.name + ".partial")
    for left_over in (spec.target, partial):
        shutil.rmtree(left_over, ignore_errors=True)
    weights = check_merge_room(spec.model_dir, spec.target)
    events.write(Progress(text=f"merging the adapter into {weights.num_parameters:,} parameters in bfloat16"))
    from transformers import AutoTokenizer  # here and below: a refusal need not wait for torch

    model = _merged(spec)
    events.write(Progress(text="saving the merged model"))
    model.save_pretrained(partial, max_shard_size=MAX_SHARD)
    AutoTokenizer.from_pretrained(spec.adapter_dir, trust_remote_code=spec.model.trust_remote_code).save_pretrained(partial)
    _copy_code(spec.model_dir, partial)
    partial.replace(spec.target)


def _merged(spec: MergeSpec) -> Any:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(
        spec.model_dir,
        dtype=torch.bfloat16,
        device_map={"": "cpu"},
        trust_remote_code=spec.model.trust_remote_code,
        local_files_only=True,
    )
    adapted = PeftModel.from_pretrained(base, str(spec.adapter_dir))
    _untie(adapted)
    try:
        model = adapted.merge_and_unload(progressbar=False, safe_merge=True)
    except ValueError as error:  # PEFT's, for weights that are not finite
        raise PublishError(f"PUBLISH_MERGED=1: the merged model is not usable: {error}; publish the adapter alone") from error
    return model


def _untie(adapted: Any) -> None:
    """Give the output layer weights of its own where the adapter changes it and the embeddings share them."""
    import torch
    from peft.tuners.tuners_utils import BaseTunerLayer

    model = adapted.get_base_model()
    output, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    plain = [layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer for layer in (output, embeddings)]
    is_changed = isinstance(output, BaseTunerLayer) or isinstance(embeddings, BaseTunerLayer)
    if not is_changed or plain[0].weight is not plain[1].weight:
        return
    plain[0].weight = torch.nn.Parameter(plain[0].weight.detach().clone(), requires_grad=False)
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False


def _refuse_quantised(spec: MergeSpec) -> None:
    config = json.loads((spec.model_dir / "config.json").read_text("utf-8"))
    if quantised := config.get("quantization_config"):
        method = quantised.get("quant_method", "some method")
        problem = Problem(
            setting="PUBLISH_MERGED",
            value="1",
            rule=f"the weights of MODEL_ID={spec.public_name} are quantised ({method}), and merging would round them twice",
            way_out="name the model they were made from, or set PUBLISH_MERGED=0",
        )
        raise SettingsError([problem])


def _copy_code(model_dir: Path, folder: Path) -> None:
    """Code that came with the base model goes with the merged one, whose configuration names it."""
    if "auto_map" in json.loads((folder / "config.json").read_text("utf-8")):
        for file in model_dir.glob("*.py"):
            shutil.copyfile(file, folder / file.name)
