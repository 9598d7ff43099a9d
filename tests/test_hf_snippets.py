"""What transformers' page about Chameleon shows, with our imports and a folder on this machine.

The calls and their arguments are those of the page; images are files in place of addresses, and
`device_map` needs accelerate as it does there.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from tiny import CONFIG, tiny_processor, tiny_transformer

from earlyfusion.checkpoints.hf import save_hf
from earlyfusion.errors import SettingError
from earlyfusion.hf import ChameleonForConditionalGeneration
from earlyfusion.model.vqgan import VQGAN

SINGLE_IMAGE = """
import torch
from PIL import Image
from earlyfusion.hf import ChameleonForConditionalGeneration, ChameleonProcessor

processor = ChameleonProcessor.from_pretrained("chameleon")
model = ChameleonForConditionalGeneration.from_pretrained(
    "chameleon", dtype=torch.bfloat16, device_map="auto"
)

image = Image.open("cats.png")
prompt = "What is this?<image>"
inputs = processor(images=image, text=prompt, return_tensors="pt").to(
    model.device, dtype=torch.bfloat16
)

output = model.generate(**inputs, max_new_tokens=50)
print(processor.decode(output[0], skip_special_tokens=True))
"""
OLD_DTYPE_NAME = SINGLE_IMAGE.replace(
    "dtype=torch.bfloat16, dev", "torch_dtype=torch.bfloat16, dev"
)
MULTI_IMAGE = """
import torch
from PIL import Image
from earlyfusion.hf import ChameleonForConditionalGeneration, ChameleonProcessor

processor = ChameleonProcessor.from_pretrained("chameleon")
processor.tokenizer.padding_side = "left"
model = ChameleonForConditionalGeneration.from_pretrained(
    "chameleon", dtype=torch.bfloat16, device_map="auto"
)

sign, cats, snowman = (Image.open(name) for name in ("sign.png", "cats.png", "snowman.png"))
prompts = ["What is this and this?<image><image>", "<image>What is this?"]
inputs = processor(
    images=[sign, cats, snowman], text=prompts, padding=True, return_tensors="pt"
).to(device=model.device, dtype=torch.bfloat16)

output = model.generate(**inputs, max_new_tokens=50)
texts = processor.batch_decode(
    output, skip_special_tokens=True, clean_up_tokenization_spaces=False
)
"""
FORWARD_EXAMPLE = """
import torch
from PIL import Image
from earlyfusion.hf import ChameleonForConditionalGeneration, ChameleonProcessor

model = ChameleonForConditionalGeneration.from_pretrained("chameleon", dtype=torch.bfloat16)
processor = ChameleonProcessor.from_pretrained("chameleon")

prompt = "This is a pear.<image><image>What is this?"
first, second = Image.open("sign.png"), Image.open("snowman.png")
inputs = processor(images=[first, second], text=prompt, return_tensors="pt").to(
    model.device, torch.bfloat16
)
output = model.generate(**inputs, max_new_tokens=50, do_sample=False)
text = processor.batch_decode(
    output, skip_special_tokens=True, clean_up_tokenization_spaces=False
)[0]
"""
TEXT_COMPLETION = """
from earlyfusion.hf import ChameleonProcessor

processor = ChameleonProcessor.from_pretrained("chameleon")
inputs = processor(text="This is a", return_for_text_completion=True, return_tensors="pt")
"""
FOUR_BITS = """
import torch
from transformers import BitsAndBytesConfig
from earlyfusion.hf import ChameleonForConditionalGeneration

quantization_config = BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
)
model = ChameleonForConditionalGeneration.from_pretrained(
    "chameleon", quantization_config=quantization_config, device_map="cpu"
)
output = model.generate(torch.tensor([[0, 300, 301]]), max_new_tokens=4)
"""
FLASH_ATTENTION = """
import torch
from earlyfusion.hf import ChameleonForConditionalGeneration

model = ChameleonForConditionalGeneration.from_pretrained(
    "chameleon", dtype=torch.bfloat16, attn_implementation="flash_attention_2"
).to(0)
"""
CONSTRUCTION = """
from earlyfusion.hf import (
    ChameleonConfig, ChameleonModel, ChameleonVQVAE, ChameleonVQVAEConfig
)

