"""A run's forecasts: before anything is spent, with counted data, and again from the first measured steps.

The sizes of model and data come from `sizing.py`, the arithmetic is in `plan/`, speeds of finished runs lie in OUTPUT_URI.
"""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

from job.data.tally import Tally
from job.display import Display
from job.errors import BudgetError, PreemptedError, Problem, SettingsError
from job.keep.ledger import Ledger
from job.keep.store import Store
from job.plan.footprint import Footprint
from job.plan.forecast import Circumstances, Plan, Work, forecast
from job.plan.hardware import Device, Gpu, find_devices, host_memory_bytes, slowest_of
from job.plan.memory import checkpoint_bytes, optimizer_name
from job.plan.nodes import Nodes, find_nodes
from job.plan.price import Price, listed_price, runpod_price, stated_price
from job.plan.refusals import check_cost, check_memory
from job.plan.retreat import Fit
from job.plan.show import GIB, plan_line, whose_memory
from job.plan.spread import check_shares
from job.settings import Settings, is_hub_id
from job.sizing import Sizes
from job.speeds import learned_speed
from job.supervise import ChildFailedError

LAYOUT = "layout"
"""The ledger's note of how steps are laid out: another machine continues with the same."""


class Planner:
    """The forecasts of one run on this machine.

    Args:
        shared: OUTPUT_URI itself, of which the run is a folder.
        sizes: of the model and the data.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        shared: Store,
        work: Path,
        environ: Mapping[str, str],
        display: Display,
        sizes: Sizes,
    ) -> None:
        self._settings, self._shared, self._work, self._environ = settings, shared, work, environ
        self._display, self._sizes = display, sizes

    @cached_property
    def devices(self) -> list[Device]:
        return find_devices(self._environ)

    @cached_property
    def nodes(self) -> Nodes:
        """How the trainer's processes are spread over machines: one for each GPU, where nothing else was asked for.

        Raises:
            MachineError: a variable of several machines is missing or makes no sense.
        """
        asked = self._settings.train.nproc_per_node
        per_node = asked if asked != "auto" else None if self.devices else 1  # what an engine says is of GPUs
        return find_nodes(self._environ, num_gpus=len(self.devices), per_node=per_node)

    @property
    def num_devices(self) -> int:
        """Trainer processes (ranks) on all machines together."""
        return self.nodes.num_processes

    @property
    def gpu(self) -> Gpu | None:
        """What the run trains on, the least of each where the GPUs differ; None for a CPU."""
        return slowest_of(self.devices[: self.nodes.processes_per_node])

    @property
    def _gpu_name(self) -> str:
        return self.gpu.name if self.gpu else "cpu"

    @cached_property
    def price(self) -> Price | None:
        """Of this machine: the user's word, else RunPod's for this pod, else the table's for its GPUs, else unknown.

        Of several machines each costs the same.
        """
        price = self._price_of_one
        return price.of_machines(self.nodes.num_nodes) if price else None

    @property
    def _price_of_one(self) -> Price | None:
        budget = self._settings.budget
        if budget.gpu_hourly_rate is not None:
            return stated_price(budget.gpu_hourly_rate)
        key = self._settings.secrets.runpod_api_key
        price, complaint = runpod_price(self._environ, key.get_secret_value() if key else None)
        if complaint:
            self._display.say(f"warning: {complaint}")
        if price is None and self.gpu is not None:
            price = listed_price(self.gpu.name, budget.gpu_prices_file, num_gpus=len(self.devices))
        return price

    def work_before(self, tally: Tally | None) -> Work | None:
        """What is known of the data before it is prepared; None when nothing is."""
        settings = self._settings
        if tally is not None:
            return counted(tally)
        if self._sizes.estimate is not None:
            found = self._sizes.estimate
            return Work(
                num_examples=found.num_examples,
                num_tokens=found.num_tokens,
                longest_tokens=max(1, min(found.longest_tokens, self._sizes.bound)),
                num_eval_tokens=found.num_eval_tokens,
                basis=f"estimated from the first {found.num_rows_read:,} rows",
                error=found.error,
            )
        num_examples = settings.data.max_samples
        if num_examples is None and settings.train.max_steps is not None:
            num_examples = settings.train.max_steps * settings.train.effective_batch_size
        if num_examples is None:
            return None
        tokens = num_examples * self._sizes.bound
        if settings.data.max_tokens is not None:
            tokens = min(tokens, settings.data.max_tokens)
        return Work(
            num_examples=num_examples,
            num_tokens=tokens,
            longest_tokens=self._sizes.bound,
            basis="at most so many, with every example as long as MAX_LENGTH allows",
        )

    def plan(self, work: Work | None, before: Fit | None = None) -> Plan:
        """The forecast for this machine; without `work` only memory is known.

        Args:
            before: how earlier attempts of the run laid their steps out.

        Raises:
            ChildFailedError: as `footprint_or_none`.
            SettingsError: an example is longer than the model's positions reach.
        """
        return self._plan(work, before, self.nodes)

    def _plan(self, work: Work | None, before: Fit | None, nodes: Nodes) -> Plan:
        settings, gpu = self._settings, self.gpu
        footprint = self._sizes.footprint_or_none(on_gpu=gpu is not None)
        if footprint is not None:
            self._check_length(footprint, work)
        speed = learned_speed(
            self._shared, self._work, settings, self._gpu_name, num_devices=nodes.num_processes, num_nodes=nodes.num_nodes
        )
        plan = forecast(
            settings.train,
            settings.model,
            work or Work(num_examples=settings.train.effective_batch_size, num_tokens=1, longest_tokens=self._sizes.bound),
            footprint=footprint,
            gpu=gpu,
            memory_bytes=None if gpu else host_memory_bytes() // nodes.processes_per_node,
            price=self.price,
            speed=speed,
            circumstances=self.circumstances(footprint),
            before=before,
            num_devices=nodes.num_processes,
            num_nodes=nodes.num_nodes,
        )
        if work is not None:
            return plan
        unknown = (
            "seconds_low",
            "seconds_high",
            "training_seconds_low",
            "training_seconds_high",
            "cost_usd_low",
            "cost_usd_high",
        )
        return plan.model_copy(update={**dict.fromkeys(unknown), "num_steps": 0, "num_tokens": 0})

    def plan_run(self, tally: Tally, ledger: Ledger) -> Plan:
        """The forecast of a run whose data are counted; it lays its steps out as the attempts before, where that fits.

        Raises:
            PlanError: it does not fit, or costs too much.
            ChildFailedError, SettingsError: as `plan`; or the devices cannot share a step evenly.
        """
        self._check_shares(tally.num_train)
        before = ledger.learned(LAYOUT)
        plan = self.plan(counted(tally), None if before is None else Fit.model_validate(before))
        self.refuse(plan, longest=tally.longest_tokens, checks_cost=not ledger.past)  # later the budget itself decides
        ledger.remember(LAYOUT, plan.fit.model_dump())
        return plan

    def plan_evaluation(self, tally: Tally, ledger: Ledger) -> Plan:
        """The same for one device alone, whatever others there are, which only evaluates; the layout is not remembered.

        Raises:
            PlanError: it does not fit.
            ChildFailedError, SettingsError: as `plan`.
        """
        before = ledger.learned(LAYOUT)
        plan = self._plan(counted(tally), None if before is None else Fit.model_validate(before), Nodes())
        self.refuse(plan, longest=tally.longest_tokens, checks_cost=False)
        return plan

    def refuse(self, plan: Plan, *, longest: int, checks_cost: bool) -> None:
        """Raise a PlanError when the run does not fit into this machine, or into its budget."""
        footprint = self._sizes.known(on_gpu=plan.gpu is not None)
        check_memory(plan, self._settings.train, footprint, max_length=self._sizes.longest, longest=longest)
        if checks_cost:
            check_cost(plan, self._settings.budget)

    def check(self, *, is_first: bool) -> str:
        """The forecast before anything is spent, as one of the checks before a run; says what it found.

        Args:
            is_first: nothing was spent yet, so a budget that is too small is refused.

        Raises:
            PlanError: the run does not fit, or costs too much.
            SettingsError: the devices cannot share a step evenly.
        """
        self._check_shares(None)
        budget = self._settings.budget
        asks_data = is_first and (budget.max_cost_usd is not None or budget.max_hours is not None)
        if self.gpu is None:  # then only an earlier run can say how long it takes
            asks_data = asks_data and learned_speed(self._shared, self._work, self._settings, "cpu") is not None
        if self.gpu is None and not asks_data:  # a CPU's memory rarely decides: nobody waits for the trace of the model
            return "no GPU: memory is looked at while the data is prepared"
        try:
            self._sizes.footprint_or_none(on_gpu=self.gpu is not None, with_data=asks_data)
            plan = self.plan(self.work_before(None))
        except ChildFailedError as failure:
            if isinstance(failure.error, (PreemptedError, BudgetError)):
                raise failure.error from failure
            return f"not known: {str(failure.error).splitlines()[0]}"  # the check of the model says the same as an error
        self.refuse(plan, longest=self._sizes.bound, checks_cost=is_first)
        return plan_line(plan).removeprefix("plan: ") if plan.num_steps else _memory_only(plan)

    def circumstances(self, footprint: Footprint | None) -> Circumstances:
        disk = 0.0
        if footprint is not None:
            each = checkpoint_bytes(footprint, optimizer_name(self._settings.train, on_gpu=self.gpu is not None))
            disk = 2.0 * footprint.num_parameters + each * (self._settings.keep.save_total_limit + 1)
        download = 2.0 * footprint.num_parameters if footprint and is_hub_id(self._settings.model.model_id) else 0.0
        return Circumstances(download_bytes=download, disk_bytes=disk)

    def _check_shares(self, num_examples: int | None) -> None:
        nodes, train = self.nodes, self._settings.train
        on_gpu = bool(self.devices)
        check_shares(train, nodes.num_processes, num_nodes=nodes.num_nodes, num_examples=num_examples, on_gpu=on_gpu)

    def _check_length(self, footprint: Footprint, work: Work | None) -> None:
        limit = footprint.max_length
        if work is None or limit is None or work.basis != "counted" or work.longest_tokens <= limit:
            return
        problem = Problem(
            setting="MAX_LENGTH",
            value=str(self._sizes.longest),
            rule=f"an example has {work.longest_tokens} tokens, and the model's limit is {limit} (max_position_embeddings)",
            way_out="lower MAX_LENGTH to it",
        )
        raise SettingsError([problem])


def counted(tally: Tally) -> Work:
    """Prepared data."""
    return Work(
        num_examples=tally.num_train,
        num_tokens=tally.num_train_tokens,
        longest_tokens=tally.longest_tokens,
        num_eval_tokens=sum(source.num_tokens for source in tally.sources if source.held_out)
        or round(tally.num_eval * tally.num_train_tokens / max(tally.num_train, 1)),
    )


def _memory_only(plan: Plan) -> str:
    if plan.memory is None or plan.memory_bytes is None:
        return "memory is not known"
    return (
        f"{plan.memory.peak_bytes / GIB:.1f} GiB of memory expected, {plan.memory.safe_peak_bytes / GIB:.1f} to be safe, of "
        f"{plan.memory_bytes / GIB:.1f} ({whose_memory(plan)})"
    )
