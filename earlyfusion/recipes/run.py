"""Recipes: short Python files that end in `config = ...` and are run by `earlyfusion train RECIPE`.

A recipe module has `config`, a dataclass of dataclasses, and `main(config)`. The command line
overrides any field: `steps=50` where the name is unique, `run.steps=50` where it is not.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import inspect
import shlex
import sys
import textwrap
from dataclasses import fields, is_dataclass, replace
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from types import ModuleType, NoneType, UnionType
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

from earlyfusion import files
from earlyfusion.errors import SettingError

if TYPE_CHECKING:
    from earlyfusion.config import ModelConfig

RECIPES = {
    "mini_image_tokenizer": "earlyfusion.mini.image_tokenizer",
    "image_tokenizer_512": "earlyfusion.recipes.image_tokenizer_512",
    "mini_transformer": "earlyfusion.mini.transformer",
    "mini_answers": "earlyfusion.mini.answers",
    "mini_drawings": "earlyfusion.mini.drawings",
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


def run(name: str, overrides: list[str]) -> None:
    """Run a recipe of this package, or a recipe file, with `field=value` overrides.

    Raises `SettingError` for an unknown recipe or field, or a value of the wrong type.
    """
    recipe = _load(name)
    from earlyfusion.train import folder  # once the name is known to be good: it needs torch

    with folder.told_to_torchrun():
        _run(recipe, override(recipe.config, overrides), name, overrides)


def _run(recipe: ModuleType, config: Any, name: str, overrides: list[str]) -> None:
    from earlyfusion.train import folder

    out = getattr(getattr(config, "run", config), "out", None)
    if not isinstance(out, Path):
        recipe.main(config)
        return
    command = shlex.join(["earlyfusion", "train", name, *overrides])
    with files.full_disk_told(out), folder.locked(out), folder.termination_raises():
        of_runs = not hasattr(config, "run")
        folder.begin(out, type(config).__name__, _named(config), of_runs)
        try:
            recipe.main(config)
        except (KeyboardInterrupt, folder.Terminated):
            folder.say(folder.farewell(out, command, stopped=True))
            raise
        _end(config, out, command)


def _end(config: Any, out: Path, command: str) -> None:
    from earlyfusion.train import checkpoint, folder

    there = checkpoint.steps(out)
    steps = config.run.steps if hasattr(config, "run") else 0
    early = bool(there) and there[-1] < steps and not checkpoint.has_ended(out)
    folder.end(out, _named(config), finished=bool(there) and not early)
    if early:
        folder.say(f"step {there[-1]:,} of {steps:,}, as stop_after says: without it, {command}")
    if said := folder.farewell(out, command, stopped=False):
        folder.say(said)


def _named(config: Any) -> dict[str, str]:
    """Every field by its whole name, as text."""
    return {".".join(path): str(_value(config, path)) for path in _leaves(config)}


def _value(config: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        config = getattr(config, name)
    return config


def plan(name: str, overrides: list[str]) -> str:
    """Memory, speed and days of a recipe on 64 to 3,072 GPUs, as text; nothing is run.

    Raises `SettingError` where `run` would, and for a recipe that does not train a transformer.
    """
    from earlyfusion.config import ModelConfig
    from earlyfusion.train.plan import FEW_GPUS, GPUS, PEAK_TFLOPS, Job, table

    config = override(_load(name).config, overrides)
    model, run = _shape(name, config), config.run
    length = config.length or model.max_position_embeddings
    job = Job(
        model=model,
        layout=run.parallel,
        rows=config.rows,
        length=length,
        micro_rows=getattr(config, "micro_rows", 0),
        tokens=float(run.steps) * config.rows * length,
        dropout=config.dropout,
        peak_tflops=run.peak_tflops or PEAK_TFLOPS,
        part=getattr(config, "part", "all"),
        lora=getattr(config, "lora", 0),
    )
    return table(job, GPUS if isinstance(config.model, ModelConfig) else FEW_GPUS)


def _shape(name: str, config: Any) -> ModelConfig:
    """The shape of what a recipe trains: its own, of a model here, or of one known by its name."""
    from earlyfusion.checkpoints import detect as formats
    from earlyfusion.config import PRESETS, ModelConfig

    model = getattr(config, "model", None)
    if isinstance(model, ModelConfig) and hasattr(config, "rows"):
        return model
    if not isinstance(model, str) or not hasattr(config, "rows"):
        raise SettingError(f"recipe {name!r} has no plan: it does not say what model it trains")
    if model in formats.EMBEDDED or Path(model).expanduser().is_dir():
        return formats.open_source(formats.locate(model)).config
    if Path(model).name not in PRESETS:
        raise SettingError(
            f"model={model} is not on this disk: download it first, or give one of "
            f"{', '.join(PRESETS)}"
        )
    return PRESETS[Path(model).name]


def override(config: Any, overrides: list[str]) -> Any:
    """A copy of `config` with all of `field=value` or `part.field=value` applied at once."""
    changes: dict[tuple[str, ...], str] = {}
    for item in overrides:
        path, found, text = item.partition("=")
        if not found:
            raise SettingError(f"{item!r} is not of the form field=value")
        changes[_resolve(config, path.strip())] = text
    return _changed(config, changes) if changes else config


def _load(name: str) -> ModuleType:
    if name in RECIPES:
        return import_module(RECIPES[name])
    path = Path(name)
    if path.suffix != ".py" or not path.is_file():
        raise SettingError(
            f"recipe {name!r} is unknown: choose one of {', '.join(RECIPES)} or give a Python file"
        )
    module = _executed(path)
    if not (hasattr(module, "config") and hasattr(module, "main")):
        raise SettingError(f"{name} is no recipe: it needs `config` and `main(config)`")
    return module


def _executed(path: Path) -> ModuleType:
    """The module of a file, known to `sys.modules` as dataclasses need it.

    It may import what lies beside it, as a file that Python runs may.
    """
    folder, name = str(path.parent.resolve()), f"recipe_{_told_apart(path)}"
    if folder not in sys.path:
        sys.path.insert(0, folder)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _told_apart(path: Path) -> str:
    """A name that no file of the same name in another folder has, nor any library."""
    return f"{path.stem}_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]}"


def _leaves(config: Any, prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found: list[tuple[str, ...]] = []
    for item in fields(config):
        value = getattr(config, item.name)
        inner = _leaves(value, (*prefix, item.name)) if is_dataclass(value) else []
        found += inner or [(*prefix, item.name)]
    return found


def _resolve(config: Any, path: str) -> tuple[str, ...]:
    """The full path of a field given whole or by a unique ending."""
    wanted, leaves = tuple(path.split(".")), _leaves(config)
    matches = [p for p in leaves if p[-len(wanted) :] == wanted]
    exact = [p for p in matches if p == wanted]
    if len(exact or matches) == 1:
        return (exact or matches)[0]
    if matches:
        raise SettingError(
            f"field {path!r} could be any of {', '.join('.'.join(p) for p in matches)}: name one"
        )
    raise SettingError(
        f"field {path!r} is unknown: this recipe has {', '.join('.'.join(p) for p in leaves)}"
    )


def _changed(config: Any, changes: dict[tuple[str, ...], str]) -> Any:
    kinds, values = get_type_hints(type(config)), {}
    for name in dict.fromkeys(path[0] for path in changes):
        inner = {path[1:]: text for path, text in changes.items() if path[0] == name}
        is_field = () in inner
        values[name] = (
            _parse(kinds[name], name, inner[()])
            if is_field
            else _changed(getattr(config, name), inner)
        )
    return replace(config, **values)


def _parse(kind: Any, name: str, text: str) -> Any:
    if get_origin(kind) is UnionType:
        if text.lower() == "none":
            return None
        kind = next(k for k in get_args(kind) if k is not NoneType)
    try:
        if kind is bool:
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        if get_origin(kind) is tuple:
            return tuple(get_args(kind)[0](t) for t in text.split(",") if t)
        return kind(text)
    except (KeyError, ValueError, TypeError):
        shown = getattr(kind, "__name__", str(kind))
        raise SettingError(f"{name}={text!r} cannot be read as {shown}") from None


def summary(name: str) -> str:
    """The first line of what a recipe of this package says of itself; it is not imported."""
    spec = importlib.util.find_spec(RECIPES[name])
    assert spec is not None and spec.origin is not None
    source = Path(spec.origin).read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]


def described(name: str) -> str:
    """What a recipe says of itself, and its fields with kinds, defaults and meanings.

    Raises `SettingError` for an unknown recipe.
    """
    recipe = _load(name)
    lines = [
        f"  {field:<28} {kind} = {value}" + (f"\n      {meaning}" if meaning else "")
        for field, (kind, value, meaning) in settable(recipe.config).items()
    ]
    return "\n".join([inspect.getdoc(recipe) or name, "", "Fields:", *lines])


def fields_of(name: str) -> dict[str, tuple[str, Any, str]]:
    """`settable` of a recipe's config; none where the recipe cannot be had."""
    try:
        return settable(_load(name).config)
    except SettingError:
        return {}


