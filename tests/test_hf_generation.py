"""Generating with the transformers classes: modes, guidance, processor and Auto classes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import PIL.Image
import pytest
import torch
import transformers
from test_hf_caches import waits
from tiny import CONFIG, tiny_processor, tiny_transformer
from torch import Tensor

from earlyfusion.checkpoints.assemble import LoadedModel
from earlyfusion.checkpoints.detect import load
from earlyfusion.checkpoints.hf import save_hf
from earlyfusion.content import Image, Message, Text, as_messages
from earlyfusion.errors import ContextError, PromptError, SettingError
from earlyfusion.generation.reference import generate_tokens
from earlyfusion.generation.request import Request
from earlyfusion.generation.settings import SamplingParams
from earlyfusion.hf import (
    ChameleonForConditionalGeneration,
    ChameleonImageProcessor,
    ChameleonImageProcessorPil,
    ChameleonProcessor,
)
from earlyfusion.image_tokenizer import ImageTokenizer
from earlyfusion.model.vqgan import VQGAN
from earlyfusion.processor import Processor

GREEDY = SamplingParams(
    temperature=0, image_temperature=0, repetition_penalty=1, guidance_text=1, guidance_image=1
)
IMAGE_TOKENS = CONFIG.vq_config.grid**2 + 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    """A checkpoint of the package itself, with a decoder."""
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("model")
    processor = tiny_processor(source)
    torch.manual_seed(0)
    vqgan = VQGAN(CONFIG.vq_config).eval()
    text = (source / "tokenizer.json").read_text()
    ends = {"eos_token_id": 2, "pad_token_id": 1, "bos_token_id": 0}
    save_hf(folder, tiny_transformer(processor, begin_image=0.5), vqgan, text, ends)
    return folder


@pytest.fixture(scope="module")
def model(folder: Path, device: torch.device) -> Any:
    return ChameleonForConditionalGeneration.from_pretrained(folder).eval().to(device)


@pytest.fixture(scope="module")
def processor(folder: Path) -> Any:
    return ChameleonProcessor.from_pretrained(folder)


@pytest.fixture(scope="module")
def loaded(folder: Path, device: torch.device) -> LoadedModel:
    return load(folder, device)


@pytest.fixture(scope="module")
def own(loaded: LoadedModel) -> Processor:
    return loaded.processor


def make_image(seed: int, size: tuple[int, int] = (40, 30)) -> PIL.Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return PIL.Image.fromarray(values)


def reference(
    loaded: LoadedModel, ids: list[int], output: Any, max_tokens: int, text: float, image: float
) -> list[int]:
    """The same request through the package's own loop."""
    sampling = replace(GREEDY, seed=0, guidance_text=text, guidance_image=image).resolved({})
    images = 1 if output == "image" else max_tokens // IMAGE_TOKENS
    request = Request(ids, output, sampling, images, max_tokens)
    return list(generate_tokens(loaded.transformer, loaded.processor, request))


def new_tokens(out: Tensor, inputs: Any, row: int = 0) -> list[int]:
    return [int(t) for t in out[row, inputs["input_ids"].shape[1] :]]


