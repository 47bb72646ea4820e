"""Expert parallelism: dispatchers bring tokens to the ranks that hold their experts, and the results back.

Shapes: T tokens of this rank, D hidden, F expert width, E experts in all, e of them here, N ranks, K experts a token,
S rows sent, R rows received. Rank r of the group holds the experts r*e .. (r+1)*e - 1. A token travels once to each
rank that holds some of its experts, with their combine weights, and comes back as their weighted sum. None is dropped.

The layer sees one call, whatever is behind it: ``y = dispatcher(x, routing, gate_up, down, shared)``. All ranks of a
group make it equally often and in the same order, with no tokens (T = 0) if need be.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import paddle
from paddle.autograd import PyLayer, PyLayerContext
from paddle.distributed.communication.group import Group

from ernie5.ops.elementwise import add
from ernie5.ops.experts import ExpertsInParts, gradient, moe_ffn
from ernie5.ops.route import Routing, permutation
from ernie5.parallel import exchange
from ernie5.parallel.exchange import InFlight, timeline

Shared = Callable[[paddle.Tensor], paddle.Tensor]


class Dispatcher(Protocol):
    """x [T,D] -> y [T,D], through the routed experts and, where given, plus ``shared`` of every token.

    gate_up [e,D,2F] and down [e,F,D] are this rank's experts; ``routing`` numbers all E of them.
    """

    def __call__(
        self,
        x: paddle.Tensor,
        routing: Routing,
        gate_up: paddle.Tensor,
        down: paddle.Tensor,
        shared: Shared | None = None,
    ) -> paddle.Tensor: ...


DISPATCHERS = ("local", "all_to_all", "all_to_all_overlapped", "deepep")


def make_dispatcher(name: str, group: Group | None = None, chunks: int = 2) -> Dispatcher:
    """The dispatcher ``name`` for the ranks of ``group``; a group of one has all experts and needs no other than local.

    ``chunks``: in how many parts ``all_to_all_overlapped`` moves the tokens of a rank.
    """
    if name not in DISPATCHERS:
        raise ValueError(f"expert dispatcher {name!r} is unknown; choose one of {', '.join(DISPATCHERS)}")
    if name == "deepep":
        from ernie5.parallel.deepep import DeepEP  # asks for a GPU and the library

        return DeepEP(group)
    if name == "local":
        if group is not None and group.nranks > 1:
            raise ValueError(
                f"expert dispatcher 'local' with {group.nranks} ranks in the expert group; it needs every expert on "
                "each rank: choose all_to_all, or an expert degree of 1"
            )
        return Local()
    if group is None or group.nranks == 1:
        return Local()
    if chunks < 1:
        raise ValueError(f"expert dispatcher {name!r} with {chunks} chunks; at least 1 is needed")
    return AllToAll(group) if name == "all_to_all" else Overlapped(group, chunks)


class Local:
    """Every expert is here."""

    def __call__(
        self,
        x: paddle.Tensor,
        routing: Routing,
        gate_up: paddle.Tensor,
        down: paddle.Tensor,
        shared: Shared | None = None,
    ) -> paddle.Tensor:
        y = moe_ffn(x, routing.weights, routing.order, routing.offsets, gate_up, down)
        return y if shared is None else add(y, shared(x))


class AllToAll:
    """Dispatch, experts, combine, one after the other: the meaning of the others, and what they are compared with."""

    def __init__(self, group: Group) -> None:
        self.group = group

    def __call__(
        self,
        x: paddle.Tensor,
        routing: Routing,
        gate_up: paddle.Tensor,
        down: paddle.Tensor,
        shared: Shared | None = None,
    ) -> paddle.Tensor:
        plan = _Plan(routing, gate_up.shape[0], self.group, chunks=0)
        (sent,), (received,) = plan.sent, plan.received
        experts = exchange.start(plan.experts, sent, received, self.group, "experts")
        sources = (There.apply(plan.to_rows, plan.to_tokens, source) for source in (routing.weights, x))
        weights, rows = (exchange.exchange(source, sent, received, self.group) for source in sources)
        rows = compute_experts(rows, weights, experts.wait(), gate_up, down)
        rows = exchange.exchange(rows, received, sent, self.group)
        y = There.apply(plan.to_tokens, plan.to_rows, rows)
        return y if shared is None else add(y, shared(x))


class Overlapped:
    """The same in parts, moved while others are computed, in both directions of the pass.

    Forward: the rows of all chunks leave at once; the shared expert is computed while the first arrives; each chunk is
    sent back as soon as it is computed, the last ones behind this rank's own tokens for its own experts. Backward the
    same, with gradients; the last ones travel behind those of the experts' weights, summed over all chunks at once. On
    the CPU threads of the group move the rows, on a GPU a stream of NCCL's.
    """

    def __init__(self, group: Group, chunks: int = 2) -> None:
        self.group, self.chunks = group, chunks

    def __call__(
        self,
        x: paddle.Tensor,
        routing: Routing,
        gate_up: paddle.Tensor,
        down: paddle.Tensor,
        shared: Shared | None = None,
    ) -> paddle.Tensor:
        plan = _Plan(routing, gate_up.shape[0], self.group, self.chunks)
        work = _Work(plan, self.group, shared, paddle.is_grad_enabled())
        return _Overlap.apply(x, routing.weights, gate_up, down, work)


# ------------------------------------------------------------------------------------------------ which row goes where


class _Plan:
    """The rows of this rank's tokens, sorted by part, then by the rank they go to, then by token.

    With ``chunks`` = 0 there is one part. Else part 0 are the tokens' rows for this rank itself, which need no
    exchange, and parts 1 .. chunks those for the others, cut by token (``chunk_of``).
    ``token`` int64 [S]: a row's token; ``slot`` int64 [T*m]: the rows of a token, by rank, S where it has fewer than
    m = min(K, N); ``experts`` int32 [S,K]: the row's experts as the rank it goes to counts them, -1 for the others;
    ``sent`` and ``received``: for each part the rows to and from every rank.
    """

    def __init__(self, routing: Routing, local: int, group: Group, chunks: int) -> None:
        ranks, experts = group.nranks, routing.experts.numpy()
        assert routing.counts.shape[0] == local * ranks, "the ranks of the group hold all experts, equally many each"
        self.tokens, top_k = experts.shape
        owner = np.where(experts < 0, -1, experts // local)
        wanted = np.zeros([ranks + 1, self.tokens], dtype=bool)  # the last row collects what is not routed
        wanted[owner, np.arange(self.tokens)[:, None]] = True
        rank, token = np.nonzero(wanted[:ranks])
        position = (np.cumsum(wanted[:ranks], axis=0) - 1)[rank, token]
        part = np.zeros_like(token)
        if chunks > 0:
            part = np.where(rank == group.rank, 0, 1 + chunk_of(token, self.tokens, chunks))
        sort = np.argsort(part, kind="stable")
        rank, token, part, position = rank[sort], token[sort], part[sort], position[sort]
        self.width = min(top_k, ranks)
        slot = np.full(self.tokens * self.width, len(token), dtype=np.int64)
        slot[token * self.width + position] = np.arange(len(token))
        here = np.where(owner[token] == rank[:, None], experts[token] - rank[:, None] * local, -1)
        self.token, self.slot = paddle.to_tensor(token.astype(np.int64)), paddle.to_tensor(slot)
        self.experts = paddle.to_tensor(here.astype(np.int32))
        sent = np.bincount(part * ranks + rank, minlength=(chunks + 1) * ranks).reshape([chunks + 1, ranks])
        self.sent: list[list[int]] = sent.tolist()
        self.received: list[list[int]] = exchange.counts(np.ascontiguousarray(sent.T), group).T.tolist()
        self.borders = np.cumsum([0, *sent.sum(1)]).tolist()

    def part(self, rows: paddle.Tensor, number: int) -> paddle.Tensor:
        return rows[self.borders[number] : self.borders[number + 1]]

    def to_rows(self, x: paddle.Tensor) -> paddle.Tensor:
        """x [T,...] -> [S,...]."""
        if not len(self.token):  # not a slice of x: a PyLayer may not return its input
            return paddle.empty([0, *x.shape[1:]], dtype=x.dtype)
        return paddle.gather(x, self.token)

    def to_tokens(self, *parts: paddle.Tensor) -> paddle.Tensor:
        """The rows [S,...] of all parts -> [T,...], the sum of each token's rows in the order of the ranks."""
        shape, dtype = parts[0].shape[1:], parts[0].dtype
        if not len(self.slot):
            return paddle.empty([0, *shape], dtype=dtype)
        picked = paddle.gather(paddle.concat([*parts, paddle.zeros([1, *shape], dtype=dtype)]), self.slot)
        return picked.reshape([self.tokens, self.width, *shape]).sum(1)


