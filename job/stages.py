"""The stages that run in child processes: fetch, prepare, train. Settings in, their results on this disk and in the store.

Each raises ChildFailedError when its process fails, and other JobErrors for the store.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from job.data.tally import DROPPED, TALLY, Tally, describe, load_tally
from job.deliver.record import Record
from job.display import Display
from job.errors import JobError
from job.events import Event, Fetched
from job.foresight import Foresight
from job.keep.budget import Budget
from job.keep.checkpoints import DamagedError, delete_folder, get_folder, put_folder
from job.keep.ledger import Ledger
from job.keep.store import MissingError, Store, write_text
from job.plan.forecast import Plan
from job.plan.memory import optimizer_name
from job.plan.show import plan_line
from job.planning import Planner
from job.prepared import is_same, locked, prepared_folder, prepared_name
from job.settings import Settings
from job.sizing import Sizes
from job.speeds import remember_speed
from job.stopping import StopRequest
from job.supervise import child_environ, run_child
from job.train.spec import FetchSpec, PrepareSpec
from job.training import Training

HEARTBEAT_SECONDS = 10.0
"""What a killed attempt may have cost beyond its record. On S3 a beat is one request: four cents a day."""


class Stages:
    """One attempt's child processes, in the order fetch, prepare, train."""

    def __init__(
        self,
        settings: Settings,
        *,
        run_id: str,
        store: Store,
        shared: Store,
        work: Path,
        environ: Mapping[str, str],
        display: Display,
        stop: StopRequest,
        record: Record,
    ) -> None:
        self._settings, self._store, self._work, self._environ = settings, store, work, environ
        self._run_id, self._shared = run_id, shared
        self._display, self._stop, self._record = display, stop, record
        self._training: Training | None = None
        self._ledger: Ledger | None = None
        self._budget: Budget | None = None
        self._secrets = {
            name.upper(): secret.get_secret_value()
            for name in type(settings.secrets).model_fields
            if (secret := getattr(settings.secrets, name)) is not None
        }
        self.sizes = Sizes(
            settings, store=store, work=work, display=display, model_dir=lambda: record.model_dir, start_child=self._quiet_child
        )
        self.planner = Planner(settings, shared=shared, work=work, environ=environ, display=display, sizes=self.sizes)
        self._foresight: Foresight | None = None
        self.on_saved: Callable[[Event, Ledger], None] = lambda event, ledger: None

    def charge(self, ledger: Ledger, *, is_trained: bool) -> Budget:
        """From now on the time goes into this ledger; returns the budget that may end it.

        Raises:
            BudgetError, SettingsError: training may not start with it.
        """
        self._ledger, self._budget = ledger, (budget := Budget(self._settings.budget, ledger))
        usd_per_hour = ledger.current.price_usd_per_hour
        self._display.count_from(budget.spent_before_usd, budget.limit_usd, usd_per_hour=usd_per_hour)
        if not is_trained:
            if warning := budget.warning():
                self._display.say(f"warning: {warning}")
            budget.check_start()
        return budget

    def fetch(self, *, tokenizer_only: bool = False) -> None:
        """Bring the base model onto this machine."""
        self._display.stage(f"fetching {self._settings.model.model_id}")
        models = self._settings.keep.work_dir.expanduser().absolute() / "models"
        models.mkdir(parents=True, exist_ok=True)
        self.run_child(
            "fetch",
            FetchSpec(model=self._settings.model, models_dir=models, tokenizer_only=tokenizer_only),
            allowed=("HF_TOKEN",),
        )

    def prepare(self) -> Path:
        """Make the training data, or take it from an earlier attempt or run; returns its folder."""
        work = self._settings.keep.work_dir.expanduser().absolute()
        folder, name = prepared_folder(self._settings), prepared_name(self._settings)
        with self._stop.at_once():
            is_there = self._restore_prepared(folder, name)
        if not is_there:
            self._display.stage("preparing the data")
            spec = PrepareSpec(
                data=self._settings.data,
                model_dir=self._record.model_dir,
                chat_template=self._settings.model.chat_template,
                trust_remote_code=self._settings.model.trust_remote_code,
                folder=folder,
                cache_dir=work,
                seed=self._settings.train.seed,
            )
            s3 = tuple(name for name in self._secrets if name.startswith("AWS_"))
            self.run_child("prepare", spec, allowed=("HF_TOKEN", *s3))
            with self._stop.at_once():
                delete_folder(self._store, name)
                put_folder(self._store, folder, name)
                write_text(self._store, TALLY, (folder / TALLY).read_text("utf-8"), self._work)
        tally = self._record.tally = load_tally(folder)
        for line in describe(tally):
            self._display.say(line)
        return folder

    def restore_prepared(self) -> Path | None:
        """The folder of the data that another machine of this run has prepared; None when they are not in the store."""
        folder = prepared_folder(self._settings)
        return folder if self._restore_prepared(folder, prepared_name(self._settings)) else None

    def _restore_prepared(self, folder: Path, name: str) -> bool:
        """Whether the data that this run has prepared before lies in `folder` now."""
        if self._settings.data.keep_dropped and f"{name}/{DROPPED}" not in self._store.list(f"{name}/{DROPPED}"):
            return False
        with locked(folder, self._display.heartbeat):
            try:
                if is_same(self._store, name, folder):
                    return True
                get_folder(self._store, name, folder)
            except (MissingError, DamagedError):
                return False
        self._display.say("prepared data found in the store")
        return True

    def train(self, data_dir: Path) -> None:
        """Train from the newest whole checkpoint to the last step."""
        tally = self._record.tally
        assert tally is not None and self._ledger is not None and self._budget is not None
        with self._stop.at_once():
            plan = self._plan(tally, self._ledger)
        foresight = self._foresight = self._follow(plan, tally)
        self._training = Training(
            self._settings,
            run_id=self._run_id,
            store=self._store,
            work=self._work,
            environ=self._environ,
            display=self._display,
            stop=self._stop,
            record=self._record,
            ledger=self._ledger,
            budget=self._budget,
            foresight=foresight,
            start_child=self.run_child,
            nodes=self.planner.nodes,
        )
        self._training.run(data_dir, plan)
        self._remember_speed(foresight)

    def _plan(self, tally: Tally, ledger: Ledger) -> Plan:
        """The forecast with counted data; without memory and time when the model could not even be looked at."""
        plan = self._record.plan = self.planner.plan_run(tally, ledger)
        self._display.say(plan_line(plan))
        for line in plan.assumptions:
            self._display.say(f"  {line}")
        return plan

    def plan_checks(self, *, is_first: bool) -> dict[str, Callable[[], str]]:
        """For the checks before a run: whether it fits into this machine's memory, and into the budget."""
        return {"plan": lambda: self.planner.check(is_first=is_first)}

    def _follow(self, plan: Plan, tally: Tally) -> Foresight:
        assert self._ledger is not None
        on_gpu = plan.gpu is not None
        return Foresight(
            plan,
            self.sizes.footprint_or_none(on_gpu=on_gpu),
            longest_tokens=tally.longest_tokens,
            optimizer=optimizer_name(self._settings.train, on_gpu=on_gpu),
            eval_steps=self._settings.train.eval_steps,
            has_eval=tally.num_eval > 0,
            ledger=self._ledger,
            display=self._display,
        )

    def _remember_speed(self, foresight: Foresight) -> None:
        speed, plan = foresight.tokens_per_second, foresight.plan
        if speed is None:
            return
        try:
            remember_speed(
                self._shared,
                self._work,
                self._settings,
                gpu=plan.gpu or "cpu",
                run_id=self._run_id,
                tokens_per_second=speed,
                num_steps=foresight.num_measured,
                num_devices=plan.num_devices,
                num_nodes=plan.num_nodes,
            )
        except JobError as error:  # later forecasts do without
            self._display.say(f"warning: {error}")

    def run_child(
        self,
        stage: str,
        spec: BaseModel,
        *,
        allowed: tuple[str, ...],
        environ: Mapping[str, str] | None = None,
        hang_seconds: float | None = None,
        ranks: Sequence[Mapping[str, str]] = ({},),
        is_pointless: Callable[[], bool] = lambda: False,
    ) -> None:
        """Run a stage in a process of its own, with its events shown and recorded. Raises ChildFailedError.

        Args:
            ranks: what each of several processes has in its environment beside the others'.
            is_pointless: asked about once a second; then the processes are killed.
        """
        self._stop.check()

        def idle() -> None:
            self._display.heartbeat()
            if self._ledger is not None:
                self._ledger.beat(HEARTBEAT_SECONDS, self._record.last_step)

        more: dict[str, Any] = {"hang_seconds": hang_seconds, "ranks": ranks, "is_pointless": is_pointless}
        folder = self._work / "specs"
        self._run_child(stage, spec, allowed, environ, folder=folder, on_event=self._on_event, on_idle=idle, **more)

    def _quiet_child(
        self, stage: str, spec: BaseModel, *, allowed: tuple[str, ...], environ: Mapping[str, str] | None = None
    ) -> None:
        """One that the planner starts, perhaps in a thread beside the run's own."""

        def note(event: Event) -> None:
            if isinstance(event, Fetched):
                self._record.add(event)

        def idle() -> None:
            if threading.current_thread() is threading.main_thread():
                self._display.heartbeat()

        self._run_child(stage, spec, allowed, environ, folder=self._work / "specs" / "planner", on_event=note, on_idle=idle)

    def _run_child(
        self, stage: str, spec: BaseModel, allowed: tuple[str, ...], environ: Mapping[str, str] | None, **options: Any
    ) -> None:
        run_child(
            stage,
            spec,
            environ={**child_environ(self._environ, self._secrets, allowed), **(environ or {})},
            stop=self._stop,
            grace_seconds=self._settings.keep.grace_seconds,
            redact=self._display.redact,
            on_output=self._display.say,
            **options,
        )

    def _on_event(self, event: Event) -> None:
        self._display.show(event)
        self._record.add(event)
        if self._budget is not None:
            self._budget.add(event)
        if self._foresight is not None:
            self._foresight.on_event(event)
            self._record.follow(self._foresight.plan, self._foresight.reforecast, self._foresight.memory_factor)
        if self._training is not None:
            self._training.on_event(event)
        if self._ledger is not None:
            self.on_saved(event, self._ledger)

    def confirm(self) -> None:
        """The newest checkpoint and the metrics are in the store, or NetworkError."""
        if self._training is not None:
            self._training.confirm()
        self._record.put_metrics()
