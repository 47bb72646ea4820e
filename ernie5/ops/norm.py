"""``rms_norm``: x / rms(x) * weight, optionally of a sum that is returned too (arXiv 1910.07467).

Shapes: ... any leading axes, D hidden.
"""

from __future__ import annotations

import paddle

from ernie5.ops import kernels


def rms_norm(x: paddle.Tensor, weight: paddle.Tensor, eps: float) -> paddle.Tensor:
    """x [..., D], weight [D] -> [..., D]."""
    if kernels.serves("rms_norm", x, weight):
        return kernels.call("rms_norm", [x, weight], [eps])[0]
    return _reference(x, weight, eps)


def add_rms_norm(
    x: paddle.Tensor, residual: paddle.Tensor, weight: paddle.Tensor, eps: float
) -> tuple[paddle.Tensor, paddle.Tensor]:
    """(rms_norm(x + residual), x + residual) in one pass over memory; all [..., D]."""
    if kernels.serves("rms_norm", x, residual, weight):
        normed, total, _ = kernels.call("add_rms_norm", [x, residual, weight], [eps])
        return normed, total
    total = x + residual
    return _reference(total, weight, eps), total


def _reference(x: paddle.Tensor, weight: paddle.Tensor, eps: float) -> paddle.Tensor:
    return x * paddle.rsqrt((x * x).mean(-1, keepdim=True) + eps) * weight
