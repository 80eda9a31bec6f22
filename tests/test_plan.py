"""The arithmetic of a forecast: layouts, memory, hours, dollars and advice, without torch and without processes."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from job.errors import PlanError, SettingsError
from job.plan.advice import advise
from job.plan.footprint import Body, Footprint, Growth, Weights, body_name
from job.plan.forecast import Circumstances, Plan, Work, forecast
from job.plan.hardware import find_gpu, known_gpus
from job.plan.layout import choose_layout
from job.plan.memory import estimate_memory
from job.plan.offers import make_offers
from job.plan.price import Price, listed_price, stated_price
from job.plan.progress import Pace
from job.plan.refusals import check_cost, check_memory
from job.plan.throughput import Speed
from job.settings import BudgetSettings, DataSettings, LoraSettings, ModelSettings, TrainSettings

GIB = 2**30
MODEL = ModelSettings(model_id="owner/model")
WORK = Work(num_examples=1600, num_tokens=800_000, longest_tokens=2048)


def footprint(billions: float = 7.0) -> Footprint:
    """About a Llama of this size."""
    scale = billions / 8
    bodies = {}
    for recomputes in (False, True):
        kept = 10e6 * scale
        saved, passes = (280e3 * scale, 3) if recomputes else (kept, 2)
        for is_padded in (False, True):
            bodies[body_name(is_padded=is_padded, activation_checkpointing=recomputes)] = Body(
                saved=Growth(per_token=saved),
                after_forward=Growth(per_token=saved + 1e4),
                peak=Growth(constant=1e8, per_token=saved + (4e5 * scale if recomputes else 1e5)),
                flops_per_token=passes * 14e9 * scale,
                attention_flops_per_pair=passes * 5e5 * scale,
            )
    return Footprint(
        num_parameters=round(billions * 1e9),
        num_trainable=round(42e6 * scale),
        largest_trainable=229_376,
        num_embedding_parameters=525_000_000,
        num_layers=32,
        hidden_size=4096,
        vocab_size=128_256,
        max_length=8192,
        compute_itemsize=2,
        weights=Weights(
            quantised_bytes=round(3.25 * GIB * scale),
            quantisation_state_bytes=round(0.1 * GIB * scale),
            unquantised_bytes=round(1.96 * GIB * scale),
            unquantised_experts_bytes=0,
            largest_layer_bytes=117_440_512,
        ),
        bodies=bodies,
        plain_head_bytes_per_logit=13.8,
        plain_head_saved_bytes_per_logit=4.0,
        method="traced",
    )


def plan_on(name: str, *, work: Work = WORK, price: Price | None = None, **train: Any) -> Plan:
    gpu = find_gpu(name)
    assert gpu is not None
    return forecast(TrainSettings.model_validate(train), MODEL, work, footprint=footprint(), gpu=gpu, price=price)


def test_the_b200_costs_what_its_author_reckoned() -> None:
    price = stated_price(6.36)
    assert price.cost_usd(10 * 3600) == pytest.approx(63.60)
    assert price.cost_usd(30 * 3600) == pytest.approx(190.80)


def test_more_memory_takes_larger_micro_batches_and_keeps_activations() -> None:
    small, middle, large = plan_on("RTX 3080 10GB"), plan_on("RTX 4090"), plan_on("B200")
    assert small.micro_batch < middle.micro_batch
    assert (small.activation_checkpointing, middle.activation_checkpointing, large.activation_checkpointing) == (
        True,
        True,
        False,
    )
    for plan in (small, middle, large):
        assert plan.micro_batch * plan.gradient_accumulation_steps == plan.effective_batch_size == 16
        assert plan.fits and plan.memory is not None and plan.memory_bytes is not None
        assert plan.memory.peak_bytes < plan.memory.safe_peak_bytes <= plan.memory_bytes
        assert any("activations" in line for line in plan.assumptions)


@given(
    memory_gib=st.floats(6, 300),
    effective=st.integers(1, 64),
    length=st.integers(64, 8192),
    checkpointing=st.sampled_from([None, False, True]),
)
def test_the_largest_micro_batch_that_fits_is_taken(
    memory_gib: float, effective: int, length: int, checkpointing: bool | None
) -> None:
    options: dict[str, Any] = {"optimizer": "paged_adamw_8bit", "on_gpu": True}
    shape, available = footprint(), int(memory_gib * GIB)
    layout = choose_layout(
        shape,
        memory_bytes=available,
        effective_batch=effective,
        length=length,
        micro_batch=None,
        activation_checkpointing=checkpointing,
        **options,
    )

    def fits(rows: int, recomputes: bool) -> bool:
        memory = estimate_memory(shape, rows=rows, length=length, activation_checkpointing=recomputes, **options)
        return memory.safe_peak_bytes <= available

    if not layout.fits:
        assert not fits(1, checkpointing is not False)
        return
    assert layout.memory is not None and layout.memory.safe_peak_bytes <= available
    assert layout.micro_batch * layout.gradient_accumulation_steps == effective
    larger = [size for size in range(layout.micro_batch + 1, effective + 1) if effective % size == 0]
    assert not any(fits(size, layout.activation_checkpointing) for size in larger)
    if checkpointing is None and layout.activation_checkpointing:  # only where keeping them would leave less
        assert not fits(layout.micro_batch, False)


def test_another_machine_continues_with_the_same_layout_if_it_has_the_memory() -> None:
    """Another micro-batch draws other dropout masks: the adapter would not be that of the undisturbed run."""
    begun = plan_on("RTX 4090").fit
    large, small = find_gpu("B200"), find_gpu("RTX 3080 10GB")
    assert large is not None and small is not None
    alone, after = (
        forecast(TrainSettings(), MODEL, WORK, footprint=footprint(), gpu=large, before=before) for before in (None, begun)
    )
    assert after.fit == begun != alone.fit
    squeezed = forecast(TrainSettings(), MODEL, WORK, footprint=footprint(), gpu=small, before=begun)
    assert squeezed.fits and squeezed.micro_batch < begun.micro_batch
    asked = TrainSettings(per_device_train_batch_size=1)
    assert forecast(asked, MODEL, WORK, footprint=footprint(), gpu=large, before=begun).micro_batch == 1
    other = TrainSettings(effective_batch_size=8)
    assert forecast(other, MODEL, WORK, footprint=footprint(), gpu=large, before=begun).effective_batch_size == 8


def test_what_was_asked_for_is_never_changed() -> None:
    plan = plan_on("RTX 4090", per_device_train_batch_size=2, activation_checkpointing=True)
    assert (plan.micro_batch, plan.gradient_accumulation_steps, plan.activation_checkpointing) == (2, 8, True)
    plan = plan_on("RTX 4090", per_device_train_batch_size=3, gradient_accumulation_steps=5)
    assert (plan.effective_batch_size, plan.micro_batch) == (15, 3)


def test_parts_of_the_memory_add_up() -> None:
    memory = plan_on("A40").memory
    assert memory is not None
    told = memory.model_dump()
    parts = [size for name, size in told.items() if name not in ("peak_bytes", "safe_peak_bytes")]
    assert len(parts) == 8 and sum(parts) == told["peak_bytes"] == memory.peak_bytes


def test_a_formula_is_trusted_less_than_a_trace() -> None:
    options: dict[str, Any] = {"rows": 1, "length": 2048, "activation_checkpointing": True, "optimizer": "adamw_8bit"}
    coarse = footprint().model_copy(update={"method": "formula"})
    for on_gpu in (True, False):
        traced = estimate_memory(footprint(), on_gpu=on_gpu, **options)
        formula = estimate_memory(coarse, on_gpu=on_gpu, **options)
        assert formula.peak_bytes == traced.peak_bytes and formula.safe_peak_bytes > 1.02 * traced.safe_peak_bytes


def test_an_estimate_that_may_be_off_by_more_than_itself_gives_no_negative_hours() -> None:
    plan = plan_on("A40", work=WORK.model_copy(update={"error": 1.4, "basis": "estimated"}))
    assert plan.training_seconds_low is not None and plan.training_seconds_low > 0


def test_hours_and_dollars_are_a_range_that_grows_with_the_work() -> None:
    once = plan_on("A100 SXM 80GB", price=stated_price(2.0))
    thrice = plan_on("A100 SXM 80GB", price=stated_price(2.0), num_train_epochs=3)
    for plan in (once, thrice):
        assert plan.seconds_low is not None and plan.seconds_high is not None
        assert 0 < plan.seconds_low < plan.seconds_high
        assert plan.cost_usd_low == pytest.approx(plan.seconds_low / 3600 * 2.0)
    assert (once.num_steps, thrice.num_steps) == (100, 300)
    assert (once.num_tokens, thrice.num_tokens) == (800_000, 2_400_000)
    assert thrice.training_seconds_low == pytest.approx(3 * (once.training_seconds_low or 0))


def test_seven_billion_parameters_on_an_a100_take_what_others_report() -> None:
    """Published: 1,388 tokens/s for 14B Q-LoRA at 2,048 tokens (Qwen README), so about twice that for 7B."""
    work = Work(num_examples=1600, num_tokens=1600 * 2048, longest_tokens=2048)
    plan = plan_on("A100 SXM 80GB", work=work, per_device_train_batch_size=1, activation_checkpointing=True)
    assert plan.training_seconds_low is not None and plan.training_seconds_high is not None
    slow, fast = plan.num_tokens / plan.training_seconds_high, plan.num_tokens / plan.training_seconds_low
    assert 900 < slow < 2_000 < fast < 4_000


def test_a_measured_speed_takes_the_place_of_the_range() -> None:
    gpu = find_gpu("L4")
    assert gpu is not None
    speed = Speed(tokens_per_second=1000.0, num_runs=2, source="measured in 2 earlier runs")
    plan = forecast(TrainSettings(), MODEL, WORK, footprint=footprint(), gpu=gpu, speed=speed)
    assert plan.training_seconds_low == pytest.approx(800 * 0.85)
    assert plan.training_seconds_high == pytest.approx(800 * 1.15)
    assert any("measured in 2 earlier runs" in line for line in plan.assumptions)


def test_a_cut_epoch_uses_the_counted_tokens() -> None:
    work = WORK.model_copy(update={"all_steps_tokens": 123_457})
    assert plan_on("A40", work=work, max_steps=30).num_tokens == 123_457
    assert plan_on("A40", max_steps=30).num_tokens == round(800_000 * 30 / 100)


def test_without_a_footprint_steps_and_batches_are_still_known() -> None:
    plan = forecast(TrainSettings(), MODEL, WORK)
    assert (plan.num_steps, plan.memory, plan.seconds_low, plan.fits) == (100, None, None, None)


@pytest.mark.parametrize("gpu", [gpu.name for gpu in known_gpus()])
def test_every_known_gpu_has_what_a_forecast_needs(gpu: str) -> None:
    known = find_gpu(gpu)
    assert known is not None and 7 < known.memory_bytes / GIB < 300
    assert known.peak_flops is None or 5e12 < known.peak_flops < 5e15
    assert 6 <= known.compute_capability < 13


def test_names_of_drivers_and_of_runpod_are_understood() -> None:
    for name, known in (
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA A100-SXM4-80GB", "A100 SXM 80GB"),
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("nvidia b200", "B200"),
        ("Tesla T4", "T4"),
    ):
        gpu = find_gpu(name)
        assert gpu is not None and gpu.name == known
    assert find_gpu("Voodoo 2") is None


def test_every_price_names_its_source_and_a_known_gpu() -> None:
    table = json.loads((Path(__file__).parent.parent / "job/plan/prices.json").read_text())
    for row in table["prices"]:
        assert find_gpu(row["gpu"]) is not None and 0.01 < row["usd_per_hour"] < 60
        assert row["source"] and row["date"].startswith("202")
    assert all(row["source"] for row in table["storage"])


def test_the_users_table_goes_before_ours(tmp_path: Path) -> None:
    own = tmp_path / "prices.json"
    own.write_text(json.dumps([{"gpu": "NVIDIA B200", "usd_per_hour": 6.36}, {"gpu": "Home card", "usd_per_hour": 0.05}]))
    ours, theirs = listed_price("B200"), listed_price("B200", own)
    assert theirs is not None and theirs.usd_per_hour == 6.36 and "your table" in theirs.source
    assert ours is not None and ours.usd_per_hour != 6.36 and "20" in ours.source
    home = listed_price("Home card", own)
    assert home is not None and home.usd_per_hour == 0.05
    assert listed_price("Home card") is None
    pair = listed_price("B200", own, num_gpus=2)
    assert pair is not None and pair.usd_per_hour == pytest.approx(12.72)


@pytest.mark.parametrize("text", ["", "[]", "{}", '[{"gpu": "B200"}]', '[{"gpu": "B200", "usd_per_hour": 0}]', "not json"])
def test_a_table_of_prices_that_is_none_is_refused_by_name(text: str, tmp_path: Path) -> None:
    own = tmp_path / "prices.json"
    own.write_text(text)
    with pytest.raises(SettingsError, match=r"GPU_PRICES_FILE=.*usd_per_hour"):
        listed_price("B200", own)


def test_storage_counts_where_the_price_is_without_it() -> None:
    bare = Price(usd_per_hour=1.0, source="table", includes_storage=False)
    assert bare.cost_usd(3600) == 1.0
    assert bare.cost_usd(730 * 3600, storage_bytes=100e9) == pytest.approx(730 + 10.0)  # 100 GB at $0.10 a month
    assert stated_price(1.0).cost_usd(730 * 3600, storage_bytes=100e9) == pytest.approx(730)


def offers(**train: Any) -> list[Any]:
    gpus = [(gpu, listed_price(gpu.name), None) for gpu in known_gpus()]
    return make_offers(gpus, TrainSettings.model_validate(train), MODEL, WORK, footprint(), Circumstances())


def test_the_cheapest_that_fits_is_marked_and_the_others_are_told_what_would_help() -> None:
    found = offers()
    marked = [offer for offer in found if offer.is_cheapest]
    assert len(marked) == 1 and marked[0].fits
    middle = (marked[0].cost_usd_low + marked[0].cost_usd_high) / 2
    assert all(
        middle <= (offer.cost_usd_low + offer.cost_usd_high) / 2
        for offer in found
        if offer.fits and offer.cost_usd_low is not None
    )
    for offer in found:
        assert offer.fits == (offer.headroom_bytes >= 0 and "too old" not in offer.hint)
        assert offer.fits or offer.hint
        assert (offer.cost_usd_low is None) == (offer.price_source == "unknown" or not offer.fits)


def test_a_length_that_would_fit_is_named() -> None:
    kept = offers(activation_checkpointing=False, per_device_train_batch_size=4)
    assert any("ACTIVATION_CHECKPOINTING" in offer.hint for offer in kept)
    long = Work(num_examples=100, num_tokens=800_000, longest_tokens=8192)
    gpu = find_gpu("RTX 4060")
    assert gpu is not None
    offer = make_offers([(gpu, None, None)], TrainSettings(), MODEL, long, footprint(), Circumstances())[0]
    length = int(offer.hint.removeprefix("MAX_LENGTH=").partition(" ")[0])
    shorter = long.model_copy(update={"longest_tokens": length})
    assert make_offers([(gpu, None, None)], TrainSettings(), MODEL, shorter, footprint(), Circumstances())[0].fits


def test_a_run_that_does_not_fit_is_refused_with_the_ways_out() -> None:
    train = TrainSettings()
    gpu = find_gpu("RTX 4060")
    assert gpu is not None
    plan = forecast(train, MODEL, WORK, footprint=footprint(30), gpu=gpu)
    assert plan.fits is False
    with pytest.raises(PlanError) as refusal:
        check_memory(plan, train, footprint(30), max_length=2048, longest=2048)
    for part in ("PER_DEVICE_TRAIN_BATCH_SIZE=auto", "RTX 4060", "MAX_LENGTH=2048", "LORA_R", "larger GPU", "an hour"):
        assert part in str(refusal.value)
    check_memory(forecast(train, MODEL, WORK, footprint=footprint(1), gpu=gpu), train, footprint(1), max_length=1, longest=1)


def test_a_budget_below_the_low_estimate_is_refused() -> None:
    plan = plan_on("A40", price=stated_price(1.0))
    assert plan.cost_usd_low is not None and plan.seconds_low is not None
    check_cost(plan, BudgetSettings(max_cost_usd=plan.cost_usd_low * 1.01, max_hours=plan.seconds_low / 3500))
    with pytest.raises(PlanError, match=r"MAX_COST_USD=0\.01: .*GPU_HOURLY_RATE"):
        check_cost(plan, BudgetSettings(max_cost_usd=0.01))
    with pytest.raises(PlanError, match=r"MAX_HOURS=0\.01: "):
        check_cost(plan, BudgetSettings(max_hours=0.01))


@pytest.mark.parametrize(
    ("train", "lora", "data", "named"),
    [
        ({"learning_rate": 1e-5}, {}, {}, "LEARNING_RATE=1e-05"),
        ({"learning_rate": 2e-3}, {}, {}, "LEARNING_RATE=0.002"),
        ({}, {"lora_alpha": 256}, {}, "LORA_ALPHA=256"),
        ({"num_train_epochs": 10, "eval_steps": 10}, {}, {}, "NUM_TRAIN_EPOCHS=10"),
        ({}, {}, {"eval_fraction": 0}, "EVAL_FRACTION=0"),
        ({"num_train_epochs": 3}, {}, {}, "EVAL_STEPS"),
        ({"max_steps": 5}, {}, {}, "EFFECTIVE_BATCH_SIZE=16"),
    ],
)
def test_doubtful_settings_bring_advice_with_a_reason(
    train: dict[str, Any], lora: dict[str, Any], data: dict[str, Any], named: str
) -> None:
    settings = TrainSettings.model_validate(train)
    plan = plan_on("A40", **train)
    found = list(
        advise(
            settings,
            LoraSettings.model_validate(lora),
            DataSettings.model_validate({"datasets": "owner/name", **data}),
            plan,
            num_parameters=7_000_000_000,
        )
    )
    assert sum(text.startswith(named) for text in found) == 1, found


def test_usual_settings_bring_no_advice_and_few_examples_do() -> None:
    data = DataSettings.model_validate({"datasets": "owner/name"})
    quiet = plan_on("A40")
    assert list(advise(TrainSettings(), LoraSettings(), data, quiet, num_parameters=7_000_000_000)) == []
    few = plan_on("A40", work=Work(num_examples=400, num_tokens=100_000, longest_tokens=512))
    assert "400 examples" in next(advise(TrainSettings(), LoraSettings(), data, few, num_parameters=7_000_000_000))


def test_the_pace_leaves_out_the_first_step_and_what_came_between() -> None:
    pace = Pace(num_steps=100, num_tokens=10_000, num_evaluations_left=2)
    pace.step(step=1, num_tokens=100, seconds=9.0)
    assert pace.seconds_per_token is None and pace.seconds_left(5.0) is None
    for step in range(2, 6):
        pace.step(step=step, num_tokens=100 * step, seconds=9.0 + step - 1)
    assert pace.seconds_per_token == pytest.approx(0.01)
    pace.evaluated(30.0)
    pace.step(step=6, num_tokens=600, seconds=44.0)  # an evaluation of 30 seconds lies in between
    assert pace.seconds_per_token == pytest.approx(0.01)
    assert pace.seconds_left(5.0) == pytest.approx(94 + 2 * 30 + 5)
    assert pace.is_known()


@given(st.lists(st.tuples(st.floats(0.01, 5), st.integers(1, 4000)), min_size=3, max_size=40))
def test_a_steady_pace_foretells_the_whole_run(steps: list[tuple[float, int]]) -> None:
    """Seconds per token the same in all steps, whatever their lengths."""
    total = sum(tokens for _, tokens in steps)
    pace = Pace(num_steps=len(steps), num_tokens=total)
    done = 0
    for number, (_, tokens) in enumerate(steps[: len(steps) // 2 + 1], 1):
        done += tokens
        pace.step(step=number, num_tokens=done, seconds=done * 0.02)
    left = pace.seconds_left(0.0)
    assert left is not None and math.isclose(left, (total - done) * 0.02, abs_tol=1e-6)
