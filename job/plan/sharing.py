"""A footprint and a number of GPUs in, what each of them holds and how much faster they are together out.

ddp: each holds the whole model, and they add the adapter's gradients once a step. fsdp: each holds a share of the weights, and
gathers layer by layer what it multiplies with, in each micro-batch. Not measured by us on any GPU: the ranges are of others'
runs. What is not handled: weights in host memory, a model that is split by layers or by tensors.
"""

from typing import Literal, NamedTuple

from job.plan.footprint import Footprint

Parallel = Literal["ddp", "fsdp"]

EFFICIENCY: dict[tuple[Parallel, bool], tuple[float, float]] = {
    ("ddp", False): (0.85, 0.98),
    ("ddp", True): (0.5, 0.95),
    ("fsdp", False): (0.55, 0.95),
    ("fsdp", True): (0.25, 0.85),
}
"""Share of N times the speed of one GPU that N reach, by whether they are in several machines. ddp adds up the adapter alone, and
waits for the rank with the longest rows. Published, one machine: 4 to 8 A100 1.88 times as fast and 4 to 8 A5000 1.85 times, with
FSDP and QLoRA (AnswerDotAI/fsdp_qlora, benchmarks_03_2024.md). Several: LoRA on 2 machines of 2 A100 0.56 (QwenLM/Qwen README,
2023: 5.2 and 9.25 s at 2,048 tokens), on 128 machines of one A10G 0.49 (ericyu3.notion.site, 2023-08). fsdp beside ddp: 0.97 on
two RTX 4090 and 0.93 on two RTX 3090 with QLoRA, 0.91 and 0.64 to 0.73 with 16-bit weights (fsdp_qlora again). fsdp between
machines is an assumption: Qwen's README says of ZeRO 3, which does the same, that it slows much there."""
NCCL_BYTES = 0.5 * 2**30
"""NCCL's buffers on each GPU, an assumption: 1.06 GB with the CUDA context on 8 H100 (NVIDIA/nccl#1685)."""
SAFE_NCCL_BYTES = 1.1 * 2**30
"""On top, to be safe: 1.6 GB for one communicator have been reported (NVIDIA/nccl#864)."""
GATHERED_LAYERS = 2
"""The one at work and the next, fetched meanwhile (FSDP2 prefetches one)."""


class Share(NamedTuple):
    """Bytes on one GPU."""

    weights: int
    adapter: int
    gradients: int
    optimizer: int
    gathered: int = 0
    """Weights that are whole for a moment."""
    reserved: float = 0.0
    safe: float = 0.0
    """On top, where one must not be wrong."""


def share(footprint: Footprint, optimizer: int, *, num_devices: int, parallel: Parallel | None, on_gpu: bool) -> Share:
    """What one of `num_devices` holds.

    Args:
        optimizer: bytes of the whole optimizer's state.
        parallel: None for one device alone.
    """
    weights, trained = footprint.weights, 4 * footprint.num_trainable  # fp32, whatever the base model is in
    if parallel is None:
        return Share(weights.total_bytes, trained, trained, optimizer)
    reserved, safe = (NCCL_BYTES, SAFE_NCCL_BYTES) if on_gpu else (0.0, 0.0)
    if parallel == "ddp":  # its buckets hold the gradients once more (gradient_as_bucket_view=False is torch's default)
        return Share(weights.total_bytes, trained, 2 * trained, optimizer, reserved=reserved, safe=safe)
    outside, layer = _gathered_bytes(footprint)
    # bitsandbytes' scales are no parameters, so that they stay whole on each GPU.
    spread = weights.total_bytes - weights.quantisation_state_bytes
    whole_layer = layer + trained // footprint.num_layers
    return Share(
        weights=weights.quantisation_state_bytes + -(-spread // num_devices),
        adapter=-(-trained // num_devices),
        gradients=-(-trained // num_devices),
        optimizer=-(-optimizer // num_devices),
        gathered=outside + GATHERED_LAYERS * whole_layer,
        reserved=reserved,
        # Gradients that stay whole while they accumulate, and layers that are larger than the others.
        safe=safe + trained + GATHERED_LAYERS * whole_layer,
    )


def speed_up(num_devices: int, parallel: Parallel | None, *, num_nodes: int) -> tuple[float, float]:
    """How many times as fast as one GPU: at least, and at best."""
    if parallel is None or num_devices == 1:
        return 1.0, 1.0
    low, high = EFFICIENCY[parallel, num_nodes > 1]
    return max(1.0, num_devices * low) if parallel == "ddp" else num_devices * low, num_devices * high


def _gathered_bytes(footprint: Footprint) -> tuple[int, int]:
    """Of embeddings and head, which FSDP2 keeps whole from the first use on, and of one layer of the body."""
    weights = footprint.weights
    unquantised = weights.unquantised_bytes - weights.unquantised_experts_bytes
    head = 2 * footprint.vocab_size * footprint.hidden_size * footprint.compute_itemsize  # as if they shared nothing
    outside = min(unquantised, head)
    body = weights.total_bytes - weights.quantisation_state_bytes - outside
    return outside, -(-body // footprint.num_layers)
