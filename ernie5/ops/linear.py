"""``linear``: matrix product of rows with a weight, the projections and heads of the model.

Shapes: R rows, D inner size, O outputs.
"""

from __future__ import annotations

import math

import paddle

from ernie5.ops import kernels

LEAST_ROWS, LEAST_PRODUCTS = 128, 1 << 24  # below, packing costs what the faster products save


def linear(x: paddle.Tensor, weight: paddle.Tensor, transposed: bool = False) -> paddle.Tensor:
    """x [..., D] times ``weight`` [D,O], or [O,D] when ``transposed`` (a tied output head) -> [..., O].

    In float32 Paddle's own product is the fastest on processors without a matrix unit, and for few rows; with one, a
    float is multiplied there as the sum of three bfloat16, which is as exact. In bfloat16 Paddle has no product on the
    CPU.
    """
    if not (kernels.serves("linear", x, weight) and (x.dtype == paddle.bfloat16 or _large(x, weight))):
        return paddle.matmul(x, weight, transpose_y=transposed)
    rows = x if x.ndim == 2 else x.reshape([-1, x.shape[-1]])
    out = kernels.call("linear", [rows, weight], [transposed])
    return out if x.ndim == 2 else out.reshape([*x.shape[:-1], out.shape[-1]])


def _large(x: paddle.Tensor, weight: paddle.Tensor) -> bool:
    """Whether a float32 product is worth the matrix unit's packing, and there is one."""
    rows = math.prod(x.shape[:-1]) if paddle.in_dynamic_mode() else 0
    return rows >= LEAST_ROWS and rows * math.prod(weight.shape) >= LEAST_PRODUCTS and kernels.matrix_unit()
