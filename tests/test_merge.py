"""Merging: the merged model says what base and adapter say together, is a model of its own, and is not begun without room."""

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, write_tiny_model

from job.errors import MachineError, PublishError, SettingsError
from job.events import EVENTS_FD, EventWriter
from job.settings import ModelSettings
from job.train.merge_room import Weights, check_merge_room, count_weights, free_memory_bytes
from job.train.spec import MergeSpec

PLANTED = "planted-place"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose name must be in nothing that is published, with two base models in it."""
    folder = tmp_path_factory.mktemp(PLANTED)
    write_tiny_model(folder / "tied", "llama")
    write_tiny_model(folder / "qwen", "qwen2")
    return folder


def make_adapter(model_dir: Path, folder: Path, *, base: str = "owner/base", **options: Any) -> Path:
    """An adapter with random weights, with the tokenizer; the base model is named as trainings name it."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(1)
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options})
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(model_dir), config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name or "lora_embedding_A" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    adapted.save_pretrained(str(folder))
    AutoTokenizer.from_pretrained(model_dir).save_pretrained(str(folder))
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | {"base_model_name_or_path": base}), "utf-8")
    return folder


def spec_of(model_dir: Path, adapter_dir: Path, target: Path) -> MergeSpec:
    model = ModelSettings(model_id=str(model_dir))
    return MergeSpec(model=model, model_dir=model_dir, adapter_dir=adapter_dir, target=target, public_name="owner/base")


def run_merge(spec: MergeSpec) -> Path:
    from job.train.merge import merge

    merge(spec, EventWriter(None))
    return spec.target


