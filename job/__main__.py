"""`python -m job COMMAND`: the commands, and the only place that reads os.environ for the supervisor."""

import argparse
import os
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from job.errors import DISK_ERRORS, BudgetError, JobError, MachineError, PreemptedError, SettingsError
from job.leaving import Leaving
from job.redaction import Redactor, guessed_secrets, local_folders, redacted_streams
from job.renting import wishes
from job.settings import (
    RECIPES_DIR,
    Secrets,
    Settings,
    Where,
    default_run_id,
    known_names,
    package_file,
    read_settings,
    read_store,
)
from job.settings.describe import describe_settings, env_example, settings_markdown

COMMANDS = {
    "run": "do the whole job, or what is left of it (the default)",
    "plan": "say whether it fits, how long it takes and what it costs, on every GPU (--gpu NAME, --num-gpus N, --json)",
    "submit": "rent the cheapest GPU pod at RunPod that fits, run there and follow it (docs/pods.md has its flags)",
    "check": "ask the store and the Hub whether the job could run; trains nothing",
    "prepare": "make the training data and stop",
    "evaluate": "measure the kept checkpoints once more, for other prompts or another choice; trains nothing",
    "publish": "push an adapter that is trained and in the store",
    "history": "every run under OUTPUT_URI: what it made, cost and failed of (history URI, --html FILE, --json)",
    "settings": "list every setting with its default",
    "recipes": "list the recipes",
}
PUBLISH_THREAD = "publish"
"""Of an upload to the Hub that is under way (deliver/hub/upload.py)."""
OWN_FLAGS = {"plan": ("gpu", "num_gpus", "json"), "history": ("html", "json"), "submit": wishes.FLAGS}
"""Flags of a command itself; all others are settings."""
COMMAND_ARGUMENTS = {"history": "OUTPUT_URI"}
"""Setting that a bare word after the command is."""
SWITCHES = ("JSON", *wishes.SWITCHES)
"""Flags that take no value, so that what follows them is a word of its own."""


def main(arguments: Sequence[str]) -> int:
    """Run a command; returns the exit status."""
    sys.stdout, sys.stderr = redacted_streams(Redactor(guessed_secrets(os.environ)))  # until the settings are known
    leaving = Leaving.from_environ(os.environ, {})
    try:
        status = _run(arguments, leaving)
    except SystemExit as error:  # argparse, and a signal before a run begins
        status = error.code if isinstance(error.code, int) else 1
        if status in (0, PreemptedError.exit_status):
            raise
    except Exception:  # a bug
        traceback.print_exc()
        status = 1
    # A misspelt command was to be a run; any other command is somebody's, who is there.
    if not arguments or arguments[0] == "run" or arguments[0] not in COMMANDS:
        if "RUNPOD_POD_ID" in os.environ:  # whose log is all that tells how a container ended
            print(f"the job ends with exit status {status}", file=sys.stderr, flush=True)
        leaving.leave(status)
    return status


def _run(arguments: Sequence[str], leaving: Leaving) -> int:
    """Read the arguments and do what they say; returns the exit status."""
    if not arguments or arguments[0].startswith("--"):
        arguments = ["run", *arguments] if arguments[:1] != ["--help"] else arguments
    parser = argparse.ArgumentParser(
        prog="job",
        allow_abbrev=False,
        usage="python -m job [COMMAND] [--setting-name VALUE ...]",
        epilog="Every setting is also a flag: --max-length 512 is MAX_LENGTH=512. `python -m job settings` lists them.",
    )
    parser.add_argument("command", choices=COMMANDS, help="; ".join(f"{name}: {text}" for name, text in COMMANDS.items()))
    parsed, rest = parser.parse_known_args(arguments)
    command = str(parsed.command)
    if command == "settings":
        return _settings(rest)
    if command == "recipes":
        return _recipes()
    try:
        flags = _read_flags(rest, COMMAND_ARGUMENTS.get(command))
        own = {name: flags.pop(name.upper()) for name in OWN_FLAGS.get(command, ()) if name.upper() in flags}
        leaving.read(flags)
        status = _history(flags, own) if command == "history" else _job(command, flags, own, leaving)
    except SettingsError as error:
        print("\n".join(str(problem) for problem in error.problems), file=sys.stderr)
        status = error.exit_status
    except JobError as error:
        print(f"{'stopped' if isinstance(error, (PreemptedError, BudgetError)) else 'failed'}: {error}", file=sys.stderr)
        status = error.exit_status
    return status


