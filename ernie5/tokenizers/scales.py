"""Multi-scale bitwise spherical quantisation of one latent frame, in numpy (ERNIE 5.0 report §2.2.1, after
Infinity, arXiv 2412.04431).

Shapes: ``n`` = h*w positions of the full grid, row-major; ``n_k`` = positions of scale ``k``; ``d`` bits;
``...`` any leading axes. Scales are counted from 0 here: ``scales[0]`` is the coarsest, ``scales[-1]`` the full grid.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

Flip = Callable[[int, np.ndarray], np.ndarray]  # (scale number from 0, bits uint8 [..., n_k, d]) -> bits to feed on


@dataclass
class ScaleCodes:
    """What the backbone learns from one frame: labels, the features that feed the next scales, and the sum of all."""

    bits: list[np.ndarray]  # K of uint8 [..., n_k, d]: labels, never flipped
    inputs: list[np.ndarray]  # K-1 of float32 [..., n_{k+1}, d]: inputs[k] = accumulation of scales 0..k, at scale k+1
    total: np.ndarray  # float32 [..., n, d]: accumulation of all scales, flips included


def area_matrix(size_in: int, size_out: int) -> np.ndarray:
    """Exact area averaging along one axis, [size_out, size_in]; rows sum to 1 (also where cells overlap partly)."""
    edges = np.arange(size_out + 1) * (size_in / size_out)
    left, right = edges[:-1, None], edges[1:, None]
    cells = np.arange(size_in)[None]
    return np.clip(np.minimum(right, cells + 1) - np.maximum(left, cells), 0, None) * (size_out / size_in)


def linear_matrix(size_in: int, size_out: int) -> np.ndarray:
    """Linear interpolation along one axis with half-pixel centres and held edges, [size_out, size_in]."""
    centre = np.clip((np.arange(size_out) + 0.5) * (size_in / size_out) - 0.5, 0, size_in - 1)
    low = np.minimum(np.floor(centre).astype(int), size_in - 1)
    high = np.minimum(low + 1, size_in - 1)
    matrix = np.zeros((size_out, size_in))
    np.add.at(matrix, (np.arange(size_out), low), 1 - (centre - low))
    np.add.at(matrix, (np.arange(size_out), high), centre - low)
    return matrix


class ScalePyramid:
    """The square grids of a frame and the matrices between each of them and the full grid.

    ``down[k]`` float32 [n_k, n] averages areas, ``up[k]`` float32 [n, n_k] interpolates bilinearly.
    Raises ValueError when ``scales`` is empty, not growing, or holds a side below 1.
    """

    def __init__(self, scales: Sequence[int]):
        scales = [int(side) for side in scales]
        if not scales or scales[0] < 1 or any(b <= a for a, b in pairwise(scales)):
            raise ValueError(f"scales: found {scales}, expected growing grid sides from 1 up, such as [1, 2, 3, 4]")
        self.scales = scales
        self.sizes = [side * side for side in scales]
        full = scales[-1]
        self.down = [_both_axes(area_matrix(full, side)) for side in scales]
        self.up = [_both_axes(linear_matrix(side, full)) for side in scales]

    def __len__(self) -> int:
        return len(self.scales)

    @property
    def tokens(self) -> int:
        """Positions of all scales together."""
        return sum(self.sizes)

    @staticmethod
    def quantise(residual: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Bitwise spherical quantisation: ``(bits uint8, code float32)``, both of the residual's shape [..., d].

        u = r/||r||, code = sign(u)/sqrt(d) with u > 0 -> +1, else -1. The norm is positive, so r's own signs decide.
        """
        bits = (residual > 0).astype(np.uint8)
        return bits, ScalePyramid.code(bits)

    @staticmethod
    def code(bits: np.ndarray) -> np.ndarray:
        """The point of the unit sphere that bits stand for: float32 of the same shape, +-1/sqrt(d)."""
        return (bits.astype(np.float32) * 2 - 1) * np.float32(bits.shape[-1] ** -0.5)

    def decompose(self, latent: np.ndarray, flip: Flip | None = None) -> ScaleCodes:
        """Splits a latent [..., n, d] into scales.

        ``flip`` corrupts what is fed on, never the labels: those describe the residual against the corrupted
        accumulation, so that each scale's label already corrects the flips of the earlier ones (Infinity's
        self-correction).
        """
        latent = np.asarray(latent, dtype=np.float32)
        total = np.zeros_like(latent)
        bits, inputs = [], []
        for k in range(len(self)):
            label, code = self.quantise(self.down[k] @ (latent - total))
            bits.append(label)
            if flip is not None:
                code = self.code(flip(k, label))
            total = total + self.up[k] @ code
            if k + 1 < len(self):
                inputs.append(self.input_for(k + 1, total))
        return ScaleCodes(bits, inputs, total)

    def accumulate(self, bits: Sequence[np.ndarray]) -> np.ndarray:
        """Sum of the first ``len(bits)`` scales, [n_k, d] each, at the full grid: float32 [..., n, d]."""
        assert 0 < len(bits) <= len(self), f"{len(bits)} scales given, the pyramid has {len(self)}"
        total = self.up[0] @ self.code(bits[0])
        for k in range(1, len(bits)):
            total = total + self.up[k] @ self.code(bits[k])
        return total

    def input_for(self, k: int, total: np.ndarray) -> np.ndarray:
        """The accumulation [..., n, d] seen at scale ``k`` (from 0): [..., n_k, d]. ``k = 0`` pools a whole frame."""
        return self.down[k] @ total


def _both_axes(matrix: np.ndarray) -> np.ndarray:
    """The same resize along rows and columns of a row-major square grid."""
    return np.kron(matrix, matrix).astype(np.float32)
