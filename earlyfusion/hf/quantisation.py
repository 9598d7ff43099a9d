"""Quantised weights: how much memory they take, and files and merges that equal the model.

On a CPU with AVX512-BF16, bitsandbytes (0.50) repacks a 4-bit weight at the first forward that
needs no gradient, and rounds its scales. That is fast, but what reads the weight afterwards gets
other values: a saved file, a merged adapter, and a training step, whose gradient stops there. So a
weight keeps its scales as they were, is put back before its state dict is read, and is not
repacked while an adapter stands on it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

# What the repacked layout can hold: rows in blocks of 32, whole blocks of scales in a row.
_ROWS = 32


def footprint(model: nn.Module, buffers: bool = True) -> int:
    """Bytes of all parameters as they lie in memory, scales included; of buffers too."""
    tensors = [*model.parameters(), *(model.buffers() if buffers else ())]
    scales = [scale for module in model.modules() for scale in _scales(module)]
    return sum(_bytes(tensor) for tensor in tensors + scales)


def choose_layout(model: nn.Module) -> None:
    """Before a forward on a CPU: which 4-bit weights it may repack; keeps the scales of those."""
    modules = list(model.modules())
    adapted = {id(m.base_layer) for m in modules if hasattr(m, "base_layer")}
    for module in modules:
        state = _state(module)
        if state is None or not hasattr(module, "support_avx512bf16_for_cpu"):
            continue
        memory = module.__dict__
        able = memory.setdefault("_able_to_repack", module.support_avx512bf16_for_cpu)
        free = id(module) not in adapted and _fits(state)
        if not free:
            _put_back(module)
        elif not _repacked(state):
            memory["_scales_as_loaded"] = copy.copy(state)
        memory["support_avx512bf16_for_cpu"] = bool(able and free)


def restore_layout(model: nn.Module, *args: Any, **kwargs: Any) -> None:
    """Put every repacked weight back as it was; takes what hooks of state dicts are passed."""
    for module in model.modules():
        _put_back(module)


def _put_back(module: nn.Module) -> None:
    state: Any = _state(module)
    if state is None or not _repacked(state):
        return
    module.state_dict()  # bitsandbytes' own way back, whose scales are rounded, or in wrong order
    kept = module.__dict__.pop("_scales_as_loaded", None)
    if kept is not None:
        weight: Any = module.weight
        weight.quant_state = module.quant_state = kept


def _state(module: nn.Module) -> Any:
    return getattr(module._parameters.get("weight"), "quant_state", None)


def _repacked(state: Any) -> bool:
    return bool(getattr(state, "packing_format_for_cpu", False))


def _fits(state: Any) -> bool:
    rows, columns = state.shape
    return rows % _ROWS == 0 and columns % state.blocksize == 0


def _scales(module: nn.Module) -> Iterator[Tensor]:
    """What stands beside a quantised weight of bitsandbytes: 4-bit's states, 8-bit's row scales."""
    state, weight = _state(module), module._parameters.get("weight")
    if state is not None:
        kept = module.__dict__.get("_scales_as_loaded") if _repacked(state) else None
        for one in filter(None, (state, kept)):
            yield from (part for part in one.as_dict().values() if isinstance(part, Tensor))
    rows = getattr(weight, "SCB", None)
    rows = getattr(getattr(module, "state", None), "SCB", None) if rows is None else rows
    if isinstance(rows, Tensor):
        yield rows


def _bytes(tensor: Tensor) -> int:
    parts = getattr(tensor, "__tensor_flatten__", None)
    if parts is not None:
        return sum(_bytes(getattr(tensor, name)) for name in parts()[0])
    return tensor.nelement() * tensor.element_size()
