"""The checkpoints that other attempts have kept, from the store to this disk: one of them may become the adapter."""

from collections.abc import Callable
from pathlib import Path

from job.keep.checkpoints import CHECKPOINTS, MANIFEST, DamagedError, best_step, get_folder, step_name, store_losses
from job.keep.store import MissingError, Store


def bring_kept(store: Store, folder: Path, *, scratch: Path, only_best: bool, warn: Callable[[str], None]) -> None:
    """Download the kept checkpoints that are not on this disk; one that is gone is told.

    Args:
        folder: the local checkpoints.
        only_best: the one with the lowest held-out loss alone.
    """
    losses = store_losses(store, scratch)
    best = best_step(losses)
    wanted = ([] if best is None else [best]) if only_best else list(losses)
    for step in wanted:
        path = folder / step_name(step)
        if (path / MANIFEST).is_file():
            continue
        try:
            get_folder(store, f"{CHECKPOINTS}/{path.name}", path)
        except (MissingError, DamagedError) as error:
            what = f"the checkpoint with the lowest held-out loss, of step {step}," if step == best else f"checkpoint {step}"
            warn(f"{what} is gone ({error})")
