"""This process among those that train together: how they find each other, what they agree on, and where each one's dice begin.

With one process nothing here does anything. The first rank alone writes checkpoints, answers and the adapter.
"""

import hashlib
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import datasets
import numpy as np
import torch
from torch import distributed
from torch.utils.data import Sampler

from job.data.tokens import IGNORED
from job.errors import MachineError

MEET_SECONDS = 1800.0
"""How long machines wait for each other: one may still be downloading the model."""
_CONNECT_SECONDS = 5.0
_POLL_SECONDS = 0.2


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranks:
    """Which of how many processes this is."""

    rank: int = 0
    local_rank: int = 0
    """On this machine; also the number of its GPU."""
    num: int = 1
    address: str = "127.0.0.1"
    port: int = 0

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> "Ranks":
        """As the supervisor tells it, in the variables that torch and accelerate read."""
        if int(environ.get("WORLD_SIZE", "1")) == 1:
            return cls()
        return cls(
            rank=int(environ["RANK"]),
            local_rank=int(environ["LOCAL_RANK"]),
            num=int(environ["WORLD_SIZE"]),
            address=environ["MASTER_ADDR"],
            port=int(environ["MASTER_PORT"]),
        )

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def are_several(self) -> bool:
        return self.num > 1

    def meet(self, tell: Callable[[str], None], *, order_id: str = "", meet_seconds: float = MEET_SECONDS) -> None:
        """Wait for the others, and join them.

        Args:
            order_id: of this start; who has another one is late.
            tell: called now and then with what is waited for: whoever watches must not take it for a hang.

        Raises:
            MachineError: one does not come.
        """
        if not self.are_several:
            return
        deadline = time.monotonic() + meet_seconds
        try:
            store = self._store(tell, deadline)
            if self.is_first:
                store.set("order", order_id)
            if store.get("order").decode() != order_id:
                raise MachineError("this start of the trainer is over: the first machine has begun another")
            store.set(f"here-{self.rank}", "")
            while missing := [rank for rank in range(self.num) if not store.check([f"here-{rank}"])]:
                if time.monotonic() > deadline:
                    raise self._alone(f"ranks {', '.join(map(str, missing))} did not come within {meet_seconds / 60:g} minutes")
                tell(f"waiting for {len(missing)} of {self.num} trainer processes")
                time.sleep(_POLL_SECONDS)
            if torch.cuda.is_available():
                torch.cuda.set_device(self.local_rank)
            backend = "nccl" if torch.cuda.is_available() else "gloo"
            distributed.init_process_group(
                backend, store=distributed.PrefixStore("job", store), rank=self.rank, world_size=self.num
            )
        except distributed.DistError as error:
            raise self._alone(str(error).strip().splitlines()[0]) from error

    def _store(self, tell: Callable[[str], None], deadline: float) -> Any:
        """The first rank's list of who is there; it may come after us."""
        while True:
            try:
                store = distributed.TCPStore(
                    self.address,
                    self.port,
                    self.num,
                    is_master=self.is_first,
                    timeout=timedelta(seconds=_CONNECT_SECONDS),
                    wait_for_workers=False,
                )
            except distributed.DistError:
                if self.is_first or time.monotonic() > deadline:
                    raise
                tell(f"waiting for the first machine at {self.address}:{self.port}")
                continue
            store.set_timeout(timedelta(seconds=MEET_SECONDS))
            return store

    def _alone(self, why: str) -> MachineError:
        return MachineError(
            f"MASTER_ADDR={self.address}, MASTER_PORT={self.port}: the trainer processes did not meet ({why}); check that each "
            "machine reaches the first one at that address and port"
        )

    def lost(self, error: Exception) -> str | None:
        """What a failed exchange with the others says; None when this error is something else."""
        text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        is_torn = isinstance(error, distributed.DistError) or any(word in text for word in ("gloo", "NCCL", "Connection"))
        return text if self.are_several and isinstance(error, RuntimeError) and is_torn else None

    def total(self, values: Sequence[float], device: torch.device) -> list[float]:
        """The sum over all ranks of each value; every rank calls it at the same place."""
        found = torch.tensor(values, dtype=torch.float64, device=device)
        if self.are_several:
            distributed.all_reduce(found)
        summed: list[float] = found.tolist()
        return summed

    def throw_dice(self, seed: int, step: int) -> None:
        """Begin a step's random numbers anew, others on each rank.

        They depend on nothing but these three, so no rank has to write down where its own were.
        """
        if self.are_several:
            digest = hashlib.blake2b(f"{seed} {step} {self.rank}".encode(), digest_size=4).digest()
            number = int.from_bytes(digest)
            random.seed(number)
            np.random.seed(number)
            torch.manual_seed(number)


class Shares(Sampler[int]):
    """The order of an epoch for several ranks: as one rank would have it, and fillers at its end until each has equally much.

    Args:
        num_rows: real rows; the row after them is the filler, of which nothing is learned.
        multiple: rows of a micro-batch of all ranks.
        seed: of the shuffled order, as accelerate's SeedableRandomSampler has it; None for the order of the rows.
        epoch: asked at the begin of each pass. accelerate's `set_epoch` does not reach the sampler of a rank that was resumed in
            the middle of an epoch (1.15: SkipBatchSampler around BatchSamplerShard), and the run would go on with the rows of
            the first epoch.
    """

    def __init__(self, num_rows: int, *, multiple: int, seed: int | None, epoch: Callable[[], int] = lambda: 0) -> None:
        self._num_rows, self._seed, self._epoch = num_rows, seed, epoch
        self.num_fillers = -num_rows % multiple

    def order(self, epoch: int) -> list[int]:
        """The real rows of an epoch."""
        if self._seed is None:
            return list(range(self._num_rows))
        generator = torch.Generator().manual_seed(self._seed + epoch)
        shuffled: list[int] = torch.randperm(self._num_rows, generator=generator).tolist()
        return shuffled

    def __iter__(self) -> Iterator[int]:
        yield from self.order(self._epoch())
        yield from [self._num_rows] * self.num_fillers

    def __len__(self) -> int:
        return self._num_rows + self.num_fillers


FILLER_TOKENS = 2
"""Of a filler row: the fewest that a shifted loss has something of."""


def with_filler(rows: Any) -> Any:
    """The rows and one more after them, whose labels are all ignored."""
    filler = {"input_ids": [rows[0]["input_ids"][:1] * FILLER_TOKENS], "labels": [[IGNORED] * FILLER_TOKENS]}
    if "seq_lengths" in rows.column_names:
        filler["seq_lengths"] = [[FILLER_TOKENS]]
    return datasets.concatenate_datasets([rows, datasets.Dataset.from_dict(filler, features=rows.features)])
