"""Training of the VQ-GAN: reconstruction, codebook, and optional perceptual and adversarial terms.

loss = l1 |x - y| + l2 (x - y)^2 + commitment |latents - codewords|^2 [+ perceptual] [+ adversarial]

The codebook follows the latents by an exponential moving average, or it learns by gradient
(`codebook="gradient"`, van den Oord et al. 2017). Unused codewords are moved onto latents of the
current batch. The discriminator and its adaptive weight follow Esser et al. 2021. With `naming`, a
separate head learns to name what an image shows from its codewords (`train.semantic`).

With `trainable="decoder"` encoder and codebook do not change, so a transformer that was trained on
their codes stays valid. With `perturb` the decoder also learns to decode images with some wrong
codes, as a transformer sometimes generates them (RobusTok). With `trainable="encoder"` codebook and
decoder do not change: images get other codes, and each code is still decoded as before.

Each of several processes holds a copy of the network: gradients are averaged, and the statistics of
the codebook are added up.
"""

# Shapes: B batch, C channels, Y X pixels, h w codes of an image, K codebook, N latent vectors.

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import PIL.Image
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from earlyfusion import parallel, processes
from earlyfusion.checkpoints import detect
from earlyfusion.checkpoints.meta import VQ_CONFIG, open_vqgan
from earlyfusion.config import VQConfig
from earlyfusion.devices import resolve_device
from earlyfusion.errors import CheckpointError, DataError, SettingError
from earlyfusion.fields import check_at_least, check_shares
from earlyfusion.files import expanded
from earlyfusion.kernels.twins import accelerate
from earlyfusion.model.vqgan import VQGAN, Level, Quantized
from earlyfusion.parallel import ParallelConfig
from earlyfusion.train import checkpoint
from earlyfusion.train.discriminator import Discriminator, adaptive_weight, check_side
from earlyfusion.train.likeness import Perceptual, psnr, ssim
from earlyfusion.train.optim import OptimConfig
from earlyfusion.train.samples import save_grid, to_image
from earlyfusion.train.semantic import SemanticHead, naming_loss
from earlyfusion.train.task import Task
from earlyfusion.train.trainer import RunConfig

if TYPE_CHECKING:
    from earlyfusion.parallel import DeviceMesh

TRAINABLE = ("all", "decoder", "encoder")
_DECODER, _ENCODER = ("decoder.", "post_quant_conv."), ("encoder.", "quant_conv.")

Batches = Callable[[int], Tensor | tuple[Tensor, Tensor]]
"""Returns this process's images of a step: float32 [B, 3, Y, X] in [-1, 1]; for a head that names
them also their labels, int64 [B, questions]."""


