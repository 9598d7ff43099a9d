"""Fine-tuning the transformers classes: PEFT, Trainer, TRL; images in the loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tolerances import tolerance
from torch import Tensor
from transformers import (
    BitsAndBytesConfig,
    DataCollatorWithFlattening,
    Trainer,
    TrainingArguments,
)
from transformers import ChameleonForConditionalGeneration as StockChameleon
from transformers.trainer_utils import SaveStrategy
from wide import SEVEN, WIDE, example, make_image, wide_folder

from earlyfusion.checkpoints import detect
from earlyfusion.content import Image, Message, Text
from earlyfusion.hf import ChameleonForConditionalGeneration, ChameleonProcessor
from earlyfusion.image_tokenizer import ImageTokenizer

pytest.importorskip("accelerate")
peft = pytest.importorskip("peft")

pytestmark = [
    # What these libraries say of each other.
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Merge lora module to 4-bit linear:UserWarning"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    return wide_folder(tmp_path_factory.mktemp("wide"))


@pytest.fixture(scope="module")
def processor(folder: Path) -> Any:
    return ChameleonProcessor.from_pretrained(folder)


@pytest.fixture(scope="module")
def inputs(folder: Path) -> Any:
    return example(folder)


def load(folder: Path, nf4: bool = False, device: Any = "cpu") -> Any:
    settings: dict[str, Any] = {}
    if nf4:
        pytest.importorskip("bitsandbytes")
        quantised = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
        settings = {"quantization_config": quantised, "dtype": torch.bfloat16}
    model = ChameleonForConditionalGeneration.from_pretrained(folder, **settings)
    return model if nf4 else model.to(device)  # bitsandbytes chooses the device itself


def test_gradients_in_bf16_are_as_near_to_fp32_as_transformers(folder: Path, inputs: Any) -> None:
    """Ours come from compiled passes, where there is a compiler."""
    theirs = StockChameleon.from_pretrained(folder)
    gradients: list[dict[str, Tensor]] = []
    ours_alone = {"image_logits": False}  # as theirs
    runs = ((theirs, False, {}), (theirs, True, {}), (load(folder), True, ours_alone))
    for model, bf16, more in runs:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model(**inputs, labels=inputs["input_ids"], **more).loss
        loss.backward()
        named = model.named_parameters()
        gradients.append({name: p.grad.clone() for name, p in named if p.grad is not None})
    exact, allowed, ours = gradients
    assert ours
    for name in ours:
        gaps = [float((g[name] - exact[name]).norm()) for g in (ours, allowed)]
        assert gaps[0] < max(0.01 * float(exact[name].norm()), 1.5 * gaps[1]), name


def test_states_under_autocast_have_transformers_dtype(folder: Path) -> None:
    """So that a head of one's own in fp32 takes them."""
    ids = torch.arange(3, 20)[None]
    for model in (StockChameleon.from_pretrained(folder), load(folder)):
        with torch.autocast("cpu", torch.bfloat16):
            states = model.model.train()(input_ids=ids).last_hidden_state
        assert states.requires_grad and states.dtype is torch.float32


def adapters(targets: Any = SEVEN, **more: Any) -> Any:
    targets = targets if isinstance(targets, str) else list(targets)
    return peft.LoraConfig(r=4, target_modules=targets, **more)


def with_adapters(folder: Path, nf4: bool, device: Any = "cpu", **more: Any) -> Any:
    """Adapters that change something from the first step on."""
    model = load(folder, nf4, device)
    if nf4:
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    torch.manual_seed(0)
    return peft.get_peft_model(model, adapters(**more))


@torch.no_grad()
def logits(model: Any, inputs: Any) -> Tensor:
    return model.eval()(**inputs).logits.float()


def gap(given: Tensor, expected: Tensor) -> float:
    return float(((given - expected).norm() / expected.norm()).detach())


