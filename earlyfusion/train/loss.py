"""Next-token loss with z-loss (arXiv 2405.09818, section 2.3). `next_token_loss` is the formula.
`head_loss` computes the same value and gradients from the states before the head, one block of
positions at a time, so that the logits of all positions are never in memory together."""

# Shapes: B rows, T tokens of a row, N counted positions of all rows, D model width, V vocabulary.

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from earlyfusion.errors import SettingError
from earlyfusion.kernels.fused import autograd_gradients, is_transformed

if TYPE_CHECKING:
    from earlyfusion.parallel import VocabularySlice


class TokenLoss(NamedTuple):
    """The loss and what a run logs of it. Only `total` has gradients."""

    total: Tensor
    """What is minimised: the weighted mean of cross-entropy + z_weight * log^2 Z."""
    log_z_squared: Tensor
    """The weighted mean of log^2 Z, where Z is the sum of a position's exponentiated logits."""
    nats_BT: Tensor
    """The cross-entropy of each target."""
    max_logit: Tensor
    """The largest logit of all positions."""


def next_token_loss(
    logits_BTV: Tensor, targets_BT: Tensor, weight_BT: Tensor, z_weight: float = 1e-5
) -> TokenLoss:
    """Weighted mean over positions of cross-entropy + z_weight * log^2 Z, in fp32. Targets are
    already shifted: `targets_BT[b, t]` follows the token at position t."""
    logits_BTV = logits_BTV.float()
    nats_BT = F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten(), reduction="none")
    nats_BT = nats_BT.view_as(weight_BT)
    log_z_BT = torch.logsumexp(logits_BTV, -1)
    share_BT = weight_BT / weight_BT.sum().clamp_min(1e-8)
    log_z_squared = (share_BT * log_z_BT.square()).sum()
    total = (share_BT * nats_BT).sum() + z_weight * log_z_squared
    return TokenLoss(total, log_z_squared.detach(), nats_BT.detach(), logits_BTV.detach().amax())


def head_loss(
    x_BTD: Tensor,
    head_VD: Tensor,
    targets_BT: Tensor,
    weight_BT: Tensor,
    z_weight: float = 1e-5,
    block: int = 256,
    vocab_slice: VocabularySlice | None = None,
) -> TokenLoss:
    """`next_token_loss` of the logits `x_BTD @ head_VD.T`, `block` positions at a time.

    Positions of weight 0 are skipped and count as 0 nats. The product is in autocast's dtype, all
    else in fp32. With `vocab_slice`, `head_VD` has some rows of the head and other processes have
    the rest: the loss is that of all rows, the gradient of `x_BTD` that of these. Second
    derivatives, torch.func and forward-mode AD compute the logits of all positions; with
    `vocab_slice` they raise `SettingError`.
    """
    if is_transformed(x_BTD, head_VD):
        _refuse_slice(vocab_slice)
        return _loss_of_logits(x_BTD, head_VD, targets_BT, weight_BT, z_weight)
    counted_N = weight_BT.flatten().nonzero()[:, 0]
    x_ND = x_BTD.flatten(0, 1)[counted_N]
    weight_N = weight_BT.flatten()[counted_N]
    share_N = weight_N / weight_N.sum().clamp_min(1e-8)
    targets_N = targets_BT.flatten()[counted_N]
    total, log_z_squared, nats_N, max_logit = _HeadLoss.apply(  # type: ignore[no-untyped-call]
        x_ND, head_VD, targets_N, share_N, z_weight, block, vocab_slice
    )
    nats_BT = torch.zeros_like(weight_BT).flatten()
    nats_BT[counted_N] = nats_N
    return TokenLoss(total, log_z_squared.detach(), nats_BT.view_as(weight_BT), max_logit)


