"""What trainers are told: settings, a layout and folders in, one `TrainSpec` and each one's place among the others out."""

import os
import socket
from collections.abc import Callable, Mapping
from pathlib import Path

from job.deliver.finish import ADAPTER
from job.keep.checkpoints import CHECKPOINTS
from job.plan.hardware import one_gpu
from job.plan.nodes import Nodes
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
    order_id: str = "",
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
        num_devices=fit.num_devices,
        parallel=fit.parallel,
        order_id=order_id,
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


def rank_environs(
    nodes: Nodes, environ: Mapping[str, str], *, num_gpus: int, warn: Callable[[str], None]
) -> list[dict[str, str]]:
    """What each of this machine's trainer processes has in its environment: its place, and its device.

    Args:
        nodes: how they are spread over machines.
        num_gpus: of this machine; without one they train on the CPU.
    """
    device = {} if num_gpus else dict(CPU_ENVIRON)
    if nodes.num_processes == 1:
        return [one_gpu(environ, num_gpus, warn) if num_gpus else device]
    if not num_gpus:
        device["OMP_NUM_THREADS"] = environ.get("OMP_NUM_THREADS", str(max(1, _num_cores() // nodes.processes_per_node)))
    port = nodes.master_port or _free_port()
    return [
        {
            **device,
            "RANK": str(nodes.node_rank * nodes.processes_per_node + local_rank),
            "LOCAL_RANK": str(local_rank),
            "WORLD_SIZE": str(nodes.num_processes),
            "LOCAL_WORLD_SIZE": str(nodes.processes_per_node),
            "MASTER_ADDR": nodes.master_address,
            "MASTER_PORT": str(port),
        }
        for local_rank in range(nodes.processes_per_node)
    ]


def _num_cores() -> int:
    return len(os.sched_getaffinity(0))


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