def step(model: Any, inputs: Any) -> Tensor:
    """One optimiser step on the text and the image; its loss."""
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    loss: Tensor = model(**inputs, labels=inputs["input_ids"]).loss
    loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in trained)
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


class TestAdapters:
    # bf16 matrices: what was computed in two steps is rounded in other places than in one.
    @pytest.mark.parametrize(("nf4", "tolerance"), [(False, 1e-5), (True, 0.02)])
    def test_train_save_merge(
        self,
        folder: Path,
        nf4: bool,
        tolerance: float,
        inputs: Any,
        tmp_path: Path,
        device: torch.device,
    ) -> None:
        inputs = inputs.to(device)
        model = with_adapters(folder, nf4, device)
        before = logits(model, inputs)
        losses = [step(model, inputs) for _ in range(3)]
        assert torch.isfinite(torch.stack(losses)).all()
        assert losses[-1] < losses[0]
        trained = logits(model, inputs)
        assert (trained - before).norm() > 0.3 * before.norm()
        model.save_pretrained(tmp_path)
        base = load(folder, nf4, device)
        logits(base, inputs)
        reloaded = peft.PeftModel.from_pretrained(base, tmp_path)
        assert gap(logits(reloaded, inputs), trained) < tolerance
        base = load(folder, nf4, device)
        logits(base, inputs)
        base = base.dequantize() if nf4 else base
        merged = peft.PeftModel.from_pretrained(base, tmp_path).merge_and_unload()
        assert isinstance(merged, ChameleonForConditionalGeneration)
        assert gap(logits(merged, inputs), trained) < tolerance

    @pytest.mark.parametrize("run_before", ["base", "adapters"])
    def test_merge_into_4_bits_is_off_by_their_rounding_alone(
        self, folder: Path, inputs: Any, tmp_path: Path, run_before: str
    ) -> None:
        """Also after a forward in eval mode, when some CPUs have the weights in another layout."""
        with_adapters(folder, nf4=False, init_lora_weights=False).save_pretrained(tmp_path)
        base = load(folder, nf4=True)
        if run_before == "base":
            logits(base, inputs)
        model = peft.PeftModel.from_pretrained(base, tmp_path)
        if run_before == "adapters":
            logits(model, inputs)
        expected = {
            name: module.get_delta_weight("default").float()
            for name, module in base.named_modules()
            if hasattr(module, "lora_A")
        }
        plain = load(folder, nf4=True).dequantize()
        merged = model.merge_and_unload().dequantize()
        for name, delta in expected.items():
            weight = plain.get_submodule(name).weight.float() + delta
            assert gap(merged.get_submodule(name).weight.float(), weight) < 0.15

    def test_all_linear_leaves_images_and_head_alone(self, folder: Path) -> None:
        model = peft.get_peft_model(load(folder), adapters("all-linear"))
        adapted = {n.split(".lora_")[0] for n, p in model.named_parameters() if p.requires_grad}
        assert len(adapted) == WIDE.num_hidden_layers * len(SEVEN)
        assert all("layers" in name and name.endswith(SEVEN) for name in adapted)

    def test_rows_of_images_can_be_trained_beside_adapters(
        self, folder: Path, inputs: Any, device: torch.device
    ) -> None:
        """Anole's recipe: only the rows of image tokens, in embedding and head."""
        rows = load(folder).model.vocabulary_mapping.image_tokens
        full, inputs = load(folder, device=device), inputs.to(device)
        full.requires_grad_(False)
        model = peft.get_peft_model(
            full, adapters(["q_proj"], trainable_token_indices={"lm_head": rows})
        )
        before = full.lm_head.weight.detach().clone()
        step(model, inputs)
        after = model.merge_and_unload().lm_head.weight
        changed = (after != before).any(1).nonzero().flatten().tolist()
        assert changed and set(changed) <= set(rows)

    def test_evaluation_does_not_cut_the_gradient_of_qlora(self, folder: Path, inputs: Any) -> None:
        """bitsandbytes repacks weights at an evaluation on some CPUs; that form has no gradient."""

        def gradients(evaluated: bool) -> list[Tensor]:
            model = with_adapters(folder, nf4=True, init_lora_weights=False)
            if evaluated:
                logits(model, inputs)
            model.train()
            model(**inputs, labels=inputs["input_ids"]).loss.backward()
            return [p.grad for p in model.parameters() if p.requires_grad]

        for evaluated, fresh in zip(gradients(True), gradients(False), strict=True):
            assert fresh.norm() > 0
            torch.testing.assert_close(evaluated, fresh)


