"""A published adapter in; the base model with the adapter merged in, on the Hub or in the store, out.

The adapter is safe before this begins, so whatever goes wrong here is an unfinished publication (status 6), never a lost run.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path, PurePath

from job.deliver.card.write import CARD, licence_of, write_merged_card
from job.deliver.finish import ADAPTER, commit_message, hub_token
from job.deliver.hub.publish import publish_folder
from job.deliver.report import Publication, Report
from job.display import Display
from job.errors import JobError, PreemptedError, PublishError
from job.keep.checkpoints import MANIFEST, DamagedError, check, put_folder, read_manifest, seal
from job.keep.store import MissingError, Store, read_text
from job.settings import Settings, is_hub_id
from job.stages import Stages
from job.stopping import StopRequest
from job.supervise import ChildFailedError
from job.train.spec import MergeSpec

MERGED, OF = "merged", "adapter.sha256"
"""The folder; and its file that says which adapter is in it, whatever reports say."""
FINISH = "the adapter is safe; `python -m job publish` with the same settings, on a larger machine if need be, finishes the job"


class Merging:
    """Of one run's adapter.

    Args:
        work: the run's folder on this machine; holds the adapter.
        model_dir: asked for once the base model has been fetched.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        store: Store,
        work: Path,
        display: Display,
        stop: StopRequest,
        stages: Stages,
        model_dir: Callable[[], Path],
    ) -> None:
        self._settings, self._store, self._work = settings, store, work
        self._display, self._stop, self._stages, self._model_dir = display, stop, stages, model_dir
        self._target = work / MERGED

    def deliver(self, report: Report) -> Report:
        """Merge and publish, unless that was done before; returns the report with where it is.

        Raises:
            PublishError: it is not where it was to go.
            PreemptedError: a signal came; nothing is lost.
        """
        step = report.chosen.step if report.chosen else report.actual.num_steps
        try:
            return self._deliver(report, step)
        except ChildFailedError as failure:
            if isinstance(failure.error, PreemptedError):
                raise failure.error from None
            raise PublishError(f"PUBLISH_MERGED=1: {failure.error}; {FINISH}") from failure
        except (PreemptedError, PublishError):
            raise
        except (JobError, OSError) as error:
            raise PublishError(f"PUBLISH_MERGED=1: {error}; {FINISH}") from error

    def _deliver(self, report: Report, step: int) -> Report:
        target = self._settings.publish.merged_target
        adapter = self._adapter_digest()
        if target is None and self._is_stored(adapter):
            return report
        if not self._is_here(adapter):
            self._merge(report, step, adapter)
        with self._stop.at_once():
            if target is None:
                self._display.stage("storing the merged model")
                put_folder(self._store, self._target, MERGED)
                return report
            self._display.stage(f"publishing the merged model to {target}")
            found = publish_folder(
                self._target,
                target,
                self._settings.publish,
                hub_token(self._settings),
                message=commit_message(report, what="merged"),
                way_out=FINISH,
                setting="HUB_MERGED_MODEL_ID",
                what="the merged model",
                ignore=(OF,),
                tell=self._display.say,
                idle=self._display.heartbeat,
            )
        known = report.publication or Publication(repo_id=target, revision=found.revision, commit=found.commit, url=found.url)
        publication = known.model_copy(update={"merged_repo_id": target, "merged_commit": found.commit})
        return report.model_copy(update={"publication": publication})

    def _adapter_digest(self) -> str:
        with (self._work / ADAPTER / "adapter_model.safetensors").open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def _is_stored(self, adapter: str) -> bool:
        try:
            is_whole = bool(read_manifest(self._store, MERGED, self._work).files)
            return is_whole and read_text(self._store, f"{MERGED}/{OF}", self._work) == adapter
        except (MissingError, DamagedError, ValueError):
            return False

    def _is_here(self, adapter: str) -> bool:
        try:
            check(self._target)
            return (self._target / OF).read_text("utf-8") == adapter
        except (DamagedError, OSError, ValueError):
            return False

    def _merge(self, report: Report, step: int, adapter: str) -> None:
        if self._model_dir() == Path():  # an earlier attempt trained it
            self._stages.fetch()
        self._display.stage("merging the adapter into the base model")
        model, model_dir = self._settings.model, self._model_dir()
        spec = MergeSpec(
            model=model,
            model_dir=model_dir,
            adapter_dir=self._work / ADAPTER,
            target=self._target,
            public_name=model.model_id if is_hub_id(model.model_id) else PurePath(model.model_id).name,
        )
        (self._target / MANIFEST).unlink(missing_ok=True)
        self._stages.run_child("merge", spec, allowed=(), environ={"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"})
        licence = licence_of(self._settings, report, model_dir)
        card = write_merged_card(report, self._settings, licence=licence, redact=self._display.redact)
        (self._target / CARD).write_text(card, "utf-8")
        (self._target / OF).write_text(adapter, "utf-8")
        seal(self._target, step)
