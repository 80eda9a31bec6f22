"""Layers of settings in, one frozen Settings or every problem at once out; which settings make another run."""

import json
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import pytest
from dotenv import dotenv_values
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pydantic import ValidationError

from job.errors import Problem, SettingsError
from job.settings import (
    RECIPES_DIR,
    Configuration,
    DatasetSpec,
    Secrets,
    Settings,
    Where,
    default_run_id,
    known_names,
    read_settings,
)
from job.settings.describe import describe_settings, env_example, settings_markdown

NEEDED = {"MODEL_ID": "owner/model", "DATASETS": "owner/data"}
NOWHERE = Path("/nowhere/at/all")
"""A folder without an env file."""

SECRET_NAMES = [field.upper() for field in Secrets.model_fields]
SETTING_NAMES = [
    name
    for name in known_names()
    if name not in ("RECIPE", "JOB_ENV_FILE") and (not name.endswith("_FILE") or name == "GPU_PRICES_FILE")
]

BAD_VALUES: dict[str, tuple[str, ...]] = {
    "MODEL_ID": ("/nowhere/model", "a/b/c", "nowhere.gguf", "pkg:job/nowhere.gguf", "pkg:nowhere/model.gguf"),
    "LOAD_IN_4BIT": ("perhaps",),
    "LOAD_IN_8BIT": ("2",),
    "DTYPE": ("int4",),
    "ATTN_IMPLEMENTATION": ("flash",),
    "TRUST_REMOTE_CODE": ("perhaps",),
    "LORA_R": ("0", "-8", "1.5", "abc"),
    "LORA_ALPHA": ("0", "abc"),
    "LORA_DROPOUT": ("1", "-0.1", "abc"),
    "USE_RSLORA": ("perhaps",),
    "USE_DORA": ("perhaps",),
    "DATASETS": (
        "nowhere.jsonl",
        " , ",
        "not an id",
        "owner/data?limt=3",
        "owner/data?limit=0",
        "pkg:job/nowhere.csv",
        "/nowhere/folder",
    ),
    "LEARN": ("user",),
    "LANGUAGE_MIN_CONFIDENCE": ("1.1", "-0.1", "nan"),
    "MIN_TOKENS": ("0",),
    "MAX_LENGTH": ("7", "2k"),
    "CHAT_TEMPLATE": ("/nowhere/template.jinja", "qwen2_6"),
    "EVAL_DATASETS": ("nowhere.jsonl", "owner/data?limt=3"),
    "SYSTEM_PROMPT_MODE": ("remove",),
    "LANGUAGE_MODEL": ("large", "/nowhere/lid.bin"),
    "OVERLONG": ("cut",),
    "MIN_TURNS": ("0",),
    "MAX_TURNS": ("0",),
    "KEEP_REGEX": ("(",),
    "DROP_REGEX": ("[a",),
    "REPAIR_TEXT": ("perhaps",),
    "DROP_REPETITIVE": ("perhaps",),
    "MASK_PII": ("perhaps",),
    "DEDUP": ("fuzzy",),
    "MIX": ("stir",),
    "MAX_SAMPLES": ("0",),
    "MAX_TOKENS": ("0", "1e6"),
    "MIN_SAMPLES": ("0",),
    "MAX_UNLEARNED": ("1.1", "-0.1"),
    "ORDER": ("random",),
    "KEEP_DROPPED": ("perhaps",),
    "DATASET_NUM_PROC": ("0", "all"),
    "EVAL_FRACTION": ("0.6", "-0.1"),
    "NUM_TRAIN_EPOCHS": ("0", "inf"),
    "MAX_STEPS": ("0", "-1"),
    "LEARNING_RATE": ("0", "-1e-4", "abc", "nan", "inf"),
    "LR_SCHEDULER_TYPE": ("sine",),
    "WARMUP_STEPS": ("-1", "inf"),
    "WEIGHT_DECAY": ("-1",),
    "MAX_GRAD_NORM": ("0",),
    "EFFECTIVE_BATCH_SIZE": ("0",),
    "PER_DEVICE_TRAIN_BATCH_SIZE": ("0", "automatic"),
    "GRADIENT_ACCUMULATION_STEPS": ("0",),
    "NPROC_PER_NODE": ("0", "-1", "all", "1.5"),
    "PARALLEL": ("fsdp2", "tensor"),
    "PREPARE_ON": ("head:8786", "ray://head:10001", "tcp://head", "tcp://me:secret@head:8786"),
    "ACTIVATION_CHECKPOINTING": ("perhaps",),
    "SEED": ("-1", "1.5", "4294967296"),  # numpy and with it transformers' set_seed take 32 bits
    "LOGGING_STEPS": ("0",),
    "EVAL_STEPS": ("0",),
    "TRAIN_ARGS": ("[1]", "{", "abc", '{"deepspeed": "zero3.json"}', '{"fsdp": true}'),
    "OUTPUT_URI": ("gs://bucket/prefix", "s3://", "s3:///prefix"),
    "RUN_ID": ("owner/name", "-name", "a" * 97),
    "SAVE_INTERVAL": ("0", "often"),
    "SAVE_STEPS": ("0",),
    "SAVE_TOTAL_LIMIT": ("0",),
    "GRACE_SECONDS": ("0",),
    "HANG_SECONDS": ("0", "never"),
    "GPU_HOURLY_RATE": ("0", "free"),
    "GPU_PRICES_FILE": ("/nowhere/prices.json",),
    "MAX_COST_USD": ("0", "$30", "inf"),
    "MAX_HOURS": ("0", "-1", "one day"),
    "PUBLISH_ON_BUDGET": ("perhaps",),
    "HUB_MODEL_ID": ("name", "a/b/c"),
    "HUB_PRIVATE_REPO": ("perhaps",),
    "PUBLISH_MERGED": ("perhaps",),
    "HUB_MERGED_MODEL_ID": ("name", "a/b/c"),
    "REPORT_TO": ("wandbb", "all", "wandb,excel"),
    "SELECT_BY": ("loss", "best"),
    "EVAL_SCORER": ("bleu",),
    "EVAL_PROMPTS": ("nowhere.jsonl", "/nowhere/prompts.txt"),
    "EVAL_MAX_NEW_TOKENS": ("0", "8193"),
    "ON_FINISH": ("halt", "shutdown"),
    "FAIL_GRACE_MINUTES": ("-1", "soon"),
    "WEBHOOK_URL": ("hooks.slack.com/x", "ftp://h/x", "https://"),
}
# Values that are wrong only beside other settings, here beside their defaults.
BAD_TOGETHER = {
    "LOAD_IN_8BIT": "1",
    "EARLY_STOPPING_PATIENCE": "2",
    "PER_DEVICE_TRAIN_BATCH_SIZE": "3",
    "GRADIENT_ACCUMULATION_STEPS": "2",
    "SELECT_BY": "score",
    "HUB_MERGED_MODEL_ID": "me/merged",
}
WITHOUT_RULE = {
    "MODEL_REVISION",
    "LORA_TARGET_MODULES",
    "SYSTEM_PROMPT",
    "LANGUAGE",
    "OPTIM",
    "WORK_DIR",
    "HUB_REVISION",
    *(name for name in SECRET_NAMES if name != "WEBHOOK_URL"),
}


