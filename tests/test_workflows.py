"""The workflows of the public repository: what they call exists, and nobody else's change runs with our rights."""

import re
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
GITHUB = ROOT / ".github"
WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yml"))
NOTES = GITHUB / "release_notes.py"
PINNED = re.compile(r"[\w.-]+/[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+")


def load(path: Path) -> dict[Any, Any]:
    loaded: dict[Any, Any] = yaml.safe_load(path.read_text("utf-8"))
    return loaded


def triggers(workflow: dict[Any, Any]) -> dict[str, Any]:
    """YAML 1.1 takes the word `on` for true."""
    found: dict[str, Any] = workflow[True]
    return found


def steps() -> Iterator[tuple[str, dict[str, Any]]]:
    for path in WORKFLOWS:
        for name, job in load(path)["jobs"].items():
            yield from ((f"{path.name} {name}", step) for step in job.get("steps", []))


@pytest.fixture(params=WORKFLOWS, ids=lambda path: path.name)
def path(request: pytest.FixtureRequest) -> Path:
    chosen: Path = request.param
    return chosen


def test_the_workflows_are_found() -> None:
    assert [path.name for path in WORKFLOWS] == ["check.yml", "image.yml", "release.yml"]


def test_every_action_is_pinned_by_its_whole_commit_with_the_version_beside_it(path: Path) -> None:
    used = re.findall(r"^\s*(?:- )?uses: (.*)$", path.read_text("utf-8"), re.MULTILINE)
    assert len(used) == len(re.findall("uses:", path.read_text("utf-8")))
    for action in used:
        if action.startswith("./"):
            assert (ROOT / action.partition(" ")[0]).is_file()
        else:
            assert PINNED.fullmatch(action), action


def test_an_action_has_the_same_version_everywhere() -> None:
    pins: dict[str, set[str]] = {}
    for found in re.findall(r"uses: (\S+)@(.*)", "\n".join(path.read_text("utf-8") for path in WORKFLOWS)):
        pins.setdefault(found[0], set()).add(found[1])
    assert {action: found for action, found in pins.items() if len(found) > 1} == {}


def test_rights_are_given_job_by_job_and_only_a_release_writes(path: Path) -> None:
    workflow = load(path)
    assert workflow["permissions"] in ({}, {"contents": "read"})
    given = [job.get("permissions", {}) for job in workflow["jobs"].values()]
    written = {right for rights in given for right, kind in rights.items() if kind != "read"}
    assert written == ({"contents", "packages", "id-token"} if path.name == "release.yml" else set())
    if path.name == "release.yml":
        assert list(triggers(workflow)) == ["push"] and list(triggers(workflow)["push"]) == ["tags"]


def test_a_pull_request_sees_no_secret(path: Path) -> None:
    text = path.read_text("utf-8")
    assert "pull_request_target" not in text and "workflow_run" not in text
    secrets = set(re.findall(r"secrets\.(\w+)", text))
    assert secrets == ({"GITHUB_TOKEN"} if path.name == "release.yml" else set())


def test_a_checkout_leaves_no_credentials_behind() -> None:
    checkouts = [step for _, step in steps() if step.get("uses", "").startswith("actions/checkout@")]
    assert checkouts and all(step["with"]["persist-credentials"] is False for step in checkouts)


def test_no_script_has_an_expression_written_into_it() -> None:
    assert [where for where, step in steps() if "${{" in step.get("run", "")] == []


def test_every_job_has_a_time_limit_and_every_workflow_runs_once_at_a_time(path: Path) -> None:
    workflow = load(path)
    assert [name for name, job in workflow["jobs"].items() if "uses" not in job and "timeout-minutes" not in job] == []
    assert "github.ref" in workflow["concurrency"]["group"]
    assert (path.name == "release.yml") == (workflow["concurrency"]["cancel-in-progress"] is False)


def test_what_is_called_exists() -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    called = [line for _, step in steps() for line in step.get("run", "").splitlines()]
    made = [word for line in called if line.startswith("make ") for word in line.split()[1:]]
    assert {"check", "smoke"} <= set(made)
    for word in made:
        name, is_variable, _ = word.partition("=")
        assert re.search(rf"^{name} \?=" if is_variable else rf"^{name}:", makefile, re.MULTILINE), word
    for script in re.findall(r"python3 (\S+)", "\n".join(called)):
        assert (ROOT / script).is_file()


