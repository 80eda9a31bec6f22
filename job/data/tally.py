"""What became of every row, as numbers: `tally.json`."""

import json
from pathlib import Path

from pydantic import BaseModel, ConfigDict

TALLY, DROPPED = "tally.json", "dropped.jsonl"


class Sample(BaseModel):
    """One dropped row, to look at."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    row: int
    text: str


class Stretch(BaseModel):
    """Part of an example's text as the model sees it; learned or only read."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    text: str
    learned: bool


class SourceTally(BaseModel):
    """What became of the rows of one data set."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    source: str
    shape: str
    revision: str | None
    """Commit of a Hub data set."""
    num_rows: int
    num_kept: int
    dropped: dict[str, int]
    num_tokens: int
    """Of the rows kept, whether trained on or held out, each counted once."""
    held_out: bool = False
    """One of EVAL_DATASETS."""
    lengths: dict[str, int] = {}
    """Rows kept by length in tokens; the key is the upper edge, a power of two."""
    languages: dict[str, int] = {}
    """Rows by language: all that were read when LANGUAGE is set, else one in 20 of those kept."""
    samples: dict[str, list[Sample]] = {}
    """The first dropped rows of each reason, ten at most."""
    first_example: list[Stretch] = []
    """The first row kept, as rendered."""


class Tally(BaseModel):
    """What became of every row; `tally.json`."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    sources: list[SourceTally]
    num_train: int
    """Training examples, repeats by `weight` counted; a row that was split counts once for each piece."""
    num_eval: int
    num_train_tokens: int
    num_learned_tokens: int
    """Of the training tokens, those that the loss counts."""
    longest_tokens: int
    warnings: list[str] = []


class Estimate(BaseModel):
    """What preparation will probably make, from the first rows of each source."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    num_examples: int
    num_tokens: int
    """Of one pass over the training examples."""
    longest_tokens: int
    num_eval_tokens: int
    error: float
    """Share by which the tokens may be off (two standard errors, and what is assumed of the number of rows)."""
    num_rows_read: int


def load_tally(folder: Path) -> Tally:
    """Read the tally of a prepared folder.

    Raises:
        FileNotFoundError: the folder was not prepared to the end.
    """
    return Tally.model_validate(json.loads((folder / TALLY).read_text("utf-8")))


def describe(tally: Tally) -> list[str]:
    """The funnel of each source and its first example with what is learned in ⟦ ⟧, as lines for the screen."""
    lines = []
    for source in tally.sources:
        dropped = ", ".join(f"{count:,} {reason}" for reason, count in source.dropped.items())
        lines.append(
            f"data: {source.source} ({source.shape}): {source.num_kept:,} of {source.num_rows:,} rows kept"
            + (f"; dropped {dropped}" if dropped else "")
        )
        if source.first_example:
            shown = "".join(f"⟦{part.text}⟧" if part.learned else part.text for part in source.first_example)
            lines.append(f"  learned of its first example: {_shortened(shown)}")
    lines += [f"warning: {warning}" for warning in tally.warnings]
    lines.append(
        f"data: {tally.num_train:,} examples to train on with {tally.num_train_tokens:,} tokens, "
        f"{tally.num_learned_tokens:,} of them learned; {tally.num_eval:,} held out"
    )
    return lines


def _shortened(text: str, limit: int = 600) -> str:
    text = text.replace("\n", "⏎")
    return text if len(text) <= limit else f"{text[: limit // 2]} … {text[-limit // 2 :]}"
