"""Speculative Jacobi decoding: several codes of a picture in one pass, from the same distribution.

A window holds drafts of the next codes. One pass reads all of them and gives, for each place, the
distribution behind the codes before it. Each draft is then kept with probability min(1, wanted /
asked), where it was drawn from `asked`; else it is drawn from what `wanted` has more than `asked`.
So every place of the window holds a draw from its newest distribution. The places up to and with
the first one that changed stand behind final codes only: they are final, in the distribution of one
code at a time. The others are the drafts of the next pass. With temperature 0 a draft is kept where
it is the likeliest code, and the codes are those of one at a time.

The rule is that of speculative sampling, used as in Teng et al., "Accelerating Auto-regressive
Text-to-Image Generation with Training-free Speculative Jacobi Decoding" (arXiv 2410.01699), with
one change: it decides at all places, not only up to the first that changes. Behind that place the
paper draws anew; keeping what may be kept leaves the drafts more alike from pass to pass.

Why it is exact: what happens at a place depends on the places before it and on numbers of its own.
Given the former, its draft goes from one known distribution to the next, each a step that turns a
draw from one into a draw from the other. When the places before it are final, the newest is the
model's own.

Shapes: W places of a window, R rows (places of several windows), V codes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from earlyfusion.generation.sampler import invert

NO_DRAFT = -1


class Window:
    """The drafts of one picture between two passes, for at most `size` places.

    Its random numbers come from the request's seed and the place where the picture begins: the same
    seed gives the same picture, whatever runs beside it.
    """

    def __init__(self, size: int, seed: int, place: int) -> None:
        self.drafts: list[int] = []
        self.asked_WV: Tensor | None = None
        self.wanted_WV: Tensor | None = None
        self._size = size
        self._numbers = np.random.default_rng((seed, place))

    @property
    def places(self) -> int:
        """Places that the next pass gives a distribution for: one behind each draft, and one."""
        return len(self.drafts) + 1

    def uniforms(self) -> list[tuple[float, float]]:
        """For each place of a pass a number to keep or change by, and one to draw by."""
        return [(a, b) for a, b in self._numbers.random((self.places, 2)).tolist()]

    def settle(self, tokens: Sequence[int], left: int) -> list[int]:
        """The final ones of a pass's tokens, which follow `wanted_WV`; the others are drafts now.

        New drafts repeat the last one. Their distribution has one value, so nothing is drawn for
        them. `left` counts the codes to come until a token that is fixed, these tokens included.
        """
        same = (new == old for new, old in zip(tokens, self.drafts, strict=False))
        final = next((n for n, kept in enumerate(same, 1) if not kept), len(tokens))
        size = min(self._size, left - final) - 1
        self.drafts = [*tokens[final:], *[tokens[-1]] * self._size][: max(size, 0)]
        self.asked_WV = None if self.wanted_WV is None else self.wanted_WV[final:]
        return list(tokens[:final])


def draw(windows: Sequence[Window], columns: Sequence[Sequence[int]], logits_RV: Tensor) -> Tensor:
    """The columns drawn at all places of some windows, from logits behind temperature and cuts.

    `columns` are those of the windows' drafts.
    """
    wanted_RV = logits_RV.double().softmax(-1)
    device = wanted_RV.device
    places = [window.places for window in windows]
    for window, wanted_WV in zip(windows, wanted_RV.split(places), strict=True):
        window.wanted_WV = wanted_WV
    draft_R = torch.tensor([c for drafts in columns for c in (*drafts, NO_DRAFT)])
    uniform_R2 = torch.tensor(
        [pair for window in windows for pair in window.uniforms()], dtype=torch.float64
    )
    asked_RV = asked(windows, columns, wanted_RV)
    return revise(draft_R.to(device), asked_RV, wanted_RV, uniform_R2.to(device))


def asked(windows: Sequence[Window], columns: Sequence[Sequence[int]], like_RV: Tensor) -> Tensor:
    """The distributions [R, V] that the drafts of these windows come from, 0 without a draft.

    `like_RV` gives dtype, device and size.
    """
    asked_RV = torch.zeros_like(like_RV)
    rows, ones, start = list[int](), list[int](), 0
    for window, drafts in zip(windows, columns, strict=True):
        drawn = 0 if window.asked_WV is None else min(len(window.asked_WV), len(drafts))
        if window.asked_WV is not None and drawn:
            asked_RV[start : start + drawn] = window.asked_WV[:drawn]
        rows += range(start + drawn, start + len(drafts))
        ones += drafts[drawn:]
        start += window.places
    asked_RV[rows, ones] = 1
    return asked_RV


def revise(draft_R: Tensor, asked_RV: Tensor, wanted_RV: Tensor, uniform_R2: Tensor) -> Tensor:
    """Draws from `wanted_RV`, as many as possible equal to the drafts, which come from `asked_RV`.

    A row without a draft has `NO_DRAFT`, and zeros for `asked_RV`.
    """
    wanted_R, asked_R = (
        of_RV.gather(-1, draft_R.clamp(min=0)[:, None])[:, 0] for of_RV in (wanted_RV, asked_RV)
    )
    keep_R = (draft_R != NO_DRAFT) & (uniform_R2[:, 0] * asked_R < wanted_R)
    more_RV = (wanted_RV - asked_RV).clamp(min=0)
    # Equal distributions leave nothing but rounding, or nothing at all.
    none_R1 = more_RV.sum(-1, keepdim=True) == 0
    drawn_R = invert(torch.where(none_R1, wanted_RV, more_RV), uniform_R2[:, 1])
    return torch.where(keep_R, draft_R, drawn_R)
