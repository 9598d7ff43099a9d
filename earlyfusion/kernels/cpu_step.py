"""A step on a CPU in compiled code: `cpu_step.cpp`, built on first use by a C++ compiler.

Reading the weights is what a step of few rows costs. The compiled step reads them once for all
rows, in fp32, bf16, int8 (one scale a row) or int4 (one bf16 scale for 32 columns), and spends no
time between operations. Prompts are read by it too: what a token comes to is then the same to the
bit however a prompt is cut and whatever stands beside it. `available()` is False without a C++
compiler, or with EARLYFUSION_NATIVE=0.

Shapes: R rows of a step, D model width, O rows and I columns of a matrix, S slots, K key and value
heads, P places of a slot, H head width.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from earlyfusion.kernels import native
from earlyfusion.kernels.twins import original_class
from earlyfusion.model.quantise import BITS, PackedLinear, PackedMatrix, pack, packed_weight
from earlyfusion.model.rotary import rotary_tables
from earlyfusion.model.transformer import Block, Transformer

_LINEARS = (nn.Linear, PackedLinear)
_CACHE_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}


class Choice(NamedTuple):
    """What one token is drawn from; pointers are addresses of rows of `columns` entries.

    The first three are guidance's logits in fp32, all the same without it; `blocked` and `seen` are
    bools, or None.
    """

    full: int
    image_only: int
    unconditional: int
    blocked: int | None
    seen: int | None
    columns: int
    top_k: int
    text: float
    image: float
    temperature: float
    top_p: float
    min_p: float
    penalty: float
    uniform: float


def available() -> bool:
    """Whether the compiled step can be had here."""
    return _library() is not None


class CpuStep:
    """The transformer's layers as one call; a row is one new token, of any slot and place.

    Reads the model's own weights where they are in `bits` already, else a packed copy. The cache is
    the caller's: keys and values of a layer as [2, S, K, P, H] in fp32, bf16 or int8, and for int8
    the `scales` of a layer as [2, S, K, P] in fp32. Raises ValueError for what `fits` refuses.
    """

    def __init__(
        self,
        transformer: Transformer,
        cache: Sequence[Tensor],
        bits: int,
        scales: Sequence[Tensor] = (),
    ) -> None:
        if not fits(transformer, cache) or (cache[0].dtype == torch.int8) != bool(scales):
            raise ValueError("the compiled step takes silu, no biases, and no cache in this dtype")
        library = _library()
        if library is None:
            raise ValueError("the compiled step needs a C++ compiler: install g++")
        self._library = library
        self._embedding = transformer.model.embed_tokens.weight
        self._kept: list[Any] = [*cache, *scales]
        self._model = self._describe(transformer, cache, bits)
        for here, scales_2SKP in zip(self._layers, scales, strict=bool(scales)):
            here.k_scales, here.v_scales = (scale.data_ptr() for scale in scales_2SKP)
        self.bits = bits

    def states(self, tokens_R: Tensor, slots_R: Tensor, lengths_R: Tensor) -> Tensor:
        """States [R, D] in fp32 that the head reads, after storing each token in its slot.

        `lengths_R` counts the tokens before each in its slot, those of this call too: rows of one
        slot stand at places that follow each other. All three are int64 on the CPU.
        """
        x_RD = self._embedding[tokens_R].float()
        slots_R, lengths_R = slots_R.contiguous(), lengths_R.contiguous()
        self._library.earlyfusion_step(
            ctypes.byref(self._model),
            len(x_RD),
            x_RD.data_ptr(),
            slots_R.data_ptr(),
            lengths_R.data_ptr(),
            torch.get_num_threads(),
        )
        return x_RD

    def product(self, weight_OI: Tensor) -> Callable[[Tensor], Tensor]:
        """x [R, I] -> x W^T [R, O], in fp32, with the weight in the bits of the step."""
        packed = pack(weight_OI, self.bits)
        matrix, multiply = _matrix(packed), self._library.earlyfusion_multiply

        def product(x_RI: Tensor) -> Tensor:
            x_RI = x_RI.float().contiguous()
            y_RO = torch.empty(len(x_RI), len(packed.data))
            threads = torch.get_num_threads()
            size = len(x_RI), x_RI.data_ptr(), x_RI.shape[1]
            multiply(ctypes.byref(matrix), *size, y_RO.data_ptr(), threads)
            return y_RO[:, : packed.rows]

        return product

    def draw(self, choices: Sequence[Choice]) -> list[int]:
        """The column drawn for each: mix, mask, penalty, then `warp` and `pick`.

        Where the temperature is 0, the largest; -1 where the logits are not finite.
        """
        drawn = (ctypes.c_int64 * len(choices))()
        rows = (_Choice * len(choices))(*(_Choice(*choice) for choice in choices))
        self._library.earlyfusion_draw(rows, len(choices), drawn, torch.get_num_threads())
        return list(drawn)

    def _describe(self, transformer: Transformer, cache: Sequence[Tensor], bits: int) -> _Model:
        config, places = transformer.config, cache[0].shape[3]
        layers = self._layers = (_Layer * config.num_hidden_layers)()
        for here, block, kv_2SKPH in zip(layers, transformer.model.layers, cache, strict=True):
            assert isinstance(block, Block) and kv_2SKPH.is_contiguous()
            here.k, here.v = kv_2SKPH[0].data_ptr(), kv_2SKPH[1].data_ptr()
            attention, mlp = block.self_attn, block.mlp
            for part, names in ((attention, "qkvo"), (mlp, ("gate", "up", "down"))):
                for name in names:
                    packed = packed_weight(getattr(part, f"{name}_proj"), bits)
                    self._kept.append(packed)
                    setattr(here, f"{name}_proj", _matrix(packed))
            here.norm_1 = self._vector(block.input_layernorm.weight)
            here.norm_2 = self._vector(block.post_attention_layernorm.weight)
            for name in ("q", "k"):
                norm = getattr(attention, f"{name}_norm")
                setattr(here, f"{name}_weight", self._vector(norm.weight))
                setattr(here, f"{name}_bias", self._vector(norm.bias))
        positions = torch.arange(places)[None]
        half = config.head_dim // 2
        rotary = rotary_tables(config, positions)
        cos, sin = rotary.cos[0, :, 0, :half], rotary.sin[0, :, 0, half:]
        return _Model(
            config.num_hidden_layers,
            config.hidden_size,
            config.num_attention_heads,
            config.kv_heads,
            config.head_dim,
            config.intermediate_size,
            int(config.swin_norm),
            _CACHE_KINDS[cache[0].dtype],
            places,
            config.rms_norm_eps,
            ctypes.cast(layers, ctypes.c_void_p),
            self._vector(transformer.model.norm.weight),
            self._vector(cos),
            self._vector(sin),
        )

    def _vector(self, values: Tensor) -> int:
        kept = values.detach().float().contiguous().clone()
        self._kept.append(kept)
        return kept.data_ptr()


def own_bits(transformer: Transformer) -> int | None:
    """Bits that the model's matrices have already; None where the step has no form for them."""
    packed = [m.bits for m in _linears(transformer) if isinstance(m, PackedLinear)]
    plain = {torch.float32: 32, torch.bfloat16: 16}
    return packed[0] if packed else plain.get(transformer.lm_head.weight.dtype)


