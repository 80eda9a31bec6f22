"""What the planner asks of a process that may import torch: the model's footprint, and how much data there is."""

import json
import os
from typing import Any

from job.data.estimate import estimate
from job.data.templates import set_template
from job.errors import DataError, NetworkError
from job.plan.footprint import Footprint
from job.plan.formula import estimate_footprint
from job.train.spec import Measurements, MeasureSpec

_VOCABULARIES = ("tokenizer.json", "vocab*", "*.model", "tekken*", "*.tiktoken")


def measure(spec: MeasureSpec) -> None:
    """Write what was found to `spec.result`; what cannot be found is left out, and told."""
    found = Measurements()
    if spec.with_footprint:
        found = found.model_copy(update={"footprint": _footprint(spec)})
    if spec.data is not None:
        try:
            found = found.model_copy(update={"estimate": estimate(spec.data, _tokenizer(spec), cache_dir=spec.cache_dir)})
        except (DataError, NetworkError, OSError, ValueError, ImportError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            found = found.model_copy(update={"estimate_failed": reason})
    partial = spec.result.with_suffix(".partial")
    partial.write_text(found.model_dump_json(), "utf-8")
    partial.replace(spec.result)


def _footprint(spec: MeasureSpec) -> Footprint:
    """Traced; by formula where the model cannot be."""
    from job.train.dry_model import load_config
    from job.train.dry_run import Plant, dry_run, dtype_of

    config: Any = None
    try:
        config = load_config(spec.model_dir, spec.model)
        plant = Plant(
            config=config,
            model=spec.model,
            lora=spec.lora,
            dtype=dtype_of(spec.model.dtype, on_gpu=spec.on_gpu),
            length=spec.length,
            on_gpu=spec.on_gpu,
        )
        return dry_run(plant, num_processes=min(len(os.sched_getaffinity(0)), 4))
    except Exception as error:  # any model may do what fake tensors cannot follow; a plan by formula is better than none
        reason = f"the model could not be traced ({type(error).__name__}: {str(error).strip().splitlines()[0][:200]})"
        values = config.to_dict() if config is not None else json.loads((spec.model_dir / "config.json").read_text("utf-8"))
        return estimate_footprint(values, spec.model, spec.lora, on_gpu=spec.on_gpu, reason=reason)


def _tokenizer(spec: MeasureSpec) -> Any:
    """None where there is none, as beside a bare config.json, for which transformers would make an empty one."""
    from transformers import AutoTokenizer

    if spec.model_dir.is_dir() and not any(found for name in _VOCABULARIES for found in spec.model_dir.glob(name)):
        return None
    where: dict[str, Any] = {"pretrained_model_name_or_path": spec.model_dir}
    if spec.model_dir.suffix == ".gguf":
        where = {"pretrained_model_name_or_path": spec.model_dir.parent, "gguf_file": spec.model_dir.name}
    try:
        tokenizer = AutoTokenizer.from_pretrained(**where, trust_remote_code=spec.model.trust_remote_code)
    except (OSError, ValueError, ImportError, TypeError, AttributeError):
        return None
    set_template(tokenizer, spec.model.chat_template)
    return tokenizer
