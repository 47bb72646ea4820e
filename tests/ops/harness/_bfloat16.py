"""bfloat16 as its 16 bits in uint16 arrays."""

from __future__ import annotations

import numpy as np

ROUNDING = 2.0**-8  # of a bfloat16 value, relative


def to_bf16(x: np.ndarray) -> np.ndarray:
    """Bits of the nearest bfloat16, ties to even; x holds no NaN."""
    bits = x.astype(np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def unrounded(got: np.ndarray, wanted: np.ndarray, slack: float) -> np.ndarray:
    """``got`` with the reference's value wherever it is a bfloat16 rounding of it."""
    near = np.abs(got - wanted) <= ROUNDING * np.abs(wanted) + slack
    return np.where(near, wanted, got)
