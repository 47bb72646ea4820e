"""Training signals of the vision tokenizer beside the quantiser's own (ERNIE 5.0 report §2.2.1; VideoAR eq. 4).

Shapes: N frames, C channels, D = vit_dim. Pixels are float32 in [-1, 1].
"""

from __future__ import annotations

import paddle
import paddle.nn.functional as F
from paddle import Tensor, nn

from ernie5.config.schema import VisionTokenizerConfig

COLOUR_WEIGHT = 2.0  # of the error of colour beside that of brightness
LEAK = 0.05  # slope of the error outside the range of pixels


def reconstruction_loss(drawn: Tensor, pixels: Tensor) -> Tensor:
    """Squared plus a share of absolute error, and the squared error of colour again, averaged over [N, 3, H, W].

    Colour is what differs between the three channels of a pixel. It carries a small part of the error but much of the
    meaning, and without the extra weight it is learned last. Beyond black and white errors hardly count, because
    decoding clips there: plain backgrounds then come out plain.
    """
    clipped = drawn.clip(-1.0, 1.0)
    difference = clipped + LEAK * (drawn - clipped) - pixels
    red, green, blue = difference.unbind(axis=1)
    colour = ((red - green).square().mean() + (green - blue).square().mean() + (blue - red).square().mean()) / 3
    return difference.square().mean() + 0.2 * difference.abs().mean() + COLOUR_WEIGHT * colour


class SemanticAlignment(nn.Layer):
    """Semantic regularisation: linear maps of latent and CNN features should point where the ViT's features point.

    Returns the mean of 1 - cosine over positions and the two maps; the ViT is a fixed target.
    """

    def __init__(self, config: VisionTokenizerConfig, bits: int):
        super().__init__()
        self.from_latent = nn.Conv2D(bits, config.vit_dim, 1)
        self.from_features = nn.Conv2D(config.channels, config.vit_dim, 1)

    def forward(self, latent: Tensor, features: Tensor, teacher: Tensor) -> Tensor:
        """latent [N, d, h, w]; features [N, C, g, g]; teacher [N, D, v, v] of the same frames, any grids."""
        teacher = teacher.detach()
        return 0.5 * (
            _misalignment(self.from_latent(latent), teacher) + _misalignment(self.from_features(features), teacher)
        )


def _misalignment(mapped: Tensor, teacher: Tensor) -> Tensor:
    if mapped.shape[2:] != teacher.shape[2:]:
        teacher = F.adaptive_avg_pool2d(teacher, mapped.shape[2:])
    return 1 - F.cosine_similarity(mapped, teacher, axis=1).mean()


class PatchDiscriminator(nn.Layer):
    """Scores overlapping patches of single frames as real (high) or drawn (low): [N, 3, H, W] -> [N, 1, H/8, W/8]."""

    def __init__(self, channels: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2D(3, channels // 2, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2D(channels // 2, channels, 4, stride=2, padding=1),
            nn.GroupNorm(1, channels),
            nn.LeakyReLU(0.2),
            nn.Conv2D(channels, channels, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2D(channels, 1, 3, padding=1),
        )

    def forward(self, pixels: Tensor) -> Tensor:
        return self.layers(pixels)


class Adversary:
    """Hinge game between decoder and discriminator, with LeCAM regularisation (Tseng et al. 2021, eq. 3).

    LeCAM keeps the scores of real frames near the running mean of the drawn ones' and the other way round.
    """

    def __init__(self, channels: int, learning_rate: float, lecam: float = 0.01, decay: float = 0.99):
        self.discriminator = PatchDiscriminator(channels)
        self.optimizer = paddle.optimizer.Adam(
            learning_rate, beta1=0.5, beta2=0.9, parameters=self.discriminator.parameters()
        )
        self.lecam, self.decay = lecam, decay
        self.mean_real, self.mean_drawn = 0.0, 0.0

    def generator_loss(self, drawn: Tensor) -> Tensor:
        """High scores wanted; gradients reach ``drawn``. The discriminator's own gradients are dropped in ``learn``."""
        return -self.discriminator(drawn).mean()

    def discriminator_loss(self, real: Tensor, drawn: Tensor) -> Tensor:
        """Hinge loss plus LeCAM of one batch; updates the running means."""
        high, low = self.discriminator(real), self.discriminator(drawn.detach())
        hinge = F.relu(1 - high).mean() + F.relu(1 + low).mean()
        self.mean_real += (1 - self.decay) * (float(high.mean()) - self.mean_real)
        self.mean_drawn += (1 - self.decay) * (float(low.mean()) - self.mean_drawn)
        anchor = F.relu(high - self.mean_drawn).square().mean() + F.relu(self.mean_real - low).square().mean()
        return hinge + self.lecam * anchor

    def learn(self, real: Tensor, drawn: Tensor) -> float:
        """One step of the discriminator."""
        self.optimizer.clear_grad()
        loss = self.discriminator_loss(real, drawn)
        loss.backward()
        self.optimizer.step()
        self.optimizer.clear_grad()
        return float(loss)
