"""Checkpoints in transformers' and Meta's layout: round trips, transformers as a peer, mistakes."""

from __future__ import annotations

import io
import json
import pickle
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny import tiny_processor

from earlyfusion.api import Chameleon
from earlyfusion.checkpoints.anole import unrotate
from earlyfusion.checkpoints.assemble import LoadedModel, build_vqgan
from earlyfusion.checkpoints.convert import convert
from earlyfusion.checkpoints.detect import detect, load, locate
from earlyfusion.checkpoints.hf import PROCESSOR, save_hf
from earlyfusion.checkpoints.meta import open_vqgan, read_config
from earlyfusion.cli import main
from earlyfusion.config import PRESETS, ModelConfig
from earlyfusion.content import Image
from earlyfusion.errors import CheckpointError, PromptError, SettingError
from earlyfusion.generation.settings import SamplingParams
from earlyfusion.image_tokenizer import ImageTokenizer
from earlyfusion.model.transformer import Transformer
from earlyfusion.model.vqgan import VQGAN
from earlyfusion.train import checkpoint

TINY = PRESETS["tiny"]
ENDS = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
GENERATION = {"eos_token_id": 2, "chameleon": {"text": {"temperature": 0.5}}}


def random_model(config: ModelConfig) -> tuple[Transformer, VQGAN]:
    torch.manual_seed(0)
    transformer, vqgan = Transformer(config).eval(), VQGAN(config.vq_config).eval()
    transformer.init_weights(torch.Generator().manual_seed(0))
    return transformer, vqgan


def save_tiny(
    folder: Path, config: ModelConfig = TINY, **options: Any
) -> tuple[Transformer, VQGAN]:
    folder.parent.mkdir(exist_ok=True)
    tiny_processor(folder.parent)
    text = (folder.parent / "tokenizer.json").read_text()
    transformer, vqgan = random_model(config)
    save_hf(folder, transformer, vqgan, text, GENERATION, **options)
    return transformer, vqgan


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_tiny(tmp_path / "model")
    return tmp_path / "model"


def assert_same_weights(one: torch.nn.Module, two: torch.nn.Module) -> None:
    actual, expected = one.state_dict(), two.state_dict()
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        assert value.dtype == expected[name].dtype
        assert torch.equal(value, expected[name]), name


class TestRoundTrip:
    @pytest.mark.parametrize(
        "changes",
        [
            {},
            {"swin_norm": True, "num_key_value_heads": 1},
            {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
            {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}, "hidden_act": "quick_gelu"},
            {"hidden_act": "prelu"},
            {"hidden_act": "xielu"},
        ],
    )
    def test_every_bit_comes_back(self, tmp_path: Path, changes: dict[str, Any]) -> None:
        config = replace(TINY, **changes)
        transformer, vqgan = save_tiny(tmp_path / "model", config)
        loaded = load(tmp_path / "model")
        assert_same_weights(loaded.transformer, transformer)
        assert_same_weights(loaded.vqgan, vqgan)
        assert loaded.generation_defaults == GENERATION | ENDS
        assert loaded.can_draw
        assert loaded.processor.layout.num_codes == TINY.vq_config.grid**2
        tokens_BT = torch.arange(20)[None]
        with torch.no_grad():  # gradients would take the fused norm of the loaded one
            assert torch.equal(loaded.transformer(tokens_BT), transformer(tokens_BT))

    def test_narrow_on_disk_but_vq_in_fp32(self, tmp_path: Path) -> None:
        folder = tmp_path / "model"
        transformer, vqgan = save_tiny(folder, dtype=torch.bfloat16, vq_dtype=torch.float16)
        loaded = load(folder)
        assert loaded.transformer.lm_head.weight.dtype is torch.bfloat16
        assert_same_weights(loaded.transformer, transformer.bfloat16())
        assert_same_weights(loaded.vqgan, vqgan.half().float())
        assert load(folder, dtype=torch.float32).transformer.lm_head.weight.dtype is torch.float32

    def test_nothing_but_the_model_is_left(self, saved: Path) -> None:
        assert {path.name for path in saved.iterdir()} == {
            "chat_template.jinja",
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "processor_config.json",
            "tokenizer.json",
            "tokenizer_config.json",
        }
        assert {path.name for path in saved.parent.iterdir()} == {"model", "tokenizer.json"}

    def test_a_model_is_replaced_whole(self, saved: Path) -> None:
        (saved / "stale.txt").write_text("old")
        save_tiny(saved, extra_files={"README.md": "# tiny"})
        assert (saved / "README.md").read_text() == "# tiny"
        assert not (saved / "stale.txt").exists()

    def test_a_failed_save_leaves_the_old_model(self, saved: Path) -> None:
        before = (saved / "model.safetensors").read_bytes()
        with pytest.raises(FileNotFoundError):
            save_tiny(saved, extra_files={"no/such/README.md": "# tiny"})
        assert (saved / "model.safetensors").read_bytes() == before
        assert {path.name for path in saved.parent.iterdir()} == {"model", "tokenizer.json"}

    def test_a_stranger_s_folder_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "photos").mkdir()
        (tmp_path / "photos" / "cat.png").write_bytes(b"cat")
        with pytest.raises(CheckpointError, match="photos is not empty and does not hold a model"):
            save_tiny(tmp_path / "photos")
        assert (tmp_path / "photos" / "cat.png").exists()


