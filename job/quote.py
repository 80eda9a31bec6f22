"""`python -m job plan`: what the run would need and cost on every GPU that could be rented; nothing is downloaded but names.

Settings in, a table (or JSON) out. Exit status 4 when it fits nowhere that was asked for, or costs more than the budget allows.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from rich.console import Console

from job.data.tally import Tally
from job.errors import PlanError, Problem, SettingsError
from job.keep.store import Store
from job.plan.advice import advise
from job.plan.footprint import Footprint
from job.plan.forecast import Plan, Work, forecast
from job.plan.hardware import Gpu, find_gpu, known_gpus
from job.plan.memory import MemoryEstimate
from job.plan.offers import Offer, make_offers, memory_as_set
from job.plan.price import Price, listed_price, stated_price
from job.plan.show import memory_line, model_line, offers_table
from job.plan.spread import check_shares
from job.planning import Planner
from job.settings import Settings
from job.sizing import Sizes
from job.speeds import learned_speed

WIDTH = 150


@dataclass(frozen=True, kw_only=True, slots=True)
class Quote:
    """All that `plan` found."""

    model_id: str
    footprint: Footprint
    memory: MemoryEstimate
    work: Work | None
    why_unknown: str | None
    offers: list[Offer]
    assumptions: list[str]
    advice: list[str]

    def as_json(self) -> dict[str, Any]:
        """The keys are an interface: scripts read them."""
        names = set(Offer.model_fields) - {"peak_bytes", "safe_peak_bytes"}
        return {
            "model": {
                "id": self.model_id,
                "num_parameters": self.footprint.num_parameters,
                "num_trainable": self.footprint.num_trainable,
                "num_layers": self.footprint.num_layers,
                "max_length": self.footprint.max_length,
                "weights": self.footprint.weights.model_dump(),
                "method": self.footprint.method,
            },
            "memory": self.memory.model_dump(mode="json"),
            "work": self.work.model_dump(mode="json") if self.work else None,
            "gpus": [offer.model_dump(mode="json", include=names) for offer in self.offers],
            "assumptions": self.assumptions,
            "advice": self.advice,
            "problems": list(self.footprint.problems),
        }


def print_quote(quote: Quote, settings: Settings, *, as_json: bool, redact: Callable[[str], str]) -> None:
    """On standard output, since it is the result.

    Raises:
        PlanError: the run fits nowhere, or is above the budget wherever it fits.
    """
    if as_json:
        print(redact(json.dumps(quote.as_json(), indent=1, ensure_ascii=False)))
    else:
        _show(quote, settings, redact)
    _judge(quote, settings)


def make_quote(
    planner: Planner,
    sizes: Sizes,
    settings: Settings,
    flags: Mapping[str, str],
    tally: Tally | None,
    *,
    scratch: Path,
    shared: Store,
) -> Quote:
    """Forecast the run on the GPUs that were asked for, or on all that are known.

    Args:
        tally: of the data, if it is prepared; else its first rows are read.

    Raises:
        SettingsError: no such GPU, or so many cannot share a step evenly.
        ChildFailedError: the model's configuration cannot be had.
    """
    num_gpus = _num_gpus(flags.get("num_gpus"), settings)
    asked = flags.get("gpu")
    gpus = [_find(asked)] if asked else _all_gpus(planner)
    footprint = sizes.footprint(on_gpu=True, with_data=tally is None)
    work = planner.work_before(tally)
    planned = work or Work(num_examples=settings.train.effective_batch_size, num_tokens=1, longest_tokens=sizes.bound)
    around = planner.circumstances(footprint)
    rows = [
        (
            gpu,
            _price(gpu, settings, planner, asked=asked, num_gpus=num_gpus),
            learned_speed(shared, scratch, settings, gpu.name, num_devices=num_gpus),
        )
        for gpu in gpus
    ]
    offers = make_offers(rows, settings.train, settings.model, planned, footprint, around, num_gpus=num_gpus)
    if work is None:
        unknown = {"hours_low": None, "hours_high": None, "cost_usd_low": None, "cost_usd_high": None}
        offers = [offer.model_copy(update=unknown) for offer in offers]
    shown = next((gpu for gpu, offer in zip(gpus, offers, strict=True) if offer.is_cheapest or len(gpus) == 1), gpus[-1])
    speed = next(speed for gpu, _, speed in rows if gpu is shown)
    plan = forecast(
        settings.train,
        settings.model,
        planned,
        footprint=footprint,
        gpu=shown,
        speed=speed if work else None,
        circumstances=around,
        num_devices=num_gpus,
    )
    return Quote(
        model_id=settings.model.model_id,
        footprint=footprint,
        memory=memory_as_set(
            settings.train, footprint, length=sizes.bound, on_gpu=True, num_devices=num_gpus, parallel=plan.parallel
        ),
        work=work,
        why_unknown=sizes.estimate_failed,
        offers=offers,
        assumptions=_assumptions(plan, work, num_gpus),
        advice=_advice(settings, plan, work, footprint),
    )


def _show(quote: Quote, settings: Settings, redact: Callable[[str], str]) -> None:
    console = Console(highlight=False, soft_wrap=True)

    def say(text: str) -> None:
        console.print(redact(text), markup=False)

    say(model_line(quote.model_id, quote.footprint))
    if quote.work is None:
        say(f"data not known, so neither hours nor dollars: {quote.why_unknown or 'nothing to go by'}")
    else:
        more = f", {quote.work.error:.0%} more or less" if quote.work.error else ""
        say(f"data: {quote.work.num_examples:,} examples with {quote.work.num_tokens:,} tokens ({quote.work.basis}{more})")
    micro = settings.train.per_device_train_batch_size
    say(f"memory at {1 if micro == 'auto' else micro} x {settings.data.max_length:,} tokens: {memory_line(quote.memory)}")
    say("")
    width = console.width if console.is_terminal else WIDTH
    Console(highlight=False, width=width).print(offers_table(quote.offers))
    say("")
    best = next((offer for offer in quote.offers if offer.is_cheapest), None)
    if best is not None:
        shared = ", f: fsdp shares the weights" if any(offer.parallel == "fsdp" for offer in quote.offers) else ""
        several = f"{best.num_gpus} x " if best.num_gpus > 1 else ""
        say(f"* the cheapest that fits: {several}{best.name}; batch r: activations are recomputed{shared}")
    for kind, texts in (
        ("must be changed", quote.footprint.problems),
        ("advice", quote.advice),
        ("assumed", quote.assumptions),
    ):
        for text in texts:
            say(f"{kind}: {text}")


def _judge(quote: Quote, settings: Settings) -> None:
    fitting = [offer for offer in quote.offers if offer.fits]
    if not fitting:
        need = min(offer.safe_peak_bytes for offer in quote.offers) / 2**30
        names = quote.offers[0].name if len(quote.offers) == 1 else "any of these GPUs"
        if quote.offers[0].num_gpus > 1:
            names = f"{quote.offers[0].num_gpus} x {names}"
        raise PlanError(
            f"MODEL_ID={quote.model_id}: the run needs {need:.1f} GiB to be safe and does not fit on {names}: "
            f"{quote.offers[-1].hint}"
        )
    limit = settings.budget.max_cost_usd
    costs = [offer.cost_usd_low for offer in fitting if offer.cost_usd_low is not None]
    if limit is not None and costs and min(costs) > limit:
        raise PlanError(
            f"MAX_COST_USD={limit:g}: the run costs ${min(costs):.2f} at least wherever it fits; raise it, or train on less "
            "(MAX_SAMPLES, NUM_TRAIN_EPOCHS, MAX_STEPS)"
        )


def _num_gpus(text: str | None, settings: Settings) -> int:
    """Those that were asked for, as many as processes, else one."""
    asked = settings.train.nproc_per_node
    if text is None:
        number = 1 if asked == "auto" else asked
        check_shares(settings.train, number)
        return number
    if text.isdigit() and int(text) > 0:
        check_shares(settings.train, int(text), setting="--num-gpus")
        return int(text)
    raise SettingsError([Problem(setting="--num-gpus", value=text, rule="must be a whole number above 0", way_out="correct it")])


def _find(name: str) -> Gpu:
    gpu = find_gpu(name)
    if gpu is None:
        names = [gpu.name for gpu in known_gpus()]
        near = get_close_matches(name, names, n=1, cutoff=0.4)
        way_out = (f"did you mean {near[0]}? " if near else "") + f"known are {', '.join(names)}"
        raise SettingsError([Problem(setting="--gpu", value=name, rule="no such GPU is known", way_out=way_out)])
    return gpu


def _all_gpus(planner: Planner) -> Sequence[Gpu]:
    """Those that are known, with this machine's own when it is none of them."""
    own = planner.gpu
    known = known_gpus()
    return known if own is None or any(gpu.name == own.name for gpu in known) else (own, *known)


