"""Faults on order, for tests and benchmarks: out of memory, a NaN, a hang, a kill at a chosen step.

    JOB_FAULT=<kind>[-<point>]@<step>[*][,...]        oom@17   nan@23*   hang@9   kill-save@12   oom-eval@10   oom-above@2

Kinds: oom (torch.OutOfMemoryError), nan (the loss of the step becomes NaN), spike (the loss of this step and all later ones
is 50 higher), hang (silence until killed), kill (SIGKILL), term (SIGTERM to itself), full (no space left on the disk). Points:
load, step (the default: in the last micro-batch of the step), update (after the optimizer's step, before the step counts), eval,
save, sample; the number is the step under way, or the last completed one at eval, save and sample, and 0 at load.
`oom-above@M` stands for a GPU that holds micro-batches up to M. A fault strikes once per work folder, a marker beside the
checkpoints remembers it; with `*`, and `oom-above`, each time.
"""

import os
import re
import signal
import time
from dataclasses import dataclass
from errno import ENOSPC
from pathlib import Path

import torch

_FAULT = re.compile(r"(oom|nan|spike|hang|kill|term|full)(?:-(load|step|update|eval|save|sample|above))?@(\d+)(\*?)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    kind: str
    point: str
    step: int
    is_repeated: bool


class Faults:
    """The faults that were ordered; none in production.

    Args:
        order: what JOB_FAULT says.
        folder: where markers of faults that struck are kept.
    """

    def __init__(self, order: str, folder: Path) -> None:
        matches = [_FAULT.fullmatch(part) for part in order.split(",") if part]
        if None in matches:
            raise ValueError(f"JOB_FAULT={order}: not a list of <kind>[-<point>]@<step>[*]")
        self._faults = [
            Fault(kind=match[1], point=match[2] or "step", step=int(match[3]), is_repeated=bool(match[4]))
            for match in matches
            if match
        ]
        self._folder = folder
        self._offset = 0.0

    def strike(self, point: str, step: int, *, micro_batch: int = 0) -> None:
        """Do what was ordered for this point and step, but for a spoiled loss."""
        for fault in self._faults:
            if fault.point == "above" and micro_batch > fault.step:
                raise torch.OutOfMemoryError(f"injected: micro-batch {micro_batch} is above {fault.step}")
            if fault.kind not in ("nan", "spike") and (fault.point, fault.step) == (point, step) and self._is_due(fault):
                _strike(fault.kind)

    def spoil(self, loss: torch.Tensor, step: int) -> torch.Tensor:
        """The loss, or what was ordered instead."""
        for fault in self._faults:
            if fault.kind == "nan" and fault.step == step and self._is_due(fault):
                loss = loss * float("nan")
            if fault.kind == "spike" and fault.step == step and self._is_due(fault):
                self._offset = 50.0
        return loss + self._offset if self._offset else loss

    def _is_due(self, fault: Fault) -> bool:
        if fault.is_repeated:
            return True
        marker = self._folder / f"fault-{fault.kind}-{fault.point}-{fault.step}"
        if marker.exists():
            return False
        marker.touch()
        return True


def _strike(kind: str) -> None:
    if kind == "oom":
        raise torch.OutOfMemoryError("injected")
    if kind == "full":
        raise OSError(ENOSPC, os.strerror(ENOSPC))
    if kind == "hang":
        while True:
            time.sleep(1.0)
    os.kill(os.getpid(), signal.SIGKILL if kind == "kill" else signal.SIGTERM)
