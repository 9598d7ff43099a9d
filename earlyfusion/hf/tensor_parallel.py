"""The plan by which transformers' tensor parallelism splits the model over processes.

Each process holds some attention heads of every layer with their QK-norms, some columns of every
feed-forward, and some of the output head's vocabulary; the image tokenizer is whole in each. This
table is separate from that of parallel.py (torch's styles, for training) and of
engine/tensor_parallel.py (splits tensors as they are read), because each is in the form that its
library takes: the shards differ (in the engine, embedding and head are whole), and this one must
follow transformers' versions.
"""

from __future__ import annotations

import transformers
from transformers.integrations import ALL_PARALLEL_STYLES

from earlyfusion.config import ModelConfig
from earlyfusion.errors import SettingError

HEAD = {"lm_head": "colwise_gather_output"}


def _can_shard_norms() -> bool:
    """Whether this transformers can shard a QK-norm; versions between 5.7 and 5.23 cannot."""
    register = getattr(ALL_PARALLEL_STYLES, "register_plan_to_weight_dim", None)
    return "local_params" in ALL_PARALLEL_STYLES or register is not None


def _norm_plan(norm: str) -> dict[str, str]:
    """A QK-norm [heads, width] by heads: "colwise" splits the second-to-last dimension."""
    if not _can_shard_norms():
        return {}
    if "local_params" in ALL_PARALLEL_STYLES:
        return {f"{norm}.weight": "colwise", f"{norm}.bias": "colwise", norm: "local_params"}
    # transformers 5.7 gathers a bias over its last dimension when it saves: this one differs.
    if "colwise" in ALL_PARALLEL_STYLES:
        ALL_PARALLEL_STYLES.register("head_norm", ALL_PARALLEL_STYLES["colwise"])
        ALL_PARALLEL_STYLES.register_plan_to_weight_dim("head_norm", -2)
        ALL_PARALLEL_STYLES.register_plan_to_bias_dim("head_norm", -2)
    return {f"{norm}.weight": "head_norm", f"{norm}.bias": "head_norm"}


_ATTENTION, _MLP = "layers.*.self_attn", "layers.*.mlp"
LAYERS = {
    f"{_ATTENTION}.q_proj": "colwise",
    f"{_ATTENTION}.k_proj": "colwise",
    f"{_ATTENTION}.v_proj": "colwise",
    f"{_ATTENTION}.o_proj": "rowwise",
    **_norm_plan(f"{_ATTENTION}.q_norm"),
    **_norm_plan(f"{_ATTENTION}.k_norm"),
    f"{_MLP}.gate_proj": "colwise",
    f"{_MLP}.up_proj": "colwise",
    f"{_MLP}.down_proj": "rowwise",
}


def check_processes(shape: ModelConfig, processes: int) -> None:
    """Raise `SettingError` unless all processes get the same number of heads, with their norms."""
    if processes > 1 and not _can_shard_norms():
        raise SettingError(
            f"transformers {transformers.__version__} cannot share the norms of heads between "
            f"{processes} processes: install 5.23, or start one process"
        )
    heads = shape.kv_heads
    if heads % processes:
        fitting = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
        raise SettingError(
            f"{processes} processes cannot share {heads} key and value heads evenly: "
            f"start one of {fitting}"
        )
