"""What the first micro-batch of an attempt really keeps: the figure that the forecast is corrected with."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from job.events import Measured


class Gauge:
    """Looks once, at the first forward pass it is shown, and is transparent afterwards."""

    def __init__(self) -> None:
        self._rows = self._length = 0
        self._saved_bytes = 0
        self._is_done = self._is_told = False

    @contextmanager
    def look(self, model: Any, input_ids: torch.Tensor) -> Iterator[None]:
        """Add up what autograd keeps of the forward pass inside; weights and their views are not counted."""
        if self._is_done:
            yield
            return
        self._is_done = True
        self._rows, self._length = input_ids.shape
        weights: dict[int, Any] = {}
        for tensor in (*model.parameters(), *model.buffers()):
            storage = tensor.untyped_storage()
            # bitsandbytes puts converted biases into the place of the old ones, whose addresses then come again.
            weights[storage._cdata] = weakref.ref(storage, lambda _, key=storage._cdata: weights.pop(key, None))  # type: ignore[misc]
        kept: dict[int, Any] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if (key := storage._cdata) not in weights:
                # What a branch kept that nobody used is gone before the end, and its address may come again.
                kept[key] = (storage.nbytes(), weakref.ref(storage, lambda _: kept.pop(key, None)))
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept):
            yield
        self._saved_bytes = sum(size for size, _ in kept.values())
        kept.clear()

    def take(self) -> Measured | None:
        """After the first step: what was seen, once."""
        if not self._is_done or self._is_told:
            return None
        self._is_told = True
        peak = int(torch.cuda.max_memory_allocated()) if torch.cuda.is_available() else None
        return Measured(rows=self._rows, length=self._length, saved_bytes=self._saved_bytes, peak_allocated_bytes=peak)
