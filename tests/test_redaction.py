"""What must not leave: secrets in every form that libraries quote them in, and the folders of the machine."""

import io
import json
import logging
import threading
import time
from pathlib import Path
from typing import TextIO, cast
from urllib.parse import quote

import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from job.redaction import MASK, RedactedStream, Redactor, guessed_secrets, local_folders, redact_model
from job.stopping import StopRequest
from job.supervise import ChildFailedError, run_child

SECRET = 'S3cr3t-/+=&"\\é value'


@pytest.mark.parametrize(
    "quoted",
    [SECRET, quote(SECRET, safe=""), quote(SECRET), json.dumps(SECRET), json.dumps(SECRET, ensure_ascii=False), repr(SECRET)],
)
def test_a_known_secret_goes_in_whatever_form_it_is_quoted(quoted: str) -> None:
    told = Redactor([SECRET])(f"before {quoted} after")
    assert "S3cr3t" not in told and told.startswith("before ") and told.endswith(" after") and MASK in told


@given(st.text(min_size=12, max_size=40).filter(lambda text: not text.isdigit()), st.text(max_size=30), st.text(max_size=30))
def test_no_text_keeps_a_known_secret(secret: str, before: str, after: str) -> None:
    told = Redactor([secret])(f"{before}{secret}{after}")
    assert secret not in told or secret in before + MASK + after or secret in MASK


@pytest.mark.parametrize(
    "text",
    [
        "token hf_abcdefghijklmnopqrstuvwx refused",
        "AKIAIOSFODNN7EXAMPLE",
        "rpa_0123456789ABCDEFGHIJ",
        "ghp_0123456789abcdefghijABCDEFGHIJ",
        "sk-proj-0123456789abcdefghijABCDEFGHIJ",
        "xoxb-123456789012-abcdefABCDEF",
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.SflKxwRJSMeKKF2QT4",
        "-----BEGIN RSA PRIVATE KEY-----\nMIIEowIBAAKCAQEA\n-----END RSA PRIVATE KEY-----",
        "Authorization: Bearer abcdefghijk12345",
        "headers={'authorization': 'Basic dXNlcjpwYXNzd29yZA==', 'accept': '*/*'}",
        '{"Authorization": "AWS4-HMAC-SHA256 Credential=AKID/2026, Signature=abcdef0123"}',
        "X-Api-Key: 0123456789abcdef",
        "https://b.s3.amazonaws.com/k?X-Amz-Credential=AKID%2F2026&X-Amz-Signature=abcdef0123456789&partNumber=1",
        "https://acct.blob.core.windows.net/c/f?sv=2026&sig=abcdef%2B0123456789%3D",
        "https://user:pa55word@example.org/x",
        "https://hooks.slack.com/services/T000/B000/XXXXXXXXXXXX",
        "https://discord.com/api/webhooks/1234/abcDEF-_ghi",
        "AWS_SECRET_ACCESS_KEY=wJalrXUtnFEMIK7MDENGbPxRfiCYEXAMPLEKEY",
    ],
)
def test_what_looks_like_a_credential_goes_unknown_as_it_is(text: str) -> None:
    told = Redactor()(f"see {text} there")
    assert MASK in told
    for part in (
        "abcdefghij",
        "IOSFODNN7",
        "0123456789",
        "dXNlcjp",
        "pa55word",
        "XXXXXXXXXXXX",
        "abcDEF",
        "MIIEow",
        "wJalr",
        "SflKx",
    ):
        assert part not in told, part


@pytest.mark.parametrize(
    "text",
    [
        "step 5: held-out loss 4.8113, 1,234 tokens",
        '{"num_tokens": 123456789, "pad_token": "<|endoftext|>", "max_new_tokens": 128}',
        "The secret of a good password is its length.",
        "https://huggingface.co/Qwen/Qwen2.5-1.5B-Instruct?download=true",
        "see https://example.org/a?page=2&sort=asc, or write to me@example.org",
        "hf_token is a setting; HF_TOKEN=*** is shown",
        "Explain authorization: what is it, and how does a bearer Elizabeth carry the token?",
        '{"authorization": true, "next": [1, 2], "x-api-key": null}',
        "sha256 9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
    ],
)
def test_other_texts_stay_as_they_are(text: str) -> None:
    assert Redactor(["another"])(text) == text


def test_a_short_secret_of_one_word_is_none_inside_another_word() -> None:
    assert Redactor(["test"])("tester/x, test-1, contest: 'test'") == "tester/x, ***-1, contest: '***'"


def test_long_runs_of_dotted_letters_take_no_time() -> None:
    begun = time.monotonic()
    Redactor(["another secret"], {"/home/ann": "~"})("a." * 100_000 + "ha-" * 100_000 + "eyJ" * 50_000 + "bearer " * 20_000)
    assert time.monotonic() - begun < 20, "quadratic: minutes"


def test_a_secret_of_digits_does_not_tear_numbers() -> None:
    assert Redactor(["12345678"])("0.12345678, 1123456789, pin 12345678!") == "0.12345678, 1123456789, pin ***!"


