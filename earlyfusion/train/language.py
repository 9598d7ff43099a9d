"""Training of the transformer on packed documents; see `train.trainer.Task`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from earlyfusion import parallel, processes
from earlyfusion.data.corpus import CorpusConfig
from earlyfusion.data.packing import PackedBatch, Packer, RoleWeights, Rows, Stream
from earlyfusion.errors import SettingError
from earlyfusion.kernels.fused import CausalAttend
from earlyfusion.kernels.twins import accelerate
from earlyfusion.model.transformer import Transformer
from earlyfusion.parallel import ParallelConfig
from earlyfusion.processor import TokenSequence
from earlyfusion.train import checkpoint, lora
from earlyfusion.train.loss import TokenLoss, head_loss
from earlyfusion.train.optim import OptimConfig
from earlyfusion.train.plan import flops_per_token
from earlyfusion.train.trainer import RunConfig

if TYPE_CHECKING:
    from earlyfusion.parallel import DeviceMesh

# Positions whose logits lie in memory together: small parts stay in a CPU's cache, and cost a GPU
# more launches than work.
_BLOCK, _BLOCK_GPU = 256, 16384


@dataclass
class LanguageConfig:
    """What every training on packed rows of a corpus has."""

    rows: int = 1
    """Rows of a step, over all processes."""
    micro_rows: int = 0
    """Rows that one process computes at a time; 0: all that it has."""
    length: int = 0
    """Tokens of a row; 0: the model's context."""
    dropout: float = 0.0
    z_weight: float = 1e-5
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    weights: RoleWeights = field(default_factory=RoleWeights)
    run: RunConfig = field(default_factory=RunConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)

    def __post_init__(self) -> None:
        for name, least in (("rows", 1), ("micro_rows", 0), ("length", 0), ("z_weight", 0)):
            if getattr(self, name) < least:
                raise SettingError(f"{name}={getattr(self, name)} must be {least} up")
        if not 0 <= self.dropout < 1:
            raise SettingError(f"dropout={self.dropout} must be 0 up and below 1")
        if self.micro_rows and self.rows % self.micro_rows:
            raise SettingError(
                f"rows={self.rows} cannot be computed micro_rows={self.micro_rows} at a time: "
                f"choose a multiple of {self.micro_rows}"
            )

    @property
    def notes(self) -> Path:
        """Where a process writes of its corpus: in a folder of its own where there are several."""
        several = processes.count() > 1
        return self.run.out / f"process-{processes.rank()}" if several else self.run.out

    def task(self, model: Transformer, stream: Stream, length: int, pad: int) -> LanguageTask:
        """The training of `model` on rows of `length` tokens of `stream`."""
        packer = Packer(stream, self.weights, self.rows, length, pad)
        return LanguageTask(model, packer, self.z_weight, self.micro_rows)