def read(environ: Mapping[str, str], flags: Mapping[str, str] | None = None, *, folder: Path = NOWHERE) -> Configuration:
    return read_settings(environ, flags or {}, folder=folder)


def settings_of(**changes: str) -> Settings:
    return read(NEEDED | changes).settings


def problems_of(environ: Mapping[str, str], flags: Mapping[str, str] | None = None, *, folder: Path = NOWHERE) -> SettingsError:
    with pytest.raises(SettingsError) as caught:
        read(environ, flags, folder=folder)
    return caught.value


def names_in(error: SettingsError) -> list[str]:
    """The setting that each problem is about, sorted."""
    return sorted(problem.setting if isinstance(problem, Problem) else problem.partition("=")[0] for problem in error.problems)


def write_env_file(folder: Path, text: str, name: str = ".env") -> str:
    path = folder / name
    path.write_text(text, "utf-8")
    return str(path)


# Layers


@pytest.mark.parametrize(
    "layers",
    [
        {"environ"},
        {"flags"},
        {"file"},
        {"file", "environ"},
        {"file", "flags"},
        {"environ", "flags"},
        {"file", "environ", "flags"},
    ],
)
def test_the_strongest_layer_wins_and_the_others_fill_the_gaps(tmp_path: Path, layers: set[str]) -> None:
    file_text = "LORA_R=11\n" + ("SEED=1\n" if "file" in layers else "")
    environ = NEEDED | {"JOB_ENV_FILE": write_env_file(tmp_path, file_text, "job.env"), "LORA_ALPHA": "22"}
    flags = {"MAX_LENGTH": "333"}
    if "environ" in layers:
        environ["SEED"] = "2"
    if "flags" in layers:
        flags["SEED"] = "3"
    settings = read(environ, flags).settings
    strongest = 3 if "flags" in layers else 2 if "environ" in layers else 1
    assert settings.train.seed == strongest
    assert (settings.lora.lora_r, settings.lora.lora_alpha, settings.data.max_length) == (11, 22, 333)


