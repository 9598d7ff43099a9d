"""Several processes: one mesh, and four calls that put a finished model on it for training.

    torchrun --nproc-per-node 8 -m earlyfusion train pretrain_7b ...

The mesh has three axes, `replicas` x `shard` x `tensor`. Parameters are cut over `tensor` by heads,
columns and vocabulary (with the states between the branches cut over the sequence), and over
`shard` by rows (FSDP2); `replicas` hold the same weights (HSDP). The first two axes are the data
ranks: each reads its own rows of the global batch. Plain `python` and `torchrun` with one process
give no mesh, and nothing here acts. At the end stand the `Peers` of generation, which
`engine/tensor_parallel.py` uses.

Shapes: B rows, T tokens, D model width, N heads, H head width, V vocabulary, P positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from earlyfusion import processes
from earlyfusion.config import ModelConfig
from earlyfusion.errors import SettingError
from earlyfusion.model.transformer import Transformer

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh as DeviceMesh
    from torch.distributed.tensor.parallel import ParallelStyle

AXES = REPLICAS, SHARD, TENSOR = ("replicas", "shard", "tensor")
CHECKPOINTING = ("none", "selective", "full")


@dataclass
class ParallelConfig:
    """How the processes that `torchrun` started share one model."""

    tensor: int = 1
    """Processes that share each layer; keep them within one machine."""
    shard: int = 0
    """Processes that share one copy of the weights besides `tensor` (0: all there are)."""
    checkpointing: str = "none"
    """What the backward pass computes again: none, selective (all but products) or full."""

    def __post_init__(self) -> None:
        if self.checkpointing not in CHECKPOINTING:
            raise SettingError(
                f"checkpointing={self.checkpointing!r} is unknown: "
                f"choose one of {', '.join(CHECKPOINTING)}"
            )
        if self.tensor < 1 or self.shard < 0:
            raise SettingError(
                f"tensor={self.tensor} and shard={self.shard}: tensor must be at least 1, "
                f"shard at least 0"
            )

    def sizes(self, processes: int) -> tuple[int, int, int]:
        """(replicas, shard, tensor) of so many processes."""
        copy = self.tensor * (self.shard or max(1, processes // self.tensor))
        if processes % copy:
            raise SettingError(
                f"processes={processes} cannot form groups of {copy} (tensor={self.tensor} x "
                f"shard={self.shard or copy // self.tensor}): start a multiple of {copy}"
            )
        return processes // copy, copy // self.tensor, self.tensor


def launch(config: ParallelConfig, device: torch.device) -> DeviceMesh | None:
    """The mesh of this run, or None for a single process; joins the group `torchrun` names."""
    sizes = config.sizes(processes.count())
    if processes.count() == 1:
        return None
    from torch.distributed.device_mesh import init_device_mesh

    processes.join(device)
    mesh = init_device_mesh(device.type, sizes, mesh_dim_names=AXES)
    if config.tensor > 1:  # so that norms over one copy of the weights take one step, not two
        mesh[SHARD, TENSOR]._flatten("copy")
    return mesh


# `torchrun` keeps one store through its restarts, where a new process can read the address of a
# dead one before its successor has written. So the first process names this start, and each of the
# others takes that name only from an answer to a name of its own that no earlier process had.


def data_rank(mesh: DeviceMesh | None) -> tuple[int, int]:
    """Which share of the rows is this process's, and of how many."""
    if mesh is None:
        return 0, 1
    shards = mesh[SHARD].size()
    at = mesh.get_local_rank(REPLICAS) * shards + mesh.get_local_rank(SHARD)
    return at, mesh[REPLICAS].size() * shards


def data_sum(value: Tensor, mesh: DeviceMesh | None) -> Tensor:
    """The sum over the data ranks, in a new tensor; the value itself without a mesh."""
    if mesh is None:
        return value
    value = value.detach().clone()
    for axis in (REPLICAS, SHARD):
        dist.all_reduce(value, group=mesh.get_group(axis))
    return value


def average_gradients(parameters: list[nn.Parameter], mesh: DeviceMesh | None) -> None:
    """The mean over the data ranks, which hold copies of the parameters; in one message."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if mesh is None or not gradients:
        return
    flat = torch.cat([g.flatten() for g in gradients])
    mean = data_sum(flat, mesh) / data_rank(mesh)[1]
    for gradient, piece in zip(gradients, mean.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(piece.view_as(gradient))


def parallelize(
    model: Transformer,
    mesh: DeviceMesh | None,
    config: ParallelConfig,
    compiled: bool = False,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Put the model on the mesh, in place; weights stay fp32 and are gathered in `dtype`.

    Without a mesh, the model of a single process: the first and the last call do nothing.
    """
    split_tensors(model, mesh)
    recompute(model, config.checkpointing)
    compile_blocks(model, compiled)
    shard_rows(model, mesh, dtype)


