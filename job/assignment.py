"""What a trainer is told: settings, a layout and folders in, one `TrainSpec` out."""

from collections.abc import Mapping
from pathlib import Path

from job.deliver.finish import ADAPTER
from job.keep.checkpoints import CHECKPOINTS
from job.plan.retreat import Fit, Rollback
from job.settings import Settings
from job.train.spec import TrainSpec

CPU_ENVIRON: Mapping[str, str] = {"TORCHDYNAMO_DISABLE": "1"}
"""Compiling for a CPU takes longer than it saves in the short runs that one does there."""


def assign(
    settings: Settings,
    *,
    run_id: str,
    work: Path,
    model_dir: Path,
    data_dir: Path,
    resume_from: Path | None,
    num_steps: int,
    fit: Fit,
    rollback: Rollback,
    save_interval_seconds: float,
    expect_gpu: bool,
    tracker_id: str | None = None,
) -> TrainSpec:
    """The spec of a training, or of an evaluation after it.

    Args:
        work: the run's folder on this machine.
    """
    return TrainSpec(
        model=settings.model,
        lora=settings.lora,
        train=settings.train,
        evaluate=settings.evaluate,
        system_prompt=settings.data.system_prompt,
        model_dir=model_dir,
        data_dir=data_dir,
        checkpoints_dir=work / CHECKPOINTS,
        adapter_dir=work / ADAPTER,
        scratch_dir=work / "trainer",
        resume_from=resume_from,
        micro_batch=fit.micro_batch,
        gradient_accumulation_steps=fit.gradient_accumulation_steps,
        num_steps=num_steps,
        save_interval_seconds=save_interval_seconds,
        save_steps=settings.keep.save_steps,
        save_total_limit=settings.keep.save_total_limit,
        expect_gpu=expect_gpu,
        is_shuffled=settings.data.order == "shuffle",
        activation_checkpointing=fit.activation_checkpointing,
        activation_offloading=fit.activation_offloading,
        learning_rate_scale=rollback.learning_rate_scale,
        skip_steps=rollback.skip_steps,
        run_id=run_id,
        tracker_id=tracker_id,
        trackers_dir=work / "trackers",
    )
