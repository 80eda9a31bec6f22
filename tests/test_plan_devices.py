"""A run on several GPUs and machines as the forecast sees it: whose part is what, ddp or fsdp, hours, dollars, refusals."""

import stat
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st
from test_plan import GIB, MODEL, WORK, footprint

from job.display import Display
from job.errors import JobError, MachineError, SettingsError
from job.keep.store import open_store
from job.plan.forecast import Circumstances, Plan, forecast
from job.plan.hardware import Device, find_gpu, slowest_of
from job.plan.memory import estimate_memory
from job.plan.offers import Offer, make_offers
from job.plan.price import listed_price, stated_price
from job.plan.refusals import check_memory
from job.plan.retreat import Fit, leaner, relaid
from job.plan.sharing import SAFE_NCCL_BYTES, speed_up
from job.plan.show import plan_line
from job.plan.spread import check_shares, effective_batch
from job.plan.throughput import Speed
from job.planning import Planner
from job.preflight.gpus import check_gpus
from job.settings import ModelSettings, TrainSettings, read_settings
from job.sizing import Sizes
from job.speeds import learned_speed, remember_speed

SPREADS = st.tuples(st.integers(1, 16), st.integers(1, 24))
"""Devices, and examples of a step for each."""


def plan_on(name: str | None, num_devices: int, *, billions: float = 7.0, num_nodes: int = 1, **more: Any) -> Plan:
    train = more.pop("train", {})
    gpu = find_gpu(name) if name else None
    options = {"footprint": footprint(billions), "gpu": gpu, "memory_bytes": None if gpu else 64 * GIB, "work": WORK} | more
    model, work = options.pop("model", MODEL), options.pop("work")
    return forecast(TrainSettings.model_validate(train), model, work, num_devices=num_devices, num_nodes=num_nodes, **options)


