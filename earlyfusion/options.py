"""Options of commands, made from the fields of dataclasses: an option takes its name, type, default
and help (the text below the field) from its field. Fields are read from source code, because
importing their modules would import torch, and `--help` and completion would wait for that."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, is_dataclass
from inspect import Parameter
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

import typer

from earlyfusion.fields import Field, fields_in_source

_PACKAGE = Path(__file__).parent


@dataclass(frozen=True)
class FieldsOf:
    """Options for the fields of the dataclass `name` in the file `source` of this package.

    A command's parameter `Annotated[dict[str, Any], FieldsOf(...)]` stands for all of them; its
    value is a dict of the options that the user set. Fields in `omitted` get no option, those in
    `hidden` no line in the help. `flags` renames an option, `choices` limits its values. As the
    default of a field that has none, the help shows its entry in `shown_defaults`, or `unset`.
    """

    source: str
    name: str
    unset: str = ""
    omitted: Collection[str] = ()
    hidden: Collection[str] = ()
    shown_defaults: Mapping[str, str] = dataclasses.field(default_factory=dict)
    flags: Mapping[str, str] = dataclasses.field(default_factory=dict)
    choices: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)

    def parameters(self) -> list[Parameter]:
        declared = fields_in_source(_PACKAGE / self.source, self.name)
        return [self._parameter(field) for field in declared if field.name not in self.omitted]

    def collect(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The values that the user set; lists of repeated options become tuples."""
        tuples = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return {name: value for name, value in tuples.items() if value not in (None, ())}

    def _parameter(self, field: Field) -> Parameter:
        name = field.name
        default = None if field.default in ("", ()) else field.default
        unset = self.shown_defaults.get(name, self.unset)
        repeated = "[str" in field.type
        option = typer.Option(
            self.flags.get(name, f"--{name.replace('_', '-')}"),
            help=field.meaning + (" May be repeated." if repeated else ""),
            hidden=name in self.hidden,
            show_default=unset if default is None and unset else True,
            **_NUMBERS.get(field.type.removesuffix(" | None"), {}),
        )
        value: Any = list[str] if repeated else Path if "Path" in field.type else str
        if name in self.choices:
            value = Literal[self.choices[name]]
        annotation = Annotated[value | None, option]
        return Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def with_options(command: Callable[..., object]) -> Callable[..., object]:
    """The command in the form that Typer needs, with one parameter per option. It replaces each
    parameter that stands for several options: one annotated with `FieldsOf`, or whose type is a
    dataclass of annotated options."""
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
    def call(**values: Any) -> object:
        for name, (options, combine) in groups.items():
            values[name] = combine({option: values.pop(option) for option in options})
        return command(**values)

    # Typer reads both attributes.
    call.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {option.name: option.annotation for option in parameters}
    return call


def _group(annotation: Any) -> tuple[list[Parameter], Callable[[dict[str, Any]], Any]] | None:
    """The options that a parameter stands for and the function that combines their values into the
    parameter's. None for an ordinary parameter."""
    if is_dataclass(annotation) and isinstance(annotation, type):
        hints = get_type_hints(annotation, include_extras=True)
        options = [
            Parameter(f.name, Parameter.KEYWORD_ONLY, default=f.default, annotation=hints[f.name])
            for f in dataclasses.fields(annotation)
        ]
        return options, lambda values: annotation(**values)
    for metadata in get_args(annotation):
        if isinstance(metadata, FieldsOf):
            return metadata.parameters(), metadata.collect
    return None


def whole_option(help: str, unset: str = "") -> Any:
    """An option for a whole number; `unset` is shown as the default if it is None."""
    return typer.Option(help=help, show_default=unset or True, **_NUMBERS["int"])


def bytes_option(help: str, unset: str) -> Any:
    """An option for a number of bytes, also as "2GB" or "512MiB"."""
    return typer.Option(help=help, show_default=unset, parser=parse_bytes, metavar="BYTES")


_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


def parse_bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([kmg]i?)?b?", text.lower())
    if match is None:
        raise typer.BadParameter(f"{text!r} is not a number of bytes such as 2000000000 or 2GB")
    return int(float(match[1]) * _UNITS[match[2] or ""])


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


# Typer's own number types raise errors that do not name the wrong value.
_NUMBERS: dict[str, dict[str, Any]] = {
    "float": {"parser": _number, "metavar": "NUMBER"},
    "int": {"parser": _whole, "metavar": "WHOLE"},
}
