"""A model's configuration in, the model that the trainer would build out: quantised layers and adapters, but no numbers in it.

The layers are bitsandbytes' and PEFT's own, so what is not quantised, and what each layer keeps, is what really happens. A model
can be cut down to a few of its layers; how many there are of each kind tells how to add them up again.
"""

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bitsandbytes import functional as bnb_functional
from bitsandbytes import nn as bnb_nn
from peft import get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.integrations.bitsandbytes import replace_with_bnb_linear
from transformers.quantizers.auto import AutoHfQuantizer

from job.plan.footprint import Weights
from job.settings import LoraSettings, ModelSettings
from job.train.model import lora_config, quantization

BLOCK = 64
"""Weights per scale of a 4-bit layer (bitsandbytes' default)."""


def load_config(folder: Path, settings: ModelSettings) -> Any:
    """The configuration in a folder or a `.gguf` file; raises OSError or ValueError when transformers cannot use it."""
    if folder.suffix == ".gguf":
        return AutoConfig.from_pretrained(folder.parent, gguf_file=folder.name)
    return AutoConfig.from_pretrained(folder, trust_remote_code=settings.trust_remote_code)


def build(config: Any, settings: ModelSettings, dtype: torch.dtype) -> tuple[Any, list[str]]:
    """The whole base model on the meta device, quantised as asked; with what would stop a real run."""
    problems: list[str] = []
    config = copy.deepcopy(config)  # a cut changes it
    attention = "eager" if settings.attn_implementation == "eager" else "sdpa"  # flash attention keeps what sdpa keeps
    with torch.device("meta"):
        try:
            model = _from_config(config, dtype, attention)
        except ValueError as error:
            if attention == "eager" or "attention" not in str(error).lower():
                raise
            problems.append(
                f"ATTN_IMPLEMENTATION={settings.attn_implementation}: {type(config).__name__.removesuffix('Config')} has no such "
                "attention; set ATTN_IMPLEMENTATION=eager"
            )
            model = _from_config(config, dtype, "eager")
    if asked := quantization(settings, dtype):
        quantizer = AutoHfQuantizer.from_config(asked)
        kept = quantizer.get_modules_to_not_convert(model, None, getattr(model, "_keep_in_fp32_modules", None))
        model = replace_with_bnb_linear(model, modules_to_not_convert=kept, quantization_config=asked)
        model.hf_quantizer, model.quantization_method = quantizer, asked.quantization_method
        model.is_loaded_in_4bit, model.is_loaded_in_8bit = settings.load_in_4bit, settings.load_in_8bit
    return model, problems


def _from_config(config: Any, dtype: torch.dtype, attention: str) -> Any:
    options = {"dtype": dtype, "attn_implementation": attention}
    try:
        return AutoModelForCausalLM.from_config(config, **options)
    except ValueError as error:
        if "Unrecognized configuration" not in str(error):
            raise
        return AutoModelForImageTextToText.from_config(config, **options)


