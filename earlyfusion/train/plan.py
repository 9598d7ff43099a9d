"""What a training run takes on a number of GPUs: memory, speed and days, from the run's config.
Computed from shapes alone. The assumptions are in `ASSUMED`, which is printed with the table."""

# Shapes: D model width, K key and value heads, H head width, F inner width, L layers, T row length.

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from earlyfusion.config import ModelConfig
from earlyfusion.errors import SettingError

GPUS = (64, 128, 256, 512, 1024, 2048, 3072)
FEW_GPUS = (1, 2, 4, 8, 16, 32, 64, 128)
TRAINABLE = {"all": (6, 12), "adapters": (4, 12), "image_head": (2, 4)}
"""Operations per token for each weight of the blocks, and as multiples of L D T for attention.

By what is trained. The head always takes 6 per weight: `loss.head_loss` computes both of its
gradients.
"""
MFU = 0.5
PEAK_TFLOPS = 989.0
GIB = 2**30
_LOGITS_AT_ONCE = 2**26
"""Of the loss on a GPU: 256 MB in fp32, and products that are large enough for its full speed."""

ASSUMED = (
    "what is trained: weights, gradients and both moments of AdamW in fp32, split over shard x "
    "tensor; what is not: 4 bytes a weight, 2 in products of blocks; computing in bf16",
    "two blocks gathered at a time, and the embedding and head",
    "activations of one micro batch, without compile; attention keeps no scores",
    "operations a token: 6 a weight in a product and 12 L D T for attention, less where blocks "
    "are not trained, and nothing for what is computed again",
)


class Layout(Protocol):
    """How processes share the model: `parallel.ParallelConfig`."""

    @property
    def tensor(self) -> int: ...
    @property
    def checkpointing_every(self) -> int: ...
    def sizes(self, processes: int) -> tuple[int, int, int]: ...


@dataclass(frozen=True)
class Job:
    """What is trained; `rows` are those of a whole step, `tokens` those of the whole run."""

    model: ModelConfig
    layout: Layout
    rows: int
    length: int
    micro_rows: int
    tokens: float
    dropout: float = 0.0
    peak_tflops: float = PEAK_TFLOPS
    trainable: str = "all"
    """Which weights: a key of `TRAINABLE`."""
    lora: int = 0
    """Rank of the adapters."""
    gpus: tuple[int, ...] = GPUS
    """The numbers of GPUs to plan for."""


class TooFewRows(SettingError):
    """A step has fewer rows than the GPUs take at once; more GPUs do not help."""


@dataclass(frozen=True)
class Line:
    """The plan for one number of GPUs; memory in bytes per GPU, `days` for all tokens."""

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


