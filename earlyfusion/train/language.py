"""Training of the transformer on packed documents."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from earlyfusion import parallel
from earlyfusion.config import ModelConfig
from earlyfusion.data.corpus import CorpusConfig
from earlyfusion.data.packing import BatchSource, PackedBatch, Packer, RoleWeights, Stream
from earlyfusion.errors import SettingError
from earlyfusion.fields import check_at_least, check_shares
from earlyfusion.kernels.fused import CausalAttend
from earlyfusion.kernels.twins import accelerate
from earlyfusion.model.transformer import Transformer
from earlyfusion.parallel import ParallelConfig
from earlyfusion.processor import TokenSequence
from earlyfusion.train import checkpoint, lora
from earlyfusion.train.folder import notes_folder
from earlyfusion.train.loss import TokenLoss, head_loss
from earlyfusion.train.optim import OptimConfig
from earlyfusion.train.plan import PEAK_TFLOPS, Job, flops_per_token, head_block
from earlyfusion.train.task import Task
from earlyfusion.train.trainer import RunConfig

if TYPE_CHECKING:
    from earlyfusion.parallel import DeviceMesh

# Positions whose logits are computed at a time on a CPU: few enough for its cache.
_CPU_BLOCK = 256


@dataclass
class LanguageConfig:
    """The fields that all trainings on packed rows of a corpus share. Raises `SettingError`."""

    rows: int = 1
    """Rows of a step, over all processes."""
    micro_rows: int = 0
    """Rows that one process computes at a time; 0: all that it has."""
    length: int = 0
    """Tokens of a row; 0: the model's context."""
    dropout: float = 0.0
    """Share of the outputs of attention and feed-forward that are set to zero."""
    z_weight: float = 1e-5
    """Weight of the z-loss, the mean squared logarithm of the softmax normaliser."""
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    weights: RoleWeights = field(default_factory=RoleWeights)
    run: RunConfig = field(default_factory=RunConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)

    def __post_init__(self) -> None:
        check_at_least(self, rows=1, micro_rows=0, length=0, z_weight=0)
        check_shares(self, "dropout", below_one=True)
        if self.micro_rows and self.rows % self.micro_rows:
            raise SettingError(
                f"rows={self.rows} cannot be computed micro_rows={self.micro_rows} at a time: "
                f"choose a multiple of {self.micro_rows}"
            )

    @property
    def notes(self) -> Path:
        """Where this process writes about its data."""
        return notes_folder(self.run.out)

    def shape(self) -> ModelConfig:
        """The config of the model to be trained. Raises `SettingError` if it is not known."""
        raise SettingError(
            f"{type(self).__name__} does not say what model it trains: define its shape()"
        )

    def job(self) -> Job:
        """The input of `earlyfusion train RECIPE --plan`. Raises `SettingError` if the shape of the
        model is not known."""
        job = job_of(self.shape(), self.run, self.rows, self.length, self.dropout)
        return replace(job, micro_rows=self.micro_rows)

    def task(self, model: Transformer, stream: Stream, length: int, pad: int) -> LanguageTask:
        """The training of `model` on rows of `length` tokens, packed from `stream`."""
        packer = Packer(stream, self.weights, self.rows, length, pad)
        return LanguageTask(model, packer, self.z_weight, self.micro_rows)


def job_of(shape: ModelConfig, run: RunConfig, rows: int, length: int, dropout: float) -> Job:
    """The input of `--plan` for a run that trains all weights. `length` 0: the model's context."""
    length = length or shape.max_position_embeddings
    return Job(
        model=shape,
        layout=run.parallel,
        rows=rows,
        length=length,
        micro_rows=0,
        tokens=float(run.steps) * rows * length,
        dropout=dropout,
        peak_tflops=run.peak_tflops or PEAK_TFLOPS,
    )


class Transfer(Protocol):
    """Copies batches to a device. `send` starts the copy, in the thread that packs; `receive` makes
    the batch usable, in the thread that trains."""

    def send(self, batch: PackedBatch) -> PackedBatch: ...
    def receive(self, batch: PackedBatch) -> PackedBatch: ...


