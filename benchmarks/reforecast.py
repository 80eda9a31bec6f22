"""What a run's first steps foretell, beside what came: three models on this machine, on a CPU.

    .venv/bin/python benchmarks/reforecast.py [--json FILE] [--steps N]

In: nothing; two tiny models are made, SmolLM2-135M comes from its package. Out: for each, run time foretold after 5% of the steps
beside the actual one, tokens planned and trained, bytes predicted and kept by autograd; status 1 when the time is off by more
than 10%, the tokens by any, or the bytes by more than 5%. A machine that does other things at the same time makes the time wrong.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a file, from anywhere
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from conftest import write_conversations, write_tiny_model

ROOT = Path(__file__).resolve().parent.parent
MAX_TIME_ERROR, MAX_BYTES_ERROR = 0.10, 0.05
KEPT = re.compile(r"kept ([\d.]+) GiB for its backward pass, ([\d.]+) predicted")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures there too")
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps of the tiny models; a tenth for SmolLM2")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = write_conversations(folder / "conversations.jsonl", 600)
        tiny = {"DATASETS": str(data), "MAX_LENGTH": "128", "MAX_STEPS": str(options.steps), "NUM_TRAIN_EPOCHS": "20"}
        runs = {
            "tiny Llama": {"MODEL_ID": str(write_tiny_model(folder / "llama")), **tiny},
            "tiny Qwen2": {"MODEL_ID": str(write_tiny_model(folder / "qwen2", "qwen2")), **tiny},
            "SmolLM2-135M": {"RECIPE": "smoke", "MAX_STEPS": str(max(options.steps // 10, 20))},
        }
        found = {model: _run(model, settings, folder) for model, settings in runs.items()}
    if options.json:
        options.json.write_text(json.dumps(found, indent=1), "utf-8")
    print(
        f"{'model':<14}{'foretold':>10}{'actual':>10}{'ratio':>8}{'tokens planned':>16}{'trained':>10}{'bytes kept/planned':>20}"
    )
    is_good = True
    for model, row in found.items():
        time, tokens = row["seconds"], row["num_tokens"]
        print(
            f"{model:<14}{time['reforecast']:>9.1f}s{time['actual']:>9.1f}s{time['ratio_to_reforecast']:>8.3f}"
            f"{tokens['planned_low']:>16,.0f}{tokens['actual']:>10,.0f}{row['bytes_ratio']:>20.4f}"
        )
        is_good &= abs(time["ratio_to_reforecast"] - 1) <= MAX_TIME_ERROR and tokens["planned_low"] == tokens["actual"]
        is_good &= abs(row["bytes_ratio"] - 1) <= MAX_BYTES_ERROR
    sys.exit(0 if is_good else 1)


def _run(model: str, settings: dict[str, str], folder: Path) -> dict[str, Any]:
    home = folder / model.replace(" ", "-")
    work = Path("~/.cache/qlora-job").expanduser() if "RECIPE" in settings else home / "work"  # its model is converted once
    environ = {
        **{name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ},
        **{
            "PYTHONPATH": str(ROOT),
            "HF_HUB_OFFLINE": "1",
            "OUTPUT_URI": str(home / "runs"),
            "RUN_ID": "r",
            "WORK_DIR": str(work),
        },
        **{"EFFECTIVE_BATCH_SIZE": "8", "SAVE_INTERVAL": "600", "LEARNING_RATE": "1e-3", **settings},
    }
    done = subprocess.run(
        [sys.executable, "-m", "job", "run"], env=environ, cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((home / "runs/r/report.json").read_text("utf-8"))
    rows: dict[str, Any] = {row["what"]: row for row in report["comparison"]}
    rows["bytes_ratio"] = report["memory_factor"]
    return rows


if __name__ == "__main__":
    main()
