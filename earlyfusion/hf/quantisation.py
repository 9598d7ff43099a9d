"""Quantised weights: the memory that they take, and files and merges that equal the model.

On a CPU with AVX512-BF16, bitsandbytes (0.50) repacks a 4-bit weight at the first forward without
gradients, and rounds its scales. That is fast, but saved files, merged adapters and training steps
then read other values, and gradients do not pass. Here a weight's scales are remembered, it is
restored before its state dict is read, and it is not repacked while it has an adapter.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

# The repacked layout needs rows in blocks of 32 and a whole number of scales per row.
_ROWS = 32


def footprint(model: nn.Module, buffers: bool = True) -> int:
    """Bytes in memory of all parameters with their scales, and of buffers."""
    tensors = [*model.parameters(), *(model.buffers() if buffers else ())]
    scales = [scale for module in model.modules() for scale in _scales(module)]
    return sum(_bytes(tensor) for tensor in tensors + scales)


def choose_layout(model: nn.Module) -> None:
    """Before a forward on a CPU: mark 4-bit weights that may be repacked, remember their scales."""
    modules = list(model.modules())
    adapted = {id(m.base_layer) for m in modules if hasattr(m, "base_layer")}
    for module in modules:
        state = _state(module)
        if state is None or not hasattr(module, "support_avx512bf16_for_cpu"):
            continue
        attributes = module.__dict__
        can_repack = attributes.setdefault("_able_to_repack", module.support_avx512bf16_for_cpu)
        may_repack = id(module) not in adapted and _can_be_repacked(state)
        if not may_repack:
            _restore(module)
        elif not _repacked(state):
            attributes["_scales_as_loaded"] = copy.copy(state)
        attributes["support_avx512bf16_for_cpu"] = bool(can_repack and may_repack)


def restore_layout(model: nn.Module, *args: Any, **kwargs: Any) -> None:
    """Restore every repacked weight. The further arguments are those of hooks."""
    for module in model.modules():
        _restore(module)


def _restore(module: nn.Module) -> None:
    state: Any = _state(module)
    if state is None or not _repacked(state):
        return
    module.state_dict()  # bitsandbytes restores it, but leaves scales rounded or in wrong order
    original = module.__dict__.pop("_scales_as_loaded", None)
    if original is not None:
        weight: Any = module.weight
        weight.quant_state = module.quant_state = original


def _state(module: nn.Module) -> Any:
    return getattr(module._parameters.get("weight"), "quant_state", None)


def _repacked(state: Any) -> bool:
    return bool(getattr(state, "packing_format_for_cpu", False))


def _can_be_repacked(state: Any) -> bool:
    rows, columns = state.shape
    return rows % _ROWS == 0 and columns % state.blocksize == 0


def _scales(module: nn.Module) -> Iterator[Tensor]:
    """The scales of a bitsandbytes weight: the states of 4-bit, the row scales of 8-bit."""
    state, weight = _state(module), module._parameters.get("weight")
    if state is not None:
        original = module.__dict__.get("_scales_as_loaded") if _repacked(state) else None
        for quant_state in filter(None, (state, original)):
            yield from (
                value for value in quant_state.as_dict().values() if isinstance(value, Tensor)
            )
    rows = getattr(weight, "SCB", None)
    rows = getattr(getattr(module, "state", None), "SCB", None) if rows is None else rows
    if isinstance(rows, Tensor):
        yield rows


def _bytes(tensor: Tensor) -> int:
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is not None:  # torchao's weights consist of several tensors
        return sum(_bytes(getattr(tensor, name)) for name in flatten()[0])
    return tensor.nelement() * tensor.element_size()