def weigh(model: Any) -> Weights:
    """How the base model will lie in memory."""
    quantised = state = unquantised = experts = largest = 0
    seen: set[int] = set()
    for path, module in model.named_modules():
        is_quantised = isinstance(module, (bnb_nn.Linear4bit, bnb_nn.Linear8bitLt))
        for name, parameter in module._parameters.items():
            if parameter is None or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            size = parameter.numel()
            if is_quantised and name == "weight":
                largest = max(largest, size * 2)
                four_bit = isinstance(module, bnb_nn.Linear4bit)
                quantised += (size + 1) // 2 if four_bit else size
                blocks = -(-size // BLOCK)
                state += blocks + -(-blocks // 256) * 4 + 4 * (16 + 256 + 1) if four_bit else module.out_features * 4
                continue
            unquantised += size * parameter.element_size()
            if parameter.ndim == 3 and "expert" in path:
                experts += size * parameter.element_size()
    return Weights(
        quantised_bytes=quantised,
        quantisation_state_bytes=state,
        unquantised_bytes=unquantised,
        unquantised_experts_bytes=experts,
        largest_layer_bytes=largest,
    )


def layer_kinds(model: Any) -> list[str]:
    """For each layer of the text model in order, a name that equal layers share."""
    types = _text_config(model)
    named = list(getattr(types, "layer_types", None) or [])
    layers = _layers(model)[2]
    kinds = []
    for index, layer in enumerate(layers):
        shapes = [f"{name}{tuple(value.shape)}" for name, value in layer.named_parameters()]
        attention = named[index] if index < len(named) else getattr(getattr(layer, "attn", None), "attention_type", "")
        kinds.append(f"{attention}|{type(layer).__name__}|{'|'.join(shapes)}")
    return kinds


@dataclass(frozen=True, kw_only=True, slots=True)
class Cut:
    """Which layers to keep, and for how many of the whole model the one that the smallest cut lacks stands."""

    layers: tuple[int, ...]
    more: int
    """0 for the smallest cut."""


def plan_cuts(kinds: list[str]) -> list[Cut]:
    """The smallest cut first, one layer of each kind; then, for each kind that there is more of, one with one layer more."""
    base = [kinds.index(kind) for kind in dict.fromkeys(kinds)]
    cuts = [Cut(layers=tuple(base), more=0)]
    for kind, count in Counter(kinds).items():
        if count > 1:
            second = kinds.index(kind, kinds.index(kind) + 1)
            cuts.append(Cut(layers=tuple(sorted([*base, second])), more=count - 1))
    return cuts


def strip(model: Any, settings: LoraSettings) -> int:
    """Take away what text does not pass through, such as a vision tower, in place.

    Returns:
        How many parameters its adapters would have.
    """
    needed = {id(module) for module in model.get_decoder().modules()}
    num_trainable = 0
    for path, module in list(model.named_modules()):
        holds = any(id(part) in needed for part in module.modules())
        if not path or holds or module is model.get_output_embeddings() or not _exists(model, path):
            continue
        for name, layer in module.named_modules():
            if isinstance(layer, nn.Linear) and (
                settings.adapts_all_linear or name.rpartition(".")[2] in settings.lora_target_modules
            ):
                num_trainable += settings.lora_r * (layer.in_features + layer.out_features)
        model.set_submodule(path, nn.Identity())
    return num_trainable


def _exists(model: Any, path: str) -> bool:
    """Whether the module is still there, and was not taken away with its parent."""
    try:
        return not isinstance(model.get_submodule(path), nn.Identity)
    except AttributeError:
        return False


def drop_attention_dropout(model: Any) -> None:
    """Let a fake model attend without dropout, in place: a GPU's kernels keep no mask of it, those for a CPU keep all."""
    for module in model.modules():
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0
        if isinstance(dropout := getattr(module, "attn_dropout", getattr(module, "attention_dropout", None)), nn.Dropout):
            dropout.p = 0.0


def keep_layers(model: Any, layers: tuple[int, ...]) -> None:
    """Cut the text model down to these layers, in place."""
    config, (parent, name, modules) = _text_config(model), _layers(model)
    if named := getattr(config, "layer_types", None):
        config.layer_types = [named[index] for index in layers]
    setattr(parent, name, nn.ModuleList([modules[index] for index in layers]))
    config.num_hidden_layers = len(layers)


def with_adapters(make_model: Callable[[], Any], settings: LoraSettings) -> tuple[Any, list[str]]:
    """The model with its adapters as the trainer adds them; with what PEFT would refuse.

    Args:
        make_model: builds the model; called again when PEFT refuses half-way.
    """
    try:
        return get_peft_model(make_model(), lora_config(settings)), []
    except ValueError as error:
        if not settings.lora_dropout or "dropout" not in str(error).lower():
            raise
    problem = (
        f"LORA_DROPOUT={settings.lora_dropout:g}: PEFT allows none on layers whose weights are bare tensors, as fused experts "
        "are; set LORA_DROPOUT=0, or name the layers of attention in LORA_TARGET_MODULES"
    )
    without = settings.model_copy(update={"lora_dropout": 0.0})
    return get_peft_model(make_model(), lora_config(without)), [problem]


def make_fake(model: Any, dtype: torch.dtype, *, upcasts: bool = False) -> None:
    """Give each tensor of a meta model a size in memory, in place; call it under FakeTensorMode. What is trained is fp32.

    Args:
        dtype: that quantised layers compute in.
        upcasts: whether all that is not quantised is fp32.
    """
    seen: dict[int, tuple[Any, Any]] = {}
    for module in model.modules():
        if isinstance(module, bnb_nn.Linear4bit):
            _pack_4bit(module, dtype)
        elif isinstance(module, bnb_nn.Linear8bitLt):
            _pack_8bit(module)
        packed = isinstance(module, (bnb_nn.Linear4bit, bnb_nn.Linear8bitLt))
        for store, is_parameter in ((module._parameters, True), (module._buffers, False)):
            for name, value in store.items():
                if value is None or (packed and name == "weight"):
                    continue
                if id(value) not in seen:
                    is_fp32 = is_parameter and (value.requires_grad or upcasts)
                    kind = torch.float32 if is_fp32 else value.dtype
                    fake: Any = torch.empty(value.shape, dtype=kind)
                    if is_parameter:
                        fake = nn.Parameter(fake, requires_grad=value.requires_grad)
                    seen[id(value)] = (value, fake)  # the key is an address: the old tensor must stay
                store[name] = seen[id(value)][1]


def _pack_4bit(module: Any, dtype: torch.dtype) -> None:
    size = module.in_features * module.out_features
    blocks = -(-size // BLOCK)
    scales = bnb_functional.QuantState(
        absmax=torch.empty(-(-blocks // 256)), code=torch.empty(256), blocksize=256, dtype=torch.float32
    )
    state = bnb_functional.QuantState(
        absmax=torch.empty(blocks, dtype=torch.uint8),
        shape=torch.Size([module.out_features, module.in_features]),
        code=torch.empty(16),
        blocksize=BLOCK,
        quant_type="nf4",
        dtype=dtype,
        offset=torch.empty(()),
        state2=scales,
    )
    weight = nn.Parameter(torch.empty((size + 1) // 2, 1, dtype=torch.uint8), requires_grad=False)
    weight.quant_state = module.quant_state = state
    module.weight, module.support_avx512bf16_for_cpu = weight, False


def _pack_8bit(module: Any) -> None:
    values = torch.empty(module.out_features, module.in_features, dtype=torch.int8)
    weight = nn.Parameter(values, requires_grad=False)
    weight.CB = weight.SCB = None
    module.weight = weight
    module.state.CB, module.state.SCB = values, torch.empty(module.out_features)


def _text_config(model: Any) -> Any:
    return model.config.get_text_config()


def _layers(model: Any) -> tuple[Any, str, nn.ModuleList]:
    """(parent, name, list) of the layers of the text model."""
    decoder = model.get_decoder()
    lists = [(name, module) for name, module in decoder.named_children() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise ValueError(f"{type(decoder).__name__} has no list of layers")
    name, layers = max(lists, key=lambda pair: len(pair[1]))
    return decoder, name, layers
