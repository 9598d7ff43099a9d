"""Fine-tune any model on rows of text and pictures, or on token shards.

    earlyfusion train finetune data=captions.jsonl
    earlyfusion train finetune data=chats.parquet@2,shards model=./my-7b lora=16 steps=500
    earlyfusion train finetune data=pairs.tar trainable=image_head

The paper's settings (arXiv 2405.09818, section 3.1): cosine decay from 1e-5, weight decay 0.1,
dropout 0.05, z-loss, prompts masked from the loss, packed rows, border-padded pictures in prompts
and cropped ones in answers, modalities in balance. The rows are told apart by their keys
(docs/data.md). Ends with `model/` under the run's folder, which Chameleon.load takes. Machine: the
embedded model trains on a CPU; weights and optimizer take 16 bytes a weight, with `lora` 4. Score:
the loss of answers by modality in `metrics.jsonl`.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch

from earlyfusion import parallel
from earlyfusion.checkpoints import formats
from earlyfusion.checkpoints.hf import Loaded, assemble, save_hf
from earlyfusion.checkpoints.source import Source
from earlyfusion.errors import DataError, SettingError
from earlyfusion.image_tokenizer import ImageTokenizer
from earlyfusion.model.transformer import Block, Transformer
from earlyfusion.train import checkpoint, lora
from earlyfusion.train.corpus.mixture import Ahead
from earlyfusion.train.corpus.sources import CorpusConfig, open_corpus
from earlyfusion.train.data import Packer, RoleWeights
from earlyfusion.train.language import LanguageTask
from earlyfusion.train.optim import OptimConfig
from earlyfusion.train.trainer import RunConfig, resolve_device, train


@dataclass
class FinetuneConfig:
    model: str = "mini"
    """The embedded model, a model folder, or a hub id."""
    rows: int = 1
    length: int = 0
    """Tokens of a row; 0: the model's context."""
    dropout: float = 0.05
    z_weight: float = 1e-5
    trainable: str = "all"
    """"all", or "image_head": only the rows of the head that score image tokens."""
    lora: int = 0
    """Rank of low-rank adapters, which are merged at the end; 0: none."""
    workers: int = 2
    """Threads that make the next documents while the network learns; 0: none."""
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    weights: RoleWeights = field(default_factory=RoleWeights)
    run: RunConfig = field(default_factory=RunConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)

    def __post_init__(self) -> None:
        if self.trainable not in ("all", "image_head"):
            raise SettingError(f"trainable={self.trainable!r} is unknown: choose all or image_head")
        if self.lora and self.trainable != "all":
            raise SettingError(f"lora={self.lora} and trainable={self.trainable}: choose one")
        for name in ("rows", "length", "lora", "workers"):
            if getattr(self, name) < (name == "rows"):
                raise SettingError(f"{name}={getattr(self, name)} must be {int(name == 'rows')} up")


def main(config: FinetuneConfig) -> None:
    apart = config.lora or config.trainable != "all"
    if apart and parallel.processes() > 1:
        raise SettingError(
            f"lora={config.lora} and trainable={config.trainable} train in one process: start "
            "without torchrun"
        )
    source = formats.open_source(formats.locate(config.model))
    if source.kind != "chameleon":
        raise SettingError(
            f"{config.model} is of the {source.kind} family, whose pictures are spelled otherwise: "
            "fine-tune a Chameleon model"
        )
    device = resolve_device(config.run.device)
    loaded = assemble(source, device)
    model = prepared(loaded, config)
    image_tokenizer = ImageTokenizer(loaded.vqgan, loaded.config.vq_config.resolution)
    length = config.length or loaded.config.max_position_embeddings
    run = config.run
    corpus = open_corpus(
        config.corpus, loaded.processor, image_tokenizer, length, run.out, run.seed
    )
    _check_data(run.out, corpus.fingerprint)
    stream = Ahead(corpus.stream, config.workers) if config.workers else corpus.stream
    packer = Packer(stream, config.weights, config.rows, length, loaded.processor.vocabulary.pad)
    try:
        train(LanguageTask(model, packer, config.z_weight), run, config.optim)
    finally:
        if isinstance(stream, Ahead):
            stream.close()
    for sentence in corpus.report() if parallel.rank() == 0 else ():
        print(sentence, file=sys.stderr)
    if parallel.processes() > 1:  # each holds a part of the model
        model = assemble(source).transformer.float()
        model.load_state_dict(checkpoint.load(run.out, only="model")[0]["model"])
    if parallel.rank() == 0:
        save(run.out / "model", model, loaded, source)


def prepared(loaded: Loaded, config: FinetuneConfig) -> Transformer:
    """The model in fp32 with dropout, and with its trainable part set."""
    torch.manual_seed(config.run.seed)
    model = loaded.transformer.float()
    for block in model.modules():
        if isinstance(block, Block):
            block.dropout = config.dropout
    if config.lora:
        lora.adapt(model, config.lora)
    elif config.trainable == "image_head":
        lora.train_image_head(model, loaded.processor.vocabulary.image_tokens)
    return model


def save(folder: Path, model: Transformer, loaded: Loaded, source: Source) -> None:
    """Write a model folder in the dtypes of the model that it came from."""
    lora.merge(model)
    save_hf(
        folder,
        model.eval(),
        loaded.vqgan,
        loaded.processor.tokenizer_file.read_text(encoding="utf-8"),
        loaded.generation_defaults,
        dtype=source.tensors["model.embed_tokens.weight"].dtype,
        vq_dtype=next((stored.dtype for stored in source.vq.values()), None),
    )


def _check_data(out: Path, fingerprint: str) -> None:
    """Refuse to go on with a run on other data than it began with."""
    path = out / "data.json"
    if checkpoint.steps(out) and path.exists():
        if json.loads(path.read_text(encoding="utf-8"))["fingerprint"] != fingerprint:
            raise DataError(
                f"the data or its mixture is not what {out} began with: give the same, or another "
                "out folder"
            )
        return
    out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"fingerprint": fingerprint}) + "\n", encoding="utf-8")


config = FinetuneConfig(
    run=RunConfig(out=Path("runs/finetune"), steps=1000),
    optim=OptimConfig(lr=1e-5, warmup_steps=50, decay="cosine"),
)