class TestModes:
    @pytest.mark.parametrize(
        ("mode", "text", "image"),
        [
            ("text-only", 1.0, 1.0),
            ("image-only", 1.0, 1.0),
            ("image-only", 3.0, 1.0),
            ("image-only", 1.5, 2.0),
            ("interleaved-text-image", 1.0, 1.0),
            ("interleaved-text-image", 1.5, 2.0),
        ],
    )
    def test_equal_to_the_reference_loop(
        self, model: Any, loaded: LoadedModel, processor: Any, mode: Any, text: float, image: float
    ) -> None:
        inputs = processor(images=[make_image(1)], text="What is this? <image>").to(model.device)
        ids = model.fill_image_tokens(inputs["input_ids"], inputs["pixel_values"])[0].tolist()
        max_tokens = 40 if mode == "text-only" else IMAGE_TOKENS + 30
        out = model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=max_tokens,
            multimodal_generation_mode=mode,
            guidance_text=text,
            guidance_image=image,
        )
        output = {"image-only": "image", "text-only": "text"}.get(mode, "interleaved")
        expected = reference(loaded, ids, output, max_tokens, text, image)
        generated = new_tokens(out, inputs)
        assert generated[: len(expected)] == expected
        assert set(generated[len(expected) :]) <= {loaded.processor.vocabulary.eos}
        assert out[0, : len(ids)].tolist() == ids

    def test_images_that_were_encoded_before(self, model: Any, processor: Any) -> None:
        inputs = processor(images=[make_image(1)], text="What is this? <image>").to(model.device)
        how = {"multimodal_generation_mode": "image-only", "do_sample": False}
        how |= {"guidance_text": 1.5, "guidance_image": 2.0}
        expected = model.generate(**inputs, **how)
        features = model.get_image_features(inputs["pixel_values"])
        encoded = {"mm_encoder_outputs": {"image": features}}
        with pytest.raises(PromptError, match="give the images once"):
            model.generate(**inputs, **encoded, **how)
        del inputs["pixel_values"]
        assert torch.equal(model.generate(**inputs, **encoded, **how), expected)

    def test_image_only_is_one_whole_image(self, model: Any, processor: Any) -> None:
        inputs = processor(text=["Draw a pear.", "Draw a red apple, please."], padding=True)
        inputs = inputs.to(model.device)
        out = model.generate(**inputs, do_sample=True, generation_mode="image", guidance_text=2.0)
        assert out.shape[1] == inputs["input_ids"].shape[1] + IMAGE_TOKENS
        pixels = model.decode_image_tokens(out)
        images = processor.post_process_multimodal_output(pixels, generation_mode="image")
        assert [p.size for p in images] == [(16, 16)] * 2
        segments = processor.post_process_multimodal_output(
            out[:, inputs["input_ids"].shape[1] :], generation_mode="interleaved"
        )
        assert [[type(s) for s in row] for row in segments] == [[Image], [Image]]
        tokenizer = ImageTokenizer(model.model.vqmodel.core, 16)
        codes = torch.from_numpy(np.stack([row[0].codes for row in segments]))
        assert [p.tobytes() for p in tokenizer.decode(codes)] == [p.tobytes() for p in images]

    def test_rows_of_a_batch_equal_single_rows(self, model: Any, processor: Any) -> None:
        texts = ["Draw a pear.", "What is this? This is a pear. Draw a red apple, please."]
        settings = {
            "do_sample": False,
            "multimodal_generation_mode": "interleaved-text-image",
            "max_new_tokens": IMAGE_TOKENS + 10,
            "guidance_text": 2.0,
            "guidance_image": 1.5,
        }
        both = processor(text=texts, padding=True, padding_side="left").to(model.device)
        out = model.generate(**both, **settings)
        for row, text in enumerate(texts):
            single = processor(text=text).to(model.device)
            alone = new_tokens(model.generate(**single, **settings), single)
            assert new_tokens(out, both, row)[: len(alone)] == alone

    @pytest.mark.parametrize(
        "how", [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 3}]
    )
    def test_searches_obey_the_grammar(
        self, model: Any, own: Processor, processor: Any, how: dict[str, Any]
    ) -> None:
        inputs = processor(text="Draw a pear.").to(model.device)
        out = model.generate(
            **inputs,
            **({"do_sample": False} | how),
            max_new_tokens=IMAGE_TOKENS + 8,
            multimodal_generation_mode="interleaved-text-image",
        )
        vocabulary = own.vocabulary
        for row in range(len(out)):
            generated = new_tokens(out, inputs, row)
            begins = [i for i, token in enumerate(generated) if token == vocabulary.begin_image]
            for at in begins:
                own.layout.parse(generated[at : at + IMAGE_TOKENS], vocabulary)
            inside = {i for at in begins for i in range(at, at + IMAGE_TOKENS)}
            outside = {t for i, t in enumerate(generated) if i not in inside}
            allowed = {*vocabulary.text_tokens.tolist(), vocabulary.eos, vocabulary.pad}
            assert outside <= allowed

    @pytest.mark.parametrize("mode", ["text-only", "image-only", "interleaved-text-image"])
    @pytest.mark.filterwarnings("ignore")  # transformers' own, about its configs
    def test_assisted_is_as_without(
        self, model: Any, folder: Path, processor: Any, mode: str, device: torch.device
    ) -> None:
        inputs = processor(text="Draw a pear.").to(device)
        helper = ChameleonForConditionalGeneration.from_pretrained(folder).eval().to(device)
        torch.nn.init.normal_(helper.model.layers[-1].mlp.down_proj.weight)
        how = {"multimodal_generation_mode": mode, "max_new_tokens": IMAGE_TOKENS + 8}
        expected = model.generate(**inputs, **how, do_sample=False)
        for way in ({"assistant_model": helper}, {"prompt_lookup_num_tokens": 3}):
            result = model.generate(**inputs, **how, **way, do_sample=False)
            assert torch.equal(result, expected)
            with pytest.raises(SettingError, match="guidance does not work with assisted"):
                model.generate(**inputs, **how, **way, guidance_text=3.0)
        model.generate(**inputs, **how, assistant_model=helper, do_sample=True)

    def test_the_grammar_adds_no_wait_where_rows_stay(self, model: Any) -> None:
        """Each wait is an idle GPU; transformers' own loop has one per token."""
        how = {"multimodal_generation_mode": "text-only", "do_sample": False, "eos_token_id": -1}
        assert waits(model, 9, **how) - waits(model, 1, **how) == 8
        beams = how | {"num_beams": 2}
        assert waits(model, 9, **beams) - waits(model, 1, **beams) > 8

    def test_guidance_reads_no_numbers_one_by_one(self, model: Any) -> None:
        how = {"multimodal_generation_mode": "image-only", "do_sample": False}
        plain = waits(model, IMAGE_TOKENS, **how)
        guided = waits(model, IMAGE_TOKENS, **how, guidance_text=3.0)
        assert guided == plain < 2 * IMAGE_TOKENS

    @pytest.mark.parametrize("name", ["suppress_tokens", "begin_suppress_tokens", "bad_words_ids"])
    @pytest.mark.parametrize("where", ["call", "config"])
    def test_an_image_that_may_not_begin(
        self, model: Any, processor: Any, own: Processor, name: str, where: str
    ) -> None:
        inputs, begin = processor(text="Draw a pear.").to(model.device), own.vocabulary.begin_image
        given: dict[str, Any] = {name: [[begin]] if name == "bad_words_ids" else [begin]}
        if where == "config":
            ends = {"pad_token_id": 1, "eos_token_id": 2}
            given = {"generation_config": transformers.GenerationConfig(**given, **ends)}
        with pytest.raises(SettingError, match=f"forbid token {begin}, which begins an image"):
            model.generate(**inputs, **given, multimodal_generation_mode="image-only")
        how = {"multimodal_generation_mode": "interleaved-text-image", "do_sample": False}
        out = model.generate(**inputs, **given, **how, max_new_tokens=IMAGE_TOKENS + 8)
        assert name == "begin_suppress_tokens" or begin not in new_tokens(out, inputs)

    @pytest.mark.parametrize("mode", ["image-only", "interleaved-text-image"])
    def test_an_image_without_a_possible_code(
        self, model: Any, processor: Any, own: Processor, mode: str
    ) -> None:
        inputs, vocabulary = processor(text="Draw a pear.").to(model.device), own.vocabulary
        codes = vocabulary.image_tokens.tolist()
        how = {"multimodal_generation_mode": mode, "max_new_tokens": IMAGE_TOKENS + 8}
        with pytest.raises(SettingError, match="forbid all tokens of an image"):
            model.generate(**inputs, **how, suppress_tokens=codes)
        out = model.generate(**inputs, **how, suppress_tokens=codes[:-1])
        assert set(new_tokens(out, inputs)).isdisjoint(codes[:-1])

    def test_what_the_grammar_forces_comes(
        self, model: Any, processor: Any, own: Processor
    ) -> None:
        inputs, vocabulary = processor(text="Draw a pear.").to(model.device), own.vocabulary
        how = {"multimodal_generation_mode": "image-only", "do_sample": False}
        expected = model.generate(**inputs, **how)
        ends = [vocabulary.end_image, vocabulary.eos]
        for more in ({"suppress_tokens": ends}, {"bad_words_ids": [[end] for end in ends]}):
            assert torch.equal(model.generate(**inputs, **how, **more), expected)
            longer = model.generate(**inputs, **how, **more, max_new_tokens=IMAGE_TOKENS + 8)
            assert new_tokens(longer, inputs) == [*new_tokens(expected, inputs), vocabulary.eos]

    @pytest.mark.parametrize("mode", ["text-only", "image-only", "interleaved-text-image"])
    def test_processors_that_leave_no_token(self, model: Any, processor: Any, mode: str) -> None:
        inputs = processor(text="Draw a pear.").to(model.device)
        how = {"multimodal_generation_mode": mode, "max_new_tokens": IMAGE_TOKENS}
        with pytest.raises(SettingError, match=r"left no token that .* output may hold"):
            model.generate(**inputs, **how, prefix_allowed_tokens_fn=lambda row, ids: [1])

    def test_default_generates_no_image_tokens(
        self, model: Any, own: Processor, processor: Any
    ) -> None:
        inputs = processor(text="Draw a pear.").to(model.device)
        generated = {}
        for mode in (None, "free"):
            torch.manual_seed(0)
            out = model.generate(
                **inputs,
                do_sample=True,
                temperature=5.0,
                max_new_tokens=60,
                eos_token_id=None,
                multimodal_generation_mode=mode,
            )
            generated[mode] = set(new_tokens(out, inputs)) & set(
                own.vocabulary.image_tokens.tolist()
            )
        assert not generated[None]
        assert generated["free"]

    def test_mode_of_the_generation_config(self, model: Any, processor: Any) -> None:
        inputs = processor(text="Draw a pear.").to(model.device)
        config = transformers.GenerationConfig(do_sample=False, pad_token_id=1, eos_token_id=2)
        config.multimodal_generation_mode = "image-only"
        out = model.generate(**inputs, generation_config=config)
        assert len(new_tokens(out, inputs)) == IMAGE_TOKENS

    @pytest.mark.parametrize("where", ["argument", "model"])
    def test_limits_and_ends_of_the_generation_config(
        self, model: Any, processor: Any, where: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        inputs = processor(text="Draw a pear.").to(model.device)
        how: dict[str, Any] = {"multimodal_generation_mode": "text-only", "do_sample": False}

        def generated(**settings: Any) -> list[int]:
            config = transformers.GenerationConfig(
                **{"pad_token_id": 1, "eos_token_id": 2} | settings
            )
            if where == "argument":
                return new_tokens(model.generate(**inputs, generation_config=config, **how), inputs)
            monkeypatch.setattr(model, "generation_config", config)
            return new_tokens(model.generate(**inputs, **how), inputs)

        free = generated(max_new_tokens=6)
        assert len(free) == 6
        assert generated(max_length=inputs["input_ids"].shape[1] + 4) == free[:4]
        assert generated(max_new_tokens=6, eos_token_id=[2, free[2]])[:3] == free[:3]
        assert generated(max_new_tokens=6, eos_token_id=np.int64(free[2]))[:3] == free[:3]
        monkeypatch.setattr(model.generation_config, "eos_token_id", [2, free[2]])
        limits = transformers.GenerationConfig(max_new_tokens=6)  # without ends of its own
        out = model.generate(**inputs, generation_config=limits, **how)
        assert new_tokens(out, inputs) == free[:3]
        how |= {"multimodal_generation_mode": "image-only"}
        assert len(generated(max_new_tokens=6)) == IMAGE_TOKENS  # such a limit is meant for text
        how |= {"guidance_text": 3.0}
        with pytest.raises(SettingError, match="set num_beams=1"):
            generated(num_beams=2)

    @pytest.mark.parametrize(
        ("settings", "error", "sentence"),
        [
            ({"multimodal_generation_mode": "pictures"}, SettingError, "'pictures' is unknown"),
            ({"generation_mode": "audio"}, SettingError, "'audio' is unknown"),
            ({"guidance_text": 3.0}, SettingError, "need a mode with images"),
            ({"guidance_text": "3"}, SettingError, "guidance_text='3' is not possible"),
            ({"guidance_image": float("nan")}, SettingError, "guidance_image=nan is not possible"),
            ({"max_images": -1}, SettingError, "max_images=-1 is not possible"),
            (
                {"multimodal_generation_mode": "image-only", "max_new_tokens": 9},
                SettingError,
                "leave no room for an image of 66 tokens",
            ),
            (
                {"multimodal_generation_mode": "image-only", "max_new_tokens": 99}
                | {"min_new_tokens": 67, "do_sample": True},
                SettingError,
                "67 new tokens are more than an image, which has 66",
            ),
            (
                {"multimodal_generation_mode": "text-only", "max_length": 2},
                SettingError,
                "leaves no room for a new one: raise max_length",
            ),
            (
                {"multimodal_generation_mode": "image-only", "guidance_text": 3.0, "num_beams": 2},
                SettingError,
                "set num_beams=1",
            ),
            (
                {"multimodal_generation_mode": "text-only", "max_new_tokens": 999},
                ContextError,
                "context of 256",
            ),
        ],
    )
    def test_wrong_settings_are_sentences(
        self, model: Any, processor: Any, settings: dict[str, Any], error: Any, sentence: str
    ) -> None:
        with pytest.raises(error, match=sentence):
            model.generate(**processor(text="Draw a pear.").to(model.device), **settings)


class TestProcessor:
    @pytest.mark.parametrize("text", [[], 5, ["a", 5]])
    def test_what_is_no_text(self, processor: Any, text: Any) -> None:
        with pytest.raises(PromptError, match="a text must be a string or a list of strings"):
            processor(text=text)

    def test_ids_equal_the_packages_own(self, processor: Any, own: Processor, model: Any) -> None:
        images = [make_image(1), make_image(2)]
        text = "What is <image> this? <image>"
        inputs = processor(images=images, text=text).to(model.device)
        ids = model.fill_image_tokens(inputs["input_ids"], inputs["pixel_values"])
        tokenizer = ImageTokenizer(model.model.vqmodel.core, 16)
        parts = [Text("What is "), images[0], Text(" this? "), images[1]]
        expected = own.encode(
            [Message("user", parts)], list(tokenizer.encode(images).cpu().numpy())
        )
        assert ids[0].tolist() == expected.ids

    def test_completion_padding_and_types(self, processor: Any, own: Processor) -> None:
        sep, pad = own.vocabulary.end_of_turn, own.vocabulary.pad
        open_ended = processor(text="a pear", return_for_text_completion=True)["input_ids"]
        nested = processor(text="a pear", text_kwargs={"return_for_text_completion": True})
        assert sep not in open_ended
        assert torch.equal(open_ended, nested["input_ids"])
        batch = processor(
            images=[[make_image(1)], [make_image(2), make_image(3)]],
            text=["a <image>", "<image> red <image>"],
            padding=True,
            padding_side="left",
            return_mm_token_type_ids=True,
        )
        assert batch["input_ids"][:, -1].tolist() == [sep, sep]
        assert batch["input_ids"][0, 0] == pad
        assert batch["attention_mask"][0, 0] == 0
        assert batch["mm_token_type_ids"].sum(1).tolist() == [IMAGE_TOKENS, 2 * IMAGE_TOKENS]
        assert batch["pixel_values"].shape == (3, 3, 16, 16)
        with pytest.raises(ValueError, match="padding"):
            processor(text=["a", "a red pear"])

    @pytest.mark.parametrize(
        ("arguments", "sentence"),
        [
            ({"text": "<image>"}, "<image> tokens in the prompts .* there are 1 and 0"),
            ({"text": "a", "images": [0]}, "<image> tokens in the prompts .* are 0 and 1"),
            ({}, "pass a text, images, or both"),
            ({"text": [3]}, "list of strings"),
            (
                {"text": "<image>", "images": [0], "truncation": True, "max_length": 20},
                "truncation kept 1",
            ),
        ],
    )
    def test_wrong_inputs_are_sentences(
        self, processor: Any, arguments: dict[str, Any], sentence: str
    ) -> None:
        if "images" in arguments:
            arguments = arguments | {"images": [make_image(1)]}
        with pytest.raises(PromptError, match=sentence):
            processor(**arguments)

    @pytest.mark.parametrize(
        "settings",
        [
            {"padding": "max_length", "max_length": 80},
            {"text_kwargs": {"padding": "max_length", "max_length": 80}},
            {"padding": "max_length", "text_kwargs": {"max_length": 80}},
            {"common_kwargs": {"padding": "max_length", "max_length": 80}},
        ],
        ids=["flat", "by modality", "mixed", "common"],
    )
    @pytest.mark.parametrize(
        "pictures",
        [{"do_normalize": False}, {"images_kwargs": {"do_normalize": False}}],
        ids=["flat", "by modality"],
    )
    def test_arguments_in_each_form(
        self, processor: Any, settings: dict[str, Any], pictures: dict[str, Any]
    ) -> None:
        if "common_kwargs" in settings:
            settings = {"text_kwargs": settings["common_kwargs"], "common_kwargs": {}}
        inputs = processor(images=make_image(1), text="a <image>", **settings, **pictures)
        assert inputs["input_ids"].shape == (1, 80)
        assert inputs["pixel_values"].min() >= 0 and inputs["pixel_values"].max() > 1

    def test_common_arguments_reach_both_parts(self, processor: Any) -> None:
        common = {"common_kwargs": {"return_tensors": "np"}}
        for more in (common, {"return_tensors": "np"}):
            inputs = processor(images=make_image(1), text="a <image>", text_kwargs={}, **more)
            assert all(isinstance(value, np.ndarray) for value in inputs.values())

    @pytest.mark.parametrize(
        "twice",
        [
            {"padding": True, "text_kwargs": {"padding": False}},
            {"do_resize": True, "images_kwargs": {"do_resize": True}},
            {
                "return_mm_token_type_ids": True,
                "text_kwargs": {"return_mm_token_type_ids": False},
            },
        ],
    )
    def test_an_argument_given_twice(self, processor: Any, twice: dict[str, Any]) -> None:
        with pytest.raises(SettingError, match="is given twice"):
            processor(images=make_image(1), text="a <image>", **twice)

    def test_an_argument_of_a_wrong_type_or_unknown(self, processor: Any) -> None:
        with pytest.raises(Exception, match="do_resize"):
            processor(images=make_image(1), text="a <image>", do_resize="yes")
        plain = processor(text="a")["input_ids"]
        assert torch.equal(processor(text="a", colour=1)["input_ids"], plain)

    def test_the_tokenizer_s_own_settings_hold(self, folder: Path, processor: Any) -> None:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            folder, padding="max_length", max_length=90, padding_side="left"
        )
        custom = ChameleonProcessor(processor.image_processor, tokenizer, image_seq_length=64)
        inputs = custom(images=make_image(1), text="a <image>")
        assert inputs["input_ids"].shape == (1, 90)
        assert inputs["attention_mask"][0, 0] == 0 and inputs["attention_mask"][0, -1] == 1
        assert custom(text="a", padding=False)["input_ids"].shape[1] < 90

    @pytest.mark.parametrize("mark", ["<image>", "<reserved08707>"])
    def test_replacement_offsets(self, processor: Any, mark: str) -> None:
        texts = [f"a {mark} and {mark}.", "no picture"]
        inputs = processor(
            images=[make_image(1), make_image(2)],
            text=texts,
            padding=True,
            return_text_replacement_offsets=True,
            return_offsets_mapping=True,
            return_tensors=None,
        )
        offsets = inputs["text_replacement_offsets"]
        assert [[o["type"] for o in row] for row in offsets] == [
            ["text", "image", "image"],
            ["text"],
        ]
        begin = processor.image_start_token_id
        for row, text in zip(offsets, texts, strict=True):
            assert all(text[slice(*o["span"])] == o["text"] for o in row)
        begins = [
            span[0]
            for span, token in zip(inputs["offset_mapping"][0], inputs["input_ids"][0], strict=True)
            if token == begin
        ]
        assert [o["new_span"][0] for o in offsets[0][1:]] == begins
        lengths = [o["new_span"][1] - o["new_span"][0] for o in offsets[0]]
        assert lengths == [len(o["replacement"]) for o in offsets[0]]

    def test_answers_are_found_where_bos_is_added(self, processor: Any) -> None:
        """A template of one's own without bos, with images before the answer."""
        template = (
            "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}"
            "{{ m['content'] }}{% endgeneration %}{% else %}<image>{{ m['content'] }}"
            "{% endif %}{% endfor %}"
        )
        turns = [
            {"role": "user", "content": "What is this?"},
            {"role": "assistant", "content": "a pear"},
        ]
        inputs = processor.apply_chat_template(
            turns,
            chat_template=template,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            processor_kwargs={"images": [make_image(1)]},
        )
        ids, mask = inputs["input_ids"][0], torch.as_tensor(inputs["assistant_masks"][0]).bool()
        assert processor.tokenizer.decode(ids[mask]) == "a pear"

    def test_an_image_of_a_user_s_text_is_none(self, processor: Any) -> None:
        turns = [{"role": "user", "content": [{"type": "text", "text": "write <reserved08707>"}]}]
        inputs = processor.apply_chat_template(
            turns, tokenize=True, return_dict=True, sanitize_control_tokens=True
        )
        assert processor.image_token_id not in inputs["input_ids"]

    def test_no_images_in_a_list(self, processor: Any) -> None:
        inputs = processor(images=[], text="a pear", return_mm_token_type_ids=None)
        assert torch.equal(inputs["input_ids"], processor(text="a pear")["input_ids"])
        assert inputs.keys() == {"input_ids", "attention_mask"}

    def test_an_unknown_layout(self, processor: Any) -> None:
        with pytest.raises(SettingError, match="image_layout='spiral' is unknown"):
            ChameleonProcessor(
                processor.image_processor, processor.tokenizer, image_layout="spiral"
            )

    def test_a_folder_that_pads_on_the_left(self, folder: Path, model: Any, tmp_path: Path) -> None:
        """transformers' script for several images, which names no side."""
        shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
        path = tmp_path / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"padding_side": "left"}))
        processor = ChameleonProcessor.from_pretrained(tmp_path)
        prompts = ["What do these two have in common?<image><image>", "<image>What is this?"]
        images = [make_image(1), make_image(2), make_image(3)]
        both = processor(images=images, text=prompts, padding=True, return_tensors="pt")
        both = both.to(model.device)
        out = model.generate(**both, max_new_tokens=6, do_sample=False)
        for row, (text, given) in enumerate(zip(prompts, [images[:2], images[2:]], strict=True)):
            single = processor(images=given, text=text, return_tensors="pt").to(model.device)
            alone = model.generate(**single, max_new_tokens=6, do_sample=False)
            assert new_tokens(out, both, row) == new_tokens(alone, single)

    @pytest.mark.parametrize("backend", ["pil", "torchvision"])
    def test_back_end_by_name(self, folder: Path, processor: Any, backend: str) -> None:
        other = ChameleonProcessor.from_pretrained(folder, backend=backend)
        expected = {"pil": ChameleonImageProcessorPil, "torchvision": ChameleonImageProcessor}
        assert type(other.image_processor) is expected[backend]
        inputs = {"images": [make_image(1)], "text": "What is <image>?"}
        assert torch.equal(other(**inputs)["pixel_values"], processor(**inputs)["pixel_values"])
        with pytest.raises(SettingError, match="backend='gpu' is unknown"):
            ChameleonProcessor.from_pretrained(folder, backend="gpu")

    def test_chat_template(self, processor: Any) -> None:
        turns = [
            {
                "role": "user",
                "content": [
                    {"type": "image", "image": make_image(1)},
                    {"type": "text", "text": "What is this?"},
                ],
            },
            {"role": "assistant", "content": [{"type": "text", "text": "a pear"}]},
            {"role": "user", "content": [{"type": "text", "text": "Draw a red apple."}]},
        ]
        inputs = processor.apply_chat_template(turns, tokenize=True, return_dict=True)
        sep = "<reserved08706>"
        written = f"<s><image>What is this?{sep}a pear{sep}Draw a red apple.{sep}"
        assert processor.apply_chat_template(turns) == written
        assert torch.equal(
            torch.as_tensor(inputs["input_ids"]),
            processor(images=[make_image(1)], text=written)["input_ids"],
        )
        assert inputs["pixel_values"].shape == (1, 3, 16, 16)

    @pytest.mark.parametrize(
        "roles",
        [
            ["system", "user"],
            ["user", "system"],
            ["system", "system", "user", "assistant", "system", "user"],
            ["system"],
        ],
    )
    def test_system_messages_are_part_of_the_user_s_turn(
        self, processor: Any, own: Processor, roles: list[str]
    ) -> None:
        turns = [{"role": role, "content": f"a pear {n}"} for n, role in enumerate(roles)]
        inputs = processor.apply_chat_template(turns, tokenize=True, return_dict=True)
        assert inputs["input_ids"][0].tolist() == own.encode(as_messages(turns)).ids

    def test_chat_template_refuses_what_it_cannot_say(self, processor: Any) -> None:
        film = [{"type": "video", "path": "a.mp4"}]
        for role, content, sentence in (
            ("user", film, "a part of type video is unknown"),
            ("tool", "3", "role tool is unknown"),
        ):
            turns = [{"role": role, "content": content}, {"role": "user", "content": "Hi"}]
            with pytest.raises(jinja2.TemplateError, match=sentence):
                processor.apply_chat_template(turns)

    def test_save_and_load(self, processor: Any, tmp_path: Path) -> None:
        processor.save_pretrained(tmp_path)
        reloaded = ChameleonProcessor.from_pretrained(tmp_path)
        assert isinstance(
            reloaded.image_processor, ChameleonImageProcessor | ChameleonImageProcessorPil
        )
        inputs = {"images": [make_image(1)], "text": "What is <image>?"}
        for name, value in processor(**inputs).items():
            assert torch.equal(value, reloaded(**inputs)[name])

    @pytest.mark.parametrize("shape", [(3, 8, 8), (1, 1, 8, 8), (1, 8, 8, 3)])
    def test_pixels_of_another_shape(self, processor: Any, shape: tuple[int, ...]) -> None:
        with pytest.raises(SettingError, match=r"images have shape \[n, 3, height, width\]"):
            processor.post_process_multimodal_output(torch.zeros(shape), generation_mode="image")

    def test_texts_of_ids(self, processor: Any, model: Any, own: Processor) -> None:
        codes = np.zeros((8, 8), dtype=np.int64)
        parts: list[Any] = [Text("a pear"), Image(codes=codes), Text("a red apple")]
        ids = torch.tensor([own.encode([Message("user", parts)]).ids])
        assert processor.post_process_image_text_to_text(ids) == ["a peara red apple"]
        segments = processor.post_process_multimodal_output(ids, generation_mode="interleaved")[0]
        assert [getattr(s, "text", None) for s in segments] == ["a pear", None, "a red apple"]
        assert np.array_equal(segments[1].codes, codes)


