"""The same run on every GPU that could be rented: a forecast for each, the cheapest that fits, and what would make others fit."""

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict

from job.plan.footprint import Footprint
from job.plan.forecast import Circumstances, Plan, Work, forecast
from job.plan.hardware import OLDEST_CAPABILITY, Gpu
from job.plan.memory import MemoryEstimate, estimate_memory, memory_alone, optimizer_name
from job.plan.price import Price
from job.plan.sharing import Parallel
from job.plan.throughput import Speed
from job.settings import ModelSettings, TrainSettings


class Offer(BaseModel):
    """One GPU or several alike, and what the run would be on them."""

    model_config = ConfigDict(frozen=True)

    name: str
    num_gpus: int
    memory_bytes: int
    """Of one of them."""
    fits: bool
    headroom_bytes: int
    """What is left of it by the safe estimate; negative where it does not fit."""
    peak_bytes: int
    safe_peak_bytes: int
    micro_batch: int
    gradient_accumulation_steps: int
    """Of each GPU."""
    parallel: Parallel | None
    """How several share the model."""
    activation_checkpointing: bool
    hours_low: float | None
    hours_high: float | None
    cost_usd_low: float | None
    cost_usd_high: float | None
    usd_per_hour: float | None
    price_source: str
    """`unknown` where nobody says what it costs."""
    is_cheapest: bool = False
    hint: str = ""
    """Where it does not fit, what would make it."""


def make_offers(
    gpus: Sequence[tuple[Gpu, Price | None, Speed | None]],
    train: TrainSettings,
    model: ModelSettings,
    work: Work,
    footprint: Footprint,
    circumstances: Circumstances,
    *,
    num_gpus: int = 1,
) -> list[Offer]:
    """Forecast the run on so many of each GPU, in the order given; prices are of all of them."""
    offers = [_offer(gpu, price, speed, train, model, work, footprint, circumstances, num_gpus) for gpu, price, speed in gpus]
    fitting = [offer for offer in offers if offer.fits and _cost(offer) is not None]
    if fitting:
        best = min(fitting, key=lambda offer: _cost(offer) or 0.0)
        offers = [offer.model_copy(update={"is_cheapest": offer is best}) for offer in offers]
    return offers


def memory_as_set(
    train: TrainSettings,
    footprint: Footprint,
    *,
    length: int,
    on_gpu: bool,
    num_devices: int = 1,
    parallel: Parallel | None = None,
) -> MemoryEstimate:
    """For the micro-batch that was set, one example with `auto`; activations recomputed unless that is off."""
    rows = 1 if train.per_device_train_batch_size == "auto" else train.per_device_train_batch_size
    return estimate_memory(
        footprint,
        rows=rows,
        length=length,
        activation_checkpointing=train.activation_checkpointing is not False,
        optimizer=optimizer_name(train, on_gpu=on_gpu),
        on_gpu=on_gpu,
        num_devices=num_devices,
        parallel=parallel,
    )


def longest_that_fits(
    train: TrainSettings,
    footprint: Footprint,
    gpu: Gpu,
    *,
    below: int,
    num_devices: int = 1,
    parallel: Parallel | None = None,
) -> int | None:
    """The longest example, in steps of 64 tokens, that fits alone with activations recomputed; None when none does."""

    def fits(length: int) -> bool:
        memory = memory_alone(footprint, train, length=length, num_devices=num_devices, parallel=parallel)
        return memory.safe_peak_bytes <= gpu.memory_bytes

    fitting = [length for length in range(64, below, 64) if fits(length)]
    return fitting[-1] if fitting else None


def _offer(
    gpu: Gpu,
    price: Price | None,
    speed: Speed | None,
    train: TrainSettings,
    model: ModelSettings,
    work: Work,
    footprint: Footprint,
    circumstances: Circumstances,
    num_gpus: int,
) -> Offer:
    plan = forecast(
        train,
        model,
        work,
        footprint=footprint,
        gpu=gpu,
        price=price,
        speed=speed,
        circumstances=circumstances,
        num_devices=num_gpus,
    )
    assert plan.memory is not None
    is_too_old = gpu.compute_capability < OLDEST_CAPABILITY
    fits = plan.fits is True and not is_too_old
    hint = ""
    if is_too_old:
        hint = f"compute capability {gpu.compute_capability} is too old for CUDA 13"
    elif not fits:
        hint = _hint(plan, train, model, work, footprint, gpu)
    hours = [None if seconds is None or not fits else seconds / 3600 for seconds in (plan.seconds_low, plan.seconds_high)]
    return Offer(
        name=gpu.name,
        num_gpus=num_gpus,
        memory_bytes=gpu.memory_bytes,
        fits=fits,
        headroom_bytes=gpu.memory_bytes - plan.memory.safe_peak_bytes,
        peak_bytes=plan.memory.peak_bytes,
        safe_peak_bytes=plan.memory.safe_peak_bytes,
        micro_batch=plan.micro_batch,
        gradient_accumulation_steps=plan.gradient_accumulation_steps,
        parallel=plan.parallel,
        activation_checkpointing=plan.activation_checkpointing is True,
        hours_low=hours[0],
        hours_high=hours[1],
        cost_usd_low=plan.cost_usd_low if fits else None,
        cost_usd_high=plan.cost_usd_high if fits else None,
        usd_per_hour=price.usd_per_hour if price else None,
        price_source=price.source if price else "unknown",
        hint=hint,
    )


def _hint(plan: Plan, train: TrainSettings, model: ModelSettings, work: Work, footprint: Footprint, gpu: Gpu) -> str:
    if plan.activation_checkpointing is False:
        return "ACTIVATION_CHECKPOINTING=1 or auto needs far less"
    if plan.micro_batch > 1:
        return "PER_DEVICE_TRAIN_BATCH_SIZE=auto takes smaller micro-batches"
    if train.parallel == "ddp" and plan.parallel and not model.load_in_8bit:
        shared = memory_alone(footprint, train, length=work.longest_tokens, num_devices=plan.num_devices, parallel="fsdp")
        if shared.safe_peak_bytes <= gpu.memory_bytes:
            return "PARALLEL=auto or fsdp shares the weights out, and would fit"
    length = longest_that_fits(
        train, footprint, gpu, below=work.longest_tokens, num_devices=plan.num_devices, parallel=plan.parallel
    )
    if length is not None and length >= 256:
        return f"MAX_LENGTH={length} would fit"
    if not model.load_in_4bit:
        return "LOAD_IN_4BIT=1 needs a quarter to a half of it"
    return "a smaller model, or a GPU with more memory"


def _cost(offer: Offer) -> float | None:
    """What to compare by: the middle of the range, or the price where the hours are not known."""
    if offer.cost_usd_low is not None and offer.cost_usd_high is not None:
        return (offer.cost_usd_low + offer.cost_usd_high) / 2
    return offer.usd_per_hour if offer.hours_low is None else None
