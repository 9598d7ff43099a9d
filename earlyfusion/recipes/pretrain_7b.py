"""Pre-training of the 7B as in the paper (arXiv 2405.09818, sections 2.2 and 2.3).

    earlyfusion tokenize CORPUS -o shards/first --pairs document --prompt-images crop --model MODEL
    torchrun --nnodes 128 --nproc-per-node 8 ... -m earlyfusion train pretrain_7b \\
        tokenizer=MODEL data=shards/first added=shards/better

`MODEL` is a folder with a tokenizer and an image tokenizer. 2,048 rows of 4,096 tokens a step,
AdamW at 1e-4 with a warm-up of 4,000 steps and exponential decay, dropout 0.1, 9.2 T tokens; in the
last fifth the sources in `data` keep half of the weight, and those in `added`, the better ones, get
the other half. The run ends with `model/` in transformers' layout. Machine, run time: the paper
took 856,481 hours of an A100, on 1,024 of them; `earlyfusion train pretrain_7b --plan` prints
memory, speed and days of other machines. The scores to expect are those of the paper's section 4;
the run itself has not been made here.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from earlyfusion import processes
from earlyfusion.checkpoints import detect
from earlyfusion.checkpoints.hf import save_hf
from earlyfusion.checkpoints.source import Source
from earlyfusion.config import PRESETS, ModelConfig
from earlyfusion.data.corpus import CorpusConfig, open_corpus
from earlyfusion.data.encoding import EncodingSettings
from earlyfusion.data.packing import RoleWeights
from earlyfusion.data.shard_maker import load_image_tokenizer
from earlyfusion.errors import SettingError
from earlyfusion.image_tokenizer import ImageTokenizer, Mode
from earlyfusion.model.transformer import Transformer
from earlyfusion.parallel import ParallelConfig
from earlyfusion.processor import Processor
from earlyfusion.train import checkpoint
from earlyfusion.train.language import LanguageConfig
from earlyfusion.train.optim import OptimConfig
from earlyfusion.train.trainer import RunConfig, train
from earlyfusion.train.watch import WatchConfig


@dataclass
class PretrainConfig(LanguageConfig):
    """Training of a transformer from random weights, in two stages of data."""

    tokenizer: str = "mini"
    """A model folder or hub id, whose tokenizer and image tokenizer the new model gets."""
    second_stage: float = 0.8
    """Share of the run after which the sources in `added` join."""
    documents_a_row: float = 3.0
    """How many documents of the corpus fill a row, to find where the second stage begins."""
    model: ModelConfig = field(default_factory=ModelConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.second_stage <= 1:
            raise SettingError(
                f"second_stage={self.second_stage} must be a share above 0 and at most 1"
            )
        if self.documents_a_row <= 0:
            raise SettingError(f"documents_a_row={self.documents_a_row} must be positive")

    def shape(self) -> ModelConfig:
        return self.model


def main(config: PretrainConfig) -> None:
    """Train, then write `model/`."""
    run = config.run
    source = detect.open_source(detect.locate(config.tokenizer))
    processor = Processor(source.tokenizer, source.layout)
    _check_vocabulary(config, processor.vocabulary.size)
    image_tokenizer = load_image_tokenizer(source, "cpu")
    length = config.length or config.model.max_position_embeddings
    corpus = open_corpus(
        with_second_stage(config), processor, image_tokenizer, length, config.notes, run.seed
    )
    with torch.device("meta"):  # `train` gives each process memory and weights for its shard only
        model = Transformer(_model_shape(config, source), config.dropout)
    task = config.task(model, corpus.stream, length, processor.vocabulary.pad)
    train(task, run, config.optim)
    if processes.rank() == 0:
        save_model(config, source, image_tokenizer, corpus.resize_mode)


def _model_shape(config: PretrainConfig, source: Source) -> ModelConfig:
    """The model's shape, with the image tokenizer and the control tokens of `tokenizer`."""
    names = ("vq_config", "bos_token_id", "eos_token_id", "pad_token_id")
    # Everything that must agree with the tokenizer and the codes; the rest is the recipe's.
    return replace(config.model, **{name: getattr(source.config, name) for name in names})


def with_second_stage(config: PretrainConfig) -> CorpusConfig:
    """The corpus, whose added sources join at their share of the run."""
    rows = config.run.steps * config.rows * config.second_stage
    first_document = config.corpus.added_from or int(rows * config.documents_a_row)
    return replace(config.corpus, added_from=first_document)


def save_model(
    config: PretrainConfig, source: Source, image_tokenizer: ImageTokenizer, mode: Mode
) -> None:
    """Write the newest weights of the run as a model folder, in bf16."""
    with torch.device("meta"):
        model = Transformer(_model_shape(config, source))
    tensors, _ = checkpoint.load(config.run.out, only="model")
    model.load_state_dict(tensors["model"], assign=True)
    save_hf(
        config.run.out / "model",
        model.eval(),
        image_tokenizer.vqgan,
        source.tokenizer.read_text(encoding="utf-8-sig"),
        source.generation_defaults,
        dtype=torch.bfloat16,
        resize_mode=mode,
    )


def _check_vocabulary(config: PretrainConfig, size: int) -> None:
    """Raise `SettingError` if the tokenizer has another number of tokens than the model."""
    if size != config.model.vocab_size:
        raise SettingError(
            f"tokenizer={config.tokenizer} has {size:,} tokens, the model "
            f"{config.model.vocab_size:,}: give a tokenizer of that size, or vocab_size={size}"
        )


config = PretrainConfig(
    model=PRESETS["chameleon-7b"],
    rows=2048,
    micro_rows=1,
    length=4096,
    dropout=0.1,
    corpus=CorpusConfig(
        # Pre-training keeps the data's own shares: balance is for fine-tuning (section 3.1).
        balance=False,
        encoding=EncodingSettings(resize_mode="crop", pairs="document"),
    ),
    # Plain documents have no prompt: every token is learned.
    weights=RoleWeights(prompt_text=1.0, prompt_image=1.0),
    run=RunConfig(
        out=Path("runs/pretrain_7b"),
        steps=1_096_725,
        precision="bf16",
        save_every=1000,
        save_beside=True,
        peak_tflops=989.0,
        parallel=ParallelConfig(shard=8, checkpointing="selective"),
        watch=WatchConfig(spike=1.5),
    ),
    optim=OptimConfig(),
)
