"""A run's store in; whether it is done, and whether its trained adapter lies there whole, out."""

from collections.abc import Callable
from pathlib import Path

from job.deliver.finish import ADAPTER
from job.errors import MachineError
from job.keep.checkpoints import DamagedError, delete_folder, get_folder
from job.keep.mirror import is_whole
from job.keep.store import Store

DONE = "DONE"
"""In the store of a run of which nothing is left to do."""


def is_done(store: Store) -> bool:
    """Whether nothing is left of the run."""
    return DONE in store.list(DONE) and is_whole(store, ADAPTER)


def has_adapter(store: Store, work: Path, say: Callable[[str], None], *, may_train: bool) -> bool:
    """Bring the trained adapter here; a damaged one is deleted, and made again from the last checkpoint.

    Raises:
        MachineError: it is damaged, and nothing may be trained.
    """
    if not is_whole(store, ADAPTER):
        return False
    try:
        get_folder(store, ADAPTER, work / ADAPTER)
    except DamagedError as error:
        if not may_train:
            raise MachineError(f"the adapter in the store is damaged ({error}); `python -m job run` makes it again") from error
        say(f"warning: the adapter in the store is damaged and is made again: {error}")
        delete_folder(store, ADAPTER)
        return False
    return True