def test_json_stays_json() -> None:
    value = {
        "a": "Authorization: Bearer abcdefghijklmnop",
        "b": ["https://u:p@h/x?sig=abcdefgh", "-----BEGIN PRIVATE KEY-----\nMIIEow=="],
        "c": SECRET,
        "d": "/home/ann/data/x.jsonl",
    }
    told = json.loads(Redactor([SECRET], {"/home/ann": "~"})(json.dumps(value)))
    assert told["a"].endswith(MASK) and told["c"] == MASK and told["d"] == "~/data/x.jsonl" and told.keys() == value.keys()


def test_folders_of_the_machine_become_the_names_of_settings(tmp_path: Path) -> None:
    data = tmp_path / "private" / "set.jsonl"
    data.parent.mkdir()
    data.touch()
    folders = local_folders(
        work_dir=tmp_path / "work", current=Path("/srv/job"), home="/home/ann", shown=["/srv/job/runs"], given=[data]
    )
    redact = Redactor([], folders)
    assert redact(f"{data}: row 7 of file://{data}") == "set.jsonl: row 7 of file://set.jsonl"
    relative = Redactor(
        [], local_folders(work_dir=tmp_path, current=Path("/srv"), home=None, given=[Path("clients/acme/x.jsonl")])
    )
    assert relative("DATASETS=clients/acme/x.jsonl?weight=2") == "DATASETS=x.jsonl?weight=2"
    assert redact(f"{data.parent}/other.jsonl") == "…/other.jsonl"
    assert redact(f"'{tmp_path}/work/models/m': full") == "'$WORK_DIR/models/m': full"
    assert redact("/srv/job/x /srv/job/runs/r /home/ann/.cache") == "./x /srv/job/runs/r ~/.cache"
    assert redact("/srv/jobs /home/anna https://h/home/ann") == "/srv/jobs /home/anna https://h/home/ann"


def test_variables_are_taken_for_secrets_by_their_names() -> None:
    environ = {
        "MLFLOW_TRACKING_PASSWORD": "correct horse",
        "MY_API_KEY": "0123456789",
        "TOKENIZERS_PARALLELISM": "false-or-so",
        "HF_TOKEN_FILE": "/run/secrets/hf",
        "EVAL_MAX_NEW_TOKENS": "123456789",
        "SHORT_TOKEN": "abc",
        "PATH": "/usr/bin:/bin",
        "GIT_AUTHOR_NAME": "huggingface",
        "AUTH_TYPE": "interactive",
    }
    assert guessed_secrets(environ) == ["correct horse", "0123456789"]


def test_what_libraries_print_by_themselves_is_redacted(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.StringIO()
    monkeypatch.setattr("sys.stderr", cast("TextIO", RedactedStream(written, Redactor([SECRET]))))
    logging.lastResort.handle(logging.LogRecord("lib", logging.WARNING, "f", 1, f"refused {SECRET}", None, None))  # type: ignore[union-attr]

    def fail() -> None:
        raise ValueError(f"in a thread: {SECRET}")

    thread = threading.Thread(target=fail)
    hook = threading.excepthook
    monkeypatch.setattr("threading.excepthook", lambda arguments: threading.__excepthook__(arguments))
    thread.start()
    thread.join()
    monkeypatch.setattr("threading.excepthook", hook)
    assert "S3cr3t" not in written.getvalue() and written.getvalue().count(MASK) >= 2


def test_what_a_child_process_prints_and_says_last_is_redacted(tmp_path: Path) -> None:
    """A specification that is none: the library that reads it quotes it in its traceback."""
    printed: list[str] = []
    redact = Redactor([SECRET])
    with pytest.raises(ChildFailedError) as caught:
        run_child(
            "measure",
            _Inner(text=SECRET),
            folder=tmp_path,
            environ={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
            stop=StopRequest(),
            grace_seconds=5.0,
            on_event=lambda event: printed.append(str(event)),
            on_idle=lambda: None,
            redact=redact,
            on_output=lambda line: printed.append(redact(line)),
        )
    told = "\n".join([*printed, str(caught.value)])
    assert "Traceback" in told and "validation error" in told and MASK in told and "S3cr3t" not in told


class _Inner(BaseModel):
    text: str


class _Outer(BaseModel):
    path: Path
    name: str
    inner: tuple[_Inner, ...]
    pairs: tuple[tuple[str, int], ...]


def test_an_events_texts_are_redacted_and_its_paths_stay() -> None:
    event = _Outer(path=Path(f"/x/{SECRET[:6]}"), name=SECRET, inner=(_Inner(text=f"a {SECRET}"),), pairs=((SECRET, 3),))
    told = redact_model(event, Redactor([SECRET, SECRET[:6]]))
    assert told.path == event.path
    assert (told.name, told.inner[0].text, told.pairs) == (MASK, f"a {MASK}", ((MASK, 3),))
