"""A model folder in, a quantised model ready for adapters out, with its tokenizer.

What is not handled: several devices, mixture-of-experts layers that bitsandbytes leaves in 16 bits.
"""

from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.utils import logging

from job.data.templates import set_template
from job.errors import MachineError, Problem, SettingsError
from job.settings import LoraSettings, ModelSettings
from job.train.spec import TrainSpec


def pick_dtype(asked: str) -> torch.dtype:
    """The number format of computation: what was asked, else bfloat16 or float16 on a GPU and float32 on a CPU."""
    if asked != "auto":
        dtype: torch.dtype = getattr(torch, asked)
        return dtype
    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.float32


def load_tokenizer(spec: TrainSpec) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(spec.model_dir, trust_remote_code=spec.model.trust_remote_code)
    set_template(tokenizer, spec.model.chat_template)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(spec: TrainSpec) -> Any:
    """Load the base model, quantised as asked, onto the GPU when there is one.

    Raises:
        MachineError: the weights need a GPU that this machine lacks.
        SettingsError: the architecture is unknown or needs its own code.
    """
    settings, dtype = spec.model, pick_dtype(spec.model.dtype)
    if settings.load_in_8bit and not torch.cuda.is_available():
        raise MachineError("LOAD_IN_8BIT=1: training in 8 bits needs a GPU; use LOAD_IN_4BIT=1 on a CPU")
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": settings.attn_implementation}
    if torch.cuda.is_available():
        # Weights that are to be shared are whole in host memory only; FSDP gives each GPU its part (never run).
        options["device_map"] = {"": "cpu" if spec.parallel == "fsdp" else torch.cuda.current_device()}
    if asked := quantization(settings, dtype, is_shared=spec.parallel == "fsdp"):
        options["quantization_config"] = asked
    try:
        model = AutoModelForCausalLM.from_pretrained(
            spec.model_dir, trust_remote_code=settings.trust_remote_code, local_files_only=True, **options
        )
    except (ValueError, ImportError, OSError) as error:
        problem = Problem(
            setting="MODEL_ID",
            value=settings.model_id,
            rule=f"the model cannot be loaded: {str(error).strip().splitlines()[0]}",
            way_out="choose a causal language model that transformers knows, or check its files",
        )
        raise SettingsError([problem]) from error
    keep_gradients_after_evaluation(model)
    return model


@contextmanager
def told_while_loading(beat: Callable[[str], None]) -> Iterator[None]:
    """Call `beat` with each weight that transformers loads, as its own progress bar would be."""

    def count(bar: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        options["disable"] = True  # the bar itself would tear our lines apart
        if arguments and isinstance(arguments[0], Iterable):
            options.setdefault("total", len(arguments[0]) if isinstance(arguments[0], Sized) else None)
            arguments = (tell(arguments[0], options["total"]), *arguments[1:])
        return bar(*arguments, **options)

    def tell(items: Iterable[Any], total: int | None) -> Iterator[Any]:
        for number, item in enumerate(items, 1):
            beat(f"loading weights, {number} of {total or '?'}")
            yield item

    before = logging.set_tqdm_hook(count)
    try:
        yield
    finally:
        logging.set_tqdm_hook(before)


def keep_gradients_after_evaluation(model: torch.nn.Module) -> None:
    """Forbid bitsandbytes to repack 4-bit weights for inference.

    On CPUs with AVX512-BF16 the first forward pass without gradients repacks them in place for a kernel that has no
    backward: the loss stays plausible and every gradient below is 0 from then on (bitsandbytes 0.50.2, 2026-11-22).
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def train_in_fp32(model: torch.nn.Module) -> None:
    """Make what is trained fp32, once, after the trainer is built.

    TRL casts the adapter of a quantised model to bfloat16, and resuming makes it fp32: without this no resume is exact.
    """
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def lora_config(settings: LoraSettings) -> LoraConfig:
    return LoraConfig(
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules="all-linear" if settings.adapts_all_linear else list(settings.lora_target_modules),
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
        task_type="CAUSAL_LM",
    )


def check_lora_targets(model: torch.nn.Module, settings: LoraSettings) -> None:
    """Raise a SettingsError when a named layer does not exist; lists those that do."""
    names = {name.rpartition(".")[2] for name, module in model.named_modules() if "Linear" in type(module).__name__}
    unknown = [target for target in settings.lora_target_modules if target not in names and target != "all-linear"]
    if unknown:
        problem = Problem(
            setting="LORA_TARGET_MODULES",
            value=",".join(settings.lora_target_modules),
            rule=f"the model has no layer {', '.join(unknown)}",
            way_out=f"its linear layers are {', '.join(sorted(names))}",
        )
        raise SettingsError([problem])


def quantization(settings: ModelSettings, dtype: torch.dtype, *, is_shared: bool = False) -> BitsAndBytesConfig | None:
    """How bitsandbytes is asked to quantise; None for weights as they are.

    Args:
        is_shared: whether several ranks have a part of each weight.
    """
    if settings.load_in_4bit:
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            # FSDP can only share weights of a floating-point type (huggingface.co/docs/bitsandbytes, FSDP-QLoRA).
            bnb_4bit_quant_storage=dtype if is_shared else torch.uint8,
        )
    return BitsAndBytesConfig(load_in_8bit=True) if settings.load_in_8bit else None
