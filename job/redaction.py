"""The one place through which everything passes that is written down, shown or sent: text in, the same without secrets out.

What goes: the values of the run's own secrets, in whatever form a library may quote them; whatever looks like a credential
(keys of known forms, `Authorization` headers, signed addresses, passwords in addresses, private keys); and the folders of this
machine, which become the names of the settings that they came from. What is not handled: a secret that was never told and has
no known form, and one that is cut in two by two separate writes.
"""

import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TextIO, TypeVar, cast
from urllib.parse import quote

from pydantic import BaseModel

M = TypeVar("M", bound=BaseModel)
MASK = "***"
MIN_SECRET = 4
"""Characters; blotting out less would tear every text apart."""
WHOLE_WORDS = 12
"""Characters; a shorter one that is one word counts only where it stands alone."""
MIN_GUESSED = 8
"""Of an environment variable that only by its name looks like a secret."""
_SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|API_?KEY|ACCESS_KEY|PRIVATE_KEY|AUTH(?!OR)|WEBHOOK_URL|DSN$")
_NO_SECRET_NAME = re.compile(r"TOKENIZERS|_FILE$|NUM_|MAX_|MIN_|SSH_AUTH_SOCK|XAUTHORITY|_TOKENS$|_TYPE$|_MODE$")
_FORMS = (
    r"\b(?:hf|api_org)_[A-Za-z0-9]{16,}",  # Hugging Face
    r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b",  # AWS access key ids
    r"\b(?:rpa|rps)_[A-Za-z0-9]{16,}",  # RunPod
    r"\bgh[opsur]_[A-Za-z0-9]{20,}|\bgithub_pat_\w{20,}",
    r"\bsk-[A-Za-z0-9_-]{20,}",  # OpenAI and its likes
    r"\bxox[abeoprs]-[A-Za-z0-9-]{10,}",  # Slack
    r"\beyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]*",  # JSON web tokens
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----(?:[A-Za-z0-9+/=\s:,-]|\\[nr])*",  # to the end of the quotation that holds it
)
_CREDENTIAL = re.compile("|".join(_FORMS))
_KEPT_BEFORE = (
    # Headers, as they are sent and as Python and JSON show them: with a scheme to the end of the value, else one long word.
    re.compile(
        r"(authorization\\?[\"']?\s{0,3}[:=]\s{0,3}b?\\?[\"']?(?:bearer|basic|token|digest|aws4-hmac-sha256)\s+)"
        r"[^\"'\\\r\n;}{\])]+",
        re.IGNORECASE,
    ),
    re.compile(
        r"((?:authorization|x-api-key|x-amz-security-token|x-hf-[a-z-]{0,20}token)\\?[\"']?\s{0,3}[:=]\s{0,3}b?\\?[\"']?)"
        r"[^\s\"'\\,;}{\])]{16,}",
        re.IGNORECASE,
    ),
    re.compile(r"(\bbearer\s{1,3})(?=[^\s\"']{0,200}\d)[A-Za-z0-9._~+/=-]{8,}", re.IGNORECASE),
    # Signed addresses: AWS, CloudFront, Google, Azure, and what others call it.
    re.compile(
        r"([?&;](?:x-amz-(?:signature|credential|security-token)|x-goog-(?:signature|credential)|signature|sig|policy|"
        r"key-pair-id|awsaccesskeyid|token|access_token|api_?key|apikey|auth|password|secret)=)[^&\s\"'<>\\)]+",
        re.IGNORECASE,
    ),
    re.compile(r"(?<![a-z0-9+.-])([a-z][a-z0-9+.-]{0,30}://)[^\s/@\"'<>]{1,500}(?=@)", re.IGNORECASE),  # user:password@
    re.compile(r"(https?://hooks\.slack\.com/)[^\s\"'<>\\)]+", re.IGNORECASE),
    re.compile(r"(https?://(?:\w+\.)?discord(?:app)?\.com/api/(?:v\d+/)?webhooks/)[^\s\"'<>\\)]+", re.IGNORECASE),
    re.compile(
        r"(\b(?:hf_token|aws_secret_access_key|aws_session_token|runpod_api_key|wandb_api_key|webhook_url)\\?[\"']?\s*[=:]\s*"
        r"\\?[\"']?)[^\s\"'\\,;}]{4,}",
        re.IGNORECASE,
    ),
)


