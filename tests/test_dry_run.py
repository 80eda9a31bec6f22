"""Footprints: what fake tensors tell of a model against what the real one does, on real tiny models and published shapes."""

import json
import shutil
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from conftest import ROOT
from torch._subclasses.fake_tensor import FakeTensorMode

from job.plan.footprint import PLAIN_LOGITS, Footprint
from job.plan.formula import estimate_footprint
from job.settings import LoraSettings, ModelSettings
from job.train.dry_model import build, load_config, make_fake, plan_cuts, with_adapters
from job.train.dry_pass import one_pass
from job.train.dry_run import Plant, dry_run, dtype_of
from job.train.gauge import Gauge
from job.train.loss import plain_loss
from job.train.model import load_model, lora_config, train_in_fp32
from job.train.order import tokens_of_steps
from job.train.spec import TrainSpec

MODELS = ROOT / "benchmarks/models"
torch.set_num_threads(1)  # threads that wait for each other on busy cores take ten times as long


def shape(folder: Path, name: str, **model: Any) -> tuple[Any, ModelSettings]:
    shutil.copy(MODELS / f"{name}.json", folder / "config.json")
    settings = ModelSettings.model_validate({"model_id": str(folder), **model})
    return load_config(folder, settings), settings


@cache
def published(name: str, length: int, **options: Any) -> Footprint:
    """Of one of the published shapes; a trace takes seconds, so it is shared."""
    with TemporaryDirectory() as folder:
        config, settings = shape(
            Path(folder), name, **{key: options.pop(key) for key in list(options) if key.startswith("load_")}
        )
        return measure(config, settings, length=length, **options)


def measure(config: Any, model: ModelSettings, *, length: int, on_gpu: bool = True, **lora: Any) -> Footprint:
    return dry_run(
        Plant(
            config=config,
            model=model,
            lora=LoraSettings.model_validate(lora),
            dtype=dtype_of(model.dtype, on_gpu=on_gpu),
            length=length,
            on_gpu=on_gpu,
        )
    )


def write_model(folder: Path, kind: str) -> Path:
    """A tiny real model of another architecture, weights and all."""
    from transformers import GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    if kind == "gpt2":
        model: Any = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=64, n_layer=3, n_head=4, n_positions=256))
    else:
        model = Qwen2ForCausalLM(
            Qwen2Config(
                vocab_size=400,
                hidden_size=96,
                intermediate_size=256,
                num_hidden_layers=5,
                num_attention_heads=6,
                num_key_value_heads=2,
                max_position_embeddings=256,
                tie_word_embeddings=False,
            )
        )
    model.save_pretrained(folder)
    return folder


