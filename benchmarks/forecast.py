"""Predicted beside published peak memory, and the share of a GPU's peak that published speeds mean.

    .venv/bin/python benchmarks/forecast.py [--json FILE] [--points FILE.csv] [--models DIR]

`memory_points.csv` holds what others have published, a source at each row; `models/` the configurations of their models. What a
stack is known to do otherwise than this job (fp32 embeddings, offloaded activations, whole logits) is traced as it does it.
Counted are torchtune's and axolotl's rows whose settings are complete; older stacks are shown. The predicted figure is what
tensors take, as those stacks report it; the safe one is what `plan` compares with a card.
"""

import argparse
import csv
import json
import logging
import shutil
import sys
import tempfile
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a file, from anywhere

from rich.console import Console
from rich.table import Table

from job.plan.footprint import Footprint
from job.plan.hardware import find_gpu
from job.plan.memory import CONTEXT_BYTES, SAFE_BYTES, SAFE_SLACK, WORKSPACE_BYTES, estimate_memory
from job.settings import LoraSettings, ModelSettings

HERE = Path(__file__).resolve().parent
GIB = 2**30
MODELS = {
    "Llama-3.2-3B": "meta-llama--Llama-3.2-3B-Instruct",
    "Qwen-1.8B(-Chat-Int4 for Q-LoRA)": "Qwen--Qwen-1_8B",
    "Qwen-14B(-Chat-Int4 for Q-LoRA)": "Qwen--Qwen-14B",
    "qwen-14b-chat": "Qwen--Qwen-14B",
}
ALL_LINEAR = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"
NOT_COUNTED = {
    "Qwen/Qwen3.5-27B": "no peak of one GPU: its table gives full fine-tuning 53 GiB, where bf16 weights alone take 50",
    "mistralai/Mistral-Small-3.1-24B-Instruct-2503": "rows neither packed nor padded: their length is not known",
}


@dataclass(frozen=True, kw_only=True)
class Point:
    """One published figure and ours."""

    source: str
    model: str
    bits: int
    length: int
    micro_batch: int
    rank: int
    published_gib: float
    predicted_gib: float
    safe_gib: float
    utilisation: float | None
    is_counted: bool
    why_not: str

    @property
    def error(self) -> float:
        return self.predicted_gib / self.published_gib - 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the points there too")
    parser.add_argument("--points", type=Path, default=HERE / "memory_points.csv", help="another table of published figures")
    parser.add_argument("--models", type=Path, default=HERE / "models", help="folder of <owner>--<name>.json configurations")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    with options.points.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    points = [point for row in rows if (point := _predict(row, options.models)) is not None]
    _show(points)
    if options.json:
        options.json.write_text(json.dumps([asdict(point) for point in points], indent=1), "utf-8")
    counted = [point for point in points if point.is_counted]
    too_low = [point.model for point in counted if point.safe_gib < point.published_gib]
    middle = median(abs(point.error) for point in counted)
    print(f"counted: {len(counted)} points, median error {middle:.1%}")
    print(f"the safe figure is below the published one for {', '.join(too_low) or 'none'}")
    sys.exit(0 if middle <= 0.15 and not too_low else 1)


