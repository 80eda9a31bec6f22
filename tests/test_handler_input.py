"""What a request may say: the settings of the environment with JSON's values, and nothing else."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from request_input import MAX_BYTES, read_input

from job.errors import SettingsError
from job.settings import known_names, read_settings

NEEDED = {"MODEL_ID": "owner/model", "DATASETS": "owner/data"}
SECRET = "planted-value-4711-abc"


def problems(request: object, environ: dict[str, str] | None = None) -> list[str]:
    with pytest.raises(SettingsError) as failure:
        read_input(request, environ or {})
    return [str(problem) for problem in failure.value.problems]


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("MAX_LENGTH", 512, "512"),
        ("LEARNING_RATE", 1e-5, "0.00001"),
        ("USE_DORA", True, "1"),
        ("LOAD_IN_4BIT", False, "0"),
        ("LANGUAGE", ["tr", "en"], "tr,en"),
        ("DATASETS", ["a/b?split=train", "c/d"], "a/b?split=train,c/d"),
        ("EVAL_PROMPTS", ["One, two, ...", "What is 1 + 1?"], "One, two, ...\nWhat is 1 + 1?"),
        ("TRAIN_ARGS", {"adam_beta1": 0.8}, '{"adam_beta1": 0.8}'),
        ("MAX_STEPS", None, ""),
        ("MAX_STEPS", "", ""),
    ],
)
def test_a_value_of_json_is_the_same_setting_as_its_text_in_the_environment(name: str, value: Any, text: str) -> None:
    _, configuration = read_input({**NEEDED, name: value}, {})
    assert configuration.settings == read_settings({**NEEDED, name: text}, {}).settings


@settings(max_examples=40, deadline=None)
@given(
    wrong=st.dictionaries(
        st.sampled_from(["MAX_LENGTH", "LEARNING_RATE", "LORA_R", "SELECT_BY", "OUTPUT_URI", "USE_DORA", "MAX_HOURS"]),
        st.sampled_from(["x", "-1", "0", "ftp://a", "1e999", "maybe"]),
        min_size=1,
    )
)
def test_the_errors_are_those_of_the_environment_whatever_is_wrong(wrong: dict[str, str]) -> None:
    expected, found = None, None
    try:
        read_settings({**NEEDED, **wrong}, {})
    except SettingsError as error:
        expected = [str(problem) for problem in error.problems]
    try:
        read_input({**NEEDED, **wrong}, {})
    except SettingsError as error:
        found = [str(problem) for problem in error.problems]
    assert found == expected


def test_a_request_wins_over_the_worker_and_both_are_checked_at_once() -> None:
    texts, configuration = read_input({**NEEDED, "MAX_LENGTH": 64}, {"MAX_LENGTH": "128", "SEED": "7"})
    assert (configuration.settings.data.max_length, configuration.settings.train.seed) == (64, 7)
    assert "SEED" not in texts
    told = problems({**NEEDED, "MAX_LENGTH": 0}, {"SEED": "seven"})
    assert [one.partition("=")[0] for one in told] == ["MAX_LENGTH", "SEED"]


@pytest.mark.parametrize(
    "name",
    [
        "PATH",
        "LD_PRELOAD",
        "PYTHONPATH",
        "JOB_FAULT",
        "CUDA_VISIBLE_DEVICES",
        "AWS_ENDPOINT_URL_S3",
        "HF_ENDPOINT",
        "max_length",
        "",
    ],
)
def test_a_name_that_is_no_setting_is_refused(name: str) -> None:
    (told,) = problems({**NEEDED, name: "/x"})
    assert told.startswith(f"{name}=/x: no setting has this name")


@pytest.mark.parametrize("name", ["JOB_ENV_FILE", "GPU_PRICES_FILE"])
def test_a_file_of_the_worker_is_named_in_its_environment_only(name: str) -> None:
    (told,) = problems({**NEEDED, name: "/etc/passwd"})
    assert told.startswith(f"{name}: ") and "endpoint's environment" in told


@pytest.mark.parametrize(
    "name", ["HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "WEBHOOK_URL", "HF_TOKEN_FILE", "OPENAI_API_KEY", "MLFLOW_TRACKING_TOKEN"]
)
def test_a_credential_is_refused_and_not_repeated(name: str) -> None:
    (told,) = problems({**NEEDED, name: SECRET})
    assert told.startswith(f"{name}: is a credential") and "RunPod secret" in told and SECRET not in told


@pytest.mark.parametrize(
    "value",
    ["hf_plantedtoken0123456789", "https://user:planted-value@host/x.jsonl", "https://host/x?X-Amz-Signature=planted-value"],
)
def test_a_credential_inside_a_value_is_refused_and_not_repeated(value: str) -> None:
    (told,) = problems({**NEEDED, "DATASETS": ["a/b", value]})
    assert told.startswith("DATASETS: holds a credential") and "planted" not in told


def test_a_secret_of_the_worker_is_in_no_answer() -> None:
    (told,) = problems({**NEEDED, "SELECT_BY": SECRET}, {"HF_TOKEN": SECRET})
    assert told.startswith("SELECT_BY=***") and SECRET not in told


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("LEARNING_RATE", float("nan"), "finite"),
        ("SYSTEM_PROMPT", "\ud800", "surrogate"),
        ("SYSTEM_PROMPT", "a\0b", "NUL"),
        ("SYSTEM_PROMPT", "x" * (MAX_BYTES + 1), "limit"),
        ("MODEL_ID", ["a/b"], "not a list"),
        ("LANGUAGE", {"tr": 1}, "not an object"),
        ("LANGUAGE", [["tr"]], "not a list"),
        ("DATASETS", ["a/b,c/d"], "comma"),
    ],
)
def test_what_cannot_be_a_variable_is_a_problem_of_its_setting_alone(name: str, value: Any, rule: str) -> None:
    (told,) = problems({**NEEDED, name: value})
    assert told.startswith(f"{name}: ") and rule in told


def test_a_long_wrong_value_is_shortened_in_the_answer() -> None:
    (told,) = problems({**NEEDED, "MAX_LENGTH": "9" * 5000})
    assert len(told) < 1000


VALUES: st.SearchStrategy[Any] = st.sampled_from(
    [None, True, 0, -1, 1e400, 0.5, "", "x", "a,b", "a\nb", "\0", "\udc80", "s3://", "auto", {}, {"a": []}, [[]]]
)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.sampled_from(known_names()), VALUES | st.lists(VALUES, max_size=2), max_size=6))
def test_any_request_is_either_settings_or_problems(request: dict[str, Any]) -> None:
    try:
        texts, _ = read_input({**NEEDED, **request}, {})
    except SettingsError as error:
        told = json.dumps([str(problem) for problem in error.problems], ensure_ascii=False)
    else:
        told = "\n".join(texts.values())
        assert all(name in known_names() and "\0" not in text for name, text in texts.items())
    told.encode()
