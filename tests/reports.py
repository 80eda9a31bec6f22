"""Reports for tests: one with everything that a report can tell, and one of a run that failed before anything was known."""

import math
import random
from datetime import UTC, datetime, timedelta
from typing import Any

from report_texts import rich_samples, rich_tally

from job.deliver.compare import compare
from job.deliver.report import Actual, Candidate, Chosen, Happening, Publication, Report
from job.events import Stopped
from job.keep.ledger import Attempt, cost_usd
from job.plan.forecast import Plan
from job.plan.memory import MemoryEstimate
from job.plan.progress import Reforecast
from job.settings import read_settings

START = datetime(2026, 11, 24, 8, 12, 5, tzinfo=UTC)
NUM_STEPS, TOKENS_PER_STEP = 900, 11_840
MIB = 2**20
ROLLED_BACK = "diverged at step 455: back to the last checkpoint before step 446, learning rate x 0.5, steps 446-455 are skipped"
RESUMED = (0, 300, 600)
"""The step that each attempt continued from."""


def rich_report(**changes: Any) -> Report:
    """A run of three attempts on rented GPUs: preempted, rolled back, its machine lost, finished, chosen by score, published."""
    attempts = _attempts()
    curve = _curve()
    losses = {0: 2.412, **{step: _held_out(step) for step in range(100, NUM_STEPS + 1, 100)}}
    candidates = [
        Candidate(step=step, eval_loss=losses[step], perplexity=round(math.exp(losses[step]), 4), score=score)
        for step, score in ((0, 0.25), (700, 0.6667), (800, 0.9167), (900, 0.8333))
    ]
    cost = cost_usd(attempts)
    assert cost is not None
    actual = Actual(
        seconds=round(sum(attempt.seconds for attempt in attempts), 1),
        cost_usd=round(cost, 4),
        num_tokens=NUM_STEPS * TOKENS_PER_STEP,
        num_steps=NUM_STEPS,
        peak_memory_bytes=9861 * MIB,
        device="NVIDIA GeForce RTX 4090",
        energy_kwh=0.742,
    )
    plan, reforecast = _plan(), _reforecast()
    fields: dict[str, Any] = {
        "run_id": "Qwen2.5-1.5B-Instruct-3f9c1ab2",
        "stopped": Stopped.FINISHED,
        "exit_status": 0,
        "reason": None,
        "plan": plan,
        "reforecast": reforecast,
        "memory_factor": 1.041,
        "comparison": compare(
            plan,
            reforecast,
            seconds=actual.seconds,
            num_tokens=actual.num_tokens,
            peak_memory_bytes=actual.peak_memory_bytes,
            cost_usd=cost,
        ),
        "actual": actual,
        "data": rich_tally(),
        "attempts": attempts,
        "curve": curve,
        "evaluations": [{"step": step, "eval_loss": loss} for step, loss in losses.items()],
        "candidates": candidates,
        "chosen": Chosen(**candidates[2].model_dump(), by="score"),
        "happenings": _happenings(),
        "publication": Publication(
            repo_id="pusula/qwen2.5-1.5b-pusula",
            revision="main",
            commit="8d1f0c2b7a64e1f09c3d5b8e2a7f4c6d9e0b1a23",
            url="https://huggingface.co/pusula/qwen2.5-1.5b-pusula",
        ),
        "samples": rich_samples(),
        "model": {"id": "Qwen/Qwen2.5-1.5B-Instruct", "revision": "989aa7980e4cf806f80c7fef2b1adb7bc71aa306"},
        "settings": rich_settings(),
        "versions": {
            "torch": "2.9.1",
            "transformers": "5.6.0",
            "trl": "0.29.0",
            "peft": "0.19.0",
            "bitsandbytes": "not installed",
        },
    }
    return Report(**{**fields, **changes})


def bare_report(**changes: Any) -> Report:
    """A run that ended before a model or data were there."""
    fields: dict[str, Any] = {
        "run_id": "r-1",
        "stopped": Stopped.CRASHED,
        "exit_status": 3,
        "reason": "owner/data: no such data set on the Hub; correct DATASETS",
        "plan": None,
        "actual": Actual(seconds=0.0, cost_usd="unknown", num_tokens=0, num_steps=0, peak_memory_bytes=None, device=None),
        "data": None,
        "attempts": [],
        "evaluations": [],
        "chosen": None,
        "publication": None,
        "samples": [],
        "model": {},
        "settings": {},
        "versions": {},
    }
    return Report(**{**fields, **changes})


