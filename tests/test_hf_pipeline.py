"""transformers' any-to-any pipeline with our model and processor, where torchvision is absent."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
import transformers
from tiny import CONFIG, tiny_processor, tiny_transformer
from transformers.pipelines import PIPELINE_REGISTRY

from earlyfusion.api import Chameleon
from earlyfusion.checkpoints.convert import convert
from earlyfusion.checkpoints.hf import save_hf
from earlyfusion.hf import ChameleonForConditionalGeneration, ChameleonPipeline, ChameleonProcessor
from earlyfusion.hf.pipeline import TASK, route_pipeline
from earlyfusion.model.vqgan import VQGAN

TURN = [{"role": "user", "content": [{"type": "text", "text": "Draw a pear."}]}]


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("pipeline")
    processor = tiny_processor(folder)
    torch.manual_seed(0)
    vqgan = VQGAN(CONFIG.vq_config).eval()
    text = (folder / "tokenizer.json").read_text()
    ends = {"eos_token_id": 2, "pad_token_id": 1, "bos_token_id": 0}
    save_hf(folder / "model", tiny_transformer(processor), vqgan, text, ends)
    return transformers.pipeline(
        TASK,
        model=ChameleonForConditionalGeneration.from_pretrained(folder / "model"),
        processor=ChameleonProcessor.from_pretrained(folder / "model"),
        pipeline_class=ChameleonPipeline,
    )


@pytest.fixture
def photo() -> PIL.Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    return PIL.Image.fromarray(values)


def test_text_of_an_image(pipe: Any, photo: PIL.Image.Image, tmp_path: Path) -> None:
    photo.save(tmp_path / "photo.png")
    settings = {"max_new_tokens": 6, "return_full_text": False}
    given = [photo, [photo], str(tmp_path / "photo.png")]
    said = [pipe(text="What is <image>", images=images, **settings) for images in given]
    inputs = pipe.processor(images=[photo], text="What is <image>")
    ids = pipe.model.generate(**inputs, max_new_tokens=6, do_sample=False)
    new = ids[:, inputs["input_ids"].shape[1] :]
    expected = pipe.processor.post_process_image_text_to_text(new)[0]
    assert [answer[0]["generated_text"] for answer in said] == [expected] * 3


def test_turns(pipe: Any, photo: PIL.Image.Image) -> None:
    content = [{"type": "image", "image": photo}, {"type": "text", "text": "What is this?"}]
    output = pipe(text=[{"role": "user", "content": content}], max_new_tokens=6)
    assert [turn["role"] for turn in output[0]["generated_text"]] == ["user", "assistant"]


@pytest.mark.parametrize("more", [{}, {"generate_kwargs": {"guidance_text": 3.0}}])
def test_an_image(pipe: Any, more: dict[str, Any]) -> None:
    for text in ("Draw a pear.", TURN):
        [generated] = pipe(text=text, generation_mode="image", **more)
        assert generated["generated_image"].size == (16, 16)
        assert generated["input_text"] == text


def test_a_saved_folder_s_tokenizer_knows_the_turns(pipe: Any) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(pipe.model.config.name_or_path)
    said = [*TURN, {"role": "assistant", "content": "a pear"}, *TURN]
    written = pipe.processor.apply_chat_template(said)
    assert tokenizer.apply_chat_template(said, tokenize=False) == written
    ids = tokenizer.apply_chat_template(said)["input_ids"]
    assert ids == pipe.processor(text=written)["input_ids"][0].tolist()
    chat = transformers.pipeline("text-generation", model=pipe.model, tokenizer=tokenizer)
    [answer] = chat(said, max_new_tokens=4)
    assert [turn["role"] for turn in answer["generated_text"]] == ["user", "assistant"] * 2


@pytest.fixture
def routed() -> Iterator[None]:
    before = PIPELINE_REGISTRY.supported_tasks[TASK]["impl"]
    route_pipeline()
    yield
    PIPELINE_REGISTRY.supported_tasks[TASK]["impl"] = before


@pytest.mark.usefixtures("routed")
def test_after_register_the_task_finds_it(pipe: Any) -> None:
    new_pipe = transformers.pipeline(TASK, model=pipe.model, processor=pipe.processor)
    assert type(new_pipe) is ChameleonPipeline


def test_a_template_of_its_own_is_kept(pipe: Any, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(pipe.model.config.name_or_path, copy)
    assert (copy / "chat_template.jinja").read_text() == pipe.processor.chat_template
    (copy / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    convert(copy, tmp_path / "hf", "hf")
    convert(copy, tmp_path / "meta", "meta")
    Chameleon.load(tmp_path / "meta").save(tmp_path / "saved")
    for name in ("hf", "saved"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / name)
        turns = [{"role": "user", "content": "Hi"}]
        assert tokenizer.apply_chat_template(turns, tokenize=False) == "Hi"


@pytest.mark.usefixtures("routed")
@pytest.mark.skipif(transformers.utils.is_torchvision_available(), reason="torchvision is there")
def test_other_models_still_require_torchvision(pipe: Any) -> None:
    config = transformers.ChameleonConfig(**pipe.model.config.to_dict())
    stock = transformers.ChameleonForConditionalGeneration(config)
    with pytest.raises(ImportError, match=r"(?i)torchvision"):
        transformers.pipeline(TASK, model=stock, processor=pipe.processor)
