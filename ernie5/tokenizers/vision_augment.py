"""Small geometric changes of training pictures: shifts, turns and scalings that keep their captions true."""

from __future__ import annotations

import cv2
import numpy as np


def jitter(
    images: np.ndarray, rng: np.random.Generator, shift: float = 2.0, turn: float = 12.0, scale: float = 0.12
) -> np.ndarray:
    """uint8 [B, H, W, 3] -> same shape, each moved by up to ``shift`` pixels, turned by up to ``turn`` degrees and
    scaled by up to the fraction ``scale``; the border's colour fills what opens up. Never mirrors."""
    count, height, width = images.shape[:3]
    angles = np.deg2rad(rng.uniform(-turn, turn, count))
    factors = 1 + rng.uniform(-scale, scale, count)
    moves = rng.uniform(-shift, shift, (count, 2))
    middle = np.array([(width - 1) / 2, (height - 1) / 2])
    result = np.empty_like(images)
    for i in range(count):
        c, s = factors[i] * np.cos(angles[i]), factors[i] * np.sin(angles[i])
        matrix = np.array([[c, -s], [s, c]])
        offset = middle - matrix @ middle + moves[i]
        result[i] = cv2.warpAffine(
            images[i],
            np.column_stack([matrix, offset]),
            (width, height),
            flags=cv2.INTER_LINEAR,
            borderMode=cv2.BORDER_REPLICATE,
        )
    return result
