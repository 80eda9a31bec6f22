"""A model's configuration and data sets in; their sizes out, asked of a child process (`train/measure.py`) that may import torch.

Footprints are kept, since a trace takes seconds: in WORK_DIR for other runs on this machine, and in the run's store for starts on
other machines.
"""

import hashlib
import json
import threading
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

from pydantic import ValidationError

from job.data.tally import Estimate
from job.display import Display
from job.errors import BudgetError, InterruptedRunError, JobError, SettingsError
from job.keep.store import MissingError, Store, read_text, write_text
from job.plan.footprint import Footprint
from job.settings import Settings, is_hub_id, package_file
from job.supervise import ChildFailedError
from job.train.spec import FetchSpec, Measurements, MeasureSpec

StartChild = Callable[..., None]
FOOTPRINT = "footprint.json"
VERSION = 1
"""Raise it when the same model would give another footprint."""
_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")


class Sizes:
    """What is found out once and kept: footprints by kind of machine, and the data's size.

    Args:
        store: the run's own folder in OUTPUT_URI.
        model_dir: where `fetch` has put the model, once it has.
        start_child: runs a stage in a process of its own; raises ChildFailedError.

    Attributes:
        estimate: of the data, once it was asked for; else `estimate_failed` says why there is none.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        store: Store,
        work: Path,
        display: Display,
        model_dir: Callable[[], Path],
        start_child: StartChild,
    ) -> None:
        self._settings, self._store, self._work, self._display = settings, store, work, display
        self._model_dir, self._start_child = model_dir, start_child
        self._footprints: dict[bool, Footprint] = {}
        self._lock = threading.Lock()
        self._is_in_store = False
        self.estimate: Estimate | None = None
        self.estimate_failed: str | None = None

    def known(self, *, on_gpu: bool) -> Footprint | None:
        """The footprint if it was found already."""
        return self._footprints.get(on_gpu)

    @property
    def longest(self) -> int:
        """Tokens of the longest example that there may be."""
        return self._settings.data.max_length

    @property
    def bound(self) -> int:
        """The same, where the model's positions end before."""
        limits = [footprint.max_length for footprint in self._footprints.values() if footprint.max_length]
        return min([self.longest, *limits])

    def footprint(self, *, on_gpu: bool, with_data: bool = False) -> Footprint:
        """What the model takes on this kind of machine; asks for the data's size in the same breath when told to.

        Raises:
            ChildFailedError: the model's configuration cannot be had.
        """
        while not self._lock.acquire(timeout=1.0):  # the thread that `begin` started is at it
            self._display.heartbeat()
        try:
            known = self._footprints.get(on_gpu)
            wants_data = with_data and self.estimate is None and self.estimate_failed is None
            if known is None or wants_data:
                known = self._measure(known, on_gpu=on_gpu, with_data=wants_data)
                self._footprints[on_gpu] = known
            return known
        finally:
            self._lock.release()

    def begin(self, *, on_gpu: bool) -> None:
        """Look for a run's footprint beside whatever else there is to do; whoever needs it waits."""

        def look() -> None:
            with suppress(ChildFailedError, JobError, OSError):  # whoever needs it tries again, and tells
                found = self.footprint(on_gpu=on_gpu)
                if found.method == "traced" and not self._is_in_store:
                    text = json.dumps(
                        {"key": self._key(self._where(), on_gpu=on_gpu), "footprint": found.model_dump(mode="json")}
                    )
                    write_text(self._store, FOOTPRINT, text, self._work / "planner")

        threading.Thread(target=look, name="planner", daemon=True).start()

    def footprint_or_none(self, *, on_gpu: bool, with_data: bool = False) -> Footprint | None:
        """The same; None when the process that looks for it fails, which is told: a run can do without a forecast.

        Raises:
            ChildFailedError: it was stopped, or the model cannot be had at all.
        """
        try:
            return self.footprint(on_gpu=on_gpu, with_data=with_data)
        except ChildFailedError as failure:
            if isinstance(failure.error, (InterruptedRunError, SettingsError, BudgetError)):
                raise
            reason = str(failure.error)
        except OSError as error:
            reason = str(error)
        self._display.say(f"warning: no forecast of memory and time: {reason}")
        return None

    def _measure(self, known: Footprint | None, *, on_gpu: bool, with_data: bool) -> Footprint:
        where = self._where()
        key = self._key(where, on_gpu=on_gpu)
        kept = self._cache / "footprints" / f"{key}.json"
        known = known or self._kept(kept, key)
        if known is not None and not with_data:
            return known
        result = self._work / "measured.json"
        result.unlink(missing_ok=True)
        spec = MeasureSpec(
            model=self._settings.model,
            lora=self._settings.lora,
            model_dir=where,
            on_gpu=on_gpu,
            length=self.longest,
            data=self._settings.data if with_data else None,
            with_footprint=known is None,
            cache_dir=self._cache,
            result=result,
        )
        s3 = tuple(name.upper() for name in type(self._settings.secrets).model_fields if name.startswith("aws_"))
        self._start_child("measure", spec, allowed=("HF_TOKEN", *s3), environ={"TORCHDYNAMO_DISABLE": "1"})
        found = Measurements.model_validate_json(result.read_text("utf-8"))
        if with_data:
            self.estimate, self.estimate_failed = found.estimate, found.estimate_failed
        if known is not None:
            return known
        assert found.footprint is not None
        if found.footprint.method == "traced":
            kept.parent.mkdir(parents=True, exist_ok=True)
            partial = kept.with_suffix(f".{id(self)}.partial")
            partial.write_text(found.footprint.model_dump_json(), "utf-8")
            partial.replace(kept)
        return found.footprint

    def _kept(self, file: Path, key: str) -> Footprint | None:
        """What an earlier start has found, here or on another machine."""
        with suppress(OSError, ValidationError):
            return Footprint.model_validate_json(file.read_text("utf-8"))
        with suppress(JobError, MissingError, ValueError, KeyError, TypeError):
            found = json.loads(read_text(self._store, FOOTPRINT, self._work / "planner"))
            if found["key"] == key:
                footprint = Footprint.model_validate(found["footprint"])
                self._is_in_store = True
                return footprint
        return None

    @property
    def _cache(self) -> Path:
        return self._settings.keep.work_dir.expanduser().absolute()

    def _where(self) -> Path:
        """The folder or the `.gguf` file with the model's configuration and tokenizer; weights are not downloaded for it."""
        model_id = self._settings.model.model_id
        if not is_hub_id(model_id):
            return package_file(model_id) if model_id.startswith("pkg:") else Path(model_id).expanduser().absolute()
        if self._model_dir() == Path():
            spec = FetchSpec(model=self._settings.model, models_dir=self._cache / "models", tokenizer_only=True)
            self._start_child("fetch", spec, allowed=("HF_TOKEN",))
        return self._model_dir()

    def _key(self, where: Path, *, on_gpu: bool) -> str:
        config = where.read_bytes()[: 2**20] if where.is_file() else (where / "config.json").read_bytes()
        parts = [
            VERSION,
            hashlib.sha256(config).hexdigest(),
            self._settings.model.model_dump(mode="json", exclude={"model_id", "model_revision", "chat_template"}),
            self._settings.lora.model_dump(mode="json"),
            self.longest,
            on_gpu,
            [version(package) for package in _PACKAGES],
        ]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]
