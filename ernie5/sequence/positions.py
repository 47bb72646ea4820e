"""Uni-RoPE coordinates (t, h, w) of every position (ERNIE 5.0 report §2.2.3).

Text and audio have t = h = w = running index, which is ordinary 1-D RoPE. A visual block starts at the running index
``base``: t = base + frame, and (h, w) = base + the place inside the frame, where the grids of all scales are stretched
to the final grid and share its geometric centre. After the block the index resumes at (largest coordinate used) + 1.
The report states the common centre; stretching and the resumed index (Qwen2-VL's rule) are our choice.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np


def line(start: int, count: int) -> np.ndarray:
    """Coordinates float32 [count, 3] of a run of text or audio whose first index is ``start``."""
    return np.repeat(np.arange(start, start + count, dtype=np.float32)[:, None], 3, axis=1)


def centred(side: int, final_side: int) -> np.ndarray:
    """Places float32 [side] of a scale's cells along one axis of the final grid: (i + 1/2) * final / side - 1/2."""
    return ((np.arange(side) + 0.5) * (final_side / side) - 0.5).astype(np.float32)


@lru_cache(maxsize=256)
def scale_offsets(side: int, final_side: int) -> np.ndarray:
    """(0, h, w) float32 [side * side, 3] of one square scale, row-major, relative to the block's base. Read-only."""
    axis = centred(side, final_side)
    offsets = np.zeros((side, side, 3), np.float32)
    offsets[..., 1] = axis[:, None]
    offsets[..., 2] = axis[None, :]
    offsets.flags.writeable = False
    return offsets.reshape(side * side, 3)


@lru_cache(maxsize=256)
def grid_offsets(frames: int, rows: int, columns: int) -> np.ndarray:
    """(t, h, w) float32 [frames * rows * columns, 3] of an understanding grid, relative to its base. Read-only."""
    axes = np.meshgrid(np.arange(frames), np.arange(rows), np.arange(columns), indexing="ij")
    offsets = np.stack(axes, axis=-1).reshape(-1, 3).astype(np.float32)
    offsets.flags.writeable = False
    return offsets