def head_block(rows: int) -> int:
    """Positions whose logits a GPU holds at once, for a head of this many rows."""
    return max(256, _LOGITS_AT_ONCE // rows)


def products_of_block(config: ModelConfig) -> int:
    """Weights of the matrices, which multiply every token."""
    D, F, H, K = _widths(config)
    return 2 * D * D + 2 * D * K * H + 3 * D * F


def parameters_of_block(config: ModelConfig) -> int:
    D, F, H, K = _widths(config)
    norms = 2 * D + 2 * (config.num_attention_heads + K) * H
    biases = (2 * D + 2 * K * H) * config.attention_bias + (2 * F + D) * config.mlp_bias
    return products_of_block(config) + norms + biases


def parameters(config: ModelConfig) -> int:
    """Weights of the transformer, without the image tokenizer."""
    tables = (1 if config.tie_word_embeddings else 2) * config.vocab_size * config.hidden_size
    blocks = config.num_hidden_layers * parameters_of_block(config)
    return blocks + tables + config.hidden_size


def trained_of_block(job: Job) -> int:
    D, F, H, K = _widths(job.model)
    edges = 4 * D + 2 * (D + K * H) + 3 * (D + F)  # rows and columns of the seven matrices
    return {"all": parameters_of_block(job.model), "adapters": job.lora * edges}.get(
        job.trainable, 0
    )


def trained(job: Job) -> int:
    """Weights that have gradients and moments."""
    if job.trainable == "all":
        return parameters(job.model)
    head = job.model.vq_config.num_embeddings * job.model.hidden_size
    return (
        head
        if job.trainable == "image_head"
        else job.model.num_hidden_layers * trained_of_block(job)
    )


def frozen_bytes(job: Job) -> int:
    """Memory of frozen weights: 2 bytes each for those of products in blocks, 4 for others."""
    if job.trainable == "all":
        return 0
    products = job.model.num_hidden_layers * products_of_block(job.model)
    return 4 * parameters(job.model) - 2 * products


def flops_per_token(config: ModelConfig, length: int, trainable: str = "all") -> float:
    """Forward and backward pass of training, if each row of `length` is one document."""
    weight, attention = TRAINABLE[trainable]
    blocks = config.num_hidden_layers
    mixed = float(attention) * blocks * config.hidden_size * length
    head = 6.0 * config.vocab_size * config.hidden_size
    return weight * blocks * products_of_block(config) + mixed + head


def activation_bytes(
    config: ModelConfig, tokens: int, tensor: int, dropout: float
) -> dict[str, float]:
    """Bytes that the blocks keep for the backward pass, by `checkpointing`."""
    D, F, H, K = _widths(config)
    heads = D + K * H
    products = D + 2 * K * H + D + D + 2 * F + D
    full = 2 * D  # the input of the block, in bf16
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


def lines(job: Job) -> list[Line | str]:
    """A line for each number of GPUs, or the sentence that says why it is impossible. Once a step
    has too few rows, one sentence covers all larger numbers."""
    found: list[Line | str] = []
    for gpus in job.gpus:
        try:
            found.append(line(job, gpus))
        except TooFewRows as error:
            return [*found, f"{gpus:,} GPUs and more: {error}"]
        except SettingError as error:
            found.append(f"{gpus:,} GPUs: {error}")
    return found


def line(job: Job, gpus: int) -> Line:
    replicas, shard, tensor = job.layout.sizes(gpus)
    ranks, micro = replicas * shard, max(1, job.micro_rows)
    if job.rows % (ranks * micro):
        error = TooFewRows if job.rows < ranks * micro else SettingError
        raise error(
            f"rows={job.rows} cannot be shared by {ranks} data ranks that compute "
            f"micro_rows={micro} at a time: choose a multiple of {ranks * micro}"
        )
    tables = job.model.vocab_size * job.model.hidden_size
    operations = flops_per_token(job.model, job.length, job.trainable)
    speed = MFU * gpus * job.peak_tflops * 1e12 / operations
    tokens = micro * job.length
    cut = shard * tensor
    return Line(
        gpus=gpus,
        replicas=replicas,
        shard=shard,
        tensor=tensor,
        micro_batches=job.rows // (ranks * micro),
        # Weight, gradient and two moments, 4 bytes each; FSDP does not shard the image head.
        states=16 * trained(job) / (1 if job.trainable == "image_head" else cut)
        + frozen_bytes(job) / cut,
        gathered=_gathered(job) / tensor if cut > 1 else _cast(job),
        activations=_activations(job, tokens, tensor),
        # Gradient of the head in fp32, logits of a block in fp32 and bf16, states, their gradient.
        loss=4 * tables / tensor
        + 6 * head_block(job.model.vocab_size // tensor) * job.model.vocab_size / tensor
        + 2 * 2 * tokens * job.model.hidden_size,
        tokens_per_second=speed,
        days=job.tokens / speed / 86_400,
    )


def _gathered(job: Job) -> int:
    """Two blocks in bf16, the gradient of one in bf16 and fp32; both tables and their gradients."""
    tables = 2 * job.model.vocab_size * job.model.hidden_size
    gradients = 2 * tables if job.trainable == "all" else 0
    block = 2 * 2 * parameters_of_block(job.model)
    return block + (2 + 4) * trained_of_block(job) + 2 * tables + gradients


def _cast(job: Job) -> int:
    """One GPU gathers nothing, but keeps bf16 copies of the weights in products."""
    blocks = trained_of_block(job) * job.model.num_hidden_layers
    return 2 * (blocks + job.model.vocab_size * job.model.hidden_size)


def _activations(job: Job, tokens: int, tensor: int) -> dict[str, float]:
    """Bytes by `checkpointing`; if no block is trained, those of one block at a time."""
    found = activation_bytes(job.model, tokens, tensor, job.dropout)
    blocks = job.model.num_hidden_layers
    again = -(-blocks // job.layout.checkpointing_every) / blocks
    found = {how: again * size + (1 - again) * found["none"] for how, size in found.items()}
    if job.trainable == "image_head":
        return dict.fromkeys(found, found["none"] / job.model.num_hidden_layers)
    return found


def table(job: Job) -> str:
    """The plan as text, with its assumptions. Time is in days, with `FEW_GPUS` in hours."""
    time, hours = ("hours", 1.0) if job.gpus == FEW_GPUS else ("days", 24.0)
    found = (_cells(x, hours) if isinstance(x, Line) else (x,) for x in lines(job))
    rows = [(*_HEADINGS, time), *found]
    full = [row for row in rows if len(row) > 1]
    widths = [max(len(row[i]) for row in full) for i in range(len(full[0]))]
    shown = [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        if len(row) > 1
        else row[0]
        for row in rows
    ]
    step = job.rows * job.length
    of_them = f", {trained(job):,} trained" if job.trainable != "all" else ""
    head = (
        f"{parameters(job.model):,} parameters{of_them}; {job.rows:,} rows x {job.length:,} = "
        f"{step:,} tokens a step, {max(1, job.micro_rows)} rows at a time; "
        f"{job.tokens:.3g} tokens = {job.tokens / step:,.0f} steps; "
        f"{flops_per_token(job.model, job.length, job.trainable):.3g} operations a token"
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
)


def _cells(line: Line, hours: float) -> tuple[str, ...]:
    ways = ("none", "selective", "full")
    sizes = [line.states, line.gathered, line.loss, *(line.activations[w] for w in ways)]
    sizes += [line.total(way) for way in ways]
    return (
        f"{line.gpus:,}",
        f"{line.replicas} x {line.shard} x {line.tensor}",
        f"{line.micro_batches:,}",
        *(f"{size / GIB:.1f}" for size in sizes),
        f"{line.tokens_per_second:,.0f}",
        f"{24 * line.days / hours:,.1f}",
    )


def _widths(config: ModelConfig) -> tuple[int, int, int, int]:
    return config.hidden_size, config.intermediate_size, config.head_dim, config.kv_heads
