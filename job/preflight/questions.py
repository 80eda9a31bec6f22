"""What only libraries can ask that the supervisor shall not import: the Hub, the data sets, the language detector.

They run in a child process, which ends: pyarrow, `datasets` and the Hub's client would stay in the supervisor's memory for all
of the training (150 MB), and a process of their own can be told to give servers up soon.
"""

from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from job.errors import JobError, error_for_status
from job.events import Checked, Event, EventWriter
from job.preflight.clock import Clock
from job.preflight.outcome import WARNING, Check, Result, start
from job.settings import DataSettings, ModelSettings, PublishSettings, Settings, Where, is_hub_id

PATIENCE_SECONDS = 25.0
"""Each question gives up sooner by itself; a server that sends a byte now and then would hold it for ever."""
SHORT_TIMEOUTS = {"HF_HUB_ETAG_TIMEOUT": "5", "HF_HUB_DOWNLOAD_TIMEOUT": "10"}
DATA_SETS, BASE_MODEL = "data sets", "base model"


class CheckSpec(BaseModel):
    """What is to be asked; None and False where it is not."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: ModelSettings | None
    data: DataSettings | None
    publish: PublishSettings | None
    has_token: bool
    work_dir: Path
    store_folder: Path | None

    @property
    def is_empty(self) -> bool:
        return self.model is None and self.data is None and self.publish is None


def make_spec(settings: Settings, *, store_folder: Path | None, has_data: bool, is_trained: bool) -> CheckSpec:
    """Ask only what is still to be used: a run that goes on needs less."""
    asks_data, asks_model = not (has_data or is_trained), not is_trained
    specs = (*settings.data.datasets, *settings.data.eval_datasets)
    uses_hub = (asks_model and is_hub_id(settings.model.model_id)) or (asks_data and any(s.kind is Where.HUB for s in specs))
    return CheckSpec(
        model=settings.model if asks_model else None,
        data=settings.data if asks_data else None,
        publish=settings.publish if uses_hub or settings.publish.targets else None,
        has_token=settings.secrets.hf_token is not None,
        work_dir=settings.keep.work_dir.expanduser().absolute(),
        store_folder=store_folder,
    )


def answer(spec: CheckSpec, events: EventWriter) -> None:
    """Ask everything at the same time; an event for each answer. Runs in the child."""
    clock = Clock()
    checks = _checks(spec)
    if spec.publish is not None or spec.data is not None:
        _listen(clock)
    for result in start(checks)(PATIENCE_SECONDS):
        error = result.error
        if error is not None and result.name == DATA_SETS and str(error).startswith("no answer within"):
            # Its servers answer, or it would have failed: preparation has the time that this has not.
            result, error = Result(name=result.name, found=f"{WARNING}DATASETS: not looked at in time"), None
        events.write(
            Checked(
                name=result.name,
                found=result.found,
                exit_status=0 if error is None else error.exit_status,
                message="" if error is None else str(error),
                needs=result.needs,
            )
        )
    if clock.ahead_seconds is not None:
        events.write(Checked(name="clock", clock_seconds=clock.ahead_seconds))


def as_result(event: Checked) -> Result:
    """What a child's event says, as the check's result here."""
    error: JobError | None = error_for_status(event.exit_status, event.message) if event.exit_status else None
    return Result(name=event.name, found=event.found, error=error, needs=event.needs)


class Answers:
    """Takes the child's events; the clock's goes to the clock."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.results: list[Result] = []

    def take(self, event: Event) -> None:
        if not isinstance(event, Checked):
            return
        if event.clock_seconds is None:
            self.results.append(as_result(event))
        else:
            self._clock.note(event.clock_seconds)


def _checks(spec: CheckSpec) -> Mapping[str, Check]:
    model, data, publish = spec.model, spec.data, spec.publish
    checks: dict[str, Check] = {}
    if publish is not None:
        from job.preflight.account import check_account

        checks["Hub account"] = lambda: check_account(publish, has_token=spec.has_token)
    if model is not None:
        from job.preflight.base_model import check_base_model

        checks[BASE_MODEL] = lambda: check_base_model(model)
    if data is not None:
        from job.preflight.data_sets import check_data_sets

        checks[DATA_SETS] = lambda: check_data_sets(data, spec.work_dir, spec.store_folder)
        if data.language:
            checks["languages"] = lambda: _check_languages(data)
    return checks


def _check_languages(data: DataSettings) -> str:
    from job.data.language import Languages

    Languages(data)  # refuses what its detector does not know
    return f"{', '.join(data.language)}: known to the detector"


def _listen(clock: Clock) -> None:
    """Have the Hub's client tell the time of every answer."""
    from huggingface_hub.utils import get_session

    session = get_session()
    hooks = session.event_hooks
    hooks["response"].append(lambda response: clock.read(response.headers.get("date")))
    session.event_hooks = hooks
