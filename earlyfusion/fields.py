"""Dataclass fields: what their source states about them, and checks of their values."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from earlyfusion.errors import SettingError


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
    for node, meaning in _annotated_fields(body):
        if node.value is not None:
            type_name, default = ast.unparse(node.annotation), ast.literal_eval(node.value)
            yield Field(ast.unparse(node.target), type_name, default, meaning)


def meanings(config: type) -> dict[str, str]:
    """The texts below the fields of a dataclass, including inherited ones."""
    by_field: dict[str, str] = {}
    for owner in reversed(config.__mro__[:-1]):
        try:
            [node] = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
        except (OSError, TypeError):  # a class without a source file
            continue
        body = node.body if isinstance(node, ast.ClassDef) else []
        named = ((ast.unparse(field.target), text) for field, text in _annotated_fields(body))
        by_field |= {name: text for name, text in named if text}
    return by_field


def check_at_least(config: object, **limits: float) -> None:
    """Raise `SettingError` if a field of the config is below the limit given under its name."""
    for name, limit in limits.items():
        if getattr(config, name) < limit:
            raise SettingError(f"{name}={getattr(config, name)} must be {limit} or more")


def check_shares(config: object, *names: str, below_one: bool = False) -> None:
    """Raise `SettingError` if one of these fields is not from 0 to 1, or is 1 and `below_one`."""
    for name in names:
        share = getattr(config, name)
        if not 0 <= share <= 1 or (below_one and share == 1):
            range_text = "at least 0 and below 1" if below_one else "a share from 0 to 1"
            raise SettingError(f"{name}={share} must be {range_text}")


def _annotated_fields(body: Sequence[ast.stmt]) -> Iterator[tuple[ast.AnnAssign, str]]:
    """The fields in the body of a class, each with the text below it, or ""."""
    for node, below in pairwise([*body, ast.Pass()]):
        if isinstance(node, ast.AnnAssign):
            text = below.value if isinstance(below, ast.Expr) else None
            meaning = str(text.value) if isinstance(text, ast.Constant) else ""
            yield node, " ".join(meaning.split())
