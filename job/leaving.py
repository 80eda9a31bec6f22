"""The last act of a process: what becomes of the rented machine. An exit status in; the machine stopped, deleted or left, out.

Known before any setting is read is only what the environment says, for a wrong setting must not leave a pod billing.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from job.settings import FinishSettings, Settings

OWN_FILE_SYSTEMS = ("tmpfs", "ramfs", "overlay")
"""They go with the container."""


def _nothing(_: str) -> None:
    pass


@dataclass(kw_only=True, slots=True)
class Leaving:
    """What is known of the end so far; each stage of the start knows more.

    Attributes:
        say: shows a line, redacted.
        notify: tells WEBHOOK_URL.
        is_stopped: whether a signal came.
        has_told: whether WEBHOOK_URL knows already how it ended.
    """

    environ: Mapping[str, str]
    finish: FinishSettings
    api_key: str | None = None
    output_is_off_machine: bool = False
    say: Callable[[str], None] = print
    notify: Callable[[str], None] = _nothing
    is_stopped: Callable[[], bool] = field(default=lambda: False)

    @classmethod
    def from_environ(cls, environ: Mapping[str, str], flags: Mapping[str, str]) -> "Leaving":
        """What can be known while the settings are not read, or are wrong."""
        leaving = cls(environ=environ, finish=FinishSettings())
        leaving.read(flags)
        return leaving

    def read(self, flags: Mapping[str, str]) -> None:
        """Take over what environment and flags say."""
        given = {**self.environ, **flags}
        asked = given.get("ON_FINISH") or "exit"
        try:
            self.finish = FinishSettings.model_validate(
                {"on_finish": asked, "fail_grace_minutes": given.get("FAIL_GRACE_MINUTES") or 15.0}
            )
        except ValueError:  # the settings' own error tells
            self.finish = FinishSettings(on_finish="stop" if asked != "exit" else "exit")
        self.api_key = given.get("RUNPOD_API_KEY") or None

    def know(self, settings: Settings) -> None:
        """Take over the settings, once they are read."""
        key = settings.secrets.runpod_api_key
        self.finish = settings.finish
        self.api_key = key.get_secret_value() if key else None
        self.output_is_off_machine = is_off_machine(settings.keep.output_uri, self.environ)

    def leave(self, exit_status: int) -> None:
        """Stop, delete or leave the machine; never raises."""
        if self.finish.on_finish == "exit":
            return
        from job.deliver.machine import finish_machine  # with it comes the network

        finish_machine(
            on_finish=self.finish.on_finish,
            fail_grace_minutes=self.finish.fail_grace_minutes,
            exit_status=exit_status,
            environ=self.environ,
            api_key=self.api_key,
            output_is_off_machine=self.output_is_off_machine,
            say=self.say,
            is_stopped=self.is_stopped,
            notify=self.notify,
        )


def is_off_machine(output_uri: str, environ: Mapping[str, str]) -> bool:
    """Whether the results outlive a pod that is deleted: they are on S3, or on a network volume and not the pod's own disk."""
    if "://" in output_uri:
        return True
    if not environ.get("RUNPOD_VOLUME_ID"):
        return False
    try:
        path = Path(output_uri).expanduser().resolve()
        mounts = [line.split()[1:3] for line in Path("/proc/self/mounts").read_text("utf-8").splitlines()]
        holding = [(len(where), kind) for where, kind in mounts if where != "/" and path.is_relative_to(where)]
    except (OSError, ValueError, IndexError):
        return False
    return bool(holding) and max(holding)[1] not in OWN_FILE_SYSTEMS
