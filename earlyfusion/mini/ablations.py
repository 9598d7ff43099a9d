"""The paper's ablations at the scale of `mini`: which parts keep a run stable, and model sizes.

    earlyfusion train ablations data=DIR/emoji image_tokenizer=runs/mini_image_tokenizer \\
        start=runs/mini_transformer

Every variant starts from the same weights and sees the same documents in the same order, once at a
usual learning rate and once at a high one that makes training unstable. Two more model sizes follow
at the usual rate. All tokens are targets, as in pre-training. Each variant has a folder under the
run's; a repeated command skips finished ones. Tokenizer and codes are copied from the run `start`
if there is one. Writes `ablations.md` with plots of the curves. Results: docs/ablations.md.
"""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor, nn

from earlyfusion.config import PRESETS
from earlyfusion.content import Image
from earlyfusion.data.images import to_pixels
from earlyfusion.data.packing import PackedBatch, Packer, RoleWeights
from earlyfusion.devices import resolve_device
from earlyfusion.errors import SettingError
from earlyfusion.fields import check_at_least
from earlyfusion.mini.emoji.dataset import EmojiData
from earlyfusion.mini.emoji.dialogues import caption_pairs, messages_of
from earlyfusion.mini.image_tokenizer import AugmentConfig, augment_image
from earlyfusion.mini.transformer import DocumentsConfig, TransformerConfig, prepare
from earlyfusion.model.attention import CausalAttend
from earlyfusion.model.transformer import Block, Transformer
from earlyfusion.model.vqgan import VQGAN
from earlyfusion.processor import Processor
from earlyfusion.train.curves import curves_of, draw_charts
from earlyfusion.train.language import LanguageTask
from earlyfusion.train.loss import next_token_loss
from earlyfusion.train.monitor import read_metrics
from earlyfusion.train.optim import OptimConfig
from earlyfusion.train.trainer import RunConfig, autocast, train


@dataclass(frozen=True)
class Variant:
    """A change of the reference model. `shape` changes fields of its `ModelConfig`."""

    qk_norm: bool = True
    z_weight: float = 1e-5
    dropout: float = 0.0
    shape: dict[str, Any] = field(default_factory=dict)


VARIANTS = {
    "reference": Variant(),
    "no QK-norm": Variant(qk_norm=False),
    "no z-loss": Variant(z_weight=0.0),
    "no QK-norm, no z-loss": Variant(qk_norm=False, z_weight=0.0),
    "dropout 0.1": Variant(dropout=0.1),
    "norms after": Variant(shape={"swin_norm": True}),
    "norms after, no QK-norm": Variant(qk_norm=False, shape={"swin_norm": True}),
    "norms after, dropout 0.1": Variant(dropout=0.1, shape={"swin_norm": True}),
}


def _size(width: int, inner: int, layers: int, heads: int) -> Variant:
    shape = {"hidden_size": width, "intermediate_size": inner}
    return Variant(shape=shape | {"num_hidden_layers": layers, "num_attention_heads": heads})


SIZES = {"small": _size(64, 176, 3, 2), "large": _size(256, 704, 6, 4)}