@given(
    spread=SPREADS,
    gpu=st.sampled_from([None, "RTX 3080 10GB", "RTX 4090", "H100 SXM"]),
    micro=st.one_of(st.just("auto"), st.integers(1, 64)),
    parallel=st.sampled_from(["auto", "ddp", "fsdp"]),
    is_measured=st.booleans(),
)
def test_every_batch_that_divides_is_shared_whole_and_every_retreat_keeps_it(
    spread: tuple[int, int], gpu: str | None, micro: int | str, parallel: str, is_measured: bool
) -> None:
    num_devices, each = spread
    effective = num_devices * each
    train: dict[str, Any] = {"effective_batch_size": effective, "parallel": parallel}
    if micro == "auto" or effective % int(micro) == 0:
        train["per_device_train_batch_size"] = micro
    check_shares(TrainSettings.model_validate(train), num_devices, num_examples=WORK.num_examples)
    plan = plan_on(gpu, num_devices, train=train, footprint=footprint() if is_measured else None)
    assert plan.effective_batch_size == plan.fit.effective_batch_size == effective
    assert plan.num_steps == -(-WORK.num_examples // effective)
    fit: Fit | None = plan.fit
    while fit is not None:
        assert fit.effective_batch_size == effective
        assert (fit.num_devices, fit.parallel) == (num_devices, plan.parallel)
        assert (fit.parallel is None) == (num_devices == 1)
        fit = leaner(fit, is_checkpointing=fit.activation_checkpointing is True, can_offload=True)


@given(spread=SPREADS, num_devices=st.integers(1, 16), micro=st.integers(1, 8))
def test_what_memory_has_taught_holds_on_another_number_of_devices(spread: tuple[int, int], num_devices: int, micro: int) -> None:
    before = Fit(micro_batch=micro, gradient_accumulation_steps=spread[1], num_devices=spread[0], activation_offloading=True)
    after = relaid(before, num_devices=num_devices, parallel="ddp")
    if before.effective_batch_size % num_devices:
        assert after is None
        return
    assert after is not None and after.effective_batch_size == before.effective_batch_size
    assert after.micro_batch <= before.micro_batch and after.num_devices == num_devices and after.activation_offloading


def test_a_layout_of_other_devices_is_not_taken_as_it_stands() -> None:
    alone = plan_on("RTX 4090", 1)
    four = plan_on("RTX 4090", 4, before=alone.fit)
    assert four.effective_batch_size == alone.effective_batch_size == 16
    assert four == plan_on("RTX 4090", 4)
    chosen = plan_on("RTX 4090", 4, before=Fit(micro_batch=1, gradient_accumulation_steps=4, num_devices=4, parallel="ddp"))
    assert chosen.micro_batch == 1 and any("bitwise" in text for text in chosen.assumptions)
    # The same numbers, written down by a run on one GPU: 4 examples a step, and not 16.
    assert plan_on("RTX 4090", 4, before=Fit(micro_batch=1, gradient_accumulation_steps=4)) == plan_on("RTX 4090", 4)
    assert plan_on("RTX 4090", 1, before=four.fit) == alone


def test_a_note_of_before_there_were_several_devices_is_of_one() -> None:
    fit = Fit.model_validate({"micro_batch": 2, "gradient_accumulation_steps": 8, "activation_checkpointing": True})
    assert (fit.num_devices, fit.parallel, fit.effective_batch_size) == (1, None, 16)


@pytest.mark.parametrize(
    ("train", "how", "told"),
    [
        (
            {},
            {"num_processes": 3},
            "EFFECTIVE_BATCH_SIZE=16: must be a multiple of the 3 GPUs; take 15 or 18, or NPROC_PER_NODE=2",
        ),
        ({}, {"num_processes": 3, "setting": "--num-gpus"}, "or --num-gpus=2"),
        ({}, {"num_processes": 3, "on_gpu": False}, "of the 3 processes;"),
        ({}, {"num_processes": 6, "num_nodes": 2}, "of the 6 GPUs of 2 machines; take 12 or 18, or NPROC_PER_NODE=2"),
        ({"effective_batch_size": 2}, {"num_processes": 4}, "EFFECTIVE_BATCH_SIZE=2: .* 4 GPUs; take 4, or NPROC_PER_NODE=2"),
        ({"effective_batch_size": 14}, {"num_processes": 8, "num_nodes": 2}, "take 8 or 16, or NPROC_PER_NODE=1"),
        ({"effective_batch_size": 1}, {"num_processes": 2, "num_nodes": 2}, "take 2, or fewer machines"),
        ({}, {"num_processes": 4, "num_examples": 13}, "is lowered to the 13 examples there are, .* 4 GPUs; take 12, or .*=1"),
        ({}, {"num_processes": 4, "num_examples": 3}, "lowered to the 3 examples there are.* 4 GPUs; take NPROC_PER_NODE=3"),
        (
            {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 5},
            {"num_processes": 2},
            "GRADIENT_ACCUMULATION_STEPS=5: makes 15 examples a step .* 2 GPUs; make it 14 or 16 .*, or NPROC_PER_NODE=1",
        ),
    ],
)
def test_a_batch_that_the_devices_cannot_share_is_refused_with_the_ways_out(
    train: dict[str, Any], how: dict[str, Any], told: str
) -> None:
    settings = TrainSettings.model_validate(train)
    with pytest.raises(SettingsError, match=told):
        check_shares(settings, how.pop("num_processes"), **how)


@given(batch=st.integers(1, 40), num_devices=st.integers(1, 20), num_examples=st.one_of(st.none(), st.integers(1, 50)))
def test_a_batch_is_refused_exactly_where_it_does_not_divide(batch: int, num_devices: int, num_examples: int | None) -> None:
    train = TrainSettings(effective_batch_size=batch)
    shared = batch if num_examples is None else effective_batch(train, num_examples)
    try:
        check_shares(train, num_devices, num_examples=num_examples)
    except SettingsError as error:
        assert shared % num_devices
        ways = str(error).split("; ")[-1]
        for way in ways.removeprefix("take ").split(" or "):
            name, _, value = way.strip(", ").rpartition("=")
            number = int(value)
            if name:
                assert shared % number == 0 and number < num_devices, ways
            else:
                assert number % num_devices == 0 and (num_examples is None or shared == batch or number <= num_examples), ways
    else:
        assert shared % num_devices == 0


def test_an_estimate_of_few_examples_still_has_a_forecast() -> None:
    few = WORK.model_copy(update={"num_examples": 13, "num_tokens": 1300, "basis": "estimated"})
    plan = plan_on("RTX 4090", 4, work=few)
    assert plan.effective_batch_size == 12 and any("12 examples, which 4 devices" in text for text in plan.assumptions)
    assert plan_on("RTX 4090", 4, work=few.model_copy(update={"num_examples": 2})).effective_batch_size == 4


def test_ddp_takes_what_one_gpu_takes_and_its_buckets() -> None:
    options: dict[str, Any] = {"rows": 2, "length": 1024, "activation_checkpointing": True, "optimizer": "paged_adamw_8bit"}
    shape = footprint()
    alone = estimate_memory(shape, on_gpu=True, **options)
    four, eight = (estimate_memory(shape, on_gpu=True, num_devices=n, parallel="ddp", **options) for n in (4, 8))
    assert four == eight and four.weights_bytes == alone.weights_bytes
    assert four.gradients_bytes - alone.gradients_bytes == 4 * shape.num_trainable
    assert four.safe_peak_bytes - alone.safe_peak_bytes >= 4 * shape.num_trainable + SAFE_NCCL_BYTES
    on_cpu = estimate_memory(shape, on_gpu=False, num_devices=4, parallel="ddp", **options)
    assert on_cpu.peak_bytes - estimate_memory(shape, on_gpu=False, **options).peak_bytes == 4 * shape.num_trainable


def test_fsdp_divides_what_is_held_and_gathers_two_layers_whole() -> None:
    options: dict[str, Any] = {"rows": 1, "length": 1024, "activation_checkpointing": True, "optimizer": "paged_adamw_8bit"}
    shape = footprint(70)
    two, eight = (estimate_memory(shape, on_gpu=True, num_devices=n, parallel="fsdp", **options) for n in (2, 8))
    alone = estimate_memory(shape, on_gpu=True, **options)
    states = shape.weights.quantisation_state_bytes
    assert eight.weights_bytes == pytest.approx(states + (shape.weights.total_bytes - states) / 8, abs=1)
    assert 3 * eight.optimizer_bytes < two.optimizer_bytes < alone.optimizer_bytes
    layer = shape.weights.quantised_bytes / shape.num_layers
    assert eight.transient_bytes - alone.transient_bytes > 2 * layer
    assert eight.safe_peak_bytes < two.safe_peak_bytes < alone.safe_peak_bytes
    for memory in (two, eight):
        parts = [size for name, size in memory.model_dump().items() if name not in ("peak_bytes", "safe_peak_bytes")]
        assert sum(parts) == memory.peak_bytes < memory.safe_peak_bytes


def test_ddp_is_taken_where_it_fits_then_fsdp_and_else_it_does_not_fit() -> None:
    small, large, huge = (plan_on("RTX 4090", 4, billions=size) for size in (7, 30, 400))
    assert (small.parallel, small.fits) == ("ddp", True)
    assert (large.parallel, large.fits) == ("fsdp", True)
    assert huge.fits is False and huge.parallel == "fsdp"
    asked = plan_on("RTX 4090", 4, billions=30, train={"parallel": "ddp"})
    assert (asked.parallel, asked.fits) == ("ddp", False)
    with pytest.raises(JobError, match=r"each of the 4 GPUs \(RTX 4090\), with ddp, has .*PARALLEL=auto"):
        check_memory(asked, TrainSettings(parallel="ddp"), None, max_length=2048, longest=2048)
    assert plan_on("RTX 4090", 4, train={"parallel": "fsdp"}).parallel == "fsdp"
    assert plan_on("RTX 4090", 1, billions=30, train={"parallel": "fsdp"}).parallel is None
    assert plan_on(None, 4, billions=300).parallel == "ddp", "fsdp is never chosen on a CPU"
    in_8bit = ModelSettings(model_id="owner/model", load_in_4bit=False, load_in_8bit=True)
    assert plan_on("RTX 4090", 4, billions=30, model=in_8bit).parallel == "ddp", "8-bit weights cannot be shared out"
    assert any("never run by us" in text for text in large.assumptions)


def test_more_gpus_are_faster_and_never_as_much_as_their_number() -> None:
    work = WORK.model_copy(update={"num_tokens": 80_000_000, "num_examples": 160_000})
    options: dict[str, Any] = {"work": work, "train": {"per_device_train_batch_size": 1, "activation_checkpointing": True}}
    alone, eight = plan_on("H100 SXM", 1, **options), plan_on("H100 SXM", 8, **options)
    apart = plan_on("H100 SXM", 8, num_nodes=4, **options)
    shared = plan_on("H100 SXM", 8, **options | {"train": options["train"] | {"parallel": "fsdp"}})
    one = alone.training_seconds_low
    assert one is not None
    for plan, (slow, fast) in ((eight, (0.85, 0.98)), (apart, (0.5, 0.95)), (shared, (0.55, 0.95))):
        assert plan.training_seconds_low == pytest.approx(one / 8 / fast)
        assert plan.training_seconds_high == pytest.approx((alone.training_seconds_high or 0) / 8 / slow)
        assert any(f"{round(100 * slow)}-{round(100 * fast)}% of 8 times" in text for text in plan.assumptions)
    assert "on each of 8 GPUs in 4 machines (ddp)" in plan_line(apart) and "of 79.7 (each of 8 H100 SXM, ddp)" in plan_line(eight)
    assert "on each" not in plan_line(alone)


@given(num_devices=st.integers(1, 64), num_nodes=st.integers(1, 8), parallel=st.sampled_from(["ddp", "fsdp"]))
def test_a_speed_up_is_a_range_below_the_number_of_devices(num_devices: int, num_nodes: int, parallel: Any) -> None:
    slow, fast = speed_up(num_devices, parallel, num_nodes=num_nodes)
    assert 0 < slow <= fast <= num_devices


def test_a_speed_of_one_gpu_is_scaled_and_one_of_as_many_is_taken() -> None:
    alone = Speed(tokens_per_second=1000.0, num_runs=1, source="measured alone")
    together = Speed(tokens_per_second=7000.0, num_runs=1, source="measured together", num_devices=8)
    scaled, taken = (plan_on("L4", 8, speed=speed) for speed in (alone, together))
    assert scaled.training_seconds_low == pytest.approx(800 * 0.85 / 8 / 0.98)
    assert scaled.training_seconds_high == pytest.approx(800 * 1.15 / 8 / 0.85)
    assert taken.training_seconds_low == pytest.approx(800_000 / 7000 * 0.85)
    assert any("times one's speed" in text for text in scaled.assumptions)
    assert not any("times one's speed" in text for text in taken.assumptions)
    on_cpu = plan_on(None, 2, speed=alone)
    assert on_cpu.training_seconds_low == pytest.approx(800 * 0.85), "two processes have the cores that one had"


def settings(folder: Path, **more: str) -> Any:
    return read_settings({"MODEL_ID": "owner/model", "DATASETS": "owner/name", **more}, {}, folder=folder).settings


def test_speeds_are_learned_by_the_number_of_gpus(tmp_path: Path) -> None:
    store, own = open_store(str(tmp_path / "store")), settings(tmp_path)
    note: dict[str, Any] = {"gpu": "L4", "num_steps": 20}
    remember_speed(store, tmp_path, own, run_id="a", tokens_per_second=1000.0, **note)
    eight = learned_speed(store, tmp_path, own, "L4", num_devices=8)
    assert eight is not None and (eight.tokens_per_second, eight.num_devices) == (1000.0, 1)
    remember_speed(store, tmp_path, own, run_id="b", tokens_per_second=7000.0, num_devices=8, **note)
    eight = learned_speed(store, tmp_path, own, "L4", num_devices=8)
    assert eight is not None and (eight.tokens_per_second, eight.num_devices) == (7000.0, 8) and "8 x L4" in eight.source
    for others in ({"num_devices": 4}, {"num_devices": 8, "num_nodes": 2}):
        found = learned_speed(store, tmp_path, own, "L4", **others)
        assert found is not None and found.num_devices == 1
    alone = learned_speed(store, tmp_path, own, "L4")
    assert alone is not None and (alone.tokens_per_second, alone.num_runs) == (1000.0, 1)


def offers(number: int, **train: Any) -> list[Offer]:
    gpus = [(gpu, listed_price(gpu.name, num_gpus=number), None) for name in ("RTX 4090", "L4") if (gpu := find_gpu(name))]
    train = TrainSettings.model_validate(train)  # type: ignore[assignment]
    return make_offers(gpus, train, MODEL, WORK, footprint(30), Circumstances(), num_gpus=number)  # type: ignore[arg-type]


def test_several_gpus_are_forecast_and_the_cheapest_of_them_marked() -> None:
    alone, four = offers(1), offers(4)
    assert not any(offer.fits for offer in alone) and all(offer.fits for offer in four)
    assert all(offer.parallel == "fsdp" and offer.num_gpus == 4 and 16 % (offer.micro_batch * 4) == 0 for offer in four)
    costs = [((offer.cost_usd_low or 0) + (offer.cost_usd_high or 0)) / 2 for offer in four]
    assert [offer.is_cheapest for offer in four] == [cost == min(costs) for cost in costs]
    for single, offer in zip(alone, four, strict=True):
        assert offer.usd_per_hour == pytest.approx(4 * (single.usd_per_hour or 0))
        assert offer.cost_usd_low == pytest.approx((offer.hours_low or 0) * (offer.usd_per_hour or 0), rel=0.05)
    assert all("PARALLEL=auto" in offer.hint for offer in offers(4, parallel="ddp"))


def test_each_machine_costs_the_same() -> None:
    one = stated_price(2.0)
    assert one.of_machines(1) is one
    two = one.of_machines(2)
    assert two.cost_usd(3600) == 4.0 and two.source == "GPU_HOURLY_RATE, 2 machines"
    listed = listed_price("L4")
    assert listed is not None
    disks = listed.of_machines(3).cost_usd(730 * 3600, storage_bytes=1e9) - 3 * listed.cost_usd(730 * 3600)
    assert disks == pytest.approx(3 * 0.1), "each machine has a disk"


def planner(folder: Path, *lines: str, environ: dict[str, str] | None = None, **more: str) -> Planner:
    """On a machine whose driver tells of these GPUs."""
    tool = folder / "nvidia-smi"
    tool.write_text("#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in lines))
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    own = settings(folder, MODEL_ID=str(ROOT / "benchmarks/models"), **more)
    store = open_store(str(folder / "store"))
    display = Display(usd_per_hour=None, redact=str)
    sizes = Sizes(own, store=store, work=folder, display=display, model_dir=lambda: folder, start_child=lambda *_, **__: None)
    return Planner(own, shared=store, work=folder, environ=environ or {}, display=display, sizes=sizes)


L4 = "NVIDIA L4, 23034, 580.65.06, 8.9"
T4 = "Tesla T4, 15360, 580.65.06, 7.5"


@pytest.fixture
def on_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return tmp_path


def test_a_planner_counts_a_process_for_each_gpu_of_each_machine(on_path: Path) -> None:
    alone = planner(on_path, L4, GPU_HOURLY_RATE="2")
    assert (alone.num_devices, alone.nodes.num_nodes) == (1, 1) and alone.price is not None and alone.price.usd_per_hour == 2
    assert planner(on_path, L4, L4).num_devices == 2
    assert planner(on_path, L4, L4, NPROC_PER_NODE="1").num_devices == 1
    assert planner(on_path, L4, L4, environ={"CUDA_VISIBLE_DEVICES": "1"}).num_devices == 1
    machines = {"NUM_NODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1", "NUM_TRAINERS": "2"}
    both = planner(on_path, L4, L4, environ=machines, GPU_HOURLY_RATE="2")
    assert both.num_devices == 4 and both.price is not None and both.price.usd_per_hour == 4
    listed = planner(on_path, L4, L4, environ=machines).price
    assert listed is not None and listed.usd_per_hour == pytest.approx(4 * (listed_price("L4") or stated_price(9)).usd_per_hour)
    on_cpu = planner(on_path, environ=machines)
    assert on_cpu.num_devices == 2 and on_cpu.gpu is None, "a CPU is one process, whatever an engine says of GPUs"
    assert planner(on_path, NPROC_PER_NODE="2").num_devices == 2
    with pytest.raises(MachineError, match="NODE_RANK"):
        _ = planner(on_path, L4, environ={"NUM_NODES": "2"}).num_devices


def test_a_check_refuses_a_batch_that_the_gpus_cannot_share(on_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"EFFECTIVE_BATCH_SIZE=16: must be a multiple of the 3 GPUs; take 15 or 18"):
        planner(on_path, L4, L4, L4).check(is_first=True)
    with pytest.raises(SettingsError, match="3 processes"):
        planner(on_path, NPROC_PER_NODE="3").check(is_first=True)


def test_the_least_of_different_gpus_counts(on_path: Path) -> None:
    gpu = planner(on_path, L4, T4).gpu
    small = find_gpu("T4")
    assert gpu is not None and small is not None and (gpu.name, gpu.peak_flops) == ("T4", small.peak_flops)
    assert gpu.memory_bytes == 15360 * 2**20 and gpu.compute_capability == 7.5
    first = planner(on_path, L4, T4, NPROC_PER_NODE="1").gpu
    assert first is not None and first.name == "L4", "the second is not used"
    odd = Device(name="an odd card", memory_bytes=99 * GIB, driver="", compute_capability=9.0)
    slow = slowest_of([odd, Device(name="NVIDIA L4", memory_bytes=23 * GIB, driver="", compute_capability=8.9)])
    assert slow is not None and (slow.name, slow.peak_flops) == ("L4", None), "nobody knows how fast the other is"


def card(name: str = "NVIDIA L4", capability: float = 8.9, gib: int = 22, driver: str = "580.65.06") -> Device:
    return Device(name=name, memory_bytes=gib * GIB, driver=driver, compute_capability=capability)


OLD = card("Tesla V100-SXM2-32GB", 7.0, 32)


@pytest.mark.parametrize(
    ("devices", "more", "error"),
    [
        ([card(), OLD], {}, "V100.*7.5"),
        ([card(), card(driver="470.1")], {}, "driver 470.1"),
        ([card(), card("Tesla T4", 7.5, 15)], {}, "DTYPE=auto: would be float16 on the Tesla T4 and bfloat16 on the NVIDIA L4"),
        ([card(), card("Tesla T4", 7.5, 15)], {"dtype": "bfloat16"}, "DTYPE=bfloat16: the Tesla T4"),
        ([card()], {"num_used": 2}, "NPROC_PER_NODE=2: each process needs a GPU of its own, and this machine has one GPU; set 1"),
        (
            [card(), card()],
            {"parallel": "fsdp", "load_in_4bit": False, "load_in_8bit": True},
            "PARALLEL=fsdp: .*8-bit",
        ),
    ],
)
def test_every_gpu_that_will_be_used_is_judged(devices: list[Device], more: dict[str, Any], error: str) -> None:
    own = {name: more.pop(name) for name in ("num_used", "parallel") if name in more}
    with pytest.raises(JobError, match=error):
        check_gpus(ModelSettings(model_id="owner/name", **more), devices, compat_folders=(), **own)


def test_gpus_that_can_are_described_together() -> None:
    model = ModelSettings(model_id="owner/name")
    assert check_gpus(model, [card(), card()]) == "2 x NVIDIA L4 (compute capability 8.9), 22 GiB, driver 580.65.06"
    assert check_gpus(model, [card(), OLD], num_used=1).endswith("580.65.06, and 1 more, which will be idle")
    mixed = check_gpus(model, [card("NVIDIA A40", 8.6, 45), card()])
    assert mixed == "warning: NVIDIA A40 and NVIDIA L4: the slowest sets the pace, 22 GiB are counted on of each"
    assert "none found" in check_gpus(model, [], num_used=2)
