"""A step of the transformer on a CPU in compiled code: `cpu_step.cpp`.

The cost of a step of few rows is reading the weights. The compiled step reads them once for all
rows, in fp32, bf16, int8 (one scale per row) or int4 (one bf16 scale per 32 columns), and spends no
time between operations. It also computes prompts, so that a token's result is the same to the bit
however its prompt is chunked and whatever else is in the step. `native.py` builds it; `available()`
is False without a C++ compiler, or with EARLYFUSION_NATIVE=0.
"""

# Shapes: R rows of a step, D model width, O rows and I columns of a matrix, B blocks of the cache,
# L layers, K key and value heads, S tokens of a block, H head width.

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
_CACHE_FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}  # `Format` in operands.h


class Choice(NamedTuple):
    """What one token is sampled from; pointers are addresses of rows of `columns` entries. The
    first three are guidance's fp32 logits, all the same row without guidance. `blocked` (may not be
    sampled) and `seen` (gets the penalty) are bools, or None. `text` and `image` are the scales of
    guidance."""

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
    return _library() is not None


class CpuStep:
    """The transformer's layers as one call; a row is one new token, of any sequence and position.

    Reads the model's weights in place if they have `bits` already, else a packed copy. The caller
    owns the cache: keys and values as [B, L, 2, K, S, H] in fp32, bf16 or int8, and for int8 the
    `scales` as [B, L, 2, K, S] in fp32. Sequences have at most `length` tokens. Raises ValueError
    for models and caches that `fits` refuses.
    """

    def __init__(
        self,
        transformer: Transformer,
        cache_BL2KSH: Tensor,
        length: int,
        bits: int,
        scales_BL2KS: Tensor | None = None,
    ) -> None:
        has_scales = scales_BL2KS is not None
        if not fits(transformer, cache_BL2KSH) or (cache_BL2KSH.dtype == torch.int8) != has_scales:
            raise ValueError(
                "the compiled step needs SiLU, no biases, and a cache in fp32, bf16 or scaled int8"
            )
        library = _library()
        if library is None:
            raise ValueError("the compiled step needs a C++ compiler: install g++")
        self._library = library
        self._embedding = transformer.model.embed_tokens.weight
        # Compiled code only has addresses, so everything that it reads is kept alive here.
        self._held: list[object] = [cache_BL2KSH, scales_BL2KS]
        self._layers = self._layer_structures(transformer, bits)
        self._model = self._model_structure(transformer, cache_BL2KSH, length)
        self._model.kv_scales = None if scales_BL2KS is None else scales_BL2KS.data_ptr()
        self.bits = bits
        self.runs_on_amx: bool = library.earlyfusion_runs_on_amx()

    def states(
        self, tokens_R: Tensor, positions_R: Tensor, tables: Sequence[int], shared: bool
    ) -> Tensor:
        """The head's input [R, D] in fp32, after storing keys and values of each token. `tables`
        are the addresses of each row's block numbers, int64 like tokens and positions. With
        `shared` some rows are of one sequence, at consecutive positions; rows of other sequences
        must not store into the same block."""
        x_RD = self._embedding[tokens_R].float()
        # C++ gets a bare address and would read any other strides as garbage.
        positions_R = positions_R.contiguous()
        self._library.earlyfusion_step(
            ctypes.byref(self._model),
            len(x_RD),
            x_RD.data_ptr(),
            (ctypes.c_void_p * len(tables))(*tables),
            positions_R.data_ptr(),
            shared,
            torch.get_num_threads(),
        )
        return x_RD

    def product(self, weight_OI: Tensor) -> Callable[[Tensor], Tensor]:
        """x [R, I] -> x W^T [R, O] in fp32, with the weight quantised to the step's bits."""
        packed = pack(weight_OI, self.bits)
        # The closure below keeps `packed` alive, into which `matrix` points.
        matrix, gemm = _matrix(packed), self._library.earlyfusion_gemm

        def product(x_RI: Tensor) -> Tensor:
            x_RI = x_RI.float().contiguous()
            rows, columns = x_RI.shape
            y_RO = x_RI.new_empty(rows, packed.data.shape[0])
            gemm(
                ctypes.byref(matrix),
                rows,
                x_RI.data_ptr(),
                columns,
                y_RO.data_ptr(),
                torch.get_num_threads(),
            )
            return y_RO[:, : packed.rows]  # rows are padded to a multiple of 4

        return product

    def sample(self, choices: Sequence[Choice]) -> list[int]:
        """The column sampled for each choice: guidance, mask, penalty, then `warp` and `pick`. At
        temperature 0, the largest. -1 if the logits are not finite."""
        columns = (ctypes.c_int64 * len(choices))()
        rows = (_Choice * len(choices))(*(_Choice(*choice) for choice in choices))
        self._library.earlyfusion_sample(rows, len(choices), columns, torch.get_num_threads())
        return list(columns)

    def _layer_structures(self, transformer: Transformer, bits: int) -> ctypes.Array[_Layer]:
        layers = (_Layer * transformer.config.num_hidden_layers)()
        for layer, block in zip(layers, transformer.model.layers, strict=True):
            assert isinstance(block, Block)
            layer.attention_norm = self._vector(block.input_layernorm.weight)
            layer.feed_forward_norm = self._vector(block.post_attention_layernorm.weight)
            for name, linear in _projections(block):
                packed = packed_weight(linear, bits)
                self._held.append(packed)
                setattr(layer, name, _matrix(packed))
            for name in ("q", "k"):
                norm = getattr(block.self_attn, f"{name}_norm")
                setattr(layer, f"{name}_weight", self._vector(norm.weight))
                setattr(layer, f"{name}_bias", self._vector(norm.bias))
        return layers

    def _model_structure(self, transformer: Transformer, cache: Tensor, length: int) -> _Model:
        assert cache.is_contiguous()
        config = transformer.config
        rotary, half = rotary_tables(config, torch.arange(length)[None]), config.head_dim // 2
        # The halves of a table are equal except for the sign of the sine: take the positive one.
        cos, sin = rotary.cos[0, :, 0, :half], rotary.sin[0, :, 0, half:]
        return _Model(
            layer_count=config.num_hidden_layers,
            D=config.hidden_size,
            N=config.num_attention_heads,
            K=config.kv_heads,
            H=config.head_dim,
            F=config.intermediate_size,
            norm_after=int(config.swin_norm),
            cache_format=_CACHE_FORMATS[cache.dtype],
            block_size=cache.shape[4],
            eps=config.rms_norm_eps,
            layers=ctypes.cast(self._layers, ctypes.c_void_p),
            final_norm=self._vector(transformer.model.norm.weight),
            cos=self._vector(cos),
            sin=self._vector(sin),
            kv=cache.data_ptr(),
        )

    def _vector(self, values: Tensor) -> int:
        """The address of an fp32 copy, which is kept alive."""
        copy = values.detach().float().contiguous().clone()
        self._held.append(copy)
        return copy.data_ptr()


