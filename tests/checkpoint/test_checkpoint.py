"""Saving in parts and reading any other split of them, with threads in place of processes."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from ernie5.checkpoint import ALONE, Checkpoint, Held, Part, Processes, Saver, saving, step_checkpoints
from ernie5.checkpoint.export import export_weights
from ernie5.parallel.plan import Kind, part_of

KINDS = {
    "embedding": (Kind.VOCAB, (24, 5)),
    "column": (Kind.COLUMN, (3, 12)),
    "gated": (Kind.GATED_COLUMN, (3, 24)),
    "row": (Kind.ROW, (12, 7)),
    "experts": (Kind.EXPERT, (12, 2, 3)),
    "norm": (Kind.REPLICATE, (5,)),
    "scalar": (Kind.REPLICATE, ()),
}


def whole(name: str) -> np.ndarray:
    shape = KINDS[name][1]
    return np.asarray(np.random.default_rng(len(name)).standard_normal(shape))


def together(count: int, action: Callable[[Processes], Any]) -> list[Any]:
    """What ``action`` returns, or the ValueError it raises, in each of ``count`` threads that gather among them."""
    barrier, board, found = threading.Barrier(count, timeout=30), [None] * count, [None] * count

    def run(rank: int) -> None:
        def gather(value: Any) -> list[Any]:
            board[rank] = value
            barrier.wait()
            values = list(board)
            barrier.wait()
            return values

        try:
            found[rank] = action(Processes(rank, count, gather))
        except ValueError as error:
            found[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def held(parts: int, rank: int) -> dict[str, Held]:
    """Everything, each tensor in ``parts`` parts, of which rank r has part r % parts."""
    found = {}
    for name, (kind, shape) in KINDS.items():
        part = part_of(kind, shape, rank % parts, parts)
        value = part.of(whole(name))
        found[name] = Held(value.copy, part, value.nbytes)
    return found


def save(run_dir: Path, processes: Processes, parts: int, step: int = 1, **options: object) -> None:
    saver = Saver(run_dir, processes, **options)
    saver.save(step, {"model": held(parts, processes.rank)}, f"rank {processes.rank}", {"config.json": "{}"})
    saver.finish()


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("saved", [1, 2, 4])
@pytest.mark.parametrize("wanted", [1, 2, 3, 4])
def test_every_split_is_read_from_every_other(tmp_path, count, saved, wanted) -> None:
    assert together(count, lambda p: save(tmp_path, p, min(saved, count))) == [None] * count
    with Checkpoint(tmp_path / "checkpoints" / "step-1") as checkpoint:
        checkpoint.verify(ALONE)
        for name, (kind, shape) in KINDS.items():
            for number in range(wanted):
                part = part_of(kind, shape, number, wanted)
                np.testing.assert_array_equal(checkpoint.read("model", name, part), part.of(whole(name)))
        assert checkpoint.text(f"own-{count - 1:05d}.json") == f"rank {count - 1}"


def test_each_part_is_written_once_and_the_writers_share_the_bytes(tmp_path) -> None:
    together(4, lambda p: save(tmp_path, p, 2))
    folder = tmp_path / "checkpoints" / "step-1"
    entries = json.loads((folder / "manifest.json").read_text())["tensors"]["model"]
    assert {name: len(parts) for name, parts in entries.items()} == {
        name: 1 if kind is Kind.REPLICATE else 2 for name, (kind, _) in KINDS.items()
    }
    sizes = [sum(array.nbytes for array in load_file(path).values()) for path in folder.glob("*.safetensors")]
    assert len(sizes) == 4 and max(sizes) < 2 * min(sizes)


def test_of_two_copies_the_master_is_saved(tmp_path) -> None:
    def action(processes: Processes) -> None:
        saver = Saver(tmp_path, processes, background=False)
        mine = np.full(3, processes.rank, np.float32)
        saver.save(1, {"model": {"w": Held(mine.copy, Part((3,)), 12, processes.rank == 2)}}, "", {})

    together(4, action)
    assert Checkpoint(tmp_path / "checkpoints" / "step-1").read("model", "w", Part((3,))).tolist() == [2, 2, 2]


def test_large_tensors_go_to_several_files_and_come_back(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(saving, "FILE_BYTES", 500)
    together(2, lambda p: save(tmp_path, p, 2))
    checkpoint = Checkpoint(tmp_path / "checkpoints" / "step-1")
    assert len(list(checkpoint.folder.glob("*.safetensors"))) > 4
    np.testing.assert_array_equal(checkpoint.read("model", "row", Part((12, 7))), whole("row"))


@pytest.mark.parametrize("shard_bytes", [1 << 20, 700])
def test_exported_weights_are_whole_in_the_usual_files(tmp_path, shard_bytes) -> None:
    together(2, lambda p: save(tmp_path, p, 2))

    def export(processes: Processes) -> None:
        with Checkpoint(tmp_path / "checkpoints" / "step-1") as checkpoint:
            export_weights(checkpoint, tmp_path / "final", processes, shard_bytes)

    assert together(2, export) == [None, None]
    index = tmp_path / "final" / "model.safetensors.index.json"
    found = {}
    for path in (tmp_path / "final").glob("*.safetensors"):
        found |= load_file(path)
    assert found.keys() == KINDS.keys()
    for name, value in found.items():
        np.testing.assert_array_equal(value, whole(name))
    assert index.exists() == (shard_bytes == 700)
    assert not index.exists() or json.loads(index.read_text())["weight_map"].keys() == KINDS.keys()


def test_what_one_process_cannot_write_leaves_no_checkpoint_and_is_everybodys_error(tmp_path, monkeypatch) -> None:
    def full(tensors: dict, path: Path, **rest: object) -> None:
        raise OSError(28, "No space left on device")

    together(2, lambda p: save(tmp_path, p, 2))
    monkeypatch.setattr(saving, "save_file", full)
    found = together(2, lambda p: save(tmp_path, p, 2, step=2))
    assert [str(error) for error in found] == [str(found[0])] * 2
    assert "checkpoint step-2 is not written: rank " in str(found[0]) and "No space left on device" in str(found[0])
    assert [path.name for path in step_checkpoints(tmp_path)] == ["step-1"]


def test_a_process_that_dies_while_saving_leaves_no_checkpoint(tmp_path, monkeypatch) -> None:
    """The first process waits for a receipt that never comes."""
    monkeypatch.setattr(saving, "PATIENCE_SECONDS", 0.2)
    write = saving._Job.write
    monkeypatch.setattr(saving._Job, "write", lambda job: write(job) if job.processes.rank == 0 else None)
    found = together(2, lambda p: save(tmp_path, p, 2))
    assert "receipt-00001 is not there, and nothing new came" in str(found[1])
    assert step_checkpoints(tmp_path) == []
    monkeypatch.undo()
    together(2, lambda p: save(tmp_path, p, 2))  # what was left half-written does not disturb the next attempt
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-1"]


def test_processes_that_see_another_folder_are_refused(tmp_path) -> None:
    found = together(2, lambda p: Saver(tmp_path / str(p.rank), p))
    assert all("rank 1 of 2 on" in str(error) and "does not see" in str(error) for error in found)


def test_the_newest_are_kept_and_training_does_not_wait(tmp_path) -> None:
    names = []
    saver = Saver(tmp_path, ALONE, keep=2, announce=lambda name, seconds: names.append(name))
    value = np.zeros(4)
    for step in (1, 2, 3):
        saver.save(step, {"model": {"w": Held(value.copy, Part((4,)), 32)}}, "", {})
        value += 1  # training goes on while the thread writes
    saver.finish()
    assert names == ["step-1", "step-2", "step-3"]
    assert [path.name for path in step_checkpoints(tmp_path)] == ["step-2", "step-3"]
    assert Checkpoint(tmp_path / "checkpoints" / "step-3").read("model", "w", Part((4,))).tolist() == [2] * 4


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda m: m["tensors"]["model"]["row"].pop(), "'row' is not whole"),
        (lambda m: m.update(format_version=1), "format_version 1, expected 2"),
    ],
)
def test_a_manifest_that_lacks_something_is_refused(tmp_path, damage, message) -> None:
    together(2, lambda p: save(tmp_path, p, 2))
    path = tmp_path / "checkpoints" / "step-1" / "manifest.json"
    manifest = json.loads(path.read_text())
    damage(manifest)
    path.write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=message):
        Checkpoint(path.parent).read("model", "row", Part((12, 7)))
