"""A trained adapter on this machine in; the adapter in the store, on the Hub when asked, and the report out."""

from collections.abc import Callable
from pathlib import Path

from job.deliver.card import write_card
from job.deliver.publish import publish
from job.deliver.report import Report
from job.errors import JobError
from job.keep.checkpoints import get_folder, put_folder, seal
from job.keep.mirror import is_whole
from job.keep.store import Store
from job.settings import Settings

ADAPTER = "adapter"


def deliver(
    report: Report,
    settings: Settings,
    *,
    store: Store,
    adapter: Path,
    redact: Callable[[str], str],
    put_report: Callable[[Report], None],
) -> Report:
    """Store the adapter first, then publish it; the report is written before and after each step that can fail.

    Args:
        report: what is known so far.
        settings: all that was asked for.
        store: the run's folder in the store.
        adapter: the adapter's local folder; filled from the store when an earlier attempt trained it.
        redact: applied to the card.
        put_report: writes the report to the store.

    Raises:
        PublishError: the adapter is safe in the store and the report says why it is not on the Hub.
    """
    if is_whole(store, ADAPTER):
        get_folder(store, ADAPTER, adapter)
    else:
        (adapter / "README.md").write_text(redact(write_card(report, settings)), "utf-8")
        seal(adapter, report.actual.num_steps)
        put_report(report)  # before the adapter, which marks the training as done
        put_folder(store, adapter, ADAPTER)
    put_report(report)
    if not settings.publish.hub_model_id:
        return report
    token = settings.secrets.hf_token
    try:
        publication = publish(
            adapter, settings.publish, token.get_secret_value() if token else None, message=_commit_message(report)
        )
    except JobError as error:
        put_report(report.model_copy(update={"exit_status": error.exit_status, "reason": redact(str(error))}))
        raise
    report = report.model_copy(update={"publication": publication})
    put_report(report)
    return report


def _commit_message(report: Report) -> str:
    loss = report.chosen.eval_loss if report.chosen else None
    step = report.chosen.step if report.chosen else report.actual.num_steps
    return f"{report.run_id}: step {step}" + ("" if loss is None else f", held-out loss {loss:.4f}")
