"""What this machine can do at best, measured in the same run: the fp32 matrix product, and the memory.

The product is oneDNN's, from Paddle's own wheel (the fastest library here); memory is read and copied by glibc.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import common, peers, worker

PRODUCTS = ((512, 512, 512), (1024, 1024, 1024), (2048, 512, 1024), (2048, 2048, 2048), (8192, 256, 512))
MEGABYTES = 512  # of each array that is copied: more than the last-level cache of a server processor
REPEATS = 5


class Machine(worker.Contender):
    """Rates of the machine with ``threads`` threads; the best of what is tried."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.pool = ThreadPoolExecutor(threads)
        self.sgemm = _library().dnnl_sgemm
        rng = np.random.default_rng(0)
        self.operands = [
            [rng.standard_normal(shape, np.float32) for shape in ((m, k), (k, n), (m, n))] for m, n, k in PRODUCTS
        ]
        self.source = np.full(MEGABYTES << 20, 7, np.uint8)
        self.target = np.full_like(self.source, 8)

    def rates(self) -> dict[str, float]:
        """``sgemm`` in FLOP/s; ``copy`` (bytes read + written) and ``read`` in bytes/s."""
        product = max(self._product(*operands) for operands in self.operands)
        size = self.source.nbytes
        copied = 2 * size / _fastest(lambda: self._split(self._copy))
        return {"sgemm": product, "copy": copied, "read": size / _fastest(lambda: self._split(self._scan))}

    def step(self) -> None:
        self._product(*self.operands[0])

    def _product(self, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> float:
        (m, k), n = a.shape, b.shape[1]
        sizes = [ctypes.c_int64(size) for size in (m, n, k)]
        pointers = [array.ctypes.data_as(ctypes.c_void_p) for array in (a, b, c)]
        one, zero = ctypes.c_float(1), ctypes.c_float(0)
        letter = ctypes.c_char(b"N")

        def run() -> None:
            self.sgemm(
                letter, letter, *sizes, one, pointers[0], sizes[2], pointers[1], sizes[1], zero, pointers[2], sizes[1]
            )

        return 2 * m * n * k / _fastest(run)

    def _split(self, action: Callable[[int, int], Any]) -> None:
        """``action(start, size)`` on an equal part of the arrays in every thread."""
        part = self.source.nbytes // self.threads
        list(self.pool.map(action, range(0, part * self.threads, part), [part] * self.threads))

    def _copy(self, start: int, size: int) -> None:
        ctypes.memmove(self.target.ctypes.data + start, self.source.ctypes.data + start, size)

    def _scan(self, start: int, size: int) -> None:
        """Reads every byte: memchr for a value that is not there."""
        _libc().memchr(ctypes.c_void_p(self.source.ctypes.data + start), 1, ctypes.c_size_t(size))


def _fastest(run: Callable[[], None]) -> float:
    run()
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def _library() -> ctypes.CDLL:
    spec = importlib.util.find_spec("paddle")
    return ctypes.CDLL(str(Path(next(iter(spec.submodule_search_locations))) / "libs" / "libdnnl.so.3"))


def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None)
    libc.memchr.restype = ctypes.c_void_p
    return libc


def measure(options: argparse.Namespace) -> dict[str, float]:
    """The machine's rates, measured in a process of their own; the best of three tries."""
    contender = common.Contender("machine", peers.OURS, Machine, {"threads": options.threads})
    with common.Field([contender], options) as field:
        tries = [field.workers["machine"].call("rates") for _ in range(3)]
    return {name: max(rates[name] for rates in tries) for name in tries[0]}


def rows(rates: dict[str, float]) -> list[tuple[str, str]]:
    """For a report's table."""
    return [
        ("fp32 product (oneDNN)", f"{rates['sgemm'] / 1e9:.0f} GFLOP/s"),
        ("memory copy, read + written", f"{rates['copy'] / 1e9:.1f} GB/s"),
        ("memory read", f"{rates['read'] / 1e9:.1f} GB/s"),
    ]
