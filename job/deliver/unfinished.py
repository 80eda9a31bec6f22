"""The newest checkpoint of a run that its budget ended in; its adapter in the store beside it, and on the Hub when asked, out.

It lies under a name of its own: an `adapter` in the store would mark the run as trained. What is not handled: choosing the
checkpoint with the lowest held-out loss, which may not be on this machine.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

from job.deliver.card.write import save_card
from job.deliver.finish import ADAPTER_FILES
from job.deliver.hub.publish import publish
from job.deliver.report import Chosen, Report
from job.errors import JobError
from job.keep.checkpoints import CHECKPOINTS, check, discard, local_steps, put_folder, seal, step_name
from job.keep.store import Store
from job.settings import Settings
from job.train.spec import TOKENIZER

BUDGET_ADAPTER = "budget-adapter"


def deliver_unfinished(
    report: Report,
    settings: Settings,
    *,
    store: Store,
    work: Path,
    model_dir: Path,
    redact: Callable[[str], str],
) -> Report:
    """Store the newest adapter with its tokenizer and a card that says how far it came, then publish it.

    Args:
        report: what is known of the run; returned with the step that was taken, and where it was published.
        work: the run's folder on this machine.

    Raises:
        JobError: this attempt has not begun to train, so what there is was delivered before, if ever.
        PublishError: the Hub did not take it; it is in the store.
    """
    steps, tokenizer = local_steps(work / CHECKPOINTS), work / "trainer" / TOKENIZER
    if not steps or report.attempts[-1].first_step is None or not tokenizer.is_dir():
        raise JobError("nothing was trained that could be delivered")
    checkpoint, folder = work / CHECKPOINTS / step_name(steps[0]), work / BUDGET_ADAPTER
    manifest = check(checkpoint)
    discard(folder)
    folder.mkdir(parents=True)
    for path in (*(checkpoint / name for name in ADAPTER_FILES), *tokenizer.iterdir()):
        shutil.copyfile(path, folder / path.name)
    report = report.model_copy(update={"chosen": Chosen(step=manifest.step, eval_loss=manifest.eval_loss)})
    save_card(folder, report, settings, redact=redact, model_dir=model_dir)
    seal(folder, manifest.step)
    put_folder(store, folder, BUDGET_ADAPTER)
    if not settings.publish.hub_model_id:
        return report
    token = settings.secrets.hf_token
    publication = publish(
        folder,
        settings.publish,
        token.get_secret_value() if token else None,
        message=f"{report.run_id}: step {manifest.step}, where the budget ended it",
        way_out=f"it is safe in the store as {BUDGET_ADAPTER}; a start with a raised budget finishes the job",
    )
    return report.model_copy(update={"publication": publication.model_copy(update={"step": manifest.step})})
