"""Forecasts as people read them: a table over GPUs, and one-line summaries."""

from collections.abc import Sequence

from rich.table import Table

from job.plan.footprint import Footprint
from job.plan.forecast import Plan
from job.plan.memory import MemoryEstimate
from job.plan.offers import Offer

GIB = 2**30


def offers_table(offers: Sequence[Offer]) -> Table:
    """One row a GPU; the cheapest that fits has a mark."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name, right in (
        ("GPU", False), ("memory", True), ("fits", False), ("left", True), ("batch", True),
        ("hours", True), ("cost", True), ("$/h", True), ("price from, or what would make it fit", False),
    ):  # fmt: skip
        table.add_column(name, justify="right" if right else "left", no_wrap=name != "price from, or what would make it fit")
    for offer in offers:
        batch = f"{offer.micro_batch} x {offer.gradient_accumulation_steps}"
        batch += f"{' r' if offer.activation_checkpointing else ''}{' f' if offer.parallel == 'fsdp' else ''}"
        table.add_row(
            f"{'* ' if offer.is_cheapest else '  '}{f'{offer.num_gpus} x ' if offer.num_gpus > 1 else ''}{offer.name}",
            f"{offer.memory_bytes / GIB:.0f} GiB",
            "yes" if offer.fits else "no",
            f"{offer.headroom_bytes / GIB:.1f}",
            batch if offer.fits else "",
            span(offer.hours_low, offer.hours_high) if offer.fits else "",
            span(offer.cost_usd_low, offer.cost_usd_high, unit="$") if offer.fits else "",
            "" if offer.usd_per_hour is None else f"{offer.usd_per_hour:.2f}",
            offer.price_source if offer.fits else offer.hint,
            style="bold green" if offer.is_cheapest else None if offer.fits else "dim",
        )
    return table


def span(low: float | None, high: float | None, *, unit: str = "") -> str:
    """A range in as many digits as it deserves."""
    if low is None or high is None:
        return "?"
    digits = 2 if high < 10 or unit == "$" else 1
    return f"{unit}{low:.{digits}f}-{high:.{digits}f}"


def memory_parts(memory: MemoryEstimate) -> tuple[tuple[str, int], ...]:
    """What a peak is made of, in the words that people read."""
    return (
        ("weights", memory.weights_bytes),
        ("adapter", memory.adapter_bytes),
        ("gradients", memory.gradients_bytes),
        ("optimizer", memory.optimizer_bytes),
        ("activations", memory.activations_bytes),
        ("logits", memory.logits_bytes),
        ("passing", memory.transient_bytes),
        ("reserved", memory.reserved_bytes),
    )


def memory_line(memory: MemoryEstimate) -> str:
    listed = ", ".join(f"{name} {size / GIB:.2f}" for name, size in memory_parts(memory) if size >= GIB / 200)
    return f"{memory.peak_bytes / GIB:.1f} GiB expected, {memory.safe_peak_bytes / GIB:.1f} to be safe ({listed})"


def model_line(model_id: str, footprint: Footprint) -> str:
    weights = footprint.weights
    return (
        f"model {model_id}: {footprint.num_parameters / 1e9:.2f} billion parameters in {footprint.num_layers} layers, "
        f"{weights.total_bytes / GIB:.2f} GiB of weights ({weights.unquantised_bytes / GIB:.2f} not quantised), "
        f"{footprint.num_trainable / 1e6:.1f} million trained"
    )


def plan_line(plan: Plan) -> str:
    """What the run will take, for the screen."""
    each = ""
    if plan.num_devices > 1:
        machines = f" in {plan.num_nodes} machines" if plan.num_nodes > 1 else ""
        each = f" on each of {plan.num_devices} {'GPUs' if plan.gpu else 'processes'}{machines} ({plan.parallel})"
    text = (
        f"plan: {plan.num_steps:,} steps of {plan.micro_batch} x {plan.gradient_accumulation_steps} examples{each}, "
        f"{plan.num_tokens:,} tokens"
    )
    if plan.memory is not None and plan.memory_bytes:
        text += (
            f"; {plan.memory.peak_bytes / GIB:.1f} GiB of memory expected, {plan.memory.safe_peak_bytes / GIB:.1f} to be safe, "
            f"of {plan.memory_bytes / GIB:.1f} ({whose_memory(plan)})"
        )
    if plan.seconds_low is not None and plan.seconds_high is not None:
        text += f"; {span(plan.seconds_low / 3600, plan.seconds_high / 3600)} hours"
    if plan.cost_usd_low is not None:
        text += f", {span(plan.cost_usd_low, plan.cost_usd_high, unit='$')} ({plan.price_source})"
    return text


def whose_memory(plan: Plan) -> str:
    """What the memory figures are of."""
    if plan.num_devices == 1:
        return plan.gpu or "this machine"
    return f"each of {plan.num_devices} {plan.gpu or 'processes'}, {plan.parallel}"
