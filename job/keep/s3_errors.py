"""What boto3 raises in, what the Store protocol promises out: each failure becomes the user's, the machine's or the network's."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

from job.errors import JobError, MachineError, NetworkError, Problem, SettingsError
from job.keep.store import MissingError

_REFUSED = {
    "AccessDenied", "AllAccessDisabled", "AccountProblem", "AuthorizationHeaderMalformed", "InvalidAccessKeyId",
    "InvalidToken", "SignatureDoesNotMatch", "ExpiredToken", "TokenRefreshRequired", "Unauthorized", "Forbidden", "401", "403",
}  # fmt: skip
_ELSEWHERE = {"PermanentRedirect", "TemporaryRedirect", "IllegalLocationConstraintException", "301", "307"}
_CLOCK = {"RequestTimeTooSkewed", "RequestExpired"}
_KEYS_WAY_OUT = "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN and what they may do there"
_REGION_WAY_OUT = "set AWS_DEFAULT_REGION to the bucket's region, or correct AWS_ENDPOINT_URL_S3"
_RETRY_WAY_OUT = "start again when the network and the store are well"


@contextmanager
def translated(uri: str, name: str, *, may_miss: bool = True) -> Iterator[None]:
    """Turn what boto3 raises inside into MissingError or a JobError; other exceptions pass.

    Args:
        may_miss: whether what is asked for can be missing; else "not found" means that no S3 service is at the address.
    """
    from boto3.exceptions import Boto3Error, S3UploadFailedError
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except S3UploadFailedError as error:
        cause = error.__cause__ or error.__context__
        if isinstance(cause, ClientError):
            raise _from_answer(cause, uri, name, may_miss) from cause
        raise NetworkError(f"OUTPUT_URI={uri}: {error}; {_RETRY_WAY_OUT}") from error
    except ClientError as error:
        raise _from_answer(error, uri, name, may_miss) from error
    except (BotoCoreError, Boto3Error, RecursionError) as error:
        raise _from_library(error, uri, name) from error


def refused(uri: str, rule: str, way_out: str) -> SettingsError:
    return SettingsError([Problem(setting="OUTPUT_URI", value=uri, rule=rule, way_out=way_out)])


def _from_answer(error: Any, uri: str, name: str, may_miss: bool) -> JobError | MissingError:
    """The store answered with an error."""
    code = str(error.response.get("Error", {}).get("Code", ""))
    headers = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    if code in ("404", "NoSuchKey"):
        not_s3 = refused(uri, "the server there is no S3 service, or has no such bucket", "correct AWS_ENDPOINT_URL_S3")
        return MissingError(name) if may_miss else not_s3
    if code == "NoSuchBucket":
        return refused(uri, "the bucket does not exist", "create it, or correct the name or AWS_ENDPOINT_URL_S3")
    if code in _CLOCK:
        return MachineError(
            f"OUTPUT_URI={uri}: this machine's clock is wrong{_clock_difference(headers)}, and the store refuses its signatures; "
            "set the clock (NTP), or use another machine"
        )
    region = headers.get("x-amz-bucket-region") or error.response.get("Error", {}).get("Region")
    if code in _ELSEWHERE or (code == "AuthorizationHeaderMalformed" and region):
        if not region:
            return refused(uri, "the bucket is in another region", _REGION_WAY_OUT)
        way_out = f"set AWS_DEFAULT_REGION={region}, or correct AWS_ENDPOINT_URL_S3"
        return refused(uri, f"the bucket is in another region ({region})", way_out)
    if code in _REFUSED:
        doing = f" for {error.operation_name}" if getattr(error, "operation_name", None) else ""
        return refused(uri, f"the store refuses the credentials ({code}{doing})", _KEYS_WAY_OUT)
    return NetworkError(f"OUTPUT_URI={uri}: the store answered {code or 'nonsense'} for {name}; {_RETRY_WAY_OUT}")


def _from_library(error: Exception, uri: str, name: str) -> JobError:
    """There was no answer, or no question."""
    from botocore import exceptions as known

    # botocore answers a redirect by asking for the bucket's region; a server that redirects that too (a proxy that wants https,
    # say) sends it round in circles until some frame of it gives up (botocore/utils.py, S3RegionRedirectorv2, 1.44).
    if "recursion depth" in str(error):
        return refused(uri, "the address redirects every request", _REGION_WAY_OUT)
    if isinstance(error, known.ParamValidationError | known.InvalidRegionError):
        return refused(uri, f"is not a valid address ({error})", "correct the bucket's name or AWS_DEFAULT_REGION")
    if isinstance(error, known.NoCredentialsError | known.PartialCredentialsError | known.ProfileNotFound):
        return refused(uri, f"no credentials were found ({error})", "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
    if isinstance(error, known.SSLError):
        return refused(uri, f"no secure connection ({error})", "correct AWS_ENDPOINT_URL_S3, or name the CA in AWS_CA_BUNDLE")
    return NetworkError(f"OUTPUT_URI={uri}: {name}: {error}; check AWS_ENDPOINT_URL_S3, or {_RETRY_WAY_OUT}")


def _clock_difference(headers: dict[str, str]) -> str:
    try:
        theirs = parsedate_to_datetime(headers["date"])
    except (KeyError, ValueError):
        return ""
    return f" by {abs((datetime.now(UTC) - theirs).total_seconds()):,.0f} seconds"
