"""After training, from outside: published once whatever the Hub does, merged when asked, measured and chosen again."""

import json
from pathlib import Path

import pytest
from conftest import Job, small_run
from hub_server import HubServer
from transformers import AutoModelForCausalLM

from job.keep.checkpoints import check, local_steps

TOKEN = "hf_plantedtoken0123456789"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, conversations: Path) -> Job:
    """A run of which nothing is published, with four kept checkpoints."""
    settings = {
        "MAX_STEPS": "4",
        "SAVE_STEPS": "1",
        "SAVE_TOTAL_LIMIT": "4",
        "EVAL_PROMPTS": "What follows 7?",
        "SELECT_BY": "last",
    }
    job = Job(tmp_path_factory.mktemp("trained"), {**small_run(tiny_model, conversations), **settings})
    status, output = job.run("run")
    assert status == 0, output
    return job


def on(hub: HubServer, job: Job, **settings: str) -> dict[str, str]:
    return {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(job.folder / "hf"), "HF_TOKEN": TOKEN, **settings}


def messages(hub: HubServer, repo_id: str) -> list[str]:
    """Of all commits after the one that made the repository."""
    return [commit.message for commit in hub.repos["model", repo_id].branches["main"][1:]]


def test_it_is_published_once_however_often_the_hub_fails(trained: Job) -> None:
    with HubServer({TOKEN: "tester"}) as hub:
        hub.fail("POST", "/preupload/", status=500)
        hub.fail("POST", "/commit/", status=429, headers={"Retry-After": "1"})
        hub.fail("POST", "/commit/", reset=True)  # taken, and its answer lost
        status, output = trained.run("publish", **on(hub, trained, HUB_MODEL_ID="tester/once"))
        assert status == 0 and output.count("trying again") == 3, output
        assert len(messages(hub, "tester/once")) == 1 and "r: step 4" in messages(hub, "tester/once")[0]
        assert {"adapter_model.safetensors", "README.md", "loss.png"} <= hub.files("model", "tester/once").keys()
        assert trained.run("publish", **on(hub, trained, HUB_MODEL_ID="tester/once"))[0] == 0
        assert len(messages(hub, "tester/once")) == 1, "nothing changed, and a commit was made"
        assert trained.report()["publication"]["repo_id"] == "tester/once"


def test_a_token_that_has_expired_is_status_6_and_a_new_one_finishes_the_job(trained: Job) -> None:
    with HubServer({TOKEN: "tester"}) as hub:
        hub.fail("POST", "/commit/", status=401)
        status, output = trained.run("publish", **on(hub, trained, HUB_MODEL_ID="tester/expired"))
        assert status == 6 and "HF_TOKEN" in output and "publish" in output, output
        report = trained.report()
        assert report["exit_status"] == 6 and "HF_TOKEN" in report["reason"] and check(trained.kept / "adapter")
        assert messages(hub, "tester/expired") == []
        assert trained.run("publish", **on(hub, trained, HUB_MODEL_ID="tester/expired"))[0] == 0
        assert len(messages(hub, "tester/expired")) == 1 and trained.report()["exit_status"] == 0


def test_the_merged_model_follows_the_adapter_and_is_made_once(trained: Job) -> None:
    with HubServer({TOKEN: "tester"}) as hub:
        settings = on(hub, trained, HUB_MODEL_ID="tester/tuned", PUBLISH_MERGED="1")
        hub.fail("POST", "tuned-merged/commit/", status=403)
        status, output = trained.run("publish", **settings)
        assert status == 6 and "HUB_MERGED_MODEL_ID=tester/tuned-merged" in output and "the adapter is safe" in output, output
        assert len(messages(hub, "tester/tuned")) == 1 and trained.report()["publication"]["repo_id"] == "tester/tuned"
        status, output = trained.run("publish", **settings)
        assert status == 0 and "merging the adapter" not in output, output
        assert len(messages(hub, "tester/tuned")) == 1 and len(messages(hub, "tester/tuned-merged")) == 1
        publication = trained.report()["publication"]
        assert (publication["repo_id"], publication["merged_repo_id"]) == ("tester/tuned", "tester/tuned-merged")
        files = hub.files("model", "tester/tuned-merged")
        assert "model.safetensors" in files and b"library_name: transformers" in files["README.md"]