def weight_bits(transformer: Transformer) -> int | None:
    """The bits per weight of the model's matrices; None if the step cannot read them in place."""
    packed = [m.bits for m in _linears(transformer) if isinstance(m, PackedLinear)]
    dense = {torch.float32: 32, torch.bfloat16: 16}
    return packed[0] if packed else dense.get(transformer.lm_head.weight.dtype)


def fits(transformer: Transformer, cache_BL2KSH: Tensor) -> bool:
    """Whether the step can run a model on this cache: on a CPU, with SiLU and without biases; the
    numbers of rows of its matrices are multiples of 4; the cache is in fp32, bf16 or int8, in
    blocks of a multiple of 16 tokens."""
    config, linears = transformer.config, list(_linears(transformer))
    on_cpu = transformer.lm_head.weight.device.type == "cpu"
    plain = all(original_class(m) in _LINEARS and m.bias is None for m in linears)
    heads = (config.num_attention_heads, config.kv_heads)
    sizes = (*(n * config.head_dim for n in heads), config.intermediate_size)
    in_fours = all(size % 4 == 0 for size in sizes)
    silu = config.hidden_act in ("silu", "swish")
    readable = cache_BL2KSH.dtype in _CACHE_FORMATS and cache_BL2KSH.shape[4] % 16 == 0
    return on_cpu and plain and silu and in_fours and readable


