"""Next-token loss with z-loss (arXiv 2405.09818, section 2.3)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class TokenLoss(NamedTuple):
    """`total` is what is minimised; `nats_BT` is the plain cross-entropy of each target."""

    total: Tensor
    z: Tensor
    nats_BT: Tensor


def next_token_loss(
    logits_BTV: Tensor, targets_BT: Tensor, weight_BT: Tensor, z_weight: float = 1e-5
) -> TokenLoss:
    """Weighted mean of cross-entropy + z_weight * log^2 Z over the positions of positive weight.

    Targets are already shifted: `targets_BT[b, t]` follows the token at position t. All in fp32.
    """
    logits_BTV = logits_BTV.float()
    nats_BT = F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten(), reduction="none")
    nats_BT = nats_BT.view_as(weight_BT)
    log_z_BT = torch.logsumexp(logits_BTV, -1)
    share_BT = weight_BT / weight_BT.sum().clamp_min(1e-8)
    z = (share_BT * log_z_BT.square()).sum()
    return TokenLoss((share_BT * nats_BT).sum() + z_weight * z, z.detach(), nats_BT.detach())
