"""Rotary positions: how far each pair of a head's entries is rotated at a position.

The types are transformers', with the names of its `rope_parameters`: default; linear (positions
divided by `factor`); proportional (only some pairs are rotated); llama3 and yarn (arXiv
2309.00071), which reduce the low frequencies; longrope (arXiv 2402.13753), with a factor for each
pair; dynamic, which raises the base once a sequence is longer than the trained length. The angles
of dynamic and longrope depend on the length of the sequence at the time of the call; cached keys
keep their rotation.
"""

# Shapes: B batch, T tokens, H head width.

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from earlyfusion.config import ModelConfig
from earlyfusion.errors import SettingError


class Rotary(NamedTuple):
    """Cosines and sines of one forward pass, fp32 (B or 1, T, 1, H). The first half of the sines is
    negated, as `rotate` needs it."""

    cos: Tensor
    sin: Tensor


def rotate(x_BTNH: Tensor, rotary: Rotary) -> Tensor:
    """Rotate each pair (h, h + H/2) by its angle: transformers' half-split layout."""
    swapped_BTNH = x_BTNH.roll(x_BTNH.shape[-1] // 2, -1)
    return torch.addcmul(x_BTNH * rotary.cos, swapped_BTNH, rotary.sin)


def rotary_tables(config: ModelConfig, positions_BT: Tensor) -> Rotary:
    """Cosines and sines of every position and pair, in fp32. The length of a row, on which some
    types depend, is its largest position plus one."""
    lengths_B11 = positions_BT.amax(1)[:, None, None] + 1 if is_dynamic(config) else None
    frequencies = rotary_frequencies(config, positions_BT.device, lengths_B11)
    angles = (positions_BT.float()[:, :, None] * frequencies)[:, :, None]
    scale = attention_factor(config)
    cos, sin = angles.cos() * scale, angles.sin() * scale
    return Rotary(torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1))


def rotary_frequencies(
    config: ModelConfig, device: torch.device, length: Tensor | None = None
) -> Tensor:
    """Radians per position for each of the H/2 pairs, in fp32. `length` is the number of tokens of
    each sequence, of any shape ending in 1 (None: the trained length)."""
    return _FREQUENCIES[config.rope_type](config, config.rope_scaling or {}, device, length)


def attention_factor(config: ModelConfig) -> float:
    """The factor of cosines and sines, which keeps attention sharp in long contexts (yarn,
    longrope; else 1)."""
    scaling = config.rope_scaling or {}
    if config.rope_type not in ("yarn", "longrope"):
        return 1.0
    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])
    factor = _context_factor(config, scaling)
    if config.rope_type == "longrope":
        return (
            math.sqrt(1 + math.log(factor) / math.log(_trained_length(config)))
            if factor > 1
            else 1.0
        )
    mscale, mscale_all_dim = scaling.get("mscale"), scaling.get("mscale_all_dim")
    if mscale and mscale_all_dim:
        return _yarn_mscale(factor, mscale) / _yarn_mscale(factor, mscale_all_dim)
    return _yarn_mscale(factor, 1.0)


def is_dynamic(config: ModelConfig) -> bool:
    """Whether angles depend on the length of the sequence."""
    return config.rope_type in ("dynamic", "longrope")


def rotary_change_length(config: ModelConfig) -> int | None:
    """The length of a sequence beyond which its angles change; None if they never do."""
    if not is_dynamic(config):
        return None
    return (
        config.max_position_embeddings if config.rope_type == "dynamic" else _trained_length(config)
    )


def check_rope(config: ModelConfig) -> None:
    """Raise `SettingError` for an unknown type, or for missing or impossible settings."""
    rope_type, scaling = config.rope_type, config.rope_scaling or {}
    if rope_type not in _FREQUENCIES:
        raise SettingError(
            f"rope_scaling type {rope_type!r} is unknown: use one of {', '.join(_FREQUENCIES)}"
        )
    missing = [name for name in _REQUIRED.get(rope_type, ()) if scaling.get(name) is None]
    if missing:
        raise SettingError(f"rope_scaling type {rope_type!r} needs {', '.join(missing)}")
    if scaling.get("factor") is not None and scaling["factor"] <= 0:
        raise SettingError(f"factor={scaling['factor']} of rope_scaling must be above 0")
    rotated_share = scaling.get("partial_rotary_factor", 1.0)
    if rotated_share != 1.0 and rope_type not in ("default", "proportional"):
        raise SettingError(
            f"partial_rotary_factor={rotated_share} with rope_scaling type {rope_type!r} is not "
            "supported: Chameleon rotates whole heads; use rope_type 'proportional'"
        )
    if rope_type == "dynamic" and config.head_dim < 4:
        raise SettingError("rope_scaling type 'dynamic' needs heads of at least 4 entries")
    for name in ("short_factor", "long_factor") if rope_type == "longrope" else ():
        if len(scaling[name]) != config.head_dim // 2:
            raise SettingError(
                f"{name} has {len(scaling[name])} entries: longrope needs one for each of the "
                f"{config.head_dim // 2} pairs of a head"
            )


