"""The files in deploy/: that their engines take them, and that they say what the job means."""

import importlib
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import botocore.session
import pytest
from botocore.validate import ParamValidator
from jsonschema import Draft202012Validator  # type: ignore[import-untyped]
from manifests import DEPLOY, READERS, ROOT, Manifest, documents

from job import __version__
from job.plan.nodes import find_nodes
from job.settings import Secrets, known_names, read_settings
from job.stopping import LAST_SECONDS

LIBRARIES = {"HF_HOME"}
NODES = {"NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT"}
"""Of job/plan/nodes.py."""
SOMEBODY_HAS_TO_ACT = {2, 3, 4, 6, 7, 8}
STATUSES = sorted(SOMEBODY_HAS_TO_ACT | {1, 5, 75})
MODELS = {
    "Job": "io_k8s_api_batch_v1_job:IoK8sApiBatchV1Job",
    "JobSet": "jobset_v1alpha2_job_set:JobsetV1alpha2JobSet",
    "TrainJob": "trainer_v1alpha1_train_job:TrainerV1alpha1TrainJob",
    "TrainingRuntime": "trainer_v1alpha1_training_runtime:TrainerV1alpha1TrainingRuntime",
}
"""The API's own types, as Kubeflow generates them for Python: kubeflow_trainer_api.models."""
OPERATIONS = {
    "aws-batch.json": ("batch", "RegisterJobDefinition"),
    "aws-batch-nodes.json": ("batch", "RegisterJobDefinition"),
    "sagemaker.json": ("sagemaker", "CreateTrainingJob"),
}


@pytest.fixture(scope="module", params=sorted(READERS))
def name(request: pytest.FixtureRequest) -> str:
    chosen: str = request.param
    return chosen


@pytest.fixture(scope="module")
def manifest(name: str) -> Manifest:
    return READERS[name]()


def test_every_file_is_read_here() -> None:
    assert sorted(path.name for path in DEPLOY.iterdir()) == sorted(READERS)


def test_the_page_about_engines_names_every_file() -> None:
    page = (ROOT / "docs/engines.md").read_text("utf-8")
    assert [file for file in READERS if f"(../deploy/{file})" not in page] == []


# ---------------------------------------------------------------------------------------------------------- all engines


def test_every_name_in_the_environment_is_a_setting_or_one_that_the_job_reads(manifest: Manifest) -> None:
    assert manifest.environ.keys() - known_names() - LIBRARIES - NODES == set()


def test_the_settings_are_valid_and_name_a_place_that_outlives_the_machine(manifest: Manifest) -> None:
    given = {key: value for key, value in manifest.environ.items() if value is not None and not key.endswith("_FILE")}
    settings = read_settings(given, {}, folder=Path("/nonexistent")).settings
    assert settings.keep.output_uri.startswith(("s3://", "/data/"))
    assert settings.budget.max_hours


def test_no_secret_stands_in_a_file(name: str, manifest: Manifest) -> None:
    secrets = {field.upper() for field in Secrets.model_fields}
    assert [key for key in manifest.environ if key in secrets and manifest.environ[key] is not None] == []
    assert "hf_planted" not in json.dumps(manifest.body)
    assert manifest.environ.keys() & {"HF_TOKEN", "HF_TOKEN_FILE"} or "secretRef" in (DEPLOY / name).read_text("utf-8")


def test_the_image_is_this_version(manifest: Manifest) -> None:
    assert re.fullmatch(rf"[a-z0-9.-]+(/[a-z0-9.-]+)?/qlora-job:{re.escape(__version__)}", manifest.image)


def test_the_command_is_the_images_entrypoint_with_run(manifest: Manifest) -> None:
    line = re.search(r"^ENTRYPOINT (.*)$", (ROOT / "Dockerfile").read_text("utf-8"), re.MULTILINE)
    assert line
    assert manifest.command in (["run"], ["train"], [*json.loads(line[1]), "run"])


