"""Multi-scale bitwise spherical quantiser with straight-through gradients (ERNIE 5.0 report §2.2.1, after
Infinity, arXiv 2412.04431).

Shapes: N frames, d bits, n = h*w positions of the full grid, n_k positions of scale k. Channels come before positions.
Each latent frame is quantised alone, whatever its neighbours are.
"""

from __future__ import annotations

from dataclasses import dataclass

import paddle
import paddle.nn.functional as F
from paddle import Tensor, nn

from ernie5.tokenizers.scales import ScalePyramid

INVERSE_TEMPERATURE = 100.0  # sharpness of the soft bits whose entropy is measured


@dataclass
class Quantised:
    total: Tensor  # [N, d, n] sum of all scales; gradients pass straight through to the latent
    commitment: Tensor  # scalar: mean (u - code)^2 over scales, positions and bits
    entropy: Tensor  # scalar: certainty wanted per position, variety wanted over the batch; lower is better


class MultiScaleQuantiser(nn.Layer):
    """Residual quantisation over a ``ScalePyramid``; has no parameters."""

    def __init__(self, pyramid: ScalePyramid):
        super().__init__()
        self.pyramid = pyramid
        self.down = [paddle.to_tensor(m.T.copy()) for m in pyramid.down]  # [n, n_k]
        self.up = [paddle.to_tensor(m.T.copy()) for m in pyramid.up]  # [n_k, n]

    def forward(self, latent: Tensor) -> Quantised:
        """latent [N, d, n], float32."""
        residual, total = latent, paddle.zeros_like(latent)
        commitments, entropies = [], []
        for down, up in zip(self.down, self.up, strict=True):
            u = unit_norm(residual @ down)
            code = sphere_code(u)
            commitments.append(F.mse_loss(u, code))
            entropies.append(bit_entropy(u))
            through = u + (code - u).detach()
            total = total + through @ up
            residual = residual - code @ up
        return Quantised(total, sum(commitments) / len(commitments), sum(entropies) / len(entropies))


def unit_norm(residual: Tensor) -> Tensor:
    """Onto the unit sphere along the channel axis (1)."""
    return residual * paddle.rsqrt((residual * residual).sum(axis=1, keepdim=True) + 1e-12)


def sphere_code(u: Tensor) -> Tensor:
    """Nearest corner sign(u)/sqrt(d), u > 0 -> +1 else -1; carries no gradient."""
    return ((u.detach() > 0).astype(u.dtype) * 2 - 1) * u.shape[1] ** -0.5


def bit_entropy(u: Tensor, inverse_temperature: float = INVERSE_TEMPERATURE) -> Tensor:
    """(E[H(p|x)] - H(E[p])) / inverse temperature, factorised per bit (in nats, averaged over bits).

    p = sigmoid(-4 u / sqrt(d) * inverse temperature) is the soft probability of a zero bit; the expectation runs over
    all frames and positions of one scale.
    """
    p = F.sigmoid(u * (-4.0 * u.shape[1] ** -0.5 * inverse_temperature))
    each = _binary_entropy(p).mean()
    together = _binary_entropy(p.mean(axis=[0, 2])).mean()
    return (each - together) / inverse_temperature


def _binary_entropy(p: Tensor) -> Tensor:
    p = p.clip(1e-6, 1 - 1e-6)
    return -(p * p.log() + (1 - p) * (1 - p).log())