def own_documents(folder: Path, documents: list[list[Message]]) -> tuple[list[Any], Any]:
    """The package's own training sequences of turns, and its vocabulary."""
    loaded = detect.load(folder)
    tokenizer = ImageTokenizer(loaded.vqgan, WIDE.vq_config.resolution)
    sequences = []
    for turns in documents:
        images = [part.pil for turn in turns for part in turn.parts if isinstance(part, Image)]
        codes = list(tokenizer.encode(images).numpy()) if images else []
        sequences.append(loaded.processor.encode_document(turns, codes))
    return sequences, loaded.processor.vocabulary


def said(role: str, *parts: str) -> dict[str, Any]:
    """A turn; "#" is an image."""
    typed = [{"type": "image"} if p == "#" else {"type": "text", "text": p} for p in parts]
    return {"role": role, "content": typed}


ROWS: list[dict[str, Any]] = [
    {
        "images": [make_image("red")],
        "messages": [said("user", "Draw a red apple."), said("assistant", "#")],
    },
    {
        "images": [make_image("blue"), make_image("red")],
        "messages": [
            said("user", "#", "What is this?"),
            said("assistant", "a pear and "),
            said("user", "Draw a red apple."),
            said("assistant", "a red ", "#", " apple"),
        ],
    },
    {"images": [], "messages": [said("user", "What is this?"), said("assistant", "a pear")]},
]


def as_documents(rows: list[dict[str, Any]]) -> list[list[Message]]:
    documents = []
    for row in rows:
        images = iter(row["images"])
        documents.append(
            [
                Message(
                    turn["role"],
                    [
                        Text(part["text"]) if part["type"] == "text" else Image.of(next(images))
                        for part in turn["content"]
                    ],
                )
                for turn in row["messages"]
            ]
        )
    return documents


def filled(model: Any, batch: Any) -> tuple[Tensor, Tensor]:
    """Ids and labels with the images' own tokens, by the tables alone."""
    ids, labels = (batch[name].to(model.device).clone() for name in ("input_ids", "labels"))
    full = model.fill_image_tokens(ids, batch["pixel_values"].to(model.device))
    labels[labels == ids] = full[labels == ids]
    return full, labels


class TestMixedPrecision:
    """accelerate takes the model's forward apart and puts another in its place."""

    @pytest.fixture(autouse=True)
    def _forgotten(self) -> Iterator[None]:
        """accelerate keeps the first precision that a process asked for."""
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)
        yield
        AcceleratorState._reset_state(reset_partial_state=True)

    @pytest.mark.parametrize("kind", ["bf16", "fp16"])
    def test_accelerate_prepares_and_unwraps(
        self, folder: Path, inputs: Any, kind: str, device: torch.device
    ) -> None:
        from accelerate import Accelerator

        model, inputs = load(folder, device=device), inputs.to(device)
        expected = logits(model, inputs)
        accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision="bf16")
        # fp16 needs a GPU; the class that a CPU cannot have is told its name only.
        accelerator.state._mixed_precision = kind
        optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
        prepared, optimizer = accelerator.prepare(model, optimizer)
        out = prepared.train()(**inputs, labels=inputs["input_ids"])
        assert out.logits.dtype == torch.float32
        assert 0 < gap(out.logits.detach(), expected) < 0.05  # not in fp32, and near it
        accelerator.backward(out.loss)
        optimizer.step()
        back = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
        with torch.no_grad():
            plain = ChameleonForConditionalGeneration.forward(back.eval(), **inputs).logits
        assert torch.equal(logits(back, inputs), plain)

    def test_trainer(self, folder: Path, inputs: Any, tmp_path: Path, device: torch.device) -> None:
        model = load(folder)
        row = {name: value[0] for name, value in inputs.items()}
        row["labels"] = row["input_ids"]
        before = model.lm_head.weight.detach().clone()
        settings = arguments(tmp_path, device=device, bf16=True)
        out = Trainer(model, settings, train_dataset=[row, row]).train()  # type: ignore[arg-type]
        with torch.no_grad():
            expected = float(load(folder)(**inputs, labels=inputs["input_ids"]).loss)
        assert out.training_loss == pytest.approx(expected, rel=0.02)
        assert not torch.equal(before, model.lm_head.weight)


