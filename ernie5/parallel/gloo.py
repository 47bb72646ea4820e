"""The gloo completion: what Fleet asks of its groups and Paddle's CPU build does not have.

Installed by ``install`` before any group exists, only where the backend is gloo, and only for the versions of Paddle it
was tested with. It replaces names that Fleet looks up at each call; on GPUs nothing of this runs.

| gap | how it shows | what fills it |
|---|---|---|
| groups of some ranks only | "Connection refused": all groups write the same keys | a store of its own for each group |
| ``reduce_scatter`` | not implemented | sum everywhere, keep the own part |
| ``*_on_calc_stream`` | not implemented | the sum of ``_mp_allreduce`` as a plain all-reduce |
| ``c_softmax_with_cross_entropy`` | no CPU kernel | maximum, sum and label's logit, each reduced |
| gradient of ``c_embedding`` | adds to memory that nobody cleared | an ordinary lookup, masked |
| ``ParallelEnv.device_id`` | AttributeError | 0 |
| a time-out one can set | every wait ends after 30 s | ``patience`` lifts it; ``watchdog`` has one that can be set |
| between stages | messages are numbered by group, so three ranks hang; a send waits for its receiver | ``Neighbours`` |
"""

from __future__ import annotations

import os
import queue
import socket
import threading

import numpy as np
import paddle
import paddle.distributed as dist
import paddle.nn.functional as F
from paddle.autograd import PyLayer, PyLayerContext
from paddle.base import core
from paddle.distributed import collective, parallel
from paddle.distributed.communication import stream
from paddle.distributed.communication.group import Group
from paddle.distributed.fleet.layers.mpu import mp_ops

from ernie5.parallel import leaving, patience

TESTED = ("3.3.1",)
SECONDS_TO_CONNECT = 120
_stores: list[core.TCPStore] = []  # a group's store lives as long as the process
_new_process_group = collective._new_process_group_impl


def install() -> None:
    """Fills the gaps for this process. ``ValueError`` on a Paddle that nobody tried it with."""
    if paddle.__version__ not in TESTED:
        raise ValueError(
            f"Paddle {paddle.__version__}: training over gloo was tested with {', '.join(TESTED)} only; install that, "
            "or run ernie5's tests of several processes with yours and add it to ernie5.parallel.gloo.TESTED"
        )
    collective._new_process_group_impl = parallel._new_process_group_impl = _new_process_group_with_store
    stream.reduce_scatter = dist.stream.reduce_scatter = reduce_scatter
    mp_ops._mp_allreduce = _mp_allreduce
    mp_ops._c_lookup_table = _c_lookup_table
    mp_ops._c_softmax_with_cross_entropy = _c_softmax_with_cross_entropy
    dist.ParallelEnv._device_id = 0
    leaving.prepare()


def _new_process_group_with_store(
    backend: str, store: core.TCPStore, rank: int, world_size: int, group_name: str, *args: object, **kwargs: object
) -> object:
    """Gloo contexts of all groups write their addresses under the same keys: give each group a store of its own."""
    if backend == "gloo" and group_name != collective._default_group_name:
        store = _own_store(store, rank, world_size, group_name)
    made = _new_process_group(backend, store, rank, world_size, group_name, *args, **kwargs)
    if backend == "gloo":
        patience.lift(kwargs.get("group_id", 0), rank, world_size)
    return made


def _own_store(store: core.TCPStore, rank: int, world_size: int, group_name: str) -> core.TCPStore:
    key = f"ernie5/store/{group_name}"
    if rank == 0:
        host = os.environ["PADDLE_CURRENT_ENDPOINT"].rsplit(":", 1)[0]
        with socket.socket() as free:
            free.bind((host, 0))
            port = free.getsockname()[1]
        store.set(key, f"{host}:{port}")
    else:
        host, port = store.get(key).decode().rsplit(":", 1)
    own = core.TCPStore(host, int(port), rank == 0, world_size, SECONDS_TO_CONNECT)
    _stores.append(own)
    return own


