"""What a training run takes on a number of GPUs: memory, speed and days. All of it is computed from
the config of the run; the assumptions are in `ASSUMED`, which is printed with the table.

"Products" are the matrix products with the weights. Operations are floating-point operations.
"""

# Widths: D model, K key and value heads, H head, F feed-forward, L layers, T row length.

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from earlyfusion.config import ModelConfig
from earlyfusion.errors import SettingError

GPUS = (64, 128, 256, 512, 1024, 2048, 3072)
FEW_GPUS = (1, 2, 4, 8, 16, 32, 64, 128)
TRAINABLE = {"all": (6, 12), "adapters": (4, 12), "image_head": (2, 4)}
"""What can be trained, with the operations per token that it takes: for each weight of a product in
the blocks, and for attention in multiples of L D T. The head always takes 6 operations per weight,
because `loss.head_loss` computes both of its gradients."""
MFU = 0.5
"""The share of the peak that is assumed (model FLOPs utilisation)."""
PEAK_TFLOPS = 989.0
"""Peak of an H100 or H200 in bf16, in TFLOP/s."""
GIB = 2**30
_LOGITS_AT_ONCE = 2**26
"""Logits that the loss holds at once on a GPU: 256 MB in fp32, and enough for its full speed."""

ASSUMED = (
    "trained weights, their gradients and both moments of AdamW in fp32, split over shard x "
    "tensor; frozen weights: 4 bytes each, 2 in products of blocks; computation in bf16",
    "two blocks gathered at a time, and the embedding and head",
    "activations of one micro batch, without compile; attention keeps no scores",
    "operations per token: 6 per weight in a product and 12 L D T for attention, fewer where "
    "blocks are frozen; what activation checkpointing computes twice counts once",
)


class Layout(Protocol):
    """How processes share the model. `parallel.ParallelConfig` is one; this file does not import
    it, because that would import torch."""

    @property
    def tensor(self) -> int: ...
    @property
    def checkpointing_every(self) -> int: ...
    def sizes(self, processes: int) -> tuple[int, int, int]: ...


@dataclass(frozen=True)
class Job:
    """What is trained, and how."""

    model: ModelConfig
    layout: Layout
    rows: int
    """Rows of a step, over all processes."""
    length: int
    """Tokens of a row."""
    micro_rows: int
    """Rows that one process computes at a time; 0 counts as 1."""
    tokens: float
    """Tokens of the whole run."""
    dropout: float = 0.0
    peak_tflops: float = PEAK_TFLOPS
    """Peak of one GPU."""
    trainable: str = "all"
    """Which weights are trained: a key of `TRAINABLE`."""
    lora: int = 0
    """Rank of the adapters."""
    gpus: tuple[int, ...] = GPUS
    """The numbers of GPUs to plan for."""


class TooFewRows(SettingError):
    """A step has fewer rows than the GPUs take at once; more GPUs do not help."""


@dataclass(frozen=True)
class Line:
    """The plan for one number of GPUs: a line of the table. Memory is in bytes per GPU."""

    gpus: int
    replicas: int
    shard: int
    tensor: int
    micro_batches: int
    states: float
    """Weights, gradients and moments."""
    gathered: float
    """Weights and gradients that FSDP has gathered at one time, or on one GPU bf16 copies."""
    activations: dict[str, float]
    """What the blocks keep for the backward pass, by `checkpointing`: none, selective or full."""
    loss: float
    """Logits, gradient of the head, and the hidden states that the loss reads."""
    tokens_per_second: float
    """Of all GPUs together."""
    days: float
    """For all tokens of the run."""

    def total(self, checkpointing: str) -> float:
        return self.states + self.gathered + self.activations[checkpointing] + self.loss