def _predict(row: dict[str, str], models: Path) -> Point | None:
    """None for what we have no configuration of, for images and for other methods."""
    name = MODELS.get(row["model"], row["model"].replace("/", "--"))
    config = models / f"{name}.json"
    if not config.is_file() or row["method"] not in ("lora", "qlora") or not row["peak_gb"]:
        return None
    stack = next((name for name in ("torchtune", "axolotl", "ms-swift") if name in row["source"]), "Qwen")
    bits = int(row["bits"].removeprefix("int")[:2].strip())
    length, micro, rank = int(row["seq_len"]), int(row["micro_batch"]), int(row["lora_r"].split()[0])
    footprint = _footprint(config, bits, rank, _targets(row["targets"]), length, upcasts=stack == "axolotl")
    num_tokens = length * micro
    memory = estimate_memory(
        footprint, rows=1, length=num_tokens, activation_checkpointing=True, optimizer="adamw_8bit", on_gpu=True
    )
    body = footprint.body(1, activation_checkpointing=True)
    kept, peak = body.after_forward.at(1, num_tokens), body.peak.at(1, num_tokens)
    logits = num_tokens * footprint.vocab_size
    head = footprint.head_bytes(num_tokens)
    if stack == "torchtune":  # activations offloaded, logits whole in bf16 and upcast in chunks: README, "Optimization flags"
        peak, kept, head = peak - kept, 0.0, 2.0 * logits
    elif "CutCrossEntropy" not in row["notes"]:
        head = footprint.plain_head_bytes_per_logit * logits
    coming = max(peak, kept + head)
    steady = memory.peak_bytes - memory.reserved_bytes
    steady -= memory.activations_bytes + memory.logits_bytes + memory.transient_bytes
    safe = steady + CONTEXT_BYTES + WORKSPACE_BYTES + SAFE_BYTES + (1 + SAFE_SLACK) * coming
    why_not = NOT_COUNTED.get(row["model"], "" if stack in ("torchtune", "axolotl") else "older stack")
    return Point(
        source=stack,
        model=row["model"].split("(")[0],
        bits=bits,
        length=length,
        micro_batch=micro,
        rank=rank,
        published_gib=float(row["peak_gb"]),
        predicted_gib=(steady + coming) / GIB,
        safe_gib=safe / GIB,
        utilisation=_utilisation(row, footprint, length),
        is_counted=not why_not,
        why_not=why_not,
    )


def _targets(text: str) -> str:
    if text in ("all-linear", ""):
        return "all-linear"
    if text.startswith("DEFAULT"):  # ms-swift: the projections of attention
        return "q_proj,k_proj,v_proj,o_proj"
    if "c_attn" in text or text.startswith("model."):  # all, under old Qwen's names or by a pattern
        return ALL_LINEAR
    names = {"q": "q_proj", "v": "v_proj", "o": "o_proj", "mlp": "gate_proj,up_proj,down_proj"}
    return ",".join(names.get(part, part) for part in text.split(","))


_footprints: dict[tuple[Any, ...], Footprint] = {}


def _footprint(config: Path, bits: int, rank: int, targets: str, length: int, *, upcasts: bool) -> Footprint:
    from job.train.dry_model import load_config
    from job.train.dry_run import Plant, dry_run, dtype_of

    traced = min(max(length, 2048), 4096)
    key = (config.name, bits, rank, targets, traced, upcasts)
    if key not in _footprints:
        with tempfile.TemporaryDirectory() as folder:
            shutil.copy(config, Path(folder) / "config.json")
            model = ModelSettings(model_id=folder, load_in_4bit=bits == 4, load_in_8bit=bits == 8)
            lora = LoraSettings.model_validate({"lora_r": rank, "lora_dropout": 0.0, "lora_target_modules": targets})
            dtype = dtype_of("auto", on_gpu=True)
            loaded = load_config(Path(folder), model)
            plant = Plant(config=loaded, model=model, lora=lora, dtype=dtype, length=traced, on_gpu=True, upcasts=upcasts)
            _footprints[key] = dry_run(plant)
    return _footprints[key]


def _utilisation(row: dict[str, str], footprint: Footprint, length: int) -> float | None:
    """Share of the GPU's peak that the published tokens per second mean."""
    gpu = find_gpu("A100 SXM 80GB") if row["gpu"].startswith("A100") else None
    if gpu is None or not gpu.peak_flops or not row["tokens_per_s"]:
        return None
    flops = footprint.flops(1, length, activation_checkpointing=True) / length
    return float(row["tokens_per_s"]) * flops / gpu.peak_flops


def _show(points: list[Point]) -> None:
    table = Table(
        "stack", "model", "bits", "tokens", "published", "predicted", "error", "safe", "of peak speed", "counted", box=None
    )
    for point in points:
        table.add_row(
            point.source,
            point.model,
            str(point.bits),
            f"{point.micro_batch} x {point.length}",
            f"{point.published_gib:.1f}",
            f"{point.predicted_gib:.1f}",
            f"{point.error:+.0%}",
            f"{point.safe_gib:.1f}",
            "" if point.utilisation is None else f"{point.utilisation:.0%}",
            "yes" if point.is_counted else point.why_not,
        )
    Console(width=200).print(table)


if __name__ == "__main__":
    main()
