"""What a training run takes on so many GPUs: memory, speed and days, from the run's own config.

Nothing is run: all follows from the shapes. What is assumed stands in `ASSUMED` and is printed
with the table. Shapes: D model width, N heads, K key and value heads, H head width, F inner width,
L layers, V vocabulary, T row length, S tokens that pass one GPU at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from earlyfusion.config import ModelConfig
from earlyfusion.errors import SettingError

GPUS = (64, 128, 256, 512, 1024, 2048, 3072)
MFU = 0.5
PEAK_TFLOPS = 989.0
GIB = 2**30
_HEAD_BLOCK = 256
"""Positions whose logits lie in memory together: `loss.head_loss`."""

ASSUMED = (
    "weights, gradients and both moments of AdamW in fp32, cut over shard x tensor; "
    "computing in bf16",
    "two blocks gathered at a time, and the embedding and head",
    "activations of one micro batch, without compile; attention keeps no scores",
    "operations a token: 6 a weight in a product and 12 L D T for attention, "
    "nothing for what is computed again",
)


class Layout(Protocol):
    """How processes share the model: `parallel.ParallelConfig`."""

    @property
    def tensor(self) -> int: ...
    def sizes(self, processes: int) -> tuple[int, int, int]: ...


@dataclass(frozen=True)
class Job:
    """What is trained; `rows` are those of a whole step."""

    model: ModelConfig
    layout: Layout
    rows: int
    length: int
    micro_rows: int
    tokens: float
    dropout: float = 0.0
    peak_tflops: float = PEAK_TFLOPS


@dataclass(frozen=True)
class Line:
    """One number of GPUs; memory in bytes of one GPU, `days` for all tokens."""

    gpus: int
    replicas: int
    shard: int
    tensor: int
    micro_batches: int
    states: float
    gathered: float
    activations: dict[str, float]
    loss: float
    tokens_per_second: float
    days: float

    def total(self, checkpointing: str) -> float:
        return self.states + self.gathered + self.activations[checkpointing] + self.loss


def parameters_of_block(config: ModelConfig) -> int:
    D, F, H, K = _widths(config)
    norms = 2 * D + 2 * (config.num_attention_heads + K) * H
    biases = (2 * D + 2 * K * H) * config.attention_bias + (2 * F + D) * config.mlp_bias
    return 2 * D * D + 2 * D * K * H + 3 * D * F + norms + biases


def parameters(config: ModelConfig) -> int:
    """Weights of the transformer, without the image tokenizer."""
    tables = (1 if config.tie_word_embeddings else 2) * config.vocab_size * config.hidden_size
    blocks = config.num_hidden_layers * parameters_of_block(config)
    return blocks + tables + config.hidden_size


def flops_per_token(config: ModelConfig, length: int) -> float:
    """Of a training step: forward and backward, rows of `length` taken as one document."""
    D, F, H, K = _widths(config)
    products = config.num_hidden_layers * (2 * D * D + 2 * D * K * H + 3 * D * F)
    head = config.vocab_size * D
    return 6.0 * (products + head) + 12.0 * config.num_hidden_layers * D * length


def activation_bytes(
    config: ModelConfig, tokens: int, tensor: int, dropout: float
) -> dict[str, float]:
    """Bytes that the blocks keep for the backward pass, by `checkpointing`."""
    D, F, H, K = _widths(config)
    heads = D + K * H
    products = D + 2 * K * H + D + D + 2 * F + D
    full = 2 * D
    selective = full + 2 * products
    # fp32: heads before and after their norm, and rotated by halves; bf16: all else.
    none = (
        4 * 3 * heads
        + 2 * (heads + K * H + D)
        + 2 * (2 * D + 2 * D)
        + 2 * 4 * F
        + 2 * (D if config.swin_norm else 0) * 2
        + (2 * D if dropout else 0)
    )
    scale = config.num_hidden_layers * tokens / tensor
    return {"none": none * scale, "selective": selective * scale, "full": full * scale}


def lines(job: Job, counts: tuple[int, ...] = GPUS) -> list[Line | str]:
    """A line for each number of GPUs, or the sentence that says why it is impossible."""
    found: list[Line | str] = []
    for gpus in counts:
        try:
            found.append(line(job, gpus))
        except SettingError as error:
            found.append(f"{gpus:,} GPUs: {error}")
    return found


def line(job: Job, gpus: int) -> Line:
    replicas, shard, tensor = job.layout.sizes(gpus)
    ranks, micro = replicas * shard, max(1, job.micro_rows)
    if job.rows % (ranks * micro):
        raise SettingError(
            f"rows={job.rows} cannot go to {ranks} data ranks in parts of micro_rows={micro}: "
            f"choose a multiple of {ranks * micro}"
        )
    count, block = parameters(job.model), parameters_of_block(job.model)
    tables = job.model.vocab_size * job.model.hidden_size
    speed = MFU * gpus * job.peak_tflops * 1e12 / flops_per_token(job.model, job.length)
    seen = micro * job.length
    return Line(
        gpus=gpus,
        replicas=replicas,
        shard=shard,
        tensor=tensor,
        micro_batches=job.rows // (ranks * micro),
        states=16 * count / (shard * tensor),
        # Two blocks in bf16, the gradient of one in bf16 and fp32; both tables and their gradients.
        gathered=((2 * 2 + 2 + 4) * block + 2 * (2 + 2) * tables) / tensor,
        activations=activation_bytes(job.model, seen, tensor, job.dropout),
        loss=4 * tables / tensor
        + 6 * _HEAD_BLOCK * job.model.vocab_size / tensor
        + 2 * 2 * seen * job.model.hidden_size,
        tokens_per_second=speed,
        days=job.tokens / speed / 86_400,
    )


def table(job: Job, counts: tuple[int, ...] = GPUS) -> str:
    """The plan as text: sizes, a line for each number of GPUs, and what is assumed."""
    rows = [_HEADINGS, *(_cells(x) if isinstance(x, Line) else (x,) for x in lines(job, counts))]
    full = [row for row in rows if len(row) > 1]
    widths = [max(len(row[i]) for row in full) for i in range(len(_HEADINGS))]
    shown = [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        if len(row) > 1
        else row[0]
        for row in rows
    ]
    step = job.rows * job.length
    head = (
        f"{parameters(job.model):,} parameters; {job.rows:,} rows x {job.length:,} = {step:,} "
        f"tokens a step, {max(1, job.micro_rows)} rows at a time; {job.tokens:.3g} tokens = "
        f"{job.tokens / step:,.0f} steps; {flops_per_token(job.model, job.length):.3g} operations "
        f"a token"
    )
    speed = f"{MFU:.0%} of {job.peak_tflops:g} TFLOP/s a GPU (peak_tflops)"
    notes = [f"- {note}" for note in (*ASSUMED, f"speed: {speed}")]
    return "\n".join([head, "memory in GiB of one GPU", "", *shown, "", "Assumed:", *notes])


_HEADINGS = (
    "GPUs",
    "replicas x shard x tensor",
    "micro batches",
    "states",
    "gathered",
    "loss",
    "act. none",
    "selective",
    "full",
    "total none",
    "selective",
    "full",
    "tokens/s",
    "days",
)


def _cells(line: Line) -> tuple[str, ...]:
    ways = ("none", "selective", "full")
    sizes = [line.states, line.gathered, line.loss, *(line.activations[w] for w in ways)]
    sizes += [line.total(way) for way in ways]
    return (
        f"{line.gpus:,}",
        f"{line.replicas} x {line.shard} x {line.tensor}",
        f"{line.micro_batches:,}",
        *(f"{size / GIB:.1f}" for size in sizes),
        f"{line.tokens_per_second:,.0f}",
        f"{line.days:,.1f}",
    )


def _widths(config: ModelConfig) -> tuple[int, int, int, int]:
    return config.hidden_size, config.intermediate_size, config.head_dim, config.kv_heads
