"""Training of the transformer on packed documents; see `train.trainer.Task`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from earlyfusion.model.attention import CausalAttend
from earlyfusion.model.transformer import Transformer
from earlyfusion.train.data import Packer
from earlyfusion.train.loss import head_loss


class LanguageTask:
    """Next-token prediction over text and image tokens alike."""

    def __init__(self, model: Transformer, packer: Packer, z_weight: float = 1e-5) -> None:
        self.model, self._packer, self._z_weight = model, packer, z_weight
        self._device = next(model.parameters()).device
        model.train()

    def parameters(self) -> Iterator[nn.Parameter]:
        return self.model.parameters()

    def loss(self, step: int) -> tuple[Tensor, dict[str, Tensor], float]:
        batch = self._packer.next().to(self._device)
        attends = [CausalAttend(batch.document_BT)] * self.model.config.num_hidden_layers
        x_BTD = self.model.states(batch.tokens_BT, batch.positions_BT, attends)
        head_VD = self.model.lm_head.weight
        loss = head_loss(x_BTD, head_VD, batch.targets_BT, batch.weight_BT, self._z_weight)
        counted_BT = batch.weight_BT > 0
        figures = {
            "text_nats": loss.nats_BT[counted_BT & ~batch.image_BT].mean(),
            "image_nats": loss.nats_BT[counted_BT & batch.image_BT].mean(),
            "log_z_squared": loss.z,
        }
        return loss.total, figures, float(batch.tokens_BT.numel())

    def after(self, step: int) -> dict[str, float]:
        return {}

    def state(self) -> tuple[dict[str, Any], dict[str, Any]]:
        return {}, {"next_document": self._packer.cursor}

    def load_state(self, tensors: dict[str, Any], state: dict[str, Any]) -> None:
        self._packer.cursor = int(state["next_document"])