configuration = ChameleonConfig()
model = ChameleonModel(configuration)
configuration = model.config

vq_configuration = ChameleonVQVAEConfig()
vq_model = ChameleonVQVAE(vq_configuration)
vq_configuration = vq_model.config
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small model and three photos."""
    place = tmp_path_factory.mktemp("page")
    processor = tiny_processor(place)
    text = (place / "tokenizer.json").read_text()
    ends = {"eos_token_id": 2, "pad_token_id": 1, "bos_token_id": 0}
    torch.manual_seed(0)
    transformer, vqgan = tiny_transformer(processor), VQGAN(CONFIG.vq_config)
    save_hf(place / "chameleon", transformer, vqgan, text, ends)
    random = np.random.default_rng(0)
    for name, size in (("cats", (48, 64)), ("sign", (40, 30)), ("snowman", (33, 90))):
        values = random.integers(0, 256, (*size, 3), dtype=np.uint8)
        PIL.Image.fromarray(values).save(place / f"{name}.png")
    return place


@pytest.fixture
def run(place: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(place)

    def run(snippet: str) -> dict[str, Any]:
        names: dict[str, Any] = {}
        if find_spec("accelerate") is None:
            snippet = snippet.replace(', device_map="auto"', "")
        exec(snippet, names)
        return names

    return run


@pytest.mark.parametrize("snippet", [SINGLE_IMAGE, OLD_DTYPE_NAME], ids=["dtype", "torch_dtype"])
def test_a_single_image(run: Any, snippet: str, capsys: pytest.CaptureFixture[str]) -> None:
    outputs = run(snippet)
    model, inputs, output = outputs["model"], outputs["inputs"], outputs["output"]
    assert model.dtype == inputs["pixel_values"].dtype == torch.bfloat16
    assert inputs["input_ids"].shape[1] < output.shape[1] <= inputs["input_ids"].shape[1] + 50
    assert capsys.readouterr().out.startswith("What is this?")


def test_two_prompts_with_three_images(run: Any) -> None:
    output = run(MULTI_IMAGE)
    inputs = output["inputs"]
    assert inputs["pixel_values"].shape == (3, 3, 16, 16)
    assert inputs["attention_mask"][:, -1].tolist() == [1, 1]
    assert inputs["attention_mask"][1, 0] == 0
    assert [text[:12] for text in output["texts"]] == ["What is this", "What is this"]


def test_two_images_in_one_prompt(run: Any) -> None:
    assert run(FORWARD_EXAMPLE)["text"].startswith("This is a pear.What is this?")


def test_a_text_to_be_completed(run: Any) -> None:
    output = run(TEXT_COMPLETION)
    separator = output["processor"].tokenizer.sep_token_id
    assert separator not in output["inputs"]["input_ids"]
    assert output["processor"](text="This is a")["input_ids"][0, -1] == separator


@pytest.mark.filterwarnings("ignore")  # bitsandbytes' own
def test_four_bits(run: Any) -> None:
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("accelerate")
    model = run(FOUR_BITS)["model"]
    assert model.is_loaded_in_4bit
    assert "4bit" in type(model.model.layers[0].mlp.up_proj).__name__
    assert type(model.lm_head) is torch.nn.Linear


@pytest.mark.skipif(find_spec("flash_attn") is not None, reason="flash-attn is installed")
def test_flash_attention_says_what_to_install(run: Any) -> None:
    with pytest.raises(SettingError, match=r"flash_attention_2.*install flash-attn"):
        run(FLASH_ATTENTION)


@pytest.mark.gpu
def test_flash_attention(run: Any) -> None:
    pytest.importorskip("flash_attn")
    assert isinstance(run(FLASH_ATTENTION)["model"], ChameleonForConditionalGeneration)


def test_configs_and_models(run: Any) -> None:
    with torch.device("meta"):  # 7 billion weights, without memory for them
        output = run(CONSTRUCTION)
    assert sum(p.numel() for p in output["model"].parameters()) > 6.7e9
    assert output["configuration"].vq_config.num_embeddings == 8192
    assert output["vq_configuration"].resolution == 512
