"""What the package says when something is wrong, read from its sources, with {} for what is filled in."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

_SAYS = ("warning", "warn", "error")


def texts_of(root: Path) -> set[str]:
    """Every error and warning that has words of its own, of Python and of C++."""
    found = set()
    for path in (root / "ssdtrain").rglob("*.py"):
        if "simulated" not in path.parts:  # which is for those who write a device
            found |= set(_python(ast.parse(path.read_text())))
    for path in (root / "csrc").iterdir():
        found |= set(re.findall(r'"(Expected [^"]*)"', path.read_text()))
    return {text for text in found if _is_whole(text)}


def _is_whole(text: str) -> bool:
    """Not a few words that a function fills into its own."""
    words = re.findall(r"[\w%]+", re.sub(r"Expected|got|{}", "", text))
    return len(words) > 3 or (bool(words) and "Expected" in text)


def _python(tree: ast.Module) -> Iterator[str]:
    """What is raised or logged, and whatever begins with our "Expected", wherever it is raised."""
    parts = {part for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            yield from filter(None, map(_text, node.exc.args))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _SAYS:
            yield from filter(None, map(_text, node.args[:1]))
        elif isinstance(node, ast.Constant | ast.JoinedStr) and node not in parts:
            text = _text(node)
            if text is not None and text.startswith("Expected ") and len(text) > len("Expected "):
                yield text


def _text(node: ast.AST) -> str | None:
    if isinstance(node, ast.JoinedStr):
        return "".join([str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values])
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None
