"""Sampler: from masked logits to one token per row, on the device of the logits.

The order is Meta's: allowed tokens, repetition penalty, temperature, top-k, top-p, min-p, sampling.
Each row has its own settings, and each new token takes one random number from its request's
generator, so the result of a row does not depend on the other rows.
"""

# Shapes: B rows, V vocabulary.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from earlyfusion.generation.settings import (
    ModalitySettings,
    SamplingParams,
    image_settings,
    text_settings,
)

NEG_INF = -torch.inf

NOT_FINITE = (
    "the weights give numbers that are not finite (NaN or infinite): run `earlyfusion info MODEL` "
    "to see whether its file is damaged, and load what was float16 as bfloat16 or float32"
)


@dataclass(frozen=True)
class SamplingTensors:
    """`ModalitySettings` as tensors, with an entry per row."""

    temperature_B: Tensor
    top_k_B: Tensor
    top_p_B: Tensor
    min_p_B: Tensor
    penalty_B: Tensor

    @classmethod
    def of(
        cls, rows: Sequence[ModalitySettings], device: torch.device | str = "cpu"
    ) -> SamplingTensors:
        temperature, top_k, top_p, min_p, penalty = zip(*rows, strict=True)
        floats = [
            torch.tensor(v, dtype=torch.float64).to(device)
            for v in (temperature, top_p, min_p, penalty)
        ]
        k = torch.tensor(top_k, dtype=torch.int64).to(device)
        return cls(floats[0], k, floats[1], floats[2], floats[3])

    @classmethod
    def text(
        cls, rows: Sequence[SamplingParams], device: torch.device | str = "cpu"
    ) -> SamplingTensors:
        """The text settings of resolved `SamplingParams`."""
        return cls.of([text_settings(r) for r in rows], device)

    @classmethod
    def image(
        cls, rows: Sequence[SamplingParams], device: torch.device | str = "cpu"
    ) -> SamplingTensors:
        """The image settings of resolved `SamplingParams`."""
        return cls.of([image_settings(r) for r in rows], device)

    def select(self, rows_R: Tensor) -> SamplingTensors:
        """The settings of these rows, which may repeat."""
        return SamplingTensors(*(getattr(self, f.name)[rows_R] for f in fields(self)))

    def where(self, chosen_B: Tensor, other: SamplingTensors) -> SamplingTensors:
        """These settings in the chosen rows, the other's elsewhere."""
        pairs = ((getattr(self, f.name), getattr(other, f.name)) for f in fields(self))
        return SamplingTensors(*(torch.where(chosen_B, a_B, b_B) for a_B, b_B in pairs))


class Sampler:
    """Samples for a batch of requests with resolved `SamplingParams`, one per row."""

    def __init__(self, rows: Sequence[SamplingParams], device: torch.device | str = "cpu") -> None:
        self._text = SamplingTensors.text(rows, device)
        self._image = SamplingTensors.image(rows, device)

    def sample(
        self,
        logits_BV: Tensor,
        allowed_BV: Tensor,
        seen_BV: Tensor,
        in_image_B: Tensor,
        uniform_B: Tensor,
    ) -> Tensor:
        """One token per row, int64 [B]. `seen_BV` marks the tokens in each row's history;
        `uniform_B` has random numbers in [0, 1)."""
        settings = self._image.where(in_image_B, self._text)
        logits_BV = logits_BV.float().masked_fill(~allowed_BV, NEG_INF)
        logits_BV = penalise(logits_BV, seen_BV, settings.penalty_B)
        greedy_B = settings.temperature_B == 0
        sampled_B = pick(warp(logits_BV, settings), uniform_B)
        return torch.where(greedy_B, logits_BV.argmax(-1), sampled_B)


def can_sample(logits_BV: Tensor) -> Tensor:
    """For each row, whether a token can be sampled: it has no NaN, no +inf, and not only -inf."""
    # amax is NaN if any entry is.
    return logits_BV.amax(-1).isfinite()


def penalise(logits_BV: Tensor, seen_BV: Tensor, penalty_B: Tensor) -> Tensor:
    """Divide the positive logits of seen tokens by the penalty, multiply the others by it."""
    penalty_B1 = penalty_B.to(logits_BV.dtype)[:, None]
    penalised_BV = torch.where(logits_BV > 0, logits_BV / penalty_B1, logits_BV * penalty_B1)
    return torch.where(seen_BV, penalised_BV, logits_BV)


