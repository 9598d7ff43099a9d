"""Lumina-mGPT: images of any of its sizes, as tokens and generated; its guidance with one scale."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from tiny import CONFIG, tiny_processor, tiny_transformer

from earlyfusion.api import Chameleon
from earlyfusion.checkpoints import lumina
from earlyfusion.checkpoints.hf import save_hf
from earlyfusion.content import Image, Message, Text
from earlyfusion.errors import (
    CheckpointError,
    ContextError,
    ImageError,
    PromptError,
    SettingError,
)
from earlyfusion.generation import guidance
from earlyfusion.generation.reference import generate
from earlyfusion.generation.request import ImageDone, ImageProgress, Request
from earlyfusion.generation.settings import SamplingParams
from earlyfusion.image_tokenizer import ImageTokenizer
from earlyfusion.model.transformer import Transformer
from earlyfusion.model.vqgan import VQGAN
from earlyfusion.processor import Processor

SIZES = [f"<reserved{8800 + count:05}>" for count in range(1, 9)]


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Processor:
    """The tiny tokenizer with the tokens that Lumina spells sizes and line ends with."""
    path = tiny_processor(tmp_path_factory.mktemp("lumina")).tokenizer_file
    data = json.loads(path.read_text())
    first = max(data["model"]["vocab"].values()) + 1
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    for number, name in enumerate(("<reserved08799>", *SIZES)):
        data["model"]["vocab"][name] = first + number
        token = {"id": first + number, "content": name, "special": True}
        data["added_tokens"].append(token | flags)
    path.write_text(json.dumps(data))
    return Processor(path, lumina.layout(8))


@pytest.fixture(scope="module")
def transformer(processor: Processor) -> Transformer:
    return tiny_transformer(processor)


def test_height_comes_first(processor: Processor) -> None:
    layout = lumina.layout(4, 6)
    assert layout.head[1:] == ("<reserved08802>", "<reserved08803>")
    assert layout.num_tokens == 4 * (6 + 1) + 4
    codes = np.arange(24).reshape(4, 6)
    tokens = layout.spell(codes, processor.vocabulary)
    assert lumina.read_layout(tokens, processor.vocabulary) == layout
    assert np.array_equal(layout.parse(tokens, processor.vocabulary), codes)
    with pytest.raises(ImageError, match="6x4 codes take 34 tokens"):
        lumina.layout(6, 4).parse(tokens, processor.vocabulary)


@pytest.mark.parametrize("size", [(3, 4), (4, 5)])
def test_odd_sides_have_no_size_token(size: tuple[int, int]) -> None:
    with pytest.raises(CheckpointError, match="has no size token"):
        lumina.layout(*size)


def test_images_without_a_size_are_reported(processor: Processor) -> None:
    vocabulary = processor.vocabulary
    begin, code = vocabulary.begin_image, int(vocabulary.image_tokens[0])
    for tokens in ([begin, code, code], [begin], [begin, vocabulary.id_of("<reserved08799>"), 9]):
        with pytest.raises(ImageError, match="height and width after the begin mark"):
            lumina.read_layout(tokens, vocabulary)


@pytest.mark.parametrize("grid", [32, 48, 64])
def test_sizes(grid: int) -> None:
    sizes = lumina.sizes(grid)
    assert (grid, grid) in sizes
    assert len(set(sizes)) == len(sizes)
    assert all(h % 2 == w % 2 == 0 and h * w <= grid**2 for h, w in sizes)
    assert all(max(size) <= 4 * min(size) for size in sizes)
    assert (2 * grid, grid // 2) in sizes and (grid // 2, 2 * grid) in sizes
    # For every width the tallest image that keeps to the area and the ratio.
    for width in range(2, 4 * grid, 2):
        height = grid**2 // width // 2 * 2
        if height and max(height, width) <= 4 * min(height, width):
            assert (height, width) in sizes


def test_the_prompt_for_an_image() -> None:
    words = lumina.instruction("A pear.", 512, 768)
    assert words == "Generate an image of 768x512 according to the following prompt:\nA pear."


@pytest.mark.parametrize("size", [(4, 8), (8, 4), (2, 8), (6, 6)])
def test_an_image_of_another_size_is_generated(
    processor: Processor, transformer: Transformer, size: tuple[int, int]
) -> None:
    wide = Processor(processor.tokenizer_file, lumina.layout(*size))
    sampling = SamplingParams(seed=0, guidance_text=3.0, guidance_image=3.0).resolved({})
    ids = [wide.vocabulary.bos, *wide.encode_text("a pear"), wide.vocabulary.end_of_turn]
    request = Request(ids, "image", sampling, max_images=1, max_tokens=wide.layout.num_tokens)
    events = list(generate(transformer, wide, request))
    [done] = [event for event in events if isinstance(event, ImageDone)]
    assert done.codes.shape == size
    rows = [event.codes_done for event in events if isinstance(event, ImageProgress)]
    assert rows == [size[1] * row for row in range(1, size[0] + 1)]
    assert events[-1].usage.completion_tokens == size[0] * (size[1] + 1) + 4  # type: ignore[union-attr]
    torch.manual_seed(0)
    tokenizer = ImageTokenizer(VQGAN(CONFIG.vq_config).eval(), 16)
    [make_image] = tokenizer.decode(torch.from_numpy(done.codes)[None])
    stride = CONFIG.vq_config.stride
    assert make_image.size == (size[1] * stride, size[0] * stride)


@pytest.fixture(scope="module")
def model(processor: Processor, transformer: Transformer) -> Chameleon:
    torch.manual_seed(0)
    tokenizer = ImageTokenizer(VQGAN(CONFIG.vq_config).eval(), 16)
    return Chameleon(transformer, tokenizer, processor, {"chameleon": lumina.SAMPLING})


@pytest.mark.parametrize("size", [(16, 16), (32, 8), (8, 32), (12, 20)])
def test_an_image_of_a_size_in_pixels(model: Chameleon, size: tuple[int, int]) -> None:
    """Through the engine, beside a request of the model's own size."""
    neighbour = model.request("a plum", "image", seed=2)
    handle = model.engine.add(neighbour)
    reply = model.generate("a pear", "image", seed=1, size=size)
    [make_image], [segment] = reply.images, reply.segments
    assert make_image.size == size and isinstance(segment, Image) and segment.codes is not None
    assert segment.codes.shape == (size[1] // 2, size[0] // 2), "2 pixels a code here"
    request = model.request("a pear", "image", seed=1, size=size)
    plain = [e for e in generate(model.transformer, model.processor, request)]
    [done] = [e for e in plain if isinstance(e, ImageDone)]
    assert np.array_equal(done.codes, segment.codes)
    assert plain[-1].usage == reply.usage  # type: ignore[union-attr]
    assert [e.codes.shape for e in handle if isinstance(e, ImageDone)] == [(8, 8)]


def test_images_of_several_sizes_in_one_chat(model: Chameleon) -> None:
    sizes = [(32, 8), (8, 32)]
    wide, tall = (model.generate("a pear", "image", seed=1, size=size) for size in sizes)
    assert [wide.images[0].size, tall.images[0].size] == sizes
    turns = [Message("user", "Draw."), wide.message, Message("user", "?")]
    request = model.request(turns, "text", seed=0)
    spelled = lumina.layout(4, 16).num_tokens
    assert (
        len(request.ids)
        == len(
            model.request(
                [Message("user", "Draw."), Message("assistant", ""), Message("user", "?")],
                "text",
                seed=0,
            ).ids
        )
        + spelled
    )
    reply = model.generate(turns, "image", seed=0, size=(8, 32), max_tokens=90)
    assert reply.images[0].size == (8, 32)
    with pytest.raises(ContextError, match="3 images take"):
        model.request([*wide.segments, *wide.segments, *tall.segments, "x" * 60], "text", seed=0)
    batch = model.generate_batch(["a pear", "a plum"], "image", seed=1, size=(32, 8))
    assert [image.size for r in batch for image in r.images] == [(32, 8)] * 2
    assert model.collect(model.stream("a pear", "image", seed=1, size=(32, 8))).images[0].size == (
        32,
        8,
    )


@pytest.mark.parametrize("size", [(14, 16), (16, 17), (64, 64), (16,), 16, "16x16"])
def test_an_impossible_size_names_the_possible_ones(model: Chameleon, size: Any) -> None:
    with pytest.raises(SettingError) as error:
        model.generate("a pear", "image", size=size)
    sentence = str(error.value)
    assert "is not a size of this model: give (width, height) as" in sentence
    assert "(16, 16)" in sentence and "(32, 8)" in sentence and "\n" not in sentence


def test_sizes_of_a_model_that_has_one(model: Chameleon, tmp_path: Path) -> None:
    plain = tiny_processor(tmp_path)
    square = Chameleon(tiny_transformer(plain), model.image_tokenizer, plain)
    reply = square.generate("a pear", "image", seed=1)
    assert square.generate("a pear", "image", seed=1, size=(16, 16)).images == reply.images
    with pytest.raises(SettingError, match=r"give \(width, height\) as \(16, 16\)$"):
        square.generate("a pear", "image", size=(32, 8))
    with pytest.raises(SettingError, match="output='text' has none"):
        square.generate("a pear", "text", size=(16, 16))


def test_the_image_only_branch_keeps_images_of_another_size(processor: Processor) -> None:
    vocabulary = processor.vocabulary
    shown = lumina.layout(4, 6).spell(np.zeros((4, 6), dtype=np.int64), vocabulary)
    text = processor.encode_text("a pear")
    history = [vocabulary.bos, *text, *shown, *text, vocabulary.begin_image]
    branch = guidance.condition_prompt("image_only", history, vocabulary, lumina.layout(8, 8))
    assert branch == [vocabulary.bos, *shown, vocabulary.begin_image]


def test_guidance_begins_at_the_image(processor: Processor) -> None:
    vocabulary, layout = processor.vocabulary, lumina.layout(4, 6)
    make_image = layout.spell(np.zeros((4, 6), dtype=np.int64), vocabulary)
    text = processor.encode_text("a pear")
    history = [vocabulary.bos, *text, *make_image, *text, vocabulary.begin_image]

    def prompt(condition: guidance.Condition) -> list[int]:
        return guidance.condition_prompt(condition, history, vocabulary, layout)

    assert prompt("full") == history
    assert prompt("unconditional") == [vocabulary.begin_image]
    assert prompt("image_only") == [vocabulary.bos, *make_image, vocabulary.begin_image]
    sampling = SamplingParams().resolved({"chameleon": lumina.SAMPLING})
    text_weight, image_weight = sampling.guidance_text, sampling.guidance_image
    assert text_weight is not None and image_weight is not None
    for has_images in (False, True):
        names = guidance.needed_conditions(text_weight, image_weight, has_images)
        assert names == ("full", "unconditional")
    conditional, alone = torch.randn(2, 9)
    mixed = guidance.combine_needed(
        {"full": conditional, "unconditional": alone}, text_weight, image_weight
    )
    torch.testing.assert_close(mixed, alone + 3.0 * (conditional - alone))


@torch.no_grad()
def test_a_guided_image_equals_plain_forwards(
    processor: Processor, transformer: Transformer, tmp_path: Path
) -> None:
    """Greedy, through the transformers face: both contexts read again for every token."""
    from earlyfusion.hf import ChameleonForConditionalGeneration

    torch.manual_seed(0)
    text = processor.tokenizer_file.read_text()
    ends = {"eos_token_id": 2, "pad_token_id": 1, "bos_token_id": 0}
    save_hf(tmp_path, transformer, VQGAN(CONFIG.vq_config), text, ends)
    config = json.loads((tmp_path / "config.json").read_text()) | {lumina.CONFIG_KEY: lumina.FAMILY}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model: Any = ChameleonForConditionalGeneration.from_pretrained(tmp_path).eval()
    vocabulary, layout = processor.vocabulary, lumina.layout(8)
    prompt = [vocabulary.bos, *processor.encode_text("a pear"), vocabulary.end_of_turn]
    settings = {"guidance_text": 3.0, "guidance_image": 3.0, "do_sample": False}
    out = model.generate(
        torch.tensor([prompt]), multimodal_generation_mode="image-only", **settings
    )
    expected: list[int] = []
    codes = vocabulary.image_tokens
    for slot in layout.template(vocabulary).tolist():
        if slot >= 0:
            expected.append(slot)
            continue
        full, alone = (transformer(torch.tensor([row + expected]))[0, -1] for row in (prompt, []))
        guided = alone + 3.0 * (full - alone)
        expected.append(int(codes[int(guided[codes].argmax())]))
    assert out[0, len(prompt) :].tolist() == expected


@pytest.fixture(scope="module")
def folder(
    processor: Processor,
    transformer: Transformer,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    folder = tmp_path_factory.mktemp("lumina_folder")
    torch.manual_seed(0)
    ends = {"eos_token_id": 2, "pad_token_id": 1, "bos_token_id": 0}
    text = processor.tokenizer_file.read_text()
    save_hf(folder, transformer, VQGAN(CONFIG.vq_config), text, ends)
    config = json.loads((folder / "config.json").read_text()) | {lumina.CONFIG_KEY: lumina.FAMILY}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def hf(folder: Path) -> Any:
    from earlyfusion.hf import ChameleonProcessor

    return ChameleonProcessor.from_pretrained(folder)


@pytest.fixture(scope="module")
def hf_model(folder: Path) -> Any:
    from earlyfusion.hf import ChameleonForConditionalGeneration

    return ChameleonForConditionalGeneration.from_pretrained(folder).eval()


def make_image(seed: int, width: int, height: int) -> PIL.Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return PIL.Image.fromarray(values)


def test_squares_in_transformers_equal_the_package_s_own(
    hf: Any, hf_model: Any, processor: Processor
) -> None:
    photo = make_image(0, 40, 30)
    inputs = hf(images=[photo], text="What is <image> this?", return_mm_token_type_ids=True)
    ids = hf_model.fill_image_tokens(inputs["input_ids"], inputs["pixel_values"])[0].tolist()
    codes = (
        ImageTokenizer(hf_model.model.vqmodel.core, CONFIG.vq_config.resolution)
        .encode([photo])
        .numpy()
    )
    parts: list[Any] = [Text("What is "), photo, Text(" this?")]
    assert ids == processor.encode([Message("user", parts)], list(codes)).ids
    assert inputs["mm_token_type_ids"].sum() == processor.layout.num_tokens
    assert hf._get_num_multimodal_tokens([(30, 40)])["num_image_tokens"] == [
        processor.layout.num_tokens
    ]


@pytest.mark.parametrize("backend", ["pil", "torchvision"])
@pytest.mark.parametrize("size", [(8, 16), (16, 8), (12, 12), (16, 16)])
def test_several_sizes_in_transformers(
    folder: Path,
    hf_model: Any,
    processor: Processor,
    size: tuple[int, int],
    backend: str,
) -> None:
    """Pixels of the size, the centre of the image, and its own size tokens and line ends."""
    from earlyfusion.hf import ChameleonProcessor

    hf = ChameleonProcessor.from_pretrained(folder, backend=backend)
    photos = [make_image(0, 40, 30), make_image(1, 17, 50)]
    expected = {"height": size[0], "width": size[1]}
    inputs = hf(images=photos, text="<image> and <image>", size=expected)
    assert inputs["pixel_values"].shape == (2, 3, *size)
    ids = hf_model.fill_image_tokens(inputs["input_ids"], inputs["pixel_values"])[0].tolist()
    height, width = size[0] // CONFIG.vq_config.stride, size[1] // CONFIG.vq_config.stride
    codes = hf_model.model.vqmodel.core.encode(inputs["pixel_values"]).numpy()
    parts: list[Any] = [Image(codes=codes[0]), Text(" and "), Image(codes=codes[1])]
    other = Processor(processor.tokenizer_file, lumina.layout(height, width))
    spelled = other.encode([Message("user", parts)])
    assert ids == spelled.ids
    second = hf.post_process_multimodal_output([ids], generation_mode="interleaved")[0]
    assert [getattr(part, "text", None) for part in second] == [None, "and", None]
    assert np.array_equal(second[2].codes, codes[1])


def test_the_middle_is_kept_undistorted(hf: Any) -> None:
    """An image twice as wide as high, cut to a square and to its own shape."""
    photo = make_image(0, 32, 16)
    exact = hf(images=photo, text="<image>", size={"height": 16, "width": 32})["pixel_values"]
    levels = ((exact[0].permute(1, 2, 0).double() + 1) / 2 * 255).round().numpy()
    assert np.array_equal(levels, np.asarray(photo))
    square = hf(images=photo, text="<image>", size={"height": 16, "width": 16})["pixel_values"]
    assert torch.equal(square, exact[..., 8:24])


def test_the_transformers_processor_saved_and_loaded(hf: Any, tmp_path: Path) -> None:
    from earlyfusion.hf import ChameleonProcessor

    hf.save_pretrained(tmp_path)
    reloaded = ChameleonProcessor.from_pretrained(tmp_path)
    assert reloaded.image_layout == "lumina"
    inputs = {"images": make_image(0, 40, 30), "text": "a <image>"}
    assert torch.equal(reloaded(**inputs)["input_ids"], hf(**inputs)["input_ids"])


def test_sizes_without_tokens_are_refused(hf: Any) -> None:
    photo = make_image(0, 40, 30)
    with pytest.raises(
        SettingError, match=r"size=10x16 .* has no size tokens: give multiples of 4"
    ):
        hf(images=photo, text="<image>", size={"height": 10, "width": 16})
    with pytest.raises(PromptError, match="truncation kept"):
        hf(images=photo, text="<image>", truncation=True, max_length=20)


def test_an_image_cut_short_is_left_out(hf: Any) -> None:
    ids = hf(images=make_image(0, 40, 30), text="a <image>")["input_ids"][0].tolist()
    begin = ids.index(hf.image_start_token_id)
    for end in (begin + 1, begin + 2, begin + 9):
        parts = hf.post_process_multimodal_output([ids[:end]], generation_mode="interleaved")[0]
        assert [part.text for part in parts][:1] == ["a"]
        assert all(isinstance(part, Text) for part in parts)
