"""The stages that run in child processes: fetch, prepare, train. Settings in, their results on this disk and in the store.

Each raises ChildFailedError when its process fails, and other JobErrors for the store.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

from pydantic import BaseModel

from job.data.tally import DROPPED, TALLY, describe, load_tally
from job.deliver.record import Record
from job.display import Display
from job.events import Event
from job.keep.checkpoints import DamagedError, delete_folder, get_folder, put_folder
from job.keep.ledger import Ledger
from job.keep.store import MissingError, Store, write_text
from job.plan.forecast import forecast
from job.prepared import is_same, locked
from job.settings import Settings, data_fingerprint
from job.supervise import StopRequest, child_environ, run_child
from job.train.spec import FetchSpec, PrepareSpec
from job.training import Training


class Stages:
    """One attempt's child processes, in the order fetch, prepare, train."""

    def __init__(
        self,
        settings: Settings,
        *,
        store: Store,
        work: Path,
        environ: Mapping[str, str],
        display: Display,
        stop: StopRequest,
        record: Record,
    ) -> None:
        self._settings, self._store, self._work, self._environ = settings, store, work, environ
        self._display, self._stop, self._record = display, stop, record
        self._training: Training | None = None
        self._secrets = {
            name.upper(): secret.get_secret_value()
            for name in type(settings.secrets).model_fields
            if (secret := getattr(settings.secrets, name)) is not None
        }

    def fetch(self, *, tokenizer_only: bool = False) -> None:
        """Bring the base model onto this machine."""
        self._display.stage(f"fetching {self._settings.model.model_id}")
        models = self._settings.keep.work_dir.expanduser().absolute() / "models"
        models.mkdir(parents=True, exist_ok=True)
        self._child(
            "fetch",
            FetchSpec(model=self._settings.model, models_dir=models, tokenizer_only=tokenizer_only),
            allowed=("HF_TOKEN",),
        )

    def prepare(self) -> Path:
        """Make the training data, or take it from an earlier attempt or run; returns its folder."""
        fingerprint = data_fingerprint(self._settings)
        work = self._settings.keep.work_dir.expanduser().absolute()
        folder, name = work / "data" / fingerprint, f"data/{fingerprint}"
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
            self._child("prepare", spec, allowed=("HF_TOKEN", *s3))
            with self._stop.at_once():
                delete_folder(self._store, name)
                put_folder(self._store, folder, name)
                tally_text = self._display.redact((folder / TALLY).read_text("utf-8"))
                write_text(self._store, TALLY, tally_text, self._work)
        tally = self._record.tally = load_tally(folder)
        for line in describe(tally):
            self._display.say(line)
        return folder

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

    def train(self, ledger: Ledger, data_dir: Path) -> None:
        """Train from the newest whole checkpoint to the last step."""
        tally = self._record.tally
        assert tally is not None
        plan = self._record.plan = forecast(
            self._settings.train,
            num_examples=tally.num_train,
            num_tokens=tally.num_train_tokens,
            longest_tokens=tally.longest_tokens,
        )
        self._training = Training(
            self._settings,
            store=self._store,
            work=self._work,
            environ=self._environ,
            display=self._display,
            stop=self._stop,
            record=self._record,
            ledger=ledger,
            start_child=self._child,
        )
        self._training.run(data_dir, plan)

    def _child(
        self,
        stage: str,
        spec: BaseModel,
        *,
        allowed: tuple[str, ...],
        environ: Mapping[str, str] | None = None,
        on_idle: Callable[[], None] = lambda: None,
        hang_seconds: float | None = None,
    ) -> None:
        self._stop.check()

        def idle() -> None:
            self._display.heartbeat()
            on_idle()

        run_child(
            stage,
            spec,
            folder=self._work / "specs",
            environ={**child_environ(self._environ, self._secrets, allowed), **(environ or {})},
            stop=self._stop,
            grace_seconds=self._settings.keep.grace_seconds,
            on_event=self._on_event,
            on_idle=idle,
            hang_seconds=hang_seconds,
        )

    def _on_event(self, event: Event) -> None:
        self._display.show(event)
        self._record.add(event)
        if self._training is not None:
            self._training.on_event(event)

    def confirm(self) -> None:
        """The newest checkpoint and the metrics are in the store, or NetworkError."""
        if self._training is not None:
            self._training.confirm()
        self._record.put_metrics()
