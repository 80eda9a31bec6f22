"""What the files in deploy/ say to their engines, each read into one form."""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "deploy"


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """One container, as an engine is asked to start it."""

    image: str
    command: list[str]
    """After the image's entrypoint, or with it."""
    environ: dict[str, str | None]
    """None: a secret that the engine fills in, or a value that it finds out."""
    wait_seconds: float
    """From its signal to its kill."""
    limit_seconds: float
    """How long it lets an attempt run."""
    body: Mapping[str, Any] = field(repr=False)
    """The document as it is written."""


def documents(name: str) -> list[dict[str, Any]]:
    text = (DEPLOY / name).read_text("utf-8")
    return [json.loads(text)] if name.endswith(".json") else list(yaml.safe_load_all(text))


def _container(container: Mapping[str, Any], pod: Mapping[str, Any], limit: float, body: Mapping[str, Any]) -> Manifest:
    return Manifest(
        image=container["image"],
        command=[*container.get("command", []), *container.get("args", [])],
        environ={each["name"]: each.get("value") for each in container.get("env", [])},
        wait_seconds=pod["terminationGracePeriodSeconds"],
        limit_seconds=limit,
        body=body,
    )


def _kubernetes_job() -> Manifest:
    (body,) = documents("kubernetes-job.yaml")
    pod = body["spec"]["template"]["spec"]
    return _container(pod["containers"][0], pod, body["spec"]["activeDeadlineSeconds"], body)


def _jobset() -> Manifest:
    (body,) = documents("jobset.yaml")
    pod = body["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    return _container(pod["containers"][0], pod, float("inf"), body)


def _kubeflow_trainjob() -> Manifest:
    runtime, job = documents("kubeflow-trainjob.yaml")
    pod = runtime["spec"]["template"]["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    container = {**pod["containers"][0], "env": job["spec"]["trainer"]["env"]}
    return _container(container, pod, job["spec"]["activeDeadlineSeconds"], runtime)


def _skypilot() -> Manifest:
    (body,) = documents("skypilot.yaml")
    *_, last = body["run"].strip().splitlines()
    return Manifest(
        image=body["resources"]["image_id"].removeprefix("docker:"),
        command=last.removeprefix("exec ").split(),
        environ={**body["envs"], **body["secrets"]},
        wait_seconds=30,  # sky/skylet/subprocess_daemon.py of 0.14.1
        limit_seconds=float("inf"),
        body=body,
    )


def _dstack() -> Manifest:
    (body,) = documents("dstack.yaml")
    (script,) = body["commands"]
    started = re.findall(r"^\s*(/job/.*?) \|\|", script, re.MULTILINE)
    pairs = [line.partition("=") for line in body["env"]]
    return Manifest(
        image=body["image"],
        command=[*body["entrypoint"].removesuffix(" sh -c").split(), *started[0].split()],
        environ={name: value if equals else None for name, equals, value in pairs},
        wait_seconds=10,  # its runner's killDelay, github.com/dstackai/dstack/issues/2233
        limit_seconds=float(body["max_duration"].removesuffix("h")) * 3600,
        body=body,
    )


@cache
def dry_run_of_hf_jobs() -> str:
    """What Hugging Face's own command line makes of deploy/hf-jobs.sh."""
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    with tempfile.TemporaryDirectory() as home:
        return subprocess.run(
            ["sh", str(DEPLOY / "hf-jobs.sh"), "--dry-run", "--format", "human"],
            env={"PATH": path, "HF_HUB_OFFLINE": "1", "HF_HOME": home, "HF_TOKEN": "hf_planted"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout


def _hf_jobs() -> Manifest:
    body: dict[str, list[str]] = {}
    name = ""
    for line in dry_run_of_hf_jobs().splitlines():
        if match := re.match(r"^  (\w*)\s+(.*)$", line):
            name = match[1] or name
            body.setdefault(name, []).append(match[2])
    pairs = (line.partition("=")[::2] for line in body["env"])
    return Manifest(
        image=body["image"][0],
        command=body["command"][0].split(),
        environ={**dict(pairs), **{line.partition("=")[0]: None for line in body["secrets"]}},
        wait_seconds=30,  # not documented; the default of the Kubernetes that they run on
        limit_seconds=float(body["timeout"][0].removesuffix("h")) * 3600,
        body=body,
    )


def _aws_batch(name: str) -> Manifest:
    (body,) = documents(name)
    container = body.get("containerProperties") or body["nodeProperties"]["nodeRangeProperties"][0]["container"]
    return Manifest(
        image=container["image"],
        command=container["command"],
        environ={
            **{each["name"]: each["value"] for each in container["environment"]},
            **{each["name"]: None for each in container["secrets"]},
        },
        wait_seconds=30,  # docs.aws.amazon.com/batch/latest/userguide/job_timeouts.html, read 2026-11
        limit_seconds=body["timeout"]["attemptDurationSeconds"],
        body=body,
    )


def _sagemaker() -> Manifest:
    (body,) = documents("sagemaker.json")
    return Manifest(
        image=body["AlgorithmSpecification"]["TrainingImage"],
        command=["train"],  # SageMaker's own
        environ=body["Environment"],
        wait_seconds=120,  # API_StopTrainingJob.html, read 2026-11
        limit_seconds=body["StoppingCondition"]["MaxRuntimeInSeconds"],
        body=body,
    )


READERS: dict[str, Callable[[], Manifest]] = {
    "aws-batch-nodes.json": lambda: _aws_batch("aws-batch-nodes.json"),
    "aws-batch.json": lambda: _aws_batch("aws-batch.json"),
    "dstack.yaml": _dstack,
    "hf-jobs.sh": _hf_jobs,
    "jobset.yaml": _jobset,
    "kubeflow-trainjob.yaml": _kubeflow_trainjob,
    "kubernetes-job.yaml": _kubernetes_job,
    "sagemaker.json": _sagemaker,
    "skypilot.yaml": _skypilot,
}
