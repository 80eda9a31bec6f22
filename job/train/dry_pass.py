"""One forward and backward pass of a model whose tensors are fake; living bytes and FLOPs out.

Each storage is counted from its birth to its death, as an allocator would.
"""

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from transformers import masking_utils

from job.train.loss import plain_loss

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True, slots=True)
class Amount:
    """Bytes, and how much of them grows with the square of the length."""

    total: float
    squared: float

    def plus(self, other: "Amount", base: "Amount", times: int) -> "Amount":
        return Amount(
            total=self.total + times * (other.total - base.total),
            squared=self.squared + times * (other.squared - base.squared),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Pass:
    """What one forward and backward pass took, beside weights and gradients."""

    saved: Amount
    """What autograd kept for the backward pass."""
    after_forward: Amount
    """What was alive between the passes."""
    peak: Amount
    flops: float
    attention_flops: float
    """Of these, what grows with the square of the length."""

    def plus(self, other: "Pass", base: "Pass", times: int) -> "Pass":
        """This, and `times` what `other` has more than `base`.

        The peak moves up by what lives between the passes: wherever it lies, all that the other layers keep is below it.
        """
        return Pass(
            saved=self.saved.plus(other.saved, base.saved, times),
            after_forward=self.after_forward.plus(other.after_forward, base.after_forward, times),
            peak=self.peak.plus(other.after_forward, base.after_forward, times),
            flops=self.flops + times * (other.flops - base.flops),
            attention_flops=self.attention_flops + times * (other.attention_flops - base.attention_flops),
        )


def one_pass(model: Any, length: int, *, recomputes: bool, is_padded: bool, autocasts: bool, use_reentrant: bool = False) -> Pass:
    """Run one row through the layers and back, under FakeTensorMode.

    Args:
        model: with adapters.
        length: tokens of the row.
        recomputes: whether activations are recomputed in the backward pass.
        is_padded: whether attention gets a mask.
        autocasts: whether as on a GPU, where only the adapters are fp32.
        use_reentrant: how they are recomputed, in torch's terms.
    """
    if recomputes:
        model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
        model.enable_input_require_grads()
    else:
        model.activation_checkpointing_disable()
    model.train()
    model.config.use_cache = False
    inputs: dict[str, Any] = {"input_ids": torch.zeros(1, length, dtype=torch.long), "use_cache": False}
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.empty_like(parameter)  # of the micro-batch before; the planner counts them
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    counter = Counter(length)
    counter.pass_over([*model.parameters(), *model.buffers(), *gradients])
    decoder = model.get_base_model().get_decoder()
    with _no_collection(), _autocast(autocasts), _one_document(), counter:
        if is_padded:
            inputs["attention_mask"] = torch.ones(1, 1, length, length, dtype=torch.bool)
        with torch.autograd.graph.saved_tensors_hooks(counter.keep, lambda kept: kept):
            hidden = decoder(**inputs).last_hidden_state
        saved = counter.saved()
        after_forward = Amount(total=counter.alive, squared=counter.alive_squared)
        hidden.backward(torch.empty_like(hidden))
    for parameter in model.parameters():
        parameter.grad = None
    return Pass(
        saved=saved,
        after_forward=after_forward,
        peak=Amount(total=counter.peak, squared=counter.peak_squared),
        flops=counter.flops,
        attention_flops=counter.attention_flops,
    )


def plain_head(dtype: torch.dtype, vocab_size: int, *, rows: int = 2, length: int = 64) -> tuple[float, float]:
    """Bytes per logit of the loss from whole logits: at its peak, the logits included, and kept by autograd."""
    counter = Counter(length)
    with FakeTensorMode(), _no_collection(), counter:
        hidden = torch.empty(rows, length, vocab_size, dtype=dtype, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(counter.keep, lambda kept: kept):
            logits = hidden * 1  # in the place of the model's head
            loss = plain_loss(logits, torch.zeros(rows, length, dtype=torch.long), rows * length)
        saved = counter.saved().total
        loss.backward()
    # `hidden` is not there in a real pass.
    return counter.peak / logits.numel() - dtype.itemsize, saved / logits.numel()


@contextmanager
def _autocast(is_on: bool) -> Iterator[None]:
    """Autocast as on a GPU, for tensors of the CPU; PEFT asks whether a GPU's is on."""
    if not is_on:
        yield
        return
    torch.set_autocast_enabled("cuda", True)
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            yield
    finally:
        torch.set_autocast_enabled("cuda", False)


@contextmanager
def _one_document() -> Iterator[None]:
    """A row without padding needs no mask; transformers (5.23) sees that from the values of its positions, which fakes lack."""
    before = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda *_, **__: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = before


@contextmanager
def _no_collection() -> Iterator[None]:
    """Storages die when the last tensor lets go of them, and not when Python finds time for cycles."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


class Counter(TorchDispatchMode):
    """Counts living storages and FLOPs of what runs inside.

    Attributes:
        alive, peak: bytes; now, and the most so far. What ends in `_squared` is the part with two dimensions of the row's length.
        kept: of each storage that autograd saved, by its address: bytes, and how much of them is squared.
        attention_flops: those that grow with the square of the length.
    """

    def __init__(self, length: int) -> None:
        super().__init__()
        self._length = length
        self._storages: dict[int, Any] = {}
        self._weights: dict[int, Any] = {}
        self.alive = self.alive_squared = self.peak = self.peak_squared = 0
        self.kept: dict[int, tuple[int, int]] = {}
        self.flops = self.attention_flops = 0.0

    def pass_over(self, tensors: list[torch.Tensor]) -> None:
        """These are weights: they and their views count as nothing."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key = storage._cdata
            # bitsandbytes puts converted biases into the place of the old ones, whose addresses then come again.
            self._weights[key] = weakref.ref(storage, lambda _, key=key: self._weights.pop(key, None))  # type: ignore[misc]

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._weights:
            self.kept[storage._cdata] = (storage.nbytes(), self._squared(tensor))
        return tensor

    def saved(self) -> Amount:
        """What autograd keeps now."""
        return Amount(total=sum(size for size, _ in self.kept.values()), squared=sum(part for _, part in self.kept.values()))

    def _squared(self, tensor: torch.Tensor) -> int:
        """Bytes of its storage, if that is a matrix over a row's tokens (no width of a model equals the length: dry_run.py)."""
        return tensor.untyped_storage().nbytes() if list(tensor.shape).count(self._length) >= 2 else 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = func._overloadpacket
        if packet is aten._grouped_mm:  # autocast does this on a GPU, and not on a CPU
            args = tuple(arg.bfloat16() if torch.is_tensor(arg) and arg.dtype == torch.float32 else arg for arg in args)
        out = func(*args, **kwargs)
        if (count := _FLOPS.get(packet)) is not None:
            flops = float(count(*args, **kwargs, out_val=out))
            self.flops += flops
            if packet in _ATTENTION or (packet in _PRODUCTS and self._length in (out.shape[-1], args[-1].shape[-2])):
                self.attention_flops += flops
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor)
        # What bitsandbytes unpacks inside of its own operation is seen by nobody.
        unpacked = args[2][0] * args[2][1] * args[0].element_size() if packet is _gemm_4bit else 0
        if self.alive + unpacked > self.peak:
            self.peak, self.peak_squared = self.alive + unpacked, self.alive_squared
        return out

    def _count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size, squared = storage._cdata, storage.nbytes(), self._squared(tensor)
        if key in self._storages or key in self._weights or size == 0:
            return

        def free(_: Any) -> None:
            self.alive -= size
            self.alive_squared -= squared
            self._storages.pop(key, None)
            self.kept.pop(key, None)  # kept by a branch that nobody used

        self.alive += size
        self.alive_squared += squared
        self._storages[key] = weakref.ref(storage, free)


_gemm_4bit = torch.ops.bitsandbytes.gemm_4bit
_attend = aten._scaled_dot_product_flash_attention_for_cpu
_attend_back = aten._scaled_dot_product_flash_attention_for_cpu_backward
_PRODUCTS = (aten.bmm, aten.baddbmm)
_ATTENTION = (_attend, _attend_back)


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> float:
    rows, heads, length, width = query.shape
    return float(2 * rows * heads * length * key.shape[-2] * (width + value.shape[-1]))


def _attention_back(_: Any, query: Any, key: Any, value: Any, *__: Any, **___: Any) -> float:
    return 2.5 * _attention(query, key, value)  # five products instead of two: FlashAttention-2, arXiv 2307.08691


_FLOPS: dict[Any, Callable[..., float]] = {
    **flop_registry,
    _gemm_4bit: lambda x, _, shape, *__, **___: 2.0 * x.numel() * shape[0],
    _attend: _attention,
    _attend_back: _attention_back,
    aten._grouped_mm: lambda x, y, *_, **__: 2.0 * x.numel() * y.shape[-1],
}
