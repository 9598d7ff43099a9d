"""What all stages of the transformer share: config, first weights, samples, model folder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from earlyfusion.checkpoints import detect
from earlyfusion.checkpoints.assemble import assemble, vqgan_of
from earlyfusion.checkpoints.hf import save_hf
from earlyfusion.config import ModelConfig
from earlyfusion.data.packing import RoleWeights
from earlyfusion.devices import resolve_device
from earlyfusion.errors import DataError, SettingError
from earlyfusion.fields import check_at_least, check_shares
from earlyfusion.image_tokenizer import ImageTokenizer
from earlyfusion.kernels.twins import accelerate
from earlyfusion.mini.emoji.dialogues import Sample, texts_of
from earlyfusion.model.transformer import Transformer
from earlyfusion.model.vqgan import VQGAN
from earlyfusion.processor import Processor, train_tokenizer
from earlyfusion.train import checkpoint
from earlyfusion.train.language import job_of
from earlyfusion.train.optim import OptimConfig
from earlyfusion.train.plan import Job
from earlyfusion.train.samples import PromptedImages, encoded_prompts
from earlyfusion.train.trainer import RunConfig

# How a model folder samples by default.
GENERATION = {
    "text": {"temperature": 0.0},
    "image": {"temperature": 0.5, "top_p": 0.9},
    "guidance": {"text": 1.0, "image": 1.0},
}


@dataclass
class StageConfig:
    """Fields of every recipe that trains mini's transformer. Raises `SettingError`."""

    data: Path = Path("data/emoji")
    """Folder of the emoji data (docs/mini.md)."""
    image_tokenizer: Path = Path("runs/mini_image_tokenizer")
    """The run of an image tokenizer, or a model's folder, or `mini`."""
    start: Path | None = None
    """Where the weights and the tokenizer come from: a run (its newest weights), a model's folder,
    or `mini` (none: random weights and a new tokenizer)."""
    rows: int = 2
    """Packed rows per step."""
    length: int = 2048
    """Tokens per row."""
    dropout: float = 0.0
    """Share of the outputs of attention and feed-forward that are set to zero."""
    z_weight: float = 1e-5
    """Weight of the z-loss, the mean squared logarithm of the softmax normaliser."""
    prompts: tuple[str, ...] = ()
    """Requests whose images are generated at the end and at `run.sample_every`."""
    run: RunConfig = field(default_factory=RunConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    weights: RoleWeights = field(default_factory=RoleWeights)

    def __post_init__(self) -> None:
        check_at_least(self, rows=1, length=1, z_weight=0)
        check_shares(self, "dropout", below_one=True)

    def job(self) -> Job:
        """The input of `earlyfusion train RECIPE --plan`."""
        return job_of(self.model, self.run, self.rows, self.length, self.dropout)


def load_image_tokenizer(run: Path, config: ModelConfig) -> VQGAN:
    """The image tokenizer of a run (its newest weights) or of a model's folder, rounded to fp16.
    Raises `SettingError` if that of a model has another shape than `config.vq_config`."""
    if (folder := model_folder(run)) is not None:
        source = detect.open_source(folder)
        if source.config.vq_config != config.vq_config:
            raise SettingError(
                f"image_tokenizer={run} encodes images of {source.config.vq_config.resolution} "
                f"pixels, and this recipe is for {config.vq_config.resolution} or for another "
                "shape: set the fields of model.vq_config to those of the model's config.json"
            )
        tensors = vqgan_of(source).state_dict()
    else:
        tensors = checkpoint.weights(run)
    vqgan = VQGAN(config.vq_config)
    # Rounded, because the shipped image tokenizer is fp16 and must give the same codes.
    vqgan.load_state_dict({k: v.half().float() for k, v in tensors.items()})
    return accelerate(vqgan.eval().requires_grad_(False))


def text_tokenizer(
    config: StageConfig, samples: Iterable[Sample], whole: Sequence[str] = ()
) -> Path:
    """The path of `tokenizer.json` in the run's folder. A missing one is copied from `start` or,
    without a `start`, trained on the samples, with each word of `whole` as one token."""
    path = config.run.out / "tokenizer.json"
    if path.exists():
        return path
    if config.start is not None:
        start = model_folder(config.start) or config.start
        text = file_of_start(start, path.name).read_text(encoding="utf-8")
    else:
        codebook = config.model.vq_config.num_embeddings
        text = train_tokenizer(texts_of(samples), codebook, config.model.vocab_size, whole)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def model_folder(start: Path) -> Path | None:
    """The model folder that `start` names ("mini" is the embedded one); None if it names a run."""
    folder = detect.locate(start) if str(start) in detect.EMBEDDED else start
    return folder if (folder / "config.json").is_file() else None


def file_of_start(start: Path, name: str) -> Path:
    """A file of the run that this one starts from; `DataError` if it is missing."""
    if not (start / name).is_file():
        raise DataError(f"{start} holds no {name}: start={start} must name a run of this recipe")
    return start / name


def first_model(config: StageConfig, vocab_size: int) -> Transformer:
    """The model on the run's device: the weights of `start`, or random ones from the run's seed."""
    torch.manual_seed(config.run.seed)
    model = Transformer(replace(config.model, vocab_size=vocab_size), config.dropout)
    model = model.to(resolve_device(config.run.device))
    model.init_weights()
    if config.start is not None:
        folder = model_folder(config.start)
        if folder is None:
            tensors = checkpoint.weights(config.start)
        else:
            tensors = assemble(detect.open_source(folder)).transformer.state_dict()
        tensors = deepen(tensors, config.model.num_hidden_layers)
        checkpoint.load_model(model, tensors, config.start)
    return model


def deepen(tensors: Mapping[str, Tensor], layers: int) -> dict[str, Tensor]:
    """Weights for `layers` layers that compute the same function as the weights `tensors`, which
    have fewer layers.

    Some layers are repeated, spread evenly. A repetition adds nothing at first, because its output
    projections are zero (as in LLaMA Pro, arXiv 2401.02415). If `tensors` has as many layers or
    more, it is returned unchanged.
    """
    prefix = "model.layers."
    old_layers = 1 + max(
        (int(name.split(".")[2]) for name in tensors if name.startswith(prefix)), default=-1
    )
    if not 0 < old_layers < layers:
        return dict(tensors)
    deeper = {name: value for name, value in tensors.items() if not name.startswith(prefix)}
    for new in range(layers):
        old = new * old_layers // layers
        is_repetition = new > 0 and old == (new - 1) * old_layers // layers
        for name, value in tensors.items():
            if name.startswith(f"{prefix}{old}."):
                is_zero = is_repetition and name.endswith(("o_proj.weight", "down_proj.weight"))
                new_name = name.replace(f"{prefix}{old}.", f"{prefix}{new}.")
                deeper[new_name] = torch.zeros_like(value) if is_zero else value.clone()
    return deeper


def prompted_images(
    config: StageConfig, model: Transformer, processor: Processor, vqgan: VQGAN
) -> PromptedImages:
    """What generates images for `config.prompts` during the run."""
    return PromptedImages(
        model,
        processor,
        ImageTokenizer(vqgan, config.model.vq_config.resolution),
        encoded_prompts(processor, config.prompts),
        {"chameleon": GENERATION},
        config.run.seed,
    )


def save_model(config: StageConfig, model: Transformer, vqgan: VQGAN) -> None:
    """Write the model folder under the run, in transformers' layout and fp16."""
    save_hf(
        config.run.out / "model",
        model.eval().cpu(),
        vqgan.cpu(),
        (config.run.out / "tokenizer.json").read_text(encoding="utf-8"),
        {"chameleon": GENERATION},
        dtype=torch.float16,
        vq_dtype=torch.float16,
    )
