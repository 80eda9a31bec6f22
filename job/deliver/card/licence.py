"""Where a base model lies in, the licence that its own card states out; a licence that cannot be found fails nothing.

What is not handled: whether the licence allows what is done with the adapter, and licences of the data.
"""

import re
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import yaml

TIMEOUT_SECONDS = 5.0
MAX_CARD_BYTES = 200_000
"""Of a README.md that is looked into; the metadata stands at its beginning."""
_METADATA = re.compile(r"^\s*---\s*\n(.*?)\n---[ \t]*(?:\n|$)", re.DOTALL)
_LINK = re.compile(r"[^\s()<>\"\\`|]+")  # stands in Markdown and in a table
_SLUG = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._+-]{0,63}")

# What the Hub accepts as `license` (huggingface.co/docs/hub/repositories-licenses, 2026); another one is refused with the card.
KNOWN_LICENCES = frozenset(
    """
    afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0
    bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5 cc-by-3.0
    cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0
    cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0 cdla-permissive-2.0 cdla-sharing-1.0
    creativeml-openrail-m deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 gemma gfdl gpl gpl-2.0
    gpl-3.0 h-research intel-research isc lgpl lgpl-2.1 lgpl-3.0 lgpl-lr llama2 llama3 llama3.1 llama3.2 llama3.3 llama4
    lppl-1.3c mit mpl-2.0 ms-pl ncsa odbl odc-by ofl-1.1 openrail openrail++ osl-3.0 other pddl postgresql unknown unlicense
    wtfpl zlib
    """.split()  # noqa: SIM905
)


class Licence(NamedTuple):
    """What a card may say of the base model's licence."""

    id: str | None = None
    """As the Hub knows it; None when it is unknown, or nothing that the Hub would accept."""
    name: str | None = None
    """Of one that is none of the Hub's own; or what the base model's card says, in its words."""
    link: str | None = None
    source: str | None = None
    """Where this is stated."""


UNKNOWN = Licence()


def find_licence(model_id: str, model_dir: Path | None, *, revision: str | None = None, ask_hub: bool = True) -> Licence:
    """Look into the model's folder, then ask the Hub.

    Args:
        model_id: a Hub id, or anything else for a model that is only here.
        model_dir: the base model's folder on this machine; None when it is not here.
        ask_hub: whether the id is one of the Hub's, and the Hub may be asked; it has a few seconds to answer.
    """
    found = _read_folder(model_dir) if model_dir is not None else UNKNOWN
    if found == UNKNOWN and ask_hub:
        with suppress(Exception):  # a card without its licence is better than a run that fails for one
            found = _ask_hub(model_id, revision)
    if found.id == "other" and found.link is not None and "://" not in found.link:
        # In the adapter's repository a file name would lead nowhere.
        address = f"https://huggingface.co/{model_id}/blob/{revision or 'main'}/{found.link.removeprefix('./')}"
        found = found._replace(link=address) if ask_hub else Licence(name=found.name, source=found.source)
    return found


def _read_folder(folder: Path) -> Licence:
    with suppress(OSError, ValueError, yaml.YAMLError):
        text = (folder / "README.md").read_bytes()[:MAX_CARD_BYTES].decode("utf-8", "replace")
        if match := _METADATA.match(text):
            return read_licence(yaml.safe_load(match[1]), "the card in the base model's folder")
    return UNKNOWN


def _ask_hub(model_id: str, revision: str | None) -> Licence:
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        return UNKNOWN
    info = HfApi().model_info(model_id, revision=revision, timeout=TIMEOUT_SECONDS)
    return read_licence(info.card_data.to_dict() if info.card_data else None, "the base model's card on the Hub")


def read_licence(metadata: Any, source: str) -> Licence:
    """What a card's metadata says, as far as another card may repeat it."""
    if not isinstance(metadata, dict):
        return UNKNOWN
    stated = metadata.get("license")
    if isinstance(stated, list):  # the Hub allows several; a card of one's own states one
        stated = stated[0] if len(stated) == 1 else ", ".join(str(one) for one in stated)
    if not isinstance(stated, str) or not stated.strip():
        return UNKNOWN
    stated = stated.strip()
    name, link = (value if isinstance(value := metadata.get(key), str) else None for key in ("license_name", "license_link"))
    if stated.lower() == "other" and name and link and _SLUG.fullmatch(name) and _LINK.fullmatch(link):
        return Licence(id="other", name=name, link=link, source=source)
    if stated.lower() in KNOWN_LICENCES - {"other", "unknown"}:
        return Licence(id=stated.lower(), source=source)
    return Licence(name=name or stated, source=source)