def test_the_env_file_of_the_folder_is_read_when_no_other_is_named(tmp_path: Path) -> None:
    write_env_file(tmp_path, "SEED=1\n")
    other = write_env_file(tmp_path, "LORA_R=11\n", "other.env")
    assert read(NEEDED, folder=tmp_path).settings.train.seed == 1
    named = read(NEEDED | {"JOB_ENV_FILE": other}, folder=tmp_path).settings
    assert (named.train.seed, named.lora.lora_r) == (42, 11)
    by_flag = read(NEEDED, {"JOB_ENV_FILE": other}, folder=tmp_path).settings
    assert by_flag.lora.lora_r == 11


def test_a_named_env_file_that_does_not_exist_is_a_problem() -> None:
    assert names_in(problems_of(NEEDED | {"JOB_ENV_FILE": "/nowhere/job.env"})) == ["JOB_ENV_FILE"]


def test_a_recipe_is_the_weakest_layer_wherever_it_is_named(tmp_path: Path) -> None:
    recipe = dotenv_values(RECIPES_DIR / "smoke.env")
    assert recipe["EFFECTIVE_BATCH_SIZE"] not in (None, "16")  # else the recipe and the default could not be told apart
    assert {"SEED", "LORA_R"}.isdisjoint(recipe)
    write_env_file(tmp_path, "RECIPE=smoke\nSEED=1\n")
    by_name, by_file = {"RECIPE": "smoke"}, {"JOB_ENV_FILE": str(tmp_path / ".env")}
    nothing: dict[str, str] = {}
    for environ, flags in ((by_name, nothing), (nothing, by_name), (by_file, nothing)):
        read_in = read(NEEDED | environ, flags).settings
        assert str(read_in.train.effective_batch_size) == recipe["EFFECTIVE_BATCH_SIZE"]
        assert [spec.where for spec in read_in.data.datasets] == ["owner/data"]
    env_file = write_env_file(tmp_path, "RECIPE=smoke\nEFFECTIVE_BATCH_SIZE=64\nLANGUAGE=\n")
    settings = read(NEEDED | {"JOB_ENV_FILE": env_file}).settings
    assert settings.train.effective_batch_size == 64
    assert ",".join(settings.data.language) == recipe["LANGUAGE"]


@pytest.mark.parametrize("path", sorted(RECIPES_DIR.glob("*.env")), ids=lambda path: path.stem)
def test_a_recipe_holds_nothing_but_known_settings_with_good_values(path: Path) -> None:
    # The model may live in a package that is not installed here.
    assert read({"MODEL_ID": "owner/model"}, {"RECIPE": path.stem}).library_environ == {}


def test_an_unknown_recipe_is_a_problem() -> None:
    error = problems_of(NEEDED | {"RECIPE": "nowhere"})
    assert names_in(error) == ["RECIPE"]
    assert "RECIPE=nowhere: no such recipe" in str(error)


@pytest.mark.parametrize("name", sorted({"LEARNING_RATE", "MAX_STEPS", "DTYPE", "LANGUAGE", "HF_TOKEN"}))
def test_an_empty_string_means_unset(name: str) -> None:
    assert settings_of(**{name: ""}) == settings_of()


def test_an_empty_string_in_a_strong_layer_leaves_the_weaker_value(tmp_path: Path) -> None:
    write_env_file(tmp_path, "SEED=1\nLORA_R=\n")
    settings = read(NEEDED | {"SEED": ""}, {"SEED": ""}, folder=tmp_path).settings
    assert (settings.train.seed, settings.lora.lora_r) == (1, 16)


def test_an_empty_model_id_is_a_missing_model_id() -> None:
    error = problems_of(NEEDED | {"MODEL_ID": ""})
    assert names_in(error) == ["MODEL_ID"]
    assert "MODEL_ID: is required" in str(error)


