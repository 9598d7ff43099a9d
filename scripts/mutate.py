"""How many one-line bugs the tests notice: random mutants, each run against tests.

    pip install coverage
    python scripts/mutate.py map                     # one run of all tests: which reach which lines
    python scripts/mutate.py run --count 150 --seed 1  # mutants against those tests, fastest first

A mutant changes one expression or drops one statement on a line that some test runs. It is caught
when a test fails or when its tests take over a minute more than three times their usual time.
Everything happens in a copy of the repository; the map and the results stay in `--keep`. Of a line
that many tests reach, the fastest are run, up to `--most` seconds of them.
"""

from __future__ import annotations

import argparse
import ast
import copy
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COMPARISONS: dict[type, type] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
    ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
OPERATORS: dict[type, type] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.FloorDiv: ast.Mult,
    ast.Div: ast.Mult, ast.Mod: ast.FloorDiv, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
}  # fmt: skip
NAMES = {"min": "max", "max": "min", "any": "all", "all": "any", "zeros": "ones", "ones": "zeros"}


def changed(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """Each one-step change of a node, with its name; the node itself stays as it is."""
    new = copy.deepcopy(node)
    match new:
        case ast.Compare() if type(new.ops[0]) in COMPARISONS:
            new.ops[0] = COMPARISONS[type(new.ops[0])]()
            yield "comparison", new
        case ast.BinOp() if type(new.op) in OPERATORS and not _is_annotation(new):
            new.op = OPERATORS[type(new.op)]()
            yield "operator", new
        case ast.BoolOp():
            new.op = ast.Or() if isinstance(new.op, ast.And) else ast.And()
            yield "and / or", new
        case ast.UnaryOp(op=ast.Not()):
            yield "not dropped", new.operand
        case ast.IfExp():
            yield "first branch always", new.body
            yield "second branch always", new.orelse
        case ast.Constant(value=bool()):
            yield "truth value", ast.Constant(not new.value)
        case ast.Constant(value=int()):
            yield "number plus one", ast.Constant(new.value + 1)
        case ast.Name() if new.id in NAMES and isinstance(new.ctx, ast.Load):
            yield "name", ast.Name(NAMES[new.id], ast.Load())
        case ast.Expr(value=ast.Call()) | ast.AugAssign() | ast.Raise():
            yield "statement dropped", ast.Pass()
        case ast.If(orelse=[]):
            yield "guard dropped", ast.Pass()
        case ast.Return(value=ast.expr()) if not isinstance(new.value, ast.Constant):
            yield "returns None", ast.Return(ast.Constant(None))
        case _:
            pass


def _is_annotation(node: ast.BinOp) -> bool:
    """`int | None` and the like, which mean nothing while the program runs."""
    return isinstance(node.op, ast.BitOr) and any(
        isinstance(side, ast.Constant) and side.value is None for side in (node.left, node.right)
    )


class Mutate(ast.NodeTransformer):
    """Makes the change with number `wanted`; counts and describes all of them on the way."""

    def __init__(self, wanted: int = -1) -> None:
        self.wanted, self.found = wanted, list[tuple[int, str]]()

    def visit(self, node: ast.AST) -> ast.AST:
        if isinstance(node, ast.AnnAssign):
            node.value = self.visit(node.value) if node.value else None
            return node
        if isinstance(node, ast.FunctionDef):
            node.body = [self.visit(line) for line in node.body]
            return node
        chosen = None
        for name, new in changed(node):
            if len(self.found) == self.wanted:
                chosen = new
            self.found.append((node.lineno, name))
        return ast.copy_location(chosen, node) if chosen else self.generic_visit(node)


def mutants(path: Path) -> list[tuple[int, str]]:
    """Line and kind of each possible change of a file."""
    finder = Mutate()
    finder.visit(ast.parse(path.read_text(encoding="utf-8")))
    return finder.found


def mutate(source: str, number: int) -> str:
    tree = Mutate(number).visit(ast.parse(source))
    return ast.unparse(ast.fix_missing_locations(tree))


def make_map(keep: Path, more: list[str]) -> None:
    """Run the tests under coverage; leave which tests reach each line and what each takes."""
    keep.mkdir(parents=True, exist_ok=True)
    report, data = keep / "durations.txt", keep / "coverage"
    command = [
        sys.executable,
        "-m",
        "coverage",
        "run",
        f"--data-file={data}",
        "--source=earlyfusion",
    ]
    (keep / "coveragerc").write_text("[run]\ndynamic_context = test_function\n")
    command += [f"--rcfile={keep / 'coveragerc'}", "-m", "pytest", "--durations=0", "-vv", *more]
    with report.open("w") as out:
        subprocess.run(command, cwd=ROOT, stdout=out, check=False)
    print(report.read_text().strip().splitlines()[-1])


def reached(keep: Path) -> dict[str, dict[int, set[str]]]:
    """Of each file its lines, with the test functions that run them."""
    import coverage

    data = coverage.CoverageData(str(keep / "coverage"))
    data.read()
    lines: dict[str, dict[int, set[str]]] = {}
    for file in data.measured_files():
        contexts = data.contexts_by_lineno(file)
        name = str(Path(file).relative_to(ROOT))
        lines[name] = {n: {t for t in tests if t} for n, tests in contexts.items()}
    return lines


def seconds(keep: Path) -> Counter[str]:
    """What each test function takes, all its cases together: `tests.test_x.test_y` -> seconds."""
    spent: Counter[str] = Counter()
    for line in (keep / "durations.txt").read_text().splitlines():
        parts = line.split()
        if len(parts) == 3 and parts[1] in ("call", "setup") and parts[0].endswith("s"):
            spent[as_context(parts[2])] += float(parts[0][:-1])
    return spent


def as_context(node: str) -> str:
    """`tests/test_x.py::test_y[1]` as coverage names it: `test_x.test_y`."""
    file, _, function = node.partition("[")[0].partition("::")
    return f"{Path(file).stem}.{function.replace('::', '.')}"


def as_node(context: str) -> str:
    parts = context.removeprefix("tests.").split(".")
    return f"tests/{parts[0]}.py::{'::'.join(parts[1:])}"


def choose(
    keep: Path, count: int, seed: int, only: str
) -> list[tuple[str, int, int, str, list[str]]]:
    """Random mutants that tests reach, the same number from each folder where there are enough."""
    spent, lines = seconds(keep), reached(keep)
    rooms: dict[str, list[tuple[str, int, int, str, list[str]]]] = {}
    for file in sorted(lines):
        if only not in file:
            continue
        for number, (line, kind) in enumerate(mutants(ROOT / file)):
            tests = lines[file].get(line, set())
            names = sorted({t.removeprefix("tests.") for t in tests}, key=lambda t: spent[t])
            if names:
                rooms.setdefault(str(Path(file).parent), []).append(
                    (file, number, line, kind, names)
                )
    draw = random.Random(seed)
    for room in rooms.values():
        draw.shuffle(room)
    chosen = []
    while len(chosen) < count and any(rooms.values()):
        for room in [room for room in rooms.values() if room]:
            chosen.append(room.pop())
    return chosen[:count]


def survives(folder: Path, tests: list[str], limit: float) -> bool:
    """Whether all these tests pass, in a child process that has the libraries loaded already."""
    child = os.fork()
    if child == 0:
        os.setsid()
        with (folder / "mutant.log").open("w") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        os.chdir(folder)
        sys.path.insert(0, str(folder))
        os.environ["PYTHONPATH"] = str(folder)
        import pytest

        code = 1
        try:
            # Plugins that the libraries have loaded already are no reason to fail.
            options = ["-x", "-q", "-p", "no:cacheprovider", "-W"]
            options.append("ignore::pytest.PytestAssertRewriteWarning")
            code = int(pytest.main([*options, *tests]))
        finally:  # what a test forks must not come back into the loop over the mutants
            os._exit(code)
    end = time.monotonic() + limit
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status) == 0
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def first_failed(folder: Path) -> str | None:
    """The test that noticed the last mutant; None where it could not even be collected in time."""
    for row in (folder / "mutant.log").read_text(errors="replace").splitlines():
        if row.startswith(("FAILED tests/", "ERROR tests/")) and "::" in row:
            return row.split(" - ")[0].split(" ", 1)[1].strip()
    return None


