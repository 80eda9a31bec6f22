"""Layers of `NAME=value` text in (weakest first: recipe, env file, environment, flags), one frozen `Settings` out.

Every problem is reported at once. What is not handled here: whether servers, disks or GPUs agree (`preflight.py`).
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, cast

from dotenv import dotenv_values
from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from job.errors import Problem, SettingsError
from job.settings.data import DataSettings
from job.settings.evaluate import EvaluateSettings
from job.settings.keep import BudgetSettings, FinishSettings, KeepSettings, PublishSettings, Secrets
from job.settings.section import Section
from job.settings.train import LoraSettings, ModelSettings, TrainSettings

RECIPES_DIR = Path(__file__).resolve().parent.parent / "recipes"
CONTROL_NAMES = ("RECIPE", "JOB_ENV_FILE")
# Variables that an env file may hold for the libraries below us; they are exported unread.
LIBRARY_PREFIXES = (
    "HF_",
    "AWS_",
    "CUDA_",
    "NCCL_",
    "OMP_",
    "PYTORCH_",
    "TORCH",
    "TOKENIZERS_",
    "WANDB_",
    "RUNPOD_",
    "NVIDIA_",
    "MLFLOW_",
    "TRACKIO_",
    "TENSORBOARD_",
)
_EXAMPLES = {"MODEL_ID": "Qwen/Qwen2.5-1.5B-Instruct", "DATASETS": "mlabonne/FineTome-100k"}
_LOOKS_SECRET = re.compile(r"TOKEN|KEY|SECRET|PASSW|CREDENTIAL|WEBHOOK|AUTH|DSN|DATABASE_URL", re.IGNORECASE)


class _FlatSource(PydanticBaseSettingsSource):
    """One layer of flat upper-case names, sorted into sections."""

    def __init__(self, settings_cls: type[BaseSettings], layer: Mapping[str, str]) -> None:
        super().__init__(settings_cls)
        self._layer = layer

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        section = field.annotation
        assert isinstance(section, type) and issubclass(section, Section)
        values = {name: self._layer[name.upper()] for name in section.model_fields if self._layer.get(name.upper())}
        return values, field_name, True

    def __call__(self) -> dict[str, Any]:
        fields = self.settings_cls.model_fields.items()
        return {name: self.get_field_value(field, name)[0] for name, field in fields}


class Settings(BaseSettings):
    """All that was asked for; each stage takes its own section."""

    model_config = SettingsConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    model: ModelSettings
    lora: LoraSettings
    data: DataSettings
    train: TrainSettings
    evaluate: EvaluateSettings
    keep: KeepSettings
    budget: BudgetSettings
    publish: PublishSettings
    finish: FinishSettings
    secrets: Secrets

    @classmethod
    def settings_customise_sources(
        cls, settings_cls: type[BaseSettings], init_settings: PydanticBaseSettingsSource, *_: Any, **__: Any
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        layers = init_settings().get("layers", [])
        return tuple(_FlatSource(settings_cls, layer) for layer in reversed(layers))

    def without_secrets(self) -> dict[str, Any]:
        """Everything that may be written down, JSON-ready, by section."""
        return self.model_dump(mode="json", exclude={"secrets"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Configuration:
    """What `read_settings` found."""

    settings: Settings
    library_environ: dict[str, str]
    """Variables from the env file that belong to libraries: export them before importing any."""
    warnings: tuple[str, ...]


def sections() -> Iterable[tuple[str, type[Section]]]:
    """(name, type) of each section, in order of declaration."""
    for name, field in Settings.model_fields.items():
        assert isinstance(field.annotation, type) and issubclass(field.annotation, Section)
        yield name, field.annotation


def known_names() -> list[str]:
    """Every setting's upper-case name, secrets' `_FILE` forms included."""
    names = [field.upper() for _, section in sections() for field in section.model_fields]
    return [*names, *(f"{name}_FILE" for name in _secret_names()), *CONTROL_NAMES]


def read_settings(environ: Mapping[str, str], flags: Mapping[str, str], *, folder: Path = Path()) -> Configuration:
    """Merge the layers and validate them.

    Args:
        environ: the process's environment; names that are not ours are ignored.
        flags: settings from the command line, upper-case names.
        folder: where `.env` is looked for when JOB_ENV_FILE does not name another file.

    Raises:
        SettingsError: names every problem found in any layer.
    """
    problems: list[Problem] = []
    control = {**environ, **flags}
    env_file = _read_env_file(control.get("JOB_ENV_FILE"), folder, problems)
    recipe_name = control.get("RECIPE") or env_file.get("RECIPE")
    recipe = _read_recipe(recipe_name, problems) if recipe_name else {}
    known = set(known_names())
    library_environ = {}
    for origin, layer in ((f"recipe {recipe_name}", recipe), ("env file", env_file)):
        for name, value in layer.items():
            if name in known:
                continue
            if name.startswith(LIBRARY_PREFIXES) and not _nearest(name):
                library_environ[name] = value
            else:
                problems.append(_unknown(name, value, origin))
    for name in flags.keys() - known:
        problems.append(_unknown(name, flags[name], "command line"))

    layers = [_open_secret_files(layer, problems) for layer in (recipe, env_file, environ, flags)]
    try:
        settings = Settings(**cast("dict[str, Any]", {"layers": layers}))
    except ValidationError as error:
        merged = {name: value for layer in layers for name, value in layer.items() if value}
        details = error.errors(include_input=False, include_url=False)
        raise SettingsError([*problems, *_explain(details, merged)]) from None
    if problems:
        raise SettingsError(problems)
    warnings = tuple(
        f"{name} is set, and no setting has that name: did you mean {near}?"
        for name in environ.keys() - known
        if (near := _nearest(name, cutoff=0.92)) and near not in environ
    )
    return Configuration(settings=settings, library_environ=library_environ, warnings=warnings)


def read_store(environ: Mapping[str, str], flags: Mapping[str, str], *, folder: Path = Path()) -> tuple[KeepSettings, Secrets]:
    """Where runs are kept and what opens it, for who asks after no run of its own; all other settings may be wrong.

    Raises:
        SettingsError: names every problem found in them.
    """
    problems: list[Problem] = []
    env_file = _read_env_file({**environ, **flags}.get("JOB_ENV_FILE"), folder, problems)
    known = set(known_names())
    problems += [_unknown(name, flags[name], "command line") for name in flags.keys() - known]
    merged: dict[str, str] = {}
    for layer in (env_file, environ, flags):
        merged |= {name: value for name, value in _open_secret_files(layer, problems).items() if value}
    if problems:
        raise SettingsError(problems)
    try:
        keep, secrets = (
            section.model_validate({name: merged[name.upper()] for name in section.model_fields if name.upper() in merged})
            for section in (KeepSettings, Secrets)
        )
    except ValidationError as error:
        details = [{**detail, "loc": ("", *detail["loc"])} for detail in error.errors(include_input=False, include_url=False)]
        raise SettingsError(_explain(details, merged)) from None
    assert isinstance(keep, KeepSettings) and isinstance(secrets, Secrets)
    return keep, secrets


def _secret_names() -> list[str]:
    return [field.upper() for field in Secrets.model_fields]


def _nearest(name: str, cutoff: float = 0.8) -> str | None:
    return next(iter(get_close_matches(name.upper(), known_names(), n=1, cutoff=cutoff)), None)


def _unknown(name: str, value: str, origin: str) -> Problem:
    near = _nearest(name, cutoff=0.6)
    return Problem(
        setting=name,
        value="***" if _LOOKS_SECRET.search(name) or near in _secret_names() else value,
        rule=f"no setting has this name ({origin})",
        way_out=f"did you mean {near}?" if near else "`python -m job settings` lists all of them",
    )


def _read_env_file(named: str | None, folder: Path, problems: list[Problem]) -> dict[str, str]:
    path = Path(named) if named else folder / ".env"
    if not path.is_file():
        if named:
            problems.append(
                Problem(setting="JOB_ENV_FILE", value=named, rule="no such file", way_out="correct the path or leave it out")
            )
        return {}
    return {name: value or "" for name, value in dotenv_values(path, interpolate=False).items()}


def _read_recipe(name: str, problems: list[Problem]) -> dict[str, str]:
    recipes = {path.stem: path for path in RECIPES_DIR.glob("*.env")}
    if name not in recipes:
        problems.append(
            Problem(setting="RECIPE", value=name, rule="no such recipe", way_out=f"choose one of {', '.join(sorted(recipes))}")
        )
        return {}
    return {key: value or "" for key, value in dotenv_values(recipes[name], interpolate=False).items()}


def _open_secret_files(layer: Mapping[str, str], problems: list[Problem]) -> dict[str, str]:
    """Replace each `<SECRET>_FILE` by the secret that the file holds."""
    opened = dict(layer)
    for name in _secret_names():
        if not (path := layer.get(f"{name}_FILE")):
            continue
        if layer.get(name):
            rule, way_out = f"{name} is set too", "set one of the two"
        else:
            try:
                opened[name] = Path(path).read_text("utf-8").strip()
                continue
            except (OSError, UnicodeDecodeError) as error:
                rule, way_out = f"cannot be read ({type(error).__name__})", "name a readable text file"
        problems.append(Problem(setting=f"{name}_FILE", value=path, rule=rule, way_out=way_out))
    return opened


def _explain(details: Iterable[Mapping[str, Any]], given: Mapping[str, str]) -> list[Problem | str]:
    """One problem per wrong setting, in our words."""
    rules: dict[str, list[str]] = {}
    whole: list[Problem | str] = []
    for detail in details:
        message = detail["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
        if len(detail["loc"]) == 1:  # a rule over several settings of a section: the message is complete
            whole.append(message)
            continue
        name = str(detail["loc"][1]).upper()
        rule = "is required" if detail["type"] == "missing" else message
        rules.setdefault(name, []).append(rule)
    secrets = _secret_names()
    for name, texts in rules.items():
        value = given.get(name)
        default = _default(name)
        if value is None:
            way_out = f"set it, for example {name}={_EXAMPLES.get(name, '...')}, or try RECIPE=smoke"
        elif default is None:
            way_out = f"correct it, for example {name}={_EXAMPLES[name]}" if name in _EXAMPLES else "correct it or leave it out"
        else:
            way_out = f"correct it, or leave it out for the default {default}"
        shown = "***" if name in secrets else value
        whole.append(Problem(setting=name, value=shown, rule=" or ".join(texts), way_out=way_out))
    return whole


def _default(name: str) -> str | None:
    for _, section in sections():
        field = section.model_fields.get(name.lower())
        if field is not None and not field.is_required():
            default = field.get_default(call_default_factory=True, validated_data={})
            return None if default in (None, (), {}) else str(default)
    return None