def test_foreign_names_in_the_environment_are_ignored_and_near_misses_are_warned_of() -> None:
    configuration = read(NEEDED | {"PATH": "/bin", "HOME": "/root", "LEARNING_RTE": "1"})
    assert len(configuration.warnings) == 1
    assert "LEARNING_RTE" in configuration.warnings[0]
    assert "did you mean LEARNING_RATE?" in configuration.warnings[0]


LIBRARY_VARIABLES = {
    "HF_ENDPOINT": "http://localhost:1",
    "HF_HOME": "/cache",
    "HF_HUB_OFFLINE": "1",
    "HF_TOKEN_PATH": "/cache/token",
    "AWS_ENDPOINT_URL_S3": "http://localhost:2",
    "AWS_DEFAULT_REGION": "eu-central-1",
    "AWS_PROFILE": "me",
    "CUDA_VISIBLE_DEVICES": "0",
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",
    "TOKENIZERS_PARALLELISM": "false",
    "WANDB_PROJECT": "mine",
}


def test_variables_of_libraries_in_the_env_file_are_handed_back_unread(tmp_path: Path) -> None:
    write_env_file(tmp_path, "".join(f"{name}={value}\n" for name, value in LIBRARY_VARIABLES.items()) + "SEED=1\n")
    assert read(NEEDED | {"HF_DATASETS_CACHE": "/elsewhere"}, folder=tmp_path).library_environ == LIBRARY_VARIABLES


# Problems


def test_three_mistakes_in_one_env_file_are_three_problems(tmp_path: Path) -> None:
    write_env_file(tmp_path, "MODEL_ID=owner/model\nDATASETS=nowhere.jsonl\nLEARNING_RATE=abc\nLORA_RR=8\n")
    error = problems_of({}, folder=tmp_path)
    assert names_in(error) == ["DATASETS", "LEARNING_RATE", "LORA_RR"]
    lines = {line.partition("=")[0]: line for line in str(error).splitlines()}
    assert len(lines) == 3
    assert "did you mean LORA_R?" in lines["LORA_RR"]
    assert "nowhere.jsonl" in lines["DATASETS"]
    assert "LEARNING_RATE=abc" in lines["LEARNING_RATE"]


def test_nothing_at_all_names_the_two_required_settings() -> None:
    error = problems_of({})
    assert names_in(error) == ["DATASETS", "MODEL_ID"]
    assert str(error).count("is required") == 2
    assert error.exit_status == 2


def test_every_setting_has_bad_values_or_is_known_to_take_anything() -> None:
    assert sorted(BAD_VALUES.keys() | BAD_TOGETHER.keys() | WITHOUT_RULE) == sorted(SETTING_NAMES)
    assert not (BAD_VALUES.keys() | BAD_TOGETHER.keys()) & WITHOUT_RULE


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD_VALUES.items() for value in values])
def test_one_bad_value_names_its_setting_and_nothing_else(name: str, value: str) -> None:
    error = problems_of(NEEDED | {name: value})
    assert names_in(error) == [name]
    assert f"{name}={'***' if name in SECRET_NAMES else value}" in str(error)


@pytest.mark.parametrize(("name", "value"), BAD_TOGETHER.items())
def test_a_value_that_contradicts_other_settings_names_its_setting(name: str, value: str) -> None:
    error = problems_of(NEEDED | {name: value})
    assert names_in(error) == [name]
    assert f"{name}={value}" in str(error)


@given(
    bad=st.dictionaries(st.sampled_from(sorted(BAD_VALUES)), st.integers(0, 9), min_size=1, max_size=8),
    by_flag=st.sets(st.sampled_from(sorted(BAD_VALUES))),
)
@hypothesis_settings(max_examples=60, deadline=None)
def test_any_number_of_bad_values_in_any_layer_are_all_named_at_once(bad: dict[str, int], by_flag: set[str]) -> None:
    values = {name: BAD_VALUES[name][choice % len(BAD_VALUES[name])] for name, choice in bad.items()}
    flags = {name: value for name, value in values.items() if name in by_flag}
    environ = NEEDED | {name: value for name, value in values.items() if name not in by_flag}
    assert names_in(problems_of(environ, flags)) == sorted(values)


def test_an_unknown_flag_is_a_problem_with_a_suggestion() -> None:
    error = problems_of(NEEDED, {"LEARNINGRATE": "1e-4"})
    assert names_in(error) == ["LEARNINGRATE"]
    assert "did you mean LEARNING_RATE?" in str(error)


