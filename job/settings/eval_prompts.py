"""The value of `EVAL_PROMPTS`: lines, or the name of a file of lines or JSON, in; the prompts with what is right for each out.

Nothing is scored here (`job/scoring`). What is wrong in a file is said when the settings are read: a pattern that does not
compile, tests that are no Python, a misspelt key.
"""

import ast
import gzip
import json
import re
import warnings
import zlib
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from job.settings.dataset_spec import data_suffixes, package_file

Scorer = Literal["exact_match", "contains", "regex", "json", "python"]
SCORERS: tuple[str, ...] = get_args(Scorer)

MAX_PROMPTS = 1000
"""Each is answered by every kept checkpoint: at a second an answer, a thousand are a quarter of an hour each time."""
MAX_FILE_BYTES = 16 * 2**20
"""Unpacked; a thousand prompts of 4,000 tokens."""

_FIELD_OF = {name: name for name in ("prompt", "system", "scorer", "expected", "tests", "entry_point")} | {
    "question": "prompt",
    "instruction": "prompt",
    "answer": "expected",
}
"""Key of a row -> field of `EvalPrompt`."""
_HUMAN_EVAL = {"task_id", "prompt", "entry_point", "test"}
_KINDS = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}


class EvalPrompt(BaseModel):
    """A prompt that is answered before, while and after training, and what makes an answer right."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, hide_input_in_errors=True)

    prompt: str
    """What the user says; shown beside the answers."""
    system: str | None = None
    """System message before it."""
    scorer: Scorer | None = None
    """How the answer is scored; None: it is only shown."""
    expected: tuple[str, ...] = ()
    """Right answers, any of them: texts for exact_match and contains, patterns for regex, JSON for json."""
    tests: str | None = None
    """Python that runs after the answer's code; it raises when the answer is wrong."""
    entry_point: str | None = None
    """Function that the tests use; an answer that does not define it is taken to continue the prompt."""

    @model_validator(mode="after")
    def _can_be_scored(self) -> "EvalPrompt":
        if not self.prompt.strip():
            raise ValueError("`prompt` is empty; write what the user says")
        if any(not text.strip() for text in self.expected):
            raise ValueError("`expected` holds an empty answer; leave it out")
        if self.scorer in ("exact_match", "contains", "regex") and not self.expected:
            raise ValueError(f"scorer {self.scorer} needs `expected`; add the right answer or leave the scorer out")
        if self.scorer == "python" and not (self.tests or "").strip():
            raise ValueError("scorer python needs `tests`; add Python that raises when the answer is wrong")
        if self.tests is not None and self.scorer != "python":
            raise ValueError(f"`tests` are run by scorer python, not {self.scorer}; change the one or leave out the other")
        if self.scorer == "regex":
            _check_patterns(self.expected)
        if self.scorer == "json":
            _check_json(self.expected)
        if self.tests is not None:
            _check_python(self.tests)
        return self


def _check_patterns(patterns: tuple[str, ...]) -> None:
    for pattern in patterns:
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"`expected` {pattern!r} is no regular expression ({error}); correct it, or use contains") from None


def _check_json(texts: tuple[str, ...]) -> None:
    for text in texts:
        try:
            parse_json(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"`expected` {text!r} is no JSON ({error}); text needs its quotes: '\"yes\"'") from None


def parse_json(text: str) -> Any:
    """Parse JSON by its standard: NaN and Infinity, which Python adds, are none.

    Raises:
        ValueError: it is none; RecursionError: it is nested too deeply.
    """

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no JSON value")

    return json.loads(text, parse_constant=refuse)


def _check_python(tests: str) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "\d" in tests is the user's style
            ast.parse(tests)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"`tests` are no Python ({error}); correct them") from None


class _File(NamedTuple):
    name: str
    """As the user wrote it."""
    path: Path


def read_eval_prompts(text: str, default_scorer: str | None) -> tuple[EvalPrompt, ...]:
    """Read prompts written one a line, or the file that the text names.

    A file is `.txt` (one prompt a line), `.jsonl` (one object a line) or `.json` (a list of objects), each also with `.gz`;
    `pkg:package/file` is one inside an installed package. Rows of HumanEval are taken as they are. A row with `expected`
    and no scorer gets the default one, else `contains`; a row with neither `expected` nor `tests` is only shown.

    Raises:
        ValueError: with the file, the line, what is wrong and the way out.
    """
    file = _find_file(text.strip())
    if file is None:
        prompts = _read_lines(text)
        where = "the text"
    else:
        where = file.name
        prompts = _read_file(file, default_scorer)
        if not prompts:
            raise ValueError(f"{where} holds no prompt; write one a line, or leave EVAL_PROMPTS out")
    if len(prompts) > MAX_PROMPTS:
        raise ValueError(f"{where} holds {len(prompts):,} prompts: at most {MAX_PROMPTS:,} are answered; shorten it")
    return prompts


def _find_file(text: str) -> _File | None:
    """The file that the text names; None where it is the prompts themselves."""
    if "\n" in text or not text:
        return None
    if text.startswith("pkg:"):
        try:
            path = package_file(text)
        except FileNotFoundError as error:
            raise ValueError(f"{text}: {error}; install it, or correct the name") from None
    else:
        try:
            path = Path(text).expanduser()
            path.stat()
        except (OSError, RuntimeError, ValueError):  # no such file, no such home, a null byte
            if any(data_suffixes(text)):
                raise ValueError(
                    f"{text}: no such file (looked in {Path.cwd()}); correct the path, or end a prompt with a full stop"
                ) from None
            return None
    if path.is_dir():
        if any(mark in text for mark in "/~."):
            raise ValueError(f"{text} is a folder; name a file in it")
        return None  # a prompt of one word
    return _File(text, path)