class LanguageTask:
    """Next-token prediction over text and image tokens alike.

    The rows of the packer are those of a whole step, over all processes. `micro_rows` of them go
    through the network at a time (0: all that this process has).
    """

    def __init__(
        self, model: Transformer, packer: Rows, z_weight: float = 1e-5, micro_rows: int = 0
    ) -> None:
        self.model, self._packer, self._z_weight = accelerate(model), packer, z_weight
        self._micro_rows = micro_rows
        self._mesh: DeviceMesh | None = None
        self._waiting: list[PackedBatch] = []
        self._part = lora.part(model)
        self.began_with = checkpoint.fingerprint(model)
        self._weight = torch.zeros(())
        self._norm = torch.zeros(())
        model.model.norm.register_forward_pre_hook(self._measure)
        model.train()
        self._check_rows(1)

    @property
    def parts(self) -> int:
        """How many calls of `loss` make a step."""
        own = self._packer.rows // self._packer.share[1]
        return own // (self._micro_rows or own)

    @property
    def flops_per_unit(self) -> float:
        """Floating-point operations that training takes for one token."""
        return flops_per_token(self.model.config, self._packer.length, self._part)

    def distribute(
        self, mesh: DeviceMesh | None, config: ParallelConfig, compiled: bool, dtype: torch.dtype
    ) -> None:
        """Put the model on the mesh, if there is one, and take this process's rows only."""
        share = parallel.data_rank(mesh)
        self._check_rows(share[1])
        if self._packer.length % config.tensor:
            raise SettingError(
                f"length={self._packer.length} must be a multiple of tensor={config.tensor}: "
                f"rows are cut over it"
            )
        parallel.parallelize(self.model, mesh, config, compiled, dtype)
        self._packer.share, self._mesh = share, mesh

    def parameters(self) -> Iterator[nn.Parameter]:
        return self.model.parameters()

    def loss(self, step: int) -> tuple[Tensor, dict[str, Tensor], float]:
        if not self._waiting:
            self._fetch()
        batch = self._waiting.pop(0)
        loss = self._scored(batch)
        share = batch.weight_BT.sum().clamp_min(1e-8) / self._weight
        counted_BT = batch.weight_BT > 0
        figures = {
            "text_nats": loss.nats_BT[counted_BT & ~batch.image_BT].mean(),
            "image_nats": loss.nats_BT[counted_BT & batch.image_BT].mean(),
            "log_z_squared": loss.z,
            "output_norm": self._norm,
            "top_logit": loss.top,
        }
        return loss.total * share, figures, float(batch.tokens_BT.numel())

    def _scored(self, batch: PackedBatch) -> TokenLoss:
        attends = [CausalAttend(batch.document_BT)] * self.model.config.num_hidden_layers
        x_BTD = self.model.states(batch.tokens_BT, batch.positions_BT, attends)
        x_BTD, head_VD, part = parallel.head_inputs(x_BTD, self.model.lm_head.weight)
        targets = (batch.targets_BT, batch.weight_BT)
        block = _BLOCK_GPU if x_BTD.device.type == "cuda" else _BLOCK
        return head_loss(x_BTD, head_VD, *targets, self._z_weight, block, part)

    @torch.no_grad()
    def measure(self, documents: Sequence[TokenSequence]) -> dict[str, float]:
        """Mean nats of the answers' tokens, by the weights of the training, and by modality.

        All processes call it with the same documents, and each computes its share.
        """
        device = next(self.model.parameters()).device
        sums = torch.zeros(2, 2, device=device)  # text, image x nats, weight
        if not isinstance(self._packer, Packer):
            raise SettingError(
                "rows made on the device hold no documents out: leave validation out"
            )
        for batch in self._packer.batches(documents, self._micro_rows or 1):
            own = batch.to(device)
            weighted_BT = self._scored(own).nats_BT * own.weight_BT
            for place, kind_BT in enumerate((~own.image_BT, own.image_BT)):
                sums[place, 0] += (weighted_BT * kind_BT).sum()
                sums[place, 1] += (own.weight_BT * kind_BT).sum()
        sums = parallel.data_sum(sums, self._mesh)
        names = ("validation_text_nats", "validation_image_nats")
        means = {n: float(nats / w) for n, (nats, w) in zip(names, sums, strict=True) if w > 0}
        return {"validation_loss": float(sums[:, 0].sum() / sums[:, 1].sum())} | means

    def after(self, step: int) -> dict[str, float]:
        return {}

    def state(self) -> tuple[dict[str, Any], dict[str, Any]]:
        return {}, {"next_document": self._packer.cursor}

    def load_state(self, tensors: dict[str, Any], state: dict[str, Any]) -> None:
        self._packer.cursor = int(state["next_document"])
        self._waiting = []

    def _fetch(self) -> None:
        """This process's rows of a step in parts, and the weight of all rows of all processes."""
        whole = self._packer.next().to(next(self.model.parameters()).device)
        size = self._micro_rows or len(whole.tokens_BT)
        columns = [column.split(size) for column in whole]
        self._waiting = [PackedBatch(*part) for part in zip(*columns, strict=True)]
        self._weight = parallel.data_sum(whole.weight_BT.sum(), self._mesh).clamp_min(1e-8)

    def _measure(self, _: nn.Module, inputs: tuple[Tensor]) -> None:
        """The length of what the last block gives: its growth is the paper's early sign."""
        x_BTD = inputs[0].detach()
        local = x_BTD.to_local() if hasattr(x_BTD, "to_local") else x_BTD
        self._norm = local.float().norm(dim=-1).mean()

    def _check_rows(self, processes: int) -> None:
        rows, parts = self._packer.rows, processes * max(1, self._micro_rows)
        if rows % parts:
            raise SettingError(
                f"rows={rows} cannot go to {processes} data ranks in parts of "
                f"micro_rows={max(1, self._micro_rows)}: choose a multiple of {parts}"
            )
