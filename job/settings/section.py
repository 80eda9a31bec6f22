"""What every group of settings is made of.

A field `max_length` is the setting `MAX_LENGTH`. Names that pass through to transformers, TRL or peft keep the library's
name. What is not handled here: reading the values (`read.py`), showing them (`describe.py`).
"""

from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, BeforeValidator, ConfigDict

from job.settings.dataset_spec import split_list


class Neutral:
    """Marks a setting that changes how a run goes and not what it makes: it is left out of the run's identity."""


NEUTRAL = Neutral()


class Section(BaseModel):
    """A group of settings that one stage takes."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, hide_input_in_errors=True, allow_inf_nan=False
    )
    title: ClassVar[str]


def _split_text(value: Any) -> Any:
    return tuple(split_list(value)) if isinstance(value, str) else value


Texts = Annotated[tuple[str, ...], BeforeValidator(_split_text)]