@dataclass
class AblationsConfig(TransformerConfig):
    """The variants to train, and how they are compared. Raises `SettingError`."""

    rates: tuple[float, ...] = (2e-3, 2e-2)
    """Learning rates; the sizes are compared at the first."""
    only: tuple[str, ...] = ()
    """Names of variants and sizes to train (none: all)."""
    held_out: int = 120
    """Documents of the validation set."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, held_out=1)
        if not self.rates or min(self.rates) <= 0:
            raise SettingError(
                f"rates={','.join(map(str, self.rates))} must be one or more learning rates over 0"
            )
        unknown = set(self.only) - set(VARIANTS) - set(SIZES)
        if unknown:
            raise SettingError(
                f"variants {sorted(unknown)} are unknown: choose from "
                f"{[*VARIANTS, *SIZES]} or give none for all"
            )


@dataclass(frozen=True)
class Trial:
    """A run to train: a variant at a learning rate."""

    name: str
    variant: Variant
    rate: float

    @property
    def folder(self) -> str:
        """The name of its folder, such as "no-z-loss-0.002"."""
        return f"{self.name}-{self.rate:g}".replace(",", "").replace(" ", "-").lower()


def trials(config: AblationsConfig) -> list[Trial]:
    """The runs to train, those at the usual rate first."""
    all_trials = [Trial(n, v, rate) for rate in config.rates for n, v in VARIANTS.items()]
    all_trials += [Trial(n, v, config.rates[0]) for n, v in SIZES.items()]
    return [t for t in all_trials if not config.only or t.name in config.only]


class AttentionProbe:
    """Causal attention within documents that records the largest score before the softmax."""

    def __init__(self, document_BT: Tensor) -> None:
        same_BTT = document_BT[:, :, None] == document_BT[:, None]
        self._visible_BTT = same_BTT.tril()
        self._attend = CausalAttend(document_BT)
        self.highest = -math.inf

    def __call__(self, q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor) -> Tensor:
        k_BTNH = k_BTKH.repeat_interleave(q_BTNH.shape[2] // k_BTKH.shape[2], 2)
        scores_BNTT = torch.einsum("btnh,bsnh->bnts", q_BTNH, k_BTNH).float()
        visible = scores_BNTT.masked_fill(~self._visible_BTT[:, None], -math.inf)
        self.highest = max(self.highest, float(visible.amax()) / math.sqrt(q_BTNH.shape[3]))
        return self._attend(q_BTNH, k_BTKH, v_BTKH)


class AblationTask(LanguageTask):
    """Measures the validation set every 5 * `log_every` steps and after the last step."""

    def __init__(
        self,
        model: Transformer,
        packer: Packer,
        z_weight: float,
        held_out: list[PackedBatch],
        run: RunConfig,
    ) -> None:
        super().__init__(model, packer, z_weight)
        self._held_out, self._run, self._every = held_out, run, 5 * run.log_every

    def after(self, step: int) -> dict[str, float]:
        if step % self._every and step + 1 != self._run.steps:
            return {}
        self.model.eval()
        with torch.no_grad(), autocast(self.model, self._run.precision):
            metrics = _validate(self.model, self._held_out)
        self.model.train()
        return metrics


def _validate(model: Transformer, batches: list[PackedBatch]) -> dict[str, float]:
    """Mean loss in nats per target token (all, text, image) and the largest attention score."""
    probe = AttentionProbe(batches[0].document_BT)
    nats, image = [], []
    for number, batch in enumerate(batches):
        # Only in the first batch: the probe computes whole score matrices, which is slow.
        attend = CausalAttend(batch.document_BT) if number else probe
        attends = [attend] * model.config.num_hidden_layers
        logits_BTV = model(batch.tokens_BT, batch.positions_BT, attends)
        loss = next_token_loss(logits_BTV, batch.targets_BT, batch.weight_BT)
        counted_BT = batch.weight_BT > 0
        nats.append(loss.nats_BT[counted_BT])
        image.append(batch.image_BT[counted_BT])
    nats_N, image_N = torch.cat(nats), torch.cat(image)
    return {
        "valid_nats": float(nats_N.mean()),
        "valid_text_nats": float(nats_N[~image_N].mean()),
        "valid_image_nats": float(nats_N[image_N].mean()),
        "attention_score": probe.highest,
    }


def _held_out_batches(
    config: AblationsConfig, vqgan: VQGAN, processor: Processor
) -> list[PackedBatch]:
    """Batches of `held_out` documents of the validation split: an image and its name, in either
    order."""
    data = EmojiData(config.data)
    pairs = list(caption_pairs(data, "val"))
    chosen = pairs[:: len(pairs) // config.held_out or 1][: config.held_out]
    load_image = partial(_encode_image, data, vqgan)
    documents = [
        processor.encode_document(messages_of(pair["messages"], load_image)) for pair in chosen
    ]
    fitting = [d for d in documents if len(d) <= config.length + 1]
    packer = Packer(
        lambda k: fitting[k % len(fitting)],
        config.weights,
        config.rows,
        config.length,
        processor.vocabulary.pad,
    )
    batches: list[PackedBatch] = []
    while packer.cursor < len(fitting):  # the last batch is filled from the beginning of the set
        batches.append(packer.next().to(resolve_device(config.run.device)))
    return batches


@torch.inference_mode()
def _encode_image(data: EmojiData, vqgan: VQGAN, image_id: str, role: str) -> Image:
    side, rng = vqgan.config.resolution, np.random.default_rng(0)
    pixels = to_pixels([augment_image(data.image(image_id), side, AugmentConfig(0.0), rng)])
    return Image(codes=vqgan.encode(pixels)[0].numpy())


def build(trial: Trial, config: AblationsConfig, vocab_size: int) -> Transformer:
    """The model of a trial, on its device. Variants of the same shape start from equal weights."""
    torch.manual_seed(config.run.seed)
    shape = replace(config.model, vocab_size=vocab_size, **trial.variant.shape)
    model = Transformer(shape, trial.variant.dropout).to(resolve_device(config.run.device))
    model.init_weights()
    if not trial.variant.qk_norm:
        for block in model.model.layers:
            assert isinstance(block, Block)
            for name in ("q_norm", "k_norm"):
                # After `init_weights`, so that the other weights are equal in all variants.
                setattr(block.self_attn, name, nn.Identity())
    return model


def _train(
    trial: Trial,
    config: AblationsConfig,
    processor: Processor,
    stream: Any,
    held_out: list[PackedBatch],
) -> None:
    """Train one variant and write `result.json` into its folder, which marks it as finished."""
    run = replace(config.run, out=config.run.out / trial.folder)
    model = build(trial, config, processor.vocabulary.size)
    pad = processor.vocabulary.pad
    packer = Packer(stream, config.weights, config.rows, config.length, pad)
    task = AblationTask(model, packer, trial.variant.z_weight, held_out, run)
    ended = ""
    try:
        train(task, run, replace(config.optim, lr=trial.rate))
    except SettingError as error:  # the loss was NaN or infinite for several steps in a row
        if not (run.out / "metrics.jsonl").exists():
            raise
        ended = str(error)
    blocks = sum(p.numel() for p in model.model.layers.parameters())
    result = {"name": trial.name, "rate": trial.rate, "parameters": blocks, "ended": ended}
    (run.out / "result.json").write_text(json.dumps(result), encoding="utf-8")
    # The weights are not needed any more.
    for checkpoint in run.out.glob("step-*"):
        shutil.rmtree(checkpoint)


METRICS = {
    "valid_text_nats": "text, nats",
    "valid_image_nats": "images, nats",
    "output_norm": "output norm, first to last",
    "attention_score": "largest attention score",
    "top_logit": "largest logit",
    "grad_norm": "gradient norm, median and largest",
}
LOSSES = ("valid_text_nats", "valid_image_nats")
DIAGNOSTICS = ("output_norm", "attention_score", "top_logit", "grad_norm")


def report(config: AblationsConfig) -> Path:
    """Write `ablations.md` and the plots of the curves, for the runs that are finished."""
    out = config.run.out
    done = [t for t in trials(config) if (out / t.folder / "result.json").exists()]
    parts = []
    for rate in config.rates:
        finished = [t for t in done if t.rate == rate and t.name in VARIANTS]
        if finished:
            name = f"rate-{rate:g}.png"
            _plot(out, finished, LOSSES + DIAGNOSTICS).save(out / name, optimize=True)
            parts.append(f"## Rate {rate:g}\n\n{_table(out, finished)}\n\n![Curves]({name})\n")
    sizes = [t for t in done if t.rate == config.rates[0] and t.name in (*SIZES, "reference")]
    if len(sizes) > 2:
        _plot(out, sizes, (*LOSSES, "output_norm")).save(out / "sizes.png", optimize=True)
        parts.append(f"## Sizes\n\n{_sizes_table(out, sizes)}\n\n![Curves](sizes.png)\n")
    (out / "ablations.md").write_text("\n".join(parts), encoding="utf-8")
    return out / "ablations.md"


def _plot(out: Path, group: list[Trial], metrics: tuple[str, ...]) -> PIL.Image.Image:
    curves = {t.name: curves_of(read_metrics(out / t.folder)) for t in group}
    charts = {}
    for metric in metrics:
        lines = {name: curve[metric] for name, curve in curves.items() if metric in curve}
        if lines:
            charts[metric] = lines
    return draw_charts(charts, DIAGNOSTICS)


def _table(out: Path, group: list[Trial]) -> str:
    lines = [f"| variant | {' | '.join(METRICS.values())} | verdict |", "| --- " * 8 + "|"]
    for trial in group:
        cells = " | ".join(_cells(read_metrics(out / trial.folder)))
        lines.append(f"| {trial.name} | {cells} | {_verdict(out / trial.folder)} |")
    return "\n".join(lines)


def _cells(rows: list[dict[str, Any]]) -> list[str]:
    """The cells of a variant in the table, from the rows of its `metrics.jsonl`."""
    values = {m: [r[m] for r in rows if r.get(m) is not None] for m in METRICS}
    cells = {m: f"{series[-1]:.3f}" for m, series in values.items()}
    norms, gradients = values["output_norm"], values["grad_norm"]
    cells["output_norm"] = f"{norms[0]:.3g} to {norms[-1]:.3g}"
    cells["attention_score"] = f"{max(values['attention_score']):.3g}"
    cells["top_logit"] = f"{max(values['top_logit']):.3g}"
    cells["grad_norm"] = f"{median(gradients):.2g}, {max(gradients):.3g}"
    return list(cells.values())


def _verdict(folder: Path) -> str:
    """Whether a run ended early, and whether its validation loss had risen again at the end."""
    rows = read_metrics(folder)
    if json.loads((folder / "result.json").read_text(encoding="utf-8"))["ended"]:
        return f"NaN or infinite after step {rows[-1]['step']}"
    losses = [r["valid_nats"] for r in rows if r.get("valid_nats") is not None]
    rise = losses[-1] - min(losses)
    return f"rose by {rise:.2f} nats from its lowest" if rise > 0.1 else "fell to the end"


def _sizes_table(out: Path, group: list[Trial]) -> str:
    rows = []
    for trial in group:
        folder = out / trial.folder
        count = json.loads((folder / "result.json").read_text(encoding="utf-8"))["parameters"]
        losses = [r["valid_nats"] for r in read_metrics(folder) if r.get("valid_nats") is not None]
        rows.append((count, losses[-1], _cells(read_metrics(folder))))
    rows.sort()
    lines = ["| weights in blocks | all, nats | text, nats | images, nats |", "| --- " * 4 + "|"]
    lines += [f"| {n:,} | {all_:.3f} | {cells[0]} | {cells[1]} |" for n, all_, cells in rows]
    return "\n".join(lines) + "\n\n" + power_law([(n, loss) for n, loss, _ in rows])


def power_law(points: list[tuple[float, float]]) -> str:
    """A sentence with the power law fitted to points of (weights, loss), or one that says that the
    fit misses a point by over 1%."""
    x, y = np.log(np.array(points)).T
    slope, intercept = np.polyfit(x, y, 1)
    error = float(np.abs(np.expm1(y - (slope * x + intercept))).max())
    if error > 0.01:
        return f"No power law: the best one misses a size by {100 * error:.1f} %."
    return f"loss = {math.exp(intercept):.3g} x weights^{slope:.4f}, within {100 * error:.1f} %."


def main(config: AblationsConfig) -> None:
    vqgan, processor, stream = prepare(config)
    held_out = _held_out_batches(config, vqgan, processor)
    for trial in trials(config):
        if not (config.run.out / trial.folder / "result.json").exists():
            _train(trial, config, processor, stream, held_out)
        report(config)


config = AblationsConfig(
    rows=2,
    length=1024,
    model=replace(
        PRESETS["mini"],
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
    ),
    run=RunConfig(out=Path("runs/ablations"), steps=400, precision="bf16", keep=1),
    optim=OptimConfig(warmup_steps=40, decay="cosine", final_ratio=0.1, eps=1e-8),
    documents=DocumentsConfig(dialogues=20_000),
    weights=RoleWeights(prompt_text=1.0, prompt_image=1.0),
)
