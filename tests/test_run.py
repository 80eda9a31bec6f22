"""The main job from environment to adapter, on a tiny real model: real processes, real signals, real HTTP."""

import hashlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import ROOT, Job, small_run
from hub_server import HubServer
from s3_server import KEYS, s3_server

TOKEN = "hf_plantedtoken0123456789"
AWS_SECRET = "planted/aws/secret/0123456789"


def wait_for(condition: Callable[[], object], process: subprocess.Popen[str], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"ended early: {process.communicate()[0]}"
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.2)


def adapter_digest(folder: Path) -> str:
    return hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()


def manifests(job: Job) -> list[Path]:
    return list(job.kept.glob("checkpoints/*/manifest.json"))


SLOW = {"MAX_STEPS": "3000", "SAVE_STEPS": "5", "NUM_TRAIN_EPOCHS": "300"}
"""Long enough to be stopped on the way, however busy the machine is."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, conversations: Path) -> Job:
    """One run that nothing disturbed, for the tests that only look."""
    looked_at = {
        "SAVE_TOTAL_LIMIT": "2",
        "GPU_HOURLY_RATE": "3.6",
        "EVAL_PROMPTS": "What follows 7?\nWhat follows 8?",
        "HF_TOKEN": TOKEN,
        # This run's processes count towards the coverage; tracing all of them would double the time of the tests.
        **{name: value for name, value in os.environ.items() if name.startswith("COV")},
    }
    job = Job(tmp_path_factory.mktemp("finished"), small_run(tiny_model, conversations) | looked_at)
    status, output = job.run("run")
    assert status == 0, output
    return job


def test_a_run_ends_with_a_lower_loss_and_a_whole_report(finished: Job) -> None:
    report = finished.report()
    assert (report["stopped"], report["exit_status"]) == ("finished", 0)
    assert report["evaluations"][0]["step"] == 0
    assert report["evaluations"][-1]["eval_loss"] < report["evaluations"][0]["eval_loss"]
    chosen, loss = report["chosen"], report["evaluations"][-1]["eval_loss"]
    assert (chosen["step"], chosen["eval_loss"], chosen["by"]) == (12, loss, "eval_loss")
    assert chosen["perplexity"] == pytest.approx(math.exp(loss), abs=1e-3)
    assert report["actual"]["num_steps"] == report["plan"]["num_steps"] == 12
    assert report["actual"]["peak_memory_bytes"] > 50 * 2**20
    assert report["actual"]["cost_usd"] == pytest.approx(report["actual"]["seconds"] / 1000, rel=0.05)
    assert [attempt["stopped"] for attempt in report["attempts"]] == ["finished"]
    assert {sample["prompt"] for sample in report["samples"]} == {"What follows 7?", "What follows 8?"}
    assert all(sample["before"] != sample["after"] for sample in report["samples"])


def test_the_tokens_counted_are_the_tokens_trained_on(finished: Job) -> None:
    steps = [json.loads(line) for line in (finished.kept / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in steps] == list(range(13))
    import datasets

    report = finished.report()
    train = datasets.load_from_disk(str(next(finished.kept.glob("data/*")) / "train"))
    mean = sum(len(ids) for ids in train["input_ids"]) / len(train)
    assert steps[-1]["num_tokens"] == report["actual"]["num_tokens"] == pytest.approx(12 * 4 * mean, rel=0.05)


def test_the_store_holds_whole_checkpoints_the_newest_ones_only(finished: Job) -> None:
    steps = sorted(path.parent.name for path in manifests(finished))
    assert steps == ["step-000008", "step-000012"]
    files = {path.name for path in (finished.kept / "checkpoints/step-000012").iterdir()}
    assert {"adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} <= files


def test_the_adapter_loads_on_its_base_and_changes_the_output(finished: Job, tiny_model: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    adapter = finished.kept / "adapter"
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    ids = torch.tensor([tokenizer("What follows 7?")["input_ids"]])
    before = base(ids).logits
    after = PeftModel.from_pretrained(base, str(adapter))(ids).logits
    assert not torch.allclose(before, after, atol=1e-3)


def test_no_secret_and_no_folder_of_this_machine_is_published(finished: Job, tiny_model: Path) -> None:
    written = [path for path in [*finished.kept.rglob("*"), *(finished.folder / "work").rglob("*")] if path.is_file()]
    assert len(written) > 20
    for path in written:
        assert TOKEN.encode() not in path.read_bytes(), path
    card = (finished.kept / "adapter/README.md").read_text("utf-8")
    assert str(tiny_model.parent) not in card and str(finished.folder) not in card


def test_a_second_start_says_that_the_run_is_done(finished: Job) -> None:
    begun = time.monotonic()
    status, output = finished.run("run")
    assert status == 0 and "already done" in output
    assert time.monotonic() - begun < 10
    assert len(finished.report()["attempts"]) == 1


def test_a_run_that_is_killed_twice_ends_with_the_adapter_of_an_undisturbed_one(job: Job, tmp_path: Path) -> None:
    undisturbed = Job(tmp_path / "undisturbed", {**job.settings, "OUTPUT_URI": str(tmp_path / "undisturbed/runs"), **SLOW})
    undisturbed.settings["WORK_DIR"] = str(tmp_path / "undisturbed/work")
    undisturbed.settings["MAX_STEPS"] = job.settings["MAX_STEPS"] = "60"
    assert undisturbed.run("run")[0] == 0

    settings = {**SLOW, "MAX_STEPS": "60"}
    for wanted in (10, 25):
        process = job.start("run", **settings)
        wait_for(partial(_stored_past, job, wanted), process)
        child = psutil.Process(process.pid).children(recursive=True)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        _, alive = psutil.wait_procs(child, timeout=10)
        assert not alive, "the trainer outlived its supervisor"
    status, output = job.run("run", **settings)
    assert status == 0, output
    attempts = job.report()["attempts"]
    assert len(attempts) == 3 and attempts[1]["first_step"] > 0 and attempts[2]["first_step"] >= attempts[1]["first_step"]
    assert [attempt["stopped"] for attempt in attempts] == ["crashed", "crashed", "finished"]
    assert adapter_digest(job.kept / "adapter") == adapter_digest(undisturbed.kept / "adapter")


def _stored_past(job: Job, step: int) -> bool:
    return any(int(path.parent.name.removeprefix("step-")) >= step for path in manifests(job))


def test_sigterm_stops_with_a_checkpoint_and_status_75_and_the_next_start_continues_there(job: Job) -> None:
    process = job.start("run", **SLOW)
    wait_for(lambda: manifests(job), process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    stopped_at = job.report()["attempts"][0]["last_step"]
    assert job.report()["stopped"] == "preempted"
    assert f"step-{stopped_at:06d}" in {path.parent.name for path in manifests(job)}
    shutil.rmtree(job.folder / "work")  # another machine
    status, output = job.run("run", **{**SLOW, "MAX_STEPS": str(stopped_at + 5)})
    assert status == 0, output
    assert job.report()["attempts"][1]["first_step"] == stopped_at


def test_sigterm_before_training_stops_at_once_with_status_75(job: Job) -> None:
    process = job.start("run")
    wait_for(lambda: psutil.Process(process.pid).children(), process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 75, output


def test_a_damaged_newest_checkpoint_is_skipped_for_the_one_before_it(job: Job) -> None:
    process = job.start("run", **SLOW)
    wait_for(lambda: len(manifests(job)) >= 3, process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    newest = max(path.parent for path in manifests(job))
    with (newest / "optimizer.pt").open("r+b") as file:
        file.truncate(100)
    shutil.rmtree(job.folder / "work")
    step = int(newest.name.removeprefix("step-"))
    status, output = job.run("run", **{**SLOW, "MAX_STEPS": str(step + 2)})
    assert status == 0, output
    assert re.search(rf"step {step} is skipped: .*optimizer.pt is damaged", output)
    assert 0 < job.report()["attempts"][1]["first_step"] < step


def test_a_loss_that_is_not_finite_exits_7(job: Job) -> None:
    status, output = job.run("run", LEARNING_RATE="1e30", MAX_GRAD_NORM="1e30", WARMUP_STEPS="0", LR_SCHEDULER_TYPE="constant")
    assert status == 7, output
    assert job.report()["stopped"] == "diverged" and job.report()["exit_status"] == 7


@pytest.fixture
def s3() -> Iterator[tuple[str, Any]]:
    """(endpoint, client) of an S3 server with an empty bucket."""
    with s3_server() as server:
        yield server.proxy.url, server.client


def test_a_signal_while_publishing_stops_at_once_and_publish_finishes_it(job: Job) -> None:
    with HubServer({TOKEN: "tester"}) as hub:
        settings = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(job.folder / "hf"), "HF_TOKEN": TOKEN}
        settings["HUB_MODEL_ID"] = "tester/tuned"
        hub.fail("POST", r"/commit/", status=503, times=50)
        process = job.start("run", **settings)
        wait_for(lambda: any("/commit/" in request.path for request in hub.requests), process)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 75, output
        assert job.report()["exit_status"] == 75 and not (job.kept / "DONE").exists()
        hub.faults.clear()
        assert job.run("publish", **settings)[0] == 0
        assert job.report()["exit_status"] == 0 and len(job.report()["attempts"]) == 2


def newest_step(client: Any) -> int:
    """The newest checkpoint, once the server is done with what a killed process had sent already."""
    before: set[str] | None = None
    while before != (names := s3_names(client)):
        before = names
        time.sleep(1.0)
    return max(int(found[1]) for name in names if (found := re.search(r"step-(\d+)/manifest", name)))


def s3_names(client: Any) -> set[str]:
    return {entry["Key"] for entry in client.list_objects_v2(Bucket="bucket").get("Contents", ())}


def test_on_s3_and_the_hub_a_run_resumes_on_another_machine_and_publish_finishes_it(job: Job, s3: tuple[str, Any]) -> None:
    endpoint, client = s3
    with HubServer({TOKEN: "tester"}) as hub:
        settings = {
            **SLOW,
            "OUTPUT_URI": "s3://bucket/some/prefix",
            "AWS_ENDPOINT_URL_S3": endpoint,
            "AWS_ACCESS_KEY_ID": KEYS["aws_access_key_id"],
            "AWS_SECRET_ACCESS_KEY": AWS_SECRET,
            "AWS_REGION": KEYS["region_name"],
            "HF_ENDPOINT": hub.url,
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(job.folder / "hf"),
            "HF_TOKEN": TOKEN,
            "HUB_MODEL_ID": "tester/tuned",
        }
        process = job.start("run", **settings)
        wait_for(lambda: any(re.search(r"step-\d+/manifest.json", name) for name in s3_names(client)), process)
        os.killpg(process.pid, signal.SIGKILL)
        assert hub.repos["model", "tester/tuned"].private, "the repository is made before training, private"
        process.communicate()
        shutil.rmtree(job.folder / "work")  # another machine

        hub.fail("POST", r"/commit/", status=403, times=50)
        newest = newest_step(client)
        settings["MAX_STEPS"] = str(newest + 3)
        status, output = job.run("run", **settings)
        assert status == 6, output
        names = s3_names(client)
        assert "some/prefix/r/adapter/manifest.json" in names and "some/prefix/r/DONE" not in names

        hub.faults.clear()
        status, output = job.run("publish", **settings)
        assert status == 0, output
        assert '"event"' not in output and "loading the model" not in output, "publish must not train"
        files = hub.files("model", "tester/tuned")
        assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "README.md"} <= files.keys()
        report = json.loads(client.get_object(Bucket="bucket", Key="some/prefix/r/report.json")["Body"].read())
        assert report["publication"]["repo_id"] == "tester/tuned" and report["exit_status"] == 0
        assert report["attempts"][1]["first_step"] > 0 and report["actual"]["num_steps"] == newest + 3
        assert job.run("run", **settings)[0] == 0

        for name in s3_names(client):
            body = client.get_object(Bucket="bucket", Key=name)["Body"].read()
            assert TOKEN.encode() not in body and AWS_SECRET.encode() not in body, name
        for path, body in files.items():
            assert TOKEN.encode() not in body and str(job.folder).encode() not in body, path


def test_a_token_that_may_not_write_is_told_before_anything_is_trained(job: Job) -> None:
    with HubServer({TOKEN: "tester"}) as hub:
        settings = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(job.folder / "hf"), "HF_TOKEN": TOKEN}
        status, output = job.run("run", **settings, HUB_MODEL_ID="somebody/else")
        assert status == 2 and "HUB_MODEL_ID=somebody/else" in output, output
        assert not (job.kept / "data").exists()


def test_three_mistakes_in_an_env_file_are_listed_at_once_without_a_traceback(tmp_path: Path, tiny_model: Path) -> None:
    job = Job(tmp_path, {"MODEL_ID": str(tiny_model), "JOB_ENV_FILE": "wrong.env"})
    (tmp_path / "wrong.env").write_text("DATASETS=nowhere.jsonl\nLEARNING_RATE=abc\nLORA_RR=8\n", "utf-8")
    begun = time.monotonic()
    status, output = job.run("run")
    assert time.monotonic() - begun < 3
    assert status == 2
    assert "Traceback" not in output
    assert all(name in output for name in ("DATASETS=nowhere.jsonl", "LEARNING_RATE=abc", "LORA_RR=8", "did you mean LORA_R?"))
    assert len(output.splitlines()) == 3


def test_the_supervisor_stays_small_and_without_torch_while_training(job: Job) -> None:
    process = job.start("run", **SLOW)
    wait_for(lambda: manifests(job), process)
    supervisor = psutil.Process(process.pid)
    trainer = next(child for child in supervisor.children() if "job.child" in child.cmdline())
    assert supervisor.memory_info().rss < 200 * 2**20
    assert not any("libtorch" in entry.path for entry in supervisor.memory_maps())
    assert any("libtorch" in entry.path for entry in trainer.memory_maps())
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)


def test_the_trainer_sees_no_credential(job: Job) -> None:
    process = job.start("run", **SLOW, HF_TOKEN=TOKEN, AWS_SECRET_ACCESS_KEY=AWS_SECRET, RUNPOD_API_KEY="rpa_planted")
    wait_for(lambda: manifests(job), process)
    trainer = next(child for child in psutil.Process(process.pid).children() if "job.child" in child.cmdline())
    seen = "\n".join(trainer.environ().values())
    assert TOKEN not in seen and AWS_SECRET not in seen and "rpa_planted" not in seen
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)


@pytest.mark.parametrize("command", ["settings", "recipes"])
def test_commands_that_only_print_import_no_torch(command: str) -> None:
    answer = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "job", command], capture_output=True, text=True, cwd=ROOT, check=True
    )
    imported = {line.rpartition("|")[2].strip() for line in answer.stderr.splitlines()}
    assert "pydantic" in imported and not imported & {"torch", "transformers", "datasets"}
    assert "smoke" in answer.stdout or "MODEL_ID" in answer.stdout


def test_a_hub_that_does_not_answer_is_75_and_not_a_traceback(job: Job) -> None:
    away = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0", "HF_HOME": str(job.folder / "hf"), "HF_TOKEN": TOKEN}
    for settings in ({"HUB_MODEL_ID": "tester/tuned"}, {"MODEL_ID": "owner/model"}):
        status, output = job.run("run", **away, **settings)
        assert status == 75 and "Traceback" not in output, output


def test_a_store_that_goes_away_does_not_stop_the_training(job: Job) -> None:
    with s3_server() as server:
        keys = {"AWS_ACCESS_KEY_ID": KEYS["aws_access_key_id"], "AWS_SECRET_ACCESS_KEY": AWS_SECRET, "AWS_REGION": "us-east-1"}
        settings = {**SLOW, "MAX_STEPS": "60", "OUTPUT_URI": "s3://bucket/away", "AWS_ENDPOINT_URL_S3": server.proxy.url}
        process = job.start("run", **settings, **keys)
        local = job.folder / "work"
        wait_for(lambda: list(local.glob("runs/*/checkpoints/step-000005/manifest.json")), process)
        server.proxy.stop()
        wait_for(lambda: list(local.glob("runs/*/checkpoints/step-000020/manifest.json")), process)
        server.proxy.start()
        output, _ = process.communicate(timeout=200)
        assert process.returncode == 0, output
        kept = {"checkpoints/step-000060/manifest.json", "adapter/manifest.json", "DONE"}
        assert {f"away/r/{name}" for name in kept} <= set(server.names())


def test_the_signature_of_a_presigned_address_is_not_told(job: Job) -> None:
    signature = "c2lnbmF0dXJl%2Fof%2Fsomebody"
    status, output = job.run("run", DATASETS=f"http://127.0.0.1:9/rows.jsonl?expires=9&sig={signature}")
    assert status == 75, output
    assert "rows.jsonl" in output and "expires=9" in output
    for text in (output, *(path.read_text("utf-8") for path in job.kept.rglob("*.json"))):
        assert signature not in text and "signature/of/somebody" not in text


def test_signals_while_the_process_ends_do_not_change_its_status(finished: Job) -> None:
    for _ in range(4):
        process = finished.start("run")
        assert process.stdout is not None
        process.stdout.readline()  # now it minds signals itself
        while process.poll() is None:
            with suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
            time.sleep(0.0005)
        process.communicate()
        assert process.returncode in (0, 75)


def test_publish_pushes_a_run_that_was_done_without_it(job: Job) -> None:
    with HubServer({TOKEN: "tester"}) as hub:
        assert job.run("run", MAX_STEPS="2")[0] == 0
        status, output = job.run("publish", MAX_STEPS="2")
        assert status == 2 and "HUB_MODEL_ID" in output
        settings = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(job.folder / "hf"), "HF_TOKEN": TOKEN}
        status, output = job.run("publish", MAX_STEPS="2", HUB_MODEL_ID="tester/late", **settings)
        assert status == 0 and "loading the model" not in output, output
        config = json.loads(hub.files("model", "tester/late")["adapter_config.json"])
        assert config["base_model_name_or_path"] == Path(job.settings["MODEL_ID"]).name, "no folder of this machine"


def test_a_work_folder_that_cannot_be_written_is_status_5(job: Job) -> None:
    (job.folder / "file").write_text("in the way")
    status, output = job.run("run", WORK_DIR=str(job.folder / "file" / "below"))
    assert status == 5 and "Traceback" not in output, output


def test_a_template_that_refuses_every_example_is_told_with_the_reason(job: Job) -> None:
    (job.folder / "refuses.jinja").write_text("{{ raise_exception('no') }}")
    status, output = job.run("run", CHAT_TEMPLATE="refuses.jinja")
    assert status == 3 and "64 template_refuses" in output, output
