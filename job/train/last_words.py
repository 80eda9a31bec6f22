"""How a trainer ended in, the last event that says so out; and how much memory it took."""

import resource

import datasets
import torch

from job.errors import DivergedError, MachineError, PlanError, PreemptedError
from job.events import Failed, Stopped
from job.train.guards import DivergenceError
from job.train.spec import TrainSpec
from job.train.watch import Watch

MAX_EXAMPLES = 64
"""Of a window that diverged, named in the event."""


def preempted(text: str) -> Failed:
    return Failed(exit_status=PreemptedError.exit_status, message=text, stopped=Stopped.PREEMPTED)


def diverged(error: DivergenceError, spec: TrainSpec, watch: Watch) -> Failed:
    rows = datasets.load_from_disk(str(spec.data_dir / "train"))
    newest_first = (step for step in range(error.step, error.first_step - 1, -1))
    indices = [index for step in newest_first for index in watch.trainer.examples_of(step, step)][:MAX_EXAMPLES]
    examples = [(str(row["source"]), int(row["row"])) for row in rows.select_columns(["source", "row"]).select(indices)]
    message = (
        f"LEARNING_RATE={spec.train.learning_rate * spec.learning_rate_scale}: {error.what} at step {error.step}; lower it, or "
        "look at the examples of that step; the last checkpoint before it is kept"
    )
    return Failed(
        exit_status=DivergedError.exit_status,
        message=message,
        stopped=Stopped.DIVERGED,
        step=error.step,
        first_step=error.first_step,
        examples=tuple(examples),
    )


def out_of_memory(error: Exception, spec: TrainSpec, watch: Watch) -> Failed | None:
    """The last word of a trainer whose memory did not suffice; None when that is not what happened."""
    text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in text:
        message = f"host memory does not suffice ({text}); choose a machine with more"
        return Failed(exit_status=MachineError.exit_status, message=message, phase=watch.phase, step=watch.step)
    # cuBLAS, cuDNN and bitsandbytes allocate by themselves, and complain in their own words.
    is_gpu = isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and ("out of memory" in text or "ALLOC_FAILED" in text)
    )
    if not is_gpu:
        return None
    message = (
        f"PER_DEVICE_TRAIN_BATCH_SIZE={spec.micro_batch}: out of GPU memory ({text}); "
        "lower it or set ACTIVATION_CHECKPOINTING=1 to continue this run; a lower MAX_LENGTH starts a new one"
    )
    return Failed(
        exit_status=PlanError.exit_status,
        message=message,
        stopped=Stopped.OUT_OF_MEMORY,
        phase=watch.phase,
        step=watch.step,
    )


def peer_lost(error: Exception, watch: Watch) -> Failed | None:
    """The last word of a rank whose peers are gone; None when that is not what happened."""
    text = watch.ranks.lost(error)
    if text is None:
        return None
    message = f"another trainer process of this run ended in the middle of it ({text}); start again to continue"
    return Failed(exit_status=MachineError.exit_status, message=message, phase=watch.phase, step=watch.step)


def peak_memory_bytes() -> int:
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_reserved())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
