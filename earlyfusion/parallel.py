"""Several processes: one mesh, and four calls that put a finished model on it for training.

    torchrun --nproc-per-node 8 -m earlyfusion train pretrain_7b ...

The mesh has three axes, `replicas` x `shard` x `tensor`. Parameters are split over `tensor` by
heads, columns and vocabulary (with the residual stream split over the sequence), and over `shard`
by rows (FSDP2); `replicas` hold the same weights (HSDP). The first two axes are the data ranks:
each reads its own rows of the global batch. Plain `python`, and `torchrun` with one process, have
no mesh: then only activation checkpointing and compilation have an effect.

Two other files say how a model is split, because they need other splits in other forms:
`engine/tensor_parallel.py` splits checkpoints into plain modules for generation, and
`hf/tensor_parallel.py` has transformers' plan.
"""

# Shapes: B rows, T tokens, D model width, V vocabulary, P positions, S slices of the vocabulary.

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
from earlyfusion.model.transformer import Transformer, init_weights

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
    """Processes that share one copy of the weights, times `tensor` (0: all that there are)."""
    checkpointing: str = "none"
    """What the backward pass recomputes: none, selective (all but products and attention) or full
    (all)."""
    checkpointing_every: int = 1
    """Recompute only in every n-th block, from the first on; the others keep everything."""

    def __post_init__(self) -> None:
        if self.checkpointing not in CHECKPOINTING:
            raise SettingError(
                f"checkpointing={self.checkpointing!r} is unknown: "
                f"choose one of {', '.join(CHECKPOINTING)}"
            )
        if self.checkpointing_every < 1:
            raise SettingError(
                f"checkpointing_every={self.checkpointing_every} must be at least 1: "
                f"1 is every block, 2 every other one"
            )
        if self.checkpointing_every > 1 and self.checkpointing == "none":
            raise SettingError(
                f"checkpointing_every={self.checkpointing_every} has no effect with "
                f"checkpointing=none: choose selective or full"
            )
        if self.tensor < 1 or self.shard < 0:
            raise SettingError(
                f"tensor={self.tensor} must be at least 1 and shard={self.shard} at least 0"
            )

    def sizes(self, processes: int) -> tuple[int, int, int]:
        """(replicas, shard, tensor) for this number of processes. Raises `SettingError` if they
        cannot be divided so."""
        per_copy = self.tensor * (self.shard or max(1, processes // self.tensor))
        if processes % per_copy:
            raise SettingError(
                f"processes={processes} cannot form groups of {per_copy} (tensor={self.tensor} x "
                f"shard={self.shard or per_copy // self.tensor}): start a multiple of {per_copy}"
            )
        return processes // per_copy, per_copy // self.tensor, self.tensor


def launch(config: ParallelConfig, device: torch.device) -> DeviceMesh | None:
    """The mesh of this run, or None for a single process; joins `torchrun`'s process group."""
    sizes = config.sizes(processes.count())
    if processes.count() == 1:
        return None
    from torch.distributed.device_mesh import init_device_mesh

    processes.join(device)
    mesh = init_device_mesh(device.type, sizes, mesh_dim_names=AXES)
    if config.tensor > 1:
        # With this flat axis, a norm over one copy of the weights is one all-reduce instead of two.
        mesh[SHARD, TENSOR]._flatten("copy")
    return mesh


def data_rank(mesh: DeviceMesh | None) -> tuple[int, int]:
    """The data rank of this process, and the number of data ranks."""
    if mesh is None:
        return 0, 1
    shards = mesh[SHARD].size()
    rank = mesh.get_local_rank(REPLICAS) * shards + mesh.get_local_rank(SHARD)
    return rank, mesh[REPLICAS].size() * shards


def data_sum(value: Tensor, mesh: DeviceMesh | None) -> Tensor:
    """The sum over the data ranks, in a new tensor; the value itself without a mesh."""
    if mesh is None:
        return value
    value = value.detach().clone()
    for axis in (REPLICAS, SHARD):
        dist.all_reduce(value, group=mesh.get_group(axis))
    return value


def average_gradients(parameters: list[nn.Parameter], mesh: DeviceMesh | None) -> None:
    """Average the gradients of copies of a model over the data ranks, in one message."""
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
    """Put the model on the mesh, in place; weights stay fp32 and are gathered in `dtype`. Without a
    mesh the first and the last call do nothing."""
    # The order matters: each call wraps the result of the previous ones.
    apply_tensor_parallel(model, mesh)
    checkpoint_activations(model, config.checkpointing, config.checkpointing_every)
    # A block is not one graph on a CPU, where attention loops over a varying number of documents,
    # nor with tensor parallelism, whose layers communicate.
    compile_blocks(model, compiled, _is_on_gpu(model, mesh) and config.tensor == 1)
    apply_fsdp(model, mesh, dtype)


def tensor_plan() -> dict[str, ParallelStyle]:
    """How each module is split over the axis `tensor`, by name. The residual stream [B, T, D] is
    split along T (sequence parallelism); attention and feed-forward by heads or columns."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleInput,
        RowwiseParallel,
        SequenceParallel,
    )

    by_token, replicated = Shard(1), Replicate()
    gather_states = PrepareModuleInput(  # the rotary tables and `attend` are not split
        input_layouts=(by_token, None, None), desired_input_layouts=(replicated, None, None)
    )
    block = "model.layers.*."
    return {
        # Each process looks up the tokens in its part of the vocabulary; the sum is scattered.
        "model.embed_tokens": RowwiseParallel(input_layouts=replicated, output_layouts=by_token),
        block + "input_layernorm": SequenceParallel(use_local_output=True),
        block + "self_attn": gather_states,
        block + "self_attn.q_proj": ColwiseParallel(),
        block + "self_attn.k_proj": ColwiseParallel(),
        block + "self_attn.v_proj": ColwiseParallel(),
        block + "self_attn.q_norm": _by_heads(),
        block + "self_attn.k_norm": _by_heads(),
        block + "self_attn.o_proj": RowwiseParallel(output_layouts=by_token),
        block + "post_attention_layernorm": SequenceParallel(use_local_output=True),
        block + "mlp": PrepareModuleInput(input_layouts=by_token, desired_input_layouts=replicated),
        block + "mlp.gate_proj": ColwiseParallel(),
        block + "mlp.up_proj": ColwiseParallel(),
        block + "mlp.down_proj": RowwiseParallel(output_layouts=by_token),
        "model.norm": SequenceParallel(),
        # Training only reads its weight, in `head_inputs`.
        "lm_head": ColwiseParallel(input_layouts=by_token, output_layouts=replicated),
    }


def _by_heads() -> ParallelStyle:
    """Splits norms that have a weight and a bias per head, [N, H], by heads."""
    from torch.distributed.tensor import DTensor, Shard, distribute_module, distribute_tensor
    from torch.distributed.tensor.parallel import ParallelStyle

    def split(_: str, module: nn.Module, mesh: DeviceMesh) -> None:
        for name, parameter in list(module.named_parameters(recurse=False)):
            shard = distribute_tensor(parameter, mesh, [Shard(0)])
            module.register_parameter(name, nn.Parameter(shard, parameter.requires_grad))

    # The incoming queries [B, T, N, H] are this process's heads: dimension 2 of the whole.
    def from_local(_: nn.Module, inputs: Any, mesh: DeviceMesh) -> Tensor:
        return DTensor.from_local(inputs[0], mesh, [Shard(2)], run_check=False)

    def to_local(_: nn.Module, out: Any, mesh: DeviceMesh) -> Tensor:
        return cast(Tensor, out.to_local())

    class ByHeads(ParallelStyle):
        def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
            # torch annotates both hooks as returning None, but uses their results.
            input_hook, output_hook = cast(Any, from_local), cast(Any, to_local)
            return distribute_module(module, device_mesh, split, input_hook, output_hook)

    return ByHeads()


def apply_tensor_parallel(model: Transformer, mesh: DeviceMesh | None) -> None:
    """Split layers, embedding and head over the axis `tensor`."""
    if mesh is None or mesh[TENSOR].size() == 1:
        return
    from torch.distributed.tensor.parallel import parallelize_module

    check_split(model.config, mesh[TENSOR].size())
    parallelize_module(model, mesh[TENSOR], tensor_plan())


def check_split(config: ModelConfig, count: int) -> None:
    """Raise `SettingError` unless `count` processes can share each layer evenly."""
    for name in ("kv_heads", "intermediate_size", "vocab_size"):
        if getattr(config, name) % count:
            raise SettingError(
                f"tensor={count} cannot share {getattr(config, name)} {name} evenly: "
                f"choose a divisor of it"
            )
    if config.tie_word_embeddings and count > 1:
        raise SettingError(
            f"tensor={count} cannot split a head tied to the embedding: use tensor=1 and shard"
        )


def checkpoint_activations(model: Transformer, mode: str, every: int = 1) -> None:
    """Activation checkpointing: in every `every`-th block the backward pass recomputes the
    activations instead of keeping them."""
    if mode == "none":
        return
    for block in model.model.layers[::every]:
        options: dict[str, Any] = {"use_reentrant": False}
        if mode == "selective":
            options["context_fn"] = partial(create_selective_checkpoint_contexts, _save_policy)
        block.forward = partial(checkpoint, block.forward, **options)


@cache
def _saved_operations() -> frozenset[Any]:
    """Operations whose results are cheaper to keep than to compute again."""
    from torch.nn.attention import varlen  # registers the operation of packed documents

    aten, torch_attn = torch.ops.aten, torch.ops.torch_attn
    assert varlen  # the import is only for its effect
    return frozenset(
        (
            torch_attn._varlen_attn.default,
            aten.mm.default,
            aten._scaled_dot_product_flash_attention.default,
            aten._scaled_dot_product_efficient_attention.default,
            aten._scaled_dot_product_cudnn_attention.default,
            aten._scaled_dot_product_flash_attention_for_cpu.default,
        )
    )


def _save_policy(_: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Whether selective checkpointing keeps the result of an operation."""
    if operation in _saved_operations():
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def compile_blocks(model: Transformer, compiled: bool, fullgraph: bool = False) -> None:
    """Compile each block by itself. With `fullgraph`, torch refuses a block that would take more
    than one graph."""
    if compiled:
        # One graph serves all blocks, as none knows its number: an attribute `layer_idx` would be a
        # constant of the graph, which would then be recompiled for each block.
        for block in model.model.layers:
            block.forward = torch.compile(block.forward, fullgraph=fullgraph)


def _is_on_gpu(model: Transformer, mesh: DeviceMesh | None) -> bool:
    if mesh is not None:
        return mesh.device_type == "cuda"
    device = next(model.parameters()).device
    return device.type == "cuda" or (device.type == "meta" and torch.cuda.is_available())


def apply_fsdp(model: Transformer, mesh: DeviceMesh | None, dtype: torch.dtype) -> None:
    """FSDP2: each block gathers its weights when it runs; the rest of the model is one group."""
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
        cast_forward_inputs=False,  # the rotary tables stay fp32
    )
    has_replicas = mesh[REPLICAS].size() > 1
    axes = mesh[REPLICAS, SHARD] if has_replicas else mesh[SHARD]
    unsharded = _unsharded(model, mesh)
    for block in model.model.layers:
        fully_shard(block, mesh=axes, mp_policy=policy)
    fully_shard(model, mesh=axes, mp_policy=policy, ignored_params=unsharded)
    # FSDP gathers weights in a hook of `forward`, but training calls `hidden_states`.
    register_fsdp_forward_method(model, "hidden_states")


def _unsharded(model: Transformer, mesh: DeviceMesh) -> set[nn.Parameter]:
    """Trainable parameters outside a frozen backbone (the image head), which stay unsharded."""
    if any(parameter.requires_grad for parameter in model.model.parameters()):
        return set()
    trained = {parameter for parameter in model.parameters() if parameter.requires_grad}
    for parameter in trained:
        # FSDP reduces gradients in the backward pass of the states; a frozen backbone has none.
        parameter.register_hook(lambda grad: data_sum(grad, mesh) / data_rank(mesh)[1])
    return trained


class VocabularySlice(NamedTuple):
    """The rows of the head that this process holds, from vocabulary id `first` on; the processes of
    `group` together hold all rows."""

    first: int
    group: dist.ProcessGroup

    def combine(self, log_z_P: Tensor, target_logit_P: Tensor) -> tuple[Tensor, Tensor]:
        """Log Z over all slices, and the logit of each target, both [P]. `log_z_P` is that of this
        slice; `target_logit_P` is 0 for the targets of other slices."""
        local = torch.stack((log_z_P, target_logit_P))
        slices = [torch.empty_like(local) for _ in range(self.group.size())]
        dist.all_gather(slices, local, group=self.group)
        log_z_SP, target_logit_SP = torch.stack(slices, 1).unbind(0)
        return log_z_SP.logsumexp(0), target_logit_SP.sum(0)


def head_inputs(x_BTD: Tensor, head_VD: Tensor) -> tuple[Tensor, Tensor, VocabularySlice | None]:
    """The hidden states of all positions, this process's rows of the head, and which rows these are
    (None: all)."""
    if processes.count() == 1:
        return x_BTD, head_VD, None
    from torch.distributed.tensor import DTensor, Partial, Replicate

    if not (isinstance(x_BTD, DTensor) and isinstance(head_VD, DTensor)):
        return x_BTD, head_VD, None
    mesh = head_VD.device_mesh
    # The gradient of the states is the sum of the contributions of the head's slices.
    whole_BTD = x_BTD.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])
    rows_VD = head_VD.to_local()
    vocab_slice = VocabularySlice(mesh.get_local_rank() * len(rows_VD), mesh.get_group())
    return whole_BTD, rows_VD, vocab_slice


