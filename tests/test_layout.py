"""The shape of the code itself: the order of its rooms, where torch and the environment may be touched, file sizes."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "job").rglob("*.py"))
MAX_LINES = 300

# A room is a module or package directly under job/. Imports go to the same step or to an earlier one.
STEPS = (
    ("__init__",),
    ("errors", "redaction", "events", "settings"),
    ("plan", "data", "keep", "scoring"),
    ("train", "stopping", "processes", "supervise", "display", "energy"),
    ("deliver", "preflight", "prepared"),
    ("sizing", "speeds", "foresight", "assignment", "orders", "lookout"),
    ("child", "planning"),
    ("recovery",),
    ("training", "quote"),
    ("stages",),
    ("trained",),
    ("following",),
    ("merging",),
    ("ending",),
    ("evaluating",),
    ("run",),
    ("renting",),
    ("leaving",),
    ("__main__",),
)
STEP_OF = {room: step for step, rooms in enumerate(STEPS) for room in rooms}
STRANGERS = {"plan", "data", "keep", "scoring"}
"""Rooms that know nothing of each other."""

MAY_IMPORT_TORCH = ("train/", "deliver/evaluate.py")
MAY_READ_ENVIRON = ("__main__.py", "child.py")


def inside_job(path: Path) -> str:
    return path.relative_to(ROOT / "job").as_posix()


def room_of(path: str) -> str:
    """`data/tokens.py` and `data/__init__.py` lie in `data`, `errors.py` in `errors`."""
    return path.partition("/")[0].removesuffix(".py")


def imported_modules(source: str, path: str) -> Iterator[str]:
    """Full names of everything imported anywhere in a file, also inside functions; `path` is its place in job/."""
    package = ["job", *path.split("/")[:-1]]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*start, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def wrong_imports(source: str, path: str) -> list[str]:
    """What a file imports against the order of the rooms."""
    room = room_of(path)
    if room not in STEP_OF:
        return [f"job/{path}: room {room!r} has no place in STEPS"]
    wrong = []
    for module in imported_modules(source, path):
        top, _, rest = module.partition(".")
        other = rest.partition(".")[0]
        if top != "job" or not other or other == room or other == "__version__":
            continue
        if other not in STEP_OF:
            wrong.append(f"job/{path} imports {module}: room {other!r} has no place in STEPS")
        elif STEP_OF[other] > STEP_OF[room] or {other, room} <= STRANGERS:
            wrong.append(f"job/{path} imports {module}")
    return wrong


def imports_torch(source: str, path: str) -> bool:
    return any(module.partition(".")[0] == "torch" for module in imported_modules(source, path))


def reads_environ(source: str) -> bool:
    """Whether `os.environ`, `os.getenv` or the like is named anywhere, however it was imported."""
    names = {"environ", "environb", "getenv", "getenvb"}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr in names and isinstance(node.value, ast.Name):
            if node.value.id == "os":
                return True
        elif isinstance(node, ast.ImportFrom) and node.module == "os" and names & {alias.name for alias in node.names}:
            return True
    return False


def test_the_sources_are_found() -> None:
    assert {"errors.py", "settings/read.py", "data/tokens.py"} <= {inside_job(path) for path in SOURCES}


def test_no_file_is_longer_than_300_lines() -> None:
    lengths = {inside_job(path): len(path.read_text("utf-8").splitlines()) for path in SOURCES}
    assert {path: length for path, length in lengths.items() if length > MAX_LINES} == {}


def test_no_room_imports_a_later_room() -> None:
    wrong = [line for path in SOURCES for line in wrong_imports(path.read_text("utf-8"), inside_job(path))]
    assert wrong == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("settings/read.py", "from job.data import prepare"),
        ("settings/read.py", "def f():\n    import job.data.tokens"),
        ("errors.py", "from job import keep"),
        ("data/tokens.py", "from job.keep.store import Store"),
        ("keep/store.py", "from ..data import tokens"),
        ("plan/memory.py", "from job.data.tokens import IGNORED"),
        ("train/loop.py", "from job.__main__ import main"),
        ("data/tokens.py", "from job.newcomer import thing"),
        ("newcomer.py", "import json"),
    ],
)
def test_an_import_against_the_order_is_found(path: str, source: str) -> None:
    assert len(wrong_imports(source, path)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("data/tokens.py", "from job.settings import DataSettings\nfrom job.errors import DataError\nimport json"),
        ("data/tokens.py", "from .messages import Example"),
        ("__main__.py", "from job.child import run\nfrom job import settings"),
        ("deliver/card/write.py", "from job.keep.store import Store\nfrom job.data.prepare import Tally"),
    ],
)
def test_an_import_along_the_order_is_allowed(path: str, source: str) -> None:
    assert wrong_imports(source, path) == []


def test_only_rooms_that_compute_import_torch() -> None:
    guilty = [inside_job(path) for path in SOURCES if imports_torch(path.read_text("utf-8"), inside_job(path))]
    assert [path for path in guilty if not path.startswith(MAY_IMPORT_TORCH)] == []


@pytest.mark.parametrize(
    "source", ["import torch", "def f():\n    import torch.nn as nn", "def f():\n    from torch.utils import data"]
)
def test_an_import_of_torch_is_found_wherever_it_stands(source: str) -> None:
    assert imports_torch(source, "data/tokens.py")


def test_only_entry_modules_read_the_environment() -> None:
    guilty = [inside_job(path) for path in SOURCES if reads_environ(path.read_text("utf-8"))]
    assert [path for path in guilty if path not in MAY_READ_ENVIRON] == []


@pytest.mark.parametrize(
    "source", ["import os\nos.environ['A']", "import os\ndef f(): return os.getenv('A')", "from os import environ as e"]
)
def test_a_read_of_the_environment_is_found_however_it_is_written(source: str) -> None:
    assert reads_environ(source)


def test_settings_are_read_and_described_without_the_heavy_libraries() -> None:
    program = (
        "import sys, job.settings, job.settings.describe as describe\n"
        "job.settings.read_settings({'MODEL_ID': 'owner/name', 'DATASETS': 'owner/name'}, {})\n"
        "assert 'LEARNING_RATE' in describe.settings_markdown()\n"
        "print(*sorted({'torch', 'transformers', 'datasets', 'trl', 'peft', 'boto3'} & sys.modules.keys()))"
    )
    child = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (child.returncode, child.stdout.strip()) == (0, ""), child.stderr