class Redactor:
    """A function that takes out of a text what must not leave.

    Args:
        secrets: values that go wherever they stand.
        folders: absolute folders and files of this machine, and what stands for each.
    """

    def __init__(self, secrets: Iterable[str] = (), folders: Mapping[str, str] | None = None) -> None:
        known = {form for secret in secrets if len(secret) >= MIN_SECRET for form in _forms(secret)}
        self._secrets = _either(sorted(known, key=len, reverse=True))
        self._names = {path.rstrip("/"): name for path, name in (folders or {}).items() if len(path.rstrip("/")) > 1}
        paths = _either(sorted(self._names, key=len, reverse=True))
        # A whole name of a folder: what follows is inside it, or no part of a name.
        self._paths = re.compile(rf"(?<![\w.~$-])(?:{paths.pattern})(?![\w-]|\.\w)") if self._names else None

    def __call__(self, text: str) -> str:
        if self._secrets.pattern:
            text = self._secrets.sub(MASK, text)
        text = _CREDENTIAL.sub(MASK, text)
        for pattern in _KEPT_BEFORE:
            text = pattern.sub(rf"\1{MASK}", text)
        if self._paths is not None:
            text = self._paths.sub(lambda match: self._names[match[0]], text)
        return text


def guessed_secrets(environ: Mapping[str, str]) -> list[str]:
    """Values of variables that by their names hold a secret, ours or a library's."""
    return [
        value
        for name, value in environ.items()
        if len(value) >= MIN_GUESSED and _SECRET_NAME.search(name.upper()) and not _NO_SECRET_NAME.search(name.upper())
    ]


def redact_model(model: M, redact: Callable[[str], str]) -> M:
    """The same object with every text in it redacted; what is a Path stays, for it is opened."""
    return model.model_copy(update={name: _inside(value, redact) for name, value in model})


def _inside(value: Any, redact: Callable[[str], str]) -> Any:
    if type(value) is str:  # no enum
        return redact(value)
    if isinstance(value, BaseModel):
        return redact_model(value, redact)
    if isinstance(value, (tuple, list)) and not hasattr(value, "_fields"):
        return type(value)(_inside(one, redact) for one in value)
    return value


class RedactedStream:
    """A text stream whose every write is redacted; all else is the stream's own."""

    def __init__(self, stream: TextIO, redact: Callable[[str], str]) -> None:
        self._stream, self._redact = stream, redact

    def write(self, text: str) -> int:
        self._stream.write(self._redact(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def redacted_streams(redact: Callable[[str], str]) -> tuple[TextIO, TextIO]:
    """Standard output and standard error, redacted: for tracebacks and for what libraries print by themselves.

    Streams that are redacted already get the new rules instead.
    """
    plain = [stream._stream if isinstance(stream, RedactedStream) else stream for stream in (sys.stdout, sys.stderr)]
    return cast("TextIO", RedactedStream(plain[0], redact)), cast("TextIO", RedactedStream(plain[1], redact))


def local_folders(
    *, work_dir: Path, current: Path, home: str | None, shown: Iterable[str] = (), given: Iterable[Path] = ()
) -> dict[str, str]:
    """What stands for the folders of this machine.

    Args:
        shown: folders that are told as they are: where the results lie.
        given: files and folders that settings name; of them only the last part may be known.
    """
    folders: dict[str, str] = {}
    for path in given:
        absolute = path.expanduser().absolute()
        if not path.is_absolute() and len(path.parts) > 1:  # as it was written
            folders[str(path)] = path.name
        for form in (absolute, absolute.resolve()):
            folders |= {str(form): path.name, **({} if form.is_dir() else {str(form.parent): "…"})}
    folders[str(Path(__file__).resolve().parent.parent)] = "…"  # in tracebacks
    if home and home.startswith("/"):
        folders[home] = "~"
    return folders | {str(current): ".", str(work_dir): "$WORK_DIR"} | {folder: folder for folder in shown}


def _forms(secret: str) -> set[str]:
    """How a value may stand in an address, in JSON and in Python's own notation."""
    quoted = {quote(secret, safe=""), quote(secret, safe="/")}
    return {secret, *quoted, json.dumps(secret)[1:-1], json.dumps(secret, ensure_ascii=False)[1:-1], repr(secret)[1:-1]}


def _either(texts: Iterable[str]) -> re.Pattern[str]:
    return re.compile("|".join(_alternative(text) for text in texts))


def _alternative(text: str) -> str:
    if text.isdigit():  # none inside a longer number
        return rf"(?<![\d.]){text}(?![\d.])"
    if len(text) < WHOLE_WORDS and text.isalnum():  # `test` is none inside `tester`
        return rf"(?<!\w){re.escape(text)}(?!\w)"
    return re.escape(text)
