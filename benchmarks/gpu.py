"""Proves and measures everything on one CUDA card, in less than nine minutes.

    python benchmarks/gpu.py --out results
    python benchmarks/gpu.py --list
    python benchmarks/gpu.py --parts limits bf16 --minutes 3 --out results
    python benchmarks/gpu.py --rehearse --out results

Each part runs in a process of its own and has a budget of seconds; the most valuable come first. A
part that fails, hangs or runs out of memory ends alone, and its traceback is kept. After every
figure OUT holds all that is known: results.json, results.md, results.png, and log.txt with what the
parts print. Weights are random and made on the device. Nothing is downloaded. Without transformers,
or without pytest, the parts that need them are skipped. `--rehearse` runs all of it on a CPU with
tiny shapes: it shows that everything runs through, and its figures mean nothing.

Needs torch with CUDA, Triton, and what the package itself needs.
"""

from __future__ import annotations

import argparse
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import torch  # noqa: E402
from gpu_parts import checks, decode, kernels, machine, stock, training, vqgan  # noqa: E402
from gpu_parts.settings import Settings, rehearsal  # noqa: E402
from plots import chart  # noqa: E402

from earlyfusion.bench.parts import Outcome, Part, as_json, as_markdown, merged_rows, run_parts  # noqa: E402

MINUTES = 8.9

PARTS = (
    Part("limits", "environment, and rates of copies, sums and products", 20, machine.limits),
    Part("correct", "kernels, blocks of the 7B and mini beside the CPU", 40, checks.correct),
    Part(
        "bf16",
        "the 7B in bf16: texts, images, many at once, a prompt",
        60,
        partial(decode.weights, dtype="plain"),
    ),
    Part("eager", "transformers, eager, on the same card", 30, stock.eager),
    Part("int4", "the same in int4", 35, partial(decode.weights, dtype="int4")),
    Part("int8", "the same in int8", 35, partial(decode.weights, dtype="int8")),
    Part("training", "training: 110M, 1B, four blocks of the 7B", 55, training.training),
    Part("backends", "engine back ends, each by name", 35, decode.backends),
    Part("attention", "attention of one token per row beside SDPA and flex", 25, kernels.attention),
    Part("compiled", "transformers, static cache and torch.compile", 50, stock.compiled),
    Part("classes", "our seven classes, eager and compiled", 30, stock.classes),
    Part("vqgan", "the VQ-GAN in several precisions", 25, vqgan.vqgan),
    Part("products", "products of few rows in 16, 8 and 4 bits", 15, kernels.products),
    Part("tests", "tests marked gpu, and of equality on the device", 39, checks.tests),
    Part("cold", "cold start to the first token, and its memory", 40, machine.cold_start),
)


class Results:
    """The files of a run; written anew after every row, the chart at the end of a part."""

    def __init__(self, out: Path, title: str) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.out, self._title, self._parts = out, title, 0
        self._since = time.time()

    def keep(self, outcomes: Sequence[Outcome]) -> None:
        seconds = round(time.time() - self._since, 1)
        more = {"title": self._title, "seconds": seconds, "python": platform.python_version()}
        self._write("results.json", as_json(outcomes, **more, torch=torch.__version__))
        self._write("results.md", f"{self._title}\n\n{as_markdown(outcomes)}")
        if len(outcomes) > self._parts:
            self._parts = len(outcomes)
            self.save_chart(outcomes)

    def save_chart(self, outcomes: Sequence[Outcome]) -> None:
        """Bars for each row with a floor or with more than one contender."""
        rows = []
        for row in merged_rows(outcomes):
            floor = {} if row.floor is None else {"floor": row.floor}
            if row.unit in ("ms", "µs", "s", "tokens/s"):
                rows.append({"what": row.what, "unit": row.unit, "values": row.values | floor})
        if any(len(row["values"]) > 1 for row in rows):
            chart({"rows": rows}, self._title).save(self.out / "results.png")

    def _write(self, name: str, text: str) -> None:
        # Whole or not at all: the machine may be taken away while this is written.
        beside = self.out / f".{name}"
        beside.write_text(text, encoding="utf-8")
        beside.replace(self.out / name)


def chosen(names: Sequence[str] | None) -> list[Part]:
    known = {part.name: part for part in PARTS}
    unknown = [name for name in names or () if name not in known]
    if unknown:
        sys.exit(f"no part is called {', '.join(unknown)}: choose of {', '.join(known)}")
    return [part for part in PARTS if not names or part.name in names]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder of the results")
    parser.add_argument("--parts", nargs="+", metavar="PART", help="only these, in their order")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="of all parts together")
    parser.add_argument("--list", action="store_true", help="list the parts and their seconds")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, with tiny shapes")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    parts = chosen(options.parts)
    if options.list:
        for part in parts:
            print(f"{part.name:<10} {part.seconds:>4.0f} s  {part.what}")
        return
    title = "gpu.py, rehearsed on a CPU" if options.rehearse else "gpu.py"
    results = Results(options.out, title)
    with tempfile.TemporaryDirectory() as work:
        settings = (rehearsal if options.rehearse else Settings)(Path(work))
        # A process that was forked cannot use CUDA if its parent did, so there each starts afresh.
        method = "fork" if options.rehearse else "spawn"
        if options.rehearse:
            import contenders  # noqa: F401  # transformers, once for all parts

            torch.set_num_threads(1)
        log = options.out / "log.txt"
        log.write_text("", encoding="utf-8")
        outcomes = run_parts(parts, settings, options.minutes, method, log, results.keep)
    results.save_chart(outcomes)
    done = sum(outcome.status == "done" for outcome in outcomes)
    print(f"\n{(options.out / 'results.md').read_text(encoding='utf-8')}")
    print(f"{done} of {len(outcomes)} parts are done; results are in {options.out}")
    sys.exit(0 if done + sum(o.status == "skipped" for o in outcomes) == len(outcomes) else 1)


if __name__ == "__main__":
    main()
