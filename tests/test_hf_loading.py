"""Where the weights of the transformers face go: devices and disk through accelerate, the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from wide import example, wide_folder

from earlyfusion.hf import ChameleonForConditionalGeneration, ChameleonProcessor, ChameleonVQVAE

pytest.importorskip("accelerate")

PARTS = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "lm_head")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    return wide_folder(tmp_path_factory.mktemp("wide"))


class TestDeviceMap:
    @pytest.mark.parametrize(
        ("given", "offloaded"),
        [
            ({"device_map": "auto"}, False),
            ({"device_map": "cpu"}, False),
            ({"device_map": "auto", "max_memory": {"cpu": 800_000}}, True),
            ({"device_map": dict.fromkeys(PARTS, "cpu") | {"model.vqmodel": "disk"}}, True),
            ({"device_map": dict.fromkeys(PARTS, "disk") | {"model.vqmodel": "cpu"}}, True),
        ],
        ids=["auto", "cpu", "little-memory", "pictures-on-disk", "language-on-disk"],
    )
    def test_same_logits_images_and_loss(
        self, folder: Path, given: dict[str, Any], offloaded: bool, tmp_path: Path
    ) -> None:
        inputs, full = example(folder), ChameleonForConditionalGeneration.from_pretrained(folder)
        model = ChameleonForConditionalGeneration.from_pretrained(
            folder, offload_folder=tmp_path, **given
        )
        expected, labels = full(**inputs, labels=inputs["input_ids"]), inputs["input_ids"]
        assert any(p.is_meta for p in model.parameters()) == offloaded
        outputs = model(**inputs, labels=labels)
        assert torch.equal(outputs.logits, expected.logits)
        assert torch.equal(outputs.loss, expected.loss)
        codes = model.get_image_tokens(inputs["pixel_values"])
        # Weights on a disk leave the images to torch, which rounds differently.
        pixels, others = (m.decode_image_tokens(codes) for m in (model, full))
        torch.testing.assert_close(pixels, others, rtol=1e-4, atol=1e-4)

    def test_the_image_tokenizer_stays_on_one_device(self, folder: Path, tmp_path: Path) -> None:
        model = ChameleonForConditionalGeneration.from_pretrained(
            folder, device_map="auto", max_memory={"cpu": 900_000}, offload_folder=tmp_path
        )
        parts = [part for part in model.hf_device_map if "vqmodel" in part]
        assert parts in ([], ["model.vqmodel"])


class TestHub:
    def test_the_files_that_go_up_load_again(
        self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        commits = _keep_commits(monkeypatch, tmp_path)
        model = ChameleonForConditionalGeneration.from_pretrained(folder)
        processor = ChameleonProcessor.from_pretrained(folder)
        model.push_to_hub("someone/chameleon", commit_message="weights")
        processor.push_to_hub("someone/chameleon")
        assert [sorted(names) for names in commits] == [
            ["README.md", "config.json", "generation_config.json", "model.safetensors"],
            [
                "README.md",
                "chat_template.jinja",
                "processor_config.json",
                "tokenizer.json",
                "tokenizer_config.json",
            ],
        ]
        reloaded = ChameleonForConditionalGeneration.from_pretrained(tmp_path)
        inputs = example(tmp_path)
        assert torch.equal(reloaded(**inputs).logits, model(**example(folder)).logits)

    def test_the_image_tokenizer_alone(
        self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        commits = _keep_commits(monkeypatch, tmp_path)
        model = ChameleonForConditionalGeneration.from_pretrained(folder)
        model.model.vqmodel.push_to_hub("someone/pictures")
        assert {"config.json", "model.safetensors"} <= set(commits[0])
        reloaded = ChameleonVQVAE.from_pretrained(tmp_path)
        codes = torch.arange(64).view(1, 8, 8)
        assert torch.equal(reloaded.decode(codes), model.model.vqmodel.decode(codes))


def _keep_commits(monkeypatch: pytest.MonkeyPatch, folder: Path) -> list[list[str]]:
    """Stand in for the hub: what would go up is written to `folder`, names are listed a commit."""
    commits: list[list[str]] = []

    def commit(self: Any, *args: Any, operations: Any, **kwargs: Any) -> str:
        for operation in operations:
            content = operation.path_or_fileobj
            data = Path(content).read_bytes() if isinstance(content, str | Path) else content
            (folder / operation.path_in_repo).write_bytes(data)
        commits.append([operation.path_in_repo for operation in operations])
        return "https://hub.invalid/commit"

    def create(self: Any, repo_id: str, **kwargs: Any) -> Any:
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

    def nothing(*args: Any, **kwargs: Any) -> Any:
        raise huggingface_hub.errors.EntryNotFoundError("no card yet")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", commit)
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create)
    monkeypatch.setattr(huggingface_hub.ModelCard, "load", nothing)
    return commits


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cast_model_keeps_its_codes(folder: Path, dtype: torch.dtype) -> None:
    inputs, model = example(folder), ChameleonForConditionalGeneration.from_pretrained(folder)
    before = model.get_image_tokens(inputs["pixel_values"])
    model.to(dtype)
    assert model.lm_head.weight.dtype == dtype
    assert {p.dtype for p in model.model.vqmodel.parameters()} == {torch.float32}
    assert torch.equal(model.get_image_tokens(inputs["pixel_values"]), before)
    assert model.model.vqmodel.requires_grad_().to(dtype).dtype == dtype  # to be trained


@pytest.mark.parametrize("offload", ["cpu_offload", "disk_offload", "blocks on disk", "dispatch"])
def test_a_loaded_model_is_offloaded(folder: Path, offload: str, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    inputs, device = example(folder), torch.device("cpu")
    whole, model = (ChameleonForConditionalGeneration.from_pretrained(folder) for _ in range(2))
    if offload == "cpu_offload":
        accelerate.cpu_offload(model, device)
    elif offload == "disk_offload":
        accelerate.disk_offload(model, tmp_path, device)
    elif offload == "blocks on disk":
        blocks = model._no_split_modules  # each comes as a whole when it is called
        accelerate.disk_offload(model, tmp_path, device, preload_module_classes=blocks)
    else:
        parts = dict.fromkeys(PARTS, "cpu") | {"model.vqmodel": "disk"}
        accelerate.dispatch_model(model, parts, "cpu", offload_dir=tmp_path)
    assert all(p.is_meta for p in model.model.vqmodel.parameters())
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, whole(**inputs).logits)
        codes = whole.get_image_tokens(inputs["pixel_values"])
        pixels, expected = (m.decode_image_tokens(codes) for m in (model, whole))
    # Weights on a disk leave the images to torch, which rounds differently.
    torch.testing.assert_close(pixels, expected, rtol=1e-4, atol=1e-4)


def test_a_replaced_module_of_the_image_tokenizer_encodes_and_decodes(folder: Path) -> None:
    """As a quantiser replaces it."""
    model = ChameleonForConditionalGeneration.from_pretrained(folder)
    codes = torch.arange(64).view(1, 8, 8)
    vqmodel = model.model.vqmodel
    for name in ("post_quant_conv", "decoder"):
        expected = vqmodel.decode(codes)
        setattr(vqmodel, name, torch.nn.Sequential(getattr(vqmodel, name), torch.nn.Hardtanh()))
        vqmodel.__dict__["vqgan"].decoder.requires_grad_(False)
        assert not torch.equal(vqmodel.decode(codes), expected)


def test_hooks_of_the_image_tokenizer_run(folder: Path) -> None:
    model = ChameleonForConditionalGeneration.from_pretrained(folder)
    seen: list[Any] = []
    model.model.vqmodel.register_forward_hook(lambda *call: seen.append(call[2].image_tokens))
    inputs = example(folder)
    model(**inputs)
    model.get_image_tokens(inputs["pixel_values"])
    assert len(seen) == 2 and torch.equal(*seen)


def test_guidance_with_all_weights_on_a_disk(folder: Path, tmp_path: Path) -> None:
    inputs, whole = example(folder), ChameleonForConditionalGeneration.from_pretrained(folder)
    on_disk = dict.fromkeys((*PARTS, "model.vqmodel"), "disk")
    model = ChameleonForConditionalGeneration.from_pretrained(
        folder, offload_folder=tmp_path, device_map=on_disk
    )
    how = {"multimodal_generation_mode": "image-only", "do_sample": False, "guidance_text": 2.0}
    assert torch.equal(model.generate(**inputs, **how), whole.generate(**inputs, **how))
