"""A classification head that names what quantised latents show. It is trained together with the
image tokenizer, and is not part of it: files and speed of the VQ-GAN do not change.

With reconstruction alone, two images of the same thing may have entirely different codes. If a head
must name from the codewords what the image shows, the codes hold this information, and a
transformer that reads them learns names faster. (UniTok, arXiv 2502.20321, and VILA-U, arXiv
2409.04429, contrast images with captions; here names are few, so a class per name is enough.) The
gradient of the head passes straight through the codewords to the encoder.
"""

# Shapes: B batch, C channels, y x codes of an image, L questions.

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_SMOOTHING = 0.1  # label smoothing
UNKNOWN = -100
"""A label that does not count in the loss."""


class SemanticHead(nn.Module):
    """Answers several questions (what is shown, of which kind, ...) about an image of `grid` x
    `grid` codes. `answers` has the number of possible answers to each question.

    Convolutions of stride 2 down to about 4 x 4, their mean, and one linear layer per question.
    """

    def __init__(self, channels: int, grid: int, answers: Sequence[int], width: int = 256) -> None:
        super().__init__()
        num_strided = max(1, (grid // 4).bit_length() - 1)
        widths = [channels, *[width] * (num_strided + 1)]
        layers: list[nn.Module] = []
        for depth, (inputs, outputs) in enumerate(pairwise(widths)):
            stride = 1 if depth == 0 else 2
            layers += [
                nn.Conv2d(inputs, outputs, 3, stride, 1),
                nn.GroupNorm(8, outputs),
                nn.SiLU(),
            ]
        self.body = nn.Sequential(*layers, nn.Conv2d(width, 2 * width, 1), nn.SiLU())
        self.questions = nn.ModuleList(nn.Linear(2 * width, count) for count in answers)

    def forward(self, latents_BCyx: Tensor) -> list[Tensor]:
        """The logits [B, answers] of each question."""
        features_BC = self.body(latents_BCyx).mean((2, 3))
        return [question(features_BC) for question in self.questions]


def naming_loss(logits: Sequence[Tensor], labels_BL: Tensor) -> tuple[Tensor, Tensor]:
    """The mean cross-entropy over the questions, and the accuracy in the first of them. Labels that
    are `UNKNOWN` do not count; if none counts, both are 0."""
    losses = [
        F.cross_entropy(x.float(), y, ignore_index=UNKNOWN, label_smoothing=_SMOOTHING)
        for x, y in zip(logits, labels_BL.unbind(1), strict=True)
    ]
    known_B = labels_BL[:, 0] != UNKNOWN
    correct_B = (logits[0].detach().argmax(1) == labels_BL[:, 0]) & known_B
    accuracy = correct_B.sum() / known_B.sum().clamp_min(1)
    return torch.stack([loss.nan_to_num() for loss in losses]).mean(), accuracy
