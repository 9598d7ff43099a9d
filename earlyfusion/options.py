"""Options of commands, made from the fields of dataclasses. The name, type, default and meaning of
an option stand in one place, its field; the meaning is the text below the field. Fields are read
from source, because `--help` and completion would otherwise wait for modules that import torch."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from inspect import Parameter
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

import typer

from earlyfusion.fields import Field, fields_in_source

_PACKAGE = Path(__file__).parent


@dataclass(frozen=True)
class FieldsOf:
    """Options for the fields of the dataclass `name` in the file `source` of this package.

    A command's parameter `Annotated[dict[str, Any], FieldsOf(...)]` stands for all of them and gets
    the values that are set. `flags`, `choices` and `hidden` name the fields whose option has
    another name, a few possible values, or no line in the help. For a field whose default is None
    the help shows its entry in `shown_defaults`, or else `unset`.
    """

    source: str
    name: str
    unset: str = ""
    omitted: Collection[str] = ()
    hidden: Collection[str] = ()
    shown_defaults: Mapping[str, str] = field(default_factory=dict)
    flags: Mapping[str, str] = field(default_factory=dict)
    choices: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def parameters(self) -> list[Parameter]:
        found = fields_in_source(_PACKAGE / self.source, self.name)
        return [self._parameter(each) for each in found if each.name not in self.omitted]

    def collect(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The values that are set; those of an option that may be repeated as a tuple."""
        plain = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return {name: value for name, value in plain.items() if value not in (None, ())}

    def _parameter(self, each: Field) -> Parameter:
        default = None if each.default in ("", ()) else each.default
        unset = self.shown_defaults.get(each.name, self.unset)
        repeated = "[str" in each.type
        option = typer.Option(
            self.flags.get(each.name, f"--{each.name.replace('_', '-')}"),
            help=each.meaning + (" May be repeated." if repeated else ""),
            hidden=each.name in self.hidden,
            show_default=unset if default is None and unset else True,
            **_NUMBERS.get(each.type.removesuffix(" | None"), {}),
        )
        value: Any = list[str] if repeated else Path if "Path" in each.type else str
        if each.name in self.choices:
            value = Literal[self.choices[each.name]]
        annotation = Annotated[value | None, option]
        return Parameter(each.name, Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def with_options(command: Callable[..., object]) -> Callable[..., object]:
    """A command in the form that Typer needs, for one with parameters that stand for several
    options: parameters annotated with `FieldsOf`, or dataclasses of annotated options."""
    signature = inspect.signature(command, eval_str=True)
    parameters: list[Parameter] = []
    groups: dict[str, tuple[list[str], Callable[[dict[str, Any]], Any]]] = {}
    for parameter in signature.parameters.values():
        group = _group(parameter.annotation)
        if group is None:
            parameters.append(parameter.replace(kind=Parameter.KEYWORD_ONLY))
        else:
            parameters += group[0]
            groups[parameter.name] = [option.name for option in group[0]], group[1]

    @functools.wraps(command)
    def call(**given: Any) -> object:
        for name, (options, made_of) in groups.items():
            given[name] = made_of({option: given.pop(option) for option in options})
        return command(**given)

    # Typer reads both attributes.
    call.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {option.name: option.annotation for option in parameters}
    return call


def _group(annotation: Any) -> tuple[list[Parameter], Callable[[dict[str, Any]], Any]] | None:
    """The options that a parameter stands for, and what makes its value from theirs."""
    if is_dataclass(annotation) and isinstance(annotation, type):
        hints = get_type_hints(annotation, include_extras=True)
        options = [
            Parameter(f.name, Parameter.KEYWORD_ONLY, default=f.default, annotation=hints[f.name])
            for f in fields(annotation)
        ]
        return options, lambda values: annotation(**values)
    found = [extra for extra in get_args(annotation) if isinstance(extra, FieldsOf)]
    return (found[0].parameters(), found[0].collect) if found else None


def whole_option(help: str, unset: str = "") -> Any:
    """An option for a whole number; `unset` is shown as the default if it is None."""
    return typer.Option(help=help, show_default=unset or True, **_NUMBERS["int"])


def bytes_option(help: str, unset: str) -> Any:
    """An option for a number of bytes, also as "2GB" or "512MiB"."""
    return typer.Option(help=help, show_default=unset, parser=parse_bytes, metavar="BYTES")


_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


def parse_bytes(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([kmg]i?)?b?", text.lower())
    if found is None:
        raise typer.BadParameter(f"{text!r} is not a number of bytes such as 2000000000 or 2GB")
    return int(float(found[1]) * _UNITS[found[2] or ""])


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a number") from None


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a whole number") from None


# The errors of Typer's own numbers do not contain the wrong value.
_NUMBERS: dict[str, dict[str, Any]] = {
    "float": {"parser": _number, "metavar": "NUMBER"},
    "int": {"parser": _whole, "metavar": "WHOLE"},
}
