"""The stages that run in child processes: fetch, prepare, train. Settings in, their results on this disk and in the store.

Each raises ChildFailedError when its process fails, and other JobErrors for the store.
"""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from pydantic import BaseModel

from job.data.prepare import load_tally
from job.deliver.finish import ADAPTER
from job.deliver.record import Record
from job.display import Display
from job.events import Event, Saved
from job.keep.checkpoints import DamagedError, delete_folder, get_folder, put_folder, restore_latest
from job.keep.ledger import Ledger
from job.keep.mirror import Mirror, is_whole
from job.keep.store import MissingError, Store, write_text
from job.plan.forecast import forecast
from job.plan.hardware import find_gpus, one_gpu
from job.settings import Settings, data_fingerprint
from job.supervise import StopRequest, child_environ, run_child
from job.train.spec import FetchSpec, PrepareSpec, TrainSpec

HEARTBEAT_SECONDS = 30.0
CPU_ENVIRON = {"TORCHDYNAMO_DISABLE": "1"}
"""Compiling for a CPU takes longer than it saves in a run as short as one does there."""


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
        self._mirror: Mirror | None = None
        self._secrets = {
            name.upper(): secret.get_secret_value()
            for name in type(settings.secrets).model_fields
            if (secret := getattr(settings.secrets, name)) is not None
        }

    def fetch(self) -> None:
        """Bring the base model onto this machine."""
        self._display.stage(f"fetching {self._settings.model.model_id}")
        models = self._settings.keep.work_dir.expanduser().absolute() / "models"
        models.mkdir(parents=True, exist_ok=True)
        self._child("fetch", FetchSpec(model=self._settings.model, models_dir=models), allowed=("HF_TOKEN",))

    def prepare(self) -> Path:
        """Make the training data, or take it from an earlier attempt; returns its folder."""
        fingerprint = data_fingerprint(self._settings)
        folder = self._work / "data" / fingerprint
        name = f"data/{fingerprint}"
        if not (folder / "manifest.json").is_file():
            try:
                get_folder(self._store, name, folder)
                self._display.say("prepared data found in the store")
            except (MissingError, DamagedError):
                delete_folder(self._store, name)
                self._display.stage("preparing the data")
                folder.parent.mkdir(parents=True, exist_ok=True)
                spec = PrepareSpec(
                    data=self._settings.data,
                    model_dir=self._record.model_dir,
                    chat_template=self._settings.model.chat_template,
                    trust_remote_code=self._settings.model.trust_remote_code,
                    folder=folder,
                    cache_dir=self._work,
                    seed=self._settings.train.seed,
                )
                s3 = tuple(name for name in self._secrets if name.startswith("AWS_"))
                self._child("prepare", spec, allowed=("HF_TOKEN", *s3))
        if not is_whole(self._store, name):
            put_folder(self._store, folder, name)
            write_text(self._store, "tally.json", (folder / "tally.json").read_text("utf-8"), self._work)
        tally = self._record.tally = load_tally(folder)
        rows, kept = sum(s.num_rows for s in tally.sources), sum(s.num_kept for s in tally.sources)
        self._display.say(f"data: {kept} of {rows} rows kept, {tally.num_train_tokens:,} tokens to train on")
        return folder

    def train(self, ledger: Ledger, data_dir: Path) -> None:
        """Train from the newest whole checkpoint to the last step."""
        tally = self._record.tally
        assert tally is not None
        checkpoints = self._work / "checkpoints"
        gpus = find_gpus(self._environ)
        if not gpus:
            self._display.say("warning: no GPU found; training on the CPU is slow")
        plan = self._record.plan = forecast(
            self._settings.train,
            num_examples=tally.num_train,
            num_tokens=tally.num_train_tokens,
            longest_tokens=tally.longest_tokens,
        )
        resume_from = restore_latest(self._store, checkpoints, lambda text: self._display.say(f"warning: {text}"))
        first_step = int(resume_from.name.removeprefix("step-")) if resume_from else 0
        ledger.record(first_step=first_step, last_step=first_step)
        self._record.load_metrics(first_step)
        self._display.say(
            f"plan: {plan.num_steps} steps of {plan.micro_batch} x {plan.gradient_accumulation_steps} examples, "
            f"{plan.num_tokens:,} tokens" + (f"; continuing after step {first_step}" if first_step else "")
        )
        keep = self._settings.keep
        self._mirror = Mirror(
            self._store,
            checkpoints,
            keep=keep.save_total_limit,
            warn=self._display.say,
            before=self._record.put_metrics,
        )
        shutil.rmtree(self._work / ADAPTER, ignore_errors=True)
        spec = TrainSpec(
            model=self._settings.model,
            lora=self._settings.lora,
            train=self._settings.train,
            system_prompt=self._settings.data.system_prompt,
            model_dir=self._record.model_dir,
            data_dir=data_dir,
            checkpoints_dir=checkpoints,
            adapter_dir=self._work / ADAPTER,
            scratch_dir=self._work / "trainer",
            resume_from=resume_from,
            micro_batch=plan.micro_batch,
            gradient_accumulation_steps=plan.gradient_accumulation_steps,
            num_steps=plan.num_steps,
            save_interval_seconds=keep.save_interval,
            save_steps=keep.save_steps,
            expect_gpu=bool(gpus),
        )
        tracker = ("WANDB_API_KEY",) if "wandb" in str(self._settings.train.train_args.get("report_to")) else ()
        device = one_gpu(self._environ, len(gpus), self._display.say) if gpus else CPU_ENVIRON

        def on_idle() -> None:
            ledger.beat(HEARTBEAT_SECONDS, self._record.last_step or first_step)

        self._child("train", spec, allowed=tracker, environ={**device, "HF_HUB_OFFLINE": "1"}, on_idle=on_idle)
        ledger.record(last_step=plan.num_steps)

    def _child(
        self,
        stage: str,
        spec: BaseModel,
        *,
        allowed: tuple[str, ...],
        environ: Mapping[str, str] | None = None,
        on_idle: Callable[[], None] = lambda: None,
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
        )

    def _on_event(self, event: Event) -> None:
        self._display.show(event)
        self._record.add(event)
        if isinstance(event, Saved) and self._mirror is not None:
            self._mirror.offer(event.step)

    def confirm(self) -> None:
        """The newest checkpoint and the metrics are in the store, or NetworkError."""
        if self._mirror is not None:
            self._mirror.finish(self._settings.keep.grace_seconds if self._stop.count else None)
        self._record.put_metrics()
