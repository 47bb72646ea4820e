"""Attention under FlashMask column intervals (arXiv 2410.01359; four-value, non-causal form).

Shapes: B batch, S query rows, M key columns, N query heads, G key/value heads, h head_dim. For key column j the four
values (LTS, LTE, UTS, UTE) hide it from rows LTS <= r < LTE and UTS <= r < UTE; r counts from the sequence's start.
The one implementation is the dense reference in plain Paddle, on every device: it costs S * M memory and work.
"""

from __future__ import annotations

import paddle
import paddle.nn.functional as F

HIDDEN = -1.0e30


class IntervalMask:
    """The intervals of one forward pass, with the dense additive mask the reference needs, built once.

    ``intervals`` int32 [B,1,M,4]; the queries are rows ``query_start .. query_start + length`` of the sequence.
    """

    def __init__(self, intervals: paddle.Tensor, length: int, query_start: int = 0) -> None:
        self.intervals = intervals
        self.length = length
        self.query_start = query_start
        self._additive: dict[tuple, paddle.Tensor] = {}

    def hidden(self) -> paddle.Tensor:
        """bool [B,1,S,M]: True where the row may not see the column."""
        rows = paddle.arange(self.query_start, self.query_start + self.length, dtype=self.intervals.dtype).reshape(
            [1, 1, -1, 1]
        )
        lts, lte, uts, ute = (self.intervals[..., i].unsqueeze(2) for i in range(4))
        return ((rows >= lts) & (rows < lte)) | ((rows >= uts) & (rows < ute))

    def additive(self, groups: int, repeats: int, dtype: paddle.dtype) -> paddle.Tensor:
        """0 or ``HIDDEN``, expanded to [B, groups, repeats * S, M] (a same-shape add beats a broadcast by far)."""
        key = (groups, repeats, dtype)
        if key not in self._additive:
            dense = paddle.where(self.hidden(), paddle.full([], HIDDEN, dtype=dtype), paddle.full([], 0.0, dtype=dtype))
            self._additive[key] = dense.tile([1, groups, repeats, 1])
        return self._additive[key]


def flashmask_attention(q: paddle.Tensor, k: paddle.Tensor, v: paddle.Tensor, mask: IntervalMask) -> paddle.Tensor:
    """softmax(q kᵀ / √h + mask) v. q [B,S,N,h]; k, v [B,M,G,h] with N a multiple of G; returns [B,S,N,h].

    A dense softmax, grouped so that the query heads that share a key head are one matmul.
    """
    batch, length, heads, dim = q.shape
    groups = k.shape[2]
    repeats = heads // groups
    q = (q * dim**-0.5).reshape([batch, length, groups, repeats, dim])
    q = q.transpose([0, 2, 3, 1, 4]).reshape([batch, groups, repeats * length, dim])
    scores = paddle.matmul(q, k.transpose([0, 2, 3, 1]))
    weights = F.softmax(scores + mask.additive(groups, repeats, scores.dtype), axis=-1)
    out = paddle.matmul(weights, v.transpose([0, 2, 1, 3]))
    out = out.reshape([batch, groups, repeats, length, dim]).transpose([0, 3, 1, 2, 4])
    return out.reshape([batch, length, heads, dim])
