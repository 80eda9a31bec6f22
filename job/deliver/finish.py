"""A trained adapter on this machine in; the adapter in the store, on the Hub when asked, and the report out."""

from collections.abc import Callable
from pathlib import Path

from job.deliver.card.write import save_card
from job.deliver.hub.publish import FINISH, publish_folder
from job.deliver.report import Chosen, Report
from job.display import Display
from job.errors import MachineError
from job.keep.checkpoints import get_folder, put_folder, seal
from job.keep.mirror import is_whole
from job.keep.store import Store
from job.settings import Settings

ADAPTER = "adapter"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


def deliver(
    report: Report,
    settings: Settings,
    *,
    store: Store,
    adapter: Path,
    model_dir: Path,
    display: Display,
    put_report: Callable[[Report], None],
) -> Report:
    """Store the adapter first, then publish it; the report is written before each step that can fail, and at the end.

    Args:
        report: what is known so far.
        settings: all that was asked for.
        store: the run's folder in the store.
        adapter: the adapter's local folder; filled from the store when an earlier attempt trained it.
        model_dir: the base model's folder, for its licence.
        put_report: writes the report to the store.

    Raises:
        PublishError: the adapter is safe in the store, and not on the Hub.
    """
    if is_whole(store, ADAPTER):
        report = _agreeing(report, get_folder(store, ADAPTER, adapter).step)
    else:
        put_report(report)  # before the adapter, which marks the training as done
        store_adapter(report, settings, store=store, adapter=adapter, model_dir=model_dir, redact=display.redact)
    put_report(report)
    if not settings.publish.hub_model_id:
        return report
    publication = publish_folder(
        adapter,
        settings.publish.hub_model_id,
        settings.publish,
        hub_token(settings),
        message=commit_message(report),
        way_out=FINISH,
        tell=display.say,
        idle=display.heartbeat,
    )
    if (before := report.publication) is not None:
        merged = {"merged_repo_id": before.merged_repo_id, "merged_commit": before.merged_commit}
        publication = publication.model_copy(update=merged)
    report = report.model_copy(update={"publication": publication})
    put_report(report)
    return report


def store_adapter(
    report: Report, settings: Settings, *, store: Store, adapter: Path, model_dir: Path, redact: Callable[[str], str]
) -> None:
    """Put a trained adapter into the store with its card; an older one there is whole until this one is being written."""
    if lacking := [name for name in ADAPTER_FILES if not (adapter / name).is_file()]:
        raise MachineError(f"the trained adapter lacks {', '.join(lacking)}; start again: it is made anew from its checkpoint")
    save_card(adapter, report, settings, redact=redact, model_dir=None if model_dir == Path() else model_dir)
    seal(adapter, report.chosen.step if report.chosen else report.actual.num_steps)
    put_folder(store, adapter, ADAPTER)


def _agreeing(report: Report, step: int) -> Report:
    """The report of the adapter that there is: whoever was killed between the two left an older one of them."""
    if report.chosen is None or report.chosen.step == step:
        return report
    known = next((one for one in report.candidates if one.step == step), None)
    chosen = Chosen(step=step, by=report.chosen.by) if known is None else Chosen(**known.model_dump(), by=report.chosen.by)
    return report.model_copy(update={"chosen": chosen, "publication": None})


def hub_token(settings: Settings) -> str | None:
    """HF_TOKEN itself."""
    token = settings.secrets.hf_token
    return token.get_secret_value() if token else None


def commit_message(report: Report, *, what: str = "") -> str:
    """Names run, step and loss."""
    loss = report.chosen.eval_loss if report.chosen else None
    step = report.chosen.step if report.chosen else report.actual.num_steps
    name = f"{report.run_id}, {what}" if what else report.run_id
    return f"{name}: step {step}" + ("" if loss is None else f", held-out loss {loss:.4f}")
