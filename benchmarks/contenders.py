"""What the comparisons share: one random model in both libraries, rows of results, their table.

Rows are also written as JSON (`--json FILE`), for plots.py.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import ChameleonConfig, ChameleonForConditionalGeneration

from earlyfusion.bench.shapes import SHAPES
from earlyfusion.config import ModelConfig
from earlyfusion.model.transformer import Transformer

OURS, THEIRS = "earlyfusion", "transformers"
RATES = ("tokens/s",)  # of these, more is better; of times, less


@dataclass
class Row:
    """One thing measured: a value for each contender, the first of them ours."""

    what: str
    unit: str
    values: dict[str, float]
    note: str = ""


def table(rows: Iterable[Row]) -> str:
    """Markdown; "times as fast" is ours against each of the others, in their order."""
    lines = [
        f"| what | {OURS} | others | times as fast | note |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        (_, ours), *others = row.values.items()
        told = ", ".join(f"{name} {_short(value)}" for name, value in others)
        ratios = (ours / v if row.unit in RATES else v / ours for _, v in others)
        times = ", ".join(f"{ratio:.2f}" for ratio in ratios)
        lines.append(f"| {row.what} | {_short(ours)} {row.unit} | {told} | {times} | {row.note} |")
    return "\n".join(lines)


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def save(rows: Iterable[Row], file: Path | None, **settings: Any) -> None:
    """Write what was measured, and with what."""
    if file is not None:
        machine = {"processor": platform.processor(), "torch": torch.__version__}
        told = settings | machine | {"rows": [asdict(row) for row in rows]}
        file.write_text(json.dumps(told, indent=1), encoding="utf-8")


def ready(stock: Any) -> Any:
    """transformers' model, told never to end a reply early."""
    stock.generation_config.eos_token_id = None
    stock.generation_config.pad_token_id = 1
    return stock.eval()


def stock_from(folder: Path, dtype: torch.dtype, device: str) -> Any:
    """transformers' Chameleon with the weights of a folder."""
    model = ChameleonForConditionalGeneration.from_pretrained(folder, dtype=dtype)
    return ready(model.to(device))


def stock_of(config: ModelConfig, ours: Transformer) -> Any:
    """transformers' Chameleon with our transformer's weights, in bf16, for text only."""
    names = {"<s>": 0, "<pad>": 1, "</s>": 2, "<image>": 3}
    letters = ["".join(chr(65 + i // 26**n % 26) for n in range(3)) for i in range(8192)]
    codes = config.vq_config.num_embeddings
    names |= {f"IMGIMG{letters[i]}Z": i + 4 for i in range(codes)}
    settings = {k: v for k, v in config.to_dict().items() if k != "vocabulary_map"}
    stock = ChameleonForConditionalGeneration(ChameleonConfig(**settings, vocabulary_map=names))
    stock = stock.to(torch.bfloat16)
    stock.load_state_dict(ours.state_dict(), strict=False)
    return ready(stock)


def random_transformer(shape: str, dtype: torch.dtype) -> Transformer:
    """Our transformer alone, with random weights."""
    with torch.device("meta"):
        model = Transformer(SHAPES[shape]).to(dtype)
    model.to_empty(device="cpu").init_weights(torch.Generator().manual_seed(0))
    return model.eval().requires_grad_(False)
