"""transformers' tensor parallelism and FSDP2 give what one plain process gives."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_hf_models import stock_model
from torch import distributed
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from wide import example, wide_folder

from earlyfusion.config import PRESETS
from earlyfusion.errors import SettingError
from earlyfusion.hf import ChameleonConfig, ChameleonForConditionalGeneration, tensor_parallel
from earlyfusion.hf.tensor_parallel import check_processes

SHAPES = {
    "post_norm_gqa_biases": {
        "swin_norm": True,
        "num_key_value_heads": 2,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "tied": {"tie_word_embeddings": True},
}
SCRIPT = """
import sys, torch
from torch import distributed
from earlyfusion.hf import ChameleonForConditionalGeneration

torch.set_num_threads(1)
folder, target = sys.argv[1:]
split = ChameleonForConditionalGeneration.from_pretrained(folder, tp_plan="auto").eval()
full = ChameleonForConditionalGeneration.from_pretrained(folder).eval()

def local(tensor):
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor

def is_near(one, two):
    torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)

half = full.model.shape.num_attention_heads // 2
norm = split.model.layers[0].self_attn.q_norm
assert local(norm.weight).shape[0] == local(norm.bias).shape[0] == half
rows = slice(half * distributed.get_rank(), half * (distributed.get_rank() + 1))
assert torch.equal(local(norm.bias), full.model.layers[0].self_attn.q_norm.bias[rows])

image = [91, *[90] * 64, 92]
ids = torch.tensor([[0, 50, *image, 60, 61], [0, 51, *image, 62, 63]])
pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
labels = torch.where(ids == 90, -100, ids)
losses = [model(ids, pixels, labels=labels) for model in (split, full)]
is_near(losses[0].logits, losses[1].logits)
for loss in losses:
    loss.loss.backward()
expected = full.model.layers[0].self_attn.q_norm.weight.grad
is_near(local(split.model.layers[0].self_attn.q_norm.weight.grad), expected[rows])

for how in ({"do_sample": False}, {"num_beams": 2, "do_sample": False}):
    generated = [
        m.generate(ids, pixel_values=pixels, max_new_tokens=6, **how) for m in (split, full)
    ]
    assert torch.equal(*generated)

split.save_pretrained(target)
distributed.barrier()
reloaded = ChameleonForConditionalGeneration.from_pretrained(target).state_dict()
assert all(torch.equal(value, reloaded[name]) for name, value in full.state_dict().items())
distributed.destroy_process_group()
print("fine")
"""


@pytest.mark.parametrize(
    "name", ["post_norm_gqa_biases", pytest.param("tied", marks=pytest.mark.slow)]
)
def test_two_processes_equal_one(name: str, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")  # transformers asks for it
    stock_model(**SHAPES[name]).save_pretrained(tmp_path / "model")
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--standalone",
    ]
    done = subprocess.run(
        [*command, str(script), str(tmp_path / "model"), str(tmp_path / "saved")],
        capture_output=True,
        text=True,
        timeout=280,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("fine") == 2


def test_the_plan_names_every_split_module() -> None:
    config = ChameleonConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=4, vocab_size=96, vq_config={"base_channels": 32},
    )  # fmt: skip
    model = ChameleonForConditionalGeneration(config)
    names = {name for name, _ in [*model.named_modules(), *model.named_parameters()]}
    plan = {rule.replace("*", "0") for rule in model.tp_plan}
    assert plan <= names
    linear = {n for n in names if n.endswith("_proj") and "layers" in n} | {"lm_head"}
    assert linear <= plan


def test_heads_are_shared_evenly() -> None:
    check_processes(PRESETS["chameleon-34b"], 8)
    with pytest.raises(
        SettingError, match=r"3 processes cannot share 8 .*: start one of 1, 2, 4, 8"
    ):
        check_processes(PRESETS["chameleon-34b"], 3)


def test_a_transformers_that_cannot_cut_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """5.17 has neither of the two ways; one process needs none."""
    monkeypatch.setattr(tensor_parallel, "ALL_PARALLEL_STYLES", {"colwise": None})
    assert tensor_parallel._norm_plan("layers.*.self_attn.q_norm") == {}
    tensor_parallel.check_processes(PRESETS["tiny"], 1)
    with pytest.raises(SettingError, match="cannot share the norms of heads between 2 processes"):
        tensor_parallel.check_processes(PRESETS["tiny"], 2)


def test_fsdp2_shards_the_image_tokenizer_by_itself(tmp_path: Path) -> None:
    """As trainers do, which wrap the classes in `_no_split_modules`."""
    folder = wide_folder(tmp_path)
    inputs, whole = example(folder), ChameleonForConditionalGeneration.from_pretrained(folder)
    model = ChameleonForConditionalGeneration.from_pretrained(folder)
    expected = whole(**inputs, labels=inputs["input_ids"]).loss
    codes = whole.get_image_tokens(inputs["pixel_values"])
    pixels = whole.decode_image_tokens(codes)
    store = f"file://{tmp_path}/store"
    distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
        fully_shard(model.model.vqmodel)
        fully_shard(model, mp_policy=policy)
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        torch.testing.assert_close(loss, expected, rtol=0.02, atol=0, check_dtype=False)
        assert torch.equal(model.get_image_tokens(inputs["pixel_values"]), codes)
        torch.testing.assert_close(model.decode_image_tokens(codes), pixels, rtol=1e-4, atol=1e-4)
    finally:
        distributed.destroy_process_group()
