"""Uni-RoPE: rotary embedding over (t, h, w) positions (ERNIE 5.0 report §2.2.3).

Shapes: B batch, S positions, N heads, h head_dim. Pairs are interleaved (even, odd).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import paddle
from paddle.autograd import PyLayer, PyLayerContext

AXES = "thw"  # order of the last axis of ``positions``


@lru_cache(maxsize=16)
def band_frequencies(head_dim: int, base: float, pattern: str) -> np.ndarray:
    """Frequencies as a matrix [3, head_dim]: row a holds the bands that turn with axis a of ``AXES``, else 0.

    Band i turns by base^(-2i/head_dim) a position and fills dims 2i and 2i+1; ``pattern`` names the axis of each
    band, repeated to fill. With t = h = w every pattern gives ordinary 1-D RoPE.
    """
    bands = head_dim // 2
    matrix = np.zeros((3, head_dim))
    for band, frequency in enumerate(base ** (-np.arange(bands, dtype=np.float64) / bands)):
        matrix[AXES.index(pattern[band % len(pattern)]), 2 * band : 2 * band + 2] = frequency
    return matrix


def _quarter_turn(head_dim: int, dtype: paddle.dtype) -> paddle.Tensor:
    """[h,h] that maps a row (x0, x1, ...) to (-x1, x0, ...)."""
    turn = np.zeros((head_dim, head_dim))
    even = np.arange(0, head_dim, 2)
    turn[even + 1, even], turn[even, even + 1] = -1.0, 1.0
    return paddle.to_tensor(turn, dtype=dtype)


@dataclass
class RopeTables:
    """cos and sin [B,S,h] of one forward pass; ``heads(n)`` repeats them for n heads, once."""

    cos: paddle.Tensor
    sin: paddle.Tensor
    turn: paddle.Tensor

    def __post_init__(self) -> None:
        self._tiled: dict[int, tuple[paddle.Tensor, paddle.Tensor]] = {}

    def heads(self, count: int) -> tuple[paddle.Tensor, paddle.Tensor]:
        if count not in self._tiled:
            self._tiled[count] = self.cos.tile([1, 1, count]), self.sin.tile([1, 1, count])
        return self._tiled[count]


def rope_tables(positions: paddle.Tensor, head_dim: int, base: float, pattern: str) -> RopeTables:
    """Tables of positions [B,S,3], in the dtype of ``positions``."""
    frequencies = paddle.to_tensor(band_frequencies(head_dim, base, pattern), dtype=positions.dtype)
    angles = paddle.matmul(positions, frequencies)
    return RopeTables(paddle.cos(angles), paddle.sin(angles), _quarter_turn(head_dim, positions.dtype))


class _Rotate(PyLayer):
    """x cos + turn(x) sin, where turn is a fixed [h,h] matrix: two products and a small matmul instead of slices."""

    @staticmethod
    def forward(ctx: PyLayerContext, x: paddle.Tensor, cos: paddle.Tensor, sin: paddle.Tensor, turn: paddle.Tensor):
        ctx.save_for_backward(cos, sin, turn)
        return _rotate(x, cos, sin, turn)

    @staticmethod
    def backward(ctx: PyLayerContext, grad: paddle.Tensor):
        cos, sin, turn = ctx.saved_tensor()
        return _rotate(grad, cos, -sin, turn)


def _rotate(x: paddle.Tensor, cos: paddle.Tensor, sin: paddle.Tensor, turn: paddle.Tensor) -> paddle.Tensor:
    turned = paddle.matmul(x.reshape([-1, turn.shape[0]]), turn).reshape(x.shape)
    return x * cos + turned * sin


def uni_rope(x: paddle.Tensor, tables: RopeTables) -> paddle.Tensor:
    """Rotates the heads of x [B,S,N*h] by the tables of its positions; same shape and dtype."""
    cos, sin = tables.heads(x.shape[-1] // tables.turn.shape[0])
    return _Rotate.apply(x, cos, sin, tables.turn)