@dataclass
class VQLossConfig:
    """The terms of the loss, and how the codebook learns. Raises `SettingError`."""

    l1: float = 1.0
    """Weight of the mean absolute difference of pixels."""
    l2: float = 1.0
    """Weight of the mean squared difference of pixels."""
    commitment: float = 0.25
    """Weight of the squared distance from latents to their codewords."""
    codebook: str = "ema"
    """How codewords learn: as a moving average of latents (ema), or by gradient."""
    ema_decay: float = 0.97
    """With `codebook=ema`, the share of the old average that a step keeps."""
    ramp_steps: int = 250
    """Steps over which the input of the decoder changes from latents to codewords."""
    revive_every: int = 25
    """Steps after which unused codewords are moved to latents of the batch."""
    revive_until: float = 0.8
    """Share of the run after which unused codewords stay where they are."""
    perceptual: float = 0.0
    """Weight of the distance in features of VGG-16; needs `perceptual_weights`."""
    perceptual_weights: Path | None = None
    """File of VGG-16 as a torch state dict, with the names of torchvision or LPIPS."""
    perceptual_linear: Path | None = None
    """File of LPIPS's weights per channel, if the file above has none."""
    adversarial: float = 0.0
    """Weight of the adversarial loss; 0: no discriminator."""
    adversarial_from: int = 0
    """The step at which the discriminator joins."""
    critic_layers: int = 3
    """Convolutions of stride 2 of the discriminator."""
    critic_width: int = 64
    """Channels of the discriminator's first convolution."""
    critic_lr: float = 2e-4
    """Learning rate of the discriminator."""
    naming: float = 0.0
    """Weight of the head that names what the codewords show; see `train.semantic`."""
    perturb: float = 0.0
    """With `trainable=decoder`, share of the codes that are replaced by one of the nearest."""
    match: float = 0.0
    """With `trainable=encoder`, weight of the squared distance from the latents of the encoder that
    the run began with, in units of their variance."""
    drawn: float = 1.0
    """With `trainable=encoder`, share of the images that are also decoded and compared."""
    first_level: int = 0
    """With `trainable=encoder`, levels of the encoder before this one stay as they are, too."""

    def __post_init__(self) -> None:
        if self.codebook not in ("ema", "gradient"):
            raise SettingError(f"codebook={self.codebook!r} is unknown: choose ema or gradient")
        if self.perceptual and self.perceptual_weights is None:
            raise SettingError(
                f"perceptual={self.perceptual} needs VGG-16: give perceptual_weights=FILE, or "
                "perceptual=0"
            )
        check_at_least(self, naming=0, match=0, first_level=0, revive_every=1, critic_width=1)
        check_shares(self, "perturb")
        if not 0 < self.drawn <= 1:
            raise SettingError(f"drawn={self.drawn} must be a share above 0 and at most 1")


