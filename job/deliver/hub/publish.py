"""A folder in, one commit on the Hub out, and proof that the Hub holds it. Sending it again makes no commit.

Each commit names its parent, so one whose answer was lost is refused when it is sent again, and then found to be there: what
is published is published once. What is not handled: what the Hub takes in several commits, as it does with hundreds of files.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tenacity import RetryCallState, Retrying, retry_if_exception
from tenacity.wait import wait_exponential_jitter

from job.deliver.hub.upload import IncompleteError, check_upload, files_of, in_background
from job.deliver.report import Publication
from job.errors import NetworkError, Problem, PublishError, SettingsError
from job.keep.checkpoints import MANIFEST, STORED
from job.settings import PublishSettings

FINISH = "it is safe in the store: `python -m job publish` with the same settings finishes the job"


class Patience(NamedTuple):
    """How long a Hub that is not well is waited for: by default about a minute, and six minutes when it does not answer."""

    tries: int = 6
    first_wait_seconds: float = 2.0
    """Doubled each time: 2, 4, 8, 16, 32, each with up to a second more."""
    longest_wait_seconds: float = 300.0
    """All waiting together, also what the Hub asks for by Retry-After; when it asks for more, it is given up."""
    timeout_seconds: float = 60.0
    """Silence in the middle of a request."""


PATIENCE = Patience()


def ensure_repo(
    settings: PublishSettings, token: str | None, *, repo_id: str | None = None, setting: str = "HUB_MODEL_ID"
) -> None:
    """Create the repository and its branch now: better refused before training than after it.

    Args:
        repo_id: HUB_MODEL_ID when it is not given.
        setting: what named it.

    Raises:
        SettingsError: there is no token, it is not accepted, or it may not write there.
        NetworkError: the Hub does not answer.
    """
    import httpx2  # huggingface_hub lets its connection errors through
    from huggingface_hub.errors import HfHubHTTPError

    target = repo_id or settings.hub_model_id
    if not token:
        raise _refused("HF_TOKEN", None, f"is required to publish to {setting}={target}", "set it")
    try:
        _create(_api(token), target, settings)
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status == 401:
            raise _refused("HF_TOKEN", "***", "the Hub does not accept it", "make a new token with write permission") from error
        if status in (403, 404):
            way_out = "use a token with write permission for it, or another owner"
            raise _refused(setting, str(target), "the token may not write there", way_out) from error
        raise NetworkError(f"{setting}={target}: the Hub answered {status}") from error
    except (OSError, httpx2.HTTPError) as error:
        raise NetworkError(f"{setting}={target}: the Hub does not answer ({error})") from error


def publish(folder: Path, settings: PublishSettings, token: str | None, *, message: str, way_out: str = FINISH) -> Publication:
    """Push the adapter to HUB_MODEL_ID; see `publish_folder`."""
    assert settings.hub_model_id is not None
    return publish_folder(folder, settings.hub_model_id, settings, token, message=message, way_out=way_out)


def publish_folder(
    folder: Path,
    repo_id: str,
    settings: PublishSettings,
    token: str | None,
    *,
    message: str,
    way_out: str = FINISH,
    setting: str = "HUB_MODEL_ID",
    what: str = "the adapter",
    ignore: Sequence[str] = (),
    tell: Callable[[str], None] = lambda text: None,
    idle: Callable[[], None] = lambda: None,
    patience: Patience = PATIENCE,
) -> Publication:
    """Push all files in one commit, and ask the Hub for what it holds then.

    Args:
        settings: visibility of a repository that has to be made, and the branch.
        message: of the commit.
        way_out: what to do when the Hub does not take it.
        setting: what named `repo_id`.
        what: what is published, in messages.
        ignore: patterns of files that stay here, beside the manifest.
        tell: called before each wait with the reason for it.
        idle: called every few seconds while files go out.

    Raises:
        PublishError: the Hub refused it, or did not take it after several tries.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError

    from job.deliver.hub.client import UnwellError, single_requests  # imports the Hub's library

    left_out = [MANIFEST, STORED, *ignore]
    api = _api(token)
    url = f"{api.endpoint}/{repo_id}"

    def push() -> str:
        _create(api, repo_id, settings)
        parent = api.model_info(repo_id, revision=settings.hub_revision).sha
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=settings.hub_revision,
            parent_commit=parent,
            commit_message=message,
            ignore_patterns=list(left_out),
        )
        check_upload(api, repo_id, commit.oid, files_of(folder, left_out))
        oid: str = commit.oid
        return oid

    def is_transient(error: BaseException) -> bool:
        if isinstance(error, HfHubHTTPError):  # deleted, or pushed to, since it was looked at
            return error.response.status_code in (404, 409, 412)
        if constants.HF_HUB_OFFLINE:
            return False
        # The last three come from hf-xet, which has tried again by itself; what it has sent is not sent twice.
        return isinstance(error, (UnwellError, IncompleteError, ConnectionError, TimeoutError, RuntimeError))

    def wait(state: RetryCallState) -> float:
        assert state.outcome is not None
        asked = getattr(state.outcome.exception(), "retry_after_seconds", None)
        backoff = wait_exponential_jitter(multiplier=patience.first_wait_seconds, jitter=min(1.0, patience.first_wait_seconds))(
            state
        )
        return max(backoff, asked or 0.0)

    def is_over(state: RetryCallState) -> bool:
        is_too_long = state.idle_for + state.upcoming_sleep > patience.longest_wait_seconds
        return is_too_long or state.attempt_number >= patience.tries

    def before_sleep(state: RetryCallState) -> None:
        assert state.outcome is not None
        reason = _one_line(state.outcome.exception())
        tell(f"{setting}={repo_id}: {reason}; trying again in {state.upcoming_sleep:.0f} s")

    attempts = Retrying(
        retry=retry_if_exception(is_transient),
        wait=wait,
        stop=is_over,
        before_sleep=before_sleep,
        reraise=True,
    )
    try:
        with single_requests(api.endpoint, timeout_seconds=patience.timeout_seconds):
            oid = attempts(lambda: in_background(push, idle))
    except (OSError, ValueError, RuntimeError, HfHubHTTPError, UnwellError, IncompleteError) as error:
        text = f"{setting}={repo_id}: {what} could not be published: {_explain(error)}; {way_out}"
        raise PublishError(text) from error
    where = url if settings.hub_revision == "main" else f"{url}/tree/{settings.hub_revision}"
    return Publication(repo_id=repo_id, revision=settings.hub_revision, commit=oid, url=where)