def chunk_of(token: np.ndarray, tokens: int, chunks: int) -> np.ndarray:
    """Which of the ``chunks``, counted from 0, each token is in. The first and the last are half as large.

    Nothing may be at hand to compute while the first travels there, nor while the last travels back.
    """
    return (2 * token * (chunks - 1) + tokens) // max(2 * tokens, 1)


class There(PyLayer):
    """``there(*tensors)``, a linear map; ``back`` is its transpose, the way that gradients take."""

    @staticmethod
    def forward(ctx: PyLayerContext, there: Callable, back: Callable, *tensors: paddle.Tensor):
        ctx.back = back
        return there(*tensors)

    @staticmethod
    def backward(ctx: PyLayerContext, *grads: paddle.Tensor):
        return ctx.back(*grads)


def compute_experts(
    rows: paddle.Tensor, weights: paddle.Tensor, experts: paddle.Tensor, gate_up: paddle.Tensor, down: paddle.Tensor
) -> paddle.Tensor:
    """rows [R,D] through their ``experts`` int32 [R,K] of this rank, weighed by ``weights`` [R,K]."""
    _, order, offsets = permutation(experts, gate_up.shape[0])
    return moe_ffn(rows, weights, order, offsets, gate_up, down)


# --------------------------------------------------------------------------------------------------------- overlapping


