"""What the supervisor does about a trainer that runs out of memory, diverges, hangs or is killed, on ordered faults."""

import json
import re
import shutil
from typing import Any

import psutil
import pytest
from conftest import Job
from fault_proxy import ALWAYS, Fault
from s3_server import KEYS, s3_server

from job.plan.retreat import Fit, Rollback, leaner, roll_back


def steps(job: Job) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (job.kept / "metrics.jsonl").read_text("utf-8").splitlines()]


def test_a_layout_gets_leaner_until_nothing_is_left_and_keeps_the_effective_batch() -> None:
    fit: Fit | None = Fit(micro_batch=12, gradient_accumulation_steps=2)
    seen = []
    while fit is not None:
        seen.append((fit.micro_batch, fit.activation_checkpointing, fit.activation_offloading))
        assert fit.micro_batch * fit.gradient_accumulation_steps == 24
        fit = leaner(fit, is_checkpointing=bool(fit.activation_checkpointing), can_offload=True)
    assert seen == [(12, None, False), (6, None, False), (3, None, False), (1, None, False), (1, True, False), (1, True, True)]


def test_activations_that_are_recomputed_already_go_to_host_memory_next() -> None:
    fit = leaner(Fit(micro_batch=1, gradient_accumulation_steps=4), is_checkpointing=True, can_offload=True)
    assert fit is not None and fit.activation_offloading and fit.activation_checkpointing is None


def test_there_are_two_roll_backs_each_with_half_the_learning_rate() -> None:
    first = roll_back(Rollback(), first_step=5, last_step=7)
    assert first == Rollback(num_rollbacks=1, learning_rate_scale=0.5, skip_steps=(5, 6, 7))
    second = roll_back(first, first_step=6, last_step=9)
    assert second == Rollback(num_rollbacks=2, learning_rate_scale=0.25, skip_steps=(5, 6, 7, 8, 9))
    assert roll_back(second, first_step=1, last_step=1) is None


def test_a_run_that_runs_out_of_memory_goes_on_with_half_the_micro_batch(job: Job) -> None:
    status, output = job.run("run", JOB_FAULT="oom@6", LORA_DROPOUT="0")
    assert status == 0, output
    assert [row["step"] for row in steps(job)] == list(range(13))
    [attempt] = job.report()["attempts"]
    assert (attempt["notes"]["fit"]["micro_batch"], attempt["notes"]["fit"]["gradient_accumulation_steps"]) == (1, 4)
    [happening] = job.report()["happenings"]
    assert happening["step"] == 5
    lean, undisturbed = steps(job), Job(job.folder / "other", job.settings | {"OUTPUT_URI": str(job.folder / "other/runs")})
    assert undisturbed.run("run", LORA_DROPOUT="0")[0] == 0
    for mine, other in zip(lean, steps(undisturbed), strict=True):
        assert mine.get("loss", 0) == pytest.approx(other.get("loss", 0), abs=1e-3)


def test_what_fits_is_known_to_the_next_attempt(job: Job) -> None:
    status, output = job.run("run", JOB_FAULT="oom-above@1,kill@6")
    assert status == 5, output
    status, output = job.run("run", JOB_FAULT="oom-above@1")
    assert status == 0, output
    first, second = job.report()["attempts"]
    assert first["notes"]["fit"]["micro_batch"] == 1 and "fit" not in second["notes"], "it ran out of memory once more"
    assert second["first_step"] > 0


def test_a_model_that_fits_in_no_layout_exits_4(job: Job) -> None:
    status, output = job.run("run", JOB_FAULT="oom-above@0")
    assert status == 4, output
    assert job.report()["stopped"] == "out_of_memory"
    assert [happening["text"].count("recomputed") for happening in job.report()["happenings"]] == [0, 1]


def test_a_run_that_diverges_goes_back_and_finishes_with_a_lower_learning_rate(job: Job) -> None:
    status, output = job.run("run", JOB_FAULT="nan@7", LR_SCHEDULER_TYPE="constant", WARMUP_STEPS="0")
    assert status == 0, output
    rates = {row["step"]: row["learning_rate"] for row in steps(job) if "learning_rate" in row}
    assert rates[4] == 0.01 and rates[12] == 0.005
    assert all(abs(row.get("loss", 0)) < 100 for row in steps(job))
    assert job.report()["attempts"][0]["notes"]["rollback"]["skip_steps"] == [7]