def test_the_job_has_ended_before_the_engine_kills_it(manifest: Manifest) -> None:
    grace = float(manifest.environ["GRACE_SECONDS"] or 0)
    assert grace + LAST_SECONDS + 1 < manifest.wait_seconds
    assert grace >= manifest.wait_seconds / 2, "and does not give away the time that it could have"


def test_the_jobs_own_budget_comes_before_the_engines_limit(manifest: Manifest) -> None:
    assert float(manifest.environ["MAX_HOURS"] or 0) * 3600 < manifest.limit_seconds


# ---------------------------------------------------------------------------------------------------------- Kubernetes


def kubernetes_documents() -> list[dict[str, Any]]:
    files = ("kubernetes-job.yaml", "jobset.yaml", "kubeflow-trainjob.yaml")
    return [document for file in files for document in documents(file)]


def through_the_api_types(document: Mapping[str, Any]) -> Any:
    """What is left of a document after a way through the types of its kind: what they do not know is gone."""
    module, _, cls = MODELS[document["kind"]].partition(":")
    made = getattr(importlib.import_module(f"kubeflow_trainer_api.models.{module}"), cls).from_dict(document)
    return made.to_dict()


@pytest.mark.parametrize("document", kubernetes_documents(), ids=lambda document: document["kind"])
def test_the_types_of_kubernetes_know_everything_in_a_document(document: dict[str, Any]) -> None:
    assert through_the_api_types(document) == document
    misspelt = json.loads(re.sub("restartPolicy|numNodes", "misspelt", json.dumps(document)))
    assert through_the_api_types(misspelt) != misspelt


def container_of(job: Mapping[str, Any]) -> str:
    container: str = job["template"]["spec"]["containers"][0]["name"]
    return container


