"""The traps of the stack that would ruin a run in silence, each on a real 4-bit model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from trl import SFTConfig

from job.errors import SettingsError
from job.events import EventWriter
from job.settings import EvaluateSettings, LoraSettings, ModelSettings, TrainSettings
from job.train.faults import Faults
from job.train.loop import Loop
from job.train.model import (
    check_lora_targets,
    keep_gradients_after_evaluation,
    load_model,
    load_tokenizer,
    lora_config,
    train_in_fp32,
)
from job.train.preempt import StopSignal
from job.train.spec import TrainSpec
from job.train.watch import Watch


def spec_for(tiny_model: Path, folder: Path, **lora: Any) -> TrainSpec:
    return TrainSpec(
        model=ModelSettings(model_id=str(tiny_model)),
        lora=LoraSettings(**lora),
        train=TrainSettings(),
        evaluate=EvaluateSettings(),
        system_prompt=None,
        model_dir=tiny_model,
        data_dir=folder,
        checkpoints_dir=folder / "checkpoints",
        adapter_dir=folder / "adapter",
        scratch_dir=folder / "scratch",
        resume_from=None,
        micro_batch=2,
        gradient_accumulation_steps=1,
        num_steps=1,
        save_interval_seconds=100.0,
        save_steps=None,
        expect_gpu=False,
    )


def gradients(model: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}


def test_weights_really_are_in_four_bits(tiny_model: Path, tmp_path: Path) -> None:
    model = load_model(spec_for(tiny_model, tmp_path))
    kinds = {type(module).__name__ for name, module in model.named_modules() if name.endswith("_proj")}
    assert kinds == {"Linear4bit"}
    weight = model.model.layers[0].mlp.up_proj.weight
    assert weight.dtype == torch.uint8 and weight.quant_state.quant_type == "nf4" and weight.quant_state.nested


def test_gradients_are_the_same_after_an_evaluation(tiny_model: Path, tmp_path: Path) -> None:
    model = get_peft_model(load_model(spec_for(tiny_model, tmp_path)), lora_config(LoraSettings(lora_dropout=0.0)))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zeros would keep every gradient of lora_A at 0
            torch.nn.init.normal_(parameter, std=0.1)
    ids = torch.randint(5, 200, (2, 16), generator=torch.Generator().manual_seed(0))
    model.train()
    before = gradients(model, ids)
    model.eval()
    with torch.no_grad():
        model(input_ids=ids)
    model.train()
    after = gradients(model, ids)
    assert before.keys() == after.keys() and len(before) == 2 * 7 * 2
    for name, gradient in before.items():
        assert gradient.abs().max() > 0, name
        assert torch.equal(gradient, after[name]), name


def test_the_kernel_that_has_no_backward_is_switched_off(tiny_model: Path, tmp_path: Path) -> None:
    model = load_model(spec_for(tiny_model, tmp_path))
    layer = model.model.layers[0].mlp.up_proj
    assert layer.support_avx512bf16_for_cpu is False
    layer.support_avx512bf16_for_cpu = True
    keep_gradients_after_evaluation(model)
    assert layer.support_avx512bf16_for_cpu is False


def make_trainer(tiny_model: Path, folder: Path) -> Any:
    spec = spec_for(tiny_model, folder, lora_dropout=0.0)
    rows = {"input_ids": [[5, 6, 7, 8, 9], [10, 11, 12]], "labels": [[-100, -100, 7, 8, 9], [-100, 11, 12]]}
    faults = Faults("", folder)
    return Loop(
        watch=Watch(spec, EventWriter(None), StopSignal(), faults),
        faults=faults,
        model=load_model(spec),
        args=SFTConfig(
            output_dir=str(folder),
            report_to="none",
            use_cpu=True,
            bf16=False,
            max_length=None,
            dataset_kwargs={"skip_prepare_dataset": True},
            activation_checkpointing=False,
        ),
        train_dataset=Dataset.from_dict(rows),
        processing_class=load_tokenizer(spec),
        peft_config=lora_config(spec.lora),
    )


def test_what_is_trained_is_fp32(tiny_model: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tiny_model, tmp_path)
    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    assert {parameter.dtype for parameter in trained} == {torch.bfloat16}, "TRL no longer casts: train_in_fp32 can go"
    train_in_fp32(trainer.model)
    assert {parameter.dtype for parameter in trained} == {torch.float32}


def test_the_loss_from_plain_logits_is_trls_own(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(tiny_model, tmp_path)
    train_in_fp32(trainer.model)
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(2)])
    trainer.model.eval()
    plain = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=torch.tensor(5))
    monkeypatch.setattr("job.train.loop.PLAIN_LOGITS", 0)
    fused = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=torch.tensor(5))
    assert plain.item() > 0
    assert plain.item() == pytest.approx(fused.item(), rel=1e-4)


def test_a_layer_that_does_not_exist_is_told_with_those_that_do(tiny_model: Path, tmp_path: Path) -> None:
    spec = spec_for(tiny_model, tmp_path, lora_target_modules=("q_proj", "c_attn"))
    with pytest.raises(SettingsError, match=r"LORA_TARGET_MODULES=q_proj,c_attn: the model has no layer c_attn; .*down_proj"):
        check_lora_targets(load_model(spec), spec.lora)
