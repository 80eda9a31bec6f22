"""How long `python -m job history` takes, as a whole process, and what its imports take of that.

    python benchmarks/history.py [--runs 200]

Reports with 1,000 logged steps (some 150 kB), one to five attempts a run, one run in three damaged, in a local folder, read as
tables, as JSON and as a page; the best of three. On a busy machine the processor's seconds tell more. Takes half a minute.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from run_records import make_records  # noqa: E402

HEAVY = ("torch", "pandas", "matplotlib", "datasets", "transformers", "boto3", "pyarrow", "numpy")
PROGRAM = """
import sys
from pathlib import Path
from job.deliver.history.read import run_history
from job.keep.store import open_store
folder, kind = Path(sys.argv[1]), sys.argv[2]
page = folder / "history.html" if kind == "page" else None
if kind != "imports":
    run_history(open_store(str(folder / "runs")), scratch=folder / "scratch", html=page, as_json=kind == "json", redact=str)
print(*sorted({heavy} & sys.modules.keys()), file=sys.stderr)
"""


def measure(folder: Path, kind: str) -> tuple[float, float, str]:
    """Seconds from the start of Python to its end and of the processor, the best of three; heavy modules imported."""
    program, times, cpu = PROGRAM.replace("{heavy}", repr(set(HEAVY))), [], []
    for _ in range(3):
        begun, before = time.perf_counter(), _cpu_seconds()
        child = subprocess.run(
            [sys.executable, "-c", program, str(folder), kind], cwd=ROOT, capture_output=True, text=True, check=True
        )
        times.append(time.perf_counter() - begun)
        cpu.append(_cpu_seconds() - before)
    return min(times), min(cpu), child.stderr.splitlines()[-1] or "none"


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--runs", type=int, default=200)
    count = parser.parse_args().runs
    with tempfile.TemporaryDirectory() as name:
        folder, records = Path(name), make_records(seed=1, count=count, bulk=1000)
        for path, content in records.files.items():
            (folder / "runs" / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / "runs" / path).write_bytes(content)
        size = sum(len(content) for content in records.files.values()) / 1e6
        print(f"{count} runs, {len(records.files):,} files, {size:.0f} MB")
        for kind in ("imports", "tables", "json", "page"):
            seconds, cpu, heavy = measure(folder, kind)
            print(f"{kind:<8} {seconds:5.2f} s, {cpu:5.2f} s of a processor   heavy modules: {heavy}")


if __name__ == "__main__":
    main()
