"""``recompute``: a function whose activations are not kept; the backward pass runs it again (arXiv 1604.06174)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import paddle
from paddle.autograd import PyLayer, PyLayerContext

Function = Callable[..., paddle.Tensor]


def recompute(function: Function, *arguments: paddle.Tensor) -> paddle.Tensor:
    """``function(*arguments)``, one tensor of tensors. The function must be deterministic and is called twice.

    Gradients reach the arguments that want one, and every parameter that the function uses.
    """
    return _Again.apply(*arguments, function=function)


class _Again(PyLayer):
    @staticmethod
    def forward(ctx: PyLayerContext, *arguments: paddle.Tensor, function: Function) -> paddle.Tensor:
        ctx.function = function
        ctx.save_for_backward(*arguments)
        with paddle.no_grad():
            return function(*arguments)

    @staticmethod
    def backward(ctx: PyLayerContext, gradient: paddle.Tensor) -> Any:
        arguments = []
        for given in ctx.saved_tensor():
            fresh = given.detach()
            fresh.stop_gradient = given.stop_gradient
            arguments.append(fresh)
        with paddle.enable_grad():
            result = ctx.function(*arguments)
        paddle.autograd.backward([result], [gradient])
        return tuple(fresh.grad for fresh in arguments if not fresh.stop_gradient)