def test_a_lower_case_name_in_an_env_file_is_a_problem_with_a_suggestion(tmp_path: Path) -> None:
    write_env_file(tmp_path, "max_length=512\n")
    assert "did you mean MAX_LENGTH?" in str(problems_of(NEEDED, folder=tmp_path))


# Secrets

tokens = st.from_regex(r"planted[A-Za-z0-9]{12,40}", fullmatch=True)


def secret_of(name: str, token: str) -> str:
    """A value that this secret may have."""
    return f"https://host/{token}" if name == "WEBHOOK_URL" else token


def test_a_secret_is_read_from_its_file_without_the_line_end(tmp_path: Path) -> None:
    path = write_env_file(tmp_path, "hf_planted\n", "token")
    token = settings_of(HF_TOKEN_FILE=path).secrets.hf_token
    assert token is not None
    assert token.get_secret_value() == "hf_planted"


def test_a_secret_file_in_a_stronger_layer_beats_the_secret_in_a_weaker_one(tmp_path: Path) -> None:
    write_env_file(tmp_path, "HF_TOKEN=weak\n")
    path = write_env_file(tmp_path, "strong", "token")
    token = read(NEEDED | {"HF_TOKEN_FILE": path}, folder=tmp_path).settings.secrets.hf_token
    assert token is not None
    assert token.get_secret_value() == "strong"


@pytest.mark.parametrize("name", SECRET_NAMES)
def test_a_missing_secret_file_is_a_problem(name: str) -> None:
    error = problems_of(NEEDED | {f"{name}_FILE": "/nowhere/secret"})
    assert names_in(error) == [f"{name}_FILE"]
    assert "cannot be read" in str(error)


def test_a_secret_file_that_is_a_folder_or_not_text_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\x80")
    for path in (tmp_path, tmp_path / "binary"):
        assert names_in(problems_of(NEEDED | {"HF_TOKEN_FILE": str(path)})) == ["HF_TOKEN_FILE"]


@pytest.mark.parametrize("name", SECRET_NAMES)
def test_a_secret_and_its_file_in_one_layer_are_a_problem(tmp_path: Path, name: str) -> None:
    path = write_env_file(tmp_path, "planted-in-file", "secret")
    error = problems_of(NEEDED | {name: secret_of(name, "planted-in-variable"), f"{name}_FILE": path})
    assert names_in(error) == [f"{name}_FILE"]
    assert "planted" not in str(error)


def written_down(configuration: Configuration) -> str:
    """Everything that could reach a log or a file by accident."""
    settings = configuration.settings
    return "\n".join(
        [
            repr(settings),
            str(settings),
            repr(configuration),
            json.dumps(settings.without_secrets()),
            settings.model_dump_json(),
            repr(settings.model_dump()),
            *configuration.warnings,
            default_run_id(settings),
        ]
    )


@given(name=st.sampled_from(SECRET_NAMES), token=tokens, by_flag=st.booleans())
@hypothesis_settings(max_examples=40, deadline=None)
def test_a_planted_secret_is_kept_and_never_shown(name: str, token: str, by_flag: bool) -> None:
    given = {name: secret_of(name, token)}
    configuration = read(NEEDED | ({} if by_flag else given), given if by_flag else {})
    assert getattr(configuration.settings.secrets, name.lower()).get_secret_value() == given[name]
    assert token not in written_down(configuration)
    assert "secrets" not in configuration.settings.without_secrets()


@given(name=st.sampled_from(SECRET_NAMES), token=tokens, bad=st.sampled_from(sorted(BAD_VALUES)))
@hypothesis_settings(max_examples=60, deadline=None)
def test_a_planted_secret_is_not_in_the_error_about_another_setting(name: str, token: str, bad: str) -> None:
    error = problems_of(NEEDED | {name: secret_of(name, token)} | {bad: BAD_VALUES[bad][0]})
    assert names_in(error) == [bad]
    assert token not in "".join(traceback.format_exception(error)) + repr(error) + repr(error.problems)