def tensor_plan() -> dict[str, ParallelStyle]:
    """How each module is cut over the axis `tensor`, by its name."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleInput,
        RowwiseParallel,
        SequenceParallel,
    )

    along, whole = Shard(1), Replicate()
    gathered = PrepareModuleInput(
        input_layouts=(along, None, None), desired_input_layouts=(whole, None, None)
    )
    block = "model.layers.*."
    return {
        "model.embed_tokens": RowwiseParallel(input_layouts=whole, output_layouts=along),
        block + "input_layernorm": SequenceParallel(use_local_output=True),
        block + "self_attn": gathered,
        block + "self_attn.q_proj": ColwiseParallel(),
        block + "self_attn.k_proj": ColwiseParallel(),
        block + "self_attn.v_proj": ColwiseParallel(),
        block + "self_attn.q_norm": _by_heads(),
        block + "self_attn.k_norm": _by_heads(),
        block + "self_attn.o_proj": RowwiseParallel(output_layouts=along),
        block + "post_attention_layernorm": SequenceParallel(use_local_output=True),
        block + "mlp": PrepareModuleInput(input_layouts=along, desired_input_layouts=whole),
        block + "mlp.gate_proj": ColwiseParallel(),
        block + "mlp.up_proj": ColwiseParallel(),
        block + "mlp.down_proj": RowwiseParallel(output_layouts=along),
        "model.norm": SequenceParallel(),
        "lm_head": ColwiseParallel(input_layouts=along, output_layouts=whole),
    }


def _by_heads() -> ParallelStyle:
    """A weight and bias per head go with their heads."""
    from torch.distributed.tensor import DTensor, Shard, distribute_module, distribute_tensor
    from torch.distributed.tensor.parallel import ParallelStyle

    def split(_: str, module: nn.Module, mesh: DeviceMesh) -> None:
        for name, parameter in list(module.named_parameters(recurse=False)):
            own = distribute_tensor(parameter, mesh, [Shard(0)])
            module.register_parameter(name, nn.Parameter(own, parameter.requires_grad))

    def take(_: nn.Module, inputs: Any, mesh: DeviceMesh) -> Tensor:
        return DTensor.from_local(inputs[0], mesh, [Shard(2)], run_check=False)

    def give(_: nn.Module, out: Any, mesh: DeviceMesh) -> Tensor:
        return cast(Tensor, out.to_local())

    class ByHeads(ParallelStyle):
        def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
            # Its annotations say that the two give nothing; what they give is what counts.
            before, after = cast(Any, take), cast(Any, give)
            return distribute_module(module, device_mesh, split, before, after)

    return ByHeads()


def split_tensors(model: Transformer, mesh: DeviceMesh | None) -> None:
    """Cut layers, embedding and head over the axis `tensor`."""
    if mesh is None or mesh[TENSOR].size() == 1:
        return
    from torch.distributed.tensor.parallel import parallelize_module

    check_split(model.config, mesh[TENSOR].size())
    parallelize_module(model, mesh[TENSOR], tensor_plan())


def check_split(config: ModelConfig, count: int) -> None:
    """`SettingError` unless `count` processes can share each layer evenly."""
    for name in ("kv_heads", "intermediate_size", "vocab_size"):
        if getattr(config, name) % count:
            raise SettingError(
                f"tensor={count} cannot share {getattr(config, name)} {name} evenly: "
                f"choose a divisor of it"
            )
    if config.tie_word_embeddings and count > 1:
        raise SettingError(
            f"tensor={count} cannot cut a head tied to the embedding: use tensor=1 and shard"
        )


def recompute(model: Transformer, how: str) -> None:
    """Let the backward pass compute blocks again instead of keeping what they made."""
    if how == "none":
        return
    for block in model.model.layers:
        keep: dict[str, Any] = {}
        if how == "selective":
            keep["context_fn"] = partial(create_selective_checkpoint_contexts, _keeps)
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, **keep)


@cache
def _kept() -> frozenset[Any]:
    """Operations whose results cost more to make again than to keep."""
    aten = torch.ops.aten
    return frozenset(
        (
            aten.mm.default,
            aten._scaled_dot_product_flash_attention.default,
            aten._scaled_dot_product_efficient_attention.default,
            aten._scaled_dot_product_cudnn_attention.default,
            aten._scaled_dot_product_flash_attention_for_cpu.default,
        )
    )


def _keeps(_: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    if operation in _kept():
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def compile_blocks(model: Transformer, compiled: bool) -> None:
    """Compile each block by itself: one graph serves all, as no block knows its number."""
    if compiled:
        for block in model.model.layers:
            block.forward = torch.compile(block.forward)


def shard_rows(model: Transformer, mesh: DeviceMesh | None, dtype: torch.dtype) -> None:
    """FSDP2: each block gathers its weights when it runs; embedding, norm and head are the rest."""
    if mesh is None:
        return
    from torch.distributed.fsdp import (
        MixedPrecisionPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    policy = MixedPrecisionPolicy(
        param_dtype=None if dtype == torch.float32 else dtype,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # the tables of the rotation stay fp32
    )
    several = mesh[REPLICAS].size() > 1
    axes = mesh[REPLICAS, SHARD] if several else mesh[SHARD]
    whole = _kept_whole(model, mesh)
    for block in model.model.layers:
        fully_shard(block, mesh=axes, mp_policy=policy)
    fully_shard(model, mesh=axes, mp_policy=policy, ignored_params=whole)
    register_fsdp_forward_method(model, "states")


def _kept_whole(model: Transformer, mesh: DeviceMesh) -> set[nn.Parameter]:
    """What is trained of a model whose states need no gradient: each process keeps all of it.

    FSDP adds gradients up when the states' own comes by; where none does, it is done here.
    """
    if any(parameter.requires_grad for parameter in model.model.parameters()):
        return set()
    trained = {parameter for parameter in model.parameters() if parameter.requires_grad}
    for parameter in trained:
        parameter.register_hook(lambda grad: data_sum(grad, mesh) / data_rank(mesh)[1])
    return trained


class VocabularySlice(NamedTuple):
    """The rows of the head that this process holds begin at `first`; its peers hold the others."""

    first: int
    group: dist.ProcessGroup

    def combine(self, log_z_P: Tensor, chosen_P: Tensor) -> tuple[Tensor, Tensor]:
        """Over all slices: log Z, and the logit of each target (0 where a slice lacks it)."""
        own = torch.stack((log_z_P, chosen_P))
        slices = [torch.empty_like(own) for _ in range(self.group.size())]
        dist.all_gather(slices, own, group=self.group)
        log_z, chosen = torch.stack(slices, 1).unbind(0)
        return log_z.logsumexp(0), chosen.sum(0)


def head_inputs(x_BTD: Tensor, head_VD: Tensor) -> tuple[Tensor, Tensor, VocabularySlice | None]:
    """States of all positions, the rows of the head that are here, and which rows these are."""
    if processes.count() == 1:
        return x_BTD, head_VD, None
    from torch.distributed.tensor import DTensor, Partial, Replicate

    if not (isinstance(x_BTD, DTensor) and isinstance(head_VD, DTensor)):
        return x_BTD, head_VD, None
    mesh = head_VD.device_mesh
    # Each slice of the head gives a part of the states' gradient.
    whole_BTD = x_BTD.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])
    rows_VD = head_VD.to_local()
    part = VocabularySlice(mesh.get_local_rank() * len(rows_VD), mesh.get_group())
    return whole_BTD, rows_VD, part


def clip_gradients(parameters: list[nn.Parameter], limit: float) -> Tensor:
    """`clip_grad_norm_` whose norm is that of the whole gradient on every process."""
    if processes.count() == 1:
        return nn.utils.clip_grad_norm_(parameters, limit)
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return norm


def materialize(model: Transformer, device: torch.device) -> None:
    """Give a model on the meta device memory and first weights.

    Each process draws every parameter whole, one at a time, and keeps its own part: the weights do
    not depend on how many processes there are.
    """
    if not any(p.is_meta for p in model.parameters()):
        return
    model.to_empty(device=device)
    Transformer.init_weights(cast(Transformer, _WholeParameters(model)))


class _WholeParameters:
    """Offers whole parameters to `init_weights`; what was drawn goes to the model's own parts."""

    def __init__(self, model: Transformer) -> None:
        self.config, self._model = model.config, model

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self._model.named_parameters():
            whole = torch.empty(parameter.shape, device=parameter.device, dtype=parameter.dtype)
            yield name, whole
            own, part = _own_part(parameter.detach(), whole)
            own.copy_(part)


def _own_part(parameter: Tensor, whole: Tensor) -> tuple[Tensor, Tensor]:
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    if not isinstance(parameter, DTensor):
        return parameter, whole
    shape, offset = compute_local_shape_and_global_offset(
        parameter.shape, parameter.device_mesh, parameter.placements
    )
    cut = tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))
    return parameter.to_local(), whole[cut]


# ---- one model for generation, shared by all processes
