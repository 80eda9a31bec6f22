"""The bodies that lie in runpod/ and .runpod/: as RunPod describes them, and with settings that the job knows."""

import json
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]  # it comes with none
import pytest
from conftest import ROOT
from runpod_server import RunPodServer, check_shape

from job.settings import known_names, read_settings
from job.settings.read import LIBRARY_PREFIXES

BODIES = {"pod": "CreatePodRequest", "template": "CreateTemplateRequest", "cluster": "CreateClusterRequest"}
HUB_TYPES = ("string", "number", "boolean", "huggingface")


def read(path: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ROOT / path).read_text("utf-8"))
    return found


@pytest.mark.parametrize(("name", "shape"), BODIES.items())
def test_each_body_is_as_runpod_describes_it_and_its_settings_are_known(name: str, shape: str) -> None:
    body = read(f"runpod/{name}.json")
    check_shape(shape, body)
    with pytest.raises(jsonschema.ValidationError, match="interruptible"):
        check_shape(shape, {**body, "interruptible": True})
    settings = {key: value for key, value in body["env"].items() if not key.startswith(LIBRARY_PREFIXES) or key in known_names()}
    assert settings.keys() <= set(known_names())
    read_settings(settings, {}, folder=Path("/nonexistent"))
    assert not {"startJupyter", "startSsh"} - body.keys()  # a template turns both on where they are left out


def test_a_pod_is_made_from_the_body_and_a_template_too() -> None:
    import requests

    with RunPodServer() as runpod:
        sign = {"Authorization": f"Bearer {runpod.api_key}"}
        answer = requests.post(f"{runpod.url}/v2/templates", json=read("runpod/template.json"), headers=sign, timeout=10)
        assert answer.status_code == 201 and answer.json()["startJupyter"] is False
        listed = requests.get(f"{runpod.url}/v2/templates", headers=sign, timeout=10).json()
        assert [template["name"] for template in listed["templates"]] == ["qlora-job"]


def test_the_hubs_listing_asks_for_known_settings_with_values_that_are_right() -> None:
    hub, known = read(".runpod/hub.json"), set(known_names())
    assert (hub["type"], hub["category"], hub["config"]["runsOn"]) == ("serverless", "language", "GPU")
    defaults = {}
    for entry in hub["config"]["env"]:
        asked = entry["input"]
        assert entry["key"] in known and asked["type"] in HUB_TYPES and asked["name"] and asked["description"]
        if "default" in asked:
            defaults[entry["key"]] = str(asked["default"])
    read_settings(defaults, {}, folder=Path("/nonexistent"))
    for preset in hub["config"]["presets"]:
        assert preset["defaults"].keys() <= {entry["key"] for entry in hub["config"]["env"]}


def test_the_hubs_test_is_a_run_that_the_settings_allow() -> None:
    tests = read(".runpod/tests.json")
    for test in tests["tests"]:
        assert test["name"] and test["timeout"] >= 300_000 and test["input"].keys() <= set(known_names())
        settings = {key: str(value) for key, value in test["input"].items()}
        assert read_settings(settings, {}, folder=Path("/nonexistent")).settings.train.max_steps == 5
