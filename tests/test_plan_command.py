"""`python -m job plan` and the forecasts of a run as a user meets them: real processes, real HTTP, no GPU."""

import json
import shutil
import stat
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from conftest import ROOT, Job

from job.keep.store import open_store
from job.plan.price import runpod_price
from job.speeds import learned_speed, remember_speed

SHAPES = {
    "Qwen--Qwen2.5-Coder-1.5B-Instruct": (1.0, 3.0),
    "meta-llama--Llama-3.2-3B-Instruct": (1.8, 5.0),
    "meta-llama--Llama-3.1-8B-Instruct": (5.0, 10.0),
    "google--gemma-3-27b-it": (15.0, 23.0),
    "Qwen--Qwen3-30B-A3B": (65.0, 80.0),
}
"""Names of published configurations, and between which GiB their peak lies at one example of 2,048 tokens."""
GIB = 2**30
KEYS = {
    *("name", "memory_bytes", "fits", "micro_batch", "gradient_accumulation_steps"),
    *("hours_low", "hours_high", "cost_usd_low", "cost_usd_high", "price_source"),
}


def shaped(folder: Path, name: str, data: Path) -> Job:
    """A job on a model that is a bare configuration."""
    (folder / name).mkdir(parents=True)
    (folder / name / "model.safetensors").touch()  # a folder without weights is refused for that
    shutil.copy(ROOT / f"benchmarks/models/{name}.json", folder / name / "config.json")
    return Job(folder, {"MODEL_ID": str(folder / name), "DATASETS": str(data), "HF_HUB_OFFLINE": "1", "RUN_ID": "p"})


def quoted(job: Job, *flags: str, **settings: str) -> dict[str, Any]:
    status, output = job.run("plan", "--json", *flags, **settings)
    assert status == 0, output
    found: dict[str, Any] = json.loads(output[output.index("{\n") :])
    return found


@pytest.fixture(scope="module")
def quotes(tmp_path_factory: pytest.TempPathFactory, conversations: Path) -> dict[str, dict[str, Any]]:
    """What `plan --json` says of each shape."""
    folder = tmp_path_factory.mktemp("shapes")
    jobs = {name: shaped(folder / name, name, conversations) for name in SHAPES}
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(jobs, pool.map(quoted, jobs.values()), strict=True))


@pytest.mark.parametrize("name", SHAPES)
def test_a_configuration_alone_is_planned_on_every_gpu(name: str, quotes: dict[str, dict[str, Any]]) -> None:
    quote, (low, high) = quotes[name], SHAPES[name]
    memory = quote["memory"]
    parts = ("weights", "adapter", "gradients", "optimizer", "activations", "logits", "transient", "reserved")
    assert sum(memory[f"{part}_bytes"] for part in parts) == memory["peak_bytes"]
    assert low < memory["peak_bytes"] / GIB < high
    assert memory["peak_bytes"] < memory["safe_peak_bytes"]
    assert len(quote["gpus"]) > 40 and quote["model"]["method"] == "traced"
    for gpu in quote["gpus"]:
        assert gpu.keys() >= KEYS
        if gpu["fits"]:
            assert 0 < gpu["hours_low"] < gpu["hours_high"]
        if gpu["fits"] and gpu["price_source"] != "unknown":
            assert 0 < gpu["cost_usd_low"] < gpu["cost_usd_high"]
    assert sum(gpu["is_cheapest"] for gpu in quote["gpus"]) == 1


def test_small_models_fit_where_large_ones_do_not(quotes: dict[str, dict[str, Any]]) -> None:
    fits = {name: {gpu["name"] for gpu in quote["gpus"] if gpu["fits"]} for name, quote in quotes.items()}
    coder, llama, gemma, experts = (fits[name] for name in SHAPES if "3.2" not in name)
    assert "RTX 5060" in coder and "RTX 5060" not in gemma
    assert experts < gemma < llama <= coder
    assert "B200" in experts and "RTX 4090" not in experts
    problems = quotes["Qwen--Qwen3-30B-A3B"]["problems"]
    assert any("LORA_DROPOUT" in problem for problem in problems)
    assert any("does not quantise" in text for text in quotes["Qwen--Qwen3-30B-A3B"]["assumptions"])


def test_the_users_rate_counts_for_the_gpu_that_is_named(tmp_path: Path, conversations: Path) -> None:
    job = shaped(tmp_path, "Qwen--Qwen2.5-Coder-1.5B-Instruct", conversations)
    begun = time.monotonic()
    status, output = job.run("plan", "--gpu", "NVIDIA B200", "--gpu-hourly-rate", "6.36")
    assert status == 0, output
    for part in (
        "B200",
        "6.36",
        "GPU_HOURLY_RATE",
        "the cheapest that fits",
        "billion parameters",
        "GiB expected",
    ):
        assert part in output, part
    quote = quoted(job, "--gpu", "b200", GPU_HOURLY_RATE="6.36")
    (gpu,) = quote["gpus"]
    assert gpu["cost_usd_high"] == pytest.approx(gpu["hours_high"] * 6.36)
    assert "safetensors" not in str(list((tmp_path / "work").rglob("*"))) and time.monotonic() - begun < 200
    quote = quoted(job, "--gpu", "b200", "--num-gpus", "4", GPU_HOURLY_RATE="20")
    (four,) = quote["gpus"]
    assert (four["num_gpus"], four["parallel"], four["usd_per_hour"]) == (4, "ddp", 20)
    assert four["micro_batch"] * four["gradient_accumulation_steps"] == 4
    assert four["hours_low"] < gpu["hours_low"] and any("times one's speed" in text for text in quote["assumptions"])


