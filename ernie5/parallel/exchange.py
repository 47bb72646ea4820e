"""Rows to and from every rank of a group, in uneven numbers, zero included; blocking, in flight, or differentiable.

Shapes: N ranks of the group, S rows sent, R rows received. On a GPU this is NCCL's all-to-all, on its own stream. gloo
has none: there two threads of the group (``custom_ops/exchange``) send and receive while the caller computes, or,
without the compiled library, the reference gathers everything everywhere.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import paddle
import paddle.distributed as dist
from paddle.autograd import PyLayer, PyLayerContext
from paddle.distributed.communication.group import Group

from ernie5.ops import kernels
from ernie5.parallel.calls import calls


class Span(NamedTuple):
    """What one lane (``compute``, ``wait``, ``send`` or ``receive``) did, in ``time.monotonic_ns()``."""

    lane: str
    label: str
    began: int
    ended: int


class Timeline:
    """Keeps what ran when, while ``spans`` is a list; costs nothing otherwise."""

    def __init__(self) -> None:
        self.spans: list[Span] | None = None

    def add(self, lane: str, label: str, began: int, ended: int) -> None:
        if self.spans is not None:
            self.spans.append(Span(lane, label, began, ended))

    @contextlib.contextmanager
    def span(self, lane: str, label: str) -> Iterator[None]:
        began = time.monotonic_ns()
        yield
        self.add(lane, label, began, time.monotonic_ns())


timeline = Timeline()


@dataclass
class InFlight:
    """An exchange under way: ``rows`` [R,...] may be read after ``wait``."""

    rows: paddle.Tensor
    finish: Callable[[], None]

    def wait(self) -> paddle.Tensor:
        self.finish()
        return self.rows


def start(rows: paddle.Tensor, sent: Sequence[int], received: Sequence[int], group: Group, label: str = "") -> InFlight:
    """Begins to move rows [S,...], sorted by the rank they go to; what arrives is sorted by the rank it comes from.

    ``sent`` and ``received``: how many rows go to and come from each of the N ranks. Every rank of the group starts the
    same exchanges in the same order. ``rows`` must not change before ``wait``. ``label`` names it in the timeline.
    """
    assert sum(sent) == rows.shape[0] and len(sent) == len(received) == group.nranks
    rows = rows.detach().contiguous()
    if rows.place.is_gpu_place():
        return _start_nccl(rows, sent, received, group)
    if kernels.available("exchange_start"):
        return _start_threads(rows, sent, received, group, label)
    with timeline.span("wait", label):
        received_rows = _reference(rows, sent, received, group)
    return InFlight(received_rows, lambda: None)


def counts(sent: np.ndarray, group: Group) -> np.ndarray:
    """int64 [N,...] -> [N,...]: what every rank has at this rank's place, such as the rows it will send here."""
    each = [1] * group.nranks
    return start(paddle.to_tensor(sent), each, each, group, "counts").wait().numpy()


def exchange(rows: paddle.Tensor, sent: Sequence[int], received: Sequence[int], group: Group) -> paddle.Tensor:
    """``start`` and ``wait``, differentiable: the gradient goes the way back. rows [S,...] -> [R,...]."""
    return _Exchange.apply(rows, list(sent), list(received), group)


class _Exchange(PyLayer):
    @staticmethod
    def forward(ctx: PyLayerContext, rows: paddle.Tensor, sent: list[int], received: list[int], group: Group):
        ctx.way = sent, received, group
        return start(rows, sent, received, group, "exchange").wait()

    @staticmethod
    def backward(ctx: PyLayerContext, grad: paddle.Tensor):
        sent, received, group = ctx.way
        return start(grad, received, sent, group, "gradient").wait()


def _start_threads(
    rows: paddle.Tensor, sent: Sequence[int], received: Sequence[int], group: Group, label: str
) -> InFlight:
    call = calls.begin("exchange", group)
    arrived, ticket = kernels.call("exchange_start", [rows], [list(sent), list(received), group.id])

    def finish() -> None:
        with timeline.span("wait", label), calls.inside(call._replace(since=time.monotonic())):
            times = kernels.call("exchange_wait", [ticket])
        if timeline.spans is not None:
            _, send_began, send_ended, receive_began, receive_ended = times.tolist()
            if send_began:
                timeline.add("send", label, send_began, send_ended)
            if receive_began:
                timeline.add("receive", label, receive_began, receive_ended)

    return InFlight(arrived, finish)


def _start_nccl(rows: paddle.Tensor, sent: Sequence[int], received: Sequence[int], group: Group) -> InFlight:
    """Paddle's NCCL group sends and receives grouped on a stream of its own; waiting makes the compute stream wait."""
    arrived = paddle.empty([sum(received), *rows.shape[1:]], dtype=rows.dtype)
    task = dist.alltoall_single(arrived, rows, list(sent), list(received), group=group, sync_op=False)
    return InFlight(arrived, lambda: (task.wait(), rows)[0])  # ``rows`` lives until then


def _reference(rows: paddle.Tensor, sent: Sequence[int], received: Sequence[int], group: Group) -> paddle.Tensor:
    """Everybody gets everything, padded to the longest piece of all: N times the traffic, but only what gloo has."""
    matrix = _all_gather(paddle.to_tensor(list(sent), dtype="int64"), group)  # [from, to]
    longest = max(int(matrix.max()), 1)  # gloo gathers no empty tensors
    pieces = paddle.zeros([group.nranks, longest, *rows.shape[1:]], dtype=rows.dtype)
    begins = np.cumsum([0, *sent])
    for rank, count in enumerate(sent):
        if count:
            pieces[rank, :count] = rows[int(begins[rank]) : int(begins[rank]) + count]
    arrived = _all_gather(pieces, group)[:, group.rank]  # [from, longest, ...]
    parts = [arrived[rank, :count] for rank, count in enumerate(received) if count]
    return paddle.concat(parts) if parts else paddle.empty([0, *rows.shape[1:]], dtype=rows.dtype)


def _all_gather(tensor: paddle.Tensor, group: Group) -> paddle.Tensor:
    gathered: list[paddle.Tensor] = []
    dist.all_gather(gathered, tensor, group=group)
    return paddle.stack(gathered)