# As misspelt as one slip makes them, and names of secrets that are not ours.
@pytest.mark.parametrize(
    "name",
    [
        "HF_TOKN",
        "HFTOKEN",
        "HF_TOKE",
        "WANDB_API_KY",
        "RUNPOD_API_KE",
        "AWS_SECRET_ACCESS_KEYS",
        "OPENAI_API_KEY",
        "DB_PASSWORD",
        "my_secret",
    ],
)
def test_an_unknown_name_that_looks_like_a_secret_is_masked(tmp_path: Path, name: str) -> None:
    write_env_file(tmp_path, f"{name}=planted-token\n")
    error = problems_of(NEEDED, folder=tmp_path)
    assert names_in(error) == [name]
    assert "planted-token" not in str(error)
    assert f"{name}=***" in str(error)


def test_an_unknown_name_that_is_no_secret_shows_its_value(tmp_path: Path) -> None:
    write_env_file(tmp_path, "LORA_RR=8\n")
    assert "LORA_RR=8" in str(problems_of(NEEDED, folder=tmp_path))


# DATASETS


def test_data_sets_are_separated_by_commas_and_lines() -> None:
    specs = settings_of(DATASETS="owner/one, owner/two?limit=3\nowner/three,\n\n").data.datasets
    assert [(spec.where, spec.limit) for spec in specs] == [("owner/one", None), ("owner/two", 3), ("owner/three", None)]


def test_the_options_of_a_data_set_are_read() -> None:
    spec = DatasetSpec.parse("owner/data?config=en&split=test&revision=abc&limit=5&prompt=q&completion=long+answer")
    assert spec == DatasetSpec(
        where="owner/data",
        config="en",
        split="test",
        revision="abc",
        limit=5,
        columns={"prompt": "q", "completion": "long answer"},
    )


def test_an_unknown_option_is_refused_with_a_suggestion() -> None:
    with pytest.raises(ValueError, match=r"owner/data has an unknown option 'limt' \(did you mean limit\?\)"):
        DatasetSpec.parse("owner/data?limt=3")


def test_a_wrong_value_of_an_option_names_the_option() -> None:
    with pytest.raises(ValueError, match="option limit=many"):
        DatasetSpec.parse("owner/data?limit=many")


def test_all_wrong_data_sets_are_named_at_once() -> None:
    error = str(problems_of(NEEDED | {"DATASETS": "nowhere.jsonl,owner/fine,elsewhere.csv"}))
    assert "nowhere.jsonl: no such file" in error
    assert "elsewhere.csv: no such file" in error
    assert "owner/fine:" not in error


def test_a_web_address_keeps_the_parameters_that_are_not_ours() -> None:
    spec = DatasetSpec.parse("https://host/rows.jsonl?X-Signature=a%2Fb%3D&limit=5&expires=9&prompt=q&completion=a")
    assert spec.kind is Where.HTTP
    assert dict(parse_qsl(urlsplit(spec.where).query)) == {"X-Signature": "a/b=", "expires": "9"}
    assert (spec.limit, spec.columns) == (5, {"prompt": "q", "completion": "a"})


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("owner/name", Where.HUB),
        ("name", Where.HUB),
        ("pkg:job/samples/messages.jsonl", Where.PACKAGE),
        ("s3://bucket/rows.jsonl.gz", Where.S3),
        ("http://host/rows.csv", Where.HTTP),
        (__file__ + "?format=txt", Where.LOCAL),
    ],
)
def test_the_kind_of_a_data_set_follows_from_its_address(text: str, kind: Where) -> None:
    assert DatasetSpec.parse(text).kind is kind


def test_a_file_whose_name_does_not_say_its_format_needs_one() -> None:
    with pytest.raises(ValueError, match="add \\?format="):
        DatasetSpec.parse(__file__)


words = st.text(alphabet=st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=12)


@given(
    where=st.sampled_from(
        [
            "owner/name",
            "pkg:job/samples/code.csv",
            "s3://bucket/a/b.parquet",
            "https://host/rows.json",
            "https://host/rows.jsonl?sig=a%26b%3Dc&expires=9",
        ]
    ),
    options=st.fixed_dictionaries(
        {},
        optional={
            "config": words,
            "split": st.sampled_from(["train", "train[:5]", "[2:9]"]),
            "revision": words,
            "limit": st.integers(1, 10**9),
            "format": st.sampled_from(["jsonl", "json", "csv", "parquet", "txt"]),
            "sample_by": st.sampled_from(["line", "paragraph", "document"]),
            "columns": st.dictionaries(st.sampled_from(["prompt", "completion", "text", "system", "messages"]), words),
        },
    ),
)
@hypothesis_settings(max_examples=150, deadline=None)
def test_a_data_set_as_text_reads_back_as_itself(where: str, options: dict[str, Any]) -> None:
    spec = DatasetSpec(where=where, **({"columns": {}} | options))
    assert DatasetSpec.parse(str(spec)) == spec