class _Shared:
    """The shared expert with a graph of its own, whose backward runs when it suits."""

    def __init__(self, function: Shared, x: paddle.Tensor, grad: bool) -> None:
        self.x = x.detach()
        self.x.stop_gradient = x.stop_gradient
        with timeline.span("compute", "shared"), paddle.set_grad_enabled(grad):
            output = function(self.x)
        self.output, self.value = (output if grad else None), output.detach()

    def backward(self, grad: paddle.Tensor) -> None:
        with timeline.span("compute", "shared"):
            if not self.output.stop_gradient:
                paddle.autograd.backward([self.output], [grad])
        self.output = None


class _Work:
    """What one call keeps from its forward for its backward."""

    def __init__(self, plan: _Plan, group: Group, shared: Shared | None, grad: bool) -> None:
        self.plan, self.group, self.shared, self.grad = plan, group, shared, grad
        self.dense: _Shared | None = None

    def dispatch(self, tensor: paddle.Tensor, part: int, label: str) -> InFlight:
        """The rows [S,...] of one part to the ranks that hold their experts."""
        plan = self.plan
        label = f"{label} {part}"
        return exchange.start(plan.part(tensor, part), plan.sent[part], plan.received[part], self.group, label)

    def combine(self, tensor: paddle.Tensor, part: int, label: str) -> InFlight:
        """The rows [R,...] that came for one part back to where they are from."""
        return exchange.start(tensor, self.plan.received[part], self.plan.sent[part], self.group, f"{label} {part}")

    @property
    def remote(self) -> range:
        return range(1, len(self.plan.sent))

    def forward(
        self, x: paddle.Tensor, weights: paddle.Tensor, gate_up: paddle.Tensor, down: paddle.Tensor
    ) -> paddle.Tensor:
        plan = self.plan
        self.experts = ExpertsInParts(gate_up, down, (not x.stop_gradient, not weights.stop_gradient), self.grad)
        sources = plan.to_rows(x), plan.to_rows(weights), plan.experts
        coming = [[self.dispatch(t, part, "dispatch") for t in reversed(sources)] for part in self.remote]
        if self.shared is not None:
            self.dense = _Shared(self.shared, x, self.grad)
        going = []
        for part, parts in zip(self.remote, coming, strict=True):
            experts, row_weights, rows = (flight.wait() for flight in parts)
            going.append(self.combine(self.compute(part, rows, row_weights, experts), part, "combine"))
        own = self.compute(0, *(plan.part(t, 0) for t in sources))
        routed = plan.to_tokens(own, *(flight.wait() for flight in going))
        return routed if self.dense is None else add(routed, self.dense.value)

    def compute(self, part: int, rows: paddle.Tensor, weights: paddle.Tensor, experts: paddle.Tensor) -> paddle.Tensor:
        with timeline.span("compute", f"experts {part}"):
            _, order, offsets = permutation(experts, self.experts.gate_up.shape[0])
            return self.experts.forward(part, rows, weights, order, offsets)

    def backward(self, grad: paddle.Tensor) -> tuple[paddle.Tensor | None, ...]:
        """Gradients of x, weights, gate_up and down, None where none is wanted."""
        plan = self.plan
        grads = plan.to_rows(grad)
        coming = [self.dispatch(grads, part, "dispatch") for part in self.remote]
        if self.dense is not None:
            self.dense.backward(grad)
        going = []
        for part, flight in zip(self.remote, coming, strict=True):
            results = self.run_backward(part, flight.wait())
            going.append([None if t is None else self.combine(t, part, "combine") for t in results])
        own = self.run_backward(0, plan.part(grads, 0))
        with timeline.span("compute", "weights"):
            gate_up, down = self.experts.weight_gradients()
        x, weights = (self.collect(*parts) for parts in zip(own, *going, strict=True))
        if x is not None and self.dense is not None:
            x = add(x, gradient(self.dense.x))
        return x, weights, gate_up, down

    def run_backward(self, part: int, grad: paddle.Tensor) -> tuple[paddle.Tensor | None, paddle.Tensor | None]:
        """Gradients of the part's rows and of their weights."""
        with timeline.span("compute", f"experts {part}"):
            return self.experts.backward(part, grad)

    def collect(self, own: paddle.Tensor | None, *others: InFlight | None) -> paddle.Tensor | None:
        return None if own is None else self.plan.to_tokens(own, *(flight.wait() for flight in others))


class _Overlap(PyLayer):
    @staticmethod
    def forward(
        ctx: PyLayerContext,
        x: paddle.Tensor,
        weights: paddle.Tensor,
        gate_up: paddle.Tensor,
        down: paddle.Tensor,
        work: _Work,
    ):
        ctx.work = work
        return work.forward(x, weights, gate_up, down)

    @staticmethod
    def backward(ctx: PyLayerContext, grad: paddle.Tensor):
        return ctx.work.backward(grad)
