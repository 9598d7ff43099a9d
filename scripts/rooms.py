"""How the code is spread over the rooms of the package: `python scripts/rooms.py [--at COMMIT]`.

Prints a Markdown table. Lines are lines of code, without blank ones, comments and docstrings. The
length of a function counts from `def` to its last line. Comments and docstring lines are given per
100 lines of code.
"""

from __future__ import annotations

import argparse
import ast
import io
import statistics
import subprocess
import tempfile
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SKIPPED = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass
class Count:
    files: int = 0
    code: int = 0
    comments: int = 0
    docstrings: int = 0
    lengths: list[int] = field(default_factory=list)

    def add(self, source: str) -> None:
        tree = ast.parse(source)
        documented = set(docstring_lines(tree))
        coded: set[int] = set()
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type == tokenize.COMMENT:
                self.comments += 1
            elif token.type not in SKIPPED:
                coded.update(range(token.start[0], token.end[0] + 1))
        self.files += 1
        self.code += len(coded - documented)
        self.docstrings += len(documented)
        for node in ast.walk(tree):
            if isinstance(node, FUNCTIONS):
                self.lengths.append(int(node.end_lineno or 0) - node.lineno + 1)

    def row(self, name: str) -> str:
        lengths, hundred = sorted(self.lengths) or [0], max(self.code, 1) / 100
        cells = [name, self.files, self.code, len(self.lengths), round(statistics.median(lengths))]
        cells.append(lengths[int(0.95 * (len(lengths) - 1))])
        cells += [f"{self.comments / hundred:.1f}", f"{self.docstrings / hundred:.1f}"]
        return f"| {' | '.join(map(str, cells))} |"


def docstring_lines(tree: ast.Module) -> Iterator[int]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, *FUNCTIONS)) and ast.get_docstring(node):
            text = node.body[0]
            yield from range(text.lineno, int(text.end_lineno or 0) + 1)


def room_of(path: Path) -> str:
    """The folder right under the package, or the package for its own files."""
    return path.parts[0] + "/" if len(path.parts) > 1 else "earlyfusion/*.py"


def table(package: Path) -> str:
    rooms: dict[str, Count] = {}
    whole = Count()
    for path in sorted(package.rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        for count in (rooms.setdefault(room_of(path.relative_to(package)), Count()), whole):
            count.add(source)
    heads = "room | files | lines | functions | median length | 95th percentile | comments"
    lines = [f"| {heads} | docstring lines |", "| --- |" + " ---: |" * 7]
    lines += [rooms[name].row(name) for name in sorted(rooms)]
    return "\n".join([*lines, whole.row("all")])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--at", help="a commit; without it the files as they are")
    at = parser.parse_args().at
    if at is None:
        print(table(ROOT / "earlyfusion"))
        return
    with tempfile.TemporaryDirectory() as folder:
        archive = subprocess.run(
            ["git", "archive", at, "earlyfusion"], cwd=ROOT, stdout=subprocess.PIPE, check=True
        )
        subprocess.run(["tar", "x", "-C", folder], input=archive.stdout, check=True)
        print(table(Path(folder) / "earlyfusion"))


if __name__ == "__main__":
    main()
