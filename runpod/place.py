"""Where a request's results go, and whether that outlives the worker: settings in, the run's folder in its store out."""

from collections.abc import Mapping
from pathlib import Path

from job.errors import MachineError
from job.keep.store import Store, open_store, within
from job.preflight.keeping import check_volume
from job.redaction import Redactor, guessed_secrets
from job.settings import Settings

VOLUME_ROOT = "/runpod-volume"
"""Where RunPod mounts an endpoint's network volume; the variable VOLUME_ROOT says otherwise."""


def is_worker(environ: Mapping[str, str]) -> bool:
    """Whether this takes jobs from RunPod's queue, and not from the SDK's local modes."""
    return bool(environ.get("RUNPOD_WEBHOOK_GET_JOB"))


def default_output(environ: Mapping[str, str], settings: Settings) -> dict[str, str]:
    """OUTPUT_URI of a worker where nobody gave it: on the network volume."""
    if not is_worker(environ) or "output_uri" in settings.keep.model_fields_set:
        return {}
    return {"OUTPUT_URI": f"{(environ.get('VOLUME_ROOT') or VOLUME_ROOT).rstrip('/')}/runs"}


def check_place(settings: Settings, environ: Mapping[str, str], *, is_asked_for: bool) -> None:
    """Raise MachineError when a worker's results would go with the worker.

    Args:
        is_asked_for: the request itself names OUTPUT_URI, which may then be a folder of the worker's own disk; one where a
            volume belongs must be a mounted one in any case.
    """
    if "://" in settings.keep.output_uri or not is_worker(environ):
        return
    folder = Path(settings.keep.output_uri).expanduser().resolve()
    mounts = Path("/proc/self/mountinfo").read_text("utf-8")
    try:
        check_volume(folder, environ if is_asked_for else {"VOLUME_ROOT": "/"}, mounts, in_container=True)
    except MachineError as error:
        root = environ.get("VOLUME_ROOT") or VOLUME_ROOT
        raise MachineError(f"{error}; attach a network volume to the endpoint: it is mounted at {root}") from None


def open_run(settings: Settings, environ: Mapping[str, str], run_id: str) -> Store:
    """The run's own folder in OUTPUT_URI; nothing is contacted yet."""
    names = ("aws_access_key_id", "aws_secret_access_key", "aws_session_token")
    keys = {name: secret.get_secret_value() for name in names if (secret := getattr(settings.secrets, name)) is not None}
    redact = Redactor([*keys.values(), *guessed_secrets(environ)])
    return within(open_store(settings.keep.output_uri, credentials=keys, redact=redact), run_id)