def logits_of(model: Any) -> Any:
    import torch

    with torch.no_grad():
        return model.float().eval()(torch.arange(1, 65).reshape(2, 32)).logits


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "all linear layers": ("tied", {}),
    "another architecture": ("qwen", {}),
    "rank-stabilised, two layers": ("tied", {"use_rslora": True, "target_modules": ["q_proj", "down_proj"]}),
    "weight-decomposed": ("tied", {"use_dora": True}),
    "the output layer that shares the embeddings' weights": ("tied", {"target_modules": ["q_proj", "lm_head"]}),
    "the embeddings that share the output layer's weights": ("tied", {"target_modules": ["q_proj", "embed_tokens"]}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_merged_model_says_what_base_and_adapter_say_together(case: str, place: Path, tmp_path: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    name, options = CASES[case]
    adapter = make_adapter(place / name, tmp_path / "adapter", **options)
    target = run_merge(spec_of(place / name, adapter, tmp_path / "merged"))
    base = AutoModelForCausalLM.from_pretrained(place / name, dtype=torch.bfloat16)
    before = logits_of(base)
    expected = logits_of(PeftModel.from_pretrained(base, str(adapter)))
    model = AutoModelForCausalLM.from_pretrained(target)
    assert model.dtype is torch.bfloat16
    got = logits_of(model)
    effect = (expected - before).abs().mean()
    assert effect > 0.05, "the adapter changes what is said"
    # bfloat16 has 8 bits: each weight is rounded by 0.2% on average, once.
    assert (got - expected).abs().mean() < 0.05 * effect
    is_untied = "share" in case
    assert model.config.tie_word_embeddings is not is_untied


def test_the_merged_folder_is_a_model_of_its_own_and_names_no_place(place: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, GenerationConfig

    adapter = make_adapter(place / "tied", place / "adapter")
    target = run_merge(spec_of(place / "tied", adapter, place / "merged"))
    names = {path.name for path in target.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= names
    assert not any("adapter" in name for name in names) and "README.md" not in names
    for path in target.rglob("*"):
        if path.is_file():
            assert PLANTED.encode() not in path.read_bytes(), path
    config = json.loads((target / "config.json").read_text("utf-8"))
    assert "quantization_config" not in config and config["dtype"] == "bfloat16"
    assert AutoTokenizer.from_pretrained(target).chat_template
    assert GenerationConfig.from_pretrained(target).eos_token_id is not None
    assert not (place / "merged.partial").exists()


def start_child(spec: MergeSpec, folder: Path) -> tuple[int, str, str]:
    """Exit status, events and standard error."""
    (folder / "spec.json").write_text(spec.model_dump_json(), "utf-8")
    reader, writer = os.pipe()
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", EVENTS_FD: str(writer)}
    command = [sys.executable, "-m", "job.child", "merge", str(folder / "spec.json")]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=env, stdin=pipe, stdout=pipe, stderr=pipe, text=True, pass_fds=(writer,)) as child:
        os.close(writer)
        with os.fdopen(reader) as events:
            told = events.read()
        assert child.stderr is not None and child.stdin is not None
        errors = child.stderr.read()  # the child ends by itself; its standard input stays open until then
        return child.wait(120), told, errors


@pytest.mark.slow
def test_the_child_process_merges(place: Path, tmp_path: Path) -> None:
    adapter = make_adapter(place / "tied", tmp_path / "adapter")
    status, events, errors = start_child(spec_of(place / "tied", adapter, tmp_path / "merged"), tmp_path)
    assert status == 0, errors
    assert "merging the adapter into" in events and "saving the merged model" in events
    assert (tmp_path / "merged/model.safetensors").is_file()


def claim_weights(folder: Path, shapes: dict[str, list[int]], name: str = "model.safetensors") -> Path:
    """A file of weights that is all header."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = {name: {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]} for name, shape in shapes.items()}
    header = json.dumps({"__metadata__": {"format": "pt"}, **entries}).encode()
    (folder / name).write_bytes(struct.pack("<Q", len(header)) + header)
    return folder


def test_a_machine_without_room_is_told_before_anything_is_loaded(place: Path, tmp_path: Path) -> None:
    model_dir = claim_weights(tmp_path / "huge", {"a": [10**6, 10**6], "b": [500]})
    shutil.copy(place / "tied/config.json", model_dir)
    status, events, errors = start_child(spec_of(model_dir, tmp_path, tmp_path / "merged"), tmp_path)
    assert status == MachineError.exit_status and "Traceback" not in errors
    assert "merging 1,000,000,000,500 parameters" in events and "PUBLISH_MERGED=0 and merge elsewhere" in events
    assert "2235.2 GiB of host memory" in events and "merging the adapter" not in events
    assert not (tmp_path / "merged").exists() and not (tmp_path / "merged.partial").exists()


def test_memory_and_disk_are_weighed_with_their_numbers(tmp_path: Path) -> None:
    model_dir = claim_weights(tmp_path / "m", {"a": [2**29]}, "model-00001-of-00002.safetensors")  # a GiB in bfloat16
    claim_weights(model_dir, {"b": [2**28, 2]}, "model-00002-of-00002.safetensors")
    shard = (model_dir / "model-00002-of-00002.safetensors").stat().st_size
    assert count_weights(model_dir) == Weights(2**30, shard)
    gib = 2**30

    def check(memory: float, disk: float) -> Weights:
        return check_merge_room(
            model_dir, tmp_path / "out", free_memory=lambda: int(memory * gib), free_disk=lambda folder: int(disk * gib)
        )

    assert check(2.41, 2.21).num_parameters == 2**30
    with pytest.raises(MachineError, match=r"takes 2\.4 GiB of host memory, and 2\.3 GiB are free"):
        check(2.3, 100)
    with pytest.raises(
        MachineError, match=r"takes 2\.2 GiB of disk, and 2\.1 GiB are free in .*; free some, name another WORK_DIR"
    ):
        check(100, 2.1)


def test_the_largest_file_is_held_in_memory_beside_the_weights(tmp_path: Path) -> None:
    model_dir = claim_weights(tmp_path / "m", {"a": [2**20]})
    with (model_dir / "model.safetensors").open("r+b") as file:
        file.truncate(2**30)  # a sparse file
    with pytest.raises(MachineError, match=r"takes 1\.0 GiB of host memory"):
        check_merge_room(model_dir, tmp_path / "out", free_memory=lambda: 2**29, free_disk=lambda folder: 2**40)


def test_a_containers_limit_counts_and_not_the_whole_machine(tmp_path: Path) -> None:
    whole = free_memory_bytes(tmp_path / "none")
    assert whole > 2**28
    (tmp_path / "memory.max").write_text("1000000\n", "utf-8")
    (tmp_path / "memory.current").write_text("700000\n", "utf-8")
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 200000\n", "utf-8")
    assert free_memory_bytes(tmp_path) == 500_000
    (tmp_path / "memory.max").write_text("max\n", "utf-8")
    assert free_memory_bytes(tmp_path) > 2**28


def test_quantised_weights_are_refused(place: Path, tmp_path: Path) -> None:
    model_dir = tmp_path / "quantised"
    shutil.copytree(place / "tied", model_dir)
    config = json.loads((model_dir / "config.json").read_text("utf-8"))
    quantised = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (model_dir / "config.json").write_text(json.dumps({**config, "quantization_config": quantised}), "utf-8")
    with pytest.raises(SettingsError, match=r"PUBLISH_MERGED=1: .* are quantised \(bitsandbytes\).*round them twice"):
        run_merge(spec_of(model_dir, tmp_path, tmp_path / "merged"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_and_leave_nothing(value: float, place: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    adapter = make_adapter(place / "tied", tmp_path / "adapter")
    tensors = load_file(adapter / "adapter_model.safetensors")
    next(tensor for name, tensor in tensors.items() if "lora_B" in name)[0, 0] = value
    save_file(tensors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PublishError, match=r"PUBLISH_MERGED=1: .*publish the adapter alone"):
        run_merge(spec_of(place / "tied", adapter, tmp_path / "merged"))
    assert not (tmp_path / "merged").exists()


def test_an_older_merged_model_is_replaced(place: Path, tmp_path: Path) -> None:
    adapter = make_adapter(place / "tied", tmp_path / "adapter")
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged/manifest.json").write_text("{}", "utf-8")
    target = run_merge(spec_of(place / "tied", adapter, tmp_path / "merged"))
    assert not (target / "manifest.json").exists() and (target / "model.safetensors").is_file()
