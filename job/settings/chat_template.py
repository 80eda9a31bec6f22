"""The value of CHAT_TEMPLATE in, the text of a chat template out: a family that TRL ships, `chatml`, or a file.

Reads files only; whether the text is a valid template shows when it is compiled (`job.data.templates`).
"""

import re
from collections.abc import Mapping
from difflib import get_close_matches
from functools import cache
from importlib.util import find_spec
from pathlib import Path

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' }}"
    "{% if message['role'] == 'assistant' and eos_token and eos_token != '<|im_end|>' %}{{ eos_token }}{% endif %}"
    "{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""For base models without a chat template (github.com/openai/openai-python, chatml.md).

Where the tokenizer ends texts with another token, a reply ends with that one too: generation stops only there.
"""


def find_template(value: str) -> str:
    """Return the template's text.

    Args:
        value: a family's name in any spelling (`qwen2_5`, `Qwen2.5`), `chatml`, or a file.

    Raises:
        ValueError: neither a family nor a readable file; names the nearest families.
    """
    names = template_files()
    plain = {_plain(name): name for name in names}
    if "/" not in value and not value.endswith(".jinja"):
        if _plain(value) == "chatml":
            return CHATML
        if name := plain.get(_plain(value)):
            return names[name].read_text("utf-8")
    try:
        return Path(value).expanduser().read_text("utf-8")
    except UnicodeDecodeError:
        raise ValueError("is a file, but not a text") from None
    except (OSError, RuntimeError):
        near = [plain[name] for name in get_close_matches(_plain(value), plain, n=3)]
        hint = f"did you mean {' or '.join(near)}?" if near else f"families: chatml, {', '.join(names)}"
        raise ValueError(f"is neither a family of templates nor a file that can be read in {Path.cwd()} ({hint})") from None


@cache
def template_files() -> Mapping[str, Path]:
    """Family -> file of each template that TRL ships; its variants for training are left out. TRL is not imported."""
    spec = find_spec("trl")
    folders = [Path(folder) / "chat_templates" for folder in (spec.submodule_search_locations or () if spec else ())]
    files = sorted(file for folder in folders for file in folder.glob("*.jinja"))
    return {file.stem: file for file in files if not file.stem.endswith("_training")}


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
