"""Batches of consecutive rows, built ahead by forked processes, with a data cursor that is one number.

``dataset[i]`` is a pure function of i, so which process builds a row changes nothing and resuming needs only the next
row's number.
"""

from __future__ import annotations

import fcntl
import multiprocessing
import pickle
import signal
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from itertools import count
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

Batch = Mapping[str, np.ndarray]
_F_SETPIPE_SZ, _PIPE_BYTES = 1031, 1 << 20


class RowLoader:
    """Iterates without end over ``collate([dataset[i], ...])`` of ``rows`` rows each.

    Micro-batch k of a group of ``world`` processes is rows ``start_row + k * world * rows ...``, of which process
    ``rank`` takes its share in order. A dataset with a length is repeated. ``workers`` = 0 builds in this process.
    ``last_rows`` holds the row numbers of the batch last given out, ``cursor`` the next row of the whole group, and
    ``upcoming`` shows batches before they are given out.
    """

    def __init__(
        self,
        dataset: Any,
        collate: Callable[[list], Batch],
        rows: int,
        start_row: int = 0,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
    ) -> None:
        self.dataset, self.collate = dataset, collate
        self.rows, self.start_row, self.rank, self.world = rows, start_row, rank, world
        self.length = len(dataset) if hasattr(dataset, "__len__") else None
        self.given = 0
        self._ahead: deque[Batch] = deque()
        self.last_rows: list[int] = []
        self._processes: list[multiprocessing.process.BaseProcess] = []
        self._readers: list[Connection] = []
        for worker in range(workers):
            self._start(worker, workers)

    @property
    def cursor(self) -> int:
        return self.start_row + self.given * self.world * self.rows

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        (batch,) = self.upcoming(1)
        self._ahead.popleft()
        self.last_rows = self.rows_of(self.given)
        self.given += 1
        return batch

    def upcoming(self, count: int) -> list[Batch]:
        """The next ``count`` batches, in order; they stay to be given out."""
        while len(self._ahead) < count:
            number = self.given + len(self._ahead)
            rows = self.rows_of(number)
            self._ahead.append(self._receive(number) if self._readers else self.build(rows))
        return list(self._ahead)[:count]

    def rows_of(self, micro_batch: int) -> list[int]:
        """Row numbers of this process in the ``micro_batch``-th batch of this loader."""
        first = self.start_row + (micro_batch * self.world + self.rank) * self.rows
        return [first + i for i in range(self.rows)]

    def build(self, rows: list[int]) -> Batch:
        return self.collate([self.dataset[i if self.length is None else i % self.length] for i in rows])

    def close(self) -> None:
        for reader in self._readers:
            reader.close()
        for process in self._processes:
            process.terminate()
            process.join()
        self._readers, self._processes = [], []

    def _start(self, worker: int, workers: int) -> None:
        context = multiprocessing.get_context("fork")
        reader, writer = context.Pipe(duplex=False)
        _enlarge(writer)
        self._readers.append(reader)
        process = context.Process(target=self._work, args=(worker, workers, writer), daemon=True)
        process.start()
        writer.close()
        self._processes.append(process)

    def _work(self, worker: int, workers: int, writer: Connection) -> None:
        """Body of a loader process: builds every ``workers``-th batch until the trainer goes away."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        for reader in self._readers:  # with no reader left but the trainer's, its death breaks the pipe and ends us
            reader.close()
        try:
            for micro_batch in count(worker, workers):
                try:
                    message: tuple[str, Any] = ("batch", self.build(self.rows_of(micro_batch)))
                except Exception as error:  # noqa: BLE001 (handed over whole: the trainer raises it)
                    kind = "bad input" if isinstance(error, ValueError) else "failure"
                    message = (kind, str(error) if kind == "bad input" else traceback.format_exc())
                writer.send_bytes(pickle.dumps(message, protocol=5))
                if message[0] != "batch":
                    return
        except BrokenPipeError:
            return

    def _receive(self, micro_batch: int) -> Batch:
        worker = micro_batch % len(self._readers)
        try:
            kind, value = pickle.loads(self._readers[worker].recv_bytes())
        except EOFError:
            self._processes[worker].join()
            code = self._processes[worker].exitcode
            raise RuntimeError(
                f"loader process {worker} ended with code {code} while building rows {self.rows_of(micro_batch)}; "
                "a negative code is the signal that killed it (-9: most likely out of memory)"
            ) from None
        if kind == "bad input":
            raise ValueError(value)
        if kind == "failure":
            raise RuntimeError(f"loader process {worker} failed at rows {self.rows_of(micro_batch)}:\n{value}")
        return value


def _enlarge(writer: Connection) -> None:
    """Lets the pipe hold a whole batch, so that the next one is built while this one waits."""
    try:
        fcntl.fcntl(writer.fileno(), _F_SETPIPE_SZ, _PIPE_BYTES)
    except OSError:
        return  # a small pipe only prefetches less
