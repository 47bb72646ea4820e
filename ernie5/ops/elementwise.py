"""Sums and conversions of activations, and ``fork``, which sums their gradients.

Paddle's CPU kernels add and convert bfloat16 on one thread, a value at a time, and accumulate gradients so: in a
bfloat16 training step that took a third of the time.
"""

from __future__ import annotations

import paddle

from ernie5.ops import kernels


def add(x: paddle.Tensor, y: paddle.Tensor, alone: bool = False) -> paddle.Tensor:
    """x + y of one shape and dtype. Paddle's ``+`` has no bfloat16 kernel on the CPU, its sum of a list has.

    ``alone``: nothing else reads x or y, so that their gradients may be one piece of memory.
    """
    if kernels.serves("add", x, y):
        return kernels.call("add", [x, y], [alone])
    return paddle.add_n([x, y]) if x.dtype == paddle.bfloat16 else x + y


def cast(x: paddle.Tensor, dtype: paddle.dtype) -> paddle.Tensor:
    """x in another dtype; itself where it has that already."""
    if x.dtype == dtype:
        return x
    if dtype in kernels.SERVED_DTYPES and kernels.serves("cast", x):
        return kernels.call("cast", [x])
    return x.astype(dtype)


def fork(x: paddle.Tensor, count: int) -> tuple[paddle.Tensor, ...]:
    """``count`` (up to three) times x, for as many readers, whose gradients are then added in one pass over memory."""
    if not paddle.in_dynamic_mode() or x.stop_gradient or not kernels.serves("fork", x):
        return (x,) * count
    return tuple(kernels.call("fork", [x])[:count])
