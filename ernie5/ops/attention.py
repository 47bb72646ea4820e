"""Attention under FlashMask column intervals (arXiv 2410.01359), with the arguments of Paddle's GPU operator.

Shapes: B batch, S query rows, M key columns, N query heads, G key/value heads, h head_dim, c values a column. Rows
count from the sequence's start. The c values of key column j hide it from these rows:

| causal | c | values | hidden rows |
|---|---|---|---|
| no | 4 | LTS, LTE, UTS, UTE | LTS <= r < LTE and UTS <= r < UTE |
| no | 2 | LTS, UTE | r >= LTS and r < UTE |
| yes | 2 | LTS, LTE | LTS <= r < LTE and r < j |
| yes | 1 | LTS | r >= LTS and r < j |

The kernels visit tiles that hold something visible and keep O(S) memory; the dense reference costs S * M of both.
"""

from __future__ import annotations

import paddle
import paddle.nn.functional as F

from ernie5.ops import kernels

HIDDEN = -1.0e30
VALUES = {False: (2, 4), True: (1, 2)}  # causal -> the c there are
GPU_DTYPES = {paddle.float16, paddle.bfloat16}  # what Paddle's own kernel takes


class IntervalMask:
    """The intervals of one forward pass, with the dense additive mask the reference needs, built once.

    ``intervals`` int32 [B, 1 or G, M, c]; the queries are rows ``query_start .. query_start + length`` of the sequence.
    """

    def __init__(self, intervals: paddle.Tensor, length: int, query_start: int = 0, causal: bool = False) -> None:
        if intervals.shape[-1] not in VALUES[causal]:
            raise ValueError(
                f"attention intervals of {intervals.shape[-1]} values a column with causal={causal}; "
                f"expected {' or '.join(map(str, VALUES[causal]))}"
            )
        self.intervals = intervals
        self.length = length
        self.query_start = query_start
        self.causal = causal
        self._additive: dict[tuple, paddle.Tensor] = {}

    def hidden(self) -> paddle.Tensor:
        """bool [B, 1 or G, S, M]: True where the row may not see the column."""
        dtype = self.intervals.dtype
        rows = paddle.arange(self.query_start, self.query_start + self.length, dtype=dtype).reshape([1, 1, -1, 1])
        ends = [self.intervals[..., i].unsqueeze(2) for i in range(self.intervals.shape[-1])]
        if self.causal:
            columns = paddle.arange(self.intervals.shape[2], dtype=dtype).reshape([1, 1, 1, -1])
            below = rows >= ends[0] if len(ends) == 1 else (rows >= ends[0]) & (rows < ends[1])
            return below | (rows < columns)
        if len(ends) == 2:
            return (rows >= ends[0]) | (rows < ends[1])
        return ((rows >= ends[0]) & (rows < ends[1])) | ((rows >= ends[2]) & (rows < ends[3]))

    def additive(self, groups: int, repeats: int, dtype: paddle.dtype) -> paddle.Tensor:
        """0 or ``HIDDEN``, expanded to [B, G, repeats * S, M] (a same-shape add beats a broadcast by far)."""
        key = (groups, repeats, dtype)
        if key not in self._additive:
            dense = paddle.where(self.hidden(), paddle.full([], HIDDEN, dtype=dtype), paddle.full([], 0.0, dtype=dtype))
            self._additive[key] = dense.tile([1, groups // dense.shape[1], repeats, 1])
        return self._additive[key]

    def seeing(self, repeats: int, dtype: paddle.dtype) -> paddle.Tensor:
        """1, or 0 for rows that see nothing: [B, 1 or G, repeats * S, 1]."""
        key = (repeats, dtype)
        if key not in self._additive:
            seeing = paddle.logical_not(self.hidden().all(-1, keepdim=True)).astype(dtype)
            self._additive[key] = seeing.tile([1, 1, repeats, 1])
        return self._additive[key]


def flashmask_attention(
    query: paddle.Tensor,
    key: paddle.Tensor,
    value: paddle.Tensor,
    startend_row_indices: paddle.Tensor | IntervalMask,
    *,
    causal: bool = False,
) -> paddle.Tensor:
    """softmax(q kᵀ / √h + mask) v: query [B,S,N,h]; key, value [B,M,G,h], N a multiple of G -> [B,S,N,h].

    ``startend_row_indices`` int32 [B, 1 or G, M, c] as in ``paddle.nn.functional.flashmask_attention``, or an
    ``IntervalMask``, which also knows where the queries begin (``causal`` is then its own). A row that sees nothing
    gives 0.
    """
    mask = startend_row_indices
    if not isinstance(mask, IntervalMask):
        mask = IntervalMask(mask, query.shape[1], 0, causal)
    if kernels.serves("flashmask_attention", query, key, value) and query.shape[-1] % 8 == 0:
        attributes = [mask.causal, mask.query_start, query.shape[-1] ** -0.5]
        return kernels.call("flashmask_attention", [query, key, value, mask.intervals], attributes)[0]
    if query.dtype in GPU_DTYPES and kernels.on_gpu(query) and mask.query_start == 0 and query.shape[1] == key.shape[1]:
        return F.flashmask_attention(query, key, value, mask.intervals, causal=mask.causal)
    return _reference(query, key, value, mask)


def _reference(q: paddle.Tensor, k: paddle.Tensor, v: paddle.Tensor, mask: IntervalMask) -> paddle.Tensor:
    """A dense softmax, grouped so that the query heads that share a key head are one matmul."""
    batch, length, heads, dim = q.shape
    groups = k.shape[2]
    repeats = heads // groups
    q = (q * dim**-0.5).reshape([batch, length, groups, repeats, dim])
    q = q.transpose([0, 2, 3, 1, 4]).reshape([batch, groups, repeats * length, dim])
    scores = paddle.matmul(q, k.transpose([0, 2, 3, 1]))
    weights = F.softmax(scores + mask.additive(groups, repeats, scores.dtype), axis=-1)
    out = paddle.matmul(weights, v.transpose([0, 2, 1, 3])) * mask.seeing(repeats, scores.dtype)
    out = out.reshape([batch, groups, repeats, length, dim]).transpose([0, 3, 1, 2, 4])
    return out.reshape([batch, length, heads, dim])
