"""One run's rows in, its curve at a tracker out: wandb, trackio, tensorboard and mlflow behind one small Protocol.

Names of metrics are those that transformers' own integrations give, and each library reads its own environment variables. What
is not handled: models, checkpoints and code as artifacts of a tracker, gradients and weights of single layers.
"""

import io
import json
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

STEP = "global_step"
NOTHING = -1
"""The last step of a curve that has none."""
TAG = "qlora-job.run"
"""By which mlflow finds the run again: its ids are the server's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tracked:
    """What a tracker is told of a run.

    Attributes:
        id: the same for all attempts of the run, and no other run's.
        name: what people see.
        folder: for what is not sent, or not yet.
        config: JSON-ready, and without a path of this machine.
        first_step: the last step before this attempt.
    """

    id: str
    name: str
    project: str
    folder: Path
    config: Mapping[str, Any]
    first_step: int


class Sink(Protocol):
    """Where one tracker's rows go. Every method may raise what its library raises, and take as long as it does."""

    def open(self, run: Tracked) -> int:
        """Begin the curve or continue it; returns the last step that it has and keeps, or NOTHING."""

    def log(self, row: Mapping[str, float], step: int) -> None:
        """Add one point to each curve that the row names."""

    def close(self, *, is_finished: bool) -> None:
        """Send what is left, and say whether the run has ended or will go on."""


class TensorBoard:
    """One file for each attempt in the same folder; what an earlier one has beyond the checkpoint is purged."""

    def open(self, run: Tracked) -> int:
        writer = import_module("torch.utils.tensorboard").SummaryWriter
        purge_step = run.first_step + 1 if run.first_step else 0
        self._writer = writer(str(run.folder / "tensorboard" / run.name), purge_step=purge_step)
        if run.first_step == 0:
            self._writer.add_text("config", f"```json\n{json.dumps(run.config, indent=1)}\n```")
        return NOTHING

    def log(self, row: Mapping[str, float], step: int) -> None:
        for name, value in _sorted_by_kind(row).items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()  # what is in memory goes with a killed process

    def close(self, *, is_finished: bool) -> None:
        self._writer.close()


class WandB:
    """A run with a fixed id: online it is continued at the server, offline each attempt leaves a folder for `wandb sync`."""

    def open(self, run: Tracked) -> int:
        wandb = import_module("wandb")
        # Not the host's name, its paths, packages and code, nor what is printed. x_: "may change in future versions".
        quiet = {"console": "off", "silent": True, "host": "", "save_code": False, "disable_code": True, "disable_git": True}
        unseen = {"x_disable_meta": True, "x_disable_machine_info": True, "x_save_requirements": False}
        (run.folder / "wandb").mkdir(parents=True, exist_ok=True)  # a folder that is missing becomes a temporary one
        self._run = wandb.init(
            id=run.id,
            name=run.name,
            resume="allow",
            dir=str(run.folder),
            config=dict(run.config),
            allow_val_change=True,  # after an out-of-memory retreat the micro-batch is another one
            settings=wandb.Settings(**quiet, **unseen),
        )
        self._run.define_metric(f"train/{STEP}")
        self._run.define_metric("*", step_metric=f"train/{STEP}", step_sync=True)
        return int(self._run.summary.get(f"train/{STEP}", NOTHING)) if self._run.resumed else NOTHING

    def log(self, row: Mapping[str, float], step: int) -> None:
        self._run.log({**_sorted_by_kind(row), f"train/{STEP}": step})

    def close(self, *, is_finished: bool) -> None:
        self._run.finish(exit_code=0 if is_finished else 1)


class Trackio:
    """A run with a fixed name, in a database in the folder or on a server of one's own."""

    def open(self, run: Tracked) -> int:
        self._trackio = trackio = import_module("trackio")
        with redirect_stdout(io.StringIO()):  # it prints a page; nothing else prints at that time
            self._run = trackio.init(
                project=run.project,
                name=run.id,
                resume="allow",
                config=dict(run.config),
                auto_log_cpu=False,
                embed=False,
            )
        return int(self._run._next_step) - 1  # what it has found in the database, or asked the server for

    def log(self, row: Mapping[str, float], step: int) -> None:
        self._run.log({**_sorted_by_kind(row), f"train/{STEP}": step}, step=step)

    def close(self, *, is_finished: bool) -> None:
        with redirect_stdout(io.StringIO()):
            self._trackio.finish()


class MLflow:
    """A run at a tracking server, found again by its tag."""

    def open(self, run: Tracked) -> int:
        self._mlflow = mlflow = import_module("mlflow")
        found = mlflow.search_runs(filter_string=f"tags.`{TAG}` = '{run.id}'", max_results=1, output_format="list")
        if found:
            mlflow.start_run(run_id=found[0].info.run_id)
            return int(found[0].data.metrics.get(STEP, NOTHING))
        # It would tell the program's path and the machine's user.
        told = {"mlflow.source.name": "qlora-job", "mlflow.source.type": "JOB", "mlflow.user": "qlora-job"}
        mlflow.start_run(run_name=run.name, tags={TAG: run.id, **told})
        longest = mlflow.utils.validation.MAX_PARAM_VAL_LENGTH
        mlflow.log_params({name: value for name, value in run.config.items() if len(str(value)) <= longest})
        return NOTHING

    def log(self, row: Mapping[str, float], step: int) -> None:
        self._mlflow.log_metrics({**row, STEP: step}, step=step)

    def close(self, *, is_finished: bool) -> None:
        self._mlflow.end_run("FINISHED" if is_finished else "KILLED")


SINKS: Mapping[str, type[Sink]] = {"tensorboard": TensorBoard, "wandb": WandB, "trackio": Trackio, "mlflow": MLflow}


def _sorted_by_kind(row: Mapping[str, float]) -> dict[str, float]:
    """`eval_loss` is `eval/loss`, and `loss` is `train/loss`."""
    return {
        f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}": value
        for name, value in row.items()
    }
