"""Tensor parallelism for generation: each process holds a shard of every layer, the first leads.

    torchrun --nproc-per-node 2 -m earlyfusion generate "Draw a red apple." --model chameleon-34b

A shard is an ordinary `Transformer` with fewer heads and a narrower feed-forward (`ShardConfig`).
Two of its outputs per block are summed over all shards. So everything that reads a config or a
module (cache, back end, rounding to fewer bits) takes a shard as it is. Queries are split by heads,
with their norms. So are keys and values; where these have fewer heads than there are processes,
several processes hold the same ones.

Embedding and head are in the first process only, and not split. It runs the scheduler, embeds the
tokens, broadcasts the result, and samples from its own logits. The others know the positions of
tokens but not the tokens, so they cannot decide anything differently. A split head would save the
first process some reads of weights: in a step with one row, 0.5% of all bytes in an image, whose
codes are an eighth of the vocabulary, and 4% in text (7B on two, 34B on four; 1% and 10% for 34B on
eight). But then each step would have to gather logits.

Shapes: T tokens of a step, D model width, N query heads, K key and value heads, H head width.
"""

from __future__ import annotations

import math
import os
import sys
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import islice
from typing import NoReturn, cast

import torch
from torch import Tensor, nn

from earlyfusion import processes
from earlyfusion.checkpoints.assemble import checked
from earlyfusion.checkpoints.source import Source
from earlyfusion.config import ModelConfig
from earlyfusion.engine.backends.torch import FusedTransformer
from earlyfusion.engine.blocks import Branch, Copy
from earlyfusion.engine.cache import DTYPES, PagedCache, cache_dtype
from earlyfusion.engine.handle import Handle
from earlyfusion.engine.module_tree import is_plain
from earlyfusion.engine.peers import BroadcastEmbedding, Peers, RowParallelLinear, peers_of
from earlyfusion.engine.runner import ModelRunner
from earlyfusion.engine.scheduler import Piece, Plan, Step
from earlyfusion.engine.static.bursts import uses_bursts
from earlyfusion.engine.static.follower import Burst, FollowerBursts
from earlyfusion.errors import SettingError
from earlyfusion.generation.grammar import Grammar
from earlyfusion.model.rotary import rotary_change_length
from earlyfusion.model.transformer import Block, Transformer

_OPEN, _READ, _BURST, _CLEAR = range(4)  # the first number of a message
_CACHE_DTYPES = (None, *DTYPES)


@dataclass(frozen=True)
class ShardConfig(ModelConfig):
    """The shape of one shard; its heads are as wide as those of the whole model."""

    head_width: int = 0

    @property
    def head_dim(self) -> int:
        return self.head_width


def shard_config(whole: ModelConfig, rank: int, count: int) -> ShardConfig:
    """The shape of shard number `rank`; `SettingError` if the heads cannot be shared evenly."""
    heads, inner = whole.num_attention_heads, whole.intermediate_size
    if heads % count:
        fitting = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
        raise SettingError(
            f"tensor_parallel={count} cannot share {heads} attention heads evenly: "
            f"choose one of {fitting}"
        )
    values = {f.name: getattr(whole, f.name) for f in fields(ModelConfig)}
    values |= {
        "vocab_size": whole.vocab_size if rank == 0 else 1,
        "num_attention_heads": heads // count,
        "num_key_value_heads": len(_kv_heads(whole, rank, count)),
        "intermediate_size": _bound(inner, rank + 1, count) - _bound(inner, rank, count),
    }
    return ShardConfig(**values, head_width=whole.head_dim)


def shard_tensor(name: str, whole: Tensor, config: ModelConfig, rank: int, count: int) -> Tensor:
    """The part of a parameter `whole` that one shard holds, as a copy.

    `config` is the whole model's. Shards after the first hold one row of embedding and head.
    """
    owner, _, leaf = name.rpartition(".")
    queries, keys = _query_heads(config, rank, count), _kv_heads(config, rank, count)
    match owner.rpartition(".")[2]:
        case "q_norm":
            shard = whole[queries]
        case "k_norm":
            shard = whole[keys]
        case "q_proj":
            shard = whole.unflatten(0, (-1, config.head_dim))[queries].flatten(0, 1)
        case "k_proj" | "v_proj":
            shard = whole.unflatten(0, (-1, config.head_dim))[keys].flatten(0, 1)
        case "o_proj" if leaf == "weight":
            shard = whole.unflatten(1, (-1, config.head_dim))[:, queries].flatten(1)
        case "gate_proj" | "up_proj":
            shard = whole[_columns(config, rank, count)]
        case "down_proj" if leaf == "weight":
            shard = whole[:, _columns(config, rank, count)]
        case "embed_tokens" | "lm_head" if rank > 0:
            shard = whole[:1]
        case _:
            shard = whole
    return shard.clone(memory_format=torch.contiguous_format)


