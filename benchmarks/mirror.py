"""What checkpoints in a slow store cost the training: not saved at all, mirrored, and stored synchronously.

    python benchmarks/mirror.py

A plain loop on the CPU, in a process of its own as the trainer is, stands for training steps; every ten of them it writes and
seals a checkpoint of 50 MB. The store is a moto server behind a proxy that takes 200 ms before each answer and 5 MB/s. Takes
about 100 seconds. `overhead` is the ratio of whole training times in one run, where only a quiet machine tells percents apart.
`held up` is the time that the loop spent on saving over the time that it spent on steps, which noise hardly touches: of the
mirror it is what the disk takes, whatever the store. `cpu s` is what the supervisor's process burnt beside it.
"""

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from s3_server import BUCKET, s3_server  # noqa: E402

from job.keep.checkpoints import CHECKPOINTS, list_steps, put_folder, seal, step_name  # noqa: E402
from job.keep.mirror import Mirror  # noqa: E402
from job.keep.s3 import S3Store  # noqa: E402

STEPS, SAVE_STEPS, STEP_SECONDS = 20, 10, 1.0
CHECKPOINT_BYTES, DELAY_SECONDS, BYTES_PER_SECOND = 50_000_000, 0.2, 5_000_000.0
BLOCK = bytes(2**20)
MODES = ("none", "mirror", "synchronous")


def work(num_blocks: int) -> None:
    digest = hashlib.sha256()
    for _ in range(num_blocks):
        digest.update(BLOCK)


def calibrate() -> int:
    """How many blocks one step takes."""
    costs = []
    for _ in range(3):
        begun = time.process_time()
        work(256)
        costs.append(time.process_time() - begun)
    return max(1, round(256 * STEP_SECONDS / min(costs)))


def train(mode: str, folder: Path, num_blocks: int, endpoint: dict[str, str]) -> None:
    """The trainer's side: a line for each checkpoint, and the times at the end."""
    store = S3Store(BUCKET, mode, endpoint)
    state = os.urandom(CHECKPOINT_BYTES)
    steps, saves, waits = [], [], []
    begun = time.perf_counter()
    for step in range(1, STEPS + 1):
        start = time.perf_counter()
        work(num_blocks)
        steps.append(time.perf_counter() - start)
        if step % SAVE_STEPS == 0 and mode != "none":
            start = time.perf_counter()
            path = folder / step_name(step)
            path.mkdir(parents=True)
            (path / "adapter_model.safetensors").write_bytes(state[: len(state) // 3])
            (path / "optimizer.pt").write_bytes(state[len(state) // 3 :])
            seal(path, step)
            saves.append(time.perf_counter() - start)
            print(f"saved {step}", flush=True)
            if mode == "synchronous":
                start = time.perf_counter()
                put_folder(store, path, f"{CHECKPOINTS}/{path.name}")
                waits.append(time.perf_counter() - start)
    seconds = time.perf_counter() - begun
    held_up = (sum(saves) + sum(waits)) / sum(steps)
    times = {"seconds": seconds, "step": statistics.median(steps), "disk": sum(saves), "store": sum(waits)}
    print(json.dumps({**times, "held_up": held_up}))


def serve() -> None:
    """The store's side, until standard input ends."""
    with s3_server() as server:
        server.proxy.delay_seconds, server.proxy.bytes_per_second = DELAY_SECONDS, BYTES_PER_SECOND
        print(json.dumps(server.credentials), flush=True)
        sys.stdin.read()


def measure(mode: str, endpoint: dict[str, str], num_blocks: int, folder: Path) -> dict[str, float]:
    """The supervisor's side."""
    store = S3Store(BUCKET, mode, endpoint)
    burnt = time.process_time()
    mirror = Mirror(store, folder, keep=3, warn=print) if mode == "mirror" else None
    arguments = ["--train", mode, str(folder), str(num_blocks), json.dumps(endpoint)]
    child = subprocess.Popen([sys.executable, __file__, *arguments], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    result: dict[str, float] = {}
    for line in child.stdout:
        if line.startswith("saved "):
            if mirror is not None:
                mirror.offer(int(line.split()[1]))
        else:
            result = json.loads(line)
    if child.wait():
        raise SystemExit(f"the {mode} run failed")
    begun = time.perf_counter()
    if mirror is not None:
        mirror.finish()
    result["end"] = time.perf_counter() - begun
    result["cpu"] = time.process_time() - burnt
    if mode != "none" and list_steps(store)[0] != STEPS:
        raise SystemExit(f"the {mode} run's newest checkpoint is not in the store")
    return result


def main() -> None:
    num_blocks = calibrate()
    results = {}
    server = subprocess.Popen([sys.executable, __file__, "--serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert server.stdin is not None and server.stdout is not None
    endpoint = json.loads(server.stdout.readline())
    with tempfile.TemporaryDirectory() as folder:
        for mode in MODES:
            results[mode] = measure(mode, endpoint, num_blocks, Path(folder) / mode)
    server.stdin.close()
    server.wait()
    print(f"{STEPS} steps, a checkpoint of {CHECKPOINT_BYTES / 1e6:.0f} MB every {SAVE_STEPS}, store: ", end="")
    print(f"{DELAY_SECONDS * 1000:.0f} ms a request, {BYTES_PER_SECOND / 1e6:.0f} MB/s")
    print(f"{'':11} {'training s':>10} {'overhead':>8} {'held up':>8} {'disk s':>7} {'store s':>8} {'at end s':>9} {'cpu s':>6}")
    for mode, result in results.items():
        result["overhead"] = result["seconds"] / results["none"]["seconds"] - 1
        shares = f"{result['seconds']:10.2f} {result['overhead']:8.1%} {result['held_up']:8.1%}"
        print(f"{mode:11} {shares} {result['disk']:7.2f} {result['store']:8.2f} {result['end']:9.2f} {result['cpu']:6.2f}")
    print(json.dumps(results))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    asked = arguments.train
    if arguments.serve:
        serve()
    elif asked:
        train(asked[0], Path(asked[1]), int(asked[2]), json.loads(asked[3]))
    else:
        main()
