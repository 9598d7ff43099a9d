"""Fine-tune any model on rows of text and images, or on token shards.

    earlyfusion train finetune data=captions.jsonl
    earlyfusion train finetune data=chats.parquet@2,shards model=./my-7b lora=16 steps=500
    earlyfusion train finetune data=pairs.tar trainable=image_head

The paper's settings (arXiv 2405.09818, section 3.1): cosine decay from 1e-5, weight decay 0.1,
dropout 0.05, z-loss, prompts masked from the loss, packed rows, modalities in balance. Images of
prompts become squares in the way that the model was trained with (`resize_mode=fit` is the
paper's), those of answers are cropped. The keys of a row say what it is (docs/data.md). The run
ends with `model/` in its folder, which Chameleon.load takes. Machine: the embedded model trains on
a CPU; weights and optimizer take 16 bytes per weight, frozen weights 4, or 2 if they are bf16
weights of products in blocks. Score: the loss of answers by modality in `metrics.jsonl`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from earlyfusion import processes
from earlyfusion.checkpoints import detect
from earlyfusion.checkpoints.adapter import save_adapter
from earlyfusion.checkpoints.assemble import LoadedModel, assemble
from earlyfusion.checkpoints.hf import save_hf
from earlyfusion.checkpoints.source import Source, read_card
from earlyfusion.config import PRESETS, ModelConfig
from earlyfusion.data.corpus import Corpus, open_corpus
from earlyfusion.data.held_out import ValidationConfig, held_out_documents
from earlyfusion.data.mixture import PrefetchedStream
from earlyfusion.devices import resolve_device
from earlyfusion.errors import DataError, SettingError
from earlyfusion.fields import check_at_least
from earlyfusion.files import expanded
from earlyfusion.image_tokenizer import ImageTokenizer, Mode
from earlyfusion.model.transformer import Block, Transformer
from earlyfusion.train import checkpoint, lora
from earlyfusion.train.folder import check_same_data, say
from earlyfusion.train.language import LanguageConfig, LanguageTask
from earlyfusion.train.optim import OptimConfig
from earlyfusion.train.plan import FEW_GPUS, Job
from earlyfusion.train.samples import PromptedImages, encoded_prompts, image_prompts
from earlyfusion.train.trainer import RunConfig, train
from earlyfusion.train.validation import LOSS, Validation, best_folder


@dataclass
class FinetuneConfig(LanguageConfig):
    """Fine-tuning of all weights, of low-rank adapters, or of the image rows of the head. Raises
    `SettingError` for combinations that are not possible."""

    model: str = "mini"
    """The embedded model, a model folder, or a hub id."""
    trainable: str = "all"
    """"all", or "image_head": only the rows of the head that score image tokens."""
    lora: int = 0
    """Rank of low-rank adapters; 0: none. They are written to `adapter/`, in PEFT's format."""
    merge: bool = True
    """Whether adapters are also merged into `model/`."""
    alpha: float = 0.0
    """The adapters are scaled by this over the rank; 0: twice the rank."""
    workers: int = 2
    """Threads that prepare the next documents while the network learns; 0: none."""
    prompts: tuple[str, ...] = ()
    """Requests whose images are generated at `run.sample_every`; none: some from the data."""
    held_out: ValidationConfig = field(default_factory=ValidationConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.trainable not in ("all", "image_head"):
            raise SettingError(f"trainable={self.trainable!r} is unknown: choose all or image_head")
        if self.lora and self.trainable != "all":
            raise SettingError(f"lora={self.lora} and trainable={self.trainable}: choose one")
        check_at_least(self, lora=0, alpha=0, workers=0)
        if self.alpha and not self.lora:
            raise SettingError(f"alpha={self.alpha:g} scales adapters: give their rank, as lora=16")
        if not self.merge and not self.lora:
            raise SettingError("merge=false leaves adapters alone: give their rank, as lora=16")
        if self.trains != "all" and self.run.parallel.tensor > 1:
            raise SettingError(
                f"tensor={self.run.parallel.tensor} cannot split a model of which a part is "
                "trained: use tensor=1, and shard"
            )

    @property
    def trains(self) -> str:
        """Which weights are trained: a key of `plan.TRAINABLE`."""
        return "adapters" if self.lora else self.trainable

    def shape(self) -> ModelConfig:
        if self.model in detect.EMBEDDED or expanded(self.model).is_dir():
            return detect.open_source(detect.locate(self.model)).config
        name = Path(self.model).name
        if name not in PRESETS:
            raise SettingError(
                f"model={self.model} is not on this disk: download it first, or give one of "
                f"{', '.join(PRESETS)}"
            )
        return PRESETS[name]

    def job(self) -> Job:
        return replace(super().job(), trainable=self.trains, lora=self.lora, gpus=FEW_GPUS)


def main(config: FinetuneConfig) -> None:
    """Train, then write `adapter/` and `model/` as the config says."""
    run = config.run
    source = detect.open_source(detect.locate(config.model))
    _check_model(config, source)
    loaded = assemble(source, resolve_device(run.device))
    model = prepare_model(loaded, config)
    side = loaded.config.vq_config.resolution
    image_tokenizer = ImageTokenizer(loaded.vqgan, side, loaded.resize_mode)
    length = config.length or source.config.max_position_embeddings
    corpus = open_corpus(
        config.corpus,
        loaded.processor,
        image_tokenizer,
        length,
        config.notes,
        run.seed,
        config.held_out,
    )
    _check_data(config, corpus)
    # A document depends only on its number, so threads may prepare them in any order.
    stream = PrefetchedStream(corpus.stream, config.workers) if config.workers else corpus.stream
    try:
        task = config.task(model, stream, length, loaded.processor.vocabulary.pad)
        samples = _build_samples(config, model, loaded, image_tokenizer, corpus)
        train(task, run, config.optim, samples, _build_validation(config, task, corpus))
    finally:
        if isinstance(stream, PrefetchedStream):
            stream.close()
    # From here on the first process works alone: no collective may follow.
    if processes.rank() == 0:
        _save_results(config, source, loaded, model, corpus)


def _save_results(
    config: FinetuneConfig,
    source: Source,
    loaded: LoadedModel,
    model: Transformer,
    corpus: Corpus,
) -> None:
    """Write `adapter/` and `model/`, with the weights of the lowest loss of held-out documents, or
    the last ones if none are held out. `model` is the one that was trained."""
    run = config.run
    for sentence in corpus.report():
        print(sentence, file=sys.stderr)
    checkpoints = best_folder(run.out) if config.held_out.is_on else run.out
    if processes.count() > 1:  # the first process only holds a shard of the model
        model = prepare_model(assemble(source), config)
    if checkpoints != run.out or processes.count() > 1:
        tensors, state = checkpoint.load(checkpoints, only="model")
        checkpoint.load_model(model, tensors["model"], checkpoints)
        if LOSS in state:
            say(
                f"the model has the weights of step {state['step']:,}, where {LOSS} was "
                f"{state[LOSS]:.4g}"
            )
    if config.lora:
        save_adapter(run.out / "adapter", lora.adapters(model), config.model)
        say(f"the adapter is in {run.out / 'adapter'}, for Chameleon.load(..., adapter=) or PEFT")
    if config.merge:
        cards = read_card(source.folder) | {"README.md": _model_card(config, corpus, source.folder)}
        save_model(run.out / "model", model, loaded, source, corpus.resize_mode, cards)


def _build_validation(
    config: FinetuneConfig, task: LanguageTask, corpus: Corpus
) -> Validation | None:
    if not config.held_out.is_on:
        return None
    documents = held_out_documents(corpus.held_out)
    return Validation(lambda: task.measure(documents), config.held_out, config.run.save_every)


def _build_samples(
    config: FinetuneConfig,
    model: Transformer,
    loaded: LoadedModel,
    image_tokenizer: ImageTokenizer,
    corpus: Corpus,
) -> PromptedImages | None:
    """Generates images during the run; None if the model or the data has no images to generate."""
    processor = loaded.processor
    if not loaded.can_draw:
        return None
    if config.prompts:
        prompts = encoded_prompts(processor, config.prompts)
    else:
        prompts = image_prompts(processor, corpus.stream, count=4)
    if not prompts:
        return None
    defaults, seed = loaded.generation_defaults, config.run.seed
    return PromptedImages(model, processor, image_tokenizer, prompts, defaults, seed)


def prepare_model(loaded: LoadedModel, config: FinetuneConfig) -> Transformer:
    """Make a loaded model ready for training: dropout, adapters or image rows, and fp32 weights.
    With `precision=bf16`, frozen matrices of the blocks that are stored in bf16 stay in bf16, which
    gives the same result in half of the memory."""
    torch.manual_seed(config.run.seed)  # the initial weights of adapters are random numbers
    model = loaded.transformer
    has_frozen_bf16 = config.trains != "all" and config.run.precision == "bf16"
    frozen = [x.weight for x in lora.block_linears(model)] if has_frozen_bf16 else []
    bf16_ids = {id(weight) for weight in frozen if weight.dtype == torch.bfloat16}
    for parameter in model.parameters():
        # AdamW in bf16 would lose updates smaller than a weight's last bit.
        if id(parameter) not in bf16_ids:
            parameter.data = parameter.data.float()
    for block in model.modules():
        if isinstance(block, Block):
            block.dropout = config.dropout
    if config.lora:
        lora.adapt(model, config.lora, config.alpha or None)
    elif config.trainable == "image_head":
        lora.train_image_head(model, loaded.processor.vocabulary.image_tokens)
    return model


def save_model(
    folder: Path,
    model: Transformer,
    loaded: LoadedModel,
    source: Source,
    resize_mode: Mode,
    cards: Mapping[str, str],
) -> None:
    """Merge adapters, and write a model folder in the dtypes of the model that the run began with.
    `cards` are the texts of its model card and licences, by file name."""
    lora.merge(model)
    save_hf(
        folder,
        model.eval(),
        loaded.vqgan,
        loaded.processor.tokenizer_file.read_text(encoding="utf-8-sig"),
        loaded.generation_defaults,
        dtype=source.tensors["model.embed_tokens.weight"].dtype,
        vq_dtype=next((stored.dtype for stored in source.vq.values()), None),
        resize_mode=resize_mode,
        extra_files=cards,
    )


def _model_card(config: FinetuneConfig, corpus: Corpus, folder: Path) -> str:
    """The model card: what the model was tuned on, then the card of the model that it began with,
    from `folder`."""
    run, parts = config.run, {"all": "all weights", "image_head": "the head's image rows"}
    facts = {
        "began with": config.model,
        "trained": parts.get(config.trains, f"adapters of rank {config.lora}, merged"),
        "data": ", ".join((*config.corpus.data, *config.corpus.added)),
        "rows of data": f"{sum(map(len, corpus.documents)):,}",
        "held out": str(config.held_out.validation or ", ".join(config.held_out.validation_data)),
        "steps": f"{checkpoint.steps(run.out)[-1]:,}, {config.rows} packed rows each",
        "rate, seed": f"{config.optim.lr:g}, {run.seed}",
        "images of prompts": f"{corpus.resize_mode} (resize_mode)",
    }
    lines = [f"| {name} | {value} |" for name, value in facts.items()]
    yaml, base_card = _split_card(folder)
    table = "\n".join(["# A fine-tuned model", "", "| | |", "| --- | --- |", *lines])
    title = "\n\n---\n\n*The card of the model that it began with:*\n\n"
    return f"{yaml}{table}" + (f"{title}{base_card}" if base_card else "\n")


def _split_card(folder: Path) -> tuple[str, str]:
    """The YAML at the top of a folder's README.md, and the rest."""
    path = folder / "README.md"
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    yaml = re.match(r"---\n.*?\n---\n+", text, re.DOTALL)
    return (yaml[0], text[yaml.end() :]) if yaml else ("", text)


def _check_model(config: FinetuneConfig, source: Source) -> None:
    """Raise `SettingError` for a model of another family, or rows longer than its context."""
    if source.family != "chameleon":
        raise SettingError(
            f"{config.model} is of the {source.family} family, which spells images in another "
            "way: fine-tune a Chameleon model"
        )
    if config.length > source.config.max_position_embeddings:
        raise SettingError(
            f"length={config.length} is longer than the context of {config.model}, "
            f"{source.config.max_position_embeddings:,} tokens: give that or less"
        )


def _check_data(config: FinetuneConfig, corpus: Corpus) -> None:
    """Raise `DataError` for data that cannot train the image head, and if the run began with other
    data."""
    if config.trainable == "image_head" and not any(
        d.answer_kinds().any() for d in corpus.documents
    ):
        raise DataError(
            "trainable=image_head learns to generate images, but no answer of the data has one: "
            "give data with images in answers"
        )
    check_same_data(config.run.out, corpus.fingerprint, "the data or its mixture is")


config = FinetuneConfig(
    dropout=0.05,
    run=RunConfig(out=Path("runs/finetune"), steps=1000),
    optim=OptimConfig(lr=1e-5, warmup_steps=50, decay="cosine"),
)
