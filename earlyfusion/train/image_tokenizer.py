"""Training of the VQ-GAN: reconstruction, codebook, and optional perceptual and adversarial terms.

loss = l1 |x - y| + l2 (x - y)^2 + commitment |latents - codewords|^2 [+ perceptual] [+ patch GAN]

The codebook follows the latents by an exponential moving average, or by gradient
(`codebook="gradient"`, van den Oord et al. 2017). Codewords that fell out of use are moved onto
latents of the current batch. The patch GAN and its adaptive weight follow Esser et al. 2021.
Shapes: B batch, C channels, Y X pixels, K codebook, N vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from earlyfusion.errors import DataError, SettingError
from earlyfusion.model.vqgan import VQGAN, Quantized

Batches = Callable[[int], Tensor]
"""Pictures of a step: float32 [B, 3, Y, X] in [-1, 1]."""


@dataclass
class VQLossConfig:
    l1: float = 1.0
    l2: float = 1.0
    commitment: float = 0.25
    codebook: str = "ema"
    ema_decay: float = 0.97
    ramp_steps: int = 250
    """Steps over which the decoder goes from seeing latents to seeing codewords."""
    revive_every: int = 25
    revive_until: float = 0.8
    """Share of the run after which dead codewords stay where they are."""
    perceptual: float = 0.0
    perceptual_weights: Path | None = None
    """VGG-16 convolution weights as a torch state dict (`features.0.weight`, ...)."""
    adversarial: float = 0.0
    adversarial_from: int = 0

    def __post_init__(self) -> None:
        if self.codebook not in ("ema", "gradient"):
            raise SettingError(f"codebook={self.codebook!r} is unknown: choose ema or gradient")
        if self.perceptual and self.perceptual_weights is None:
            raise SettingError(
                f"perceptual={self.perceptual} needs perceptual_weights, a file of VGG-16 weights"
            )


class ImageTokenizerTask:
    """Trains a `VQGAN` on pictures; see `train.trainer.Task`."""

    def __init__(
        self, model: VQGAN, config: VQLossConfig, batches: Batches, steps: int, compiled: bool
    ) -> None:
        self.model, self.config, self.steps = model, config, steps
        self._batches = batches
        self._forward = torch.compile(model) if compiled else model
        device = model.quantize.embedding.weight.device
        self._device = device
        self._ema = _MovingCodebook(model, config.ema_decay) if config.codebook == "ema" else None
        self._uses_K = torch.zeros(model.config.num_embeddings, device=device)
        self._vgg = _Perceptual(config.perceptual_weights, device) if config.perceptual else None
        self._critic = _Critic(device) if config.adversarial else None
        self._last: tuple[Tensor, Quantized] | None = None

    def parameters(self) -> Iterator[nn.Parameter]:
        for name, parameter in self.model.named_parameters():
            if self._ema is None or not name.startswith("quantize."):
                yield parameter

    def loss(self, step: int) -> tuple[Tensor, dict[str, Tensor], float]:
        x = self._batches(step).to(self._device).contiguous(memory_format=torch.channels_last)
        blend = torch.tensor(min(1.0, step / max(1, self.config.ramp_steps)), device=self._device)
        out = self._forward(x, blend)
        self._last = (x, out)
        pixels, latents = out.pixels.float(), out.latents.float()
        cfg = self.config
        l2 = F.mse_loss(pixels, x)
        commit = F.mse_loss(latents, out.nearest.detach().float())
        total = cfg.l1 * F.l1_loss(pixels, x) + cfg.l2 * l2 + cfg.commitment * blend * commit
        if self._ema is None:
            total = total + F.mse_loss(out.nearest.float(), latents.detach())
        if self._vgg is not None:
            total = total + cfg.perceptual * self._vgg(pixels, x)
        if self._critic is not None and step >= cfg.adversarial_from:
            total = total + cfg.adversarial * self._critic.weigh(total, pixels, self.model)
        psnr = 10 * torch.log10(4 / l2.detach())
        figures = {"psnr": psnr, "commit": commit.detach()} | self._usage(out.codes)
        return total, figures, float(len(x))

    @torch.no_grad()
    def after(self, step: int) -> dict[str, float]:
        assert self._last is not None
        x, out = self._last
        self._last = None
        vectors_NC = out.latents.detach().float().permute(0, 2, 3, 1).flatten(0, 2)
        codes_N = out.codes.flatten()
        if self._ema is not None:
            self._ema.update(vectors_NC, codes_N)
        if step % self.config.revive_every == 0 and step < self.config.revive_until * self.steps:
            self._revive(vectors_NC)
        self._uses_K *= 1 - 1 / self.config.revive_every
        self._uses_K += torch.bincount(codes_N, minlength=len(self._uses_K))
        if self._critic is not None and step >= self.config.adversarial_from:
            return {"critic": self._critic.learn(x, out.pixels.detach().float())}
        return {}

    def state(self) -> tuple[dict[str, Any], dict[str, Any]]:
        tensors: dict[str, Any] = {"uses": self._uses_K}
        if self._ema is not None:
            tensors |= {"ema_count": self._ema.count_K, "ema_sum": self._ema.sum_KC}
        if self._critic is not None:
            tensors |= {"critic": self._critic.state_dict()}
        return tensors, {"loss": {k: str(v) for k, v in vars(self.config).items()}}

    def load_state(self, tensors: dict[str, Any], state: dict[str, Any]) -> None:
        self._uses_K.copy_(tensors["uses"])
        if self._ema is not None:
            self._ema.count_K.copy_(tensors["ema_count"])
            self._ema.sum_KC.copy_(tensors["ema_sum"])
        if self._critic is not None:
            self._critic.load_state_dict(tensors["critic"])

    def _usage(self, codes: Tensor) -> dict[str, Tensor]:
        share_K = self._uses_K / self._uses_K.sum().clamp_min(1)
        entropy = -(share_K * share_K.clamp_min(1e-10).log()).sum()
        in_batch = torch.tensor(float(codes.unique().numel()))
        return {"perplexity": entropy.exp(), "codes_in_batch": in_batch}

    def _revive(self, vectors_NC: Tensor) -> None:
        """Move codewords that almost nobody used lately onto latents of this batch."""
        dead_K = (self._uses_K < 1.0).nonzero().flatten()
        pick = torch.randint(len(vectors_NC), (len(dead_K),), device=vectors_NC.device)
        fresh = vectors_NC[pick]
        weight = self.model.quantize.embedding.weight
        weight[dead_K] = fresh.to(weight.dtype)
        if self._ema is not None:
            self._ema.restart(dead_K, fresh)


class _MovingCodebook:
    """Codewords as running means of the latents that chose them."""

    def __init__(self, model: VQGAN, decay: float) -> None:
        self._weight_KC = model.quantize.embedding.weight
        self._weight_KC.requires_grad_(False)
        self._decay = decay
        self.count_K = torch.ones(len(self._weight_KC), device=self._weight_KC.device)
        self.sum_KC = self._weight_KC.detach().clone().float()

    def update(self, vectors_NC: Tensor, codes_N: Tensor) -> None:
        count = torch.bincount(codes_N, minlength=len(self.count_K)).float()
        total = torch.zeros_like(self.sum_KC).index_add_(0, codes_N, vectors_NC)
        self.count_K.lerp_(count, 1 - self._decay)
        self.sum_KC.lerp_(total, 1 - self._decay)
        mean = self.sum_KC / self.count_K.clamp_min(1e-5).unsqueeze(1)
        self._weight_KC.copy_(torch.where(self.count_K.unsqueeze(1) > 1e-3, mean, self._weight_KC))

    def restart(self, which: Tensor, vectors_NC: Tensor) -> None:
        self.count_K[which] = 1.0
        self.sum_KC[which] = vectors_NC


_VGG_CONVS = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))


class _Perceptual:
    """Distance of unit-length VGG-16 features at five depths (after Zhang et al. 2018)."""

    def __init__(self, weights: Path | None, device: torch.device) -> None:
        assert weights is not None
        if not Path(weights).is_file():
            raise DataError(
                f"{weights} is missing: perceptual_weights names a file of VGG-16 weights"
            )
        state = torch.load(weights, map_location=device, weights_only=True)
        self._convs = [
            [(state[f"features.{i}.weight"], state[f"features.{i}.bias"]) for i in stage]
            for stage in _VGG_CONVS
        ]
        mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
        self._mean = torch.tensor(mean, device=device).view(1, 3, 1, 1)
        self._std = torch.tensor(std, device=device).view(1, 3, 1, 1)

    def __call__(self, a_BCYX: Tensor, b_BCYX: Tensor) -> Tensor:
        pairs = zip(self._features(a_BCYX), self._features(b_BCYX), strict=True)
        return torch.stack([(a - b).square().sum(1).mean() for a, b in pairs]).sum()

    def _features(self, x: Tensor) -> Iterator[Tensor]:
        h = ((x + 1) / 2 - self._mean) / self._std
        for depth, stage in enumerate(self._convs):
            h = F.max_pool2d(h, 2) if depth else h
            for weight, bias in stage:
                h = F.relu(F.conv2d(h, weight, bias, padding=1))
            yield F.normalize(h, dim=1)


class _Critic:
    """Patch discriminator with hinge loss; its weight balances the gradients at the last layer."""

    def __init__(self, device: torch.device, width: int = 64) -> None:
        self._net = nn.Sequential(
            nn.Conv2d(3, width, 4, 2, 1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, width * 2, 4, 2, 1),
            nn.GroupNorm(8, width * 2),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width * 2, width * 4, 3, 1, 1),
            nn.GroupNorm(8, width * 4),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width * 4, 1, 3, 1, 1),
        ).to(device)
        self._adam = torch.optim.Adam(self._net.parameters(), lr=2e-4, betas=(0.5, 0.9))

    def weigh(self, others: Tensor, fakes: Tensor, model: VQGAN) -> Tensor:
        fooled = -self._net(fakes).mean()
        assert model.decoder is not None
        last = model.decoder.conv_out.weight
        (wanted,) = torch.autograd.grad(others, last, retain_graph=True)
        (pushed,) = torch.autograd.grad(fooled, last, retain_graph=True)
        return fooled * (wanted.norm() / (pushed.norm() + 1e-4)).clamp(0, 1e4).detach()

    @torch.enable_grad()
    def learn(self, reals: Tensor, fakes: Tensor) -> float:
        loss = F.relu(1 - self._net(reals)).mean() + F.relu(1 + self._net(fakes)).mean()
        self._adam.zero_grad(set_to_none=True)
        loss.backward()
        self._adam.step()
        return float(loss.detach())

    def state_dict(self) -> dict[str, Any]:
        return {"net": self._net.state_dict(), "adam": self._adam.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._net.load_state_dict(state["net"])
        self._adam.load_state_dict(state["adam"])
