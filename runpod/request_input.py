"""A request's `input` in, the settings of its run out: names, rules and errors are those of the environment.

A value may be text or what JSON has for it: numbers, true and false, a list where a setting takes several, an object for
TRAIN_ARGS; null and "" are as good as left out. Nothing but settings gets through, so no request changes what the worker's
processes are made of. Refused are credentials too, whatever they are called and wherever they stand: RunPod keeps a request,
and shows it.
"""

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any, get_args, get_origin

from job.errors import Problem, SettingsError
from job.redaction import Redactor, guessed_secrets
from job.settings import Configuration, Secrets, known_names, read_settings
from job.settings.read import sections

MAX_BYTES = 100_000
"""Of one value. Linux takes 128 KiB for one variable with its name (MAX_ARG_STRLEN)."""
SHOWN_CHARACTERS = 200
"""Of a wrong value in an answer."""
LINES_ONLY = ("EVAL_PROMPTS",)
"""Lists whose entries may hold commas."""


def read_input(given: object, environ: Mapping[str, str]) -> tuple[dict[str, str], Configuration]:
    """Check a request together with the worker's environment; returns (what the request sets, all settings).

    Raises:
        SettingsError: names every problem of both, and no credential.
    """
    if not isinstance(given, dict):
        example = '{"input": {"MODEL_ID": "Qwen/Qwen2.5-1.5B-Instruct", "DATASETS": "mlabonne/FineTome-100k"}}'
        raise SettingsError([f"input: must be an object of settings, for example {example}"])
    problems: list[Problem | str] = []
    texts: dict[str, str] = {}
    for name, value in given.items():
        if problem := _refusal(name):
            problems.append(problem)
            continue
        try:
            text = _text(name, value)
        except ValueError as error:
            problems.append(Problem(setting=name, value=None, rule=str(error), way_out="correct it or leave it out"))
            continue
        if Redactor()(text) != text:
            problems.append(_secret(name, "holds a credential"))
        elif text:
            texts[name] = text
    configuration = None
    try:
        configuration = read_settings(environ, texts)
    except SettingsError as error:
        told = {problem.setting for problem in problems if isinstance(problem, Problem)}
        problems += [_in_our_words(one) for one in error.problems if not (isinstance(one, Problem) and one.setting in told)]
    if problems or configuration is None:
        raise SettingsError(list(_shortened(problems, Redactor(guessed_secrets(environ)))))
    return texts, configuration


def _refusal(name: str) -> Problem | None:
    """Why a name may not be in a request, whatever its value is."""
    if name.removesuffix("_FILE").lower() in Secrets.model_fields or (
        name not in known_names() and guessed_secrets({name: "any value would do"})
    ):
        return _secret(name, "is a credential")
    if name.endswith("_FILE"):
        return Problem(
            setting=name,
            value=None,
            rule="no setting of a request has this name (it names a file of the worker)",
            way_out="set it in the endpoint's environment",
        )
    return None


def _secret(name: str, rule: str) -> Problem:
    return Problem(
        setting=name,
        value=None,
        rule=f"{rule}, and RunPod keeps and shows requests; it was not used",
        way_out="make it a RunPod secret and set it in the endpoint's environment; renew it if it is a real one",
    )


def _text(name: str, value: object) -> str:
    """What the environment would hold.

    Raises:
        ValueError: says why there is no such text.
    """
    takes_list, takes_object = _takes(name)
    if isinstance(value, list) and takes_list:
        text = "\n".join(_entry(name, entry) for entry in value)
    elif isinstance(value, dict) and takes_object:
        text = json.dumps(value)
    else:
        text = _scalar(value)
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise ValueError("is no valid text (half of a surrogate pair)") from None
    if "\0" in text:
        raise ValueError("holds a NUL character")
    if size > MAX_BYTES:
        raise ValueError(f"is {size:,} bytes long, and {MAX_BYTES:,} is the limit")
    return text


def _entry(name: str, value: object) -> str:
    text = _scalar(value)
    if "\n" in text or ("," in text and name not in LINES_ONLY):
        raise ValueError("an entry of the list holds a comma or a line end, and would count as several")
    return text


def _scalar(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "1" if value else "0"
    if isinstance(value, str):
        return value
    if isinstance(value, (int, float)):
        if not math.isfinite(value):
            raise ValueError("must be a finite number")
        return repr(value)
    raise ValueError(f"takes text, a number, true or false, and not {'a list' if isinstance(value, list) else 'an object'}")


def _takes(name: str) -> tuple[bool, bool]:
    """Whether a setting takes a list, and whether it takes an object."""
    for _, section in sections():
        field = section.model_fields.get(name.lower())
        if field is not None and name.isupper():
            origins = set(_origins(field.annotation))
            return tuple in origins, dict in origins
    return False, False


def _origins(annotation: Any) -> Iterator[Any]:
    yield get_origin(annotation) or annotation
    for part in get_args(annotation):
        yield from _origins(part)


def _in_our_words(problem: Problem | str) -> Problem | str:
    if isinstance(problem, str):
        return problem
    rule = problem.rule.replace("(command line)", "(input)")
    return Problem(setting=problem.setting, value=problem.value, rule=rule, way_out=problem.way_out)


def _shortened(problems: list[Problem | str], redact: Redactor) -> Iterator[Problem | str]:
    for problem in problems:
        if isinstance(problem, str):
            yield redact(problem)
            continue
        value = None if problem.value is None else redact(problem.value)
        if value is not None and len(value) > SHOWN_CHARACTERS:
            value = f"{value[:SHOWN_CHARACTERS]}…"
        name = redact(problem.setting)[:SHOWN_CHARACTERS]
        yield Problem(setting=name, value=value, rule=redact(problem.rule), way_out=redact(problem.way_out))
