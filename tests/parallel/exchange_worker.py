"""One rank of tests/parallel/test_exchange.py: ``python exchange_worker.py (rows | silent)``."""

from __future__ import annotations

import os
import sys
import time

import numpy as np
import paddle
import paddle.distributed as dist

from ernie5.ops import kernels
from ernie5.parallel import exchange, leaving

DTYPES = ("float32", "float64", "bfloat16", "int32", "int64")
WIDTHS = ([], [3], [2, 5])


def counts(kind: str, ranks: int) -> np.ndarray:
    """[from, to]: how many rows go where."""
    if kind == "uneven":
        return np.arange(ranks * ranks).reshape([ranks, ranks]) * 7 % 5
    if kind == "all to the last":
        return np.stack([np.eye(ranks, dtype=np.int64)[-1] * (rank + 1) for rank in range(ranks)])
    return np.zeros([ranks, ranks], np.int64)


def rows_of(source: int, target: int, count: int, width: list[int]) -> np.ndarray:
    """What goes from one rank to another: numbers that every type holds, and that say where they belong."""
    size = int(np.prod(width))
    return (np.arange(count * size) % 3 + 8 * source + 32 * target).reshape([count, *width])


def check_many_in_flight() -> None:
    """More exchanges at once than threads, of every kind, waited for from the last to the first."""
    group = dist.collective._get_default_group()
    rank, ranks = group.rank, group.nranks
    flights = []
    for number in range(40):
        matrix = counts(("uneven", "all to the last", "none")[number % 3], ranks) * (1 + 300 * (number % 2))
        sent, received = matrix[rank].tolist(), matrix[:, rank].tolist()
        rows = paddle.full([sum(sent), 64], 100.0 * number + rank)
        expected = np.repeat(100.0 * number + np.arange(ranks), received)
        flights.append((exchange.start(rows, sent, received, group), expected))
    for flight, expected in reversed(flights):
        assert np.array_equal(flight.wait().numpy(), np.repeat(expected[:, None], 64, axis=1))


def check_rows() -> None:
    check_many_in_flight()
    group = dist.collective._get_default_group()
    rank, ranks = group.rank, group.nranks
    for kind in ("uneven", "all to the last", "none"):
        matrix = counts(kind, ranks)
        sent, received = matrix[rank].tolist(), matrix[:, rank].tolist()
        assert np.array_equal(exchange.counts(matrix[rank].reshape([ranks, 1]), group)[:, 0], received)
        for width in WIDTHS:
            going = np.concatenate([rows_of(rank, to, sent[to], width) for to in range(ranks)])
            coming = np.concatenate([rows_of(source, rank, received[source], width) for source in range(ranks)])
            for dtype in DTYPES:
                rows = paddle.to_tensor(going).astype(dtype)
                first = exchange.start(rows, sent, received, group)
                second = exchange.start(rows + 1, sent, received, group)  # two in flight, waited for in any order
                assert np.array_equal(second.wait().astype("float64").numpy(), coming + 1), (kind, width, dtype)
                assert np.array_equal(first.wait().astype("float64").numpy(), coming), (kind, width, dtype)
            leaf = paddle.to_tensor(going.astype(np.float64), stop_gradient=False)
            scaled = exchange.exchange(leaf, sent, received, group) * (rank + 1)
            scaled.sum().backward()
            factor = np.concatenate([np.full([sent[to], *width], to + 1.0) for to in range(ranks)])
            assert np.array_equal(leaf.grad.numpy(), factor), (kind, width, "gradient")
    dist.barrier(group)  # the group's own collectives still find each other
    print("compiled" if kernels.available("exchange_start") else "reference")


def check_silence() -> None:
    """Rank 1 ends before it sends what rank 0 waits for."""
    group = dist.collective._get_default_group()
    exchange.counts(np.ones([2, 1], np.int64), group)
    if group.rank == 1:
        time.sleep(0.5)
        os._exit(0)
    began = time.monotonic()
    try:
        exchange.start(paddle.zeros([0, 2]), [0, 0], [0, 3], group).wait()
    except (OSError, RuntimeError) as error:
        text = " ".join(str(error).split())
        assert "receiving from rank 1 of the group" in text, text
        print(f"told after {time.monotonic() - began:.0f} s")
        os._exit(0)
    raise AssertionError("an exchange with a rank that is gone came to an end")


if __name__ == "__main__":
    paddle.set_device("cpu")
    leaving.prepare()
    dist.init_parallel_env()
    {"rows": check_rows, "silent": check_silence}[sys.argv[1]]()