def warp(logits_BV: Tensor, settings: SamplingTensors) -> Tensor:
    """Apply temperature, then top-k, top-p and min-p, which set columns to -inf, but never all."""
    t_B1 = settings.temperature_B.to(logits_BV.dtype)[:, None]
    # Rows of temperature 0 are greedy: the caller takes their argmax.
    logits_BV = logits_BV / torch.where(t_B1 == 0, torch.ones_like(t_B1), t_B1)
    ascending_BV = _top_k(_ascending(logits_BV), settings.top_k_B)
    ascending_BV = _top_p(ascending_BV, settings.top_p_B)
    ascending_BV = _min_p(ascending_BV, settings.min_p_B)
    return _drop_smallest(logits_BV, ascending_BV.isneginf().sum(-1, keepdim=True), ascending_BV)


def pick(logits_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """The column where the cumulative probability, in the order of ids, passes `uniform`."""
    return invert_cdf(logits_BV.double().softmax(-1), uniform_B)


def invert_cdf(weights_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """The column where the cumulative weight, in fp64, passes `uniform` times its total."""
    cdf_BV = weights_BV.double().cumsum(-1)
    total_B1 = cdf_BV[:, -1:]
    # uniform * total may round up to the total, which no column passes.
    below_B1 = torch.nextafter(total_B1, torch.zeros_like(total_B1))
    target_B1 = torch.minimum(uniform_B.double()[:, None] * total_B1, below_B1)
    return torch.searchsorted(cdf_BV, target_B1, right=True)[:, 0]


def generator(seed: int) -> torch.Generator:
    """A request's random numbers; on the CPU, so that a seed gives the same numbers anywhere."""
    return torch.Generator().manual_seed(seed)


def uniforms(generators: Sequence[torch.Generator]) -> Tensor:
    """One number per request: each new token takes exactly one, even a forced one."""
    return torch.stack([torch.rand((), dtype=torch.float64, generator=g) for g in generators])


def _ascending(logits_BV: Tensor) -> Tensor:
    if logits_BV.device.type == "cpu" and logits_BV.dtype == torch.float32:
        # Many times faster than torch's sort, which also sorts the indices.
        return torch.from_numpy(np.sort(logits_BV.detach().numpy(), axis=-1))
    return logits_BV.sort(dim=-1).values


def _drop_smallest(logits_BV: Tensor, count_B1: Tensor, ascending_BV: Tensor) -> Tensor:
    """Set the `count` smallest logits of each row to -inf; of equal ones, lower ids first."""
    threshold_B1 = ascending_BV.gather(-1, count_B1)
    kept_BV = logits_BV >= threshold_B1
    surplus_B1 = kept_BV.sum(-1, keepdim=True) - (logits_BV.shape[-1] - count_B1)
    equal_BV = logits_BV == threshold_B1
    kept_BV &= ~(equal_BV & (equal_BV.cumsum(-1) <= surplus_B1))
    return logits_BV.masked_fill(~kept_BV, NEG_INF)


def _is_off(values_B: Tensor, off: int) -> bool:
    """Whether a setting is off in all rows. False on a GPU, where finding out would wait for it."""
    return values_B.device.type == "cpu" and bool((values_B == off).all())


def _top_k(ascending_BV: Tensor, k_B: Tensor) -> Tensor:
    if _is_off(k_B, 0):
        return ascending_BV
    size = ascending_BV.shape[-1]
    k_B = torch.where(k_B == 0, size, k_B).clamp(max=size)
    threshold_B1 = ascending_BV.gather(-1, (size - k_B)[:, None])
    return ascending_BV.masked_fill(ascending_BV < threshold_B1, NEG_INF)


def _top_p(ascending_BV: Tensor, p_B: Tensor) -> Tensor:
    if _is_off(p_B, 1):
        return ascending_BV
    # From the smallest up: the probabilities of dropped columns sum to at most 1 - p.
    tail_B1 = torch.where(p_B >= 1, -1.0, 1 - p_B).to(ascending_BV.dtype)[:, None]
    dropped_BV = ascending_BV.softmax(-1).cumsum(-1) <= tail_B1
    dropped_BV[:, -1] = False
    return ascending_BV.masked_fill(dropped_BV, NEG_INF)


def _min_p(ascending_BV: Tensor, p_B: Tensor) -> Tensor:
    if _is_off(p_B, 0):
        return ascending_BV
    threshold_B1 = ascending_BV[:, -1:] + p_B.log().to(ascending_BV.dtype)[:, None]
    return ascending_BV.masked_fill(ascending_BV < threshold_B1, NEG_INF)