def settable(config: Any) -> dict[str, tuple[str, Any, str]]:
    """The fields of a config by the shortest name that is unique: kind, default and meaning."""
    leaves = _leaves(config)
    found = {}
    for path in leaves:
        ends = [path[-count:] for count in range(1, len(path) + 1)]
        alone = [end for end in ends if sum(p[-len(end) :] == end for p in leaves) == 1]
        owner = config
        for part in path[:-1]:
            owner = getattr(owner, part)
        kind = get_type_hints(type(owner))[path[-1]]
        shown = getattr(kind, "__name__", str(kind)) if not get_args(kind) else str(kind)
        meaning = _meanings(type(owner)).get(path[-1], "")
        found[".".join((alone or [path])[0])] = (shown, getattr(owner, path[-1]), meaning)
    return found


def _meanings(kind: type) -> dict[str, str]:
    """The texts that stand below the fields of a dataclass and those it inherits from."""
    found: dict[str, str] = {}
    for cls in reversed(kind.__mro__[:-1]):
        try:
            [body] = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
        except (OSError, TypeError):  # made without a file
            continue
        rows = body.body if isinstance(body, ast.ClassDef) else []
        for field, text in pairwise(rows):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                value = text.value if isinstance(text, ast.Expr) else None
                if isinstance(value, ast.Constant):
                    found[field.target.id] = " ".join(str(value.value).split())
    return found