# Settings as a value


def test_settings_do_not_change() -> None:
    settings = settings_of()
    for target, name, value in ((settings, "train", settings.train), (settings.train, "seed", 1)):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(target, name, value)
    with pytest.raises(ValidationError, match="frozen"):
        setattr(settings.data.datasets[0], "limit", 1)  # noqa: B010 - mypy would object to the plain form


def test_prompts_come_from_lines_or_from_a_file(tmp_path: Path) -> None:
    path = write_env_file(tmp_path, "First?\n\n  Second? \n", "prompts.txt")
    for value, expected in ((path, ["First?", "Second?"]), ("One?\nTwo?", ["One?", "Two?"])):
        assert [prompt.prompt for prompt in settings_of(EVAL_PROMPTS=value).evaluate.eval_prompts] == expected


def test_prompts_without_a_scorer_get_the_one_that_is_set(tmp_path: Path) -> None:
    path = write_env_file(tmp_path, '{"prompt": "2+2?", "expected": "4"}\n{"prompt": "Tell."}\n', "prompts.jsonl")
    assert [one.scorer for one in settings_of(EVAL_PROMPTS=path).evaluate.eval_prompts] == ["contains", None]
    exact = settings_of(EVAL_PROMPTS=path, EVAL_SCORER="exact_match", SELECT_BY="score").evaluate
    assert [one.scorer for one in exact.eval_prompts] == ["exact_match", None] and exact.is_scored


# The run's identity


def test_the_same_settings_are_the_same_run_whatever_layer_they_come_from(tmp_path: Path) -> None:
    write_env_file(tmp_path, "MODEL_ID=owner/model\nSEED=7\n")
    one = read({"DATASETS": "owner/data"}, folder=tmp_path).settings
    two = read({}, NEEDED | {"SEED": "7"}).settings
    assert default_run_id(one) == default_run_id(two)
    assert default_run_id(one).startswith("model-")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("OUTPUT_URI", "s3://bucket/prefix"),
        ("SAVE_STEPS", "10"),
        ("GPU_HOURLY_RATE", "1.5"),
        ("MAX_COST_USD", "30"),
        ("MAX_HOURS", "12"),
        ("PUBLISH_ON_BUDGET", "1"),
        ("HF_TOKEN", "planted"),
        ("PER_DEVICE_TRAIN_BATCH_SIZE", "4"),
        ("ACTIVATION_CHECKPOINTING", "1"),
        ("NPROC_PER_NODE", "2"),
        ("PARALLEL", "fsdp"),
        ("RUN_ID", "mine"),
        ("LOGGING_STEPS", "5"),
        ("EVAL_PROMPTS", "What?"),
        ("SELECT_BY", "last"),
        ("REPORT_TO", "wandb,mlflow"),
        ("ON_FINISH", "stop"),
        ("WEBHOOK_URL", "https://host/planted"),
        ("PUBLISH_MERGED", "1"),
        ("HUB_MODEL_ID", "me/adapter"),
        ("WORK_DIR", "/scratch"),
    ],
)
def test_a_setting_that_does_not_change_the_result_does_not_change_the_run(name: str, value: str) -> None:
    changed = settings_of(**{name: value})
    assert changed != settings_of()
    assert default_run_id(changed) == default_run_id(settings_of())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MODEL_ID", "other/model"),
        ("MODEL_REVISION", "abc"),
        ("LEARNING_RATE", "1e-4"),
        ("SEED", "1"),
        ("LORA_R", "8"),
        ("MAX_LENGTH", "512"),
        ("SYSTEM_PROMPT", "Be brief."),
        ("EFFECTIVE_BATCH_SIZE", "32"),
        ("TRAIN_ARGS", '{"adam_beta2": 0.95}'),
        ("DATASETS", "owner/data?limit=5"),
        ("DATASETS", "owner/data?revision=abc"),
        ("DATASETS", "owner/data?prompt=q&completion=a"),
        ("DATASETS", "owner/data,owner/more"),
    ],
)
def test_a_setting_that_changes_the_result_changes_the_run(name: str, value: str) -> None:
    assert default_run_id(settings_of(**{name: value})) != default_run_id(settings_of())