def test_a_signed_address_is_not_told(tmp_path: Path, conversations: Path) -> None:
    job = shaped(tmp_path, "Qwen--Qwen2.5-Coder-1.5B-Instruct", conversations)
    signed = "http://127.0.0.1:9/rows.jsonl?X-Amz-Signature=0123456789abcdef0123"
    for flags in ((), ("--json",)):
        status, output = job.run("plan", "--gpu", "L4", *flags, DATASETS=signed)
        assert status == 0 and "0123456789abcdef0123" not in output, output


def test_flags_that_make_no_sense_are_refused_by_name(job: Job) -> None:
    for flags, named in (
        (("--gpu", "RTX 4099"), "did you mean RTX 409"),
        (("--num-gpus", "none"), "--num-gpus=none"),
        (("--num-gpus", "3"), "must be a multiple of the 3 GPUs"),
    ):
        status, output = job.run("plan", *flags)
        assert status == 2 and named in output, output


def test_a_run_that_fits_nowhere_asked_for_ends_with_4(tmp_path: Path, conversations: Path) -> None:
    job = shaped(tmp_path, "google--gemma-3-27b-it", conversations)
    status, output = job.run("plan", "--gpu", "RTX 5060")
    assert status == 4 and "does not fit on RTX 5060" in output, output


def test_prepared_data_are_counted_and_unprepared_estimated(job: Job) -> None:
    rough = quoted(job, "--gpu", "L4")["work"]
    assert rough["basis"].startswith("estimated") and abs(rough["num_examples"] - 58) <= 1
    assert job.run("prepare")[0] == 0
    exact = quoted(job, "--gpu", "L4")["work"]
    tally = json.loads((job.kept / "tally.json").read_text())
    assert (exact["basis"], exact["num_tokens"]) == ("counted", tally["num_train_tokens"])
    assert rough["num_tokens"] == pytest.approx(exact["num_tokens"], rel=0.1)


