"""Peak memory of a conversion: random weights in Meta's shards, to transformers' layout and back.

    python benchmarks/convert_memory.py --preset chameleon-7b --shards 2 --folder /big/disk

The whole 7B needs 45 GB of disk and some minutes; `--layers 4` is the same with fewer layers. Each
conversion runs in a process of its own, whose largest resident size (Linux: VmHWM) is printed:
mapped pages of files count in it. It must stay under the largest file with weights, read or
written, plus 2 GB, else the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from earlyfusion.checkpoints.convert import convert
from earlyfusion.checkpoints.meta import copy_to_meta
from earlyfusion.checkpoints.source import Source, Stored
from earlyfusion.config import PRESETS, ModelConfig
from earlyfusion.files import new_folder
from earlyfusion.model.transformer import Transformer
from earlyfusion.model.vqgan import VQGAN
from earlyfusion.processor import train_tokenizer
from earlyfusion.vocabulary import ImageLayout

ALLOWANCE = 2e9


def random_source(config: ModelConfig, tokenizer: Path) -> Source:
    """A model of this shape whose random values are made when they are read."""
    codes = config.vq_config.num_embeddings
    tokenizer.write_text(train_tokenizer(["a red apple"], codes, codes + 400))
    with torch.device("meta"):
        shapes = Transformer(config).state_dict()
    tensors = {name: random_tensor(tuple(value.shape), name) for name, value in shapes.items()}
    vq = {name: Stored.of(value) for name, value in VQGAN(config.vq_config).state_dict().items()}
    grid = config.vq_config.grid
    return Source(tokenizer.parent, config, tensors, vq, tokenizer, ImageLayout(grid, grid))


def random_tensor(shape: tuple[int, ...], name: str) -> Stored:
    if "q_norm" in name or "k_norm" in name:
        return Stored.of(torch.ones(shape, dtype=torch.bfloat16))
    return Stored(
        torch.bfloat16, shape, lambda: torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02)
    )


def measured(source: Path, target: Path, to: str) -> None:
    """Run in a process of its own: convert, and print what it took."""
    start = time.monotonic()
    convert(source, target, "hf" if to == "hf" else "meta")
    status = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    # Not ru_maxrss: a child begins with its parent's.
    peak = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    print(json.dumps({"peak": peak, "seconds": time.monotonic() - start}))


def report(source: Path, target: Path, to: str) -> bool:
    """Convert in a child and say how it went; whether it stayed under the limit."""
    command = [sys.executable, __file__, "--child", str(source), str(target), to]
    ran = subprocess.run(command, check=True, capture_output=True, text=True)
    took = json.loads(ran.stdout)
    total, largest = weight_bytes(target)
    largest = max(largest, weight_bytes(source)[1])
    limit = largest + ALLOWANCE
    print(
        f"to {to}: {total / 1e9:.2f} GB, largest file {largest / 1e9:.2f} GB, "
        f"peak {took['peak'] / 1e9:.2f} GB of at most {limit / 1e9:.2f}, {took['seconds']:.0f} s"
    )
    return bool(took["peak"] < limit)


def weight_bytes(folder: Path) -> tuple[int, int]:
    """Bytes of all files with weights, and of the largest."""
    weights = [p for pattern in ("*.pth", "*.safetensors") for p in folder.glob(pattern)]
    sizes = [p.stat().st_size for p in weights]
    return sum(sizes), max(sizes)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="chameleon-7b", choices=PRESETS)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--shards", type=int, default=1)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--child", nargs=3)
    options = parser.parse_args()
    if options.child:
        measured(Path(options.child[0]), Path(options.child[1]), options.child[2])
        return 0
    config = PRESETS[options.preset]
    config = replace(config, num_hidden_layers=options.layers or config.num_hidden_layers)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        source = random_source(config, folder / "tokenizer.json")
        with new_folder(folder / "meta") as target:
            copy_to_meta(source, target, options.shards, lambda size: None)
        good = report(folder / "meta", folder / "hf", "hf")
        good &= report(folder / "hf", folder / "again", "meta")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