def test_the_micro_batch_changes_the_run_where_it_decides_the_effective_batch() -> None:
    small = settings_of(PER_DEVICE_TRAIN_BATCH_SIZE="2", GRADIENT_ACCUMULATION_STEPS="4")
    large = settings_of(PER_DEVICE_TRAIN_BATCH_SIZE="4", GRADIENT_ACCUMULATION_STEPS="4")
    assert default_run_id(small) != default_run_id(large)


def test_a_data_file_counts_by_what_it_holds_and_not_by_where_it_lies(tmp_path: Path) -> None:
    here, there = tmp_path / "rows.jsonl", tmp_path / "deep" / "others.jsonl"
    there.parent.mkdir()
    here.write_text('{"text": "a"}\n', "utf-8")
    before = default_run_id(settings_of(DATASETS=f"{here}?limit=5"))
    here.rename(there)
    assert default_run_id(settings_of(DATASETS=f"{there}?limit=5")) == before
    assert default_run_id(settings_of(DATASETS=f"{there}?limit=6")) != before
    there.write_text('{"text": "b"}\n', "utf-8")
    assert default_run_id(settings_of(DATASETS=f"{there}?limit=5")) != before


def test_a_data_file_that_is_read_in_another_format_is_another_run(tmp_path: Path) -> None:
    for name in ("rows.csv", "rows.txt"):
        (tmp_path / name).write_text("text\nhello\n", "utf-8")
    ids = {default_run_id(settings_of(DATASETS=str(tmp_path / name))) for name in ("rows.csv", "rows.txt")}
    assert len(ids) == 2


def test_a_chat_template_counts_by_what_it_holds_and_not_by_where_it_lies(tmp_path: Path) -> None:
    here, there = tmp_path / "a.jinja", tmp_path / "b.jinja"
    here.write_text("one", "utf-8")
    before = default_run_id(settings_of(CHAT_TEMPLATE=str(here)))
    assert before != default_run_id(settings_of())
    here.rename(there)
    assert default_run_id(settings_of(CHAT_TEMPLATE=str(there))) == before
    there.write_text("two", "utf-8")
    assert default_run_id(settings_of(CHAT_TEMPLATE=str(there))) != before


def test_a_local_model_counts_by_its_files_and_not_by_where_it_lies(tmp_path: Path) -> None:
    here, there = tmp_path / "a" / "tiny", tmp_path / "b" / "tiny"
    here.mkdir(parents=True)
    there.parent.mkdir()
    (here / "config.json").write_text('{"hidden_size": 8}', "utf-8")
    (here / "model.safetensors").write_bytes(b"12345678")
    before = default_run_id(settings_of(MODEL_ID=str(here)))
    here.rename(there)
    assert default_run_id(settings_of(MODEL_ID=str(there))) == before
    (there / "config.json").write_text('{"hidden_size": 9}', "utf-8")
    assert default_run_id(settings_of(MODEL_ID=str(there))) != before


@given(
    model_id=st.from_regex(r"[A-Za-z0-9._-]{1,120}", fullmatch=True).filter(lambda text: text[0] != "." and text[-5:] != ".gguf")
)
@hypothesis_settings(max_examples=100, deadline=None)
def test_every_default_run_id_is_a_valid_run_id(model_id: str) -> None:
    run_id = default_run_id(settings_of(MODEL_ID=f"owner/{model_id}"))
    assert settings_of(RUN_ID=run_id).keep.run_id == run_id


# Documentation


def test_the_documentation_names_and_explains_every_setting() -> None:
    documented = {name: text for _, name, _, text in describe_settings()}
    assert sorted(documented) == sorted(SETTING_NAMES)
    assert [name for name, text in documented.items() if len(text) < 15] == []
    table, example = settings_markdown(), env_example()
    for name in SETTING_NAMES:
        assert table.count(f"| `{name}` |") == 1
        assert example.count(f"\n# {name}=") == 1


def test_the_example_env_file_with_every_line_uncommented_gives_the_defaults(tmp_path: Path) -> None:
    lines = (line.removeprefix("# ") for line in env_example().splitlines())
    named = [line for line in lines if line.partition("=")[0] in SETTING_NAMES]
    assert len(named) == len(SETTING_NAMES)
    write_env_file(tmp_path, "\n".join(named))
    assert read(NEEDED, folder=tmp_path).settings == settings_of()
