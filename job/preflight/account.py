"""HF_TOKEN and HUB_MODEL_ID in; who the token is, and that it may write there, out."""

from job.deliver.hub.publish import ensure_repo
from job.errors import NetworkError, Problem, SettingsError
from job.preflight.outcome import WARNING
from job.settings import PublishSettings


def check_account(publish: PublishSettings, *, has_token: bool) -> str:
    """Ask the Hub who the token is; create the repository to publish to, now: better refused before training than after it.

    Raises:
        SettingsError: the Hub does not accept the token, or it may not write there.
        NetworkError: the Hub does not answer, and there is something to publish.
    """
    from huggingface_hub import constants, get_token

    targets = publish.targets
    named = ", ".join(f"{setting}={target}" for setting, target in targets.items())
    if constants.HF_HUB_OFFLINE:
        if targets:
            rule = f"nothing can be published to {named} with it"
            raise _refused("HF_HUB_OFFLINE", "1", rule, f"unset HF_HUB_OFFLINE, or {' and '.join(targets)} and publish later")
        return "not asked: HF_HUB_OFFLINE is set"
    token = get_token() if has_token else None
    if not token:
        if targets:
            raise _refused("HF_TOKEN", None, f"is required to publish to {named}", "set it")
        return "HF_TOKEN is not set; only what is public can be read"
    try:
        found = _check_token(token, named)
    except NetworkError as error:
        if targets:
            raise
        return f"{WARNING}HF_TOKEN could not be checked: {error}"
    for setting, target in targets.items():
        ensure_repo(publish, token, repo_id=target, setting=setting)
        _check_write(setting, target, token)
    return f"{found}, may write to {', '.join(targets.values())}" if targets else found


def _check_token(token: str, named: str) -> str:
    import httpx2
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        who = HfApi(token=token).whoami()
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            way_out = "make a new token with write permission" if named else "make a new token, or leave it out"
            raise _refused("HF_TOKEN", "***", "the Hub does not accept it", way_out) from error
        raise NetworkError(f"the Hub answered {status}; start again when it is well") from error
    except (OSError, httpx2.HTTPError) as error:
        raise NetworkError(f"the Hub does not answer ({error}); start again when the network is well") from error
    role = ((who.get("auth") or {}).get("accessToken") or {}).get("role")
    if role == "read" and named:
        rule = f"the token may only read, and {named} is to be written"
        raise _refused("HF_TOKEN", "***", rule, "make a token with write permission")
    return f"HF_TOKEN is {who['name']}'s" + (f" ({role})" if role else "")


def _check_write(setting: str, target: str, token: str) -> None:
    """`create_repo` lets an existing repository of somebody else pass when it may be read."""
    import httpx2
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        HfApi(token=token).auth_check(target, write=True)
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            way_out = "use a token with write permission for it, or another owner"
            raise _refused(setting, target, "the token may not write there", way_out) from error
        # A Hub of one's own may not know the question.
    except (OSError, httpx2.HTTPError) as error:
        raise NetworkError(f"{setting}={target}: the Hub does not answer ({error})") from error


def _refused(setting: str, value: str | None, rule: str, way_out: str) -> SettingsError:
    return SettingsError([Problem(setting=setting, value=value, rule=rule, way_out=way_out)])