def run(keep: Path, count: int, seed: int, only: str, most: float) -> None:
    import torch  # loaded once, for all children
    import transformers

    print(f"torch {torch.__version__}, transformers {transformers.__version__}")
    spent, results = seconds(keep), keep / f"results-{seed}.jsonl"
    known = (
        {tuple(json.loads(row)[:2]) for row in results.read_text().splitlines()}
        if results.exists()
        else set()
    )
    passed: set[str] = set()  # tests that were seen to pass without a mutant
    with tempfile.TemporaryDirectory() as temporary, results.open("a") as out:
        folder = Path(temporary) / "repository"
        shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".git", ".mutants", "runs"))
        for file, number, line, kind, names in choose(keep, count, seed, only):
            if (file, number) in known:
                continue
            source, total, tests = (ROOT / file).read_text(encoding="utf-8"), 0.0, []
            for name in names:
                total += spent[name]
                if tests and total > most:
                    break
                tests.append(as_node(name))
            (folder / file).write_text(mutate(source, number), encoding="utf-8")
            alive = survives(folder, tests, 400 + 10 * total)
            failed = None if alive else first_failed(folder)
            (folder / file).write_text(source, encoding="utf-8")
            if failed and failed not in passed and not survives(folder, [failed], 300):
                print("no test  ", f"{file}:{line}: {failed} fails without a mutant", flush=True)
                continue
            passed.update([failed] if failed else [])
            text = source.splitlines()[line - 1].strip()
            print(
                "SURVIVED" if alive else "caught  ",
                f"{file}:{line}",
                kind,
                "|",
                text,
                f"| {len(tests)} of {len(names)}",
                flush=True,
            )
            out.write(
                json.dumps([file, number, line, kind, text, alive, len(tests), len(names)]) + "\n"
            )
            out.flush()
    rows = [json.loads(row) for row in results.read_text().splitlines()]
    caught = sum(not row[5] for row in rows)
    print(f"{caught} of {len(rows)} caught: {100 * caught / max(len(rows), 1):.1f}%")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("map", "run"))
    parser.add_argument("--keep", type=Path, default=ROOT / ".mutants")
    parser.add_argument("--count", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="only files whose path holds this")
    parser.add_argument("--most", type=float, default=120, help="seconds of tests for one mutant")
    given, more = parser.parse_known_args()
    if given.what == "map":
        make_map(given.keep, more)
    else:
        run(given.keep, given.count, given.seed, given.only, given.most)


if __name__ == "__main__":
    main()
