"""Speculative Jacobi decoding: several codes of an image in one pass, from the same distribution.

A window holds drafts of the next codes. One pass reads all of them and gives, at each position, a
new distribution of the next code given all codes before it. A draft that was sampled from an `old`
distribution is kept with probability min(1, new / old); otherwise it is sampled again from the
positive part of new - old. So each position holds a sample of its newest distribution. The codes up
to and including the first that changed follow final codes only: they are final, distributed as if
sampled one at a time. The others are the drafts of the next pass. With temperature 0 a draft is
kept if it is the likeliest code, and the codes equal those sampled one at a time.

The rule is that of speculative sampling, used as in Teng et al., "Accelerating Auto-regressive
Text-to-Image Generation with Training-free Speculative Jacobi Decoding" (arXiv 2410.01699), with
one change: after the first draft that changes, the paper samples all positions anew; here the rule
decides at all positions, which changes fewer drafts per pass.

Why it is exact: the code at a position depends only on the codes before it and on the random
numbers of this position. As long as the codes before it stay the same, each pass turns a sample of
one known distribution into a sample of the next. Once they are final, the newest distribution is
the model's.
"""

# Shapes: W positions of a window, R rows (positions of several windows), V codes.

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from earlyfusion.generation.sampler import invert_cdf

NO_DRAFT = -1


class Window:
    """The drafts of one image between two passes; a pass has at most `size` positions. The random
    numbers follow from the request's seed and from `start`, the number of tokens before the
    image."""

    def __init__(self, size: int, seed: int, start: int) -> None:
        self.drafts: list[int] = []
        self.old_WV: Tensor | None = None
        self.new_WV: Tensor | None = None
        self._size = size
        # Not the request's generator: text must get the same numbers with and without windows.
        self._numbers = np.random.default_rng((seed, start))

    @property
    def positions(self) -> int:
        """The number of distributions in the next pass: one per draft, and one after the last."""
        return len(self.drafts) + 1

    def uniforms(self) -> list[tuple[float, float]]:
        """Per position, the random number that decides whether its draft is kept, and the one with
        which it is sampled."""
        return [(a, b) for a, b in self._numbers.random((self.positions, 2)).tolist()]

    def accept(self, tokens: Sequence[int], codes_left: int) -> list[int]:
        """The tokens of a pass that are final; the others become the next drafts. `codes_left` is
        the number of codes, `tokens` included, until a fixed token."""
        final = 1  # the drafts that were kept, and the token after them
        for new, draft in zip(tokens, self.drafts, strict=False):
            if new != draft:
                break
            final += 1
        size = max(0, min(self._size, codes_left - final) - 1)
        # New drafts repeat the last token: their distribution has all weight on that token.
        self.drafts = [*tokens[final:], *[tokens[-1]] * self._size][:size]
        self.old_WV = None if self.new_WV is None else self.new_WV[final:]
        return list(tokens[:final])


def sample(
    windows: Sequence[Window], columns: Sequence[Sequence[int]], logits_RV: Tensor
) -> Tensor:
    """The columns sampled at all positions of these windows, int64 [R]. `columns` has the columns
    of each window's drafts. Temperature and truncation are already applied to the logits."""
    new_RV = logits_RV.double().softmax(-1)
    device = new_RV.device
    positions = [window.positions for window in windows]
    for window, new_WV in zip(windows, new_RV.split(positions), strict=True):
        window.new_WV = new_WV
    draft_R = torch.tensor([c for drafts in columns for c in (*drafts, NO_DRAFT)])
    uniform_R2 = torch.tensor(
        [pair for window in windows for pair in window.uniforms()], dtype=torch.float64
    )
    old_RV = draft_distributions(windows, columns, new_RV)
    return resample(draft_R.to(device), old_RV, new_RV, uniform_R2.to(device))


def draft_distributions(
    windows: Sequence[Window], columns: Sequence[Sequence[int]], like_RV: Tensor
) -> Tensor:
    """The distributions [R, V] from which the drafts of these windows were sampled; zeros for a
    position without a draft. Shape, dtype and device are those of `like_RV`."""
    old_RV = torch.zeros_like(like_RV)
    rows, repeated, start = list[int](), list[int](), 0
    for window, drafts in zip(windows, columns, strict=True):
        sampled = 0 if window.old_WV is None else min(len(window.old_WV), len(drafts))
        if window.old_WV is not None and sampled:
            old_RV[start : start + sampled] = window.old_WV[:sampled]
        # The other drafts repeat the last token.
        rows += range(start + sampled, start + len(drafts))
        repeated += drafts[sampled:]
        start += window.positions
    old_RV[rows, repeated] = 1
    return old_RV


def resample(draft_R: Tensor, old_RV: Tensor, new_RV: Tensor, uniform_R2: Tensor) -> Tensor:
    """Samples from `new_RV` that keep as many drafts as possible; these were sampled from `old_RV`.
    A row without a draft has `NO_DRAFT`, and zeros in `old_RV`."""
    column_R1 = draft_R.clamp(min=0)[:, None]
    new_R, old_R = new_RV.gather(-1, column_R1)[:, 0], old_RV.gather(-1, column_R1)[:, 0]
    # uniform < new / old, without the division: old may be 0.
    keep_R = (draft_R != NO_DRAFT) & (uniform_R2[:, 0] * old_R < new_R)
    residual_RV = (new_RV - old_RV).clamp(min=0)
    # Two nearly equal distributions may have a residual of zeros, from which nothing can be
    # sampled.
    is_zero_R1 = residual_RV.sum(-1, keepdim=True) == 0
    sampled_R = invert_cdf(torch.where(is_zero_R1, new_RV, residual_RV), uniform_R2[:, 1])
    return torch.where(keep_R, draft_R, sampled_R)