def test_a_run_that_diverges_again_and_again_exits_7_and_names_the_examples(job: Job) -> None:
    in_order = {"ORDER": "as-is", "EVAL_FRACTION": "0", "LR_SCHEDULER_TYPE": "constant", "WARMUP_STEPS": "0"}
    status, output = job.run("run", JOB_FAULT="nan@7*,nan@8*,nan@9*", **in_order)
    assert status == 7, output
    report = job.report()
    assert report["stopped"] == "diverged" and len(report["happenings"]) == 2
    named = {int(row) for row in re.findall(r"conversations\.jsonl row (\d+)", report["reason"])}
    assert named and named <= set(range(24, 36)), "steps 7 to 9 of four examples each, in the order of the file"


def test_a_trainer_that_hangs_leaves_its_stacks_and_is_started_once_more(job: Job) -> None:
    status, output = job.run("run", JOB_FAULT="hang@6", HANG_SECONDS="30")
    assert status == 0, output
    assert "_strike" in (job.kept / "stacks.txt").read_text("utf-8")
    assert len(job.report()["happenings"]) == 1


def test_a_trainer_that_hangs_twice_exits_5(job: Job) -> None:
    status, output = job.run("run", JOB_FAULT="hang@6*", HANG_SECONDS="30")
    assert status == 5, output
    assert job.report()["stopped"] == "crashed"
    assert not [
        process for process in psutil.process_iter(["cmdline"]) if str(job.folder) in " ".join(process.info["cmdline"] or ())
    ]


OVERFITTING = {
    "MAX_STEPS": "60",
    "NUM_TRAIN_EPOCHS": "60",
    "LEARNING_RATE": "0.05",
    "LR_SCHEDULER_TYPE": "constant",
    "EVAL_FRACTION": "0.4",
    "EVAL_STEPS": "3",
    "EARLY_STOPPING_PATIENCE": "2",
    "SAVE_STEPS": "1000",
}


def test_a_run_that_overfits_stops_early_and_delivers_its_best_checkpoint(job: Job) -> None:
    status, output = job.run("run", **OVERFITTING)
    assert status == 0, output
    report = job.report()
    losses = {row["step"]: row["eval_loss"] for row in report["evaluations"] if row["step"] > 0}
    best = int(min(losses, key=lambda step: losses[step]))
    assert (report["chosen"]["step"], report["chosen"]["eval_loss"], report["chosen"]["by"]) == (best, losses[best], "eval_loss")
    assert best < max(losses) < 60
    kept = (job.kept / f"checkpoints/step-{best:06d}/adapter_model.safetensors").read_bytes()
    assert (job.kept / "adapter/adapter_model.safetensors").read_bytes() == kept


def test_an_early_stop_that_was_killed_before_its_end_ends_the_same_on_another_machine(job: Job) -> None:
    other = Job(job.folder / "other", job.settings | {"OUTPUT_URI": str(job.folder / "other/runs")})
    assert other.run("run", **OVERFITTING)[0] == 0
    last = int(other.report()["evaluations"][-1]["step"])
    status, output = job.run("run", JOB_FAULT=f"kill-sample@{last}", **OVERFITTING)
    assert status == 5, output
    shutil.rmtree(job.folder / "work")
    status, output = job.run("run", **OVERFITTING)
    assert status == 0, output
    assert job.report()["chosen"] == other.report()["chosen"]
    assert [sample["after"] for sample in job.report()["samples"]] == [sample["after"] for sample in other.report()["samples"]]
    adapters = [one.kept / "adapter/adapter_model.safetensors" for one in (job, other)]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()


def test_a_store_that_refuses_the_adapter_is_told_in_the_report_and_the_next_start_finishes(job: Job) -> None:
    with s3_server() as server:
        keys = {f"AWS_{name.removeprefix('aws_').upper()}": value for name, value in KEYS.items() if name.startswith("aws_")}
        settings = {
            **keys,
            "AWS_REGION": KEYS["region_name"],
            "OUTPUT_URI": "s3://bucket",
            "AWS_ENDPOINT_URL_S3": server.proxy.url,
        }
        server.proxy.add(Fault(kind="error", code="AccessDenied", method="PUT", path="/r/adapter/", times=ALWAYS))
        status, output = job.run("run", **settings)
        assert status == 2, output
        report = json.loads(server.client.get_object(Bucket="bucket", Key="r/report.json")["Body"].read())
        assert (report["stopped"], report["exit_status"]) == ("crashed", 2)
        server.proxy.clear()
        status, output = job.run("run", **settings)
        assert status == 0, output
        assert {"r/DONE", "r/adapter/manifest.json"} <= set(server.names())
