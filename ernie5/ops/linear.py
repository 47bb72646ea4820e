"""``linear``: matrix product of rows with a weight, the projections and heads of the model.

Shapes: R rows, D inner size, O outputs.
"""

from __future__ import annotations

import paddle

from ernie5.ops import kernels


def linear(x: paddle.Tensor, weight: paddle.Tensor, transposed: bool = False) -> paddle.Tensor:
    """x [..., D] times ``weight`` [D,O], or [O,D] when ``transposed`` (a tied output head) -> [..., O].

    In float32 Paddle's own product is the fastest there is; in bfloat16 it has none on the CPU.
    """
    if x.dtype != paddle.bfloat16 or not kernels.serves("linear", x, weight):
        return paddle.matmul(x, weight, transpose_y=transposed)
    rows = x if x.ndim == 2 else x.reshape([-1, x.shape[-1]])
    out = kernels.call("linear", [rows, weight], [transposed])
    return out if x.ndim == 2 else out.reshape([*x.shape[:-1], out.shape[-1]])
