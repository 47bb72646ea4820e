"""The layers that the plan puts in place of the single-device ones. Between them, every rank has its own tokens.

Shapes: T tokens of this rank, n tensor ranks, D hidden, V vocabulary, N labelled rows. Tensor ranks hold consecutive
parts of the same n*T tokens (sequence parallelism, arXiv 2205.05198); Fleet's layers gather and scatter them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import paddle
import paddle.distributed as dist
from paddle.autograd import PyLayer, PyLayerContext
from paddle.distributed.communication.group import Group
from paddle.distributed.fleet.layers.mpu import ParallelCrossEntropy, VocabParallelEmbedding
from paddle.distributed.fleet.utils.sequence_parallel_utils import (
    AllGatherOp,
    ColumnSequenceParallelLinear,
    ReduceScatterOp,
    RowSequenceParallelLinear,
    ScatterOp,
)

from ernie5.model.configuration import Ernie5Config
from ernie5.model.heads import TextLosses, text_logits
from ernie5.model.layers import Experts, SharedExpert
from ernie5.model.losses import token_loss
from ernie5.ops.elementwise import cast
from ernie5.ops.experts import dense_ffn
from ernie5.ops.linear import linear
from ernie5.ops.route import Routing, permutation
from ernie5.parallel.dispatch import Dispatcher
from ernie5.sequence.vocabulary import IGNORE

Function = Callable[[paddle.Tensor], paddle.Tensor]
Layer = TypeVar("Layer", ColumnSequenceParallelLinear, RowSequenceParallelLinear)


def column(inner: int, outer: int) -> ColumnSequenceParallelLinear:
    """[T,inner] -> [n*T,outer/n]."""
    return _with_our_product(ColumnSequenceParallelLinear(inner, outer, has_bias=False, gather_output=False))


def row(inner: int, outer: int) -> RowSequenceParallelLinear:
    """[n*T,inner/n] -> [T,outer]."""
    return _with_our_product(RowSequenceParallelLinear(inner, outer, has_bias=False, input_is_parallel=True))


def _with_our_product(layer: Layer) -> Layer:
    layer.linear = _product
    return layer


def _product(x: paddle.Tensor, weight: paddle.Tensor, bias: None = None, name: str | None = None) -> paddle.Tensor:
    """As ``F.linear`` without a bias: Paddle has none of bfloat16 on the CPU, and is slower there in float32."""
    return linear(x, weight)


def all_gather(tensor: paddle.Tensor, group: Group) -> paddle.Tensor:
    """[a,...] of every rank -> [n*a,...], without a gradient."""
    gathered: list[paddle.Tensor] = []
    dist.all_gather(gathered, tensor.detach().contiguous(), group=group)
    return paddle.concat(gathered)


class SplitEmbedding(VocabParallelEmbedding):
    """Fleet's table of V/n rows: ids [T] of this rank's tokens -> [T,D]."""

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return ScatterOp.apply(super().forward(all_gather(x, self.model_parallel_group)))


class SplitSharedExpert(SharedExpert):
    """The shared expert, cut along its width: every tensor rank sees all their tokens."""

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return ReduceScatterOp.apply(dense_ffn(AllGatherOp.apply(x), self.gate_up, self.down))


class SpreadTextLosses(TextLosses):
    """Losses of this rank's rows, through a head that may be split by vocabulary; called even where there is no row.

    ``group``: the tensor ranks, or None. Each rank's rows, filled up to the longest, pass through the heads of all.
    The graph is the same whatever the counts: Paddle runs a backward breadth first, so ranks whose graphs differ in
    depth would meet in different collectives.
    """

    collective = True

    def __init__(self, group: Group | None) -> None:
        super().__init__()
        self.group = group
        self.split_losses = ParallelCrossEntropy() if group is not None else None

    def forward(self, states: paddle.Tensor, labels: paddle.Tensor, embedding: paddle.Tensor) -> paddle.Tensor:
        count = longest = states.shape[0]
        if self.group is not None:
            most = paddle.to_tensor([count])
            dist.all_reduce(most, op=dist.ReduceOp.MAX, group=self.group)
            longest = int(most)
        filled = paddle.arange(max(longest, 1))
        first, mine = paddle.clip(filled, max=count), paddle.arange(count)
        states = _followed_by_zeros(states).gather(first)
        labels = paddle.concat([labels, paddle.full([1], IGNORE, labels.dtype)]).gather(first)
        if self.group is None:
            return token_loss(text_logits(states, embedding), labels).gather(mine)
        logits = text_logits(AllGatherOp.apply(states), embedding)
        if logits.dtype == paddle.bfloat16:  # exponents of so few digits would make the loss
            logits = cast(logits, paddle.float32)
        losses = self.split_losses(logits, all_gather(labels, self.group))
        return ScatterOp.apply(losses.reshape([-1])).gather(mine)


def _followed_by_zeros(rows: paddle.Tensor) -> paddle.Tensor:
    """[N,D] -> [N+1,D]. By way of float32 from bfloat16, which Paddle's CPU kernels join without a gradient."""
    wide = cast(rows, paddle.float32) if rows.dtype == paddle.bfloat16 else rows
    return cast(paddle.concat([wide, paddle.zeros([1, rows.shape[1]], wide.dtype)]), rows.dtype)


class SplitExperts(Experts):
    """The experts of this rank, and the dispatcher that brings tokens to those of the others."""

    def __init__(self, config: Ernie5Config, dispatcher: Dispatcher) -> None:
        super().__init__(config)
        self.dispatcher, self.num_experts = dispatcher, config.num_experts

    def forward(self, x: paddle.Tensor, routing: Routing, shared: Function | None = None) -> paddle.Tensor:
        if not (self.training and 0 < self.sub_batch < x.shape[0]):
            return self.dispatcher(x, routing, self.gate_up, self.down, shared)
        return super().forward(x, routing, shared)

    def _part(self, x: paddle.Tensor, weights: paddle.Tensor, experts: paddle.Tensor) -> paddle.Tensor:
        part = Routing(experts, weights, *permutation(experts, self.num_experts))
        return self.dispatcher(x, part, self.gate_up, self.down)


class ContextKeys:
    """Keys and values of a whole row, of which every rank of ``group`` has a part: gathered, gradients scattered back.

    Stands where a cache does: [B,S/n,G,h] -> [B,S,G,h].
    """

    def __init__(self, group: Group) -> None:
        self.group = group

    def start(self, length: int) -> int:
        """The row's first position here, of ``length``."""
        return self.group.rank * length

    def append(self, k: paddle.Tensor, v: paddle.Tensor) -> tuple[paddle.Tensor, paddle.Tensor]:
        return _GatherRows.apply(k, self.group), _GatherRows.apply(v, self.group)


class _GatherRows(PyLayer):
    @staticmethod
    def forward(ctx: PyLayerContext, x: paddle.Tensor, group: Group) -> paddle.Tensor:
        ctx.group = group
        parts: list[paddle.Tensor] = []
        dist.all_gather(parts, x.contiguous(), group=group)
        return paddle.concat(parts, axis=1)

    @staticmethod
    def backward(ctx: PyLayerContext, grad: paddle.Tensor) -> paddle.Tensor:
        parts = paddle.concat(paddle.split(grad, ctx.group.nranks, axis=1))
        own = paddle.empty([parts.shape[0] // ctx.group.nranks, *parts.shape[1:]], dtype=grad.dtype)
        dist.stream.reduce_scatter(own, parts, op=dist.ReduceOp.SUM, group=ctx.group)
        return own