def test_the_image_is_tried_whenever_something_changes_that_it_is_made_from() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text("utf-8")
    copied = {source for line in re.findall(r"^COPY (?!--from)(.*) \S+$", dockerfile, re.MULTILINE) for source in line.split()}
    copied -= {"LICENSE", "job/"}  # the job itself is tested without an image
    on = triggers(load(GITHUB / "workflows/image.yml"))
    assert on["push"]["paths"] == on["pull_request"]["paths"]
    for file in {*copied, "Dockerfile", ".dockerignore"}:
        assert any(fnmatchcase(file, pattern) for pattern in on["push"]["paths"]), file


def test_the_image_of_a_release_has_its_bill_of_materials_its_provenance_and_known_arguments() -> None:
    build = next(step for _, step in steps() if step.get("uses", "").startswith("docker/build-push-action@"))
    options = build["with"]
    assert (options["push"], options["sbom"], options["provenance"]) == (True, True, "mode=max")
    dockerfile = (ROOT / "Dockerfile").read_text("utf-8")
    for argument in options["build-args"].split("\n")[:-1]:
        assert re.search(rf"^ARG {argument.partition('=')[0]}=", dockerfile, re.MULTILINE)
    (signed,) = [step for _, step in steps() if "cosign sign" in step.get("run", "")]
    assert "@$DIGEST" in signed["run"] and signed["env"]["DIGEST"] == "${{ steps.build.outputs.digest }}"


def test_dependencies_of_all_three_kinds_are_kept_current() -> None:
    updates = load(GITHUB / "dependabot.yml")["updates"]
    assert {each["package-ecosystem"] for each in updates} == {"pip", "docker", "github-actions"}
    assert all(each["cooldown"]["default-days"] >= 7 for each in updates)


CHANGELOG = """\
# Changelog

## Unreleased

- Soon.

## [1.10.0] - 2026-12-24

### Added

- Ten.

## 1.1.0

[1.10.0]: https://example.org/1.10.0

## 1.0.0 - 2026-11-01

- One.

[1.0.0]: https://example.org/1.0.0
"""


def notes(folder: Path, tag: str, *options: str, version: str | None = None) -> tuple[int, str, str]:
    """Run the script as the workflow does; returns (exit status, notes, error)."""
    (folder / "job").mkdir()
    (folder / "job/__init__.py").write_text(f'__version__ = "{version or tag.removeprefix("v")}"\n', "utf-8")
    (folder / "CHANGELOG.md").write_text(CHANGELOG, "utf-8")
    command = [sys.executable, str(NOTES), tag, "--root", str(folder), *options]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    return child.returncode, child.stdout, child.stderr


@pytest.mark.parametrize(("tag", "expected"), [("v1.10.0", "### Added\n\n- Ten."), ("v1.0.0", "- One.")])
def test_the_notes_of_a_release_are_its_part_of_the_changelog(tmp_path: Path, tag: str, expected: str) -> None:
    status, text, _ = notes(tmp_path, tag)
    assert (status, text.strip()) == (0, expected)


@pytest.mark.parametrize(
    ("tag", "version", "named"),
    [
        ("v1.2.0", "1.2.0", "`## 1.2.0`"),
        ("v1.10", "1.10", "`## 1.10`"),
        ("v1.1.0", "1.1.0", "says nothing about 1.1.0"),
        ("v1.0.0", "0.9.0", "__version__ is 0.9.0"),
    ],
)
def test_a_version_without_notes_or_with_another_number_in_the_code_is_not_released(
    tmp_path: Path, tag: str, version: str, named: str
) -> None:
    status, text, error = notes(tmp_path, tag, version=version)
    assert (status, text) == (2, "")
    assert named in error


def test_the_notes_say_how_the_image_is_verified_as_this_workflows(tmp_path: Path) -> None:
    image = f"ghcr.io/owner/qlora.job@sha256:{'0' * 64}"
    status, text, _ = notes(tmp_path, "v1.0.0", "--image", image)
    assert status == 0 and f"cosign verify {image} " in text
    pattern = re.search(r"--certificate-identity-regexp '(.*)'", text)
    assert pattern
    identity = "https://github.com/owner/qlora.job/.github/workflows/release.yml@refs/tags/v1.0.0"
    assert re.match(pattern[1], identity)
    assert not re.match(pattern[1], identity.replace("qlora.job", "qlora-job"))
    assert (GITHUB / "workflows/release.yml").is_file()
