"""Settings of keeping, budget, publishing and secrets; one line of documentation at each."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, PositiveFloat, PositiveInt, SecretStr

from job.settings.section import NEUTRAL, Section


def _check_output_uri(value: str) -> str:
    scheme, separator, rest = value.partition("://")
    if separator and scheme != "s3":
        raise ValueError("must be a folder or s3://bucket/prefix")
    if separator and not rest.partition("/")[0]:
        raise ValueError("names no bucket (s3://bucket/prefix)")
    return value.rstrip("/") or "/"


def _check_file(value: Path | None) -> Path | None:
    if value is not None and not value.expanduser().is_file():
        raise ValueError(f"no such file (looked in {Path.cwd()})")
    return value


class KeepSettings(Section):
    title = "Keeping"

    output_uri: Annotated[str, AfterValidator(_check_output_uri), NEUTRAL] = "runs"
    """Where runs are kept: a folder (a mounted volume on a rented machine) or `s3://bucket/prefix`."""
    run_id: Annotated[str | None, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,95}$"), NEUTRAL] = None
    """Name of the run; by default `<model>-<fingerprint>`, so the same settings continue the same run."""
    save_interval: Annotated[PositiveFloat | Literal["auto"], Field(union_mode="left_to_right"), NEUTRAL] = "auto"
    """Seconds between checkpoints; auto weighs what a lost machine costs against what a save costs (1-30 minutes)."""
    save_steps: Annotated[PositiveInt | None, NEUTRAL] = None
    """Save every this many optimizer steps instead."""
    save_total_limit: Annotated[PositiveInt, NEUTRAL] = 3
    """Checkpoints kept: the newest ones, and the one with the lowest held-out loss."""
    grace_seconds: Annotated[PositiveFloat, NEUTRAL] = 30.0
    """How long a stopping trainer may take to save before it is killed; keep below the machine's own limit."""
    hang_seconds: Annotated[PositiveFloat, NEUTRAL] = 1800.0
    """A trainer that is silent for this long is stopped, with a dump of what it was doing, and started again once."""
    work_dir: Annotated[Path, NEUTRAL] = Path("~/.cache/qlora-job")
    """Fast local disk for converted models and for checkpoints on their way to OUTPUT_URI."""


class BudgetSettings(Section):
    title = "Budget"

    gpu_hourly_rate: Annotated[PositiveFloat | None, NEUTRAL] = None
    """What the machine costs in US dollars an hour; the report says "unknown" without it, never 0."""
    gpu_prices_file: Annotated[Path | None, AfterValidator(lambda v: _check_file(v)), NEUTRAL] = None
    """Your own prices as JSON, `[{"gpu": "RTX 4090", "usd_per_hour": 0.5}]`; they go before the job's dated table."""
    max_cost_usd: Annotated[PositiveFloat | None, NEUTRAL] = None
    """US dollars that all attempts together may cost; the run stops before, with a checkpoint (status 8); raise it to go on."""
    max_hours: Annotated[PositiveFloat | None, NEUTRAL] = None
    """Hours that all attempts together may take, downloads and preparation included; for machines without a known price."""
    publish_on_budget: Annotated[bool, NEUTRAL] = False
    """When the budget ends the run, deliver the adapter as it is then: to HUB_MODEL_ID, or to the store as `budget-adapter`."""


class PublishSettings(Section):
    title = "Publishing"

    hub_model_id: Annotated[str | None, Field(pattern=r"^[\w.-]+/[\w.-]+$"), NEUTRAL] = None
    """Hub repository (owner/name) that gets the adapter; without it the adapter stays in the store."""
    hub_private_repo: Annotated[bool, NEUTRAL] = True
    """Create the repository private; an existing one keeps its visibility."""
    hub_revision: Annotated[str, NEUTRAL] = "main"
    """Branch that is pushed to."""


class Secrets(Section):
    """Credentials. Each may also be given as the name of a file that holds it: `HF_TOKEN_FILE=/run/secrets/hf`."""

    title = "Secrets"

    hf_token: Annotated[SecretStr | None, NEUTRAL] = None
    """Hugging Face token: gated models and data sets, and publishing (needs write permission)."""
    aws_access_key_id: Annotated[SecretStr | None, NEUTRAL] = None
    """Key for `s3://` (any S3 service; name its address in AWS_ENDPOINT_URL_S3)."""
    aws_secret_access_key: Annotated[SecretStr | None, NEUTRAL] = None
    """Secret of that key."""
    aws_session_token: Annotated[SecretStr | None, NEUTRAL] = None
    """Session token of temporary AWS credentials."""
    runpod_api_key: Annotated[SecretStr | None, NEUTRAL] = None
    """RunPod key; kept from every child process."""
    wandb_api_key: Annotated[SecretStr | None, NEUTRAL] = None
    """Weights & Biases key; reaches the trainer only when TRAIN_ARGS reports there."""