def reduce_scatter(
    tensor: paddle.Tensor,
    tensor_or_tensor_list: paddle.Tensor | list[paddle.Tensor],
    op: int = dist.ReduceOp.SUM,
    group: Group | None = None,
    sync_op: bool = True,
    use_calc_stream: bool = False,
) -> None:
    """Rank r's part of the sum over all ranks, in ``tensor``."""
    group = group or collective._get_default_group()
    whole = tensor_or_tensor_list
    whole = paddle.concat(whole) if isinstance(whole, list) else whole.clone()
    whole = whole.detach()
    dist.all_reduce(whole, op=op, group=group)
    size = tensor.shape[0]
    paddle.assign(whole[group.rank * size : (group.rank + 1) * size], output=tensor)


class _SumForward(PyLayer):
    @staticmethod
    def forward(ctx: PyLayerContext, tensor: paddle.Tensor, group: Group) -> paddle.Tensor:
        total = tensor.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: PyLayerContext, grad: paddle.Tensor) -> paddle.Tensor:
        return grad


def _mp_allreduce(
    tensor: paddle.Tensor, op: int = dist.ReduceOp.SUM, group: Group | None = None, **flags: object
) -> paddle.Tensor:
    """The sum over the group, whose gradient is the same for every term."""
    assert op == dist.ReduceOp.SUM
    return _SumForward.apply(tensor, group or collective._get_default_group())


def _c_lookup_table(
    table: paddle.Tensor, index: paddle.Tensor, start_index: int = 0, vocab_size: int = -1, name: str | None = None
) -> paddle.Tensor:
    """Rows of this rank's part of the table, which begins at ``start_index``; zeros for the ids of others."""
    here = (index >= start_index) & (index < start_index + table.shape[0])
    safe = paddle.where(here, index - start_index, paddle.zeros_like(index))
    return F.embedding(safe, table) * here.unsqueeze(-1).astype(table.dtype)


class _SplitCrossEntropy(PyLayer):
    """Rows N, V/n classes here. -log softmax(logits)[label] over the classes of all ranks."""

    @staticmethod
    def forward(
        ctx: PyLayerContext, logits: paddle.Tensor, label: paddle.Tensor, group: Group, ignore_index: int
    ) -> paddle.Tensor:
        classes = logits.shape[-1]
        largest = logits.max(-1, keepdim=True)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        shifted = logits - largest
        exponents = shifted.exp()
        total = exponents.sum(-1, keepdim=True)
        dist.all_reduce(total, group=group)
        here = label - group.rank * classes
        counts = label != ignore_index
        mine = (here >= 0) & (here < classes) & counts
        safe = paddle.where(mine, here, paddle.zeros_like(here))
        chosen = paddle.take_along_axis(shifted, safe, axis=-1) * mine.astype(logits.dtype)
        dist.all_reduce(chosen, group=group)
        counted = counts.astype(logits.dtype)
        ctx.save_for_backward(exponents / total, safe, mine.astype(logits.dtype), counted)
        return (total.log() - chosen) * counted

    @staticmethod
    def backward(ctx: PyLayerContext, grad: paddle.Tensor) -> paddle.Tensor:
        probabilities, safe, mine, counted = ctx.saved_tensor()
        hot = F.one_hot(safe.squeeze(-1), probabilities.shape[-1]).astype(probabilities.dtype)
        return (probabilities - hot * mine) * (grad * counted)


def _c_softmax_with_cross_entropy(
    logits: paddle.Tensor,
    label: paddle.Tensor,
    group: Group | None = None,
    return_softmax: bool = False,
    ignore_index: int = -100,
) -> paddle.Tensor:
    """logits [N,V/n] of this rank, label [N] or [N,1] -> losses [N,1]."""
    assert not return_softmax
    label = label.unsqueeze(-1) if label.ndim < logits.ndim else label
    return _SplitCrossEntropy.apply(logits, label, group or collective._get_default_group(), ignore_index)


# ------------------------------------------------------------------ between pipeline stages

Tensors = paddle.Tensor | tuple[paddle.Tensor, ...] | None
_HEADER = 16  # count of tensors, then rank and sizes of each
_DTYPES = (paddle.float32, paddle.float64, paddle.bfloat16, paddle.float16)


