"""`evaluate`: the kept checkpoints of a run that has trained, measured and chosen among once more; trains nothing.

For other EVAL_PROMPTS, another scorer or another SELECT_BY than the training had. What is chosen replaces the adapter in the
store; `publish` pushes it. An unfinished run's checkpoints are measured too, and none of them becomes its adapter.
"""

from collections.abc import Mapping
from pathlib import Path

from job.assignment import CPU_ENVIRON, assign
from job.deliver.finish import ADAPTER
from job.deliver.record import REPORT, Record
from job.deliver.report import Report
from job.display import Display
from job.errors import MachineError, Problem, SettingsError
from job.events import Stopped
from job.keep.checkpoints import CHECKPOINTS, list_steps, restore_latest
from job.keep.kept import bring_kept
from job.keep.ledger import Ledger
from job.keep.mirror import is_whole
from job.keep.store import MissingError, Store, read_text
from job.plan.hardware import find_devices, one_gpu
from job.plan.retreat import Rollback
from job.settings import Settings
from job.stages import Stages
from job.trained import DONE


class Evaluating:
    """One evaluation of one run.

    Args:
        work: the run's folder on this machine.
        ledger: of an attempt of its own: its time and cost count.
    """

    def __init__(
        self,
        settings: Settings,
        ledger: Ledger,
        *,
        run_id: str,
        store: Store,
        work: Path,
        environ: Mapping[str, str],
        display: Display,
        record: Record,
        stages: Stages,
    ) -> None:
        self._settings, self._ledger, self._run_id = settings, ledger, run_id
        self._store, self._work, self._environ = store, work, environ
        self._display, self._record, self._stages = display, record, stages

    def run(self) -> tuple[Report, bool]:
        """Measure the base model and every kept checkpoint; returns the report with what was found, and what is to be done.

        The second value says whether the adapter in the store is no longer the chosen one. A run that has not trained to its end
        keeps the report that it has.

        Raises:
            ChildFailedError: as any stage.
        """
        self._stages.fetch()
        data_dir = self._stages.prepare()
        self._display.stage("fetching the kept checkpoints")
        newest = restore_latest(self._store, self._work / CHECKPOINTS, self._warn)
        if newest is None:
            raise MachineError(
                f"RUN_ID={self._run_id}: no checkpoint in the store is whole; `python -m job run` trains on from what is"
            )
        scratch = self._work / "mirror"
        bring_kept(self._store, self._work / CHECKPOINTS, scratch=scratch, only_best=False, warn=self._warn)
        self._record.rewind(int(newest.name.removeprefix("step-")))
        self._measure(data_dir, newest)
        found = self._record.report(self._ledger, Stopped.FINISHED, None)
        past = _past_report(self._store, self._work)
        is_trained = DONE in self._store.list(DONE) or is_whole(self._store, ADAPTER)
        if past is None or not is_trained:
            self._display.say("this run is not trained to its end: none of its checkpoints is delivered, and no report written")
            return found.model_copy(update={"chosen": None}), False
        report = _joined(past, found, self._ledger)
        before, after = past.chosen, report.chosen
        if after is None or (before is not None and before.step == after.step and is_whole(self._store, ADAPTER)):
            return report, False
        was = f"it was that of step {before.step}; " if before and before.step != after.step else ""
        self._display.say(f"the adapter is now that of step {after.step}, by {after.by}; {was}`publish` pushes it")
        return report.model_copy(update={"publication": None}), True

    def _measure(self, data_dir: Path, newest: Path) -> None:
        tally, settings = self._record.tally, self._settings
        assert tally is not None
        gpus = find_devices(self._environ)
        spec = assign(
            settings,
            run_id=self._run_id,
            work=self._work,
            model_dir=self._record.model_dir,
            data_dir=data_dir,
            resume_from=newest,
            num_steps=int(newest.name.removeprefix("step-")),
            fit=self._stages.planner.plan_evaluation(tally, self._ledger).fit,
            rollback=Rollback(),
            save_interval_seconds=1e9,
            expect_gpu=bool(gpus),
        )
        device = one_gpu(self._environ, len(gpus), self._display.say) if gpus else CPU_ENVIRON
        environ = {**device, "HF_HUB_OFFLINE": "1"}
        self._stages.run_child("evaluate", spec, allowed=(), environ=environ, hang_seconds=settings.keep.hang_seconds)

    def _warn(self, text: str) -> None:
        self._display.say(f"warning: {text}")


def check_has_checkpoints(store: Store, run_id: str) -> None:
    """Raise a SettingsError when the store holds no checkpoint of this run."""
    if not list_steps(store):
        way_out = "train it first: `python -m job run`"
        raise SettingsError([Problem(setting="RUN_ID", value=run_id, rule="has no checkpoint in the store", way_out=way_out)])


def _joined(past: Report, found: Report, ledger: Ledger) -> Report:
    """What was reported of the training, with what is known now of the checkpoints."""
    losses = {int(row["step"]): row for row in (*past.evaluations, *found.evaluations)}
    news = {"candidates": found.candidates, "samples": found.samples, "attempts": ledger.attempts}
    return past.model_copy(
        update={**news, "chosen": found.chosen or past.chosen, "evaluations": [row for _, row in sorted(losses.items())]}
    )


def _past_report(store: Store, work: Path) -> Report | None:
    try:
        return Report.model_validate_json(read_text(store, REPORT, work))
    except (MissingError, ValueError):
        return None
