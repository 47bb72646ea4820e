"""Bit-flip self-correction: what a backbone must learn to repair (ERNIE 5.0 report §2.2.3; flip and
re-quantise after Infinity, arXiv 2412.04431).

T' latent frames, K scales. One flip probability per frame and scale: p ~ U(delta*t, p_max + delta*t), and the first
scale of a later frame inherits the error of the frame before it, p ~ U(p of that frame's last scale, p_max + delta*t)
(VideoAR, arXiv 2601.05966, eq. 8). An image is the frame t = 0.
"""

from __future__ import annotations

import numpy as np

from ernie5.tokenizers.scales import Flip

COIN = 0.5  # beyond this a flipped bit would carry the opposite information instead of none


def flip_probabilities(
    frames: int, scales: int, flip_max: float, flip_per_frame: float, rng: np.random.Generator
) -> np.ndarray:
    """Draws float64 [T', K], each at most ``COIN``."""
    growth = flip_per_frame * np.arange(frames)[:, None]
    uniform = rng.random((frames, scales))
    p = growth + flip_max * uniform
    for t in range(1, frames):
        low, high = p[t - 1, -1], flip_max + growth[t, 0]
        p[t, 0] = low + (high - low) * uniform[t, 0]
    return np.minimum(p, COIN)


def bit_flipper(probabilities: np.ndarray, rng: np.random.Generator) -> Flip:
    """A ``flip(k, bits [T', n_k, d])`` for ``ScalePyramid.decompose`` flipping with the frame's p at scale k."""

    def flip(k: int, bits: np.ndarray) -> np.ndarray:
        return bits ^ (rng.random(bits.shape, dtype=np.float32) < probabilities[:, k, None, None])

    return flip
