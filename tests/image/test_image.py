"""The image, really built and run: its structure, its size, and a run by a user without rights on a read-only root.

`make image-test`. A small Debian or Ubuntu stands in for the CUDA base, and torch is the build that this machine's pip finds.
No container reaches a network.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT, small_run, write_conversations, write_tiny_model
from image.cuda_wheels import cuda_wheels
from image.engine import BASE, IMAGE, Containers, Docker, Missing, Podman
from image.sizes import MB, measured, table, with_cuda

USER = 1000
MAX_CUDA_MB = 7000
NUM_STEPS = 60
LOCKED = ("--network", "none", "--user", f"{USER}:{USER}", "--cap-drop", "all", "--security-opt", "no-new-privileges")
TMPFS = ("--tmpfs", "/tmp:rw,exec")
COMPILE = """
cd /tmp && echo '#include <Python.h>
int answer(void) { return 42; }' > a.c
gcc -shared -fPIC -I"$(python -c 'import sysconfig; print(sysconfig.get_path("include"))')" a.c -o a.so
python -c 'import ctypes; print(ctypes.CDLL("/tmp/a.so").answer())'
"""
"""What triton does, in small."""


@pytest.fixture(scope="session")
def podman() -> Iterator[Podman]:
    try:
        podman = Podman()
    except Missing as missing:
        pytest.skip(f"the image is not tested: {missing}")
    begun = time.monotonic()
    revision = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout
    arguments = {"VERSION": "0.0.0-test", "REVISION": revision.strip(), "SOURCE": "https://example.org/qlora-job"}
    podman.build({"BASE": BASE, **arguments})
    print(f"\nbuilt in {time.monotonic() - begun:.0f} s")
    yield podman
    podman.call("rm", "--all", "--force", "--time", "0")


@pytest.fixture(scope="session")
def archive(podman: Podman, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The image as one file."""
    tar = tmp_path_factory.mktemp("image") / "image.tar"
    podman.save(tar)
    yield tar
    tar.unlink()


@pytest.fixture(scope="session", params=["podman", "docker"])
def engine(request: pytest.FixtureRequest, podman: Podman) -> Containers:
    """Each engine that is here."""
    if request.param == "podman":
        return podman
    try:
        return Docker(request.getfixturevalue("archive"))
    except Missing as missing:
        pytest.skip(str(missing))


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A volume that others may read: a tiny model and its data."""
    folder = tmp_path_factory.mktemp("inputs")
    write_tiny_model(folder / "model")
    write_conversations(folder / "rows.jsonl", 64)
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    for path in folder.parents:
        if path.owner() == "root" and path != Path("/") and not path.stat().st_mode & 0o001:
            path.chmod(path.stat().st_mode | 0o001)
    return folder


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    """A volume that belongs to the container's user."""
    volume = tmp_path / "volume"
    volume.mkdir()
    os.chown(volume, USER, USER)
    return volume


def settings(inputs: Path, folder: Path, **more: str) -> tuple[str, ...]:
    """An env file alone, as `docker run --env-file` takes it."""
    given = {**small_run(Path("/inputs/model"), Path("/inputs/rows.jsonl")), "RUN_ID": "r", "OMP_NUM_THREADS": "1", **more}
    file = folder / "job.env"
    file.write_text("".join(f"{name}={value}\n" for name, value in given.items()), "utf-8")
    return ("--env-file", str(file), "--volume", f"{inputs}:/inputs:ro")


def whole_steps(run: Path) -> list[int]:
    """Steps of the checkpoints in the store, every file of each compared with its sha256."""
    steps = []
    for manifest in sorted(run.glob("checkpoints/*/manifest.json")):
        written = json.loads(manifest.read_text("utf-8"))
        assert written["files"]
        for name, file in written["files"].items():
            content = (manifest.parent / name).read_bytes()
            assert (len(content), hashlib.sha256(content).hexdigest()) == (file["num_bytes"], file["sha256"]), name
        steps.append(int(written["step"]))
    return steps


def test_the_images_requirements_resolve_with_cuda_and_nothing_is_left_open(podman: Podman) -> None:
    wheels = cuda_wheels()
    image, base = (Path(podman.call("image", "mount", name)) for name in (IMAGE, BASE))
    sizes, bytecode_ratio = measured(image, base)
    cuda = with_cuda(sizes, wheels, bytecode_ratio)
    podman.call("image", "unmount", "--all")
    print(
        f"\n{table(sizes, cuda)}\nbytecode: {bytecode_ratio:.2f} of the sources; wheels: "
        f"{sum(wheel.wheel_bytes for wheel in wheels) / MB:,.0f} MB to download"
    )
    assert all(size > 0 for part, size in sizes.items() if part not in ("triton", "cuda"))
    assert cuda["cuda"] > 2000 * MB
    assert sum(cuda.values()) < MAX_CUDA_MB * MB


def test_the_image_is_built_as_its_documents_say(podman: Podman, tmp_path: Path) -> None:
    archive = tmp_path / "image.tar"  # unpacked once for every single check: seconds each with the libraries
    podman.save(archive, without=("/opt/venv/lib", "/usr/share", "/usr/lib"))
    tool = Path(sys.executable).with_name("container-structure-test")
    command = [str(tool), "test", "--driver", "tar", "--image", str(archive)]
    command += ["--config", str(Path(__file__).with_name("structure.yaml"))]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout


def test_no_secret_and_no_address_of_the_builder_is_in_the_image(podman: Podman) -> None:
    names = {line.partition("=")[0] for line in podman.inspect()["Env"]} - {"TOKENIZERS_PARALLELISM"}
    assert not [name for name in names if re.search("TOKEN|KEY|SECRET|PASSW|INDEX|PROXY|^PIP_", name, re.IGNORECASE)]
    ask = "find /root /job -type f; cat /etc/pip.conf; pip config list"
    status, output = podman.run("sh", "-c", ask, options=("--network", "none"))
    assert status == 0 and "/job/job/__main__.py" in output, output
    assert not re.search(r"/\.(env|git|netrc|pip|config|cache|aws)\b|/(tests|runs)/|index-url|find-links", output), output


def test_pythons_runpod_is_the_sdk_and_not_our_folder(engine: Containers) -> None:
    ask = "import runpod.serverless, job; print(runpod.__file__, job.__file__)"
    for options in (("--workdir", "/job"), ("--workdir", "/job/runpod"), ("--workdir", "/")):
        status, output = engine.run("python", "-c", ask, options=(*LOCKED, *engine.read_only, *TMPFS, *options))
        assert status == 0 and "/site-packages/runpod/__init__.py /job/job/__init__.py" in output, output


def test_triton_finds_its_compiler(engine: Containers) -> None:
    status, output = engine.run("sh", "-c", COMPILE, options=(*LOCKED, *engine.read_only, *TMPFS))
    assert (status, output.strip()) == (0, "42")


def test_a_misspelt_command_is_named(engine: Containers) -> None:
    status, output = engine.run("rnu", options=LOCKED)
    assert status == 2 and "'rnu'" in output and "choose from" in output


def test_check_says_yes(engine: Containers, inputs: Path, volume: Path, tmp_path: Path) -> None:
    options = (*LOCKED, *engine.read_only, *TMPFS, "--volume", f"{volume}:/data", *settings(inputs, tmp_path))
    status, output = engine.run("check", options=options)
    assert status == 0, output
    assert "/data" in output and not list(volume.glob("runs/r/checkpoints/*"))


@pytest.mark.parametrize("user", [USER, 54321])
def test_a_volume_of_somebody_else_is_refused_before_anything_is_spent(
    user: int, engine: Containers, inputs: Path, volume: Path, tmp_path: Path
) -> None:
    os.chown(volume, 0, 0)
    options = (
        *LOCKED,
        *engine.read_only,
        *TMPFS,
        "--user",
        str(user),
        "--volume",
        f"{volume}:/data",
        *settings(inputs, tmp_path),
    )
    status, output = engine.run(options=options)
    assert status == 5 and "/data/runs" in output, output


def test_a_run_is_stopped_and_continued_and_done_and_left_alone(
    engine: Containers, inputs: Path, volume: Path, tmp_path: Path
) -> None:
    """The same env file four times, without a command."""
    given = settings(inputs, tmp_path, MAX_STEPS=str(NUM_STEPS), NUM_TRAIN_EPOCHS="10", SAVE_STEPS="10")
    options = (*LOCKED, *engine.read_only, *TMPFS, "--volume", f"{volume}:/data", *given)
    run = volume / "runs/r"

    engine.start("first", options=options)
    deadline = time.monotonic() + 180
    while not list(run.glob("checkpoints/*/manifest.json")):
        assert time.monotonic() < deadline, engine.call("logs", "first")
        time.sleep(0.2)
    begun = time.monotonic()
    engine.call("stop", "--time", "60", "first")
    seconds, status = time.monotonic() - begun, int(engine.call("wait", "first"))
    logs = engine.call("logs", "first")
    engine.call("rm", "first")
    assert status == 75, logs
    stopped_at = max(whole_steps(run))
    assert 0 < stopped_at < NUM_STEPS and not (run / "DONE").exists()
    print(f"\nSIGTERM to the end of the container: {seconds:.1f} s, at step {stopped_at} of {NUM_STEPS}")

    status, output = engine.run(options=options)
    assert status == 0, output
    assert (run / "DONE").exists() and (run / "adapter/adapter_model.safetensors").exists()
    report = json.loads((run / "report.json").read_text("utf-8"))
    first_step = report["attempts"][1]["first_step"]
    assert (report["actual"]["num_steps"], len(report["attempts"])) == (NUM_STEPS, 2)
    assert first_step in (stopped_at, stopped_at + 1), "the second start did not continue the first"
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}

    for arguments in ((), ("train",)):
        status, output = engine.run(*arguments, options=options)
        assert status == 0, output
        assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before, "a finished run was touched"
    assert {path.stat().st_uid for path in volume.rglob("*")} == {USER}


def test_a_run_as_root_on_a_disk_of_its_own(engine: Containers, inputs: Path, volume: Path, tmp_path: Path) -> None:
    """As rented machines start it: no user, no limits, and an env file on the volume."""
    given = settings(inputs, tmp_path, MAX_STEPS="4")
    (volume / "job.env").write_bytes((tmp_path / "job.env").read_bytes())
    options = ("--network", "none", "--volume", f"{volume}:/workspace", *given[2:], "--env", "JOB_ENV_FILE=/workspace/job.env")
    status, output = engine.run(options=options)
    assert status == 0 and (volume / "runs/r/DONE").exists(), output