def test_without_a_hub_the_merged_model_goes_to_the_store(trained: Job) -> None:
    status, output = trained.run("publish", PUBLISH_MERGED="1")
    assert status == 0, output
    merged = trained.kept / "merged"
    assert check(merged).step == 4
    model = AutoModelForCausalLM.from_pretrained(merged)
    assert str(model.dtype) == "torch.bfloat16"


def test_the_checkpoints_are_measured_again_and_another_one_is_chosen(trained: Job, tmp_path: Path) -> None:
    assert trained.report()["chosen"]["step"] == 4
    prompts = tmp_path / "asked.jsonl"
    prompts.write_text('{"prompt": "What follows 3?", "scorer": "regex", "expected": "[^~]*"}\n{"prompt": "And?"}\n', "utf-8")
    trained.kept.joinpath("DONE").touch()
    status, output = trained.run("evaluate", EVAL_PROMPTS=str(prompts), SELECT_BY="score")
    assert status == 0 and "training" not in output, output
    report = trained.report()
    assert [one["step"] for one in report["candidates"]] == [0, *sorted(local_steps(trained.kept / "checkpoints"))]
    assert all(one["eval_loss"] and one["perplexity"] and one["score"] == 1.0 for one in report["candidates"])
    best = min((one for one in report["candidates"] if one["step"]), key=lambda one: one["eval_loss"])
    assert (report["chosen"]["step"], report["chosen"]["by"]) == (best["step"], "score"), "of equal scores the lower loss counts"
    assert [sample["prompt"] for sample in report["samples"]] == ["What follows 3?", "And?"]
    assert report["stopped"] == "finished" and report["actual"]["num_steps"] == 4
    # By something that step 4 does not win, the adapter in the store changes with the choice.
    texts = {answer["step"]: answer["text"] for answer in report["samples"][1]["answers"]}
    right = {"prompt": "And?", "scorer": "exact_match", "expected": texts[1] or "x"}
    prompts.write_text(json.dumps(right) + "\n", "utf-8")
    status, output = trained.run("evaluate", EVAL_PROMPTS=str(prompts), SELECT_BY="score")
    assert status == 0, output
    chosen = trained.report()["chosen"]["step"]
    adapter = (trained.kept / "adapter" / "adapter_model.safetensors").read_bytes()
    assert check(trained.kept / "adapter").step == chosen
    config = json.loads((trained.kept / "adapter" / "adapter_config.json").read_text("utf-8"))
    assert len(adapter) > 1000 and config["base_model_name_or_path"] == Path(trained.settings["MODEL_ID"]).name


def test_a_kill_while_the_adapter_is_replaced_loses_nothing(trained: Job) -> None:
    (trained.kept / "adapter" / "manifest.json").unlink()  # the first thing that replacing it does
    status, output = trained.run("publish", PUBLISH_MERGED="1")
    assert status == 2 and "has no trained adapter" in output, output
    assert trained.run("run")[0] == 0
    assert check(trained.kept / "adapter").step == trained.report()["chosen"]["step"]
    assert (trained.kept / "DONE").exists() and trained.report()["stopped"] == "finished"


def test_a_damaged_adapter_is_not_trained_again_by_publish(trained: Job) -> None:
    file = trained.kept / "adapter" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    status, output = trained.run("publish", PUBLISH_MERGED="1")
    assert status == 5 and "damaged" in output and "job run" in output, output
    (trained.kept / "DONE").unlink()
    assert trained.run("run")[0] == 0 and check(trained.kept / "adapter")


def test_an_unfinished_run_is_measured_and_not_called_finished(trained: Job) -> None:
    for name in ("DONE", "report.json", "adapter/manifest.json"):
        (trained.kept / name).unlink()
    status, output = trained.run("evaluate")
    assert status == 0 and "not trained to its end" in output and "<- the adapter" not in output, output
    assert not (trained.kept / "report.json").exists() and not (trained.kept / "DONE").exists()


def test_a_run_without_a_checkpoint_cannot_be_evaluated(tmp_path: Path, tiny_model: Path, conversations: Path) -> None:
    status, output = Job(tmp_path, small_run(tiny_model, conversations)).run("evaluate")
    assert status == 2 and "RUN_ID=r: has no checkpoint in the store" in output, output
