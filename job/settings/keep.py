"""Settings of keeping, budget, publishing, the end and secrets; one line of documentation at each."""

from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, NonNegativeFloat, PositiveFloat, PositiveInt, SecretStr, model_validator

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


def _check_url(value: SecretStr | None) -> SecretStr | None:
    if value is not None:
        parts = urlsplit(value.get_secret_value())
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("must be an address that begins with https://")
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
    publish_merged: Annotated[bool, NEUTRAL] = False
    """After the adapter: the base model with the adapter merged in, bfloat16, for servers that take no adapters; on the CPU."""
    hub_merged_model_id: Annotated[str | None, Field(pattern=r"^[\w.-]+/[\w.-]+$"), NEUTRAL] = None
    """Hub repository of the merged model; by default HUB_MODEL_ID with `-merged`, and without that the store's `merged`."""

    @property
    def merged_target(self) -> str | None:
        """Where the merged model is pushed to; None for the store."""
        if self.hub_merged_model_id or not self.hub_model_id:
            return self.hub_merged_model_id
        return f"{self.hub_model_id}-merged"

    @property
    def targets(self) -> dict[str, str]:
        """Every repository that is to be written, by the setting that names it."""
        wanted = {"HUB_MODEL_ID": self.hub_model_id, "HUB_MERGED_MODEL_ID": self.merged_target if self.publish_merged else None}
        return {setting: repo_id for setting, repo_id in wanted.items() if repo_id}

    @model_validator(mode="after")
    def _merged_is_wanted(self) -> "PublishSettings":
        if self.hub_merged_model_id and not self.publish_merged:
            raise ValueError(
                f"HUB_MERGED_MODEL_ID={self.hub_merged_model_id}: nothing goes there while PUBLISH_MERGED is off; set "
                "PUBLISH_MERGED=1, or leave it out"
            )
        if self.publish_merged and self.hub_merged_model_id == self.hub_model_id and self.hub_model_id:
            raise ValueError(
                f"HUB_MERGED_MODEL_ID={self.hub_merged_model_id}: is where the adapter goes; name another repository"
            )
        return self


class FinishSettings(Section):
    title = "Finish"

    on_finish: Annotated[Literal["exit", "stop", "terminate"], NEUTRAL] = "exit"
    """What becomes of a RunPod pod at the end: it bills on (exit), is stopped, or is deleted once nothing is only on it."""
    fail_grace_minutes: Annotated[NonNegativeFloat, NEUTRAL] = 15.0
    """How long a failed run leaves its pod up to be looked at before ON_FINISH; a pod that is only left bills for ever."""


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
    """Weights & Biases key; reaches the trainer only with REPORT_TO=wandb."""
    webhook_url: Annotated[SecretStr | None, AfterValidator(lambda v: _check_url(v)), NEUTRAL] = None
    """Address that is told of the start, checkpoints and the end, as JSON; Slack's and Discord's get their own form."""
