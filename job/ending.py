"""The last acts of an attempt: what is trained is stored and published, the report written, and whoever waits is told.

However it ends, the same order holds: checkpoints and adapter first, then the record of it, then what is nice to have.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from job.deliver.finish import ADAPTER, deliver, store_adapter
from job.deliver.notify import Notifier, Standing
from job.deliver.page.write import write_page
from job.deliver.record import REPORT, Record
from job.deliver.report import ENERGY, Report, candidate_lines, summarise
from job.deliver.unfinished import deliver_unfinished
from job.display import Display
from job.energy import EnergyMeter
from job.errors import JobError, PreemptedError, PublishError, as_job_error
from job.events import Event, Saved, Stopped
from job.keep.ledger import Ledger, cost_usd
from job.keep.store import Store, write_text
from job.merging import Merging
from job.settings import Settings
from job.stages import Stages
from job.stopping import StopRequest
from job.trained import DONE

PAGE = "report.html"


class Ending:
    """Of one attempt."""

    def __init__(
        self,
        settings: Settings,
        *,
        run_id: str,
        store: Store,
        work: Path,
        display: Display,
        stop: StopRequest,
        record: Record,
        stages: Stages,
        notifier: Notifier,
        energy: EnergyMeter,
    ) -> None:
        self._settings, self._run_id, self._store, self._work = settings, run_id, store, work
        self._display, self._stop, self._record, self._stages = display, stop, record, stages
        self._notifier, self._energy = notifier, energy
        self._has_told = False
        self._merging = Merging(
            settings,
            store=store,
            work=work,
            display=display,
            stop=stop,
            stages=stages,
            model_dir=lambda: record.model_dir,
        )

    def begin(self, ledger: Ledger) -> None:
        """Tell that the attempt begins, and measure what it draws."""
        self._energy.start()
        step = max((attempt.last_step or 0 for attempt in ledger.past), default=0)
        self._notifier.started(Standing(step=step or None), store=self._store.uri)

    def on_event(self, event: Event, ledger: Ledger) -> None:
        """Note what was drawn until now, and tell of a checkpoint."""
        if (kwh := self._energy.kwh) is not None:
            ledger.remember(ENERGY, round(kwh, 6))
        if isinstance(event, Saved):
            self._notifier.checkpoint(self._standing(ledger))

    def fail(self, ledger: Ledger, stopped: Stopped, error: JobError) -> None:
        """Store what is known, as far as the store answers in time: the error that came first decides the exit status."""
        report: list[Report] = []

        def put() -> None:
            report.append(self._record.report(ledger, stopped, error))
            self._put_report(report[0])

        last_acts: list[Callable[[], None]] = [self._stages.confirm, lambda: ledger.record(stopped=stopped), put]
        if stopped is Stopped.BUDGET and self._settings.budget.publish_on_budget:
            last_acts.append(lambda: self._deliver_unfinished(report, ledger, error))
        last_acts.append(lambda: self._put_page(report[-1]) if report else None)
        with self._warned(), self._stop.within_grace(self._settings.keep.grace_seconds):
            for act in last_acts:
                if self._stop.is_over:
                    break
                with self._warned():
                    act()
        self._tell_end(ledger, report[-1] if report else None, stopped, error)

    def refuse(self, error: JobError) -> None:
        """Tell that the attempt ended before it began, unless its end was told."""
        if not self._has_told:
            self._has_told = True
            self._notifier.stopped(
                Standing(), status=error.exit_status, stopped="refused", reason=str(error), store=self._store.uri
            )

    def deliver(self, report: Report, ledger: Ledger) -> int:
        """Store and publish the adapter; returns 0.

        Raises:
            PublishError: it is safe in the store, but not where it was to go.
        """
        if target := self._settings.publish.hub_model_id:
            self._display.stage(f"publishing to {target}")
        latest = [report]

        def put(changed: Report) -> None:
            latest.append(changed)
            self._put_report(changed)

        try:
            with self._stop.at_once():
                report = deliver(
                    report,
                    self._settings,
                    store=self._store,
                    adapter=self._work / ADAPTER,
                    model_dir=self._record.model_dir,
                    display=self._display,
                    put_report=put,
                )
            if self._settings.publish.publish_merged:
                report = self._merging.deliver(report)
                put(report)
            with self._stop.at_once():
                self._put_page(report)
                self._mark_done()
        except PublishError as error:
            told = {"exit_status": error.exit_status, "reason": str(error), "attempts": ledger.attempts}
            with self._warned():
                put(latest[-1].model_copy(update=told))
            self._put_page(latest[-1])
            self._tell_end(ledger, latest[-1], Stopped.FINISHED, error)
            raise
        except Exception as failure:
            wrong = as_job_error(failure)
            stopped = Stopped.PREEMPTED if isinstance(wrong, PreemptedError) else Stopped.CRASHED
            with self._warned(), self._stop.within_grace(self._settings.keep.grace_seconds):
                with self._warned():
                    ledger.record(stopped=stopped)
                told = {"stopped": stopped, "exit_status": wrong.exit_status, "reason": str(wrong), "attempts": ledger.attempts}
                self._put_report(report.model_copy(update=told))
            self._tell_end(ledger, report, stopped, wrong)
            if type(wrong) is JobError:  # a bug: with its traceback
                raise
            raise wrong from failure
        where = self._store.uri
        self._display.say(summarise(report, adapter=f"{where}/{ADAPTER}", report_file=f"{where}/{PAGE}"))
        self._tell_end(ledger, report, Stopped.FINISHED, None)
        return 0

    def put_evaluated(self, report: Report, *, is_new: bool) -> None:
        """After an evaluation that trained nothing.

        Args:
            is_new: another adapter than before was chosen. While it is put, the run counts as unfinished, so that whatever
                happens meanwhile the next start delivers one.
        """
        if is_new:
            self._store.delete(DONE)
        if report.chosen is not None:
            self._put_report(report)
            if is_new:
                model_dir, redact = self._record.model_dir, self._display.redact
                adapter = self._work / ADAPTER
                store_adapter(report, self._settings, store=self._store, adapter=adapter, model_dir=model_dir, redact=redact)
            self._put_page(report)
        if is_new:
            self._mark_done()
        for line in candidate_lines(report):
            self._display.say(line)

    def _mark_done(self) -> None:
        write_text(self._store, DONE, json.dumps({"run_id": self._run_id}, indent=1), self._work)

    def _deliver_unfinished(self, reports: list[Report], ledger: Ledger, error: JobError) -> None:
        """Deliver what the budget paid for; a failure is told, for the checkpoint is safe."""
        self._display.stage("delivering what is trained")
        report, redact = self._record.report(ledger, Stopped.BUDGET, error), self._display.redact
        try:
            report = deliver_unfinished(
                report,
                self._settings,
                store=self._store,
                work=self._work,
                model_dir=self._record.model_dir,
                redact=redact,
            )
        except Exception as failure:  # whatever it is, the budget's exit status stands
            self._display.say(f"warning: PUBLISH_ON_BUDGET=1: {failure}")
            return
        ledger.record()
        reports.append(report.model_copy(update={"attempts": ledger.attempts}))
        self._put_report(reports[-1])

    @contextmanager
    def _warned(self) -> Iterator[None]:
        """Tell an error inside, beside the failure that came first."""
        try:
            yield
        except JobError as error:
            self._display.say(f"warning: {error}")

    def _put_report(self, report: Report) -> None:
        text = json.dumps(report.model_dump(mode="json"), indent=1, ensure_ascii=False)
        write_text(self._store, REPORT, text, self._work)

    def _put_page(self, report: Report) -> None:
        """The report for people; one that cannot be drawn costs nothing else."""
        try:
            told = Report.model_validate_json(self._store.redact(report.model_dump_json()))  # as report.json holds it
            write_text(self._store, PAGE, write_page(told), self._work)
        except JobError as error:
            self._display.say(f"warning: {PAGE} is not in the store: {error}")
        except Exception as bug:
            self._display.say(f"warning: {PAGE} cannot be made: {type(bug).__name__}: {bug}")

    def _tell_end(self, ledger: Ledger, report: Report | None, stopped: Stopped, error: JobError | None) -> None:
        self._has_told = True
        if self._stop.is_asked():
            left = self._stop.seconds_left(self._settings.keep.grace_seconds)
            self._notifier.total_seconds = min(self._notifier.total_seconds, max(left, 1.0))
        publication = report.publication if report else None
        self._notifier.stopped(
            self._standing(ledger),
            status=error.exit_status if error else 0,
            stopped=stopped.value,
            reason=str(error) if error else None,
            hub=publication.url if publication else None,
            store=self._store.uri,
            report=f"{self._store.uri}/{PAGE}",
        )

    def _standing(self, ledger: Ledger) -> Standing:
        last, plan, attempts = self._record.last_row, self._record.plan, ledger.counted()
        cost = cost_usd(attempts)
        return Standing(
            step=self._record.last_step,
            num_steps=plan.num_steps if plan else None,
            loss=last.get("loss"),
            eval_loss=self._record.last_eval_loss,
            seconds=sum(attempt.seconds for attempt in attempts),
            cost_usd="unknown" if cost is None else round(cost, 4),
        )