def head_block(rows: int) -> int:
    """Positions whose logits a GPU holds at once, for a head of this many rows."""
    return max(256, _LOGITS_AT_ONCE // rows)


def products_of_block(config: ModelConfig) -> int:
    """Weights of the seven matrices of a block."""
    D, F, H, K = _widths(config)
    return 2 * D * D + 2 * D * K * H + 3 * D * F


def parameters_of_block(config: ModelConfig) -> int:
    """All weights of a block: matrices, norms and biases."""
    D, F, H, K = _widths(config)
    norms = 2 * D + 2 * (config.num_attention_heads + K) * H
    biases = (2 * D + 2 * K * H) * config.attention_bias + (2 * F + D) * config.mlp_bias
    return products_of_block(config) + norms + biases


def parameters(config: ModelConfig) -> int:
    """Weights of the transformer, without the image tokenizer."""
    tables = (1 if config.tie_word_embeddings else 2) * config.vocab_size * config.hidden_size
    blocks = config.num_hidden_layers * parameters_of_block(config)
    return blocks + tables + config.hidden_size


def trained_parameters_of_block(job: Job) -> int:
    """Weights of a block, or of its adapters, that have gradients and moments."""
    if job.trainable == "all":
        return parameters_of_block(job.model)
    if job.trainable == "adapters":
        D, F, H, K = _widths(job.model)
        # An adapter has a row of weights per input and per output of its matrix.
        return job.lora * (4 * D + 2 * (D + K * H) + 3 * (D + F))
    return 0


def trained_parameters(job: Job) -> int:
    """All weights that have gradients and moments."""
    if job.trainable == "all":
        return parameters(job.model)
    if job.trainable == "image_head":
        return job.model.vq_config.num_embeddings * job.model.hidden_size
    return job.model.num_hidden_layers * trained_parameters_of_block(job)


def frozen_bytes(job: Job) -> int:
    """Memory of frozen weights: 2 bytes each for those of products in blocks, 4 for others."""
    if job.trainable == "all":
        return 0
    products = job.model.num_hidden_layers * products_of_block(job.model)
    return 4 * parameters(job.model) - 2 * products


def flops_per_token(config: ModelConfig, length: int, trainable: str = "all") -> float:
    """Operations of the forward and backward pass for one token, if each row of `length` tokens is
    one document (several shorter documents take fewer)."""
    weight_factor, attention_factor = TRAINABLE[trainable]
    layers, width = config.num_hidden_layers, config.hidden_size
    blocks = weight_factor * layers * products_of_block(config)
    attention = float(attention_factor) * layers * width * length
    head = 6.0 * config.vocab_size * width
    return blocks + attention + head


def activation_bytes(
    config: ModelConfig, tokens: int, tensor: int, dropout: float
) -> dict[str, float]:
    """Bytes that the blocks keep of this many tokens for the backward pass, by `checkpointing`:
    "none" keeps all, "selective" the outputs of products and attention, "full" the input of each
    block."""
    D, F, H, K = _widths(config)
    heads = D + K * H  # queries and keys
    outputs = D + 2 * K * H + D + D + 2 * F + D  # of the products and of attention
    full = 2 * D  # the input of the block, in bf16
    selective = full + 2 * outputs
    # 4 bytes in fp32, 2 in bf16, 1 in masks.
    none = (
        4 * 3 * heads  # queries and keys before and after their norm, and after rotation
        + 2 * (heads + K * H + D)  # what attention reads, and its output
        + 2 * (2 * D + 2 * D)  # input and output of both norms
        + 2 * 4 * F  # gate, its activation, the up projection, and their product
        + 2 * (D if config.swin_norm else 0) * 2  # outputs of both branches, before their norms
        + (2 * D if dropout else 0)  # masks of both dropouts
    )
    scale = config.num_hidden_layers * tokens / tensor
    return {"none": none * scale, "selective": selective * scale, "full": full * scale}


def lines(job: Job) -> list[Line | str]:
    """A line for each number of GPUs, or a sentence that says why that number is impossible. From
    the first number for which a step has too few rows, one sentence covers all larger ones."""
    plan: list[Line | str] = []
    for gpus in job.gpus:
        try:
            plan.append(line(job, gpus))
        except TooFewRows as error:
            return [*plan, f"{gpus:,} GPUs and more: {error}"]
        except SettingError as error:
            plan.append(f"{gpus:,} GPUs: {error}")
    return plan


def line(job: Job, gpus: int) -> Line:
    """The plan for one number of GPUs. Raises `SettingError` if the model or the rows of a step
    cannot be divided by it."""
    replicas, shard, tensor = job.layout.sizes(gpus)
    data_ranks, micro_rows = replicas * shard, max(1, job.micro_rows)
    rows_at_once = data_ranks * micro_rows
    if job.rows % rows_at_once:
        error = TooFewRows if job.rows < rows_at_once else SettingError
        raise error(
            f"rows={job.rows} cannot be shared by {data_ranks} data ranks that compute "
            f"micro_rows={micro_rows} at a time: choose a multiple of {rows_at_once}"
        )
    head_weights = job.model.vocab_size * job.model.hidden_size
    operations = flops_per_token(job.model, job.length, job.trainable)
    speed = MFU * gpus * job.peak_tflops * 1e12 / operations
    tokens = micro_rows * job.length
    shards = shard * tensor
    return Line(
        gpus=gpus,
        replicas=replicas,
        shard=shard,
        tensor=tensor,
        micro_batches=job.rows // rows_at_once,
        # Weight, gradient and two moments, 4 bytes each; FSDP does not shard the image head.
        states=16 * trained_parameters(job) / (1 if job.trainable == "image_head" else shards)
        + frozen_bytes(job) / shards,
        gathered=_gathered_bytes(job) / tensor if shards > 1 else _copied_bytes(job),
        activations=_activations(job, tokens, tensor),
        # Gradient of the head in fp32; logits of a block of positions in fp32 and bf16; hidden
        # states and their gradient in bf16.
        loss=4 * head_weights / tensor
        + 6 * head_block(job.model.vocab_size // tensor) * job.model.vocab_size / tensor
        + 2 * 2 * tokens * job.model.hidden_size,
        tokens_per_second=speed,
        days=job.tokens / speed / 86_400,
    )


def _gathered_bytes(job: Job) -> int:
    """What FSDP has gathered at one time: two blocks in bf16 and the gradient of one in bf16 and
    fp32; the embedding and the head in bf16, and their gradients if they are trained."""
    tables = 2 * job.model.vocab_size * job.model.hidden_size
    gradients = 2 * tables if job.trainable == "all" else 0
    blocks = 2 * 2 * parameters_of_block(job.model)
    return blocks + (2 + 4) * trained_parameters_of_block(job) + 2 * tables + gradients


def _copied_bytes(job: Job) -> int:
    """A single GPU gathers nothing, but autocast keeps bf16 copies of the weights in products."""
    blocks = trained_parameters_of_block(job) * job.model.num_hidden_layers
    return 2 * (blocks + job.model.vocab_size * job.model.hidden_size)


def _activations(job: Job, tokens: int, tensor: int) -> dict[str, float]:
    """Bytes by `checkpointing`; if no block is trained, those of one block at a time."""
    sizes = activation_bytes(job.model, tokens, tensor, job.dropout)
    blocks = job.model.num_hidden_layers
    # Only every n-th block is checkpointed, rounded up; the others keep all activations.
    checkpointed = -(-blocks // job.layout.checkpointing_every) / blocks
    sizes = {
        name: checkpointed * size + (1 - checkpointed) * sizes["none"]
        for name, size in sizes.items()
    }
    if job.trainable == "image_head":
        return dict.fromkeys(sizes, sizes["none"] / blocks)
    return sizes


def table(job: Job) -> str:
    """The plan as text, with its assumptions. Time is in days, with `FEW_GPUS` in hours."""
    unit, unit_hours = ("hours", 1.0) if job.gpus == FEW_GPUS else ("days", 24.0)
    cells = (_cells(x, unit_hours) if isinstance(x, Line) else (x,) for x in lines(job))
    rows = [(*_HEADINGS, unit), *cells]
    table_rows = [row for row in rows if len(row) > 1]  # the others are sentences
    widths = [max(map(len, column)) for column in zip(*table_rows, strict=True)]
    text = [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        if len(row) > 1
        else row[0]
        for row in rows
    ]
    step_tokens = job.rows * job.length
    num_trained = f", {trained_parameters(job):,} trained" if job.trainable != "all" else ""
    header = (
        f"{parameters(job.model):,} parameters{num_trained}; {job.rows:,} rows x {job.length:,} = "
        f"{step_tokens:,} tokens per step, {max(1, job.micro_rows)} rows at a time; "
        f"{job.tokens:.3g} tokens = {job.tokens / step_tokens:,.0f} steps; "
        f"{flops_per_token(job.model, job.length, job.trainable):.3g} operations per token"
    )
    speed = f"{MFU:.0%} of {job.peak_tflops:g} TFLOP/s per GPU (peak_tflops)"
    notes = [f"- {note}" for note in (*ASSUMED, f"speed: {speed}")]
    return "\n".join([header, "memory in GiB per GPU", "", *text, "", "Assumed:", *notes])


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


def _cells(line: Line, unit_hours: float) -> tuple[str, ...]:
    """A row of the table; the time is in units of `unit_hours` hours."""
    modes = ("none", "selective", "full")
    sizes = [line.states, line.gathered, line.loss, *(line.activations[m] for m in modes)]
    sizes += [line.total(mode) for mode in modes]
    return (
        f"{line.gpus:,}",
        f"{line.replicas} x {line.shard} x {line.tensor}",
        f"{line.micro_batches:,}",
        *(f"{size / GIB:.1f}" for size in sizes),
        f"{line.tokens_per_second:,.0f}",
        f"{24 * line.days / unit_hours:,.1f}",
    )


def _widths(config: ModelConfig) -> tuple[int, int, int, int]:
    """D, F, H and K."""
    return config.hidden_size, config.intermediate_size, config.head_dim, config.kv_heads