class TestTransformersAsAPeer:
    def image_tokens(self, loaded: LoadedModel) -> torch.Tensor:
        return torch.from_numpy(loaded.processor.vocabulary.image_tokens)

    def test_they_load_what_we_save(self, saved: Path) -> None:
        from transformers import (
            AutoTokenizer,
            ChameleonForConditionalGeneration,
            ChameleonProcessor,
        )

        loaded = load(saved)
        stock = ChameleonForConditionalGeneration.from_pretrained(saved).eval()
        tokens_BT = torch.arange(4, 34)[None]
        with torch.no_grad():
            expected, actual = stock(input_ids=tokens_BT).logits, loaded.transformer(tokens_BT)
        expected[..., self.image_tokens(loaded)] = actual[..., self.image_tokens(loaded)]
        assert (actual - expected).abs().max() < 1e-5
        pixels = torch.rand(1, 3, 16, 16) * 2 - 1
        codes = stock.model.vqmodel.encode(pixels).image_tokens
        assert torch.equal(codes, loaded.vqgan.encode(pixels).flatten())
        tokenizer = AutoTokenizer.from_pretrained(saved)
        text = "What is this? 사과"
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids == loaded.processor.encode_text(text)
        assert tokenizer.bos_token_id == loaded.processor.vocabulary.bos
        assert ChameleonProcessor.from_pretrained(saved).image_seq_length == TINY.vq_config.grid**2

    @pytest.mark.parametrize("shard", ["5GB", "200KB"])
    def test_we_load_what_they_save(self, saved: Path, tmp_path: Path, shard: str) -> None:
        from transformers import ChameleonForConditionalGeneration

        stock = ChameleonForConditionalGeneration.from_pretrained(saved).eval()
        folder = tmp_path / "theirs"
        stock.save_pretrained(folder, max_shard_size=shard)
        shutil.copy(saved / "tokenizer.json", folder)
        assert (folder / "model.safetensors").exists() == (shard == "5GB")
        loaded = load(folder)
        assert_same_weights(loaded.transformer, load(saved).transformer)
        assert not loaded.can_draw
        codes = loaded.vqgan.encode(torch.zeros(1, 3, 16, 16))
        with pytest.raises(CheckpointError, match="no VQ decoder"):
            loaded.vqgan.decode(codes)


IMAGE_PATH = locate("mini") / "examples" / "strawberry.png"


def answered(folder: Path) -> list[str]:
    """The answers of transformers' `generate` to a script for several images, as it is."""
    from earlyfusion.hf import ChameleonForConditionalGeneration, ChameleonProcessor

    processor = ChameleonProcessor.from_pretrained(folder)
    model = ChameleonForConditionalGeneration.from_pretrained(folder)
    image = Image.open(IMAGE_PATH).pil
    prompts = ["<image>What is this?", "<image>Draw. <image><image>What is this, in one word?"]
    together = processor(images=[image] * 4, text=prompts, padding=True, return_tensors="pt")
    alone = [processor(images=[image] * n, text=t) for n, t in zip((1, 3), prompts, strict=True)]
    texts = []
    for inputs in [together, *alone]:
        ids = model.generate(**inputs, max_new_tokens=40, do_sample=False)
        new = ids[:, inputs["input_ids"].shape[1] :]
        assert new.shape[1] < 40
        assert all(model.config.eos_token_id in row for row in new.tolist())
        texts += processor.batch_decode(new, skip_special_tokens=True)
    return texts