Frequencies = Callable[[ModelConfig, dict[str, Any], torch.device, Tensor | None], Tensor]


def _default(
    config: ModelConfig, scaling: dict[str, Any], device: torch.device, length: Tensor | None
) -> Tensor:
    return torch.reciprocal(torch.pow(config.rope_theta, _exponents(config, device)))


def _linear(
    config: ModelConfig, scaling: dict[str, Any], device: torch.device, length: Tensor | None
) -> Tensor:
    return _default(config, scaling, device, length) / float(scaling["factor"])


def _proportional(
    config: ModelConfig, scaling: dict[str, Any], device: torch.device, length: Tensor | None
) -> Tensor:
    rotated = int(scaling.get("partial_rotary_factor", 1.0) * config.head_dim // 2)
    frequencies = _default(config, scaling, device, length) / float(scaling.get("factor") or 1.0)
    pairs = torch.arange(config.head_dim // 2, device=device)
    return torch.where(pairs < rotated, frequencies, 0.0)


def _dynamic(
    config: ModelConfig, scaling: dict[str, Any], device: torch.device, length: Tensor | None
) -> Tensor:
    frequencies = _default(config, scaling, device, length)
    if length is None:
        return frequencies
    trained, factor, width = config.max_position_embeddings, scaling["factor"], config.head_dim
    stretch = factor * length.clamp(min=trained) / trained - (factor - 1)
    base = config.rope_theta * stretch ** (width / (width - 2))
    return torch.where(length > trained, 1.0 / base ** _exponents(config, device), frequencies)


def _llama3(
    config: ModelConfig, scaling: dict[str, Any], device: torch.device, length: Tensor | None
) -> Tensor:
    """Low frequencies are divided by `factor`, high ones stay, those between are interpolated."""
    frequencies = _default(config, scaling, device, length)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = frequencies * (_trained_length(config) / (2 * math.pi))  # within the trained length
    unchanged = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return frequencies * (unchanged + (1.0 - unchanged) / scaling["factor"])


def _yarn(
    config: ModelConfig, scaling: dict[str, Any], device: torch.device, length: Tensor | None
) -> Tensor:
    """Like llama3, but interpolated linearly over the index of the pair, between the pairs that
    make `beta_fast` and `beta_slow` turns within the trained length."""
    frequencies = _default(config, scaling, device, length)
    first = _pair_with_turns(config, scaling.get("beta_fast") or 32)
    last = _pair_with_turns(config, scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, config.head_dim - 1)
    last += 0.001 if first == last else 0.0  # no division by zero
    pairs = torch.arange(config.head_dim // 2, dtype=torch.float32, device=device)
    divided = ((pairs - first) / (last - first)).clamp(0.0, 1.0)  # share of the divided frequency
    return frequencies / _context_factor(config, scaling) * divided + frequencies * (1.0 - divided)


def _longrope(
    config: ModelConfig, scaling: dict[str, Any], device: torch.device, length: Tensor | None
) -> Tensor:
    wavelengths = torch.pow(config.rope_theta, _exponents(config, device))
    short, long = (
        1.0 / (torch.tensor(scaling[name], dtype=torch.float32, device=device) * wavelengths)
        for name in ("short_factor", "long_factor")
    )
    return short if length is None else torch.where(length > _trained_length(config), long, short)


_FREQUENCIES: dict[str, Frequencies] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "longrope": _longrope,
    "llama3": _llama3,
    "proportional": _proportional,
}
_REQUIRED = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": (),
    "longrope": ("short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}


def _exponents(config: ModelConfig, device: torch.device) -> Tensor:
    width = config.head_dim
    return torch.arange(0, width, 2, dtype=torch.float32, device=device) / width


def _trained_length(config: ModelConfig) -> int:
    scaling = config.rope_scaling or {}
    return scaling.get("original_max_position_embeddings") or config.max_position_embeddings


def _context_factor(config: ModelConfig, scaling: dict[str, Any]) -> float:
    """How many times longer than the trained context the model's context is."""
    factor = scaling.get("factor")
    if factor is not None:
        return float(factor)
    return config.max_position_embeddings / _trained_length(config)


def _pair_with_turns(config: ModelConfig, turns: float) -> float:
    """The index, as a float, of the pair that makes `turns` turns within the trained length."""
    wavelengths = math.log(_trained_length(config) / (turns * 2 * math.pi))
    return config.head_dim * wavelengths / (2 * math.log(config.rope_theta))


def _yarn_mscale(factor: float, scale: float) -> float:
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0
