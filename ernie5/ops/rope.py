"""Uni-RoPE: rotary embedding over (t, h, w) positions (ERNIE 5.0 report §2.2.3).

Shapes: B batch, S positions, N query heads, G key heads, h head_dim. Pairs are interleaved (even, odd).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import paddle

from ernie5.ops import kernels

AXES = "thw"  # order of the last axis of ``positions``


@lru_cache(maxsize=16)
def band_frequencies(head_dim: int, base: float, pattern: str) -> np.ndarray:
    """Frequencies as a matrix [3, h/2]: row a holds the bands that turn with axis a of ``AXES``, else 0.

    Band i turns by base^(-2i/head_dim) a position and fills dims 2i and 2i+1; ``pattern`` names the axis of each
    band, repeated to fill. With t = h = w every pattern gives ordinary 1-D RoPE.
    """
    bands = head_dim // 2
    matrix = np.zeros((3, bands))
    for band, frequency in enumerate(base ** (-np.arange(bands, dtype=np.float64) / bands)):
        matrix[AXES.index(pattern[band % len(pattern)]), band] = frequency
    return matrix


@dataclass
class RopeTables:
    """cos and sin [B,S,h/2] of one forward pass, shared by its layers."""

    cos: paddle.Tensor
    sin: paddle.Tensor


def rope_tables(positions: paddle.Tensor, head_dim: int, base: float, pattern: str) -> RopeTables:
    """Tables of positions [B,S,3], in the dtype of ``positions``: float32, or float64 for a reference."""
    frequencies = paddle.to_tensor(band_frequencies(head_dim, base, pattern), dtype=positions.dtype)
    angles = paddle.matmul(positions, frequencies)
    return RopeTables(paddle.cos(angles), paddle.sin(angles))


def uni_rope(q: paddle.Tensor, k: paddle.Tensor, tables: RopeTables) -> tuple[paddle.Tensor, paddle.Tensor]:
    """Rotates the heads of q [B,S,N*h] and k [B,S,G*h] by the tables of their positions; same shapes and dtype."""
    if kernels.serves("uni_rope", q, k):
        q, k = kernels.call("uni_rope", [q, k, tables.cos, tables.sin])
        return q, k
    return _rotate(q, tables), _rotate(k, tables)


def _rotate(x: paddle.Tensor, tables: RopeTables) -> paddle.Tensor:
    pairs = x.reshape([*x.shape[:2], -1, tables.cos.shape[-1], 2])
    cos, sin = tables.cos.unsqueeze(2).astype(x.dtype), tables.sin.unsqueeze(2).astype(x.dtype)
    even, odd = pairs[..., 0], pairs[..., 1]
    return paddle.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1).reshape(x.shape)