class TestTrainer:
    def test_a_step_with_images_in_the_loss(
        self, folder: Path, inputs: Any, tmp_path: Path, device: torch.device
    ) -> None:
        model = load(folder)
        row = {name: value[0] for name, value in inputs.items()}
        row["labels"] = row["input_ids"]
        full = model.fill_image_tokens(inputs["input_ids"], inputs["pixel_values"])
        with torch.no_grad():
            scores = model(input_ids=full).logits[0, :-1]
        expected = torch.nn.functional.cross_entropy(scores, full[0, 1:])
        before = model.lm_head.weight.detach().clone()
        settings = arguments(tmp_path, device=device)
        out = Trainer(model, settings, train_dataset=[row, row]).train()  # type: ignore[arg-type]
        model.cpu()
        assert out.training_loss == pytest.approx(float(expected), rel=1e-5)
        image_ids = torch.tensor(model.model.vocabulary_mapping.image_tokens)
        assert ((model.lm_head.weight - before)[image_ids] != 0).any(1).all()
        assert not any(p.requires_grad for p in model.model.vqmodel.parameters())


class TestPackedRows:
    TEXTS = ("a red pear", "Draw a red apple, please.", "What is this?", "This is a pear.")

    def documents(self, processor: Any) -> list[list[int]]:
        return [processor(text=text)["input_ids"][0].tolist() for text in self.TEXTS]

    def test_documents_do_not_see_each_other(self, folder: Path, processor: Any) -> None:
        model, documents = load(folder).eval(), self.documents(processor)
        ids = torch.tensor([[token for document in documents for token in document]])
        positions = torch.cat([torch.arange(len(document)) for document in documents])[None]
        with torch.no_grad():
            packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits
            alone = [model(input_ids=torch.tensor([each])).logits for each in documents]
        assert gap(packed, torch.cat(alone, 1)) < 1e-5

    def test_a_resumed_trainer_goes_on_as_if_never_stopped(
        self, folder: Path, processor: Any, tmp_path: Path
    ) -> None:
        rows = [{"input_ids": ids, "labels": ids} for ids in self.documents(processor)]

        def trained(**more: Any) -> dict[str, Tensor]:
            settings = arguments(tmp_path, num_train_epochs=2, save_steps=1)
            settings.max_steps, settings.save_strategy = 4, SaveStrategy.STEPS
            model = load(folder)
            collate = DataCollatorWithFlattening()
            trainer = Trainer(model, settings, train_dataset=rows, data_collator=collate)  # type: ignore[arg-type]
            trainer.train(**more)
            return {name: value.clone() for name, value in model.state_dict().items()}

        full = trained()
        resumed = trained(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        assert all(torch.equal(full[name], value) for name, value in resumed.items())


def arguments(
    folder: Path,
    kind: Callable[..., Any] = TrainingArguments,
    device: torch.device | None = None,
    **more: Any,
) -> Any:
    return kind(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        max_steps=1,
        learning_rate=1e-3,
        report_to="none",
        save_strategy="no",
        use_cpu=device is None or device.type == "cpu",
        disable_tqdm=True,
        **more,
    )


def sft(model: Any, processor: Any, rows: Any, folder: Path, **more: Any) -> Any:
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    extra = {name: more.pop(name) for name in ("peft_config",) if name in more}
    settings = {"max_length": None, "bf16": False} | more
    return trl.SFTTrainer(
        model=model,
        args=arguments(folder, trl.SFTConfig, model.device, **settings),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=processor,
        **extra,
    )


class TestSFTTrainer:
    def test_rows_become_the_packages_own_documents(
        self, folder: Path, processor: Any, tmp_path: Path
    ) -> None:
        """Token for token, with answers and their end as all that is trained on."""
        model = load(folder)
        trainer = sft(model, processor, ROWS, tmp_path, assistant_only_loss=True)
        batch = trainer.data_collator([dict(row) for row in ROWS])
        ids, labels = filled(model, batch)
        sequences, _ = own_documents(folder, as_documents(ROWS))
        for row, expected in enumerate(sequences):
            length = len(expected)
            assert ids[row, :length].tolist() == expected.ids
            weighed = [
                t if w else -100 for t, w in zip(expected.ids, expected.loss_mask, strict=True)
            ]
            assert labels[row].tolist() == weighed + [-100] * (ids.shape[1] - length)
            assert batch["attention_mask"][row].sum() == length

    @pytest.mark.parametrize("only_answers", [False, True])
    def test_a_step_with_images_in_the_loss(
        self,
        folder: Path,
        processor: Any,
        tmp_path: Path,
        only_answers: bool,
        device: torch.device,
    ) -> None:
        model, rows = load(folder, device=device), ROWS[:2]
        trainer = sft(model, processor, rows, tmp_path, assistant_only_loss=only_answers)
        ids, labels = filled(model, batch := trainer.data_collator([dict(row) for row in rows]))
        with torch.no_grad():
            mask = batch["attention_mask"].to(device)
            scores = load(folder, device=device)(input_ids=ids, attention_mask=mask).logits
        expected = torch.nn.functional.cross_entropy(
            scores[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        )
        before = model.lm_head.weight.detach().clone()
        out = trainer.train()
        assert out.training_loss == pytest.approx(float(expected), rel=tolerance(1e-5, device))
        image_ids = torch.tensor(model.model.vocabulary_mapping.image_tokens)
        assert ((model.lm_head.weight - before)[image_ids] != 0).any(1).all()

    def test_prompt_and_completion(
        self, folder: Path, processor: Any, tmp_path: Path, device: torch.device
    ) -> None:
        """Images in the prompt; the loss is on the completion and its end."""
        row = {
            "images": [make_image("red")],
            "prompt": [{"role": "user", "content": "What is this?"}],
            "completion": [{"role": "assistant", "content": "a pear"}],
        }
        model = load(folder, device=device)
        trainer = sft(model, processor, [row], tmp_path)
        ids, labels = filled(model, trainer.data_collator([dict(row)]))
        turns = [Message("user", [Image.of(make_image("red")), Text("What is this?")])]
        sequences, _ = own_documents(folder, [[*turns, Message("assistant", [Text("a pear")])]])
        assert ids[0].tolist() == sequences[0].ids
        assert (labels[0] != -100).tolist() == sequences[0].loss_mask
        assert torch.isfinite(torch.tensor(trainer.train().training_loss))

    @pytest.mark.parametrize("nf4", [False, True], ids=["lora", "qlora"])
    def test_adapters_in_bf16(
        self, folder: Path, processor: Any, tmp_path: Path, nf4: bool
    ) -> None:
        trainer = sft(
            load(folder, nf4), processor, ROWS[:2], tmp_path, bf16=True, peft_config=adapters()
        )
        before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
        out = trainer.train()
        assert torch.isfinite(torch.tensor(out.training_loss))
        changed = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
        assert changed == {n for n in before if "lora_B" in n}
        trainer.save_model(str(tmp_path / "saved"))
        assert (tmp_path / "saved" / "adapter_model.safetensors").is_file()
