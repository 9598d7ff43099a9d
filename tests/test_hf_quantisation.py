"""Quantised weights of the transformers face: what stays dense, files, memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_processor, tiny_transformer
from tolerances import assert_same
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, TorchAoConfig
from wide import IMAGE_TOKENS, SEVEN, WIDE, example, wide_folder

from earlyfusion.checkpoints.hf import save_hf
from earlyfusion.hf import ChameleonForConditionalGeneration, ChameleonModel
from earlyfusion.model.vqgan import VQGAN

pytest.importorskip("accelerate")


def int8() -> Any:
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(load_in_8bit=True)


def nf4(double: bool = True) -> Any:
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def torchao_int8() -> Any:
    quantization = pytest.importorskip("torchao.quantization")
    return TorchAoConfig(quantization.Int8WeightOnlyConfig())


# How to quantise, and how far logits may move, as a part of their norm.
METHODS: dict[str, tuple[Callable[[], Any], float]] = {
    "int8": (int8, 0.06),
    "nf4": (lambda: nf4(False), 0.4),
    "nf4-double": (nf4, 0.4),
    "torchao-int8": (torchao_int8, 0.03),
}
LAYERS = [
    f"model.layers.{layer}.{'mlp' if name in SEVEN[4:] else 'self_attn'}.{name}"
    for layer in range(WIDE.num_hidden_layers)
    for name in SEVEN
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    return wide_folder(tmp_path_factory.mktemp("wide"))


@pytest.fixture(scope="module")
def inputs(folder: Path, device: torch.device) -> Any:
    return example(folder).to(device)


@pytest.fixture(scope="module")
def dense(folder: Path, device: torch.device) -> Any:
    return ChameleonForConditionalGeneration.from_pretrained(folder).to(device)


@pytest.fixture(params=METHODS)
def method(request: Any) -> str:
    return str(request.param)


def load(folder: Path, method: str, device: torch.device, **settings: Any) -> Any:
    quantised = METHODS[method][0]()
    return ChameleonForConditionalGeneration.from_pretrained(
        folder, quantization_config=quantised, device_map=str(device), **settings
    )


@torch.no_grad()
def logits(model: Any, inputs: Any) -> Tensor:
    return model(**inputs).logits.float()


def quantised_layers(model: Any) -> list[str]:
    """Names of the modules whose weight is no plain float tensor any more."""
    plain = {torch.float32, torch.bfloat16}
    return [
        name
        for name, module in model.named_modules()
        if isinstance(weight := getattr(module, "weight", None), Tensor)
        and (weight.dtype not in plain or hasattr(weight, "__tensor_flatten__"))
    ]


class TestDense:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_only_the_layers_matrices_are_quantised(
        self, folder: Path, method: str, dtype: torch.dtype, device: torch.device
    ) -> None:
        model = load(folder, method, device, dtype=dtype)
        assert sorted(quantised_layers(model)) == sorted(LAYERS)
        assert {p.dtype for p in model.model.vqmodel.parameters()} == {torch.float32}
        assert not any(isinstance(m, nn.Linear) for m in model.model.vqmodel.modules())
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("norm", "embed_tokens", "lm_head")):
                assert parameter.dtype == (torch.float32 if "vqmodel" in name else dtype)
        assert {"lm_head", "model.vqmodel"} <= set(model.hf_quantizer.modules_to_not_convert)

    def test_the_base_alone(self, folder: Path, method: str) -> None:
        base = ChameleonModel.from_pretrained(folder, quantization_config=METHODS[method][0]())
        assert sorted(quantised_layers(base)) == sorted(n.removeprefix("model.") for n in LAYERS)

    def test_logits_are_near_those_of_the_dense_model(
        self, folder: Path, method: str, dense: Any, inputs: Any, device: torch.device
    ) -> None:
        expected = logits(dense, inputs)
        gap = (logits(load(folder, method, device), inputs) - expected).norm() / expected.norm()
        assert 0 < gap < METHODS[method][1]

    def test_it_generates_images(
        self, folder: Path, method: str, inputs: Any, device: torch.device
    ) -> None:
        model = load(folder, method, device, dtype=torch.bfloat16)
        ids = model.generate(
            **inputs, do_sample=False, multimodal_generation_mode="image-only", guidance_text=2.0
        )
        assert ids.shape[1] == inputs["input_ids"].shape[1] + IMAGE_TOKENS
        assert torch.isfinite(model.decode_image_tokens(ids)).all()


class TestFiles:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_equal_logits_saved_before_and_after_decoding(
        self,
        folder: Path,
        method: str,
        dtype: torch.dtype,
        inputs: Any,
        tmp_path: Path,
        device: torch.device,
    ) -> None:
        model = load(folder, method, device, dtype=dtype)
        model.save_pretrained(tmp_path / "before")
        expected = logits(model, inputs)
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
        model.save_pretrained(tmp_path / "after")
        for name in ("before", "after"):
            reloaded = ChameleonForConditionalGeneration.from_pretrained(
                tmp_path / name, device_map=str(device)
            )
            assert sorted(quantised_layers(reloaded)) == sorted(LAYERS)
            assert_same(logits(reloaded, inputs), expected)
        assert_same(logits(model, inputs), expected)

    def test_a_model_too_narrow_for_the_fast_layout_runs(
        self, tmp_path: Path, device: torch.device
    ) -> None:
        """Rows of 32 weights, half a block: bitsandbytes' fast layout would raise."""
        vq = tiny_processor(tmp_path)
        transformer, text = tiny_transformer(vq), (tmp_path / "tokenizer.json").read_text()
        vqgan = VQGAN(transformer.config.vq_config)
        save_hf(tmp_path / "tiny", transformer, vqgan, text, {"eos_token_id": 2})
        model = load(tmp_path / "tiny", "nf4", device, dtype=torch.bfloat16)
        assert torch.isfinite(
            logits(model, {"input_ids": torch.arange(120, 140, device=device)[None]})
        ).all()


class TestMemory:
    def test_dense_as_transformers_counts(self, dense: Any) -> None:
        assert dense.get_memory_footprint() == super(type(dense), dense).get_memory_footprint()
        held = [*dense.parameters(), *dense.buffers()]
        assert dense.get_memory_footprint() == sum(x.numel() * 4 for x in held)

    def test_before_and_after(
        self, folder: Path, method: str, dense: Any, inputs: Any, device: torch.device
    ) -> None:
        """To the byte: weights, with a scale (and torchao's zero) a row or a 4-bit block of 64."""
        model = load(folder, method, device)
        shapes = [dense.get_submodule(name).weight.shape for name in LAYERS]
        rows, weights = sum(s[0] for s in shapes), sum(s.numel() for s in shapes)
        blocks, tables = weights // 64, len(shapes) * 16
        taken = {
            "int8": weights + rows * 4,
            "torchao-int8": weights + rows * (4 + 1),
            "nf4": weights // 2 + blocks * 4 + tables * 4,
        }
        saved = dense.get_memory_footprint() - model.get_memory_footprint()
        if method in taken:
            assert saved == weights * 4 - taken[method]
        assert saved > weights * 2
        logits(model, inputs)
        assert model.get_memory_footprint() <= dense.get_memory_footprint() - weights * 2
