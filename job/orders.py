"""What the machines of one run tell each other through its store: the first one when and how to train, and how the run ended, and
each other one that it has left.

Each start of the trainer is an order; the others bring its checkpoint and start their own ranks. An order of an earlier attempt
may still lie there when they look: ranks compare orders when they meet, and the one with another order reads again. What is not
handled: machines that have different settings.
"""

import json
import uuid
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from job.keep.store import MissingError, Store, read_bytes, write_text
from job.plan.retreat import Fit, Rollback

ORDER, END, LEFT = "nodes/order.json", "nodes/end.json", "nodes/left-"


class Order(BaseModel):
    """One start of the trainer on all machines."""

    model_config = ConfigDict(frozen=True)

    id: str
    resume_step: int | None
    """Checkpoint in the store to continue from."""
    num_steps: int
    fit: Fit
    rollback: Rollback


class End(BaseModel):
    """How the run ended on the first machine."""

    model_config = ConfigDict(frozen=True)

    id: str
    """Of this word, so that an old one is known as such."""
    exit_status: int
    message: str


def new_id() -> str:
    return uuid.uuid4().hex


def give_order(store: Store, order: Order, scratch: Path) -> None:
    write_text(store, ORDER, order.model_dump_json(indent=1), scratch)


def give_end(store: Store, exit_status: int, message: str, scratch: Path) -> None:
    end = End(id=new_id(), exit_status=exit_status, message=message)
    write_text(store, END, end.model_dump_json(indent=1), scratch)


def begin(store: Store) -> None:
    """A new start of the run has begun: what was said of the last one's end is over."""
    for name in [END, *store.list(LEFT)]:
        store.delete(name)


def leave(store: Store, node_rank: int, why: str, scratch: Path) -> None:
    """This machine does nothing for the run any more."""
    write_text(store, f"{LEFT}{node_rank}.json", json.dumps({"why": why}, indent=1), scratch)


def find_left(store: Store) -> list[int]:
    """Machines that have left since the run has begun."""
    return [int(name.removeprefix(LEFT).removesuffix(".json")) for name in store.list(LEFT)]


def find_order(store: Store, scratch: Path) -> Order | None:
    """The newest order. Raises the store's own errors."""
    text = _find(store, ORDER, scratch)
    return None if text is None else Order.model_validate_json(text)


def find_end(store: Store, scratch: Path) -> End | None:
    """The last end. Raises the store's own errors."""
    text = _find(store, END, scratch)
    return None if text is None else End.model_validate_json(text)


def _find(store: Store, name: str, scratch: Path) -> bytes | None:
    try:
        return read_bytes(store, name, scratch)
    except MissingError:
        return None
