"""`TRAIN_ARGS`: its names are checked against the real fields of TRL's SFTConfig, which is read and not imported.

Importing it would bring torch into the supervisor and cost seconds.
"""

import ast
from collections.abc import Iterable
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Any

_SOURCES = (("trl", "trainer/sft_config.py"), ("trl", "trainer/base_config.py"), ("transformers", "training_args.py"))
# What the job itself decides; changing it here would lose checkpoints or hide the run from its keeper.
_OURS = (
    "output_dir",
    "max_length",
    "packing",
    "dataset_kwargs",
    "resume_from_checkpoint",
    "push_to_hub",
    "hub_token",
    "logging_nan_inf_filter",
    "load_best_model_at_end",
    "enable_jit_checkpoint",
    "ignore_data_skip",
)
_INSTEAD = {
    "fsdp": "PARALLEL=fsdp asks for it",
    "fsdp_config": "PARALLEL=fsdp sets it",
    "deepspeed": "another number of GPUs could not continue its checkpoints; PARALLEL=fsdp shares the weights too",
}


def check_train_args(names: Iterable[str], our_settings: Iterable[str]) -> list[str]:
    """What is wrong with these names, a sentence for each."""
    fields, ours = _sft_config_fields(), {name.lower() for name in our_settings}
    complaints = []
    for name in names:
        if name in ours:
            complaints.append(f"{name} has a setting of its own: {name.upper()}")
        elif name in _INSTEAD:
            complaints.append(f"{name} is not taken: {_INSTEAD[name]}")
        elif name in _OURS or name.startswith("save_"):
            complaints.append(f"{name} is decided by the job")
        elif name not in fields:
            near = get_close_matches(name, fields, n=1)
            complaints.append(f"SFTConfig has no field {name}" + (f" (did you mean {near[0]}?)" if near else ""))
    return complaints


def _sft_config_fields() -> set[str]:
    fields: set[str] = set()
    for package, inside in _SOURCES:
        spec = find_spec(package)
        path = Path(spec.origin).parent / inside if spec and spec.origin else None
        if path is None or not path.is_file():
            continue
        for node in ast.parse(path.read_text("utf-8")).body:
            if isinstance(node, ast.ClassDef):
                fields |= _annotated_names(node)
    return fields


def _annotated_names(node: ast.ClassDef) -> set[str]:
    statements: list[Any] = [statement for statement in node.body if isinstance(statement, ast.AnnAssign)]
    return {statement.target.id for statement in statements if isinstance(statement.target, ast.Name)}