def fake_driver(folder: Path, *lines: str) -> str:
    """A PATH with an nvidia-smi that prints this, a line for each GPU."""
    folder.mkdir()
    script = folder / "nvidia-smi"
    script.write_text("#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in lines))
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return f"{folder}:/usr/bin:/bin"


def test_a_run_that_cannot_fit_its_gpu_is_refused_before_anything(tmp_path: Path, conversations: Path) -> None:
    job = shaped(tmp_path, "meta-llama--Llama-3.1-8B-Instruct", conversations)
    path = fake_driver(tmp_path / "bin", "NVIDIA GeForce RTX 4090, 24564, 580.65.06, 8.9")
    status, output = job.run("check", PATH=path, ACTIVATION_CHECKPOINTING="0", PER_DEVICE_TRAIN_BATCH_SIZE="4")
    assert status == 4, output
    for part in ("RTX 4090", "MAX_LENGTH=2048", "ACTIVATION_CHECKPOINTING=auto", "larger GPU"):
        assert part in output, output
    path = fake_driver(tmp_path / "three", *["NVIDIA GeForce RTX 4090, 24564, 580.65.06, 8.9"] * 3)
    status, output = job.run("check", PATH=path)
    assert status == 2 and "EFFECTIVE_BATCH_SIZE=16: must be a multiple of the 3 GPUs; take 15 or 18" in output, output
    status, output = job.run("check", PATH=path, NPROC_PER_NODE="2")
    assert status == 0 and "2 x NVIDIA GeForce RTX 4090" in output and "of 24.0 (each of 2 RTX 4090, ddp)" in output, output


def test_a_budget_that_cannot_suffice_is_refused_before_anything(tmp_path: Path, conversations: Path) -> None:
    job = shaped(tmp_path, "Qwen--Qwen2.5-Coder-1.5B-Instruct", conversations)
    path = fake_driver(tmp_path / "bin", "NVIDIA GeForce RTX 4090, 24564, 580.65.06, 8.9")
    status, output = job.run("check", PATH=path, MAX_COST_USD="0.001", GPU_HOURLY_RATE="0.5")
    assert status == 4 and "MAX_COST_USD=0.001" in output, output
    status, output = job.run("check", PATH=path, MAX_HOURS="0.0001")
    assert status == 4 and "MAX_HOURS=0.0001" in output, output


@contextmanager
def runpod(status: int, body: object) -> Iterator[tuple[str, list[tuple[str, str | None]]]]:
    """RunPod's API for one pod; yields its address and what was asked of it."""
    asked: list[tuple[str, str | None]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append((self.path, self.headers["Authorization"]))
            text = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v2", asked
    finally:
        server.shutdown()


def test_a_pods_price_is_asked_of_runpod() -> None:
    with runpod(200, {"id": "p1", "cost": 0.74}) as (address, asked):
        price, complaint = runpod_price({"RUNPOD_POD_ID": "p1", "RUNPOD_REST_URL": address}, "rpa_secret")
    assert price is not None and (price.usd_per_hour, complaint) == (0.74, None)
    assert asked == [("/v2/pods/p1", "Bearer rpa_secret")]


@pytest.mark.parametrize(
    ("status", "body", "told"),
    [
        (401, {}, "refuses"),
        (403, {}, "refuses"),
        (500, {}, "not known"),
        (200, [], "not say"),
        (200, {"cost": 0}, "not say"),
    ],
)
def test_a_price_that_runpod_does_not_tell_is_unknown_and_said_so(status: int, body: object, told: str) -> None:
    with runpod(status, body) as (address, _):
        price, complaint = runpod_price({"RUNPOD_POD_ID": "p1", "RUNPOD_REST_URL": address}, "rpa_secret")
    assert price is None and complaint is not None and told in complaint
    assert "rpa_secret" not in complaint


def test_elsewhere_runpod_is_not_asked() -> None:
    assert runpod_price({}, "rpa_secret") == (None, None)
    price, complaint = runpod_price({"RUNPOD_POD_ID": "p1"}, None)
    assert price is None and complaint is not None and "RUNPOD_API_KEY" in complaint


def test_the_speed_of_a_run_is_learned_for_the_same_model_and_gpu_only(tmp_path: Path) -> None:
    from job.settings import read_settings

    def settings(**more: str) -> Any:
        return read_settings({"MODEL_ID": "owner/model", "DATASETS": "owner/name", **more}, {}, folder=tmp_path).settings

    store = open_store(str(tmp_path / "store"))
    for number, speed in enumerate((900.0, 1100.0, 1000.0)):
        remember_speed(store, tmp_path, settings(), gpu="L4", run_id=f"r{number}", tokens_per_second=speed, num_steps=20)
    remember_speed(store, tmp_path, settings(), gpu="L4", run_id="short", tokens_per_second=9.0, num_steps=2)
    learned = learned_speed(store, tmp_path, settings(LEARNING_RATE="1e-4"), "L4")
    assert learned is not None and (learned.tokens_per_second, learned.num_runs) == (1000.0, 3)
    assert learned_speed(store, tmp_path, settings(), "A40") is None
    assert learned_speed(store, tmp_path, settings(LORA_R="64"), "L4") is None
    (next((tmp_path / "store").rglob("r0.json"))).write_text("half a rec")
    assert learned_speed(store, tmp_path, settings(), "L4") is None


def test_a_run_shows_plan_foretold_and_actual_side_by_side(tmp_path: Path, tiny_model: Path, conversations: Path) -> None:
    settings = {
        "MODEL_ID": str(tiny_model),
        "DATASETS": str(conversations),
        "MAX_LENGTH": "128",
        "EFFECTIVE_BATCH_SIZE": "4",
        "MAX_STEPS": "40",  # three epochs of 15 steps, the last one cut
        "NUM_TRAIN_EPOCHS": "3",
        "EVAL_FRACTION": "0.1",
        "GPU_HOURLY_RATE": "3.6",
        "HF_HUB_OFFLINE": "1",
    }
    job = Job(tmp_path, settings)
    status, output = job.run("run")
    assert status == 0, output
    report = job.report()
    rows = {row["what"]: row for row in report["comparison"]}
    assert list(rows) == ["memory_bytes", "seconds", "num_tokens", "cost_usd"]
    tokens = rows["num_tokens"]
    assert tokens["planned_low"] == tokens["planned_high"] == tokens["reforecast"] == tokens["actual"]
    assert tokens["actual"] == report["actual"]["num_tokens"] == report["plan"]["num_tokens"]
    assert report["reforecast"]["at_step"] <= 4
    assert rows["seconds"]["reforecast"] > 0 and rows["cost_usd"]["actual"] == report["actual"]["cost_usd"]
    assert rows["memory_bytes"]["planned_low"] < rows["memory_bytes"]["planned_high"]
    for word in ("predicted", "left", "in fact", "from the first steps"):
        assert word in output, word
    # The next run of this model on this machine starts from its speed.
    again = Job(tmp_path / "again", {**settings, "OUTPUT_URI": str(tmp_path / "runs"), "RUN_ID": "again", "MAX_COST_USD": "1e-5"})
    status, output = again.run("check")
    assert status == 4 and "MAX_COST_USD=1e-05" in output, output
