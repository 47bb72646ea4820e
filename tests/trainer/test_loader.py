"""The row loader: same batches whoever builds them, cursors, errors from loader processes, no orphans."""

from __future__ import annotations

import os
import signal
import time

import numpy as np
import pytest

from ernie5.trainer.loader import RowLoader


class Squares:
    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        if i == 13:
            raise ValueError("row 13 is bad")
        if i == 23:
            raise KeyError("own bug")
        return {"x": np.full(3, i * i), "empty": np.zeros((0, 4), np.float32)}


class Finite(Squares):
    def __len__(self) -> int:
        return 5


def collate(rows: list[dict]) -> dict[str, np.ndarray]:
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("rank, world", [(0, 1), (1, 2)])
def test_batches_are_consecutive_rows_whoever_builds_them(workers: int, rank: int, world: int) -> None:
    loader = RowLoader(Squares(), collate, rows=2, start_row=0, rank=rank, world=world, workers=workers)
    try:
        for k in range(3):
            assert loader.cursor == k * 2 * world
            batch = next(loader)
            rows = [(k * world + rank) * 2, (k * world + rank) * 2 + 1]
            assert loader.last_rows == rows
            assert batch["x"][:, 0].tolist() == [i * i for i in rows]
            assert batch["empty"].shape == (2, 0, 4)
    finally:
        loader.close()


def test_a_dataset_with_a_length_is_repeated() -> None:
    loader = RowLoader(Finite(), collate, rows=2, start_row=4)
    assert next(loader)["x"][:, 0].tolist() == [16, 0]


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_input_met_in_a_loader_process_is_raised_where_the_trainer_is(workers: int) -> None:
    loader = RowLoader(Squares(), collate, rows=1, start_row=12, workers=workers)
    try:
        next(loader)
        with pytest.raises(ValueError, match="row 13 is bad"):
            next(loader)
    finally:
        loader.close()


def test_a_bug_in_a_loader_process_comes_with_its_traceback() -> None:
    loader = RowLoader(Squares(), collate, rows=1, start_row=23, workers=1)
    try:
        with pytest.raises(RuntimeError, match=r"rows \[23\](.|\n)*KeyError: 'own bug'"):
            next(loader)
    finally:
        loader.close()


def test_a_killed_loader_process_is_reported() -> None:
    loader = RowLoader(Squares(), lambda rows: time.sleep(5), rows=1, workers=1)
    try:
        os.kill(loader._processes[0].pid, signal.SIGKILL)
        with pytest.raises(RuntimeError, match="ended with code -9 while building rows"):
            next(loader)
    finally:
        loader.close()


def test_loader_processes_end_with_their_trainer() -> None:
    """A trainer that is killed outright must not leave loader processes behind."""
    reader, writer = os.pipe()
    trainer = os.fork()
    if trainer == 0:
        loader = RowLoader(Squares(), collate, rows=1, start_row=100, workers=2)
        next(loader)
        os.write(writer, " ".join(str(process.pid) for process in loader._processes).encode())
        time.sleep(60)
        os._exit(0)
    workers = [int(word) for word in os.read(reader, 100).split()]
    os.kill(trainer, signal.SIGKILL)
    os.waitpid(trainer, 0)
    deadline = time.time() + 10
    while any(_alive(pid) for pid in workers) and time.time() < deadline:
        time.sleep(0.05)
    orphans = [pid for pid in workers if _alive(pid)]
    for pid in orphans:
        os.kill(pid, signal.SIGKILL)
    assert not orphans


def _alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