def _job(command: str, flags: dict[str, str], own: dict[str, str], leaving: Leaving) -> int:
    """Run a command that needs settings.

    Args:
        flags: settings from the command line.
        own: flags of the command itself.
        leaving: learns what the end of the process has to know.
    """
    for number in (signal.SIGTERM, signal.SIGINT):  # until StopRequest takes over: nothing is begun, nothing can be lost
        signal.signal(number, lambda *_: sys.exit(PreemptedError.exit_status))
    configuration = read_settings(os.environ, flags)
    os.environ.update(configuration.library_environ)  # before any library reads it
    for warning in configuration.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    # Imported now: a wrong setting is told in a fraction of a second.
    from job.display import Display
    from job.keep.store import open_store, within
    from job.run import Run
    from job.stopping import StopRequest

    settings = configuration.settings
    secrets = _secrets(configuration.settings.secrets)
    redact = _redactor(settings, secrets)
    work_dir = settings.keep.work_dir.expanduser().absolute()
    os.environ.setdefault("MPLCONFIGDIR", str(work_dir / "matplotlib"))  # HOME may be read-only
    sys.stdout, sys.stderr = redacted_streams(redact)
    stop = StopRequest()
    leaving.is_stopped = lambda: stop.count > 0
    run_id = settings.keep.run_id or default_run_id(settings)
    store = open_store(settings.keep.output_uri, credentials=_aws(secrets), redact=redact)
    try:
        with Display(usd_per_hour=settings.budget.gpu_hourly_rate, redact=redact) as display:
            display.say(f"run {run_id} in {store.uri}")
            about: dict[str, Any] = {
                "run_id": run_id,
                "store": within(store, run_id),
                "shared": store,
                "work": _work_folder(settings.keep.work_dir, store.uri, run_id),
                "environ": os.environ,
                "display": display,
                "stop": stop,
            }
            if command == "submit":
                from job.renting.command import Submission

                return Submission(settings=settings, flags=flags, own=own, **about).run()
            run = Run(settings, **about)
            if command == "plan":
                return run.plan(own)
            if command == "run":
                leaving.know(settings)
                leaving.say, leaving.notify = display.say, run.notifier.tell
            commands = {"check": run.check, "prepare": run.prepare, "publish": run.publish, "evaluate": run.evaluate}
            return commands.get(command, run.start)()
    except SettingsError as error:
        raise SettingsError([redact(str(problem)) for problem in error.problems]) from None
    except JobError as error:
        raise type(error)(redact(str(error))) from None
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        raise MachineError(redact(f"{error.filename or 'a disk'}: {error.strerror}; free it, or name another place")) from None
    except Exception:  # a bug: its traceback, without a secret in it
        traceback.print_exc()
        return 1


def _history(flags: dict[str, str], own: dict[str, str]) -> int:
    keep, secrets_section = read_store(os.environ, flags)
    from job.deliver.history.read import run_history
    from job.keep.store import open_store

    secrets = _secrets(secrets_section)
    redact = Redactor([*secrets.values(), *guessed_secrets(os.environ)])
    sys.stdout, sys.stderr = redacted_streams(redact)
    store = open_store(keep.output_uri, credentials=_aws(secrets), redact=redact)
    with tempfile.TemporaryDirectory() as scratch:
        html = Path(own["html"]) if "html" in own else None
        if own.get("html") == "1":  # what a flag without a value is
            raise SettingsError(["--html: needs the name of the file to write, for example --html history.html"])
        return run_history(store, scratch=Path(scratch), html=html, as_json="json" in own, redact=redact)


def _aws(secrets: Mapping[str, str]) -> dict[str, str]:
    """What boto3 is given."""
    names = ("aws_access_key_id", "aws_secret_access_key", "aws_session_token")
    return {name: secrets[name] for name in names if name in secrets}


def _secrets(section: Secrets) -> dict[str, str]:
    values = {name: getattr(section, name) for name in type(section).model_fields}
    return {name: value.get_secret_value() for name, value in values.items() if value is not None}


def _redactor(settings: Settings, secrets: Mapping[str, str]) -> Redactor:
    """What must not leave this run: see redaction.py."""
    specs = (*settings.data.datasets, *settings.data.eval_datasets)
    given = [spec.local_path for spec in specs if spec.kind in (Where.LOCAL, Where.PACKAGE)]
    named = (settings.model.model_id, settings.model.chat_template, settings.data.language_model)
    given += [Path(name) for name in named if name and "/" in name and Path(name).expanduser().exists()]
    if settings.model.model_id.startswith("pkg:"):
        given.append(package_file(settings.model.model_id))
    output_uri = settings.keep.output_uri
    return Redactor(
        [*secrets.values(), *guessed_secrets(os.environ), *(text for spec in specs for text in spec.signatures)],
        local_folders(
            work_dir=settings.keep.work_dir.expanduser().absolute(),
            current=Path.cwd(),
            home=os.environ.get("HOME"),
            shown=[] if "://" in output_uri else [str(Path(output_uri).expanduser().absolute())],
            given=given,
        ),
    )


def _work_folder(work_dir: Path, store_uri: str, run_id: str) -> Path:
    """This run's folder on this machine; another OUTPUT_URI is another run, whatever its name."""
    import hashlib

    key = hashlib.sha256(store_uri.encode()).hexdigest()[:8]
    return work_dir.expanduser().absolute() / "runs" / f"{run_id}-{key}"


def _read_flags(arguments: Sequence[str], bare: str | None = None) -> dict[str, str]:
    """`--max-length 512` and `--max-length=512` as {"MAX_LENGTH": "512"}; unknown names are reported with the others.

    Args:
        bare: the setting that a word without a flag before it is.
    """
    flags: dict[str, str] = {}
    rest = list(arguments)
    while rest:
        flag, separator, value = rest.pop(0).partition("=")
        if not flag.startswith("--") and bare is not None and bare not in flags:
            flags[bare] = flag if not separator else f"{flag}={value}"
            continue
        if not flag.startswith("--"):
            raise SettingsError([f"{flag}: is neither a command nor a flag; flags look like --max-length 512"])
        name = flag.removeprefix("--").replace("-", "_").upper()
        if not separator:
            value = rest.pop(0) if rest and not rest[0].startswith("--") and name not in SWITCHES else "1"
        flags[name] = value
    return flags


def _settings(arguments: Sequence[str]) -> int:
    if "--write" in arguments:  # `make docs`
        from job.deliver.schema import schema_text

        root = Path(__file__).resolve().parent.parent
        (root / "docs" / "report.schema.json").write_text(schema_text(), "utf-8")
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
    # The Hub's library shares work out to threads that would be waited for, with all that is still queued.
    if any(thread.name == PUBLISH_THREAD for thread in threading.enumerate()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