def rich_settings() -> dict[str, Any]:
    environ = {
        "MODEL_ID": "Qwen/Qwen2.5-1.5B-Instruct",
        "DATASETS": "pusula/soru-cevap?split=train&weight=2,mlabonne/FineTome-100k?split=train[:8000]",
        "EVAL_DATASETS": "pusula/soru-cevap?split=test",
        "LANGUAGE": "tr,en",
        "NUM_TRAIN_EPOCHS": "2",
        "LORA_R": "32",
        "LORA_ALPHA": "64",
        "LORA_TARGET_MODULES": "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj",
        "MAX_LENGTH": "1024",
        "EVAL_STEPS": "100",
        "TRAIN_ARGS": '{"neftune_noise_alpha": 5, "adam_beta2": 0.95}',
        "MAX_COST_USD": "1.25",
        "OUTPUT_URI": "s3://runs/qlora",
        "HUB_MODEL_ID": "pusula/qwen2.5-1.5b-pusula",
    }
    settings = read_settings(environ, {}).settings.without_secrets()
    prompts = [{"prompt": sample.prompt, "scorer": sample.scorer} for sample in rich_samples()]
    settings["evaluate"] |= {"select_by": "score", "eval_prompts": prompts}
    return settings


def _attempts() -> list[Attempt]:
    rows = (
        # starts after, runs for (minutes), first and last step, machine, price, end
        (0.0, 37.4, 0, 312, "gpu-7f3a", 0.44, Stopped.PREEMPTED),
        (58.0, 41.0, 300, 641, "gpu-11c9", 0.44, Stopped.CRASHED),
        (131.0, 33.2, 600, 900, "gpu-82d0", 0.69, Stopped.FINISHED),
    )
    return [
        Attempt(
            started=START + timedelta(minutes=after),
            ended=START + timedelta(minutes=after + minutes),
            machine=machine,
            price_usd_per_hour=price,
            first_step=first,
            last_step=last,
            stopped=stopped,
        )
        for after, minutes, first, last, machine, price, stopped in rows
    ]


def _happenings() -> list[Happening]:
    rows = (
        (5.2, None, "out of memory: continuing with micro-batch 4 x 4, the same examples per step"),
        (81.5, 455, ROLLED_BACK),
        (97.9, 633, "no word from the trainer for 10 minutes; its stacks are in stacks.txt of the run; starting it again"),
    )  # fmt: skip
    return [Happening(at=START + timedelta(minutes=after), step=step, text=text) for after, step, text in rows]


def _held_out(step: int) -> float:
    return round(1.18 + 1.2 * math.exp(-step / 190) + (0.012 * (step - 800) / 100 if step > 800 else 0.0), 4)


def _curve() -> list[dict[str, float | None]]:
    dice = random.Random(7)
    rows: list[dict[str, float | None]] = []
    seconds = 0.0
    for step in range(1, NUM_STEPS + 1):
        if step - 1 in RESUMED:
            seconds = 0.0
        seconds += (6.1 if step <= 600 else 5.2) * dice.uniform(0.93, 1.12) + (9 if step - 1 in RESUMED else 0)
        rate = 2e-4 * min(1.0, step / 27) * (0.5 + 0.5 * math.cos(math.pi * step / NUM_STEPS)) * (1 if step < 446 else 0.5)
        norm = (0.42 + 3.4 * math.exp(-step / 35)) * math.exp(dice.gauss(0, 0.22)) * (6 if step in (447, 448, 702) else 1)
        rows.append(
            {
                "step": step,
                "loss": round(1.12 + 1.3 * math.exp(-step / 150) + dice.gauss(0, 0.085), 4),
                "learning_rate": rate,
                "grad_norm": round(norm, 4),
                "num_tokens": step * TOKENS_PER_STEP,
                "seconds": round(seconds, 2),
                "memory_bytes": (8420 + 1441 * (1 - math.exp(-step / 90)) // 0.01 * 0.01) * MIB // 1,
            }
        )
    return rows


def _plan() -> Plan:
    memory = MemoryEstimate(
        weights_bytes=1246 * MIB,
        adapter_bytes=141 * MIB,
        gradients_bytes=141 * MIB,
        optimizer_bytes=72 * MIB,
        activations_bytes=4630 * MIB,
        logits_bytes=2318 * MIB,
        transient_bytes=210 * MIB,
        reserved_bytes=846 * MIB,
        safe_peak_bytes=11_350 * MIB,
    )
    return Plan(
        micro_batch=4,
        gradient_accumulation_steps=4,
        effective_batch_size=16,
        num_examples=7196,
        num_steps=NUM_STEPS,
        num_tokens=NUM_STEPS * TOKENS_PER_STEP,
        activation_checkpointing=False,
        memory=memory,
        gpu="RTX 4090",
        memory_bytes=24_080 * MIB,
        fits=True,
        seconds_low=4300.0,
        seconds_high=9100.0,
        training_seconds_low=4000.0,
        training_seconds_high=8500.0,
        cost_usd_low=0.52,
        cost_usd_high=1.11,
        price_usd_per_hour=0.44,
        price_source="job/plan/prices.json, 2026-11-02",
        assumptions=["micro-batch 4 x 4: the largest that fits", "20-50% of 165 TFLOP/s, as published runs reach"],
    )


def _reforecast() -> Reforecast:
    return Reforecast(
        at_step=45,
        seconds=6240.0,
        cost_usd=0.763,
        num_tokens=NUM_STEPS * TOKENS_PER_STEP,
        memory_bytes=9990 * MIB,
        seconds_per_token=0.000518,
    )
