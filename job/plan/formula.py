"""A model's config.json in, a footprint by formula out: for what cannot be traced. Coarse, and on the large side.

The coefficients are fitted to traces of Llama-3.1-8B, Qwen2.5-1.5B, Gemma-3-27B and Apertus-8B (2026-11); on those the formula is
5-30% above the trace. What is not handled: linear attention, shared experts, encoders.
"""

from typing import Any

from job.plan.footprint import Body, Footprint, Growth, Weights, body_name
from job.settings import LoraSettings, ModelSettings

_VOCABULARIES = {"gemma3": 262_208}
KEPT_NUMBERS = (18.0, 9.0)
"""Numbers that a layer keeps for each token: so many times the hidden size, and so many times the intermediate size."""
QUANTISATION_STATE = 1 / 64 + 4 / 64 / 256
"""Bytes of scales a weight, with double quantisation (arXiv 2305.14314, section 3)."""


def estimate_footprint(
    config: dict[str, Any], model: ModelSettings, lora: LoraSettings, *, on_gpu: bool, reason: str
) -> Footprint:
    """Work out a footprint.

    Args:
        config: the content of config.json.
        reason: why it was not traced.

    Raises:
        KeyError: the configuration names no sizes that are known here.
    """
    text = {**config, **config.get("text_config", {})}
    if "vocab_size" not in text and config.get("model_type") in _VOCABULARIES:  # the files of some models leave it to the class
        text["vocab_size"] = _VOCABULARIES[config["model_type"]]
    hidden = int(_first(text, "hidden_size", "n_embd", "d_model", "dim"))
    layers = int(_first(text, "num_hidden_layers", "n_layer", "num_layers", "n_layers"))
    heads = int(_first(text, "num_attention_heads", "n_head", "num_heads", "n_heads"))
    vocab = int(_first(text, "vocab_size"))
    key_heads = int(text.get("num_key_value_heads") or heads)
    width = int(text.get("head_dim") or hidden // heads)
    intermediate = int(_first({**text, "default": 4 * hidden}, "intermediate_size", "n_inner", "ffn_dim", "default"))
    experts = int(text.get("num_local_experts") or text.get("num_experts") or text.get("n_routed_experts") or 0)
    active = int(text.get("num_experts_per_tok") or 1) if experts else 1
    per_expert = 3 * hidden * int(text.get("moe_intermediate_size") or intermediate)
    attention = hidden * width * (heads + 2 * key_heads) + heads * width * hidden
    dense = attention + (0 if experts else 3 * hidden * intermediate)
    embedding = vocab * hidden * (1 if text.get("tie_word_embeddings") else 2)
    item = 4 if (not on_gpu and model.dtype == "auto") or model.dtype == "float32" else 2
    quantised = dense * layers
    fused = per_expert * experts * layers
    bits = 4 if model.load_in_4bit else 8 if model.load_in_8bit else 0
    weights = Weights(
        quantised_bytes=quantised * bits // 8,
        quantisation_state_bytes=round(quantised * QUANTISATION_STATE) if bits == 4 else 0,
        unquantised_bytes=item * (embedding + fused + (0 if bits else quantised)),
        unquantised_experts_bytes=item * fused,
        largest_layer_bytes=item * hidden * intermediate,
    )
    sizes = heads * width + 2 * key_heads * width + 6 * hidden + 3 * intermediate
    trained = layers * lora.lora_r * (sizes + 2 * hidden) if lora.adapts_all_linear else layers * lora.lora_r * 4 * hidden
    kept = item * (KEPT_NUMBERS[0] * hidden + KEPT_NUMBERS[1] * intermediate * active)
    matmul = dense + active * per_expert if experts else dense
    bodies = {}
    for recomputes in (False, True):
        passes = 3 if recomputes else 2
        saved = item * hidden * layers if recomputes else kept * layers
        body = Body(
            saved=Growth(per_token=saved),
            after_forward=Growth(per_token=saved + 2 * item * hidden),
            peak=Growth(constant=2 * weights.largest_layer_bytes, per_token=saved + (1.3 * kept if recomputes else 0.1 * kept)),
            flops_per_token=passes * 2.0 * matmul * layers,
            attention_flops_per_pair=passes * 4.0 * heads * width * layers,
        )
        for is_padded in (False, True):
            bodies[body_name(is_padded=is_padded, activation_checkpointing=recomputes)] = body
    notes = [f"by formula: {reason}"]
    if fused and bits:
        notes.append(
            "its experts are most likely fused into tensors that bitsandbytes does not quantise: "
            f"{weights.unquantised_experts_bytes / 2**30:.1f} of {weights.total_bytes / 2**30:.1f} GiB of weights stay in 16 bits"
        )
    return Footprint(
        num_parameters=embedding + quantised + fused,
        num_trainable=trained,
        largest_trainable=lora.lora_r * max(intermediate, hidden),
        num_embedding_parameters=vocab * hidden,
        num_layers=layers,
        hidden_size=hidden,
        vocab_size=vocab,
        max_length=text.get("max_position_embeddings") or text.get("n_positions"),
        compute_itemsize=item,
        weights=weights,
        bodies=bodies,
        plain_head_bytes_per_logit=12.0 + item,
        plain_head_saved_bytes_per_logit=4.0,
        method="formula",
        notes=tuple(notes),
    )


def _first(values: dict[str, Any], *names: str) -> Any:
    for name in names:
        if values.get(name) is not None:
            return values[name]
    raise KeyError(names[0])