class TestTiedHeads:
    """Files may hold other tensors than config.json, which ties the head to the embedding, says."""

    @pytest.fixture
    def tied(self, tmp_path: Path) -> Path:
        save_tiny(tmp_path / "model", replace(TINY, tie_word_embeddings=True))
        return tmp_path / "model"

    def change(self, folder: Path, **tensors: Any) -> Any:
        stored = load_file(folder / "model.safetensors")
        stored = {name: tensor for name, tensor in stored.items() if name not in tensors}
        stored |= {name: tensor for name, tensor in tensors.items() if tensor is not None}
        save_file(stored, folder / "model.safetensors", {"format": "pt"})
        theirs = transformers.ChameleonForConditionalGeneration.from_pretrained(folder)
        return theirs.model.embed_tokens.weight, theirs.lm_head.weight

    @pytest.mark.filterwarnings("ignore")  # transformers' own, about the config
    @pytest.mark.parametrize("to", [None, "hf", "meta"])
    def test_a_head_of_its_own_is_kept(self, tied: Path, tmp_path: Path, to: Any) -> None:
        head = torch.randn(TINY.vocab_size, TINY.hidden_size)
        expected = self.change(tied, **{"lm_head.weight": head})
        if to:
            convert(tied, tmp_path / to, to)
        loaded = load(tmp_path / to if to else tied).transformer
        assert torch.equal(loaded.lm_head.weight, head)
        assert torch.equal(expected[1], head)
        assert torch.equal(loaded.model.embed_tokens.weight, expected[0])

    def test_the_same_head_twice_stays_one(self, tied: Path) -> None:
        weights = load_file(tied / "model.safetensors")["model.embed_tokens.weight"]
        self.change(tied, **{"lm_head.weight": weights.clone()})
        loaded = load(tied).transformer
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight

    def test_only_the_head_is_there(self, tied: Path, tmp_path: Path) -> None:
        weights = load_file(tied / "model.safetensors")["model.embed_tokens.weight"]
        names = {"lm_head.weight": weights, "model.embed_tokens.weight": None}
        expected = self.change(tied, **names)
        convert(tied, tmp_path / "again", "hf")
        for folder in (tied, tmp_path / "again"):
            loaded = load(folder).transformer
            assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
            assert torch.equal(loaded.lm_head.weight, expected[0])


class TestEnds:
    """Answers of transformers' `generate` end, and batches are padded on the left."""

    def test_mini(self) -> None:
        texts = answered(locate("mini"))
        assert texts[:2] == texts[2:]
        assert texts[0] == "strawberry"

    def test_a_copy_of_a_folder_that_says_neither(self, tmp_path: Path) -> None:
        bare = tmp_path / "bare"
        shutil.copytree(locate("mini"), bare)
        (bare / "generation_config.json").write_text('{"chameleon": {"max_tokens": 7}}')
        says = json.loads((bare / "tokenizer_config.json").read_text())
        says.pop("padding_side")
        (bare / "tokenizer_config.json").write_text(json.dumps(says))
        convert(bare, tmp_path / "copy", "hf")
        texts = answered(tmp_path / "copy")
        assert texts[:2] == texts[2:]
        kept = json.loads((tmp_path / "copy" / "generation_config.json").read_text())
        assert kept["chameleon"] == {"max_tokens": 7}

    def test_a_saved_model(self, saved: Path) -> None:
        assert json.loads((saved / "generation_config.json").read_text()) == GENERATION | ENDS
        assert json.loads((saved / "tokenizer_config.json").read_text())["padding_side"] == "left"

    def test_an_end_of_its_own_stays(self, tmp_path: Path) -> None:
        tiny_processor(tmp_path)
        text = (tmp_path / "tokenizer.json").read_text()
        save_hf(tmp_path / "own", *random_model(TINY), text, {"eos_token_id": [2, 9]})
        assert load(tmp_path / "own").generation_defaults["eos_token_id"] == [2, 9]

    def test_settings_without_a_name_stay_settings(self, tmp_path: Path) -> None:
        tiny_processor(tmp_path)
        text = (tmp_path / "tokenizer.json").read_text()
        save_hf(tmp_path / "own", *random_model(TINY), text, {"temperature": 0.25})
        defaults = load(tmp_path / "own").generation_defaults
        assert SamplingParams().resolved(defaults).temperature == 0.25

    def test_a_folder_without_ids_takes_those_of_the_config(self, saved: Path) -> None:
        from earlyfusion.hf import ChameleonForConditionalGeneration

        (saved / "generation_config.json").write_text("{}")
        config = json.loads((saved / "config.json").read_text())
        (saved / "config.json").write_text(json.dumps(config | {"eos_token_id": 5}))
        ends = ChameleonForConditionalGeneration.from_pretrained(saved).generation_config
        assert (ends.bos_token_id, ends.eos_token_id, ends.pad_token_id) == (0, 5, 1)
        (saved / "generation_config.json").write_text('{"eos_token_id": 7}')
        ends = ChameleonForConditionalGeneration.from_pretrained(saved).generation_config
        assert (ends.bos_token_id, ends.eos_token_id, ends.pad_token_id) == (0, 7, 1)


