"""REPORT_TO in; that each tracker is installed and can be reached as it is set up, out. No server is asked."""

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from urllib.parse import urlsplit

from job.errors import Problem, SettingsError
from job.preflight.outcome import WARNING
from job.settings import TrainSettings
from job.train.trackers import KNOWN

_UNSUPPORTED = ("WANDB_WATCH", "WANDB_LOG_MODEL", "HF_MLFLOW_LOG_ARTIFACTS")
_OFFLINE = ("offline", "disabled", "dryrun")


def check_trackers(train: TrainSettings, environ: Mapping[str, str], *, has_wandb_key: bool) -> str:
    """Look for what would leave a tracker without its curve.

    Args:
        environ: the process's environment, with what its env file holds for libraries.
        has_wandb_key: WANDB_API_KEY is set, or its file.

    Raises:
        SettingsError: names everything that is missing or does not go together.
    """
    checks: dict[str, Callable[[], list[Problem]]] = {
        "tensorboard": lambda: [],
        "wandb": lambda: _check_wandb(environ, has_key=has_wandb_key),
        "trackio": lambda: _check_trackio(train, environ),
        "mlflow": lambda: _check_mlflow(environ),
    }
    problems = [problem for name in train.report_to for problem in (*_check_installed(name), *checks[name]())]
    if problems:
        raise SettingsError(list(problems))
    found = ", ".join(train.report_to) or "none asked for"
    ignored = [name for name in _UNSUPPORTED if environ.get(name, "").lower() not in ("", "0", "false")]
    if train.report_to and ignored:
        return f"{WARNING}{', '.join(ignored)}: trackers get curves only; the adapter goes to OUTPUT_URI and HUB_MODEL_ID"
    return found


def _check_installed(name: str) -> list[Problem]:
    tracker = KNOWN[name]
    if find_spec(tracker.module) is not None:
        return []
    rule = f"the package {tracker.package} is not installed"
    way_out = (
        f"`pip install -c requirements-trackers.txt {tracker.package}`, or build the image with "
        f'`--build-arg TRACKERS="{tracker.package}"`'
    )
    return [Problem(setting="REPORT_TO", value=name, rule=rule, way_out=way_out)]


def _check_wandb(environ: Mapping[str, str], *, has_key: bool) -> list[Problem]:
    mode = environ.get("WANDB_MODE", "online").lower()
    if mode in _OFFLINE or has_key or environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return []
    way_out = "set it, or WANDB_MODE=offline to keep the curve in the store for `wandb sync`"
    return [Problem(setting="WANDB_API_KEY", value=None, rule="is required by REPORT_TO=wandb", way_out=way_out)]


def _check_trackio(train: TrainSettings, environ: Mapping[str, str]) -> list[Problem]:
    problems = []
    arguments = (
        "trackio_space_id",
        "trackio_bucket_id",
        "trackio_static_space_id",
    )
    wanted = {name: environ.get(name) for name in ("TRACKIO_SPACE_ID", "TRACKIO_DATASET_ID", "TRACKIO_BUCKET_ID")}
    wanted |= {f"TRAIN_ARGS {name}": train.train_args.get(name) for name in arguments}
    rule = "the trainer has no token of Hugging Face, so trackio cannot write there"
    way_out = "leave it out and `trackio sync` the run's `trackers/trackio` later, or set TRACKIO_SERVER_URL"
    problems += [Problem(setting=name, value=str(value), rule=rule, way_out=way_out) for name, value in wanted.items() if value]
    address = environ.get("TRACKIO_SERVER_URL")
    if address and "write_token=" not in urlsplit(address).query and not environ.get("TRACKIO_WRITE_TOKEN"):
        rule, way_out = "is required to write to TRACKIO_SERVER_URL", "set it to what the server prints when it starts"
        problems.append(Problem(setting="TRACKIO_WRITE_TOKEN", value=None, rule=rule, way_out=way_out))
    return problems


def _check_mlflow(environ: Mapping[str, str]) -> list[Problem]:
    address = environ.get("MLFLOW_TRACKING_URI", "")
    if address.startswith(("http://", "https://", "databricks")):
        return []
    rule = "REPORT_TO=mlflow needs a tracking server; files and databases would go with this machine"
    way_out = "set it to the server's address, for example https://mlflow.example.com"
    return [Problem(setting="MLFLOW_TRACKING_URI", value=address or None, rule=rule, way_out=way_out)]
