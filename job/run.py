"""The main job, stage by stage: fetch, prepare, train, keep, publish, report.

A stage whose result already lies in the store is passed over, so a start after any kind of end continues there.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

from job.deliver.finish import ADAPTER
from job.deliver.notify import Notifier
from job.deliver.record import Record
from job.display import Display
from job.ending import Ending
from job.energy import EnergyMeter
from job.errors import (
    BudgetError,
    JobError,
    MachineError,
    PreemptedError,
    Problem,
    SettingsError,
    as_job_error,
)
from job.evaluating import Evaluating, check_has_checkpoints
from job.events import Stopped
from job.following import Following
from job.keep.ledger import Ledger
from job.keep.mirror import is_whole
from job.keep.store import Store, hurried, write_text
from job.preflight import Result, check_everything, raise_first, results_table, summary
from job.prepared import has_prepared, known_tally
from job.quote import make_quote, print_quote
from job.settings import Settings
from job.stages import Stages
from job.stopping import StopRequest
from job.supervise import ChildFailedError
from job.trained import DONE, has_adapter, is_done

STOPPED: dict[type[JobError], Stopped] = {PreemptedError: Stopped.PREEMPTED, BudgetError: Stopped.BUDGET}


class Run:
    """One start of one run.

    Args:
        settings: all that was asked for.
        run_id: the run's name.
        store: the run's own folder in OUTPUT_URI.
        shared: OUTPUT_URI itself.
        work: the run's own folder on this machine.
        environ: the process's environment.
    """

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
    ) -> None:
        self._settings, self._run_id, self._store, self._work = settings, run_id, store, work
        self._display, self._stop, self._started = display, stop, datetime.now(UTC)
        self._environ, self._shared = environ, shared
        self._record = Record(settings, run_id, store, work)
        self._stages = Stages(
            settings,
            run_id=run_id,
            store=store,
            shared=shared,
            work=work,
            environ=environ,
            display=display,
            stop=stop,
            record=self._record,
        )
        url = settings.secrets.webhook_url
        self.notifier = Notifier(
            url.get_secret_value() if url else None,
            run_id=run_id,
            redact=display.redact,
            say=display.say,
        )
        self._ending = Ending(
            settings,
            run_id=run_id,
            store=store,
            work=work,
            display=display,
            stop=stop,
            record=self._record,
            stages=self._stages,
            notifier=self.notifier,
            energy=EnergyMeter(environ),
        )
        self._stages.on_saved = self._ending.on_event

    def start(self) -> int:
        """Do whatever is left of the run, or this machine's part of it; returns 0, or raises the JobError to exit with."""
        following = Following(
            self._settings,
            run_id=self._run_id,
            store=self._store,
            work=self._work,
            environ=self._environ,
            display=self._display,
            stop=self._stop,
            stages=self._stages,
        )
        return following.share(self._lead, lambda: self._record.model_dir)

    def _lead(self) -> int:
        with self._stop.at_once():
            has_ended = is_done(hurried(self._store))
        if has_ended:
            self._display.say(f"already done: {self._store.uri}; nothing to do")
            return 0
        with self._locked():
            try:
                return self._start()
            except JobError as error:
                self._ending.refuse(error)
                raise

    def publish(self) -> int:
        """Push a trained adapter, whether or not the run was done without it; trains nothing."""
        if not self._settings.publish.hub_model_id and not self._settings.publish.publish_merged:
            way_out = "set it to owner/name, or PUBLISH_MERGED=1"
            raise SettingsError([Problem(setting="HUB_MODEL_ID", value=None, rule="is required to publish", way_out=way_out)])
        if not is_whole(self._store, ADAPTER):
            way_out = "run it to the end first: `python -m job run`"
            rule = "has no trained adapter in the store"
            raise SettingsError([Problem(setting="RUN_ID", value=self._run_id, rule=rule, way_out=way_out)])
        with self._locked():
            return self._start(may_train=False)

    def check(self) -> int:
        """Ask everything that can be asked without spending, and show it; raises the first refusal."""
        with self._stop.at_once():
            store, is_trained = hurried(self._store), False
            with suppress(JobError):  # told by the check of the store
                is_trained = DONE in store.list(DONE) or is_whole(store, ADAPTER)
            results = self._check(is_trained=is_trained)
        self._display.table(results_table(results, self._display.redact))
        raise_first(results)
        return 0

    def _check(self, *, is_trained: bool, is_first: bool = True) -> list[Result]:
        has_data = False
        with suppress(JobError):
            has_data = is_trained or has_prepared(self._settings, hurried(self._store))
        return check_everything(
            self._settings,
            self._store,
            self._work,
            environ=self._environ,
            stop=self._stop,
            has_data=has_data,
            is_trained=is_trained,
            more=self._stages.plan_checks(is_first=is_first),
            on_idle=self._display.heartbeat,
        )

    def plan(self, flags: Mapping[str, str]) -> int:
        """Say what the run would need and cost, on this GPU or on any; downloads no weights and trains nothing."""
        self._work.mkdir(parents=True, exist_ok=True)
        self._display.stage("reading the model's shape and the first rows of the data")
        planner, sizes = self._stages.planner, self._stages.sizes
        try:
            tally = known_tally(self._settings, self._store, self._work)
            quote = make_quote(planner, sizes, self._settings, flags, tally, scratch=self._work, shared=self._shared)
        except ChildFailedError as failure:
            raise failure.error from None
        print_quote(quote, self._settings, as_json="json" in flags, redact=self._display.redact)
        return 0

    def evaluate(self) -> int:
        """Measure the kept checkpoints of a run that has trained, and choose among them again; trains nothing."""
        with self._locked():
            with self._stop.at_once():
                check_has_checkpoints(self._store, self._run_id)
                ledger = Ledger(self._store, self._work, price_usd_per_hour=self._usd_per_hour, started=self._started)
                self._stages.charge(ledger, is_trained=True)
                ledger.record()
            evaluating = Evaluating(
                self._settings,
                ledger,
                run_id=self._run_id,
                store=self._store,
                work=self._work,
                environ=self._environ,
                display=self._display,
                record=self._record,
                stages=self._stages,
            )
            try:
                report, is_new = evaluating.run()
            except ChildFailedError as failure:
                ledger.record(stopped=failure.stopped)
                raise failure.error from None
            except JobError as error:
                ledger.record(stopped=STOPPED.get(type(error), Stopped.CRASHED))
                raise
            with self._stop.at_once():
                ledger.record(stopped=Stopped.FINISHED)
                self._ending.put_evaluated(report.model_copy(update={"attempts": ledger.attempts}), is_new=is_new)
        return 0

    @property
    def _usd_per_hour(self) -> float | None:
        return price.usd_per_hour if (price := self._stages.planner.price) else None

    def prepare(self) -> int:
        """Make the training data, put it into the store, and stop."""
        with self._locked():
            try:
                self._stages.fetch(tokenizer_only=True)
                self._stages.prepare()
            except ChildFailedError as failure:
                raise failure.error from None
        return 0

    @contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            self._work.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise MachineError(f"WORK_DIR: cannot make {self._work} ({error.strerror}); name a folder on a local disk") from error
        try:
            with FileLock(self._work / "lock", timeout=0):
                yield
        except Timeout:
            raise MachineError(f"RUN_ID={self._run_id}: another process on this machine is at it; wait for it") from None

    def _start(self, *, may_train: bool = True) -> int:
        with self._stop.at_once():
            trained = has_adapter(self._store, self._work, self._display.say, may_train=may_train)
            ledger = Ledger(self._store, self._work, price_usd_per_hour=self._usd_per_hour, started=self._started)
            budget = self._stages.charge(ledger, is_trained=trained)
            self._display.stage("checking this machine, the store, the model and the data")
            if not trained:
                self._stages.sizes.begin(on_gpu=self._stages.planner.gpu is not None)
            results = self._check(is_trained=trained, is_first=not ledger.past)
            for line in summary(results):
                self._display.say(line)
            raise_first(results)
            self._stop.limit(None if trained else budget)
            if not ledger.past:  # a run that was deleted from the store starts over, whatever lies here
                for left_over in ("checkpoints", "adapter", "merged"):
                    shutil.rmtree(self._work / left_over, ignore_errors=True)
            ledger.record()
            text = json.dumps(self._settings.without_secrets(), indent=1, ensure_ascii=False)
            write_text(self._store, "settings.json", text, self._work)
            self._ending.begin(ledger)
        stopped, error = Stopped.FINISHED, None
        try:
            if not trained:
                self._stages.fetch()
                data_dir = self._stages.prepare()
                self._stages.train(data_dir)
                with self._stop.at_once():
                    self._stages.confirm()
        except ChildFailedError as failure:
            stopped, error = failure.stopped, failure.error
        except JobError as failure:
            stopped, error = STOPPED.get(type(failure), Stopped.CRASHED), failure
        except Exception as bug:
            error = as_job_error(bug)
            stopped = Stopped.CRASHED
            if type(error) is JobError:  # what is trained is stored before the traceback is shown
                self._ending.fail(ledger, stopped, error)
                raise
        if error is not None:
            self._ending.fail(ledger, stopped, error)
            raise error
        with self._stop.at_once():
            ledger.record(stopped=stopped)
            report = self._record.report(ledger, stopped, None)
        status = self._ending.deliver(report, ledger)
        if overrun := budget.overrun():
            self._display.say(f"warning: {overrun}")
        return status
