"""A run's store in, whether its trained adapter lies there whole out, and on this machine too."""

from collections.abc import Callable
from pathlib import Path

from job.deliver.finish import ADAPTER
from job.errors import MachineError
from job.keep.checkpoints import DamagedError, delete_folder, get_folder
from job.keep.mirror import is_whole
from job.keep.store import Store


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
