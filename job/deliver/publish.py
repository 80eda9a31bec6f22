"""A sealed adapter folder in, one commit on the Hub out."""

from pathlib import Path
from typing import Any

from tenacity import retry, retry_if_exception, stop_after_attempt, wait_exponential_jitter

from job.deliver.report import Publication
from job.errors import NetworkError, Problem, PublishError, SettingsError
from job.keep.checkpoints import MANIFEST
from job.settings import PublishSettings

TRIES = 4
FINISH = "it is safe in the store: `python -m job publish` with the same settings finishes the job"


def ensure_repo(settings: PublishSettings, token: str | None) -> None:
    """Create the repository and its branch now: better refused before training than after it.

    Raises:
        SettingsError: there is no token, it is not accepted, or it may not write there.
        NetworkError: the Hub does not answer.
    """
    import httpx2  # huggingface_hub lets its connection errors through
    from huggingface_hub.errors import HfHubHTTPError

    if not token:
        raise _refused("HF_TOKEN", None, f"is required to publish to HUB_MODEL_ID={settings.hub_model_id}", "set it")
    try:
        _create(_api(token), settings)
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status == 401:
            raise _refused("HF_TOKEN", "***", "the Hub does not accept it", "make a new token with write permission") from error
        if status in (403, 404):
            way_out = "use a token with write permission for it, or another owner"
            raise _refused("HUB_MODEL_ID", str(settings.hub_model_id), "the token may not write there", way_out) from error
        raise NetworkError(f"HUB_MODEL_ID={settings.hub_model_id}: the Hub answered {status}") from error
    except (OSError, httpx2.HTTPError) as error:
        raise NetworkError(f"HUB_MODEL_ID={settings.hub_model_id}: the Hub does not answer ({error})") from error


def publish(folder: Path, settings: PublishSettings, token: str | None, *, message: str, way_out: str = FINISH) -> Publication:
    """Push the adapter in one commit; a second push of the same files makes no commit.

    Args:
        way_out: what to do when the Hub does not take it.

    Raises:
        PublishError: the Hub did not take it after several tries.
    """
    import httpx2

    assert settings.hub_model_id is not None

    def transient(error: BaseException) -> bool:
        status = getattr(getattr(error, "response", None), "status_code", None)
        return isinstance(error, (OSError, httpx2.HTTPError)) and (status is None or status == 429 or status >= 500)

    @retry(retry=retry_if_exception(transient), stop=stop_after_attempt(TRIES), wait=wait_exponential_jitter(1, 20), reraise=True)
    def push() -> Any:
        api = _api(token)
        _create(api, settings)
        return api.upload_folder(
            repo_id=settings.hub_model_id,
            folder_path=folder,
            revision=settings.hub_revision,
            commit_message=message,
            ignore_patterns=[MANIFEST],
        )

    try:
        commit = push()
    except (OSError, ValueError, httpx2.HTTPError) as error:
        raise PublishError(
            f"HUB_MODEL_ID={settings.hub_model_id}: the adapter could not be published ({error}); {way_out}"
        ) from error
    return Publication(
        repo_id=settings.hub_model_id,
        revision=settings.hub_revision,
        commit=commit.oid,
        url=f"{_api(token).endpoint}/{settings.hub_model_id}",
    )


def _api(token: str | None) -> Any:
    from huggingface_hub import HfApi

    return HfApi(token=token)


def _create(api: Any, settings: PublishSettings) -> None:
    api.create_repo(settings.hub_model_id, private=settings.hub_private_repo, exist_ok=True)
    if settings.hub_revision != "main":
        api.create_branch(settings.hub_model_id, branch=settings.hub_revision, exist_ok=True)


def _refused(setting: str, value: str | None, rule: str, way_out: str) -> SettingsError:
    return SettingsError([Problem(setting=setting, value=value, rule=rule, way_out=way_out)])
