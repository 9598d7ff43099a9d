"""Finds and runs recipes: short Python files that `earlyfusion train RECIPE` runs.

A recipe is a module with `config`, a dataclass of dataclasses, and `main(config)`. The command line
overrides any field: `steps=50` where the name is unique, `run.steps=50` where it is not. Two
attributes of a config have a meaning here:

- `run`, a `RunConfig`: its folder is locked, and belongs to this run from then on. A recipe that
  runs other recipes has `out` instead, the folder that holds theirs.
- `job()`, which `--plan` needs (`Plannable`).
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import inspect
import math
import shlex
import sys
from dataclasses import fields, is_dataclass, replace
from importlib import import_module
from pathlib import Path
from types import ModuleType, NoneType, UnionType
from typing import Any, Protocol, cast, get_args, get_origin, get_type_hints, runtime_checkable

from earlyfusion import files
from earlyfusion.errors import SettingError
from earlyfusion.fields import meanings
from earlyfusion.train.plan import Job, table

RECIPES = {
    "mini_image_tokenizer": "earlyfusion.mini.image_tokenizer",
    "image_tokenizer_512": "earlyfusion.recipes.image_tokenizer_512",
    "mini_transformer": "earlyfusion.mini.transformer",
    "mini_answers": "earlyfusion.mini.answers",
    "mini_drawings": "earlyfusion.mini.drawings",
    "mini_deeper": "earlyfusion.mini.deeper",
    "mini_styles": "earlyfusion.mini.styles",
    "mini_named_image_tokenizer": "earlyfusion.mini.named_image_tokenizer",
    "mini_packed_transformer": "earlyfusion.mini.packed_transformer",
    "mini_packed_chat": "earlyfusion.mini.packed_chat",
    "pretrain_mini": "earlyfusion.mini.pretrain",
    "finetune": "earlyfusion.recipes.finetune",
    "finetune_7b": "earlyfusion.recipes.finetune_7b",
    "lora_7b": "earlyfusion.recipes.lora_7b",
    "image_head_7b": "earlyfusion.recipes.image_head_7b",
    "pretrain_7b": "earlyfusion.recipes.pretrain_7b",
    "pretrain_34b": "earlyfusion.recipes.pretrain_34b",
    "ablations": "earlyfusion.mini.ablations",
}


class Recipe(Protocol):
    """What a module must have to be a recipe; `config` is a dataclass."""

    config: Any

    def main(self, config: Any) -> None: ...


@runtime_checkable
class Plannable(Protocol):
    """A config that can say what its run takes, such as `LanguageConfig`."""

    def job(self) -> Job: ...


def run(name: str, overrides: list[str]) -> None:
    """Run a recipe of this package, or a recipe file, with `field=value` overrides. Raises
    `SettingError` for an unknown recipe or field, or a value of the wrong type."""
    recipe = load(name)
    from earlyfusion.train import folder  # after the name is checked: it imports torch

    with folder.reported_to_torchrun():
        _run(recipe, override(recipe.config, overrides), name, overrides)


def _run(recipe: Recipe, config: Any, name: str, overrides: list[str]) -> None:
    """Run a recipe with its folder locked and noted in `run.json`, and print how to continue it."""
    from earlyfusion.train import folder

    out, steps = _folder_and_steps(config)
    if out is None:
        recipe.main(config)
        return
    command = shlex.join(["earlyfusion", "train", name, *overrides])
    with files.full_disk_reported(out), folder.locked(out), folder.termination_raises():
        folder.begin(out, type(config).__name__, _fields_as_text(config), holds_runs=steps == 0)
        try:
            recipe.main(config)
        except (KeyboardInterrupt, folder.Terminated):
            folder.say(folder.closing_message(out, command, stopped=True))
            raise
        _end_run(config, out, steps, command)


def _folder_and_steps(config: Any) -> tuple[Path | None, int]:
    """The folder that a recipe trains in, and the steps of its run (0 if it runs others)."""
    from earlyfusion.train.trainer import RunConfig

    run = getattr(config, "run", None)
    if isinstance(run, RunConfig):
        return run.out, run.steps
    out = getattr(config, "out", None)
    return (out if isinstance(out, Path) else None), 0


def _end_run(config: Any, out: Path, steps: int, command: str) -> None:
    """Note whether the run is finished, and print where its results are."""
    from earlyfusion.train import checkpoint, folder

    saved_steps = checkpoint.steps(out)
    stopped_early = bool(saved_steps) and saved_steps[-1] < steps and not checkpoint.has_ended(out)
    folder.end(out, _fields_as_text(config), finished=bool(saved_steps) and not stopped_early)
    if stopped_early:
        folder.say(
            f"step {saved_steps[-1]:,} of {steps:,}, as stop_after says: without it, {command}"
        )
    if sentence := folder.closing_message(out, command, stopped=False):
        folder.say(sentence)


def _fields_as_text(config: Any) -> dict[str, str]:
    """Every field by its full name, as text."""
    return {".".join(path): str(_value_at(config, path)) for path in _field_paths(config)}


def _value_at(config: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        config = getattr(config, name)
    return config


def plan(name: str, overrides: list[str]) -> str:
    """Memory, speed and time of a recipe on several numbers of GPUs, as text; nothing is run.
    Raises `SettingError` as `run` does, and for a recipe that does not train a transformer."""
    config = override(load(name).config, overrides)
    if not isinstance(config, Plannable):
        raise SettingError(
            f"recipe {name!r} has no plan, as its config has no job(): give one that trains a "
            "transformer, as pretrain_7b"
        )
    return table(config.job())


def override(config: Any, overrides: list[str]) -> Any:
    """A copy of `config` with all `field=value` or `group.field=value` applied at once. Raises
    `SettingError` for an unknown or ambiguous field, and a value that is not possible."""
    changes: dict[tuple[str, ...], str] = {}
    for item in overrides:
        path, equals, text = item.partition("=")
        if not equals:
            raise SettingError(f"{item!r} is not of the form field=value, such as steps=50")
        changes[_resolve(config, path.strip())] = text
    return _with_changes(config, changes) if changes else config


def load(name: str) -> Recipe:
    """The module of a recipe, by its name or by the path of a Python file. Raises `SettingError`
    for an unknown name, or a file that is not a recipe."""
    if name in RECIPES:
        return cast(Recipe, import_module(RECIPES[name]))
    path = Path(name)
    if path.suffix != ".py" or not path.is_file():
        raise SettingError(
            f"recipe {name!r} is unknown: choose one of {', '.join(RECIPES)} or give a Python file"
        )
    module = _import_file(path)
    if not (hasattr(module, "config") and hasattr(module, "main")):
        raise SettingError(f"{name} is not a recipe: it needs `config` and `main(config)`")
    return cast(Recipe, module)


def _import_file(path: Path) -> ModuleType:
    """The module of a file, which may import other files of its folder."""
    folder, name = str(path.parent.resolve()), _module_name(path)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    # Dataclasses look up their module in `sys.modules`.
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _module_name(path: Path) -> str:
    """A name that differs from those of libraries and of files with the same name elsewhere."""
    return f"recipe_{path.stem}_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]}"


def _field_paths(config: Any, prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The paths of all fields, such as ("run", "steps"), without those that are groups."""
    paths: list[tuple[str, ...]] = []
    for item in fields(config):
        value = getattr(config, item.name)
        inner = _field_paths(value, (*prefix, item.name)) if is_dataclass(value) else []
        paths += inner or [(*prefix, item.name)]
    return paths