class TestImages:
    @pytest.mark.parametrize("size", [(640, 480), (451, 300), (300, 451), (512, 512), (70, 50)])
    def test_exact_equals_the_image_tokenizer(self, size: tuple[int, int]) -> None:
        tokenizer = ImageTokenizer(VQGAN(CONFIG.vq_config), 64)
        sizes = {"size": {"shortest_edge": 64}, "crop_size": {"height": 64, "width": 64}}
        own = ChameleonImageProcessor(**sizes)
        stock_file = ChameleonImageProcessor(**sizes, rescale_factor=0.0078)
        photo = make_image(0, size)
        expected = tokenizer.preprocess(photo)
        for processor in (own, stock_file):
            assert torch.equal(processor(photo, return_tensors="pt")["pixel_values"][0], expected)
        array = torch.from_numpy(np.asarray(photo).transpose(2, 0, 1).copy())
        assert torch.equal(own(array, return_tensors="pt")["pixel_values"][0], expected)

    def test_steps_of_transformers_on_request(self) -> None:
        from transformers.models.chameleon.image_processing_pil_chameleon import (
            ChameleonImageProcessorPil as Stock,
        )

        photo = make_image(0, (451, 300))
        expected = Stock()(photo, return_tensors="pt")["pixel_values"]
        for own, more in (
            (ChameleonImageProcessor(exact=False), {}),
            (ChameleonImageProcessor(), {"exact": False}),
        ):
            assert torch.equal(own(photo, return_tensors="pt", **more)["pixel_values"], expected)
        exact = ChameleonImageProcessor()(photo, return_tensors="pt")["pixel_values"]
        assert (exact - expected).abs().max() > 0.1

    def test_steps_can_be_left_out(self) -> None:
        photo = make_image(0, (24, 20))
        raw = ChameleonImageProcessor(
            do_resize=False, do_center_crop=False, do_rescale=False, do_normalize=False
        )(photo, return_tensors="np")["pixel_values"][0]
        assert np.array_equal(raw, np.asarray(photo).transpose(2, 0, 1))
        cropped = ChameleonImageProcessor(do_resize=False, crop_size={"height": 8, "width": 6})
        expected = np.asarray(photo)[6:14, 9:15].transpose(2, 0, 1)
        levels = cropped(photo, return_tensors="np")["pixel_values"][0]
        assert np.array_equal(np.rint((levels + 1) / 2 * 255), expected)