class Channel:
    """Tensors from one rank to another, in order. Sending never waits: a thread of its own does."""

    def __init__(self, source: int, destination: int, group: Group) -> None:
        self.group, self.source, self.destination = group, source, destination
        self.waiting: queue.Queue | None = None

    def send(self, tensors: tuple[paddle.Tensor, ...]) -> None:
        if self.waiting is None:
            self.waiting = queue.Queue()
            threading.Thread(target=self._deliver, daemon=True).start()
        header = np.zeros(_HEADER, np.int64)
        values = [len(tensors)]
        for tensor in tensors:
            values += [_DTYPES.index(tensor.dtype), tensor.ndim, *tensor.shape]
        header[: len(values)] = values
        self.waiting.put([paddle.to_tensor(header), *(tensor.detach().clone() for tensor in tensors)])

    def _deliver(self) -> None:
        to = self.group.get_group_rank(self.destination)
        while True:
            for tensor in self.waiting.get():
                self.group.process_group.send(tensor, to, True)

    def receive(self) -> tuple[paddle.Tensor, ...]:
        header = self._one(paddle.zeros([_HEADER], "int64")).tolist()
        count, place, tensors = header[0], 1, []
        for _ in range(count):
            dtype, ndim = _DTYPES[header[place]], header[place + 1]
            tensors.append(self._one(paddle.empty(header[place + 2 : place + 2 + ndim], dtype)))
            place += 2 + ndim
        return tuple(tensors)

    def _one(self, tensor: paddle.Tensor) -> paddle.Tensor:
        self.group.process_group.recv(tensor, self.group.get_group_rank(self.source), True)
        return tensor


class Neighbours:
    """Stands in for Fleet's ``P2pHelper``: a ring of stages, with a channel for each direction of each pair."""

    def __init__(self, ring: list[list[int]], rank: int) -> None:
        """``ring``: every pipeline of the run, its ranks by stage. All ranks make the same groups in the same order."""
        for ranks in ring:
            count = len(ranks)
            for i, source in enumerate(ranks):
                for step in (1, -1):
                    destination = ranks[(i + step) % count]
                    channel = Channel(source, destination, dist.new_group(sorted([source, destination])))
                    if source == rank:
                        setattr(self, "_to_next" if step == 1 else "_to_previous", channel)
                    if destination == rank:
                        setattr(self, "_from_previous" if step == 1 else "_from_next", channel)

    def clear_meta_cache(self) -> None:
        """Shapes travel with the tensors."""

    def recv_forward(self, pp_first_stage: bool, **options: object) -> Tensors:
        return None if pp_first_stage else self._received(self._from_previous)

    def recv_backward(self, pp_last_stage: bool, **options: object) -> Tensors:
        return None if pp_last_stage else self._received(self._from_next)

    def send_forward(self, output_tensor: Tensors, pp_last_stage: bool, **options: object) -> None:
        if not pp_last_stage:
            self._send(self._to_next, output_tensor)

    def send_backward(self, input_tensor_grad: Tensors, pp_first_stage: bool, **options: object) -> None:
        if not pp_first_stage:
            self._send(self._to_previous, input_tensor_grad)

    def send_forward_recv_backward(self, output_tensor: Tensors, pp_last_stage: bool, **options: object) -> Tensors:
        self.send_forward(output_tensor, pp_last_stage)
        return self.recv_backward(pp_last_stage)

    def send_backward_recv_forward(self, input_grad: Tensors, pp_first_stage: bool, **options: object) -> Tensors:
        self.send_backward(input_grad, pp_first_stage)
        return self.recv_forward(pp_first_stage)

    def send_forward_recv_forward(self, output_tensor: Tensors, recv_prev: bool, **options: object) -> Tensors:
        self._send(self._to_next, output_tensor)
        return self._received(self._from_previous) if recv_prev else None

    def send_backward_recv_backward(self, input_tensor_grad: Tensors, recv_next: bool, **options: object) -> Tensors:
        self._send(self._to_previous, input_tensor_grad)
        return self._received(self._from_next) if recv_next else None

    def send_forward_backward_recv_forward_backward(
        self, output_tensor: Tensors, input_tensor_grad: Tensors, recv_prev: bool, recv_next: bool, **options: object
    ) -> tuple[Tensors, Tensors]:
        self._send(self._to_next, output_tensor)
        self._send(self._to_previous, input_tensor_grad)
        forward = self._received(self._from_previous) if recv_prev else None
        return forward, self._received(self._from_next) if recv_next else None

    def _send(self, channel: Channel, tensors: Tensors) -> None:
        if tensors is not None:
            channel.send(tensors if isinstance(tensors, tuple) else (tensors,))

    def _received(self, channel: Channel) -> tuple[paddle.Tensor, ...]:
        tensors = channel.receive()
        for tensor in tensors:
            tensor.stop_gradient = False
        return tensors