def _resolve(config: Any, path: str) -> tuple[str, ...]:
    """The path of a field that is given in full or by a unique ending."""
    ending, paths = tuple(path.split(".")), _field_paths(config)
    matches = [p for p in paths if p[-len(ending) :] == ending]
    exact = [p for p in matches if p == ending]
    if len(exact or matches) == 1:
        return (exact or matches)[0]
    if matches:
        raise SettingError(
            f"field {path!r} could be any of {', '.join('.'.join(p) for p in matches)}: name one"
        )
    raise SettingError(
        f"field {path!r} is unknown: this recipe has {', '.join('.'.join(p) for p in paths)}"
    )


def _with_changes(config: Any, changes: dict[tuple[str, ...], str]) -> Any:
    types, values = get_type_hints(type(config)), {}
    for name in dict.fromkeys(path[0] for path in changes):
        inner = {path[1:]: text for path, text in changes.items() if path[0] == name}
        if () in inner:
            values[name] = _parse(types[name], name, inner[()])
        else:
            values[name] = _with_changes(getattr(config, name), inner)
    return replace(config, **values)


def _parse(field_type: Any, name: str, text: str) -> Any:
    """A value of a field's type from its text on the command line."""
    if get_origin(field_type) is UnionType:  # X | None: the only unions that configs use
        if text.lower() == "none":
            return None
        field_type = next(t for t in get_args(field_type) if t is not NoneType)
    try:
        if field_type is bool:
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        if get_origin(field_type) is tuple:
            item_type = get_args(field_type)[0]
            return tuple(_finite(item_type(part)) for part in text.split(",") if part)
        return _finite(field_type(text))
    except (KeyError, ValueError, TypeError):
        type_name = getattr(field_type, "__name__", str(field_type))
        raise SettingError(
            f"{name}={text!r} cannot be read as {type_name}: give one, as in the recipe's --help"
        ) from None


def _finite(value: Any) -> Any:
    """The same value. Raises `ValueError` for infinity and for NaN, which range checks let pass."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError
    return value


def summary(name: str) -> str:
    """The first line of the docstring of a recipe of this package, without importing it."""
    spec = importlib.util.find_spec(RECIPES[name])
    assert spec is not None and spec.origin is not None
    source = Path(spec.origin).read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]


def help_text(name: str) -> str:
    """The docstring of a recipe, and its fields with types, defaults and meanings: the text of
    `earlyfusion train RECIPE --help`. Raises `SettingError` for an unknown recipe."""
    recipe = load(name)
    lines = [
        f"  {field:<28} {type_name} = {value}" + (f"\n      {meaning}" if meaning else "")
        for field, (type_name, value, meaning) in settable_fields(recipe.config).items()
    ]
    return "\n".join([inspect.getdoc(recipe) or name, "", "Fields:", *lines])


def fields_of(name: str) -> dict[str, tuple[str, Any, str]]:
    """`settable_fields` of a recipe's config; {} if the recipe cannot be loaded."""
    try:
        return settable_fields(load(name).config)
    except SettingError:
        return {}


def settable_fields(config: Any) -> dict[str, tuple[str, Any, str]]:
    """The fields of a config by their shortest unique name, each with its type, default and
    meaning."""
    paths = _field_paths(config)
    by_name = {}
    for path in paths:
        ends = [path[-count:] for count in range(1, len(path) + 1)]
        unique = [end for end in ends if sum(p[-len(end) :] == end for p in paths) == 1]
        owner, name = _value_at(config, path[:-1]), path[-1]
        hint = get_type_hints(type(owner))[name]
        type_name = str(hint) if get_args(hint) else getattr(hint, "__name__", str(hint))
        meaning = meanings(type(owner)).get(name, "")
        by_name[".".join((unique or [path])[0])] = (type_name, getattr(owner, name), meaning)
    return by_name
