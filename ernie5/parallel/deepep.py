"""The dispatcher over DeepEP's kernels, as Paddle ships them for NVIDIA GPUs. Nobody has run this one yet.

Shapes: T tokens, D hidden, K experts per token, R rows received. DeepEP moves bfloat16 rows, once to each rank that
holds some of a token's experts, and adds up what comes back. Its interface: Paddle 3.3,
``paddle/distributed/communication/deep_ep/buffer.py``, after https://github.com/deepseek-ai/DeepEP.
"""

from __future__ import annotations

from typing import Any

import paddle
from paddle.distributed.communication.group import Group

from ernie5.ops.elementwise import add
from ernie5.ops.route import Routing
from ernie5.parallel.dispatch import Shared, There, compute_experts

INSTEAD = "choose all_to_all_overlapped, or all_to_all"


class DeepEP:
    """Dispatch and combine by DeepEP; see ``Dispatcher`` for the call."""

    def __init__(self, group: Group | None) -> None:
        if not paddle.device.get_device().startswith("gpu"):
            raise ValueError(f"expert dispatcher 'deepep' needs a GPU, and this run is on the CPU; {INSTEAD}")
        try:
            from paddle.distributed.communication import deep_ep
        except ImportError as error:
            raise ValueError(f"expert dispatcher 'deepep': this Paddle has no DeepEP ({error}); {INSTEAD}") from None
        self.group, self.library, self.buffer = group, deep_ep, None

    def __call__(
        self,
        x: paddle.Tensor,
        routing: Routing,
        gate_up: paddle.Tensor,
        down: paddle.Tensor,
        shared: Shared | None = None,
    ) -> paddle.Tensor:
        if x.dtype != paddle.bfloat16:
            raise ValueError(f"expert dispatcher 'deepep' moves bfloat16, and the tokens are {x.dtype}; {INSTEAD}")
        trip = _Trip(self._buffer(x.shape[1]), routing)
        rows, weights = There.apply(trip.there, trip.back, x, routing.weights)
        rows = compute_experts(rows, weights, trip.experts, gate_up, down)
        y = There.apply(trip.back, trip.there_again, rows)
        return y if shared is None else add(y, shared(x))

    def _buffer(self, hidden: int) -> Any:
        """DeepEP's memory for rows of ``hidden`` bfloat16, made at the first call."""
        if self.buffer is None:
            buffer, ranks = self.library.Buffer, self.group.nranks
            configs = buffer.get_dispatch_config(ranks), buffer.get_combine_config(ranks)
            near = max(config.get_nvl_buffer_size_hint(2 * hidden, ranks) for config in configs)
            far = max(config.get_rdma_buffer_size_hint(2 * hidden, ranks) for config in configs)
            self.buffer = buffer(self.group, near, far)
        return self.buffer


class _Trip:
    """Where the rows of one call went: ``handle`` leads them back, ``experts`` int32 [R,K] are theirs here, or -1."""

    def __init__(self, buffer: Any, routing: Routing) -> None:
        self.buffer, self.total = buffer, routing.counts.shape[0]
        self.chosen = routing.experts.astype("int64")
        self.handle: tuple | None = None
        self.experts: paddle.Tensor | None = None

    def there(self, x: paddle.Tensor, weights: paddle.Tensor) -> tuple[paddle.Tensor, paddle.Tensor]:
        per_rank, per_node, per_expert, in_rank, _ = self.buffer.get_dispatch_layout(self.chosen, self.total)
        rows, experts, row_weights, _, self.handle, _ = self.buffer.dispatch(
            x,
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_node,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
            topk_idx=self.chosen,
            topk_weights=weights.astype("float32"),
        )
        self.experts = experts.astype("int32")
        return rows, row_weights

    def there_again(self, x: paddle.Tensor) -> paddle.Tensor:
        return self.buffer.dispatch(x, handle=self.handle)[0]

    def back(
        self, rows: paddle.Tensor, weights: paddle.Tensor | None = None
    ) -> paddle.Tensor | tuple[paddle.Tensor, paddle.Tensor]:
        """The rows' sum by token, and where ``weights`` are given theirs."""
        sums = self.buffer.combine(rows.contiguous(), self.handle, topk_weights=weights)
        return sums[0] if weights is None else sums[:2]
