"""Real small parts for the tests: a tiny model with its tokenizer, and a way to start the job as a user does."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from job.keep.store import Store, open_store

if TYPE_CHECKING:
    from s3_server import S3Server

ROOT = Path(__file__).resolve().parent.parent
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_tiny_model(folder: Path, kind: str = "llama") -> Path:
    """A Llama of two layers, or a Qwen2 of four, with random weights and a byte-level tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=TEMPLATE,
    )
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind,
        vocab_size=len(fast),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2 if kind == "llama" else 4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        eos_token_id=fast.eos_token_id,
        pad_token_id=fast.pad_token_id,
        tie_word_embeddings=True,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny-llama"))


def write_conversations(path: Path, count: int) -> Path:
    """Short conversations as JSON lines."""
    rows = [{"prompt": f"What follows {number}?", "completion": f"{number + 1} follows."} for number in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


@pytest.fixture(scope="session")
def conversations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_conversations(tmp_path_factory.mktemp("data") / "conversations.jsonl", 64)


_footprints: Path | None = None


@pytest.fixture(scope="session", autouse=True)
def footprints(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """Where all runs of a test session keep what tracing a model has found: it takes seconds, and most models are the same."""
    global _footprints
    base = tmp_path_factory.getbasetemp()
    _footprints = (base.parent if hasattr(request.config, "workerinput") else base) / "footprints"
    _footprints.mkdir(exist_ok=True)
    return _footprints


def share_footprints(job: "Job", footprints: Path) -> None:
    """Have a run of a class that pytest imports a second time, as test modules do, find what others have traced."""
    link = Path(job.settings["WORK_DIR"]) / "footprints"
    link.parent.mkdir(parents=True, exist_ok=True)
    if not link.exists():
        link.symlink_to(footprints)


class Job:
    """Starts `python -m job` in a clean environment, with everything it writes below one folder."""

    def __init__(self, folder: Path, settings: Mapping[str, str]) -> None:
        self.folder = folder
        if _footprints is not None and "WORK_DIR" not in settings:
            (folder / "work").mkdir(parents=True, exist_ok=True)
            (folder / "work/footprints").symlink_to(_footprints)
        self.settings = {"OUTPUT_URI": str(folder / "runs"), "RUN_ID": "r", "WORK_DIR": str(folder / "work"), **settings}

    def environ(self, **settings: str) -> dict[str, str]:
        inherited = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
        fixed = {"PYTHONPATH": str(ROOT), "HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1"}
        return {**inherited, **fixed, **self.settings, **settings}

    def start(self, *arguments: str, **settings: str) -> subprocess.Popen[str]:
        """Start in a process group of its own; the folder is the current one."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return subprocess.Popen(
            [sys.executable, "-m", "job", *arguments],
            env=self.environ(**settings),
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, *arguments: str, **settings: str) -> tuple[int, str]:
        """Run to the end; returns (exit status, all that was printed)."""
        process = self.start(*arguments, **settings)
        output, _ = process.communicate(timeout=240)
        return process.returncode, output

    @property
    def kept(self) -> Path:
        return self.folder / "runs" / "r"

    def report(self) -> dict[str, Any]:
        report: dict[str, Any] = json.loads((self.kept / "report.json").read_text("utf-8"))
        return report


def small_run(model: Path, data: Path) -> dict[str, str]:
    """Settings that train the tiny model for 12 steps in a few seconds."""
    return {
        "MODEL_ID": str(model),
        "DATASETS": str(data),
        "MAX_LENGTH": "128",
        "EFFECTIVE_BATCH_SIZE": "4",
        "PER_DEVICE_TRAIN_BATCH_SIZE": "2",
        "MAX_STEPS": "12",
        "SAVE_STEPS": "4",
        "LEARNING_RATE": "0.01",
        "EVAL_FRACTION": "0.1",
        "HF_HUB_OFFLINE": "1",
        "EVAL_MAX_NEW_TOKENS": "6",
    }


@pytest.fixture
def job(tmp_path: Path, tiny_model: Path, conversations: Path) -> Job:
    """A small run with a folder of its own."""
    return Job(tmp_path, small_run(tiny_model, conversations))


@pytest.fixture(scope="module")
def server() -> "Iterator[S3Server]":
    """An S3 server behind a proxy that can break the way to it."""
    from s3_server import s3_server  # moto takes a second, and most tests need no store

    with s3_server() as server:
        yield server


@pytest.fixture(params=["folder", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """Each kind of store in turn; a module that asks for it says in its fixture `s3` how the second is reached."""
    if request.param == "folder":
        return open_store(str(tmp_path / "store"))
    made: Store = request.getfixturevalue("s3")
    return made