def judge(job: Mapping[str, Any], *, status: int, is_disrupted: bool = False) -> tuple[str | None, str]:
    """What Kubernetes does about a failed pod: (action of the first rule that fits, its message)."""
    container = container_of(job)
    for index, rule in enumerate(job["podFailurePolicy"]["rules"]):
        matching = f"matching {rule['action']} rule at index {index}"
        if codes := rule.get("onExitCodes"):
            assert codes["containerName"] == container and codes["operator"] == "In"
            if status in codes["values"]:
                return rule["action"], f"Container {container} for pod default/x failed with exit code {status} {matching}"
        elif is_disrupted and rule["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]:
            return rule["action"], f"Pod default/x has condition DisruptionTarget {matching}"
    return None, ""


def test_a_kubernetes_job_starts_status_75_again_for_nothing_and_gives_up_where_somebody_has_to_act() -> None:
    job = READERS["kubernetes-job.yaml"]().body["spec"]
    actions = {status: judge(job, status=status)[0] for status in STATUSES}
    assert {status for status, action in actions.items() if action == "FailJob"} == SOMEBODY_HAS_TO_ACT
    assert {status for status, action in actions.items() if action == "Ignore"} == {75}
    assert judge(job, status=137, is_disrupted=True)[0] == "Ignore"
    assert judge(job, status=137)[0] is None
    assert job["backoffLimit"] > 0 and job["template"]["spec"]["restartPolicy"] == "Never"


def restart_of(jobset: Mapping[str, Any], *, status: int, is_disrupted: bool = False) -> str:
    """What a JobSet does when a pod of its Job failed."""
    job = jobset["replicatedJobs"][0]["template"]["spec"]
    action, message = judge(job, status=status, is_disrupted=is_disrupted)
    assert action in ("FailJob", None) and job["backoffLimit"] == 0
    reason = "PodFailurePolicy" if action else "BackoffLimitExceeded"
    for rule in jobset["failurePolicy"]["rules"]:
        patterns = rule.get("onJobFailureMessagePatterns") or [""]
        if reason in rule["onJobFailureReasons"] and any(re.search(pattern, message) for pattern in patterns):
            return str(rule["action"])
    return "RestartJobSet"


@pytest.mark.parametrize("file", ["jobset.yaml", "kubeflow-trainjob.yaml"])
def test_a_jobset_starts_all_machines_again_at_status_75_and_gives_up_where_somebody_has_to_act(file: str) -> None:
    spec = READERS[file]().body["spec"]
    jobset = spec["template"]["spec"] if file == "kubeflow-trainjob.yaml" else spec
    actions = {status: restart_of(jobset, status=status) for status in STATUSES}
    assert {status for status, action in actions.items() if action == "RestartJobSetAndIgnoreMaxRestarts"} == {75}
    assert {status for status, action in actions.items() if action == "FailJobSet"} == SOMEBODY_HAS_TO_ACT
    assert {status for status, action in actions.items() if action == "RestartJobSet"} == {1, 5}
    assert restart_of(jobset, status=137, is_disrupted=True) == "RestartJobSetAndIgnoreMaxRestarts"


def test_each_machine_of_a_jobset_knows_which_it_is() -> None:
    manifest = READERS["jobset.yaml"]()
    spec = manifest.body["spec"]["replicatedJobs"][0]
    job = spec["template"]["spec"]
    environ = {name: manifest.environ[name] or "1" for name in NODES}
    nodes = find_nodes(environ, num_gpus=8)
    assert (nodes.num_nodes, nodes.node_rank, nodes.num_processes) == (job["completions"], 1, 8 * job["parallelism"])
    assert job["completionMode"] == "Indexed" and spec["replicas"] == 1
    jobset = manifest.body["metadata"]["name"]
    assert nodes.master_address == f"{jobset}-{spec['name']}-0-0.{jobset}"


# ---------------------------------------------------------------------------------------------------------- AWS


@pytest.mark.parametrize("file", OPERATIONS)
def test_the_service_models_of_aws_take_the_body(file: str) -> None:
    service, operation = OPERATIONS[file]
    shape = botocore.session.get_session().get_service_model(service).operation_model(operation).input_shape
    (body,) = documents(file)
    assert ParamValidator().validate(body, shape).generate_report() == ""
    assert "Unknown parameter" in ParamValidator().validate({**body, "retries": {}}, shape).generate_report()


def batch_action(rules: list[dict[str, str]], **ended: str) -> str:
    """What Batch does: the first rule all of whose conditions fit; without one it retries."""
    wanted = {"onExitCode": "exit_code", "onReason": "reason", "onStatusReason": "status_reason"}
    for rule in rules:
        conditions = [(ended.get(wanted[key], ""), pattern) for key, pattern in rule.items() if key != "action"]
        if all(fnmatchcase(value, pattern) for value, pattern in conditions):
            return rule["action"]
    return "RETRY"


@pytest.mark.parametrize("file", ["aws-batch.json", "aws-batch-nodes.json"])
def test_aws_batch_retries_status_75_and_a_reclaimed_machine_and_nothing_else(file: str) -> None:
    retry = READERS[file]().body["retryStrategy"]
    rules = retry["evaluateOnExit"]
    container_ended = "Essential container in task exited"
    actions = {status: batch_action(rules, exit_code=str(status), status_reason=container_ended) for status in STATUSES}
    assert {status for status, action in actions.items() if action == "RETRY"} == {75}
    assert batch_action(rules, status_reason="Host EC2 (instance i-0) terminated.") == "RETRY"
    assert 1 <= retry["attempts"] <= 10 and len(rules) <= 5


def test_the_machines_of_aws_batch_are_all_covered() -> None:
    nodes = READERS["aws-batch-nodes.json"]().body["nodeProperties"]
    assert nodes["numNodes"] > 1 and [each["targetNodes"] for each in nodes["nodeRangeProperties"]] == ["0:"]


# ---------------------------------------------------------------------------------------------------------- SkyPilot, dstack


@pytest.mark.parametrize("engine", ["skypilot", "dstack"])
def test_the_engines_own_schema_takes_the_file(engine: str) -> None:
    schema = json.loads((ROOT / "tests/engine_shapes.json").read_text("utf-8"))[engine]
    validator = Draft202012Validator(schema)
    (body,) = documents(f"{engine}.yaml")
    assert [error.message for error in validator.iter_errors(body)] == []
    misspelt = {**body, "resources": {**body["resources"], "accelerator": "L40S"}}
    assert [error.message for error in validator.iter_errors(misspelt)]


def test_skypilot_recovers_status_75_alone() -> None:
    recovery = READERS["skypilot.yaml"]().body["resources"]["job_recovery"]
    assert recovery == {"max_restarts_on_errors": 0, "recover_on_exit_codes": [75]}


def test_dstack_itself_retries_no_error_because_it_cannot_tell_a_wrong_setting_from_a_lost_network() -> None:
    assert "error" not in READERS["dstack.yaml"]().body["retry"]["on_events"]


class Loop:
    """The script that dstack.yaml has in its commands, around a job that ends as it is told."""

    def __init__(self, folder: Path, *statuses: int, seconds: float = 0, pause: float = 0) -> None:
        self.starts, self.told = folder / "starts", folder / "told"
        program = folder / "job"
        lines = (
            "#!/bin/sh",
            f"trap 'echo told >> {self.told}; kill $! 2>/dev/null' INT TERM",
            f"echo started >> {self.starts}",
            f"sleep {seconds} & wait $!",
            f"set -- {' '.join(map(str, statuses))}",
            f"shift $(($(wc -l < {self.starts}) - 1))",
            'exit "$1"',
        )
        program.write_text("\n".join(lines), "utf-8")
        program.chmod(0o755)
        (script,) = READERS["dstack.yaml"]().body["commands"]
        assert "/job/entrypoint.sh run" in script and " 60 60 " in script
        script = script.replace("/job/entrypoint.sh run", str(program)).replace("60", str(pause))
        before = signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell cannot trap what it was started to ignore, as with nohup
        self.process = subprocess.Popen(["sh", "-c", script], start_new_session=True)
        signal.signal(signal.SIGINT, before)

    def num_starts(self) -> int:
        return self.starts.read_text("utf-8").count("started") if self.starts.exists() else 0

    def interrupt(self, number: int) -> None:
        """As a terminal does, or `tini -g`: to all processes of the group."""
        while not self.num_starts():
            time.sleep(0.01)
        time.sleep(0.2)
        os.killpg(self.process.pid, number)

    def end(self, within_seconds: float = 20) -> int:
        return self.process.wait(timeout=within_seconds)


@pytest.mark.parametrize(
    ("statuses", "ended", "num_starts"),
    [((0,), 0, 1), ((2,), 2, 1), ((75, 0), 0, 2), ((75, 75, 8), 8, 3), ((75,) * 6, 75, 5)],
    ids=lambda value: str(value),
)
def test_on_dstack_the_job_is_started_again_while_it_ends_with_75(
    tmp_path: Path, statuses: tuple[int, ...], ended: int, num_starts: int
) -> None:
    loop = Loop(tmp_path, *statuses)
    assert (loop.end(), loop.num_starts()) == (ended, num_starts)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("where", ["while the job runs", "between two starts"])
def test_on_dstack_a_signal_reaches_the_job_and_nothing_is_started_after_it(tmp_path: Path, number: int, where: str) -> None:
    runs = where == "while the job runs"
    loop = Loop(tmp_path, 75, 75, seconds=10 if runs else 0, pause=10)
    loop.interrupt(number)
    assert (loop.end(within_seconds=5), loop.num_starts()) == (75, 1)
    assert loop.told.exists() == runs


# ---------------------------------------------------------------------------------------------------------- Hugging Face


def test_hugging_face_jobs_keeps_the_run_in_a_bucket_and_its_downloads_on_the_machine() -> None:
    manifest = READERS["hf-jobs.sh"]()
    assert manifest.body["volumes"] == ["hf://buckets/you/qlora:/data"]
    assert str(manifest.environ["OUTPUT_URI"]).startswith("/data/")
    assert not str(manifest.environ["HF_HOME"]).startswith("/data")
    assert int(manifest.body["attempts"][0]) > 1