def really_kept(folder: Path, settings: ModelSettings, *, rows: int, length: int, recomputes: bool) -> tuple[int, int, int]:
    """(bytes that autograd keeps, trained parameters, all parameters) of the model as the trainer builds it."""
    from peft import get_peft_model

    spec = TrainSpec.model_construct(model=settings, model_dir=folder)  # type: ignore[call-arg]
    base = load_model(spec)
    num_parameters = sum(
        p.numel() for name, p in base.named_parameters() if not hasattr(p, "quant_state") or p.quant_state is None
    )
    num_parameters += sum(p.quant_state.shape.numel() for p in base.parameters() if getattr(p, "quant_state", None) is not None)
    model = get_peft_model(base, lora_config(LoraSettings()))
    train_in_fp32(model)
    if recomputes:
        model.activation_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    model.train()
    ids = torch.randint(0, 200, (rows, length))
    inputs: dict[str, Any] = {"input_ids": ids}
    if rows > 1:
        mask = torch.ones_like(ids)
        mask[0, -length // 4 :] = 0
        inputs["attention_mask"] = mask
    gauge = Gauge()
    with gauge.look(model, ids):
        loss = plain_loss(model(**inputs, use_cache=False).logits, ids, ids.numel())
    loss.backward()
    measured = gauge.take()
    assert measured is not None and gauge.take() is None
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return measured.saved_bytes, trained, num_parameters


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_what_autograd_keeps_is_predicted_within_five_per_cent(kind: str, tiny_model: Path, tmp_path: Path) -> None:
    folder = tiny_model if kind == "llama" else write_model(tmp_path, kind)
    settings = ModelSettings(model_id=str(folder))
    footprint = measure(load_config(folder, settings), settings, length=128, on_gpu=False)
    for rows, length, recomputes in ((1, 128, False), (3, 128, False), (2, 96, False), (1, 128, True), (3, 96, True)):
        kept, trained, num_parameters = really_kept(folder, settings, rows=rows, length=length, recomputes=recomputes)
        predicted = footprint.saved_bytes(rows, length, activation_checkpointing=recomputes)
        assert predicted == pytest.approx(kept, rel=0.05), (rows, length, recomputes)
    assert (footprint.num_trainable, footprint.num_parameters) == (trained, num_parameters)


@pytest.mark.parametrize("recomputes", [False, True])
def test_layers_that_are_left_out_are_added_up_exactly(recomputes: bool, tmp_path: Path) -> None:
    """The whole model run at once, which the cuts must add up to."""
    settings = ModelSettings(model_id=str(write_model(tmp_path, "qwen2")))
    config = load_config(tmp_path, settings)
    body = measure(config, settings, length=130).body(1, activation_checkpointing=recomputes)
    model, _ = with_adapters(lambda: build(config, settings, torch.bfloat16)[0], LoraSettings())
    with FakeTensorMode(allow_non_fake_inputs=True):
        make_fake(model, torch.bfloat16)
        for _ in range(2):  # in the first pass bitsandbytes converts the biases
            whole = one_pass(model, 130, recomputes=recomputes, is_padded=False, autocasts=True)
    assert body.saved.at(1, 130) == pytest.approx(whole.saved.total, rel=1e-6)
    assert body.after_forward.at(1, 130) == pytest.approx(whole.after_forward.total, rel=0.06)
    assert body.peak.at(1, 130) == pytest.approx(whole.peak.total, rel=0.05)
    assert body.flops_per_token * 130 + body.attention_flops_per_pair * 130**2 == pytest.approx(whole.flops, rel=1e-6)


def test_each_kind_of_layer_is_run_once_and_once_more() -> None:
    assert [(cut.layers, cut.more) for cut in plan_cuts(["a"] * 5)] == [((0,), 0), ((0, 1), 4)]
    mixed = plan_cuts(["local", "local", "full", "local"])
    assert [(cut.layers, cut.more) for cut in mixed] == [((0, 2), 0), ((0, 1, 2), 2)]
    assert [(cut.layers, cut.more) for cut in plan_cuts(["a"])] == [((0,), 0)]


def test_a_llama_of_eight_billion_is_weighed_as_bitsandbytes_packs_it() -> None:
    footprint = published("meta-llama--Llama-3.1-8B-Instruct", 2048)
    weights = footprint.weights
    assert footprint.num_parameters == 8_030_261_248
    # 32 layers of 218,103,808 quantised weights at half a byte; embeddings, head and norms in bfloat16.
    assert weights.quantised_bytes == 32 * 218_103_808 // 2
    assert weights.unquantised_bytes == 2 * (2 * 128_256 * 4096 + 65 * 4096)
    assert weights.quantisation_state_bytes == pytest.approx(32 * 218_103_808 / 64 * (1 + 4 / 256), rel=0.01)
    assert footprint.num_trainable == 41_943_040  # what PEFT prints for r=16 on all linear layers
    recomputed, kept = (footprint.body(1, activation_checkpointing=value) for value in (True, False))
    assert 1.0 < recomputed.peak.at(1, 2048) / 2**30 < 1.8
    assert 15 < kept.saved.at(1, 2048) / 2**30 < 25
    # Forward 2 x parameters of the layers a token, backward as much, recomputation once more.
    layers = 32 * 218_103_808
    assert recomputed.flops_per_token == pytest.approx(3 * 2 * layers, rel=0.05)
    assert kept.flops_per_token == pytest.approx(2 * 2 * layers, rel=0.05)


def test_fused_experts_stay_in_sixteen_bits_and_the_plan_says_so() -> None:
    footprint = published("Qwen--Qwen3-30B-A3B", 256)
    assert footprint.weights.unquantised_experts_bytes == 48 * 128 * 3 * 2048 * 768 * 2
    assert footprint.weights.total_bytes > 55 * 2**30
    assert any("does not quantise" in note for note in footprint.notes)
    assert any(problem.startswith("LORA_DROPOUT=0.05") for problem in footprint.problems)


def test_a_text_model_inside_a_multimodal_one_is_found_and_its_tower_is_weighed() -> None:
    footprint = published("google--gemma-3-27b-it", 1024)
    assert footprint.num_parameters == pytest.approx(27.43e9, rel=0.001)
    assert (footprint.num_layers, footprint.vocab_size) == (62, 262_208)
    assert 12 < footprint.weights.total_bytes / 2**30 < 17


def test_eight_bits_and_sixteen_bits_are_weighed() -> None:
    coder = "Qwen--Qwen2.5-Coder-1.5B-Instruct"
    eight = published(coder, 256, load_in_4bit=False, load_in_8bit=True)
    sixteen = published(coder, 256, load_in_4bit=False)
    assert eight.weights.quantised_bytes == pytest.approx(1.31e9, rel=0.01)
    assert (sixteen.weights.quantised_bytes, sixteen.weights.quantisation_state_bytes) == (0, 0)
    assert sixteen.weights.total_bytes == 2 * 1_543_714_304
    kept = [one.body(1, activation_checkpointing=True).saved.at(1, 256) for one in (eight, sixteen)]
    assert kept[0] == pytest.approx(kept[1], rel=0.1)  # 8-bit layers let go of their inputs when activations are recomputed


def test_attention_that_a_model_lacks_is_a_problem_with_its_way_out(tmp_path: Path) -> None:
    config, settings = shape(tmp_path, "EleutherAI--gpt-neo-1.3B")
    footprint = measure(config, settings, length=128)
    assert any(problem.startswith("ATTN_IMPLEMENTATION=sdpa") and "eager" in problem for problem in footprint.problems)


@pytest.mark.parametrize(("name", "length"), [("meta-llama--Llama-3.1-8B-Instruct", 2048), ("google--gemma-3-27b-it", 1024)])
def test_the_formula_is_on_the_large_side_of_the_trace(name: str, length: int, tmp_path: Path) -> None:
    _, settings = shape(tmp_path, name)
    traced = published(name, length)
    values = json.loads((tmp_path / "config.json").read_text())
    formula = estimate_footprint(values, settings, LoraSettings(), on_gpu=True, reason="asked")
    assert (formula.method, traced.method) == ("formula", "traced")
    assert formula.weights.total_bytes == pytest.approx(traced.weights.total_bytes, rel=0.2)
    for recomputes in (False, True):
        ratio = formula.body(1, activation_checkpointing=recomputes).peak.at(1, 1024) / traced.body(
            1, activation_checkpointing=recomputes
        ).peak.at(1, 1024)
        assert 0.98 < ratio < 1.6, recomputes
    assert formula.flops(1, 1024, activation_checkpointing=True) == pytest.approx(
        traced.flops(1, 1024, activation_checkpointing=True), rel=0.15
    )


def test_the_head_is_whole_below_the_threshold_and_in_tiles_above() -> None:
    footprint = published("meta-llama--Llama-3.1-8B-Instruct", 2048)
    below = PLAIN_LOGITS // footprint.vocab_size
    assert footprint.head_bytes(below) > 2 * footprint.head_bytes(below + 1)
    assert footprint.head_flops(below + 1) > 1.4 * footprint.head_flops(below)


@pytest.mark.parametrize("is_shuffled", [True, False])
def test_tokens_of_a_cut_epoch_follow_the_order_of_the_sampler(is_shuffled: bool) -> None:
    import numpy as np
    from accelerate.data_loader import SeedableRandomSampler

    lengths = np.random.default_rng(3).integers(5, 90, size=53)
    sampler = SeedableRandomSampler(range(53), generator=torch.Generator(), data_seed=42)
    expected = 0
    for step in range(17):  # epochs of 7 steps, the last one of 5 examples
        sampler.set_epoch(step // 7)
        order = list(sampler) if is_shuffled else list(range(53))
        expected += int(lengths[order[step % 7 * 8 : step % 7 * 8 + 8]].sum())
    found = tokens_of_steps(lengths, num_steps=17, examples_per_step=8, seed=42, is_shuffled=is_shuffled)
    assert found == expected