def _price(gpu: Gpu, settings: Settings, planner: Planner, *, asked: str | None, num_gpus: int) -> Price | None:
    """The user's word counts for the GPU that was named, or that this machine has; the tables for all others.

    What this machine costs is no price of a machine with another number of GPUs.
    """
    rate, prices_file = settings.budget.gpu_hourly_rate, settings.budget.gpu_prices_file
    is_own = planner.gpu is not None and planner.gpu.name == gpu.name
    if rate is not None and (asked or is_own):
        return stated_price(rate)
    has_as_many = len(planner.devices) == num_gpus and planner.nodes.num_nodes == 1
    if is_own and has_as_many and planner.price is not None:
        return planner.price
    return listed_price(gpu.name, prices_file, num_gpus=num_gpus)


def _assumptions(plan: Plan, work: Work | None, num_gpus: int) -> list[str]:
    told = [text for text in plan.assumptions if not text.startswith("micro-batch")]
    if work is not None:
        told.append("start, download at 50-500 MB/s, preparation, evaluations, checkpoints and the end are in the hours")
    told.append("memory to be safe: 25% of what comes and goes, 0.25 GiB and the CUDA context on top; a GPU's screen takes more")
    if num_gpus > 1:
        told.append(f"{num_gpus} GPUs of one machine; memory and batch are of each, price and cost of all")
    return told


def _advice(settings: Settings, plan: Plan, work: Work | None, footprint: Footprint) -> list[str]:
    if work is None:
        return []
    return list(advise(settings.train, settings.lora, settings.data, plan, num_parameters=footprint.num_parameters))
