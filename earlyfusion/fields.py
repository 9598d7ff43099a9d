"""Dataclass fields as their source states them: types, defaults, and the texts below them."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple


class Field(NamedTuple):
    """A field of a dataclass; `type` is its annotation as text, `meaning` the text below it."""

    name: str
    type: str
    default: Any
    meaning: str


def fields_in_source(path: Path, name: str) -> Iterator[Field]:
    """The fields with a default of the dataclass `name` in a file, which is not imported."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    [body] = [n.body for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name]
    for node, meaning in _annotated(body):
        if node.value is not None:
            type_name, default = ast.unparse(node.annotation), ast.literal_eval(node.value)
            yield Field(ast.unparse(node.target), type_name, default, meaning)


def meanings(config: type) -> dict[str, str]:
    """The texts below the fields of a dataclass, including inherited ones."""
    found: dict[str, str] = {}
    for owner in reversed(config.__mro__[:-1]):
        try:
            [node] = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
        except (OSError, TypeError):  # a class without a source file
            continue
        rows = _annotated(node.body) if isinstance(node, ast.ClassDef) else ()
        found |= {ast.unparse(row.target): meaning for row, meaning in rows if meaning}
    return found


def _annotated(body: Sequence[ast.stmt]) -> Iterator[tuple[ast.AnnAssign, str]]:
    """The fields in the body of a class, each with the text below it, or ""."""
    for node, below in pairwise([*body, ast.Pass()]):
        if isinstance(node, ast.AnnAssign):
            text = below.value if isinstance(below, ast.Expr) else None
            meaning = str(text.value) if isinstance(text, ast.Constant) else ""
            yield node, " ".join(meaning.split())
