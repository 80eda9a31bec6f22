"""The loss from whole logits, for micro-batches where that is cheaper than TRL's fused head."""

from typing import Any

import torch

from job.data.tokens import IGNORED


def plain_loss(logits: torch.Tensor, labels: torch.Tensor, num_items_in_batch: Any) -> torch.Tensor:
    """Cross-entropy of each token's successor, over the counted tokens of the whole optimizer step.

    Args:
        logits: (B, T, V), in the format of computation.
        labels: (B, T); IGNORED where nothing is learned.
        num_items_in_batch: counted tokens of the step; None for those of this micro-batch.
    """
    successors = labels[:, 1:]  # (B, T-1)
    loss = torch.nn.functional.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), successors.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    counted = (successors != IGNORED).sum() if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)
    return loss / counted.clamp(min=1)
