"""`python -m job COMMAND`: the commands, and the only place that reads os.environ for the supervisor."""

import argparse
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from job.errors import DISK_ERRORS, BudgetError, JobError, MachineError, PreemptedError, SettingsError
from job.settings import RECIPES_DIR, Configuration, default_run_id, known_names, read_settings
from job.settings.describe import describe_settings, env_example, settings_markdown

COMMANDS = {
    "run": "do the whole job, or what is left of it (the default)",
    "plan": "say whether it fits, how long it takes and what it costs, on every GPU (--gpu NAME, --num-gpus N, --json)",
    "check": "ask the store and the Hub whether the job could run; trains nothing",
    "prepare": "make the training data and stop",
    "publish": "push an adapter that is trained and in the store",
    "settings": "list every setting with its default",
    "recipes": "list the recipes",
}
PLAN_FLAGS = ("gpu", "num_gpus", "json")
"""Flags of `plan` itself; all others are settings."""


def main(arguments: Sequence[str]) -> int:
    """Run a command; returns the exit status."""
    if not arguments or arguments[0].startswith("--"):
        arguments = ["run", *arguments] if arguments[:1] != ["--help"] else arguments
    parser = argparse.ArgumentParser(
        prog="job",
        allow_abbrev=False,
        usage="python -m job [COMMAND] [--setting-name VALUE ...]",
        epilog="Every setting is also a flag: --max-length 512 is MAX_LENGTH=512. `python -m job settings` lists them.",
    )
    parser.add_argument("command", choices=COMMANDS, help="; ".join(f"{name}: {text}" for name, text in COMMANDS.items()))
    command, rest = parser.parse_known_args(arguments)
    if command.command == "settings":
        return _settings(rest)
    if command.command == "recipes":
        return _recipes()
    try:
        flags = _read_flags(rest)
        own = {name: flags.pop(name.upper()) for name in PLAN_FLAGS if name.upper() in flags} if command.command == "plan" else {}
        return _job(command.command, flags, own)
    except SettingsError as error:
        print("\n".join(str(problem) for problem in error.problems), file=sys.stderr)
        return error.exit_status
    except JobError as error:
        print(f"{'stopped' if isinstance(error, (PreemptedError, BudgetError)) else 'failed'}: {error}", file=sys.stderr)
        return error.exit_status


def _job(command: str, flags: dict[str, str], own: dict[str, str]) -> int:
    """Run a command that needs settings.

    Args:
        flags: settings from the command line.
        own: flags of the command itself.
    """
    for number in (signal.SIGTERM, signal.SIGINT):  # until StopRequest takes over: nothing is begun, nothing can be lost
        signal.signal(number, lambda *_: sys.exit(PreemptedError.exit_status))
    configuration = read_settings(os.environ, flags)
    os.environ.update(configuration.library_environ)  # before any library reads it
    for warning in configuration.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    # Imported now: a wrong setting is told in a fraction of a second.
    from job.display import Display, redactor
    from job.keep.store import open_store, within
    from job.run import Run
    from job.stopping import StopRequest

    settings = configuration.settings
    secrets = _secrets(configuration)
    signatures = {text for spec in (*settings.data.datasets, *settings.data.eval_datasets) for text in spec.signatures}
    redact = redactor([*secrets.values(), *signatures])
    names = ("aws_access_key_id", "aws_secret_access_key", "aws_session_token")
    stop = StopRequest()
    run_id = settings.keep.run_id or default_run_id(settings)
    store = open_store(settings.keep.output_uri, credentials={name: secrets[name] for name in names if name in secrets})
    try:
        with Display(usd_per_hour=settings.budget.gpu_hourly_rate, redact=redact) as display:
            display.say(f"run {run_id} in {store.uri}")
            run = Run(
                settings,
                run_id=run_id,
                store=within(store, run_id),
                shared=store,
                work=_work_folder(settings.keep.work_dir, store.uri, run_id),
                environ=os.environ,
                display=display,
                stop=stop,
            )
            if command == "plan":
                return run.plan(own)
            return {"run": run.start, "check": run.check, "prepare": run.prepare, "publish": run.publish}[command]()
    except SettingsError as error:
        raise SettingsError([redact(str(problem)) for problem in error.problems]) from None
    except JobError as error:
        raise type(error)(redact(str(error))) from None
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        raise MachineError(redact(f"{error.filename or 'a disk'}: {error.strerror}; free it, or name another place")) from None
    except Exception:  # a bug: its traceback, without a secret in it
        print(redact(traceback.format_exc()), file=sys.stderr)
        return 1


def _secrets(configuration: Configuration) -> dict[str, str]:
    section = configuration.settings.secrets
    values = {name: getattr(section, name) for name in type(section).model_fields}
    return {name: value.get_secret_value() for name, value in values.items() if value is not None}


def _work_folder(work_dir: Path, store_uri: str, run_id: str) -> Path:
    """This run's folder on this machine; another OUTPUT_URI is another run, whatever its name."""
    import hashlib

    key = hashlib.sha256(store_uri.encode()).hexdigest()[:8]
    return work_dir.expanduser().absolute() / "runs" / f"{run_id}-{key}"


def _read_flags(arguments: Sequence[str]) -> dict[str, str]:
    """`--max-length 512` and `--max-length=512` as {"MAX_LENGTH": "512"}; unknown names are reported with the others."""
    flags: dict[str, str] = {}
    rest = list(arguments)
    while rest:
        flag, separator, value = rest.pop(0).partition("=")
        if not flag.startswith("--"):
            raise SettingsError([f"{flag}: is neither a command nor a flag; flags look like --max-length 512"])
        if not separator:
            value = rest.pop(0) if rest and not rest[0].startswith("--") else "1"
        flags[flag.removeprefix("--").replace("-", "_").upper()] = value
    return flags


def _settings(arguments: Sequence[str]) -> int:
    if "--write" in arguments:  # `make docs`
        root = Path(__file__).resolve().parent.parent
        (root / "env.example").write_text(env_example(), "utf-8")
        readme = root / "README.md"
        text = readme.read_text("utf-8")
        before, _, rest = text.partition("<!-- settings -->\n")
        _, _, after = rest.partition("<!-- /settings -->")
        readme.write_text(f"{before}<!-- settings -->\n{settings_markdown()}<!-- /settings -->{after}", "utf-8")
        return 0
    from rich.console import Console
    from rich.table import Table

    table = Table("setting", "default", "what it does", title=f"{len(known_names())} names; each is also a flag")
    last = None
    for section, name, default, text in describe_settings():
        if section is not last:
            table.add_section()
            table.add_row(f"[bold]{section.title}")
            last = section
        table.add_row(name, default, text)
    Console().print(table)
    return 0


def _recipes() -> int:
    for path in sorted(RECIPES_DIR.glob("*.env")):
        header = [line.removeprefix("# ") for line in path.read_text("utf-8").splitlines() if line.startswith("#")]
        print(f"{path.stem}: {' '.join(header)}")
    return 0


if __name__ == "__main__":
    status = main(sys.argv[1:])
    for number in (signal.SIGTERM, signal.SIGINT):  # else Python puts the defaults back while it ends, and 143 hides the status
        signal.signal(number, signal.SIG_IGN)
    sys.exit(status)