class CopyStream:
    """Copies batches from pinned memory to a GPU on a separate stream, while the GPU computes."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._done = torch.cuda.Event()

    def send(self, batch: PackedBatch) -> PackedBatch:
        with torch.cuda.stream(self._stream):
            sent = PackedBatch(*(t.pin_memory() for t in batch)).to(self._stream.device)
            self._done.record(self._stream)
        return sent

    def receive(self, batch: PackedBatch) -> PackedBatch:
        current = torch.cuda.current_stream(self._stream.device)
        current.wait_event(self._done)
        for tensor in batch:
            # Its memory belongs to the copy stream, which must not reuse it too early.
            tensor.record_stream(current)
        return batch


class BatchPrefetcher:
    """The batches of a packer, each packed and sent to the device while the previous one is
    computed. `cursor` is the number of the first document after the last batch that was returned; a
    batch that is only prepared does not count."""

    def __init__(self, packer: BatchSource, transfer: Transfer) -> None:
        self.cursor = packer.cursor
        self._packer, self._transfer = packer, transfer
        self._pool = ThreadPoolExecutor(1, "batches")
        self._next: Future[tuple[PackedBatch, int]] | None = None

    def next(self) -> PackedBatch:
        """The next batch, on the device; an error of its preparation is raised here."""
        future = self._next or self._pool.submit(self._prepare)
        self._next = None  # so that an error is raised only once
        batch, self.cursor = future.result()
        batch = self._transfer.receive(batch)
        self._next = self._pool.submit(self._prepare)
        return batch

    def seek(self, cursor: int) -> None:
        """Continue with document `cursor`, dropping the batch that is prepared."""
        if self._next is not None:
            wait([self._next])
        self._next = None
        self._packer.cursor = self.cursor = cursor

    def _prepare(self) -> tuple[PackedBatch, int]:
        batch = self._packer.next()
        return self._transfer.send(batch), self._packer.cursor


class LanguageTask(Task):
    """Next-token prediction over text and image tokens alike; its units are tokens.

    The rows of `packer` are those of a whole step, over all processes. Each process computes
    `micro_rows` of them at a time (0: all that it has). Raises `SettingError` if the rows cannot be
    divided so.
    """

    def __init__(
        self, model: Transformer, packer: BatchSource, z_weight: float = 1e-5, micro_rows: int = 0
    ) -> None:
        self.model: Transformer = accelerate(model)
        self._packer, self._z_weight, self._micro_rows = packer, z_weight, micro_rows
        self._mesh: DeviceMesh | None = None
        self._micro_batches: list[PackedBatch] = []
        self._prefetcher: BatchPrefetcher | None = None
        self._trainable = lora.trainable_part(model)
        self._fingerprint = checkpoint.fingerprint(model)
        self._step_weight = torch.zeros(())
        self._output_norm = torch.zeros(())
        # The input of the last norm is the output of the last block.
        model.model.norm.register_forward_pre_hook(self._measure_norm)
        model.train()
        self._check_rows(1)

    @property
    def micro_batches(self) -> int:
        rows = self._packer.rows // self._packer.share[1]
        return rows // (self._micro_rows or rows)

    @property
    def flops_per_unit(self) -> float:
        return flops_per_token(self.model.config, self._packer.length, self._trainable)

    @property
    def frozen_fingerprint(self) -> str:
        return self._fingerprint

    def distribute(
        self, mesh: DeviceMesh | None, config: ParallelConfig, compiled: bool, dtype: torch.dtype
    ) -> None:
        """Shard the model over the mesh, if there is one, and keep only this process's rows. Raises
        `SettingError` if the rows or their tokens cannot be divided so."""
        share = parallel.data_rank(mesh)
        self._check_rows(share[1])
        if self._packer.length % config.tensor:
            raise SettingError(
                f"length={self._packer.length} must be a multiple of tensor={config.tensor}: "
                f"rows are split over it"
            )
        parallel.parallelize(self.model, mesh, config, compiled, dtype)
        self._packer, self._mesh = self._packer.for_share(share), mesh

    def materialize(self, device: torch.device) -> None:
        parallel.materialize(self.model, device)

    def loss(self, step: int) -> tuple[Tensor, dict[str, Tensor], float]:
        if not self._micro_batches:
            self._fetch()
        batch = self._micro_batches.pop(0)
        loss = self._loss_of(batch)
        # The loss is a mean over the micro batch: scale it by its share of the step's weight.
        share = batch.weight_BT.sum().clamp_min(1e-8) / self._step_weight
        is_counted_BT = batch.weight_BT > 0
        metrics = {
            "text_nats": masked_mean(loss.nats_BT, is_counted_BT & ~batch.image_BT),
            "image_nats": masked_mean(loss.nats_BT, is_counted_BT & batch.image_BT),
            "log_z_squared": loss.log_z_squared,
            "output_norm": self._output_norm,
            "top_logit": loss.max_logit,
        }
        return loss.total * share, metrics, float(batch.tokens_BT.numel())

    def _loss_of(self, batch: PackedBatch) -> TokenLoss:
        # All layers share one object, because it only holds the mask.
        attends = [CausalAttend(batch.document_BT)] * self.model.config.num_hidden_layers
        x_BTD = self.model.hidden_states(batch.tokens_BT, batch.positions_BT, attends)
        x_BTD, head_VD, vocab_slice = parallel.head_inputs(x_BTD, self.model.lm_head.weight)
        targets = (batch.targets_BT, batch.weight_BT)
        block = head_block(len(head_VD)) if x_BTD.device.type == "cuda" else _CPU_BLOCK
        return head_loss(x_BTD, head_VD, *targets, self._z_weight, block, vocab_slice)

    @torch.no_grad()
    def measure(self, documents: Sequence[TokenSequence]) -> dict[str, float]:
        """`validation_loss`: the mean loss in nats per token of these documents, weighted as in
        training; and the same for text and for images alone, where there are any. All processes
        call it with the same documents, and each computes its share. Raises `SettingError` for rows
        made on the device."""
        if not isinstance(self._packer, Packer):
            raise SettingError(
                "rows that are assembled on the device cannot hold out documents: leave out "
                "validation= and validation_data="
            )
        device = next(self.model.parameters()).device
        sums = torch.zeros(2, 2, device=device)  # rows: text, image; columns: nats, weight
        for batch in self._packer.batches(documents, self._micro_rows or 1):
            batch = batch.to(device)
            weighted_nats_BT = self._loss_of(batch).nats_BT * batch.weight_BT
            for row, mask_BT in enumerate((~batch.image_BT, batch.image_BT)):
                sums[row, 0] += (weighted_nats_BT * mask_BT).sum()
                sums[row, 1] += (batch.weight_BT * mask_BT).sum()
        sums = parallel.data_sum(sums, self._mesh)
        names = ("validation_text_nats", "validation_image_nats")
        means = {n: float(nats / w) for n, (nats, w) in zip(names, sums, strict=True) if w > 0}
        return {"validation_loss": float(sums[:, 0].sum() / sums[:, 1].sum())} | means

    def state(self) -> tuple[dict[str, Any], dict[str, Any]]:
        # Between two steps no micro batch waits, so the cursor is the whole state.
        return {}, {"next_document": (self._prefetcher or self._packer).cursor}

    def load_state(self, tensors: dict[str, Any], state: dict[str, Any]) -> None:
        self.skip_to(state)

    def skip_to(self, state: dict[str, Any]) -> None:
        cursor = int(state["next_document"])
        if self._prefetcher is not None:
            self._prefetcher.seek(cursor)
        self._packer.cursor = cursor
        self._micro_batches = []

    def _fetch(self) -> None:
        """Split this process's rows of a step into micro batches, and sum the weight of all
        processes' rows."""
        batch = self._next_batch(next(self.model.parameters()).device)
        size = self._micro_rows or len(batch.tokens_BT)
        columns = [column.split(size) for column in batch]
        self._micro_batches = [PackedBatch(*pieces) for pieces in zip(*columns, strict=True)]
        self._step_weight = parallel.data_sum(batch.weight_BT.sum(), self._mesh).clamp_min(1e-8)

    def _next_batch(self, device: torch.device) -> PackedBatch:
        if device.type != "cuda" or not isinstance(self._packer, Packer):
            return self._packer.next().to(device)
        if self._prefetcher is None:
            self._prefetcher = BatchPrefetcher(self._packer, CopyStream(device))
        return self._prefetcher.next()

    def _measure_norm(self, _: nn.Module, inputs: tuple[Tensor]) -> None:
        """The mean norm of the last block's output: its growth is an early sign of divergence."""
        x_BTD = parallel.local_shard(inputs[0].detach())
        self._output_norm = x_BTD.float().norm(dim=-1).mean()

    def _check_rows(self, data_ranks: int) -> None:
        rows, micro_rows = self._packer.rows, max(1, self._micro_rows)
        rows_at_once = data_ranks * micro_rows
        if rows % rows_at_once:
            raise SettingError(
                f"rows={rows} cannot be shared by {data_ranks} data ranks that compute "
                f"micro_rows={micro_rows} at a time: choose a multiple of {rows_at_once}"
            )


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """The mean of the values where `mask` is true; NaN if it never is."""
    # Not `values[mask].mean()`, which would wait for the device.
    return torch.where(mask, values, 0).sum() / mask.sum()