class _HeadLoss(torch.autograd.Function):
    """Loss and both gradients in one pass: the backward pass only scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        head_VD: Tensor,
        targets_N: Tensor,
        share_N: Tensor,
        z_weight: float,
        block: int,
        vocab_slice: VocabularySlice | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        device_type = x_ND.device.type
        autocasts = torch.is_autocast_enabled(device_type)
        dtype = torch.get_autocast_dtype(device_type) if autocasts else x_ND.dtype
        head = head_VD.detach().to(dtype)
        # Gradients are computed here: `backward` would need all logits to be kept.
        grad_x_ND = torch.empty_like(x_ND)
        grad_head_VD = torch.zeros_like(head_VD, dtype=torch.float32)
        nats, log_z_squared = [], x_ND.new_zeros((), dtype=torch.float32)
        max_logit = torch.full_like(log_z_squared, -math.inf)
        columns = (c.split(block) for c in (x_ND, grad_x_ND, targets_N, share_N))
        with torch.autocast(device_type, enabled=False):
            for x, grad_x, target, share in zip(*columns, strict=True):
                logits = (x.to(dtype) @ head.T).float()
                target_row, is_local = _local_rows(target, len(head), vocab_slice)
                target_logit = logits.gather(1, target_row)[:, 0]
                row_max = logits.amax(-1, keepdim=True)
                max_logit = torch.cat((max_logit[None], row_max[:, 0])).amax()
                exps = logits.sub_(row_max).exp_()  # in place: logits are the peak of memory
                sums = exps.sum(-1)
                log_z = sums.log() + row_max[:, 0]
                if vocab_slice is not None:
                    # From here on `log_z`, `sums` and the logit of the target are of all slices.
                    slice_log_z = log_z
                    log_z, target_logit = vocab_slice.combine(slice_log_z, target_logit * is_local)
                    sums = sums * (log_z - slice_log_z).exp()
                nats.append(log_z - target_logit)
                log_z_squared += (share * log_z.square()).sum()
                # d(nats) = softmax - onehot, d(log^2 Z) = 2 log Z softmax.
                scale = share * (1 + 2 * z_weight * log_z)
                grad = exps.mul_((scale / sums)[:, None])
                grad = grad.scatter_add_(1, target_row, -(share * is_local)[:, None]).to(dtype)
                grad_x.copy_(grad @ head)
                grad_head_VD += grad.T @ x.to(dtype)
        gradients = (grad_x_ND, grad_head_VD.to(head_VD.dtype))
        ctx.save_for_backward(*gradients, x_ND, head_VD, targets_N, share_N)
        ctx.z_weight, ctx.vocab_slice, ctx.dtype = z_weight, vocab_slice, dtype
        nats_N = torch.cat(nats) if nats else x_ND.new_zeros(0, dtype=torch.float32)
        ctx.mark_non_differentiable(nats_N, max_logit)
        total = (share_N * nats_N).sum() + z_weight * log_z_squared
        return total, log_z_squared, nats_N, max_logit

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_x_ND, grad_head_VD, *inputs, targets_N, share_N = ctx.saved_tensors
        grad_total = grads[0]
        if torch.is_grad_enabled():  # by `create_graph=True`, for second derivatives
            _refuse_slice(ctx.vocab_slice)
            formula = partial(_total_loss, targets_N, share_N, ctx.z_weight, ctx.dtype)
            input_grads = autograd_gradients(formula, tuple(inputs), grad_total)
            return *input_grads, None, None, None, None, None
        return grad_x_ND * grad_total, grad_head_VD * grad_total, None, None, None, None, None


def _total_loss(
    targets_N: Tensor,
    share_N: Tensor,
    z_weight: float,
    dtype: torch.dtype,
    x_ND: Tensor,
    head_VD: Tensor,
) -> Tensor:
    """What `_HeadLoss` minimises, in torch's own operations."""
    with torch.autocast(x_ND.device.type, enabled=False):
        logits_NV = (x_ND.to(dtype) @ head_VD.to(dtype).T).float()
        log_z_N = logits_NV.logsumexp(-1)
        nats_N = log_z_N - logits_NV.gather(1, targets_N[:, None])[:, 0]
        return (share_N * (nats_N + z_weight * log_z_N.square())).sum()


def _loss_of_logits(
    x_BTD: Tensor, head_VD: Tensor, targets_BT: Tensor, weight_BT: Tensor, z_weight: float
) -> TokenLoss:
    loss = next_token_loss(F.linear(x_BTD, head_VD), targets_BT, weight_BT, z_weight)
    return loss._replace(nats_BT=loss.nats_BT * (weight_BT > 0))


def _refuse_slice(vocab_slice: VocabularySlice | None) -> None:
    if vocab_slice is not None:
        raise SettingError(
            "the head is split over several processes, where its loss has neither second "
            "derivatives nor transforms: use tensor=1"
        )


def _local_rows(
    target_N: Tensor, rows: int, vocab_slice: VocabularySlice | None
) -> tuple[Tensor, Tensor]:
    """The row of `head_VD` for each target, [N, 1], and whether this process has that row, [N]. The
    row of a target that it does not have is any valid one."""
    if vocab_slice is None:
        return target_N[:, None], torch.ones_like(target_N)
    local_N = target_N - vocab_slice.first
    is_local_N = (local_N >= 0) & (local_N < rows)
    return local_N.clamp(0, rows - 1)[:, None], is_local_N
