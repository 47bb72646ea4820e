"""``moe_ffn``: dropless permute -> SwiGLU over stacked experts -> weighted combine.

Shapes: T tokens, D hidden, E experts, K experts per token, F expert width, C rows of the fullest expert.
"""

from __future__ import annotations

import paddle
import paddle.nn.functional as F
from paddle.autograd import PyLayer, PyLayerContext


class _Permutation:
    """Where each (token, k) assignment stands among E * C rows, and back. No assignment is ever dropped.

    ``source`` [E*C]: the token of a row (T = an empty row); ``slot`` [T*K]: an assignment's row (E*C = not routed).
    """

    def __init__(self, experts: paddle.Tensor, num_experts: int) -> None:
        tokens, top_k = experts.shape
        flat = experts.flatten()
        flat = paddle.where(flat < 0, paddle.full_like(flat, num_experts), flat)
        counts = paddle.bincount(flat, minlength=num_experts + 1)
        self.capacity = max(int(counts[:num_experts].max()), 1)
        order = paddle.argsort(flat, stable=True)
        expert_of_row = flat.gather(order)
        first = paddle.cumsum(counts) - counts
        rank = paddle.arange(tokens * top_k) - first.gather(expert_of_row)
        size = num_experts * self.capacity
        row = paddle.where(
            expert_of_row < num_experts, expert_of_row * self.capacity + rank, paddle.full_like(rank, size)
        )
        self.slot = paddle.scatter(paddle.zeros_like(row), order, row)
        source = paddle.full([size + 1], tokens, dtype=row.dtype)
        self.source = paddle.scatter(source, row, order // top_k)[:size]
        self.shape = [num_experts, self.capacity]
        self.tokens, self.top_k = tokens, top_k


def _with_zero_row(x: paddle.Tensor) -> paddle.Tensor:
    return paddle.concat([x, paddle.zeros([1, x.shape[1]], dtype=x.dtype)])


class _Dispatch(PyLayer):
    """x [T,D] -> rows [E,C,D]. Its gradient is a gather and a sum over k: no scatter-add anywhere."""

    @staticmethod
    def forward(ctx: PyLayerContext, x: paddle.Tensor, permutation: _Permutation):
        ctx.permutation = permutation
        rows = paddle.gather(_with_zero_row(x), permutation.source)
        return rows.reshape([*permutation.shape, x.shape[1]])

    @staticmethod
    def backward(ctx: PyLayerContext, grad: paddle.Tensor):
        p = ctx.permutation
        flat = _with_zero_row(grad.reshape([-1, grad.shape[-1]]))
        return paddle.gather(flat, p.slot).reshape([p.tokens, p.top_k, -1]).sum(1)


class _Combine(PyLayer):
    """rows [E,C,D], weights [T,K] -> y [T,D] = sum over k of weight * row."""

    @staticmethod
    def forward(ctx: PyLayerContext, rows: paddle.Tensor, weights: paddle.Tensor, permutation: _Permutation):
        p = permutation
        picked = paddle.gather(_with_zero_row(rows.reshape([-1, rows.shape[-1]])), p.slot)
        picked = picked.reshape([p.tokens, p.top_k, -1])
        ctx.permutation = p
        ctx.save_for_backward(picked, weights)
        return paddle.matmul(weights.unsqueeze(1), picked).squeeze(1)

    @staticmethod
    def backward(ctx: PyLayerContext, grad: paddle.Tensor):
        p = ctx.permutation
        picked, weights = ctx.saved_tensor()
        grad_weights = paddle.matmul(picked, grad.unsqueeze(-1)).squeeze(-1)
        rows = paddle.gather(_with_zero_row(grad), p.source)
        size = p.shape[0] * p.capacity
        row_weight = paddle.scatter(paddle.zeros([size + 1], dtype=weights.dtype), p.slot, weights.flatten())[:size]
        return (rows * row_weight.unsqueeze(-1)).reshape([*p.shape, -1]), grad_weights


def moe_ffn(
    x: paddle.Tensor, experts: paddle.Tensor, weights: paddle.Tensor, gate_up: paddle.Tensor, down: paddle.Tensor
) -> paddle.Tensor:
    """y [T,D] = sum_k weights[t,k] * down[e](swiglu(gate_up[e](x[t]))), e = experts[t,k]; -1 contributes nothing.

    x [T,D]; experts int64 [T,K]; weights [T,K]; gate_up [E,D,2F] (gate first); down [E,F,D]. Experts are
    padded to the fullest one and multiplied as a batch.
    """
    permutation = _Permutation(experts, gate_up.shape[0])
    rows = _Dispatch.apply(x, permutation)
    rows = paddle.bmm(F.swiglu(paddle.bmm(rows, gate_up)), down)
    return _Combine.apply(rows, weights, permutation)