def _read_file(file: _File, default_scorer: str | None) -> tuple[EvalPrompt, ...]:
    kind, compression = data_suffixes(file.name)
    if kind not in (None, "txt", "json", "jsonl") or compression == "zstd":
        raise ValueError(f"{file.name}: prompts are read from .txt, .json and .jsonl, also with .gz; convert it")
    text = _read_text(file, packed=compression == "gzip")
    if kind not in ("json", "jsonl"):
        return _read_lines(text)
    rows = _json_rows(file.name, text) if kind == "json" else _jsonl_rows(file.name, text)
    prompts = []
    for where, row in rows:
        try:
            prompts.append(_read_row(row, default_scorer))
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            raise ValueError(f"{where}: {first['msg'].removeprefix('Value error, ')}") from None
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    return tuple(prompts)


def _read_text(file: _File, *, packed: bool) -> str:
    try:
        with gzip.open(file.path) if packed else file.path.open("rb") as stream:
            data = stream.read(MAX_FILE_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{file.name} cannot be read ({error}); correct the file or name another") from None
    if len(data) > MAX_FILE_BYTES:
        raise ValueError(f"{file.name} is larger than {MAX_FILE_BYTES // 2**20} MiB; shorten it, this is no data set")
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{file.name}, line {line}: is not UTF-8 text; save it as UTF-8") from None


def _read_lines(text: str) -> tuple[EvalPrompt, ...]:
    return tuple(EvalPrompt(prompt=line.strip()) for line in text.split("\n") if line.strip())


def _jsonl_rows(name: str, text: str) -> Iterator[tuple[str, Any]]:
    # Not splitlines(): a JSON string may hold U+2028 as it is.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            where = f"{name}, line {number}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{where}: is no JSON ({error}); write one object a line, or a list in a .json file") from None
            yield where, row


def _json_rows(name: str, text: str) -> Iterator[tuple[str, Any]]:
    try:
        rows = json.loads(text) if text.strip() else []
    except json.JSONDecodeError as error:
        raise ValueError(f"{name}, line {error.lineno}: is no JSON ({error.msg}); correct it") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name}: is no JSON ({error}); correct it") from None
    if not isinstance(rows, list):
        raise ValueError(f"{name} holds {_kind(rows)}, not a list of objects; put it in [ ], or name the file .jsonl")
    yield from ((f"{name}, entry {number}", row) for number, row in enumerate(rows, start=1))


def _kind(value: Any) -> str:
    return _KINDS.get(type(value), "null")


def _read_row(row: Any, default_scorer: str | None) -> EvalPrompt:
    if not isinstance(row, dict):
        raise ValueError(f'is {_kind(row)}, not an object; write {{"prompt": "...", "expected": "..."}}')
    if row.keys() >= _HUMAN_EVAL:
        row = {
            "prompt": row["prompt"],
            "entry_point": row["entry_point"],
            "tests": f"{row['test']}\ncheck({row['entry_point']})\n",
        }
    fields: dict[str, Any] = {}
    for key, value in row.items():
        field = _FIELD_OF.get(key)
        if field is None:
            nearest = get_close_matches(key, _FIELD_OF, n=1)
            hint = f"did you mean {nearest[0]}?" if nearest else f"known keys: {', '.join(_FIELD_OF)}"
            raise ValueError(f"has an unknown key {key!r}; {hint}")
        if value is None:
            continue
        if field in fields:
            raise ValueError(f"gives `{field}` twice, once as {key!r}; leave one out")
        if field != "expected" and not isinstance(value, str):
            raise ValueError(f"{key!r} is {_kind(value)}; write it as text")
        fields[field] = value
    if "prompt" not in fields:
        raise ValueError("has no `prompt`; write what the user says")
    scorer = _pick_scorer(fields, default_scorer)
    expected = _read_expected(fields["expected"], scorer) if "expected" in fields else ()
    return EvalPrompt.model_validate(fields | {"scorer": scorer, "expected": expected})


def _pick_scorer(fields: Mapping[str, Any], default_scorer: str | None) -> str | None:
    scorer: str | None = fields.get("scorer")
    if scorer is None:
        if "tests" in fields:
            return "python"
        return default_scorer or "contains" if "expected" in fields else None
    if scorer not in SCORERS:
        nearest = get_close_matches(scorer, SCORERS, n=1)
        raise ValueError(
            f"knows no scorer {scorer!r}; " + (f"did you mean {nearest[0]}?" if nearest else f"choose of {', '.join(SCORERS)}")
        )
    return scorer


def _read_expected(value: Any, scorer: str | None) -> tuple[str, ...]:
    """One right answer or a list of them; for json, what is no text stands for itself."""
    entries = value if isinstance(value, list) else [value]
    texts = []
    for entry in entries:
        if isinstance(entry, str):
            texts.append(entry)
        elif scorer == "json":
            texts.append(json.dumps(entry, ensure_ascii=False))
        elif isinstance(entry, int | float) and not isinstance(entry, bool):
            texts.append(str(entry))
        else:
            raise ValueError(f"`expected` holds {_kind(entry)}; write text or a list of texts (only json takes other values)")
    return tuple(texts)
