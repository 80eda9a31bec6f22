"""What an hour costs: the user's word, else RunPod's for the running pod, else a dated table, else unknown. Never 0.

Every price carries where it comes from, because prices move.
"""

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, TypeAdapter, ValidationError

from job.errors import Problem, SettingsError
from job.plan.hardware import find_gpu

RUNPOD_API = "https://api.runpod.io/v2"
RUNPOD_SECONDS = 10.0
HOURS_PER_MONTH = 730.0
_PREFERRED = ("RunPod pod (secure)", "RunPod pod (community)", "RunPod pod (lowest of secure and community)")
"""Whose row is taken when several sell a GPU: the machines that this job is made for; else the cheapest on demand."""


class Price(BaseModel):
    """Dollars an hour of a whole machine, or of several."""

    model_config = ConfigDict(frozen=True)

    usd_per_hour: float
    source: str
    """Who says so, and when."""
    includes_storage: bool = True
    """Whether the disk is in it."""
    num_machines: int = 1
    """That it is the price of."""

    def cost_usd(self, seconds: float, *, storage_bytes: float = 0.0) -> float:
        """Of this long, with what each machine's disk costs where it comes on top."""
        extra = 0.0 if self.includes_storage else self.num_machines * storage_usd_per_hour(storage_bytes)
        return (self.usd_per_hour + extra) * seconds / 3600

    def of_machines(self, number: int) -> "Price":
        """Of so many like this one."""
        if number == 1:
            return self
        more = {"usd_per_hour": self.usd_per_hour * number, "source": f"{self.source}, {number} machines", "num_machines": number}
        return self.model_copy(update=more)


class _Row(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")

    gpu: str
    usd_per_hour: PositiveFloat
    provider: str = "your table"
    date: str = ""
    source: str = ""


_ROWS: TypeAdapter[list[_Row]] = TypeAdapter(Annotated[list[_Row], Field(min_length=1)])


def stated_price(usd_per_hour: float) -> Price:
    """The user's word."""
    return Price(usd_per_hour=usd_per_hour, source="GPU_HOURLY_RATE")


def listed_price(gpu: str, prices_file: Path | None = None, *, num_gpus: int = 1) -> Price | None:
    """The price of a machine with this GPU by the user's table, else by ours; None when neither has it.

    Args:
        gpu: a name that `find_gpu` knows, or one of the user's own.
        prices_file: GPU_PRICES_FILE.
        num_gpus: how many of them the machine has; each costs the same.

    Raises:
        SettingsError: the user's table cannot be read.
    """
    own = [row for row in read_prices(prices_file) if _is_same(row.gpu, gpu)] if prices_file else []
    if own:
        row = min(own, key=lambda row: row.usd_per_hour)
    else:
        rows = [row for row in _table() if _is_same(row.gpu, gpu)]
        on_demand = [row for row in rows if not row.provider.startswith(("Vast", "RunPod serverless"))] or rows
        by_provider = {row.provider: row for row in on_demand}
        row_or_none = next((by_provider[name] for name in _PREFERRED if name in by_provider), None)
        if row_or_none is None and not on_demand:
            return None
        row = row_or_none or min(on_demand, key=lambda row: row.usd_per_hour)
    said = " ".join(part for part in (row.provider, row.date) if part)
    return Price(usd_per_hour=row.usd_per_hour * num_gpus, source=said, includes_storage=False)


def read_prices(path: Path) -> list[_Row]:
    """Rows {"gpu", "usd_per_hour"} of a JSON file, a list or {"prices": [...]} as in ours; provider and date may come along."""
    try:
        found = json.loads(path.expanduser().read_text("utf-8"))
        return _ROWS.validate_python(found["prices"] if isinstance(found, dict) else found)
    except (OSError, ValueError, KeyError, ValidationError) as error:
        problem = Problem(
            setting="GPU_PRICES_FILE",
            value=str(path),
            rule=f"is no table of prices ({type(error).__name__})",
            way_out='write [{"gpu": "RTX 4090", "usd_per_hour": 0.5}], one row a GPU',
        )
        raise SettingsError([problem]) from error


def runpod_price(environ: Mapping[str, str], api_key: str | None) -> tuple[Price | None, str | None]:
    """The billed price of the pod that this is, and why there is none: (price, complaint).

    A pod's own key may be refused (reported in 2026); a key of the user's is not. (None, None) when this is no pod.
    """
    pod = environ.get("RUNPOD_POD_ID")
    if not pod:
        return None, None
    if not api_key:
        return None, "RunPod's price of this pod is not known: there is no RUNPOD_API_KEY"
    import requests  # a tenth of a second, and only here

    address = f"{environ.get('RUNPOD_REST_URL', RUNPOD_API).rstrip('/')}/pods/{pod}"
    try:
        answer = requests.get(address, headers={"Authorization": f"Bearer {api_key}"}, timeout=RUNPOD_SECONDS)
        if answer.status_code in (401, 403):
            return None, f"RunPod refuses this RUNPOD_API_KEY the price of the pod ({answer.status_code}); set GPU_HOURLY_RATE"
        answer.raise_for_status()
        cost = _cost(answer.json())
    except (requests.RequestException, ValueError) as error:
        return None, f"RunPod's price of this pod is not known ({type(error).__name__}); set GPU_HOURLY_RATE"
    if cost is None:
        return None, "RunPod does not say what this pod costs; set GPU_HOURLY_RATE"
    return Price(usd_per_hour=cost, source=f"RunPod's API for pod {pod}"), None


def _cost(answer: Any) -> float | None:
    cost = answer.get("cost") if isinstance(answer, dict) else None
    return float(cost) if isinstance(cost, (int, float)) and not isinstance(cost, bool) and cost > 0 else None


def storage_usd_per_hour(num_bytes: float) -> float:
    """RunPod's container or volume disk of a running pod."""
    rows = json.loads(_file().read_text("utf-8"))["storage"]
    per_month = next(row["usd_per_gb_month"] for row in rows if row["kind"] == "container disk")
    return num_bytes / 1e9 * float(per_month) / HOURS_PER_MONTH


def _is_same(listed: str, asked: str) -> bool:
    known = find_gpu(asked)
    other = find_gpu(listed)
    return listed.casefold() == asked.casefold() or (known is not None and other is not None and known.name == other.name)


@cache
def _table() -> tuple[_Row, ...]:
    return tuple(_ROWS.validate_python(json.loads(_file().read_text("utf-8"))["prices"]))


def _file() -> Path:
    return Path(__file__).parent / "prices.json"
