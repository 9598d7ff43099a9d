"""One model on several processes: each holds its part of every layer, the first decides.

    torchrun --nproc-per-node 2 -m earlyfusion generate "Draw a red apple." --model chameleon-34b

A part is an ordinary `Transformer` of fewer heads and a narrower feed-forward (`PartConfig`), whose
two outputs a block are summed over all parts; so everything that reads a config or a module (cache,
network, rounding to fewer bits) serves a part as it is. Queries are cut by heads, with their norms;
keys and values too, and where there are fewer of them than processes, several hold the same ones.

Embedding and head are whole, in the first process only. It runs the scheduler, embeds the tokens
and hands their states to all, and draws from its own logits; the others know where tokens stand,
never which they are, so that nothing they do can differ from what it decided. It reads more for
that than a cut head would: of the bytes of a step with one row 0.5% in a picture, whose codes are
an eighth of the rows, and 4% in text (7B on two, 34B on four; 1% and 10% for 34B on eight). A cut
head would have the logits gathered in each step, and an error in the draw would reach all.

Shapes: T tokens of a step, D model width, N query heads, K key and value heads, H head width.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import NoReturn, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from earlyfusion import processes
from earlyfusion.checkpoints.assemble import checked
from earlyfusion.checkpoints.source import Source
from earlyfusion.config import ModelConfig
from earlyfusion.engine.backends.torch import Network, is_plain
from earlyfusion.engine.cache import DTYPES, Cache, cache_dtype
from earlyfusion.engine.peers import Peers
from earlyfusion.engine.runner import Ask, ModelRunner, Step
from earlyfusion.engine.scheduler import Branch, Copy, Piece, Plan
from earlyfusion.errors import SettingError
from earlyfusion.generation.grammar import Grammar
from earlyfusion.model.transformer import Block, Transformer

_OPEN, _READ = range(2)  # what the leader tells
_CACHES = (None, *DTYPES)


@dataclass(frozen=True)
class PartConfig(ModelConfig):
    """The shape of one part; heads are as wide as those of the whole."""

    head_width: int = 0
    part: int = 0
    parts: int = 1

    @property
    def head_dim(self) -> int:
        return self.head_width

    @property
    def leads(self) -> bool:
        return self.part == 0


def part_config(whole: ModelConfig, part: int, parts: int) -> PartConfig:
    """The shape of part number `part`; `SettingError` where heads cannot be shared evenly."""
    heads, inner = whole.num_attention_heads, whole.intermediate_size
    if heads % parts:
        fitting = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
        raise SettingError(
            f"tensor_parallel={parts} cannot share {heads} attention heads evenly: "
            f"choose one of {fitting}"
        )
    values = {f.name: getattr(whole, f.name) for f in fields(ModelConfig)}
    values |= {
        "vocab_size": whole.vocab_size if part == 0 else 1,
        "num_attention_heads": heads // parts,
        "num_key_value_heads": len(_kv_heads(whole, part, parts)),
        "intermediate_size": _bound(inner, part + 1, parts) - _bound(inner, part, parts),
    }
    return PartConfig(**values, head_width=whole.head_dim, part=part, parts=parts)


def cut(name: str, whole: Tensor, config: ModelConfig, part: int, parts: int) -> Tensor:
    """What one part holds of a parameter of the whole model, in memory of its own.

    `config` is that of the whole. Parts behind the first hold one row of embedding and head.
    """
    owner, _, kind = name.rpartition(".")
    queries, keys = _query_heads(config, part, parts), _kv_heads(config, part, parts)
    match owner.rpartition(".")[2]:
        case "q_norm":
            own = whole[queries]
        case "k_norm":
            own = whole[keys]
        case "q_proj":
            own = whole.unflatten(0, (-1, config.head_dim))[queries].flatten(0, 1)
        case "k_proj" | "v_proj":
            own = whole.unflatten(0, (-1, config.head_dim))[keys].flatten(0, 1)
        case "o_proj" if kind == "weight":
            own = whole.unflatten(1, (-1, config.head_dim))[:, queries].flatten(1)
        case "gate_proj" | "up_proj":
            own = whole[_columns(config, part, parts)]
        case "down_proj" if kind == "weight":
            own = whole[:, _columns(config, part, parts)]
        case "embed_tokens" | "lm_head" if part > 0:
            own = whole[:1]
        case _:
            own = whole
    return own.clone(memory_format=torch.contiguous_format)


def _query_heads(config: ModelConfig, part: int, parts: int) -> list[int]:
    each = config.num_attention_heads // parts
    return list(range(part * each, (part + 1) * each))


def _kv_heads(config: ModelConfig, part: int, parts: int) -> list[int]:
    """What a part's queries read: one head for each run of queries, as long as fits all parts."""
    queries = _query_heads(config, part, parts)
    group = config.num_attention_heads // config.kv_heads
    return [head // group for head in queries[:: math.gcd(len(queries), group)]]


def _columns(config: ModelConfig, part: int, parts: int) -> slice:
    inner = config.intermediate_size
    return slice(_bound(inner, part, parts), _bound(inner, part + 1, parts))


def _bound(size: int, part: int, parts: int) -> int:
    return size * part // parts


def open_part(source: Source, parts: int) -> Source:
    """An open checkpoint of which this process reads its own part; `SettingError` where the model
    or the number of processes do not fit."""
    if parts != processes.count():
        raise SettingError(
            f"tensor_parallel={parts} is not the number of processes, {processes.count()}: "
            "start so many with torchrun --nproc-per-node, or set tensor_parallel to theirs"
        )
    whole, part = source.config, processes.rank()
    config = part_config(whole, part, parts)
    return replace(
        checked(source),
        config=config,
        tensors={
            name: stored.then(partial(_cut_named, name, whole, part, parts))
            for name, stored in source.tensors.items()
        },
        vq=source.vq if part == 0 else {},
        is_shard=True,
    )


def _cut_named(name: str, config: ModelConfig, part: int, parts: int, whole: Tensor) -> Tensor:
    return cut(name, whole, config, part, parts)


# ---- modules of a part


class SharedEmbedding(nn.Embedding):
    """The first process looks tokens up; all have their states, whatever tokens they were given."""

    pointwise = True

    def __init__(self, weight_VD: nn.Parameter, peers: Peers) -> None:
        size, width = weight_VD.shape
        super().__init__(size, width, _weight=weight_VD)
        self.weight, self.peers = weight_VD, peers

    def forward(self, tokens: Tensor) -> Tensor:
        if self.peers.leads:
            return self.peers.share(F.embedding(tokens, self.weight))
        return self.peers.share(self.weight.new_empty(*tokens.shape, self.embedding_dim))


class Summed(nn.Module):
    """A linear module of which each process has some columns: the sum of what all give."""

    pointwise = True

    def __init__(self, linear: nn.Module, peers: Peers) -> None:
        super().__init__()
        self.linear, self.peers = linear, peers

    def forward(self, x: Tensor) -> Tensor:
        return self.peers.add_up(self.linear(x))


def connect(part: Transformer, peers: Peers) -> Transformer:
    """Let a part work with the others, in place; quantise it before, if at all."""
    embedding = part.model.embed_tokens
    assert isinstance(embedding, nn.Embedding)
    part.model.embed_tokens = SharedEmbedding(cast(nn.Parameter, embedding.weight), peers)
    for block in cast("Iterable[Block]", part.model.layers):
        for owner, name in ((block.self_attn, "o_proj"), (block.mlp, "down_proj")):
            linear = getattr(owner, name)
            if peers.rank > 0:
                linear.bias = None  # it is added once
            setattr(owner, name, Summed(linear, peers))
    return part


def peers_of(transformer: Transformer) -> Peers | None:
    """The processes that a model is shared with."""
    embedding = transformer.model.embed_tokens
    return embedding.peers if isinstance(embedding, SharedEmbedding) else None


def split(whole: Transformer, peers: Peers) -> Transformer:
    """This process's part of a model that is in memory, connected with the others."""
    config = part_config(whole.config, peers.rank, peers.count)
    part = Transformer(config).to(whole.lm_head.weight.dtype).eval()
    tensors = {
        name: cut(name, tensor, whole.config, peers.rank, peers.count)
        for name, tensor in whole.state_dict().items()
    }
    part.load_state_dict(tensors, assign=True)
    part.tie_weights()
    return connect(part, peers)


# ---- who leads, and who follows


def share(part: Transformer) -> None:
    """Put the parts of all processes together. Returns in the first, which leads; the others follow
    it until it ends, and end too.

    Raises `SettingError` where a model is shared already.
    """
    if _SHARED:
        raise SettingError(
            "this program shares a model already: start it again for another, "
            "or load that one with tensor_parallel=1"
        )
    device = part.lm_head.weight.device
    if device.type == "cuda":
        torch.cuda.set_device(device)
    _SHARED.append(Peers(device))
    [peers] = _SHARED
    connect(part, peers)
    if not peers.leads:
        _follow_to_the_end(part, peers)


_SHARED: list[Peers] = []


def _follow_to_the_end(part: Transformer, peers: Peers) -> NoReturn:
    try:
        follow(part, peers)
    except ConnectionError as error:
        # On a GPU sums may be under way that never come; nothing may wait for them.
        print(f"process {peers.rank}: {error}", file=sys.stderr, flush=True)
        os._exit(1)
    raise SystemExit(0)


class LeadingRunner(ModelRunner):
    """Tells the other processes what a step reads, before it reads it itself."""

    def __init__(
        self,
        transformer: Transformer,
        grammar: Grammar,
        slots: int,
        length: int,
        kept: str | None = None,
    ) -> None:
        peers = peers_of(transformer)
        assert peers is not None
        if not is_plain(transformer):
            raise SettingError(
                "a model that several processes share takes no hooks and no modules of other "
                "classes: load it with tensor_parallel=1, or take them off"
            )
        self._peers, self._collectives = peers, _collectives(transformer)
        peers.engines += 1
        self._engine = peers.engines
        peers.tell([_OPEN, slots, length, _CACHES.index(kept)], 0)
        super().__init__(transformer, grammar, slots, length, kept)

    def run(self, plan: Plan, asks: Sequence[Ask]) -> list[list[int]]:
        peers = self._peers
        if self._engine != peers.engines:
            raise SettingError(
                "another engine has been made on this shared model since: use that one"
            )
        try:
            peers.tell(_told(plan), self._collectives if plan.pieces else 0)
            return super().run(plan, asks)
        except BaseException:
            if peers.left:
                peers.close()  # the others wait for sums that will not come
            raise


def follow(part: Transformer, peers: Peers) -> None:
    """Do what the leader tells, until it closes; ConnectionError where it has gone."""
    reader: _Reader | None = None
    while message := peers.hear():
        kind, *numbers = message
        if kind == _OPEN:
            reader = None  # its memory goes before the next takes its own
            reader = _Reader(part, peers, *numbers)
            continue
        assert reader is not None
        reader.read(numbers)
    peers.close()


class _Reader:
    """The half of a runner that reads: network and cache."""

    def __init__(self, part: Transformer, peers: Peers, slots: int, length: int, kept: int) -> None:
        weight = part.lm_head.weight
        dtype = cache_dtype(_CACHES[kept], weight.dtype)
        self._peers, self._collectives = peers, _collectives(part)
        self._cache = Cache(part.config, slots, length, dtype, weight.device)
        with torch.no_grad():
            self._network = Network(part, length)

    @torch.inference_mode()
    def read(self, numbers: Sequence[int]) -> None:
        plan = _heard(numbers)
        for copied in plan.copies:
            self._cache.copy(copied)
        if plan.pieces:
            self._peers.begin(self._collectives)
            step = Step(plan.pieces, self._cache)
            self._network.forward(step.tokens_T, step.positions_T, step.attentions())


def _collectives(transformer: Transformer) -> int:
    return 1 + 2 * transformer.config.num_hidden_layers


def _told(plan: Plan) -> list[int]:
    numbers = [_READ, len(plan.copies)]
    for copied in plan.copies:
        numbers += copied
    for piece in plan.pieces:
        if piece.branch.slot is None:
            raise RuntimeError("a piece was planned for a branch without a slot")
        numbers += [piece.branch.slot, piece.start, piece.size, len(piece.drafts)]
    return numbers


def _heard(numbers: Sequence[int]) -> Plan:
    """The plan, but for which tokens it reads."""
    end = 1 + 3 * numbers[0]
    copies = [Copy(*three) for three in _in_groups(numbers[1:end], 3)]
    pieces = [
        Piece(Branch([0] * (start + size), slot), start, size, [0] * drafts)
        for slot, start, size, drafts in _in_groups(numbers[end:], 4)
    ]
    return Plan(copies, pieces)


def _in_groups(numbers: Sequence[int], size: int) -> Iterable[tuple[int, ...]]:
    return zip(*[iter(numbers)] * size, strict=True)
