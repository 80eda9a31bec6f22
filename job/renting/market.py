"""RunPod's catalogue and the forecasts in; out, the GPUs on which this run fits and which are free, the cheapest run first."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from job.errors import JobError, MachineError, PlanError
from job.plan.hardware import GIB, find_gpu
from job.plan.offers import Offer
from job.plan.price import storage_usd_per_hour
from job.plan.show import span
from job.renting.wishes import Wishes

FREE = ("LOW", "MEDIUM", "HIGH")
"""Levels of stock: all but NONE."""
MOST_SHOWN = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """One kind of GPU that could be rented now, and what the run would be on it."""

    gpu_id: str
    """RunPod's name of it."""
    name: str
    num_gpus: int
    memory_gb: int
    usd_per_hour: float
    """Of the whole pod, its disk included."""
    hours_low: float | None
    hours_high: float | None
    availability: str

    @property
    def cost_low(self) -> float | None:
        return None if self.hours_low is None else self.hours_low * self.usd_per_hour

    @property
    def cost_high(self) -> float | None:
        return None if self.hours_high is None else self.hours_high * self.usd_per_hour

    @property
    def rank(self) -> float:
        """What to compare by: the middle of the cost, or an hour's price where no hours are known."""
        if self.cost_low is None or self.cost_high is None:
            return self.usd_per_hour
        return (self.cost_low + self.cost_high) / 2

    def __str__(self) -> str:
        count = f"{self.num_gpus} x " if self.num_gpus > 1 else ""
        text = f"{count}{self.name} at ${self.usd_per_hour:.2f} an hour"
        if self.cost_low is None:
            return f"{text}, hours not known"
        cost = span(self.cost_low, self.cost_high, unit="$")
        return f"{text}: {span(self.hours_low, self.hours_high)} hours, {cost}"


def find_candidates(
    catalogue: Sequence[Mapping[str, Any]],
    offers: Sequence[Offer],
    wishes: Wishes,
    *,
    disk_bytes: float,
    data_center: str | None,
    limit_usd: float | None,
) -> list[Candidate]:
    """Join the two by the GPUs' names; the list is never empty.

    Args:
        offers: the forecast for each GPU that is known, whatever it costs.
        data_center: where the network volume is, and so the pod has to be.
        limit_usd: MAX_COST_USD.

    Raises:
        PlanError: the run fits on no GPU that RunPod rents, or costs too much on all.
        MachineError: it fits, and none of those is free.
    """
    forecasts = {offer.name: offer for offer in offers}
    found, left_out = [], Counter[str]()
    for entry in catalogue:
        gpu = find_gpu(entry["id"]) or find_gpu(entry["name"])
        if gpu is None or entry["manufacturer"] != "NVIDIA" or (wishes.gpus and gpu.name not in wishes.gpus):
            continue
        offer = forecasts[gpu.name]
        candidate = _candidate(entry, offer, wishes, disk_bytes)
        if not offer.fits or offer.safe_peak_bytes > entry["memory"] * GIB:
            left_out["too small"] += 1
        elif not _is_free(entry, wishes, data_center):
            left_out["not free"] += 1
        elif limit_usd is not None and candidate.cost_low is not None and candidate.cost_low > limit_usd:
            left_out["too dear"] += 1
        else:
            found.append(candidate)
    if not found:
        raise _nothing(left_out, wishes, offers, data_center, limit_usd)
    return sorted(found, key=lambda candidate: (candidate.rank, candidate.usd_per_hour))


def candidates_table(candidates: Sequence[Candidate]) -> Table:
    """The first few, the choice on top."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("GPU", "memory", "hours", "cost", "$/h", "stock"):
        table.add_column(name, justify="left" if name in ("GPU", "stock") else "right", no_wrap=True)
    for number, one in enumerate(candidates[:MOST_SHOWN]):
        table.add_row(
            f"{'* ' if number == 0 else '  '}{f'{one.num_gpus} x ' if one.num_gpus > 1 else ''}{one.name}",
            f"{one.memory_gb} GB",
            span(one.hours_low, one.hours_high),
            span(one.cost_low, one.cost_high, unit="$"),
            f"{one.usd_per_hour:.2f}",
            one.availability.lower(),
        )
    return table


def _candidate(entry: Mapping[str, Any], offer: Offer, wishes: Wishes, disk_bytes: float) -> Candidate:
    per_gpu = float(entry["price"][wishes.cloud.lower()])
    return Candidate(
        gpu_id=entry["id"],
        name=offer.name,
        num_gpus=wishes.num_gpus,
        memory_gb=entry["memory"],
        usd_per_hour=per_gpu * wishes.num_gpus + storage_usd_per_hour(disk_bytes),
        hours_low=offer.hours_low,
        hours_high=offer.hours_high,
        availability=str(entry.get("availability", "NONE")),
    )


def _is_free(entry: Mapping[str, Any], wishes: Wishes, data_center: str | None) -> bool:
    cloud = wishes.cloud.lower()
    is_sold = entry[cloud] and entry["price"][cloud] > 0 and entry["maxCount"][cloud] >= wishes.num_gpus
    if not is_sold or entry.get("availability") not in FREE:
        return False
    if data_center is None:
        return True
    return any(place["id"] == data_center and place["availability"] in FREE for place in entry.get("dataCenters", ()))


def _nothing(
    left_out: Counter[str], wishes: Wishes, offers: Sequence[Offer], data_center: str | None, limit_usd: float | None
) -> JobError:
    asked = f"--gpu {','.join(wishes.gpus)}: " if wishes.gpus else ""
    counts = ", ".join(f"{number} {why}" for why, number in left_out.items()) or "it has none of them"
    if left_out["not free"]:
        where = f" in {data_center}, where the network volume is" if data_center else ""
        other = "secure" if wishes.cloud == "COMMUNITY" else "community"
        ways = [f"--cloud {other}", *(["another --gpu"] if wishes.gpus else [])]
        return MachineError(
            f"{asked}no GPU that this run fits on is free in RunPod's {wishes.cloud.lower()} cloud{where} ({counts}); try again "
            f"later, or {' or '.join(ways)}"
        )
    if left_out["too dear"]:
        return PlanError(
            f"MAX_COST_USD={limit_usd:g}: {asked}the run costs more on every GPU that is free ({counts}); raise it, or train on "
            "less (MAX_SAMPLES, NUM_TRAIN_EPOCHS, MAX_STEPS)"
        )
    chosen = [offer for offer in offers if not wishes.gpus or offer.name in wishes.gpus]
    need = min(offer.safe_peak_bytes for offer in chosen) / GIB
    hint = next((offer.hint for offer in reversed(chosen) if offer.hint), "`python -m job plan` shows what would fit")
    return PlanError(f"{asked}the run needs {need:.1f} GiB to be safe and fits on no GPU that RunPod rents ({counts}): {hint}")
