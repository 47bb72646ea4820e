"""``moe_ffn``: dropless permute -> SwiGLU over stacked experts -> weighted combine; ``dense_ffn``: one expert for all.

Shapes: T tokens, D hidden, E experts, K experts per token, F expert width, C rows of the fullest expert.
"""

from __future__ import annotations

import paddle
import paddle.nn.functional as F
from paddle.autograd import PyLayer, PyLayerContext

from ernie5.ops import kernels
from ernie5.ops.linear import linear


class _Padded:
    """Where each assignment stands among E * C rows, and back. No assignment is ever dropped.

    ``source`` [E*C]: the token of a row (T = an empty row); ``slot`` [T*K]: an assignment's row (E*C = not routed).
    """

    def __init__(self, tokens: int, top_k: int, order: paddle.Tensor, offsets: paddle.Tensor) -> None:
        order, offsets = order.astype("int64"), offsets.astype("int64")
        first, counts = offsets[:-1], offsets[1:] - offsets[:-1]
        routed = int(offsets[-1])
        self.capacity = max(int(counts.max()), 1)
        size = counts.shape[0] * self.capacity
        order = order[:routed]
        expert = paddle.searchsorted(offsets[1:], paddle.arange(routed), right=True)
        row = expert * self.capacity + paddle.arange(routed) - first.gather(expert)
        self.slot = paddle.scatter(paddle.full([tokens * top_k + 1], size, dtype="int64"), order, row)[:-1]
        self.source = paddle.scatter(paddle.full([size + 1], tokens, dtype="int64"), row, order // top_k)[:size]
        self.shape = [counts.shape[0], self.capacity]
        self.tokens, self.top_k = tokens, top_k


def _with_zero_row(x: paddle.Tensor) -> paddle.Tensor:
    return paddle.concat([x, paddle.zeros([1, x.shape[1]], dtype=x.dtype)])


class _Dispatch(PyLayer):
    """x [T,D] -> rows [E,C,D]. Its gradient is a gather and a sum over k: no scatter-add anywhere."""

    @staticmethod
    def forward(ctx: PyLayerContext, x: paddle.Tensor, permutation: _Padded):
        ctx.permutation = permutation
        rows = paddle.gather(_with_zero_row(x), permutation.source)
        return rows.reshape([*permutation.shape, x.shape[1]])

    @staticmethod
    def backward(ctx: PyLayerContext, grad: paddle.Tensor):
        p = ctx.permutation
        flat = _with_zero_row(grad.reshape([-1, grad.shape[-1]]))
        return paddle.gather(flat, p.slot).reshape([p.tokens, p.top_k, grad.shape[-1]]).sum(1)


class _Combine(PyLayer):
    """rows [E,C,D], weights [T,K] -> y [T,D] = sum over k of weight * row."""

    @staticmethod
    def forward(ctx: PyLayerContext, rows: paddle.Tensor, weights: paddle.Tensor, permutation: _Padded):
        p = permutation
        picked = paddle.gather(_with_zero_row(rows.reshape([-1, rows.shape[-1]])), p.slot)
        picked = picked.reshape([p.tokens, p.top_k, rows.shape[-1]])
        ctx.permutation, ctx.wanted = p, (not rows.stop_gradient, not weights.stop_gradient)
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
        grads = (rows * row_weight.unsqueeze(-1)).reshape([*p.shape, -1]), grad_weights
        return tuple(grad if wanted else None for grad, wanted in zip(grads, ctx.wanted, strict=True))


def moe_ffn(
    x: paddle.Tensor,
    weights: paddle.Tensor,
    order: paddle.Tensor,
    offsets: paddle.Tensor,
    gate_up: paddle.Tensor,
    down: paddle.Tensor,
) -> paddle.Tensor:
    """y [T,D] = sum_k weights[t,k] * down[e](swiglu(gate_up[e](x[t]))) over the experts e of token t.

    x [T,D]; weights [T,K]; order int32 [T*K], offsets int32 [E+1]: the assignments t*K+k grouped by expert, as
    ``ernie5.ops.route`` gives them, those missing contribute nothing; gate_up [E,D,2F] (gate first); down [E,F,D].
    The reference pads every expert to the fullest one and multiplies them as a batch.
    """
    if kernels.serves("moe_ffn", x, gate_up, down):
        return kernels.call("moe_ffn", [x, weights, order, offsets, gate_up, down])[0]
    permutation = _Padded(*weights.shape, order, offsets)
    rows = _Dispatch.apply(x, permutation)
    rows = paddle.bmm(F.swiglu(paddle.bmm(rows, gate_up)), down)
    return _Combine.apply(rows, weights, permutation)


class ExpertsInParts:
    """``moe_ffn`` of tokens that come in parts: a backward for each as soon as its gradient is there.

    gate_up [E,D,2F] and down [E,F,D] are those of all parts; ``wanted``: whether gradients of x and of weights are. The
    kernels leave the experts' weights to the end and sum over all parts in one product, where sums part by part would
    move all weights each time. The reference is a graph a part.
    """

    def __init__(
        self, gate_up: paddle.Tensor, down: paddle.Tensor, wanted: tuple[bool, bool], keep_graph: bool
    ) -> None:
        self.gate_up, self.down = (_leaf(tensor, not tensor.stop_gradient) for tensor in (gate_up, down))
        self.wanted, self.keep_graph = wanted, keep_graph
        # By part, between its forward and its backward: the kernels' inputs and hidden, or the reference's graph.
        self._kept: dict[int, tuple[list[paddle.Tensor], paddle.Tensor]] = {}
        self._graphs: dict[int, tuple[paddle.Tensor, paddle.Tensor, paddle.Tensor]] = {}
        self._through: list[tuple[paddle.Tensor, ...]] = []  # what the kernels make the weights' gradients of

    def forward(
        self, part: int, x: paddle.Tensor, weights: paddle.Tensor, order: paddle.Tensor, offsets: paddle.Tensor
    ) -> paddle.Tensor:
        """y [T,D] of the part's x [T,D], weights [T,K], order [T*K] and offsets [E+1], as in ``moe_ffn``."""
        if kernels.serves("moe_ffn_backward_rows", x, self.gate_up, self.down):
            inputs = [x, weights, order, offsets, self.gate_up, self.down]
            with paddle.no_grad():
                y, hidden = kernels.call("moe_ffn", inputs)
            if self.keep_graph:
                self._kept[part] = inputs, hidden
            return y
        x, weights = (_leaf(tensor, wanted) for tensor, wanted in zip((x, weights), self.wanted, strict=True))
        with paddle.set_grad_enabled(self.keep_graph):
            y = moe_ffn(x, weights, order, offsets, self.gate_up, self.down)
        if self.keep_graph:
            self._graphs[part] = x, weights, y
        return y.detach()

    def backward(self, part: int, grad_y: paddle.Tensor) -> tuple[paddle.Tensor | None, paddle.Tensor | None]:
        """Gradients of the part's x and weights, None where not wanted. grad_y [T,D]."""
        if part in self._graphs:
            x, weights, y = self._graphs.pop(part)
            if not y.stop_gradient:
                paddle.autograd.backward([y], [grad_y])
            return gradient(x), gradient(weights)
        inputs, hidden = self._kept.pop(part)
        with paddle.no_grad():
            *grads, work = kernels.call("moe_ffn_backward_rows", [*inputs, hidden, grad_y])
        x, _, order, offsets, *_ = inputs
        self._through.append((x, grad_y, work, order, offsets))
        grad_x, grad_weights = (grad if wanted else None for grad, wanted in zip(grads, self.wanted, strict=True))
        return grad_x, grad_weights

    def weight_gradients(self) -> tuple[paddle.Tensor | None, paddle.Tensor | None]:
        """Gradients of gate_up and down over all parts, None where they are frozen."""
        leaves = self.gate_up, self.down
        if not self._through or all(leaf.stop_gradient for leaf in leaves):
            gate_up, down = map(gradient, leaves)
            return gate_up, down
        parts = map(list, zip(*self._through, strict=True))
        with paddle.no_grad():
            grads = kernels.call("moe_ffn_backward_weights", [*parts, *leaves])
        self._through = []
        gate_up, down = (None if leaf.stop_gradient else grad for leaf, grad in zip(leaves, grads, strict=True))
        return gate_up, down


def _leaf(tensor: paddle.Tensor, wanted: bool) -> paddle.Tensor:
    leaf = tensor.detach()
    leaf.stop_gradient = not wanted
    return leaf


def gradient(leaf: paddle.Tensor) -> paddle.Tensor | None:
    """What gathered on a leaf; None where none is wanted."""
    if leaf.stop_gradient:
        return None
    return leaf.grad if leaf.grad is not None else paddle.zeros_like(leaf)


def dense_ffn(x: paddle.Tensor, gate_up: paddle.Tensor, down: paddle.Tensor) -> paddle.Tensor:
    """SwiGLU of every token, the shared expert: x [T,D], gate_up [D,2F] (gate first), down [F,D] -> [T,D].

    One kernel, but for float32 on the CPU: there ``linear`` around a kernel for the activation is faster.
    """
    whole = x.dtype == paddle.bfloat16 or kernels.on_gpu(x)
    if whole and kernels.serves("dense_ffn", x, gate_up, down):
        return kernels.call("dense_ffn", [x, gate_up, down])[0]
    return linear(swiglu(linear(x, gate_up)), down)


def swiglu(hidden: paddle.Tensor) -> paddle.Tensor:
    """silu(gate) * up of hidden [...,2F], gate first -> [...,F]."""
    return kernels.call("swiglu", [hidden]) if kernels.serves("swiglu", hidden) else F.swiglu(hidden)
