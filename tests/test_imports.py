"""The rules of the house: imports point down only, and each outside library has one owner."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import earlyfusion

ROOT = Path(earlyfusion.__file__).parent
FILES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")

# From the top down; a module may import from its own line and the lines below.
LAYERS = [
    {"cli", "chat", "batch", "terminal", "__main__"},
    {"serve", "evals", "hf", "recipes"},
    {"api"},
    {"engine", "train"},
    {"generation", "checkpoints", "parallel"},
    {"model", "image_tokenizer", "processor"},
    {"content", "vocabulary", "config", "files", "errors"},
]
STRANGERS = {("engine", "train"), ("train", "engine")}
OWNERS = {
    "transformers": {"hf"},
    "tokenizers": {"processor.py"},
    "safetensors": {"checkpoints"},
    "huggingface_hub": {"checkpoints", "hf"},
    "yaml": {"checkpoints"},
    "typer": {"cli.py"},
    "rich": {"terminal.py", "train"},
    "fastapi": {"serve"},
    "uvicorn": {"serve"},
    "starlette": {"serve"},
    "tensorboard": {"train"},
    "torch.utils.tensorboard": {"train"},
    "wandb": {"train"},
    "torch.distributed": {"parallel.py", "train/checkpoint.py", "engine/runner.py"},
    "resvg_py": {"recipes"},
    "pillow_heif": {"content.py"},
    "pyarrow": {"train/corpus/tables.py"},
    "ray": {"train/corpus/cluster.py"},
}


def imports(path: Path) -> Iterator[str]:
    """Dotted names that a file imports, a name imported from a package included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def rooms_used(path: Path) -> Iterator[str]:
    for name in imports(path):
        if name.startswith("earlyfusion."):
            first = name.split(".")[1]
            home = earlyfusion._HOME.get(first)
            yield home.split(".")[1] if home else first


def layer(name: str) -> int:
    return next(number for number, names in enumerate(LAYERS) if name in names)


def shown(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_every_module_has_a_layer() -> None:
    unknown = {room(path) for path in FILES} - set().union(*LAYERS)
    assert not unknown


@pytest.mark.parametrize("path", FILES, ids=shown)
def test_imports_point_down(path: Path) -> None:
    used = set(rooms_used(path)) - {"__version__"}
    up = {name for name in used if layer(name) < layer(room(path))}
    assert not up
    assert not {(room(path), name) for name in used} & STRANGERS


@pytest.mark.parametrize("library", OWNERS)
def test_each_library_has_one_owner(library: str) -> None:
    users = {
        shown(path)
        for path in FILES
        if any(name == library or name.startswith(f"{library}.") for name in imports(path))
    }
    homes = OWNERS[library]
    assert {user for user in users if not {user, user.split("/")[0]} & homes} == set()


def test_values_know_no_torch() -> None:
    values = [path for path in FILES if room(path) in LAYERS[-1]]
    assert len(values) >= len(LAYERS[-1])
    assert not [
        shown(path) for path in values if "torch" in {n.split(".")[0] for n in imports(path)}
    ]


def test_no_drawer_for_odds_and_ends() -> None:
    names = {path.stem for path in FILES} | {path.parent.name for path in FILES}
    assert not names & {"utils", "util", "common", "base", "misc", "helpers"}


@pytest.mark.parametrize("module", ["earlyfusion", "earlyfusion.cli", "earlyfusion.content"])
def test_first_import_is_quick_and_without_torch(module: str) -> None:
    """Quick in processor time, so that a busy machine does not matter."""
    script = (
        "import sys, time; start = time.process_time(); "
        f"import {module}; print(time.process_time() - start, 'torch' in sys.modules)"
    )
    # The idle threads of numpy's linear algebra would count as processor time.
    alone = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
    runs = [
        subprocess.run(
            [sys.executable, "-c", script],
            cwd=ROOT.parent,
            env=alone,
            check=True,
            capture_output=True,
            text=True,
        ).stdout.split()
        for _ in range(3)
    ]
    assert {torch for _, torch in runs} == {"False"}
    assert min(float(seconds) for seconds, _ in runs) < 0.3


def test_everything_at_once_is_quiet_and_without_transformers() -> None:
    script = (
        "import sys; from earlyfusion import *; "
        "print(Chameleon.__name__, EarlyFusionError.__name__, ImageDone.__name__, Usage.__name__, "
        "sorted({'transformers', 'torchao'} & {*sys.modules}))"
    )
    command = [sys.executable, "-W", "error", "-c", script]
    run = subprocess.run(command, cwd=ROOT.parent, check=True, capture_output=True, text=True)
    assert (run.stdout, run.stderr) == ("Chameleon EarlyFusionError ImageDone Usage []\n", "")


def test_public_names_can_be_had() -> None:
    for name in {*earlyfusion.__all__, *earlyfusion._HOME}:
        assert getattr(earlyfusion, name) is not None
    assert {*earlyfusion._HOME} <= {*dir(earlyfusion)}
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = earlyfusion.no_such_name