@dataclass
class ImageTokenizerConfig:
    """The fields that all trainings of an image tokenizer share."""

    batch: int = 32
    """Images of a step, over all processes."""
    micro_batch: int = 0
    """Images that one process computes at a time; 0: all that it has."""
    start: str = ""
    """A run, a model folder or a hub id whose image tokenizer this run begins with."""
    trainable: str = "all"
    """"all"; "decoder": encoder and codebook stay as they are, to the bit; "encoder": codebook and
    decoder stay."""
    run: RunConfig = field(default_factory=RunConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    model: VQConfig = field(default_factory=VQConfig)
    loss: VQLossConfig = field(default_factory=VQLossConfig)

    def __post_init__(self) -> None:
        check_trainable(self.trainable, self.start, self.loss)
        count_micro_batches(self.batch, self.micro_batch)

    def build(self) -> VQGAN:
        """The network on its device, with random weights from the seed, or those of `start`."""
        torch.manual_seed(self.run.seed)
        model = accelerate(VQGAN(self.model))
        if self.start:
            begin_with(model, self.start)
        model.to(resolve_device(self.run.device))
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return model

    def task(
        self, model: VQGAN, batches: Batches, head: SemanticHead | None = None
    ) -> ImageTokenizerTask:
        """The training of `model` on `batches` by this config."""
        micro_batches = count_micro_batches(self.batch, self.micro_batch)
        steps, trainable = self.run.steps, self.trainable
        return ImageTokenizerTask(model, self.loss, batches, steps, trainable, micro_batches, head)


def check_perceptual_files(config: VQLossConfig) -> None:
    """Raise `DataError` if a file of the perceptual term is missing. Recipes call this before they
    open their data."""
    for name in ("perceptual_weights", "perceptual_linear") if config.perceptual else ():
        path = getattr(config, name)
        if path is not None and not path.is_file():
            raise DataError(
                f"there is no file {path}: give {name}=, a torch file of VGG-16 as torchvision or "
                "LPIPS has it, or do without by perceptual=0 l2=1"
            )


def check_trainable(trainable: str, start: str, loss: VQLossConfig) -> None:
    """Raise `SettingError` for an unknown `trainable`, a part that is trained alone without a
    `start`, and loss terms that do not go with `trainable`."""
    if trainable not in TRAINABLE:
        raise SettingError(f"trainable={trainable!r} is unknown: choose {' or '.join(TRAINABLE)}")
    if trainable != "encoder" and (loss.match or loss.drawn < 1 or loss.first_level):
        raise SettingError(
            f"match={loss.match:g}, drawn={loss.drawn:g} and first_level={loss.first_level} need "
            f"trainable=encoder, not {trainable}: leave them out, or train the encoder"
        )
    if trainable == "encoder" and loss.adversarial:
        raise SettingError(
            f"adversarial={loss.adversarial:g} needs a decoder that learns: leave it out, or "
            "trainable=encoder"
        )
    if trainable != "all" and not start:
        raise SettingError(
            f"trainable={trainable} needs an image tokenizer to begin with: give start=, a run or "
            "a model folder"
        )


def count_micro_batches(batch: int, micro_batch: int) -> int:
    """How many times per step this process computes `micro_batch` images (0: all at once). Raises
    `SettingError` if the `batch` of all processes cannot be divided so."""
    num_processes = processes.count()
    images_at_once = num_processes * max(1, micro_batch)
    if batch < 1 or micro_batch < 0 or batch % images_at_once:
        raise SettingError(
            f"batch={batch} cannot be shared by {num_processes} processes that compute "
            f"micro_batch={max(1, micro_batch)} at a time: choose a multiple of {images_at_once}"
        )
    return batch // images_at_once if micro_batch else 1


def begin_with(model: VQGAN, start: str) -> VQGAN:
    """Load weights into the model and return it. `start` is a run of an image tokenizer, a model
    folder or a hub id. Raises `CheckpointError` if there are none, or their shape differs."""
    tensors = {name: tensor.float() for name, tensor in _weights_of(start).items()}
    try:
        model.load_state_dict(tensors)
    except RuntimeError:
        raise CheckpointError(
            f"start={start} has no image tokenizer of this shape with a decoder: give a run of "
            "this recipe, or a model folder that has one"
        ) from None
    return model


def _weights_of(start: str) -> dict[str, Tensor]:
    folder = expanded(start)
    if checkpoint.steps(folder):
        return checkpoint.weights(folder)
    if (folder / VQ_CONFIG).is_file():
        stored = open_vqgan(folder)[1]
    else:
        stored = detect.open_source(detect.locate(start)).vq
    return {name: entry.read() for name, entry in stored.items()}


def _is_trained(name: str, trainable: str, first_level: int) -> bool:
    """Whether the parameter `name` of the network is trained."""
    if trainable == "encoder":
        frozen = ("encoder.conv_in.", *(f"encoder.down.{n}." for n in range(first_level)))
        return name.startswith(_ENCODER) and not (first_level and name.startswith(frozen))
    return trainable == "all" or name.startswith(_DECODER)


def _freeze_parts(model: VQGAN, trainable: str, first_level: int) -> None:
    """Freeze the parameters that are not trained."""
    for name, parameter in model.named_parameters():
        if not _is_trained(name, trainable, first_level):
            parameter.requires_grad_(False)
    if trainable == "encoder" and first_level:
        last_frozen = cast("Level", model.encoder.down[first_level - 1])
        last_frozen.downsample.register_forward_hook(_require_grad_of_output)


def _require_grad_of_output(module: nn.Module, inputs: Any, output: Tensor) -> None:
    # torch 2.13 crashes on a CPU in the backward pass of a group norm in channels_last whose input
    # needs no gradient, as the output of frozen levels does not.
    if torch.is_grad_enabled():
        output.requires_grad_()


class _MicroBatchResult(NamedTuple):
    """What `ImageTokenizerTask.after` needs of a micro batch: images, reconstructions, latents and
    codes."""

    reals_BCYX: Tensor
    fakes_BCYX: Tensor
    vectors_NC: Tensor
    codes_N: Tensor


class ImageTokenizerTask(Task):
    """Trains a `VQGAN` on images; its units are images.

    A run has `steps` steps, and the images of a step are computed in `micro_batches` parts.
    `trainable` is "all", or "decoder" or "encoder" to train only that part. `head` is trained
    together with the network if `config.naming` is not 0, and the batches then have labels. Raises
    `SettingError` if `head` and `config` do not go together.
    """

    def __init__(
        self,
        model: VQGAN,
        config: VQLossConfig,
        batches: Batches,
        steps: int,
        trainable: str = "all",
        micro_batches: int = 1,
        head: SemanticHead | None = None,
    ) -> None:
        if (head is None) != (config.naming == 0):
            raise SettingError(
                f"naming={config.naming:g} and head={'none' if head is None else 'given'} do not "
                "fit: give a head if naming is not 0, and none if it is"
            )
        self.head = head
        assert model.decoder is not None
        levels = len(model.config.channel_multiplier)
        if config.first_level >= levels:
            raise SettingError(
                f"first_level={config.first_level} leaves nothing of the encoder's {levels} levels "
                f"to learn: give at most {levels - 1}"
            )
        self.model: VQGAN = model
        self.config, self.steps, self._num_micro_batches = config, steps, micro_batches
        self._batches, self._trainable = batches, trainable
        self._decoder_only, self._encoder_only = trainable == "decoder", trainable == "encoder"
        self._last_weight = model.decoder.conv_out.weight
        self._device = device = self._last_weight.device
        has_ema = config.codebook == "ema" and trainable == "all"
        self._ema = _EmaCodebook(model, config.ema_decay) if has_ema else None
        # The encoder that the run began with, for `match`. A resumed run builds it in the same way,
        # before its checkpoint is loaded.
        self._first_encoder: nn.Module | None = None
        if self._encoder_only and config.match:
            first_encoder = nn.Sequential(deepcopy(model.encoder), deepcopy(model.quant_conv))
            self._first_encoder = first_encoder.requires_grad_(False)
        # After the copy, which must not get the hook.
        _freeze_parts(model, trainable, config.first_level)
        # How often each code was used, with a weight that decays step by step (see `after`).
        self._uses_K = torch.zeros(model.config.num_embeddings, device=device)
        self._perceptual = _build_perceptual(config, device)
        self._discriminator = _build_discriminator(config, model, device)
        self._mesh: DeviceMesh | None = None
        self._data_ranks = 1
        perturbs = self._decoder_only and config.perturb > 0
        self._near_KN = nearest_codewords(model) if perturbs else None
        # Of the present step: micro batches still to be computed, and results of the others.
        self._micro_batches: list[tuple[Tensor, Tensor | None]] = []
        self._results: list[_MicroBatchResult] = []

    @property
    def micro_batches(self) -> int:
        return self._num_micro_batches

    @cached_property
    def flops_per_unit(self) -> float:
        """Floating-point operations per image, without the perceptual and the adversarial term."""
        config = self.model.config
        with torch.device("meta"):
            model = VQGAN(config)
            pixels = torch.empty(1, config.in_channels, config.resolution, config.resolution)
        with FlopCounterMode(display=False) as counter:
            codes = model.encode(pixels)
            encoder_flops = counter.get_total_flops()
            model.decoder(model.post_quant_conv(model.embed(codes)))  # type: ignore[misc]
        flops = counter.get_total_flops()
        # A backward pass takes twice the operations of its forward pass, and as many as its forward
        # pass where no weights are trained.
        if self._encoder_only:
            decoder_flops = 2 * (flops - encoder_flops) * self.config.drawn
            # One more forward pass, for `match`, by the encoder that the run began with.
            encoder_passes = 4 if self._first_encoder is not None else 3
            return float(encoder_passes * encoder_flops + decoder_flops)
        return float(3 * flops - 2 * encoder_flops if self._decoder_only else 3 * flops)

    def distribute(
        self, mesh: DeviceMesh | None, config: ParallelConfig, compiled: bool, dtype: torch.dtype
    ) -> None:
        """Each of several processes keeps a copy of the network; `compiled` compiles it."""
        if config.tensor > 1:
            raise SettingError(
                f"tensor={config.tensor} cannot split an image tokenizer: leave it at 1"
            )
        self._mesh, self._data_ranks = mesh, parallel.data_rank(mesh)[1]
        for module in self.model.modules() if compiled else ():
            # The last layer stays uncompiled: `adaptive_weight` needs the gradients of its weight.
            if isinstance(module, Level):
                module.compile()

    def parameters(self) -> Iterator[nn.Parameter]:
        trained = [p for p in self.model.parameters() if p.requires_grad]
        return iter([*trained, *(self.head.parameters() if self.head is not None else ())])

    def loss(self, step: int) -> tuple[Tensor, dict[str, Tensor], float]:
        if not self._micro_batches:
            self._fetch(step)
        (images, labels), cfg = self._micro_batches.pop(0), self.config
        # Without this ramp the codebook collapses onto a few codewords.
        codeword_share = 1.0 if self._encoder_only else min(1.0, step / max(1, cfg.ramp_steps))
        blend = torch.tensor(codeword_share, device=self._device)
        if self._decoder_only:
            out = self._forward_decoder(images)
        else:
            out = self._forward_encoder(images) if self._encoder_only else self.model(images, blend)
        metrics: dict[str, Tensor] = {}
        total = self._pixel_loss(out, images, step, metrics)
        if not self._decoder_only:
            total = total + self._codebook_loss(out, blend, metrics)
        if self._first_encoder is not None:
            with torch.no_grad():
                first_latents = self._first_encoder(images).float()
            difference = F.mse_loss(out.latents.float(), first_latents)
            metrics["match"] = difference / first_latents.var()
            total = total + cfg.match * metrics["match"]
        if self.head is not None and labels is not None:
            # Straight-through: the value of the codewords, the gradient of the latents.
            head_input = out.latents + blend * (out.nearest - out.latents).detach()
            metrics["naming"], metrics["named"] = naming_loss(self.head(head_input), labels)
            total = total + cfg.naming * metrics["naming"]
        metrics = {name: value.detach() for name, value in metrics.items()}
        metrics |= self._usage(out.codes)
        return total / (self._num_micro_batches * self._data_ranks), metrics, float(len(images))

    def _pixel_loss(
        self, out: Quantized, images: Tensor, step: int, metrics: dict[str, Tensor]
    ) -> Tensor:
        """The terms that compare the decoded images with the originals. Adds to `metrics`."""
        cfg, pixels = self.config, out.pixels.float()
        x = images[: len(pixels)]  # with `drawn`, only the first images are decoded
        self._results.append(_MicroBatchResult(x, pixels.detach(), *_vectors(out)))
        l2 = F.mse_loss(pixels, x)
        metrics["psnr"] = 10 * torch.log10(4 / l2.detach())  # pixels have a range of 2
        with torch.no_grad():
            metrics["ssim"] = ssim(pixels.clamp(-1, 1), x).mean()
        total = cfg.l1 * F.l1_loss(pixels, x) + cfg.l2 * l2
        if self._perceptual is not None:
            metrics["perceptual"] = self._perceptual(pixels, x)
            total = total + cfg.perceptual * metrics["perceptual"]
        if self._discriminator is not None and step >= cfg.adversarial_from:
            metrics["fooled"] = self._discriminator.adversarial_loss(pixels)
            weight = adaptive_weight(total, metrics["fooled"], self._last_weight)
            total = total + cfg.adversarial * weight * metrics["fooled"]
        return total

    @torch.no_grad()
    def after(self, step: int) -> dict[str, float]:
        results, self._results = self._results, []
        vectors_NC = torch.cat([result.vectors_NC for result in results])
        codes_N = torch.cat([result.codes_N for result in results])
        if self._ema is not None:
            self._ema.update(vectors_NC, codes_N, self._mesh)
        may_revive = step % self.config.revive_every == 0 and self._trainable == "all"
        if may_revive and max(self.progress, step / self.steps) < self.config.revive_until:
            self._revive(vectors_NC)
        # A moving sum over about the last `revive_every` steps.
        self._uses_K *= 1 - 1 / self.config.revive_every
        uses_K = torch.bincount(codes_N, minlength=len(self._uses_K))
        self._uses_K += parallel.data_sum(uses_K, self._mesh)
        if self._discriminator is None or step < self.config.adversarial_from:
            return {}
        # On the images that were decoded before this step changed the decoder.
        pairs = ((result.reals_BCYX, result.fakes_BCYX) for result in results)
        share = 1 / self._num_micro_batches
        return {"critic": self._discriminator.train_step(pairs, share, self._mesh)}

    def state(self) -> tuple[dict[str, Any], dict[str, Any]]:
        tensors: dict[str, Any] = {"uses": self._uses_K}
        if self._ema is not None:
            tensors |= {"ema_count": self._ema.count_K, "ema_sum": self._ema.sum_KC}
        if self._discriminator is not None:
            tensors |= {"critic": self._discriminator.state_dict()}
        if self.head is not None:
            tensors |= {"head": self.head.state_dict()}
        settings = {k: str(v) for k, v in vars(self.config).items()}
        return tensors, {"loss": settings, "trainable": self._trainable}

    def load_state(self, tensors: dict[str, Any], state: dict[str, Any]) -> None:
        saved_trainable = state.get("trainable", "all")
        if saved_trainable != self._trainable:
            raise CheckpointError(
                f"the run began with trainable={saved_trainable}, not {self._trainable}: give the "
                "same or another out folder"
            )
        missing = self.state()[0].keys() - tensors.keys()
        if missing:
            raise CheckpointError(
                f"the run began without {' and '.join(sorted(missing))}: give the same loss terms "
                "or another out folder"
            )
        self._micro_batches, self._results = [], []
        self._uses_K.copy_(tensors["uses"])
        if self._ema is not None:
            self._ema.count_K.copy_(tensors["ema_count"])
            self._ema.sum_KC.copy_(tensors["ema_sum"])
        if self._discriminator is not None:
            self._discriminator.load_state_dict(tensors["critic"])
        if self.head is not None:
            self.head.load_state_dict(tensors["head"])

    def _fetch(self, step: int) -> None:
        """Split the images of a step, and their labels if any, into micro batches."""
        batch, count = self._batches(step), self._num_micro_batches
        pixels, labels = batch if isinstance(batch, tuple) else (batch, None)
        pixels = pixels.to(self._device, non_blocking=True)
        images = pixels.contiguous(memory_format=torch.channels_last).chunk(count)
        label_chunks = labels.to(self._device).chunk(count) if labels is not None else None
        self._micro_batches = list(zip(images, label_chunks or [None] * len(images), strict=True))
        self._results = []

    def _forward_decoder(self, images_BCYX: Tensor) -> Quantized:
        """The forward pass with only the decoder trained. The encoder runs in fp32, so that the
        codes are those of inference."""
        with torch.no_grad(), torch.autocast(self._device.type, enabled=False):
            latents = self.model.latents(images_BCYX)
            codes = self.model.nearest_codes(latents)
        decoded = self.model.decode(self._perturb(codes))
        return Quantized(decoded, latents, self.model.embed(codes), codes)

    def _forward_encoder(self, x_BCYX: Tensor) -> Quantized:
        """The forward pass with only the encoder trained: all images are encoded, and the share
        `drawn` of them, the first ones, are decoded."""
        latents = self.model.latents(x_BCYX)
        with torch.autocast(self._device.type, enabled=False):
            codes = self.model.nearest_codes(latents.detach().float())
        nearest = self.model.embed(codes)
        count = max(1, round(self.config.drawn * len(x_BCYX)))
        # Straight-through: the value of the codewords, the gradient of the latents.
        decoder_input = latents[:count] + (nearest - latents)[:count].detach()
        return Quantized(self.model.pixels(decoder_input), latents, nearest, codes)

    def _perturb(self, codes: Tensor) -> Tensor:
        """The codes, of which the share `perturb` is replaced by one of the nearest codes."""
        if self._near_KN is None:
            return codes
        chosen = torch.randint(self._near_KN.shape[1], codes.shape, device=codes.device)
        is_replaced = torch.rand(codes.shape, device=codes.device) < self.config.perturb
        return torch.where(is_replaced, self._near_KN[codes, chosen], codes)

    def _codebook_loss(self, out: Quantized, blend: Tensor, metrics: dict[str, Tensor]) -> Tensor:
        """Pulls latents to codewords, and codewords that learn by gradient to latents. Adds to
        `metrics`."""
        latents, nearest = out.latents.float(), out.nearest.float()
        metrics["commit"] = F.mse_loss(latents, nearest.detach())
        total = self.config.commitment * blend * metrics["commit"]
        if self._ema is not None or not nearest.requires_grad:
            return total
        return total + F.mse_loss(nearest, latents.detach())

    def _usage(self, codes: Tensor) -> dict[str, Tensor]:
        """Use of the codebook over the last steps: perplexity, and the share of codes that were
        used about once or more; and the number of different codes in this micro batch."""
        codes_in_batch = torch.tensor(float(codes.unique().numel()))
        return {
            "perplexity": perplexity(self._uses_K),
            "usage": (self._uses_K >= 1).float().mean(),
            "codes_in_batch": codes_in_batch,
        }

    def _revive(self, vectors_NC: Tensor) -> None:
        """Move codewords that were rarely used lately onto random latents of this batch."""
        unused = (self._uses_K < 1.0).nonzero().flatten()
        chosen = torch.randint(len(vectors_NC), (len(unused),), device=vectors_NC.device)
        new_codewords = vectors_NC[chosen]
        if self._mesh is not None:  # the first process chooses for all
            is_first = float(processes.rank() == 0)
            new_codewords = parallel.data_sum(new_codewords * is_first, self._mesh)
        weight = self.model.quantize.embedding.weight
        weight[unused] = new_codewords.to(weight.dtype)
        if self._ema is not None:
            self._ema.restart(unused, new_codewords)


def _build_perceptual(config: VQLossConfig, device: torch.device) -> Perceptual | None:
    if not config.perceptual or config.perceptual_weights is None:
        return None
    return Perceptual(config.perceptual_weights, config.perceptual_linear, device)


def _build_discriminator(
    config: VQLossConfig, model: VQGAN, device: torch.device
) -> Discriminator | None:
    if not config.adversarial:
        return None
    check_side(config.critic_layers, model.config.resolution)
    return Discriminator(config.critic_layers, config.critic_width, config.critic_lr, device)


def nearest_codewords(model: VQGAN, count: int = 8) -> Tensor:
    """The codes of the `count` codewords that are nearest to each codeword, the nearest first and
    without itself: int64 [K, count]."""
    weight_KC = model.quantize.embedding.weight.detach().float()
    distances = torch.cdist(weight_KC, weight_KC).fill_diagonal_(torch.inf)
    return distances.argsort(1)[:, :count]


def _vectors(out: Quantized) -> tuple[Tensor, Tensor]:
    """All latents as vectors, fp32 [N, C], and their codes, [N]."""
    vectors_NC = out.latents.detach().float().permute(0, 2, 3, 1).flatten(0, 2)
    return vectors_NC, out.codes.flatten()


def perplexity(uses_K: Tensor) -> Tensor:
    """e to the entropy of the use of codes: the number of codes that would have this entropy if all
    were used equally often."""
    share_K = uses_K / uses_K.sum().clamp_min(1)
    return (-(share_K * share_K.clamp_min(1e-10).log()).sum()).exp()


class _EmaCodebook:
    """Codewords as exponential moving averages of the latents nearest to them (van den Oord et al.
    2017, appendix A.1)."""

    def __init__(self, model: VQGAN, decay: float) -> None:
        self._weight_KC = model.quantize.embedding.weight
        self._weight_KC.requires_grad_(False)
        self._decay = decay
        self.count_K = torch.ones(len(self._weight_KC), device=self._weight_KC.device)
        self.sum_KC = self._weight_KC.detach().clone().float()

    def update(self, vectors_NC: Tensor, codes_N: Tensor, mesh: DeviceMesh | None) -> None:
        """Add the latents of a step and their codes to the averages, and move the codewords."""
        count = torch.bincount(codes_N, minlength=len(self.count_K)).float()
        total = torch.zeros_like(self.sum_KC).index_add_(0, codes_N, vectors_NC)
        self.count_K.lerp_(parallel.data_sum(count, mesh), 1 - self._decay)
        self.sum_KC.lerp_(parallel.data_sum(total, mesh), 1 - self._decay)
        # A codeword that was rarely chosen does not move: its mean would be noise.
        mean = self.sum_KC / self.count_K.clamp_min(1e-5).unsqueeze(1)
        self._weight_KC.copy_(torch.where(self.count_K.unsqueeze(1) > 1e-3, mean, self._weight_KC))

    def restart(self, codes: Tensor, vectors_NC: Tensor) -> None:
        """Begin the averages of these codes again, at these vectors."""
        self.count_K[codes] = 1.0
        self.sum_KC[codes] = vectors_NC


class HeldOut:
    """Reconstructs images that the network is not trained on, `batch` at a time, and measures the
    result in fp32. It is a `trainer.GenerateSamples`.

    `images_BCYX` are on the CPU, in [-1, 1]. The first `num_shown` of them are written as a grid,
    with the originals above their reconstructions; the metrics are means over all images."""

    def __init__(
        self, model: VQGAN, images_BCYX: Tensor, num_shown: int = 8, batch: int = 4
    ) -> None:
        self._model, self._images_BCYX = model, images_BCYX
        self._num_shown, self._batch = num_shown, batch

    def __call__(self, step: int, folder: Path) -> dict[str, float]:
        if not len(self._images_BCYX):
            return {}
        device = self._model.quantize.embedding.weight.device
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            return self._reconstruct(folder / f"step-{step:08d}.png", device)

    def _reconstruct(self, grid: Path, device: torch.device) -> dict[str, float]:
        uses_K = torch.zeros(self._model.config.num_embeddings, device=device)
        scores: list[Tensor] = []
        columns: list[list[PIL.Image.Image]] = []  # of the grid
        for batch in self._images_BCYX.split(self._batch):
            pixels = batch.to(device)
            codes = self._model.encode(pixels)
            decoded = self._model.decode(codes).float().clamp(-1, 1)
            uses_K += torch.bincount(codes.flatten(), minlength=len(uses_K))
            scores.append(torch.stack((psnr(decoded, pixels), ssim(decoded, pixels)), 1).cpu())
            for pair in zip(batch[: self._num_shown - len(columns)], decoded, strict=False):
                columns.append([to_image(image) for image in pair])
        save_grid(grid, columns)
        mean_psnr, mean_ssim = torch.cat(scores).mean(0).tolist()
        return {
            "held_out_psnr": mean_psnr,
            "held_out_ssim": mean_ssim,
            "held_out_perplexity": float(perplexity(uses_K)),
            "held_out_usage": float((uses_K > 0).float().mean()),
        }
