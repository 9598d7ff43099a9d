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
    {"cli", "chat", "batch", "options", "terminal", "__main__"},
    {"serve", "bench", "evals", "hf", "mini", "recipes"},
    {"api"},
    {"engine", "train"},
    {"data", "generation", "checkpoints", "parallel"},
    {"kernels"},
    {"devices", "model", "image_tokenizer", "processes", "processor"},
    {"content", "vocabulary", "config", "fields", "files", "errors"},
]
STRANGERS = {("engine", "train"), ("train", "engine")}
OWNERS = {
    "transformers": {"hf"},
    "tokenizers": {"processor.py"},
    "safetensors": {"checkpoints"},
    "huggingface_hub": {"checkpoints", "hf"},
    "yaml": {"checkpoints"},
    "typer": {"cli.py", "options.py"},
    "rich": {"terminal.py", "train"},
    "fastapi": {"serve"},
    "uvicorn": {"serve"},
    "starlette": {"serve"},
    "pydantic": {"serve"},
    "prometheus_client": {"serve"},
    "tensorboard": {"train"},
    "torch.utils.tensorboard": {"train"},
    "wandb": {"train"},
    "torch.distributed": {"parallel.py", "processes.py", "engine/peers.py", "train/checkpoint.py"},
    "resvg_py": {"mini"},
    "pillow_heif": {"content.py"},
    "pyarrow": {"data/tables.py"},
    "ray": {"data/cluster.py", "serve/on_ray.py"},
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


def circle(arrows: dict[str, set[str]]) -> list[str]:
    """The names of a way through `arrows` that comes back to where it began; none without one."""
    done: set[str] = set()

    def walk(name: str, way: list[str]) -> list[str]:
        if name in way:
            return way[way.index(name) :]
        if name in done:
            return []
        for target in sorted(arrows.get(name, ())):
            if found := walk(target, [*way, name]):
                return found
        done.add(name)
        return []

    return next((found for name in arrows if (found := walk(name, []))), [])


def modules_used(path: Path) -> set[str]:
    """Files of the package that a file imports, as `model.transformer`."""
    names = {name.removeprefix("earlyfusion.") for name in imports(path)}
    names |= {name.rpartition(".")[0] for name in names}
    return names & {dotted(other) for other in FILES}


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


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


def test_no_file_imports_itself_by_way_of_others() -> None:
    assert circle({dotted(path): modules_used(path) for path in FILES}) == []


def test_no_room_imports_itself_by_way_of_others() -> None:
    arrows: dict[str, set[str]] = {}
    for path in FILES:
        used = {name for name in rooms_used(path) if name != "__version__"}
        arrows.setdefault(room(path), set()).update(used - {room(path)})
    assert circle(arrows) == []


@pytest.mark.parametrize("path", FILES, ids=shown)
def test_no_private_name_is_imported(path: Path) -> None:
    private = [
        name
        for name in imports(path)
        if name.startswith("earlyfusion.") and name.rpartition(".")[2].startswith("_")
    ]
    assert set(private) <= {"earlyfusion.__version__"}


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


def test_no_module_for_odds_and_ends() -> None:
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
