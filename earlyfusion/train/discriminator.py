"""The discriminator of the image tokenizer: it scores patches, with hinge loss (Esser et al. 2021).

The network is that of Isola et al. 2017: `layers` convolutions of stride 2, then two of stride 1.
It has group norms, so that the score of an image depends neither on the other images of its batch
nor on the number of processes. Images are float32 [B, 3, Y, X] in [-1, 1].
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from earlyfusion import parallel
from earlyfusion.errors import SettingError
from earlyfusion.train.optim import allocate_moments

if TYPE_CHECKING:
    from earlyfusion.parallel import DeviceMesh


class Discriminator:
    """Scores each patch of an image: high for real images, low for reconstructions. `width` is the
    number of channels of its first convolution, `lr` its learning rate."""

    def __init__(self, layers: int, width: int, lr: float, device: torch.device) -> None:
        self.net = _network(layers, width).to(device)
        self._adam = torch.optim.Adam(self.net.parameters(), lr, betas=(0.5, 0.9), fused=True)
        allocate_moments(self._adam)

    def adversarial_loss(self, fakes_BCYX: Tensor) -> Tensor:
        """The loss of the image tokenizer: low where its reconstructions score high."""
        return -self.net(fakes_BCYX).mean()

    def train_step(
        self,
        pairs: Iterable[tuple[Tensor, Tensor]],
        share: float,
        mesh: DeviceMesh | None,
    ) -> float:
        """Train one step on (real, reconstructed) batches, of which each loss is weighted by
        `share`. Returns the sum of these losses, of this process."""
        self._adam.zero_grad(set_to_none=True)
        total = 0.0
        with torch.enable_grad():
            for reals, fakes in pairs:
                real_scores, fake_scores = self.net(reals), self.net(fakes)
                hinge = F.relu(1 - real_scores).mean() + F.relu(1 + fake_scores).mean()
                loss = share * hinge / 2
                loss.backward()
                total += float(loss.detach())
        parallel.average_gradients(list(self.net.parameters()), mesh)
        self._adam.step()
        return total

    def state_dict(self) -> dict[str, Any]:
        return {"net": self.net.state_dict(), "adam": self._adam.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned. A checkpoint in shards has only its tensors."""
        self.net.load_state_dict(state["net"])
        groups = self._adam.state_dict()["param_groups"]  # settings, which shards do not have
        moments = {int(number): value for number, value in state["adam"]["state"].items()}
        self._adam.load_state_dict({"state": moments, "param_groups": groups})


def adaptive_weight(others: Tensor, adversarial: Tensor, last_weight: Tensor) -> Tensor:
    """The weight of the adversarial loss (Esser et al. 2021, eq. 7). With it, the gradient of this
    loss with respect to the weight of the decoder's last layer, `last_weight`, has the same norm as
    that of all `others`."""
    (other_gradient,) = torch.autograd.grad(others, last_weight, retain_graph=True)
    (gradient,) = torch.autograd.grad(adversarial, last_weight, retain_graph=True)
    return (other_gradient.norm() / (gradient.norm() + 1e-4)).clamp(0, 1e4).detach()


def check_side(layers: int, side: int) -> None:
    """Raise `SettingError` if images of `side` pixels are too small for this many convolutions of
    stride 2."""
    if layers < 1 or side // 2**layers < 3:
        raise SettingError(
            f"critic_layers={layers} is not possible for images of {side} pixels: give 1 to "
            f"{max(1, (side // 3).bit_length() - 1)}"
        )


def _network(layers: int, width: int) -> nn.Sequential:
    """The network that maps images to a score per patch, [B, 1, y, x]."""
    modules: list[nn.Module] = [nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2)]
    inputs = width
    for depth in range(1, layers + 1):
        outputs, stride = width * min(2**depth, 8), 2 if depth < layers else 1
        modules += [
            nn.Conv2d(inputs, outputs, 4, stride, 1, bias=False),
            nn.GroupNorm(min(8, outputs), outputs),
            nn.LeakyReLU(0.2),
        ]
        inputs = outputs
    net = nn.Sequential(*modules, nn.Conv2d(inputs, 1, 4, 1, 1))
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, 0.0, 0.02)
    return net
