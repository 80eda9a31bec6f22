"""What a model and one micro-batch of it take, in bytes and FLOPs: found by `train/dry_run.py`, or by the formula here.

Plain numbers, so that any number of layouts and GPUs can be weighed without torch. One micro-batch is `rows` rows of `length`
tokens. With more than one row there is padding, and a mask that attention has to keep; a single row has none.
"""

from typing import Literal

from pydantic import BaseModel, ConfigDict

FUSED_TILE = (4096, 32768)
"""Tokens and vocabulary entries that TRL's fused head projects at a time (trl 1.16, trl/kernels/chunked_logprob.py)."""
PLAIN_LOGITS = 2**27
"""Tokens x vocabulary up to which logits are computed whole: 512 MiB in fp32. Above, TRL's fused head never holds them; below,
its tiles cost more than they save."""


class _Numbers(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Growth(_Numbers):
    """Bytes that grow with the tokens of a micro-batch, and with the pairs of tokens in its rows."""

    constant: float = 0.0
    per_token: float = 0.0
    per_pair: float = 0.0
    """Masks and whole matrices of attention."""

    def at(self, rows: int, length: int) -> float:
        return self.constant + rows * length * (self.per_token + self.per_pair * length)


class Body(_Numbers):
    """One forward and backward pass through the layers, head and loss left out; bytes beside weights and gradients."""

    saved: Growth
    """What autograd keeps from the forward pass for the backward pass."""
    after_forward: Growth
    """What is alive between the two passes."""
    peak: Growth
    """The most that is alive at once."""
    flops_per_token: float
    """Of both passes, recomputation included, attention's products of tokens with tokens left out."""
    attention_flops_per_pair: float
    """Of both passes, for each pair of tokens in a row."""


class Weights(_Numbers):
    """How the base model lies in memory."""

    quantised_bytes: int
    """Packed 4- or 8-bit values."""
    quantisation_state_bytes: int
    """Scales, and scales of scales."""
    unquantised_bytes: int
    """Embeddings, head, norms, and whatever else is not quantised, in the number format of computation."""
    unquantised_experts_bytes: int
    """Of these, experts that are fused into one tensor: bitsandbytes passes them over."""
    largest_layer_bytes: int
    """The largest quantised layer, unpacked: what one multiplication needs beside."""

    @property
    def total_bytes(self) -> int:
        return self.quantised_bytes + self.quantisation_state_bytes + self.unquantised_bytes


class Footprint(_Numbers):
    """What a model with its adapter takes."""

    num_parameters: int
    num_trainable: int
    largest_trainable: int
    """Elements of the largest trained tensor."""
    num_embedding_parameters: int
    """Of the input embeddings: a look-up, no multiplication."""
    num_layers: int
    hidden_size: int
    vocab_size: int
    max_length: int | None
    """The longest row that the model's positions reach (max_position_embeddings)."""
    compute_itemsize: int
    """Bytes of a number in the format of computation."""
    weights: Weights
    bodies: dict[str, Body]
    """By `body_name`."""
    plain_head_bytes_per_logit: float
    """At the peak of a loss from whole logits."""
    plain_head_saved_bytes_per_logit: float
    """Of these, what autograd keeps for the backward pass."""
    method: Literal["traced", "formula"]
    notes: tuple[str, ...] = ()
    """What the reader of a forecast should know."""
    problems: tuple[str, ...] = ()
    """What would stop the run, each with its way out."""

    def body(self, rows: int, *, activation_checkpointing: bool) -> Body:
        return self.bodies[body_name(is_padded=rows > 1, activation_checkpointing=activation_checkpointing)]

    def head_bytes(self, num_tokens: int) -> float:
        """Beside what is alive after the forward pass, at the peak of the loss."""
        logits = num_tokens * self.vocab_size
        if logits <= PLAIN_LOGITS:
            return logits * self.plain_head_bytes_per_logit
        tile = min(num_tokens, FUSED_TILE[0]) * min(self.vocab_size, FUSED_TILE[1]) * self.compute_itemsize
        # The hidden states twice (compacted, and their gradient) and once in fp32, and ten numbers a token.
        return tile + num_tokens * (self.hidden_size * (2 * self.compute_itemsize + 4) + 40)

    def saved_bytes(self, rows: int, length: int, *, activation_checkpointing: bool) -> float:
        """What autograd keeps of a whole forward pass, loss included."""
        num_tokens = rows * length
        logits = num_tokens * self.vocab_size
        if logits <= PLAIN_LOGITS:
            head = logits * self.plain_head_saved_bytes_per_logit
        else:
            head = num_tokens * (self.hidden_size * self.compute_itemsize + 16)  # hidden states, targets and normalisers
        return self.body(rows, activation_checkpointing=activation_checkpointing).saved.at(rows, length) + head

    def head_flops(self, num_tokens: int) -> float:
        """Forward and backward; the fused head multiplies once more, since it kept no logits."""
        products = 2 if num_tokens * self.vocab_size <= PLAIN_LOGITS else 3
        return products * 2.0 * num_tokens * self.hidden_size * self.vocab_size

    def flops(self, rows: int, length: int, *, activation_checkpointing: bool) -> float:
        """Of one micro-batch, forward and backward."""
        body, num_tokens = self.body(rows, activation_checkpointing=activation_checkpointing), rows * length
        attention = body.attention_flops_per_pair * rows * length * length
        return body.flops_per_token * num_tokens + attention + self.head_flops(num_tokens)


def body_name(*, is_padded: bool, activation_checkpointing: bool) -> str:
    return f"{'padded' if is_padded else 'unpadded'}-{'recomputed' if activation_checkpointing else 'kept'}"
