"""Settings of the data: where it lies, what is kept of it and what is learned; one line of documentation at each."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, PositiveInt

from job.settings.dataset_spec import DatasetSpec, split_list
from job.settings.section import NEUTRAL, Section, Texts


def _parse_datasets(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    specs, complaints = [], []
    for entry in split_list(value):
        try:
            specs.append(DatasetSpec.parse(entry))
        except ValueError as error:
            complaints.append(str(error))
    if complaints or not specs:
        raise ValueError("; ".join(complaints) or "names no data set")
    return tuple(specs)


def _check_regex(value: str | None) -> str | None:
    if value is not None:
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"is not a regular expression: {error}") from None
    return value


def _check_language_model(value: str) -> str:
    if value != "lite" and not Path(value).expanduser().is_file():
        raise ValueError(f"must be `lite` or a fastText file that exists (looked in {Path.cwd()})")
    return value


def _check_scheduler(value: str | None) -> str | None:
    if value is not None and not re.fullmatch(r"(tcp|tls)://[^/@\s]+:\d+", value):
        raise ValueError("must be a scheduler's address (tcp://host:8786, or tls:// with Dask's own settings)")
    return value


Regex = Annotated[str | None, AfterValidator(_check_regex)]


class DataSettings(Section):
    title = "Data"

    datasets: Annotated[tuple[DatasetSpec, ...], BeforeValidator(_parse_datasets)]
    """Data sets, separated by commas or lines, each `where[?option=value&...]`; the README shows the options."""
    eval_datasets: Annotated[tuple[DatasetSpec, ...], BeforeValidator(_parse_datasets)] = ()
    """Data sets to measure the loss on, written like DATASETS; instead of EVAL_FRACTION."""
    system_prompt: str | None = None
    """System message of every conversation; see SYSTEM_PROMPT_MODE."""
    system_prompt_mode: Literal["add", "replace"] = "add"
    """add: SYSTEM_PROMPT goes where a conversation has none; replace: it takes the place of the data's own too."""
    learn: Literal["assistant", "completion", "all"] = "assistant"
    """Which tokens the loss counts: every reply of the assistant, only the last one, or every token."""
    language: Texts = ()
    """Keep only these languages (`tr,en`); empty keeps all. Code, addresses and the system message are not judged."""
    language_min_confidence: Annotated[float, Field(ge=0, le=1)] = 0.5
    """How sure the detector must be that an example is in one of LANGUAGE."""
    language_model: Annotated[str, AfterValidator(_check_language_model)] = "lite"
    """Detector: `lite` is inside the image; or the path of a fastText file such as lid.176.bin or GlotLID's model.bin."""
    min_tokens: PositiveInt = 1
    """Examples shorter than this many tokens are dropped."""
    max_length: Annotated[int, Field(ge=8)] = 2048
    """Longest example in tokens; memory grows with it."""
    overlong: Literal["drop", "truncate", "split"] = "drop"
    """An example longer than MAX_LENGTH: drop it, cut its end off, or split it (text anywhere, conversations between turns)."""
    min_turns: PositiveInt = 1
    """Conversations with fewer replies of the assistant are dropped."""
    max_turns: PositiveInt | None = None
    """Conversations with more replies of the assistant are dropped."""
    keep_regex: Regex = None
    """Keep only examples in whose text this regular expression is found (`(?i)` at its start ignores case)."""
    drop_regex: Regex = None
    """Drop examples in whose text this regular expression is found."""
    repair_text: bool = True
    """Repair text that was decoded wrongly on its way (`fÃ¼r` becomes `für`)."""
    drop_repetitive: bool = True
    """Drop prose that repeats itself beyond the limits of Gopher (arXiv 2112.11446, table A1); code is not judged."""
    mask_pii: bool = False
    """Replace e-mail addresses, IP addresses, card and bank account numbers by placeholders."""
    dedup: Literal["off", "exact", "near"] = "exact"
    """Drop an example whose text was seen before, in any data set; near: also one that differs in a few words."""
    mix: Literal["concatenate", "interleave"] = "concatenate"
    """Several data sets: all of each (`weight` times), or in proportion to their `weight` until one runs out."""
    max_samples: PositiveInt | None = None
    """Stop reading when this many examples have survived."""
    max_tokens: PositiveInt | None = None
    """Stop reading when the surviving examples hold this many tokens."""
    min_samples: PositiveInt = 8
    """Refuse to train on fewer surviving examples than this."""
    max_unlearned: Annotated[float, Field(ge=0, le=1)] = 0.2
    """Refuse to train when a larger share of examples has no token left to learn: the template or MAX_LENGTH is wrong then."""
    eval_fraction: Annotated[float, Field(ge=0, le=0.5)] = 0.05
    """Share of examples held out to measure the loss on; 0 turns evaluation off."""
    order: Literal["shuffle", "length", "as-is"] = "shuffle"
    """Order of training: shuffled anew each epoch, short examples first, or as the data sets have them."""
    keep_dropped: Annotated[bool, NEUTRAL] = False
    """Write every dropped row with its reason to dropped.jsonl beside the prepared data."""
    dataset_num_proc: Annotated[PositiveInt | Literal["auto"], Field(union_mode="left_to_right"), NEUTRAL] = "auto"
    """Processes that prepare the data; auto: one per core. The result is the same for any number."""
    prepare_on: Annotated[str | None, AfterValidator(_check_scheduler), NEUTRAL] = None
    """Scheduler of a Dask cluster (`tcp://head:8786`) whose workers prepare the data; by default this machine's processes do."""