def fits(transformer: Transformer, cache: Sequence[Tensor]) -> bool:
    """Whether the compiled step can run a model on this cache: silu, no biases, rows in fours."""
    config, linears = transformer.config, list(_linears(transformer))
    on_cpu = transformer.lm_head.weight.device.type == "cpu"
    plain = all(original_class(m) in _LINEARS and m.bias is None for m in linears)
    heads = (config.num_attention_heads, config.kv_heads)
    in_fours = (
        all(n * config.head_dim % 4 == 0 for n in heads) and config.intermediate_size % 4 == 0
    )
    silu = config.hidden_act in ("silu", "swish")
    return on_cpu and plain and silu and in_fours and cache[0].dtype in _CACHE_KINDS


def _linears(transformer: Transformer) -> Iterator[nn.Module]:
    for block in transformer.model.layers:
        assert isinstance(block, Block)
        for part in (block.self_attn, block.mlp):
            yield from (m for name, m in part.named_children() if name.endswith("_proj"))


# ---- the structures of cpu_step.cpp


class _Matrix(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("stride", ctypes.c_int64),
        ("kind", ctypes.c_int64),
    )


class _Layer(ctypes.Structure):
    _fields_ = (
        *((f"{name}_proj", _Matrix) for name in ("q", "k", "v", "o", "gate", "up", "down")),
        *((name, ctypes.c_void_p) for name in ("norm_1", "norm_2")),
        *((name, ctypes.c_void_p) for name in ("q_weight", "q_bias", "k_weight", "k_bias")),
        *((name, ctypes.c_void_p) for name in ("k", "v", "k_scales", "v_scales")),
    )


class _Choice(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in Choice._fields[:5]),
        *((name, ctypes.c_int64) for name in Choice._fields[5:7]),
        *((name, ctypes.c_double) for name in Choice._fields[7:]),
    )


class _Model(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("layers", "D", "N", "K", "H", "F")),
        *((name, ctypes.c_int64) for name in ("norm_after", "cache_kind", "places")),
        ("eps", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("layer", "final_norm", "cos", "sin")),
    )


def _matrix(packed: PackedMatrix) -> _Matrix:
    """Points into the packed matrix, which the caller keeps."""
    stride = -(-packed.columns // 64) * 64
    scales = None if packed.scales is None else packed.scales.data_ptr()
    kind = BITS.index(packed.bits)
    return _Matrix(packed.data.data_ptr(), scales, len(packed.data), stride, kind)


@cache
def _library() -> ctypes.CDLL | None:
    library = native.load(Path(__file__).with_name("cpu_step.cpp"))
    if library is None:
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    library.earlyfusion_step.argtypes = [
        pointer, number, pointer, pointer, pointer, number,
    ]  # fmt: skip
    library.earlyfusion_step.restype = None
    library.earlyfusion_multiply.argtypes = [pointer, number, pointer, number, pointer, number]
    library.earlyfusion_multiply.restype = None
    library.earlyfusion_draw.argtypes = [pointer, number, pointer, number]
    library.earlyfusion_draw.restype = None
    return library
