"""Podman with a store of its own: builds the image and runs its containers; and Docker, where its daemon answers. Linux, root.

What is not handled: GPUs, and registries: the base is made from Debian's or Ubuntu's packages.
"""

import ast
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from conftest import ROOT

CACHE = Path(os.environ.get("IMAGE_TEST_CACHE", "/var/tmp/qlora-job-image-test"))
"""Base, layers and downloads, about 4 GB: the second build takes seconds."""
TOOLS = ("podman", "mmdebstrap")
BASE, IMAGE = "localhost/base:test", "localhost/qlora-job:test"
MAX_OPEN_FILES, MAX_PROCESSES = 20_000, 30_000
PIP_SETTINGS = (
    "index-url",
    "extra-index-url",
    "find-links",
    "trusted-host",
    "no-index",
    "proxy",
    "default-timeout",
    "constraint",
)
"""Of this machine, that a build needs to reach the same packages; `cert` goes another way."""
CERTIFICATES = "/etc/ssl/host-certificates.pem"


class Missing(Exception):
    """What this machine lacks."""


class Containers:
    """What runs containers from the command line, Docker's or one that takes the same words."""

    program: list[str]
    limits: list[str]
    read_only: list[str]
    environ: dict[str, str]

    def call(self, *arguments: str, timeout: float = 600) -> str:
        """Do something; returns what it printed."""
        command = [*self.program, *arguments]
        done = subprocess.run(command, env=self.environ, capture_output=True, text=True, timeout=timeout)
        if done.returncode:
            raise AssertionError(f"{' '.join(arguments[:2])}: status {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout.strip()

    def run(self, *arguments: str, options: Sequence[str] = ()) -> tuple[int, str]:
        """Run a container to its end; returns (exit status, all that was printed)."""
        done = subprocess.run(
            [*self.program, "run", "--rm", *self.limits, *options, IMAGE, *arguments],
            env=self.environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
        )
        return done.returncode, done.stdout

    def start(self, name: str, *arguments: str, options: Sequence[str] = ()) -> None:
        """Start a container and leave it running."""
        self.call("run", "--detach", "--name", name, *self.limits, *options, IMAGE, *arguments)


class Docker(Containers):
    """The daemon that DOCKER_HOST names, or the usual one."""

    def __init__(self, archive: Path) -> None:
        """Give it the image.

        Raises:
            Missing: no daemon answers.
        """
        self.program, self.limits, self.read_only = ["docker"], [], ["--read-only"]
        self.environ = dict(os.environ)
        if shutil.which("docker") is None:
            raise Missing("the Docker engine is not here")
        try:
            self.call("version", timeout=30)
        except AssertionError as error:
            raise Missing(f"no Docker daemon answers: {error}") from None
        self.call("load", "--input", str(archive))


class Podman(Containers):
    """One store of images and containers, apart from this machine's own."""

    def __init__(self, cache: Path = CACHE) -> None:
        """Look whether containers run here, in a small Debian that is made at the first time.

        Raises:
            Missing: says what to install, or why not.
        """
        if sys.platform != "linux" or os.geteuid() != 0:
            raise Missing("needs root on Linux: it makes a base from packages and mounts its layers")
        if lacking := [tool for tool in TOOLS if shutil.which(tool) is None]:
            raise Missing(f"needs {' and '.join(lacking)}: apt-get install podman runc mmdebstrap")
        self.cache = cache
        (cache / "tmp").mkdir(parents=True, exist_ok=True)
        self.environ = {**os.environ, "TMPDIR": str(cache / "tmp")}  # its cache mounts lie there too
        self.program = ["podman", "--root", str(cache / "store"), "--runroot", str(cache / "run")]
        self.program += ["--storage-driver", os.environ.get("STORAGE_DRIVER", "overlay")]
        self.program += ["--cgroup-manager", "cgroupfs", "--events-backend", "file"]
        if shutil.which("runc"):  # Debian's crun refuses machines that have cgroups of both versions
            self.program += ["--runtime", "runc"]
        # Podman asks for more than a machine that is itself a container may give.
        files = min(resource.getrlimit(resource.RLIMIT_NOFILE)[1], MAX_OPEN_FILES)
        self.limits = ["--ulimit", f"nofile={files}:{files}", "--ulimit", f"nproc={MAX_PROCESSES}:{MAX_PROCESSES}"]
        self.read_only = ["--read-only", "--read-only-tmpfs=false"]
        if subprocess.run([*self.program, "image", "exists", BASE], env=self.environ).returncode:
            self._make_base()
        try:
            self.call("run", "--rm", *self.limits, "--network", "none", BASE, "true")
        except AssertionError as error:
            raise Missing(f"containers do not start on this machine: {error}") from None

    def _make_base(self) -> None:
        """This machine's own Debian or Ubuntu, as small as it gets, in the place of nvidia/cuda."""
        release = dict(line.split("=", 1) for line in Path("/etc/os-release").read_text("utf-8").splitlines() if "=" in line)
        tar, suite = self.cache / "base.tar", release["VERSION_CODENAME"].strip('"')
        subprocess.run(["mmdebstrap", "--quiet", "--variant=minbase", suite, str(tar)], check=True)
        self.call("import", str(tar), BASE)
        tar.unlink()

    def build(self, arguments: Mapping[str, str]) -> None:
        """Build the repository's Dockerfile on the small base; what it prints is shown."""
        pip, settings = self.cache / "pip.conf", _pip_settings()
        pip.touch(mode=0o600)  # an index's address may hold a password
        pip.write_text("[global]\n" + "".join(f"{name} = {value}\n" for name, value in settings.items()), "utf-8")
        volumes = [f"{pip}:/etc/pip.conf:ro", *(f"{path}:{path}:ro" for path in _named_paths(settings))]
        if certificates := _certificates():
            volumes.append(f"{certificates}:{CERTIFICATES}:ro")
        command = [*self.program, "build", "--isolation", "chroot", "--network", "host", "--layers", "--tag", IMAGE]
        command += [word for volume in volumes for word in ("--volume", volume)]
        command += [word for name, value in arguments.items() for word in ("--build-arg", f"{name}={value}")]
        try:
            subprocess.run([*command, str(ROOT)], env=self.environ, check=True)
        finally:
            pip.unlink()

    def save(self, archive: Path, *, without: Sequence[str] = ()) -> None:
        """Write the image into a file, as Docker does; without some of its folders in one layer."""
        image = IMAGE
        if without:
            image = f"{IMAGE}-small"
            text = f"FROM {IMAGE}\nRUN rm -rf {' '.join(without)}\n"
            command = [*self.program, "build", "--isolation", "chroot", "--squash-all", "--tag", image, "--file", "-"]
            with tempfile.TemporaryDirectory() as nothing:
                subprocess.run(
                    [*command, nothing], env=self.environ, input=text, text=True, check=True, stdout=subprocess.DEVNULL
                )
        self.call("save", "--format", "docker-archive", "--output", str(archive), image)

    def inspect(self) -> dict[str, Any]:
        """The image's configuration."""
        config: dict[str, Any] = json.loads(self.call("image", "inspect", IMAGE))[0]["Config"]
        return config


def _pip_settings() -> dict[str, str]:
    """How pip is set up on this machine; the environment's word first, as pip lists it."""
    done = subprocess.run([sys.executable, "-m", "pip", "config", "list"], stdout=subprocess.PIPE, text=True, check=True)
    settings: dict[str, str] = {}
    for line in done.stdout.splitlines():
        name, _, value = line.partition("=")
        name = name.rpartition(".")[2]
        if name in PIP_SETTINGS:
            settings.setdefault(name, str(ast.literal_eval(value)))
    if _certificates():
        settings["cert"] = CERTIFICATES
    return settings


def _certificates() -> Path | None:
    """What this machine trusts beyond the usual, as a company's proxy needs it."""
    named = os.environ.get("PIP_CERT") or os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("SSL_CERT_FILE")
    return Path(named) if named and Path(named).is_file() else None


def _named_paths(settings: Mapping[str, str]) -> list[Path]:
    """Folders and files of this machine that the settings name."""
    words = [word for name, value in settings.items() if name != "cert" for word in value.split()]
    paths = [Path(unquote(urlsplit(word).path)) for word in words if word.startswith(("/", "file://"))]
    # A folder of links to files beside it is of use only with them.
    paths = [path.parent if path.name == "simple" else path for path in paths]
    return sorted({path for path in paths if path.exists()})
