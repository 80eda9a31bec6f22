"""Why a run should not be started: it does not fit, or would cost more than it may. Each names the setting and the way out."""

from job.errors import PlanError
from job.plan.footprint import Footprint
from job.plan.forecast import Plan
from job.plan.hardware import OLDEST_CAPABILITY, known_gpus
from job.plan.memory import memory_alone
from job.plan.price import listed_price
from job.settings import BudgetSettings, TrainSettings

GIB = 2**30


def check_memory(plan: Plan, train: TrainSettings, footprint: Footprint | None, *, max_length: int, longest: int) -> None:
    """Raise a PlanError when the run does not fit into this machine's memory."""
    if plan.fits is not False or plan.memory is None or plan.memory_bytes is None:
        return
    asked = train.per_device_train_batch_size
    kind = "recomputed" if plan.activation_checkpointing else "kept"
    where = f"the GPU {plan.gpu} has" if plan.gpu else "this machine has"
    if plan.num_devices > 1:
        where = f"each of the {plan.num_devices} {f'GPUs ({plan.gpu})' if plan.gpu else 'processes'}, with {plan.parallel}, has"
    ways = ["a lower MAX_LENGTH or LORA_R", "a smaller model"]
    if asked != "auto" and asked > 1:
        ways.insert(0, "PER_DEVICE_TRAIN_BATCH_SIZE=auto")
    if train.activation_checkpointing is False:
        ways.insert(0, "ACTIVATION_CHECKPOINTING=auto")
    if train.parallel == "ddp" and plan.num_devices > 1:
        ways.insert(0, "PARALLEL=auto")
    if plan.gpu and footprint is not None and (larger := _cheapest_that_fits(train, footprint, longest)):
        ways.append(larger)
    raise PlanError(
        f"PER_DEVICE_TRAIN_BATCH_SIZE={asked}: the run does not fit: {plan.micro_batch} example(s) of up to {longest:,} tokens "
        f"(MAX_LENGTH={max_length}) at a time, activations {kind}, need {plan.memory.peak_bytes / GIB:.1f} GiB, up to "
        f"{plan.memory.safe_peak_bytes / GIB:.1f} to be safe, and {where} {plan.memory_bytes / GIB:.1f}; take {', '.join(ways)}"
    )


def check_cost(plan: Plan, budget: BudgetSettings) -> None:
    """Raise a PlanError when even the low estimate is above MAX_COST_USD or MAX_HOURS."""
    if budget.max_cost_usd is not None and plan.cost_usd_low is not None and plan.cost_usd_low > budget.max_cost_usd:
        raise PlanError(
            f"MAX_COST_USD={budget.max_cost_usd:g}: the run will cost ${plan.cost_usd_low:.2f} at least ({_hours(plan)} at "
            f"${plan.price_usd_per_hour:.2f} an hour, {plan.price_source}); raise it, train on less (MAX_SAMPLES, "
            "NUM_TRAIN_EPOCHS, MAX_STEPS), or take a cheaper GPU: `python -m job plan` compares them"
        )
    if budget.max_hours is not None and plan.seconds_low is not None and plan.seconds_low > budget.max_hours * 3600:
        raise PlanError(
            f"MAX_HOURS={budget.max_hours:g}: the run will take {_hours(plan)}; raise it, train on less (MAX_SAMPLES, "
            "NUM_TRAIN_EPOCHS, MAX_STEPS), or take a faster GPU: `python -m job plan` compares them"
        )


def _hours(plan: Plan) -> str:
    assert plan.seconds_low is not None and plan.seconds_high is not None
    return f"{plan.seconds_low / 3600:.2f} to {plan.seconds_high / 3600:.2f} hours"


def _cheapest_that_fits(train: TrainSettings, footprint: Footprint, longest: int) -> str | None:
    """A GPU with more memory, with its price."""
    memory = memory_alone(footprint, train, length=longest)
    fitting = [
        (price.usd_per_hour, gpu)
        for gpu in known_gpus()
        if gpu.memory_bytes >= memory.safe_peak_bytes and gpu.compute_capability >= OLDEST_CAPABILITY
        if (price := listed_price(gpu.name)) is not None
    ]
    if not fitting:
        return None
    usd_per_hour, gpu = min(fitting, key=lambda pair: pair[0])
    return f"or a larger GPU ({gpu.name}, {gpu.memory_bytes / GIB:.0f} GiB, about ${usd_per_hour:.2f} an hour)"
