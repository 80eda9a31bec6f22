"""The image's requirements in, the wheels that Ubuntu 24.04's Python 3.12 would install out, with sizes; none is downloaded.

    python tests/image/cuda_wheels.py    # a table by part; status 1 when they do not resolve, or a version is left open

pip resolves from the index's metadata. How large a wheel is unpacked stands in the directory at its end, and that alone is read.
What is not handled: whether CUDA works; no wheel is run.
"""

import io
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

import requests

ROOT = Path(__file__).resolve().parents[2]
LISTS = ("requirements.txt", "requirements-runpod.txt")
CONSTRAINTS = ("requirements-trackers.txt", "requirements-image.txt")
TRACKERS = ("tensorboard", "wandb")  # the Dockerfile's TRACKERS
PYTHON = "3.12"
GLIBC = 39
"""Of Ubuntu 24.04: 2.39."""
CHUNK_BYTES = 64 << 10
SHOWN_LINES = 12


@dataclass(frozen=True, kw_only=True, slots=True)
class Wheel:
    """One that would be installed."""

    name: str
    version: str
    wheel_bytes: int
    unpacked_bytes: int
    source_bytes: int
    """Of that, Python, which pip compiles into as much again."""

    @property
    def part(self) -> str:
        """The line of the table that it counts in."""
        if self.name in ("torch", "triton"):
            return self.name
        return "cuda" if self.name.startswith(("nvidia-", "cuda-")) else "other"


class _Ranges(io.RawIOBase):
    """A file on a web server, of which only what is asked for is read."""

    def __init__(self, url: str) -> None:
        self._url, self._at = url, 0
        with requests.head(url, allow_redirects=True, timeout=60) as head:
            head.raise_for_status()
            self.size = int(head.headers["Content-Length"])

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.size}[whence]
        return self._at

    def readinto(self, buffer: "memoryview | bytearray") -> int:  # type: ignore[override]
        end = min(self._at + len(buffer), self.size) - 1
        if end < self._at:
            return 0
        response = requests.get(self._url, headers={"Range": f"bytes={self._at}-{end}"}, timeout=60)
        response.raise_for_status()
        if response.status_code != requests.codes.partial_content:
            raise OSError(f"{self._url}: the index does not serve parts of files")
        buffer[: len(response.content)] = response.content
        self._at += len(response.content)
        return len(response.content)


def pinned_names(texts: Iterable[str]) -> set[str]:
    """Normalised names of all that have one version."""
    lines = (line.partition("#")[0].strip() for text in texts for line in text.splitlines())
    return {_normalised(line.partition("==")[0]) for line in lines if "==" in line}


def resolve(lists: Iterable[Path], constraints: Iterable[Path], names: Iterable[str]) -> list[dict[str, str]]:
    """What pip would install from them on the image's Python: name, version and url of each.

    Raises:
        ValueError: nothing fits together; with pip's last words.
    """
    tags = [f"manylinux_2_{minor}_x86_64" for minor in range(5, GLIBC + 1)]
    tags += ["manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64", "linux_x86_64"]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed"]
        command += ["--disable-pip-version-check", "--python-version", PYTHON, "--only-binary", ":all:", "--target", folder]
        command += [word for tag in tags for word in ("--platform", tag)]
        command += [word for path in lists for word in ("--requirement", str(path))]
        command += [word for path in constraints for word in ("--constraint", str(path))]
        done = subprocess.run([*command, "--report", f"{folder}/report.json", *names], capture_output=True, text=True)
        if done.returncode:
            said = [line for line in (done.stdout + done.stderr).splitlines() if not line.startswith(("WARNING", "Collecting"))]
            raise ValueError("\n".join(["the requirements do not resolve:", *said[-SHOWN_LINES:]]))
        report = json.loads(Path(folder, "report.json").read_text("utf-8"))
    return [
        {
            "name": _normalised(item["metadata"]["name"]),
            "version": item["metadata"]["version"],
            "url": item["download_info"]["url"],
        }
        for item in report["install"]
    ]


def measure(item: dict[str, str]) -> Wheel:
    """Read a wheel's own list of files."""
    parts = urlsplit(item["url"])
    raw = io.FileIO(unquote(parts.path)) if parts.scheme == "file" else _Ranges(item["url"])
    with io.BufferedReader(raw, CHUNK_BYTES) as file, zipfile.ZipFile(file) as archive:
        wheel_bytes = file.seek(0, io.SEEK_END)
        infos = archive.infolist()
    return Wheel(
        name=item["name"],
        version=item["version"],
        wheel_bytes=wheel_bytes,
        unpacked_bytes=sum(info.file_size for info in infos),
        source_bytes=sum(info.file_size for info in infos if info.filename.endswith(".py")),
    )


def cuda_wheels() -> list[Wheel]:
    """All wheels of the image's requirements.

    Raises:
        ValueError: they do not resolve, a version is left open, or torch is not the build with CUDA.
    """
    lists = [ROOT / name for name in LISTS if (ROOT / name).exists()]
    constraints = [ROOT / name for name in CONSTRAINTS]
    items = resolve(lists, constraints, TRACKERS)
    pinned = pinned_names(path.read_text("utf-8") for path in [*lists, *constraints])
    if unpinned := sorted(f"{item['name']}=={item['version']}" for item in items if item["name"] not in pinned):
        raise ValueError(f"{', '.join(unpinned)}: pinned nowhere; add them to requirements-image.txt")
    versions = {item["name"]: item["version"] for item in items}
    if "+" in versions["torch"] or "nvidia-cublas" not in versions:
        raise ValueError(f"torch {versions['torch']} is not the build with CUDA: another index comes before PyPI")
    with ThreadPoolExecutor(8) as pool:
        return sorted(pool.map(measure, items), key=lambda wheel: -wheel.unpacked_bytes)


def _normalised(name: str) -> str:
    return name.strip().partition("[")[0].lower().replace("_", "-").replace(".", "-")


def main() -> int:
    try:
        wheels = cuda_wheels()
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{'wheel':<28}{'version':<14}{'wheel MB':>9}{'unpacked MB':>13}")
    for wheel in [wheel for wheel in wheels if wheel.part != "other"]:
        print(f"{wheel.name:<28}{wheel.version:<14}{wheel.wheel_bytes / 1e6:>9.1f}{wheel.unpacked_bytes / 1e6:>13.1f}")
    for part in ("torch", "triton", "cuda", "other"):
        chosen = [wheel for wheel in wheels if wheel.part == part]
        wheel_bytes, unpacked = sum(wheel.wheel_bytes for wheel in chosen), sum(wheel.unpacked_bytes for wheel in chosen)
        print(f"{part + f': {len(chosen)} in all':<42}{wheel_bytes / 1e6:>9.1f}{unpacked / 1e6:>13.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