def _linears(transformer: Transformer) -> Iterator[nn.Module]:
    for block in transformer.model.layers:
        assert isinstance(block, Block)
        yield from (linear for _, linear in _projections(block))


def _projections(block: Block) -> Iterator[tuple[str, nn.Module]]:
    """Names and modules of a block's seven linear layers."""
    for parent in (block.self_attn, block.mlp):
        yield from (pair for pair in parent.named_children() if pair[0].endswith("_proj"))


# ---- the structures of cpu_step.cpp and its headers: same names, same order

_POINTER, _NUMBER, _DOUBLE = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double


def _fields(names: str, c_type: type[Any]) -> list[tuple[str, type[Any]]]:
    return [(name, c_type) for name in names.split()]


class _Matrix(ctypes.Structure):
    _fields_ = (*_fields("data scales", _POINTER), *_fields("rows stride format", _NUMBER))


class _Layer(ctypes.Structure):
    _fields_ = (
        *_fields("q_proj k_proj v_proj o_proj gate_proj up_proj down_proj", _Matrix),
        *_fields("attention_norm feed_forward_norm", _POINTER),
        *_fields("q_weight q_bias k_weight k_bias", _POINTER),
    )


class _Model(ctypes.Structure):
    _fields_ = (
        *_fields("layer_count D N K H F norm_after cache_format block_size", _NUMBER),
        ("eps", ctypes.c_float),
        *_fields("layers final_norm cos sin kv kv_scales", _POINTER),
    )


class _Choice(ctypes.Structure):
    _fields_ = (
        *_fields("full image_only unconditional blocked seen", _POINTER),
        *_fields("columns top_k", _NUMBER),
        *_fields("text image temperature top_p min_p penalty uniform", _DOUBLE),
    )


def _matrix(packed: PackedMatrix) -> _Matrix:
    """Points into the packed matrix, which the caller must keep alive."""
    return _Matrix(
        data=packed.data.data_ptr(),
        scales=None if packed.scales is None else packed.scales.data_ptr(),
        rows=len(packed.data),
        stride=-(-packed.columns // 64) * 64,
        format=BITS.index(packed.bits),  # `Format` in operands.h has the same order
    )


@cache
def _library() -> ctypes.CDLL | None:
    library = native.load(Path(__file__).with_name("cpu_step.cpp"))
    if library is None:
        return None
    p, n = _POINTER, _NUMBER
    library.earlyfusion_step.argtypes = [p, n, p, p, p, n, n]
    library.earlyfusion_step.restype = None
    library.earlyfusion_gemm.argtypes = [p, n, p, n, p, n]
    library.earlyfusion_gemm.restype = None
    library.earlyfusion_sample.argtypes = [p, n, p, n]
    library.earlyfusion_sample.restype = None
    library.earlyfusion_runs_on_amx.argtypes = []
    library.earlyfusion_runs_on_amx.restype = ctypes.c_bool
    library.earlyfusion_abi.argtypes = []
    library.earlyfusion_abi.restype = ctypes.POINTER(_NUMBER)
    sizes = [ctypes.sizeof(structure) for structure in (_Matrix, _Layer, _Model, _Choice)]
    assert library.earlyfusion_abi()[: len(sizes)] == sizes, "structures differ from cpu_step.cpp"
    return library
