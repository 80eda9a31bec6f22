"""FLOPs and bytes in, seconds out, as a range; a measured speed takes the place of the range.

Of a GPU's peak a fine-tuning run reaches a part that nobody knows beforehand. The range comes from published runs; each is
worked out from its tokens a second in benchmarks/forecast.py.
"""

from pydantic import BaseModel, ConfigDict

UTILISATION = (0.20, 0.50)
"""Share of the peak, recomputation counted as work, of long micro-batches. Published runs: torchtune's Llama-3.2-3B on an A100
reaches 0.54 with LoRA and 0.53 with QLoRA and compile (README, 2025); Qwen-14B on an A100 0.52 with LoRA, 0.44 with Q-LoRA at
4,096 tokens, Qwen-1.8B 0.36 and 0.35 (QwenLM/Qwen README, 2023). Newer GPUs reach less of a higher peak."""
HALF_SPEED_TOKENS = {4: 700.0, 8: 700.0, 16: 150.0}
"""Tokens in a micro-batch at which half of that is reached, by bits of the weights: quantised ones are unpacked for each pass,
however short it is. Fitted to Qwen-14B at 256 to 8,192 tokens on an A100: 386 to 1,711 tokens/s with Q-LoRA, 1,280 to 1,950 with
LoRA."""
PADDING = 1.21
"""Computed tokens per real token when several rows of any length share a micro-batch (measured 2026-11, n=300)."""

DOWNLOAD_BYTES_PER_SECOND = (50e6, 500e6)
"""Of a rented machine from the Hub; an assumption."""
LOAD_BYTES_PER_SECOND = (0.3e9, 2e9)
"""16-bit weights from a disk into quantised ones on the GPU; an assumption (0.06e9 on two CPU cores, measured 2026-11)."""
PREPARED_TOKENS_PER_SECOND = (1e5, 1e6)
"""Per core 1e5 (SmolLM2's tokenizer, 2 cores, measured 2026-11: 3,000 conversations/s, 1e6 tokens/s)."""
START_SECONDS = (15.0, 60.0)
"""Processes, imports, checks, first step."""
END_SECONDS = (5.0, 30.0)
"""Samples, report, adapter to the store and the Hub."""


class Range(BaseModel):
    """A low and a high estimate."""

    model_config = ConfigDict(frozen=True)

    low: float
    high: float

    def __add__(self, other: "Range") -> "Range":
        return Range(low=self.low + other.low, high=self.high + other.high)

    def times(self, factor: float) -> "Range":
        return Range(low=self.low * factor, high=self.high * factor)


class Speed(BaseModel):
    """A measured one, of an earlier run of the same model on the same GPU."""

    model_config = ConfigDict(frozen=True)

    tokens_per_second: float
    """Tokens trained on, padding not counted, over whole steps."""
    num_runs: int
    source: str
    num_devices: int = 1
    """That reached it together."""


MEASURED_SPREAD = 0.15
"""What a measured speed may be off on another day, with other lengths: an assumption."""


def step_seconds(flops: float, micro_batch_tokens: float, *, peak_flops: float, bits: int) -> Range:
    """How long this many FLOPs take in micro-batches of this many tokens."""
    share = micro_batch_tokens / (micro_batch_tokens + HALF_SPEED_TOKENS[bits])
    low, high = UTILISATION
    return Range(low=flops / (peak_flops * high * share), high=flops / (peak_flops * low * share))


def measured_seconds(num_tokens: float, speed: Speed) -> Range:
    seconds = num_tokens / speed.tokens_per_second
    return Range(low=seconds * (1 - MEASURED_SPREAD), high=seconds * (1 + MEASURED_SPREAD))


def at_rates(amount: float, rates: tuple[float, float]) -> Range:
    """Seconds for an amount at a slow and a fast rate."""
    slow, fast = rates
    return Range(low=amount / fast, high=amount / slow)