def _query_heads(config: ModelConfig, rank: int, count: int) -> list[int]:
    heads_per_shard = config.num_attention_heads // count
    return list(range(rank * heads_per_shard, (rank + 1) * heads_per_shard))


def _kv_heads(config: ModelConfig, rank: int, count: int) -> list[int]:
    """The key heads of a shard: one for each group of query heads that read it. A shard whose
    number of query heads is not a multiple of the model's group has smaller groups, and then holds
    a key head more than once."""
    queries = _query_heads(config, rank, count)
    group = config.num_attention_heads // config.kv_heads
    return [head // group for head in queries[:: math.gcd(len(queries), group)]]


def _columns(config: ModelConfig, rank: int, count: int) -> slice:
    inner = config.intermediate_size
    return slice(_bound(inner, rank, count), _bound(inner, rank + 1, count))


def _bound(size: int, rank: int, count: int) -> int:
    return size * rank // count


def open_shard(source: Source, count: int) -> Source:
    """An open checkpoint of which this process reads its own shard; `SettingError` if the model or
    the number of processes does not fit."""
    if count != processes.count():
        raise SettingError(
            f"tensor_parallel={count} is not the number of processes, {processes.count()}: "
            f"set it to that, or start {count} with torchrun --nproc-per-node"
        )
    whole, rank = source.config, processes.rank()
    config = shard_config(whole, rank, count)
    return replace(
        checked(source),
        config=config,
        tensors={
            name: stored.then(partial(_shard_named, name, whole, rank, count))
            for name, stored in source.tensors.items()
        },
        vq=source.vq if rank == 0 else {},
        is_shard=True,
    )


def _shard_named(name: str, config: ModelConfig, rank: int, count: int, whole: Tensor) -> Tensor:
    return shard_tensor(name, whole, config, rank, count)


# ---- connecting the shards


def connect(shard: Transformer, peers: Peers) -> Transformer:
    """Connect a shard with those of the other processes, in place. A shard that is to be quantised
    must be quantised before."""
    embedding = shard.model.embed_tokens
    assert isinstance(embedding, nn.Embedding)
    shard.model.embed_tokens = BroadcastEmbedding(cast(nn.Parameter, embedding.weight), peers)
    for block in cast("Iterable[Block]", shard.model.layers):
        for owner, name in ((block.self_attn, "o_proj"), (block.mlp, "down_proj")):
            linear = getattr(owner, name)
            if peers.rank > 0:
                linear.bias = None  # the sum must contain it once
            setattr(owner, name, RowParallelLinear(linear, peers))
    return shard


def split(whole: Transformer, peers: Peers) -> Transformer:
    """This process's shard of a model that is in memory, connected with the others."""
    config = shard_config(whole.config, peers.rank, peers.count)
    shard = Transformer(config).to(whole.lm_head.weight.dtype).eval()
    tensors = {
        name: shard_tensor(name, tensor, whole.config, peers.rank, peers.count)
        for name, tensor in whole.state_dict().items()
    }
    shard.load_state_dict(tensors, assign=True)
    shard.tie_weights()
    return connect(shard, peers)


# ---- the leader and the followers


def share(shard: Transformer) -> None:
    """Connect the shards of all processes. Returns in the first process, which leads. The others
    run its plans until it ends, and then end too.

    Raises `SettingError` if this program shares a model already.
    """
    if _connected:
        raise SettingError(
            "this program shares a model already: start it again for another, "
            "or load that one with tensor_parallel=1"
        )
    device = shard.lm_head.weight.device
    if device.type == "cuda":
        torch.cuda.set_device(device)
    _connected.append(Peers(device))
    [peers] = _connected
    connect(shard, peers)
    if not peers.leads:
        _follow_and_exit(shard, peers)


_connected: list[Peers] = []


def _follow_and_exit(shard: Transformer, peers: Peers) -> NoReturn:
    try:
        follow(shard, peers)
    except ConnectionError as error:
        # On a GPU collectives may be pending that never complete. A normal exit would wait for
        # them.
        print(f"process {peers.rank}: {error}", file=sys.stderr, flush=True)
        os._exit(1)
    raise SystemExit(0)


class LeadingRunner(ModelRunner):
    """Sends each plan to the other processes before it runs it itself."""

    def __init__(
        self,
        transformer: Transformer,
        grammar: Grammar,
        blocks: int,
        length: int,
        dtype_name: str | None = None,
        static: bool | None = None,
    ) -> None:
        peers = peers_of(transformer)
        assert peers is not None
        if not is_plain(transformer):
            raise SettingError(
                "a model that several processes share cannot have hooks or modules of other "
                "classes: load it with tensor_parallel=1, or remove them"
            )
        limit = rotary_change_length(transformer.config)
        if limit is not None and length > limit:
            # The other processes do not know how long a sequence is.
            raise SettingError(
                f"a model that several processes share cannot have context_tokens={length:,}: its "
                f"rotary angles change beyond {limit:,} tokens; make an Engine with "
                f"context_tokens={limit}, or load it with tensor_parallel=1"
            )
        self._peers, self._collectives = peers, _collectives(transformer)
        peers.engines += 1
        self._engine = peers.engines
        static = uses_bursts(transformer.lm_head.weight.device) if static is None else static
        peers.send([_OPEN, blocks, length, _CACHE_DTYPES.index(dtype_name), static], 0)
        super().__init__(transformer, grammar, blocks, length, dtype_name, static)
        if self.bursts is not None:
            self.bursts.announce = self._announce

    def run(self, plan: Plan, handles: Sequence[Handle], steps: int = 0) -> list[list[int]]:
        with self._leading():
            if not steps:
                self._peers.send(_message(plan), self._collectives if plan.pieces else 0)
            elif plan.copies:
                self._peers.send(_message(Plan(plan.copies)), 0)
            return super().run(plan, handles, steps)

    def warm_up(self, progress: Callable[[int, int], None] | None = None) -> int:
        with self._leading():
            return super().warm_up(progress)

    def clear(self, blocks: Iterable[int]) -> None:
        blocks = list(blocks)
        with self._leading():
            self._peers.send([_CLEAR, *blocks], 0)
            super().clear(blocks)

    @contextmanager
    def _leading(self) -> Iterator[None]:
        peers = self._peers
        # The other processes hold only the cache of the engine that was made last.
        if self._engine != peers.engines:
            raise SettingError(
                "another engine has been made on this shared model since: use that one"
            )
        try:
            yield
        except BaseException:
            if peers.collectives_left:
                peers.close()  # the others wait for collectives that will not come
            raise

    def _announce(self, burst: Burst, collectives: int) -> None:
        self._peers.send([_BURST, *burst.numbers], collectives)


def follow(shard: Transformer, peers: Peers) -> None:
    """Run the plans of the leader until it closes; ConnectionError if it ended without closing."""
    follower: _Follower | None = None
    while message := peers.receive():
        kind, *numbers = message
        if kind == _OPEN:
            follower = None  # frees its cache before the next takes memory
            follower = _Follower(shard, peers, *numbers)
            continue
        assert follower is not None
        follower.run(kind, numbers)
    peers.close()


class _Follower:
    """The part of a runner without the sampling: back end and cache."""

    def __init__(
        self,
        shard: Transformer,
        peers: Peers,
        blocks: int,
        length: int,
        dtype_number: int,
        static: int,
    ) -> None:
        weight = shard.lm_head.weight
        dtype = cache_dtype(_CACHE_DTYPES[dtype_number], weight.dtype)
        self._peers, self._collectives = peers, _collectives(shard)
        # One more, as in `ModelRunner`: the spare block of static steps.
        self._cache = PagedCache(shard.config, blocks + 1, length, dtype, weight.device)
        self._bursts: FollowerBursts | None = None
        with torch.no_grad():
            self._backend = FusedTransformer(shard, self._cache)
            if static:
                self._bursts = FollowerBursts(shard, self._backend, self._cache)

    @torch.inference_mode()
    def run(self, kind: int, numbers: Sequence[int]) -> None:
        if kind == _CLEAR:
            self._cache.clear(numbers)
        elif kind == _BURST:
            self._burst(Burst.of(numbers))
        else:
            self._run_step(_plan(numbers))

    def _burst(self, burst: Burst) -> None:
        assert self._bursts is not None
        self._peers.begin(self._bursts.collectives(burst))
        self._bursts.run(burst)

    def _run_step(self, plan: Plan) -> None:
        for copied in plan.copies:
            self._cache.copy(copied)
        if plan.pieces:
            self._peers.begin(self._collectives)
            self._backend.run_layers(Step(plan.pieces))


def _collectives(transformer: Transformer) -> int:
    """Collectives of a step that is not static: the embedded tokens, and two sums per layer."""
    return 1 + 2 * transformer.config.num_hidden_layers


def _message(plan: Plan) -> list[int]:
    """A plan as numbers: the copies, then the positions and the block table of each piece. Tokens
    are left out, as the other processes do not need them."""
    numbers = [_READ, len(plan.copies)]
    for copied in plan.copies:
        numbers += copied
    for piece in plan.pieces:
        blocks = piece.branch.blocks
        numbers += [piece.start, piece.size, len(piece.drafts), len(blocks), *blocks]
    return numbers


def _plan(numbers: Sequence[int]) -> Plan:
    """The plan in a message, with 0 for every token."""
    rest = iter(numbers)
    copies = [Copy(next(rest), next(rest), next(rest)) for _ in range(next(rest))]
    pieces = []
    for start, size, drafts, count in iter(lambda: tuple(islice(rest, 4)), ()):
        branch = Branch([0] * (start + size), array("q", islice(rest, count)))
        pieces.append(Piece(branch, start, size, [0] * drafts))
    return Plan(copies, pieces)
