"""Which examples the steps of a run take, without running them: lengths in, the tokens of all steps out."""

import numpy as np
import torch


def tokens_of_steps(lengths: np.ndarray, *, num_steps: int, examples_per_step: int, seed: int, is_shuffled: bool) -> int:
    """Tokens of the run's steps together.

    An epoch ends with a smaller step rather than reaching into the next one, and each is shuffled anew with its number added to
    the seed, as accelerate's SeedableRandomSampler does (accelerate 1.15).

    Args:
        lengths: (N,) tokens of each example, as the examples lie.
        examples_per_step: of all micro-batches of an optimizer step.
    """
    steps_per_epoch = -(-len(lengths) // examples_per_step)
    num_epochs, rest = divmod(num_steps, steps_per_epoch)
    total = num_epochs * int(lengths.sum())
    if rest:
        order = np.arange(len(lengths))
        if is_shuffled:
            generator = torch.Generator().manual_seed(seed + num_epochs)
            order = torch.randperm(len(lengths), generator=generator).numpy()
        total += int(lengths[order[: rest * examples_per_step]].sum())
    return total