class TestImageMode:
    """How images become squares is the model's: kept in its folder, obeyed, overruled."""

    def stored(self, folder: Path, mode: str, name: str = PROCESSOR) -> Path:
        settings = {"resize_mode": mode}
        said = {"image_processor": settings} if name == PROCESSOR else settings
        (folder / PROCESSOR).unlink(missing_ok=True)
        (folder / name).write_text(json.dumps(said))
        return folder

    @pytest.mark.parametrize("name", [PROCESSOR, "preprocessor_config.json"])
    def test_a_prompt_s_image_is_fitted(self, saved: Path, name: str) -> None:
        wide = PIL.Image.new("RGB", (64, 16), "red")
        cut = Chameleon.load(saved).request([wide, "What?"]).ids
        model = Chameleon.load(self.stored(saved, "fit", name))
        assert model.image_tokenizer.mode == "fit"
        full = model.request([wide, "What?"]).ids
        assert full != cut
        model.image_tokenizer.mode = "crop"
        assert model.request([wide, "What?"]).ids == cut

    def test_silence_means_crop(self, saved: Path) -> None:
        (saved / PROCESSOR).unlink()
        assert load(saved).resize_mode == "crop"
        (saved / PROCESSOR).write_text('{"image_processor": {}}')
        assert load(saved).resize_mode == "crop"

    @pytest.mark.parametrize("mode", ["crop", "fit"])
    def test_it_is_saved_and_converted(self, tmp_path: Path, mode: str) -> None:
        save_tiny(tmp_path / "hf", resize_mode=mode)
        convert(tmp_path / "hf", tmp_path / "meta", "meta")
        convert(tmp_path / "meta", tmp_path / "again", "hf")
        for folder in ("hf", "meta", "again"):
            assert load(tmp_path / folder).resize_mode == mode
        said = json.loads((tmp_path / "again" / PROCESSOR).read_text())
        assert said["image_processor"]["resize_mode"] == mode

    def test_an_unknown_mode_is_refused(self, saved: Path) -> None:
        with pytest.raises(CheckpointError, match=r"resize_mode='stretch' in .* is unknown"):
            load(self.stored(saved, "stretch"))

    @pytest.mark.parametrize(
        ("option", "mode"), [(None, "fit"), ("--fit", "fit"), ("--crop", "crop")]
    )
    @pytest.mark.parametrize("command", ["generate", "chat", "encode"])
    def test_the_command_line_overrules_it(
        self,
        saved: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        command: str,
        option: str | None,
        mode: str,
    ) -> None:
        monkeypatch.chdir(tmp_path)
        self.stored(saved, "fit")
        PIL.Image.new("RGB", (64, 16), "red").save("wide.png")
        recorded, square = list[str](), ImageTokenizer.square

        def watched(self: ImageTokenizer, image: Any, mode: Any = None) -> PIL.Image.Image:
            recorded.append(mode or self.mode)
            return square(self, image, mode)

        monkeypatch.setattr(ImageTokenizer, "square", watched)
        monkeypatch.setattr("sys.stdin", io.StringIO("/image wide.png\nWhat?\n"))
        short = ["--output", "text", "--max-tokens", "1"]
        arguments = {
            "generate": ["What?", "--image", "wide.png", *short],
            "chat": short,
            "encode": ["wide.png", "-o", "wide.safetensors"],
        }[command]
        more = [] if option is None else [option]
        assert main([command, *arguments, *more, "--model", str(saved)]) == 0
        assert recorded == [mode]

    def test_two_modes_at_once(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        arguments = ["encode", str(IMAGE_PATH), "-o", str(tmp_path / "c"), "--mode", "fit"]
        assert main([*arguments, "--crop"]) == 2
        assert "--mode fit and --crop differ" in capsys.readouterr().err
        assert main([*arguments, "--fit"]) == 0


class TestMistakes:
    def rewrite(self, folder: Path, drop: str = "", add: str = "", reshape: str = "") -> None:
        tensors = load_file(folder / "model.safetensors")
        tensors = {k: v for k, v in tensors.items() if not (drop and drop in k)}
        if add:
            tensors[add] = torch.zeros(1)
        if reshape:
            tensors[reshape] = tensors[reshape][:-1].contiguous()
        save_file(tensors, folder / "model.safetensors")

    @pytest.mark.parametrize(
        ("change", "sentence"),
        [
            ({"drop": "layers.1.mlp.up_proj"}, r"lacks the key model\.layers\.1\.mlp\.up_proj"),
            ({"drop": "layers"}, r"lacks 26 keys: model\.layers\.0.* and 16 more"),
            ({"add": "model.layers.9.x"}, r"has the unknown key model\.layers\.9\.x"),
            ({"reshape": "model.norm.weight"}, r"has wrong shapes for the key model\.norm\.weight"),
            ({"drop": "decoder.conv_in.bias"}, r"lacks the key decoder\.conv_in\.bias"),
        ],
    )
    def test_keys_that_do_not_fit(self, saved: Path, change: dict[str, str], sentence: str) -> None:
        self.rewrite(saved, **change)
        with pytest.raises(CheckpointError, match=sentence):
            load(saved)

    def test_a_truncated_file(self, saved: Path) -> None:
        weights = saved / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:1000])
        with pytest.raises(CheckpointError, match=r"model\.safetensors is missing or damaged"):
            load(saved)

    def test_a_missing_shard(self, saved: Path) -> None:
        index = {"weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}
        (saved / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(CheckpointError, match=r"00002\.safetensors is missing"):
            load(saved)

    @pytest.mark.parametrize("names", [["model.safetensors"], {"lm_head.weight": 1}, None])
    def test_an_index_without_files(self, saved: Path, names: Any) -> None:
        (saved / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
        with pytest.raises(CheckpointError, match=r"index\.json names no weight file for each"):
            load(saved)

    @pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json"])
    def test_a_file_that_is_no_json(self, saved: Path, name: str) -> None:
        text = (saved / name).read_text()
        (saved / name).write_text("{")
        with pytest.raises(CheckpointError, match=rf"{name} is missing or not JSON"):
            load(saved)
        (saved / name).write_text('{"bos_token_id": 1, "bos_token_id": 0,' + text.lstrip()[1:])
        with pytest.raises(CheckpointError, match=rf"{name} is ambiguous: the key 'bos_token_id'"):
            load(saved)

    def test_one_tensor_in_two_files(self, saved: Path) -> None:
        tensors = load_file(saved / "model.safetensors")
        save_file({"lm_head.weight": tensors["lm_head.weight"]}, saved / "b.safetensors")
        (saved / "model.safetensors").rename(saved / "a.safetensors")
        names = dict.fromkeys(tensors, "a.safetensors") | {"lm_head.weight": "b.safetensors"}
        (saved / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
        with pytest.raises(CheckpointError, match=r"b\.safetensors holds lm_head\.weight, as anot"):
            load(saved)

    def test_a_byte_order_mark_is_skipped(self, saved: Path, tmp_path: Path) -> None:
        files = [path for path in saved.iterdir() if path.suffix == ".json"]
        for path in files:
            path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
        model = Chameleon.load(saved)
        model.save(tmp_path / "copy")
        convert(saved, tmp_path / "meta", "meta")
        for copy in (tmp_path / "copy", tmp_path / "meta"):
            assert_same_weights(load(copy).transformer, model.transformer)
        for path in [*tmp_path.glob("copy/*.json"), *tmp_path.glob("meta/**/*.json")]:
            assert not path.read_bytes().startswith(b"\xef")


class TestFormats:
    def test_layouts_are_told_apart(self, saved: Path, golden: Path) -> None:
        assert detect(saved) == "hf"
        assert detect(golden / "models" / "tiny_1") == "meta"
        assert detect(golden / "models" / "tiny_mp2_swin_gqa") == "meta"

    def test_mini_lies_in_the_package(self) -> None:
        assert locate("mini").parts[-3:] == ("earlyfusion", "pretrained", "mini")

    def test_no_such_folder(self, tmp_path: Path) -> None:
        with pytest.raises(
            CheckpointError, match=r"no model folder .*nowhere: give 'mini', a fold"
        ):
            load(tmp_path / "nowhere")

    def test_a_folder_without_a_model(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match=r"holds no model: give 'mini'"):
            load(tmp_path)

    def test_a_hub_that_cannot_be_reached(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import huggingface_hub

        def fail(*_: Any, **__: Any) -> str:
            raise OSError("secret detail")

        monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
        with pytest.raises(CheckpointError, match="org/name is not a folder here") as caught:
            load("org/name")
        assert "secret" not in str(caught.value)

    def test_a_hub_id_is_downloaded(self, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import huggingface_hub

        monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: str(saved))
        assert load("org/name").config == load(saved).config


class TestOtherFolders:
    """Folders that are no model of this package say what they are and what to give instead."""

    def refused(self, folder: Path) -> str:
        with pytest.raises(CheckpointError) as caught:
            Chameleon.load(folder)
        return str(caught.value)

    def test_an_adapter(self, tmp_path: Path) -> None:
        (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "base-7b"}')
        (tmp_path / "adapter_model.safetensors").touch()
        said = self.refused(tmp_path)
        assert "holds an adapter and not a whole model" in said
        assert "base model base-7b with adapter=" in said
        (tmp_path / "adapter_config.json").write_text("{}")
        assert "its base model with adapter=" in self.refused(tmp_path)

    @pytest.mark.parametrize("method", ["bitsandbytes", "torchao"])
    def test_weights_that_were_quantised(self, saved: Path, method: str) -> None:
        config = json.loads((saved / "config.json").read_text())
        config["quantization_config"] = {"quant_method": method, "load_in_4bit": True}
        (saved / "config.json").write_text(json.dumps(config))
        said = self.refused(saved)
        assert f"weights that {method} has quantised" in said
        assert "from_pretrained" in said and "dtype='int4'" in said

    def test_a_folder_of_the_hub_s_cache(self, saved: Path, tmp_path: Path) -> None:
        cache = tmp_path / "models--org--name"
        shutil.copytree(saved, cache / "snapshots" / "0a1b")
        said = self.refused(cache)
        assert "where the hub's files of a model are cached: give its hub id" in said
        assert said.endswith(f"as {cache / 'snapshots' / '0a1b'}")

    def test_a_folder_around_a_model(self, saved: Path, tmp_path: Path) -> None:
        release = tmp_path / "Anole-7b"
        convert(saved, release / "models" / "7b", "meta")
        (release / "models" / "7b" / "tokenizer").rename(release / "tokenizer")
        for folder in (release, release / "models"):
            said = self.refused(folder)
            assert said.endswith(f"no model itself: give a folder in it, as {release}/models/7b")
        assert_same_weights(load(release / "models/7b").transformer, load(saved).transformer)

    def test_a_hub_id_of_another_layout(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import huggingface_hub

        monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: str(tmp_path))
        with pytest.raises(CheckpointError, match=r"org/name has no config\.json, so it is not in"):
            load("org/name")

    def test_no_name(self) -> None:
        with pytest.raises(CheckpointError, match="the name of the model is empty: give 'mini'"):
            Chameleon.load("")

    def test_a_trainer_s_run(self, saved: Path, tmp_path: Path) -> None:
        run = tmp_path / "run"
        for step in (90, 100):
            shutil.copytree(saved, run / f"checkpoint-{step}")
        said = self.refused(run)
        assert said.endswith(f"give one of its checkpoints, as {run / 'checkpoint-100'}")
        assert Chameleon.load(run / "checkpoint-100").config == load(saved).config

    def test_a_run_of_this_package(self, saved: Path, tmp_path: Path) -> None:
        run = tmp_path / "run"
        checkpoint.Saver(run, keep=1, in_background=False).save(
            3, {"model": {"x": torch.zeros(1)}}, {}
        )
        assert "a training run that has not ended" in self.refused(run)
        assert self.refused(run).endswith(str(run / "model"))
        shutil.copytree(saved, run / "model")
        assert self.refused(run) == (
            f"{run} is the folder of a training run: give its model, {run / 'model'}"
        )

    def test_a_model_saved_without_its_processor(self, saved: Path) -> None:
        (saved / "tokenizer.json").unlink()
        said = self.refused(saved)
        assert "tokenizer.json is missing: copy it there from the model" in said

    def test_a_missing_second_shard(self, golden: Path, tmp_path: Path) -> None:
        folder = tmp_path / "models" / "tiny"
        shutil.copytree(golden / "models" / "tiny_mp2_swin_gqa", folder)
        (tmp_path / "tokenizer").symlink_to(golden.absolute() / "tokenizer")
        (folder / "consolidated.01.pth").unlink()
        said = self.refused(folder)
        assert "lacks consolidated.01.pth: its params.json says 2 shards" in said

    def test_several_unknown_keys(self, saved: Path) -> None:
        tensors = load_file(saved / "model.safetensors")
        save_file(tensors | {"a": torch.zeros(1), "b": torch.zeros(1)}, saved / "model.safetensors")
        assert "it has 2 unknown keys: a, b" in self.refused(saved)


class TestWordsOfTransformers:
    """What the transformers face says names what its user wrote."""

    def test_marks_and_lengths(self) -> None:
        from earlyfusion.hf import ChameleonForConditionalGeneration, ChameleonProcessor

        mini = locate("mini")
        processor = ChameleonProcessor.from_pretrained(mini)
        with pytest.raises(PromptError, match="there are 2 and 1: give each image one <image>"):
            processor(images=[PIL.Image.new("RGB", (9, 9))], text="<image><image>What are these?")
        model = ChameleonForConditionalGeneration.from_pretrained(mini)
        inputs = processor(text="Draw.") | {"multimodal_generation_mode": "image-only"}
        with pytest.raises(SettingError, match="max_new_tokens=5 and max_images=1 leave no room"):
            model.generate(**inputs, max_new_tokens=5)
        with pytest.raises(SettingError, match="max_new_tokens=66 and max_images=0 leave no room"):
            model.generate(**inputs, max_images=0)


class TestMeta:
    @pytest.mark.parametrize("name", ["tiny_1", "tiny_mp2_swin_gqa"])
    def test_a_download_loads_whole(self, golden: Path, name: str) -> None:
        loaded = load(golden / "models" / name)
        assert loaded.config.vocab_size == loaded.processor.vocabulary.size == 1280
        assert loaded.transformer.lm_head.weight.dtype is torch.bfloat16
        assert loaded.can_draw
        assert loaded.vqgan.quant_conv.weight.dtype is torch.float32
        assert loaded.processor.layout.num_codes == 1024

    def test_sizes_come_from_both_param_files(self, golden: Path) -> None:
        config = read_config(golden / "models" / "tiny_mp2_swin_gqa")
        assert (config.hidden_size, config.intermediate_size) == (64, 256)
        assert (config.num_attention_heads, config.num_key_value_heads) == (8, 2)
        assert (config.model_parallel_size, config.swin_norm) == (2, True)

    def test_each_shard_s_norm_serves_its_heads(self, golden: Path) -> None:
        folder = golden / "models" / "tiny_mp2_swin_gqa"
        norm = load(folder).transformer.model.layers[1].self_attn.q_norm
        for rank in range(2):
            shard = torch.load(folder / f"consolidated.0{rank}.pth", weights_only=True)
            unrotated = unrotate(shard["layers.1.attention.q_normalization.bias"], 8)
            assert torch.equal(norm.bias[4 * rank : 4 * rank + 4], unrotated.expand(4, 8))
        assert not torch.equal(norm.bias[0], norm.bias[4])

    def test_halves_from_neighbours(self) -> None:
        rows = torch.arange(8)
        assert unrotate(rows, 4).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
        assert unrotate(rows[:, None], 8).flatten().tolist() == [0, 2, 4, 6, 1, 3, 5, 7]

    def test_to_transformers_and_back(self, golden: Path, tmp_path: Path) -> None:
        loaded = load(golden / "models" / "tiny_1")
        text = (golden / "tokenizer" / "text_tokenizer.json").read_text()
        save_hf(tmp_path / "hf", loaded.transformer, loaded.vqgan, text, {})
        reloaded = load(tmp_path / "hf")
        assert reloaded.config.to_dict() == loaded.config.to_dict()
        assert_same_weights(reloaded.transformer, loaded.transformer)
        assert_same_weights(reloaded.vqgan, loaded.vqgan)


class TestMetaMistakes:
    @pytest.fixture
    def folder(self, golden: Path, tmp_path: Path) -> Path:
        folder = tmp_path / "models" / "tiny"
        shutil.copytree(golden / "models" / "tiny_mp2_swin_gqa", folder)
        (tmp_path / "tokenizer").symlink_to(golden.absolute() / "tokenizer")
        return folder

    def edit(self, folder: Path, drop: str = "", add: str = "") -> None:
        for path in folder.glob("*.pth"):
            shard = torch.load(path, weights_only=True)
            shard.pop(drop, None)
            if add:
                shard[add] = torch.zeros(2)
            torch.save(shard, path)

    def test_rotary_frequencies_are_not_needed(self, folder: Path) -> None:
        self.edit(folder, drop="rope.freqs")
        assert load(folder, verify=False).config.num_hidden_layers == 3

    @pytest.mark.parametrize(
        ("change", "sentence"),
        [
            ({"drop": "output.weight"}, r"lacks the key lm_head\.weight"),
            ({"add": "layers.0.lora.weight"}, r"has the unknown key layers\.0\.lora\.weight"),
        ],
    )
    def test_keys_that_do_not_fit(
        self, folder: Path, change: dict[str, str], sentence: str
    ) -> None:
        self.edit(folder, **change)
        with pytest.raises(CheckpointError, match=sentence):
            load(folder, verify=False)

    def test_a_missing_shard(self, folder: Path) -> None:
        (folder / "consolidated.00.pth").unlink()
        with pytest.raises(CheckpointError, match=r"lacks consolidated\.pth, or one of"):
            load(folder)

    def test_a_truncated_shard(self, folder: Path) -> None:
        path = folder / "consolidated.01.pth"
        path.write_bytes(path.read_bytes()[:5000])
        with pytest.raises(CheckpointError, match=r"consolidated\.01\.pth is missing, damaged"):
            load(folder)

    def test_params_without_sizes(self, folder: Path) -> None:
        (folder / "consolidate_params.json").unlink()
        with pytest.raises(CheckpointError, match="gives no vocab_size"):
            load(folder)

    @pytest.mark.parametrize(
        ("name", "value", "sentence"),
        [
            ("dim", "32", r"dim='32' in the params of .* is of the wrong type: it must be int"),
            ("dim", 32.0, r"dim=32\.0 in the params of .* must be int"),
            ("n_layers", None, "gives no n_layers"),
            ("multiple_of", 0, "multiple_of=0 in the params of .* must be at least 1"),
            ("multiple_of", "x", "multiple_of='x' in the params of .* must be int"),
            ("ffn_dim_multiplier", "x", "ffn_dim_multiplier='x' in the params of .* must be float"),
            ("swin_norm", 1, "swin_norm=1 in the params of .* must be bool"),
        ],
    )
    def test_params_of_another_type(
        self, folder: Path, name: str, value: Any, sentence: str
    ) -> None:
        params = json.loads((folder / "params.json").read_text())
        params["model"][name] = value
        (folder / "params.json").write_text(json.dumps(params))
        with pytest.raises(CheckpointError, match=sentence):
            load(folder, verify=False)

    @pytest.mark.parametrize("name", ["norm_eps", "rope_theta", "max_position_embeddings"])
    def test_null_leaves_the_default(self, folder: Path, name: str) -> None:
        params = json.loads((folder / "params.json").read_text())
        params["model"][name] = None
        (folder / "params.json").write_text(json.dumps(params))
        config = load(folder, verify=False).config
        defaults = (ModelConfig.rms_norm_eps, ModelConfig.rope_theta, 4096)
        assert (config.rms_norm_eps, config.rope_theta, config.max_position_embeddings) == defaults

    def test_a_model_that_is_none(self, folder: Path) -> None:
        (folder / "params.json").write_text('{"model": [1]}')
        with pytest.raises(CheckpointError, match=r"model=\[1\] in .*params\.json is of the wrong"):
            load(folder, verify=False)

    def test_tensors_without_names(self, folder: Path) -> None:
        for path in folder.glob("*.pth"):
            torch.save(dict(enumerate(torch.load(path, weights_only=True).values())), path)
        with pytest.raises(CheckpointError, match="holds more than tensors"):
            load(folder, verify=False)

    @pytest.mark.parametrize("damage", ["sparse", "unbalanced"])
    def test_a_damaged_file(self, folder: Path, damage: str) -> None:
        path = min(folder.glob("*.pth"))
        if damage == "sparse":
            content = torch.load(path, weights_only=True)
            torch.save(content | {"norm.weight": content["norm.weight"].to_sparse()}, path)
        else:  # a pickle that takes a value from an empty stack
            path.write_bytes(b"\x80\x02R.")
        with pytest.raises(CheckpointError, match="damaged, or holds more than tensors"):
            load(folder, verify=False)

    def test_no_tokenizer(self, folder: Path) -> None:
        (folder.parent.parent / "tokenizer").unlink()
        with pytest.raises(CheckpointError, match=r"no text_tokenizer\.json beside"):
            load(folder)


class TestVQGAN:
    @pytest.fixture
    def folder(self, golden: Path, tmp_path: Path) -> Path:
        shutil.copy(golden / "tokenizer" / "vqgan.yaml", tmp_path)
        return tmp_path

    def save(self, golden: Path, folder: Path, drop: str = "-", add: str = "") -> None:
        source = golden / "tokenizer" / "vqgan.ckpt"
        state = torch.load(source, weights_only=True)["state_dict"]
        state = {k: v for k, v in state.items() if not k.startswith(drop)}
        if add:
            state[add] = torch.zeros(1)
        torch.save({"state_dict": state}, folder / "vqgan.ckpt")

    def test_the_loss_is_ignored(self, golden: Path) -> None:
        vqgan = build_vqgan(*open_vqgan(golden / "tokenizer"), golden)
        assert vqgan.config.grid == 32
        assert not vqgan.training

    @pytest.mark.parametrize(
        ("change", "sentence"),
        [
            ({"drop": "decoder.conv_out.bias"}, r"lacks the key decoder\.conv_out\.bias"),
            ({"drop": "quant"}, r"lacks 3 keys: quant_conv\.bias, quant_conv\.weight, quantize"),
            ({"add": "extra.weight"}, r"has the unknown key extra\.weight"),
        ],
    )
    def test_keys_that_do_not_fit(
        self, golden: Path, folder: Path, change: dict[str, str], sentence: str
    ) -> None:
        self.save(golden, folder, **change)
        with pytest.raises(CheckpointError, match=sentence):
            build_vqgan(*open_vqgan(folder), folder)

    @pytest.mark.parametrize("state", [torch.zeros(3), {3: torch.zeros(3)}, [1]])
    def test_a_state_that_is_none(self, folder: Path, state: Any) -> None:
        torch.save({"state_dict": state}, folder / "vqgan.ckpt")
        with pytest.raises(CheckpointError, match="holds more than tensors"):
            open_vqgan(folder)

    def test_code_in_a_pickle_is_not_run(self, folder: Path) -> None:
        class Bomb:
            def __reduce__(self) -> tuple[Any, ...]:
                return (folder.joinpath("ran").touch, ())

        (folder / "vqgan.ckpt").write_bytes(pickle.dumps({"state_dict": Bomb()}))
        with pytest.raises(CheckpointError, match="holds more than tensors"):
            build_vqgan(*open_vqgan(folder), folder)
        torch.save({"state_dict": Bomb()}, folder / "vqgan.ckpt")
        with pytest.raises(CheckpointError, match="holds more than tensors"):
            build_vqgan(*open_vqgan(folder), folder)
        assert not (folder / "ran").exists()

    @pytest.mark.parametrize("field", ["", "resolution", "z_channels", "ch_mult", "double_z"])
    def test_a_config_that_is_none(self, folder: Path, field: str) -> None:
        text = (folder / "vqgan.yaml").read_text()
        wrong = re.sub(rf"\b{field}:.*", f"{field}: wrong", text) if field else "model: {}"
        assert wrong != text
        (folder / "vqgan.yaml").write_text(wrong)
        with pytest.raises(CheckpointError, match=r"vqgan\.yaml is missing or not a VQ-GAN config"):
            build_vqgan(*open_vqgan(folder), folder)


def test_the_page_s_blocks_run(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parent.parent / "docs" / "checkpoints.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    for block in blocks:
        exec(compile(block, "docs/checkpoints.md", "exec"), {})
    assert "Generate an image of 768x512" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
def test_entries_of_another_type_are_one_sentence(tmp_path: Path, name: str) -> None:
    folder = Chameleon.load("mini").save(tmp_path / "model")
    settings = json.loads((folder / name).read_text())
    settings |= {"chameleon": 5, "architectures": 5, "num_hidden_layers": 10**9}
    (folder / name).write_text(json.dumps(settings))
    words = "num_hidden_layers" if name == "config.json" else "chameleon=5 in generation_config"
    with pytest.raises(SettingError, match=words):
        Chameleon.load(folder).generate("Name a fruit.", "text")