AUTO = """
import sys, transformers
import earlyfusion.hf as own
from transformers import AutoConfig
before = type(AutoConfig.from_pretrained(sys.argv[1])).__module__
own.register()
after = AutoConfig.from_pretrained(sys.argv[1])
processor = transformers.AutoProcessor.from_pretrained(sys.argv[1])
assert before.startswith("transformers."), before
assert type(after) is own.ChameleonConfig
assert type(processor) is own.ChameleonProcessor
kinds = own.ChameleonImageProcessor, own.ChameleonImageProcessorPil
assert type(processor.image_processor) in kinds
for auto in ("ImageTextToText", "MultimodalLM", "CausalLM"):
    model = getattr(transformers, "AutoModelFor" + auto).from_pretrained(sys.argv[1])
    assert type(model) is own.ChameleonForConditionalGeneration, auto
assert type(transformers.AutoModel.from_pretrained(sys.argv[1])) is own.ChameleonModel
print("fine")
"""


@pytest.mark.slow
def test_registering_routes_the_auto_classes(folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", AUTO, str(folder)], capture_output=True, text=True, timeout=280
    )
    assert done.stdout.splitlines()[-1:] == ["fine"], done.stderr[-3000:]


def test_images_in_lists_stay_with_their_texts(processor: Any) -> None:
    one, two = [make_image(1)], [make_image(2), make_image(3)]
    texts = ["<image>", "<image> and <image>"]
    nested = processor(images=[one, two], text=texts, padding=True)
    flat = processor(images=one + two, text=texts, padding=True)
    assert torch.equal(nested["pixel_values"], flat["pixel_values"])
    with pytest.raises(PromptError, match="text 1 has 1 <image> tokens and its list has 2 images"):
        processor(images=[two, one], text=texts, padding=True)
    with pytest.raises(PromptError, match="but there are 3 and 1"):
        processor(images=[one, []], text=texts, padding=True)
