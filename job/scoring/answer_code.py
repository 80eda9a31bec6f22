"""An answer in a model's words in, the Python in it out."""

import ast
import re
import warnings

_FENCE = re.compile(r"^[ \t]*```[ \t]*(?P<language>[^\s`]*)[^\n`]*\n(?P<code>.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)
"""A fenced block; one that was cut off in the middle reaches to the end."""
_PYTHON = ("python", "py", "python3", "")


def find_block(answer: str, languages: tuple[str, ...]) -> str | None:
    """The inside of the first fenced block in one of these languages ("" is one that names none)."""
    blocks = ((match["language"].lower(), match["code"]) for match in _FENCE.finditer(answer))
    return next((code for language, code in blocks if language in languages), None)


def find_code(answer: str) -> str:
    """The first block of Python, or the whole answer where nothing is fenced."""
    block = find_block(answer, _PYTHON)
    return answer if block is None else block


def defines(code: str, name: str) -> bool:
    """Whether code gives a name a value at its top level; code that does not parse is read by its lines."""
    tree = _parse(code)
    if tree is None:
        return re.search(rf"^(async\s+def|def|class)\s+{re.escape(name)}\b", code, re.MULTILINE) is not None
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and node.name == name:
            return True
        targets = node.targets if isinstance(node, ast.Assign) else []
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            return True
    return False


def before_function(prompt: str, name: str) -> str:
    """What a prompt of code holds before it begins a function: imports and helpers; nothing where it is prose."""
    match = re.search(rf"^(async\s+def|def)\s+{re.escape(name)}\b", prompt, re.MULTILINE)
    head = prompt[: match.start()] if match else ""
    return head if _parse(head) is not None else ""


def _parse(code: str) -> ast.Module | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "\d" in an answer is no news
            return ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