def _explain(error: BaseException) -> str:
    """What the Hub said, in words that tell what to do."""
    from hf_xet import XetAuthenticationError  # type: ignore[import-untyped]
    from huggingface_hub.errors import HfHubHTTPError

    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if status == 401 or isinstance(error, XetAuthenticationError):
        return "the Hub does not accept HF_TOKEN (any more: it may have expired); make a new one with write permission and set it"
    if status == 403:
        return "the Hub answered 403: the token may not write there; use one with write permission for it, or another owner"
    if status == 404:
        return "the Hub answered 404: the repository or its branch is gone; see who deletes it"
    if status == 412:
        return "the Hub answered 412: somebody else pushes to it all the time; publish to another repository"
    if status == 413:
        return "the Hub answered 413: this is more than it takes at once; unset HF_HUB_DISABLE_XET, or publish to another Hub"
    asked = getattr(error, "retry_after_seconds", None)
    return f"{_one_line(error)}" + (f" and asks to wait {asked:.0f} s" if asked else "")


def _one_line(error: BaseException | None) -> str:
    from job.deliver.hub.client import UnwellError

    text = " ".join(str(error).split()) or type(error).__name__
    return f"the Hub is not well: {text}" if isinstance(error, UnwellError) else text


def _api(token: str | None) -> Any:
    from huggingface_hub import HfApi

    return HfApi(token=token)


def _create(api: Any, repo_id: str | None, settings: PublishSettings) -> None:
    api.create_repo(repo_id, private=settings.hub_private_repo, exist_ok=True)
    if settings.hub_revision != "main":
        api.create_branch(repo_id, branch=settings.hub_revision, exist_ok=True)


def _refused(setting: str, value: str | None, rule: str, way_out: str) -> SettingsError:
    return SettingsError([Problem(setting=setting, value=value, rule=rule, way_out=way_out)])