def clip_gradients(parameters: list[nn.Parameter], limit: float) -> Tensor:
    """`clip_grad_norm_` with the norm of the whole gradient on every process."""
    if processes.count() == 1:
        return nn.utils.clip_grad_norm_(parameters, limit)
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return norm


def materialize(model: Transformer, device: torch.device) -> None:
    """Give a model on the meta device memory and first weights. Each process draws every parameter
    whole, one at a time, and keeps its own shard, so the weights do not depend on the number of
    processes."""
    if not any(p.is_meta for p in model.parameters()):
        return
    model.to_empty(device=device)
    init_weights(_whole_parameters(model), model.config)


def _whole_parameters(model: Transformer) -> Iterator[tuple[str, Tensor]]:
    """Whole parameters for the caller to fill. When it asks for the next one, the model copies its
    shard of the last."""
    for name, parameter in model.named_parameters():
        whole = torch.empty(parameter.shape, device=parameter.device, dtype=parameter.dtype)
        yield name, whole
        copy_shard(parameter, whole)


@torch.no_grad()
def copy_shard(parameter: Tensor, whole: Tensor) -> None:
    """Fill this process's shard of a parameter, or all of one that is not split."""
    local_shard(parameter).copy_(shard_of(parameter, whole))


def local_shard(tensor: Tensor) -> Tensor:
    """This process's shard of a tensor, which shares its memory; the tensor itself if it is whole.
    Without gradients: for an optimizer and for reading."""
    return cast(Tensor, tensor.to_local()) if hasattr(tensor, "to_local") else tensor


def full_tensor(parameter: Tensor, shard: Tensor) -> Tensor:
    """The whole tensor of which each process has a shard, split as `parameter` is."""
    from torch.distributed.tensor import DTensor

    if not isinstance(parameter, DTensor):
        return shard
    distributed = DTensor.from_local(
        shard,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
    return distributed.full_tensor()


def shard_of(parameter: Tensor, whole: Tensor) -> Tensor:
    """This process's part of `whole`, split as `parameter` is."""
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    if not isinstance(parameter, DTensor):
        return whole
    shape, offset = compute_local_shape_and_global_offset(
        parameter.shape, parameter.device_mesh, parameter.placements
    )
    return whole[tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))]
