"""Next-token loss with z-loss (arXiv 2405.09818, section 2.3).

`next_token_loss` is the formula; `head_loss` gives the same value and gradients from the states
before the head, a block of positions at a time, so that logits of all positions never lie in memory
together. Shapes: B rows, T tokens of a row, N positions of both, D model width, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

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


def head_loss(
    x_BTD: Tensor,
    head_VD: Tensor,
    targets_BT: Tensor,
    weight_BT: Tensor,
    z_weight: float = 1e-5,
    block: int = 256,
) -> TokenLoss:
    """`next_token_loss` of the logits `x_BTD @ head_VD.T`, `block` positions at a time.

    Positions of weight 0 cost nothing and count as 0 nats. The product is computed in the dtype of
    autocast, all else in fp32.
    """
    counted_N = weight_BT.flatten().nonzero()[:, 0]
    x_ND = x_BTD.flatten(0, 1)[counted_N]
    weight_N = weight_BT.flatten()[counted_N]
    share_N = weight_N / weight_N.sum().clamp_min(1e-8)
    targets_N = targets_BT.flatten()[counted_N]
    total, z, nats_N = _HeadLoss.apply(x_ND, head_VD, targets_N, share_N, z_weight, block)
    nats_BT = torch.zeros_like(weight_BT).flatten()
    nats_BT[counted_N] = nats_N
    return TokenLoss(total, z.detach(), nats_BT.view_as(weight_BT))


class _HeadLoss(torch.autograd.Function):
    """Loss and both gradients in one pass: the backward pass only scales what the forward found."""

    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        head_VD: Tensor,
        targets_N: Tensor,
        share_N: Tensor,
        z_weight: float,
        block: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        kind = x_ND.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x_ND.dtype
        head = head_VD.detach().to(dtype)
        grad_x_ND = torch.empty_like(x_ND)
        grad_head_VD = torch.zeros_like(head_VD, dtype=torch.float32)
        nats, z = [], x_ND.new_zeros((), dtype=torch.float32)
        columns = (c.split(block) for c in (x_ND, grad_x_ND, targets_N, share_N))
        with torch.autocast(kind, enabled=False):
            for x, grad_x, target, share in zip(*columns, strict=True):
                logits = (x.to(dtype) @ head.T).float()
                chosen = target[:, None]
                chosen_logit = logits.gather(1, chosen)[:, 0]
                top = logits.amax(-1, keepdim=True)
                shares = logits.sub_(top).exp_()
                sums = shares.sum(-1)
                log_z = sums.log() + top[:, 0]
                nats.append(log_z - chosen_logit)
                z += (share * log_z.square()).sum()
                scale = share * (1 + 2 * z_weight * log_z)
                grad = shares.mul_((scale / sums)[:, None])
                grad = grad.scatter_add_(1, chosen, -share[:, None]).to(dtype)
                grad_x.copy_(grad @ head)
                grad_head_VD += grad.T @ x.to(dtype)
        ctx.save_for_backward(grad_x_ND, grad_head_VD.to(head_VD.dtype))
        nats_N = torch.cat(nats) if nats else x_ND.new_zeros(0, dtype=torch.float32)
        ctx.mark_non_differentiable(nats_N)
        return (share_N * nats_N).sum() + z_weight * z, z, nats_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_x_ND, grad_head_VD = ctx.saved_tensors
        grad_total = grads[0]
        return grad_x_ND * grad_total, grad_head_VD * grad_total, None, None, None, None
