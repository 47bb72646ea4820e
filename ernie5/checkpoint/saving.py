"""``Saver``: every process writes its share of a checkpoint, in the background; the first one completes it.

1. The processes tell each other which parts they hold (names and sizes only) and choose one writer for each part, so
   that all write about the same. No tensor travels.
2. Each copies its share out of the way of training, and writes it in a thread: files of at most ``FILE_BYTES``, their
   hashes, and at last a receipt.
3. The first process waits for all receipts, writes the manifest and gives the folder its name.

The folder must be the same for all processes: a shared file system where they are on several hosts.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from ernie5.checkpoint.part import Part
from ernie5.checkpoint.processes import Processes
from ernie5.checkpoint.run import MANIFEST, checkpoints_dir, remove_folder, remove_old, remove_partial

FORMAT_VERSION = 2
FILE_BYTES = 1 << 30
POLL_SECONDS, PATIENCE_SECONDS = 0.02, 1800.0  # between looks for receipts; without a new file from any process


@dataclass(frozen=True)
class Held:
    """A tensor of this process; ``read()`` copies it. Of its copies one of the highest ``precedence`` is saved."""

    read: Callable[[], np.ndarray]
    part: Part
    bytes: int
    precedence: int = 0


Tensors = Mapping[str, Mapping[str, Held]]  # file group ("model", "optimizer") -> global name -> what is here
_Key = tuple[str, str, Part]


class Saver:
    """Saves into ``run_dir``; keeps the ``keep`` newest checkpoints (0 = all). Make one on every process.

    ``background=False`` returns from ``save`` when the checkpoint is complete. ``announce(name, seconds)`` is called on
    the first process, from the writing thread, for every checkpoint that is complete. Raises ``ValueError`` if the
    processes do not see the same folder.
    """

    def __init__(
        self,
        run_dir: Path,
        processes: Processes,
        keep: int = 0,
        background: bool = True,
        announce: Callable[[str, float], None] = lambda name, seconds: None,
    ) -> None:
        self.run_dir, self.processes, self.keep = run_dir, processes, keep
        self.background, self.announce = background, announce
        self._thread: threading.Thread | None = None
        self._problem = ""
        if processes.first:
            remove_partial(run_dir)
        self._check_shared()

    def save(
        self, step: int, tensors: Tensors, own: str, shared: Mapping[str, str], files: Mapping[Path, int] | None = None
    ) -> None:
        """Starts the checkpoint ``step-N``; every process calls it. Raises ``ValueError`` if the one before failed.

        Parts are copied before this returns.

        ``own``: text of this process. Of the first process: ``shared``, file name -> text, and ``files``, path -> how
        many of its bytes belong to the checkpoint.
        """
        self.finish()
        started = time.perf_counter()
        held = {(group, name, h.part): h for group, names in tensors.items() for name, h in names.items()}
        told = self.processes.gather(
            (secrets.token_hex(4), {key: (h.bytes, h.precedence) for key, h in held.items()}),
        )
        mine = _assign([entries for _, entries in told], self.processes.rank)
        folder = checkpoints_dir(self.run_dir) / f".step-{step}.{told[0][0]}.partial"
        job = _Job(folder, self.processes, [(key, held[key].read()) for key in mine], own, dict(shared))
        job.files = dict(files or {}) if self.processes.first else {}
        self._thread = threading.Thread(target=self._run, args=(job, step, started), name="checkpoint", daemon=True)
        self._thread.start()
        if not self.background:
            self.finish()

    def finish(self) -> None:
        """Waits for the checkpoint under way; every process calls it. ``ValueError`` if it could not be written."""
        self.wait()
        problem, self._problem = self._problem, ""
        self.processes.agree(problem)

    def wait(self) -> None:
        """Waits for what this process writes, without the others."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _run(self, job: _Job, step: int, started: float) -> None:
        name = f"step-{step}"
        try:
            job.write()
            if self.processes.first:
                complete(job, checkpoints_dir(self.run_dir) / name, step)
                self.announce(name, time.perf_counter() - started)
                remove_old(self.run_dir, self.keep)
        except Exception as error:  # noqa: BLE001 (raised in the main thread, by ``finish``)
            self._problem = f"checkpoint {name} is not written: {error}; mend that, then resume"

    def _check_shared(self) -> None:
        """The first process leaves a mark that all must see."""
        folder = checkpoints_dir(self.run_dir)
        mark = folder / f".shared.{self.processes.gather(secrets.token_hex(4))[0]}"
        if self.processes.first:
            folder.mkdir(parents=True, exist_ok=True)
            mark.touch()
        self.processes.gather(None)
        seen = mark.exists()
        problem = f"rank {self.processes.rank} of {self.processes.count} on {os.uname().nodename} does not see what "
        problem += f"rank 0 writes to {folder}; let run.dir be on a file system that all hosts share"
        try:
            self.processes.agree("" if seen else problem)
        finally:
            if self.processes.first:
                mark.unlink(missing_ok=True)


def _assign(told: list[Mapping[_Key, tuple[int, int]]], rank: int) -> list[_Key]:
    """The parts that ``rank`` writes, given what each rank holds: the same on every rank, and even by bytes."""
    holders: dict[_Key, list[int]] = defaultdict(list)
    best: dict[_Key, tuple[int, int]] = {}
    for number, entries in enumerate(told):
        for key, entry in entries.items():
            if entry[1] > best.get(key, entry)[1]:
                holders[key].clear()
            if entry[1] >= best.get(key, entry)[1]:
                best[key] = entry
                holders[key].append(number)
    load, mine = [0] * len(told), []
    for key in sorted(best, key=lambda key: (-best[key][0], key[0], key[1], key[2].ranges)):
        writer = min(holders[key], key=lambda number: load[number])
        load[writer] += best[key][0]
        if writer == rank:
            mine.append(key)
    return sorted(mine, key=lambda key: (key[0], key[1]))


@dataclass
class _Job:
    """What one process writes of one checkpoint."""

    folder: Path
    processes: Processes
    arrays: list[tuple[_Key, np.ndarray]]
    own: str
    shared: dict[str, str]
    files: dict[Path, int] = field(default_factory=dict)

    def write(self) -> None:
        """The files, then the receipt; if that fails, a receipt that says why."""
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            receipt = self._files()
        except Exception as error:  # noqa: BLE001 (whatever it is, the first process must not wait)
            problem = f"rank {self.processes.rank} on {os.uname().nodename}: {error}"
            self._receipt({"problem": problem})
            raise ValueError(problem) from None
        self._receipt(receipt)

    def _files(self) -> dict[str, Any]:
        rank, files, tensors = self.processes.rank, {}, defaultdict(dict)
        numbers = defaultdict(count)
        for group, chunk in self._chunks():
            path = self.folder / f"{group}-{rank:05d}-{next(numbers[group]):03d}.safetensors"
            save_file({key[1]: np.ascontiguousarray(array) for key, array in chunk}, path, metadata={"format": "np"})
            files[path.name] = describe(path)
            for (_, name, part), array in chunk:
                tensors[group][name] = {**asdict(part), "dtype": str(array.dtype), "file": path.name}
        texts = {f"own-{rank:05d}.json": self.own, **(self.shared if rank == 0 else {})}
        for name, text in texts.items():
            path = self.folder / name
            path.write_text(text, encoding="utf-8")
            files[name] = describe(path)
        for source, length in self.files.items():
            path = self.folder / source.name
            with source.open("rb") as reader, path.open("wb") as writer:
                writer.write(reader.read(length))
            files[path.name] = describe(path)
        return {"files": files, "tensors": tensors}

    def _chunks(self) -> list[tuple[str, list[tuple[_Key, np.ndarray]]]]:
        """(group, tensors) of every file."""
        chunks: list[tuple[str, list]] = []
        size = 0
        for key, array in self.arrays:
            if not chunks or chunks[-1][0] != key[0] or size + array.nbytes > FILE_BYTES:
                chunks.append((key[0], []))
                size = 0
            chunks[-1][1].append((key, array))
            size += array.nbytes
        return chunks

    def _receipt(self, content: dict[str, Any]) -> None:
        path = self.folder / f"receipt-{self.processes.rank:05d}.json"
        unfinished = path.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(content), encoding="utf-8")
        os.replace(unfinished, path)


def describe(path: Path) -> dict[str, Any]:
    """Size and hash of a file, once it is on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def complete(job: _Job, target: Path, step: int) -> None:
    """Waits for every receipt, writes the manifest and gives the folder its name."""
    receipts = _await_receipts(job)
    manifest: dict[str, Any] = {"format_version": FORMAT_VERSION, "step": step, "ranks": job.processes.count}
    files, tensors = {}, defaultdict(lambda: defaultdict(list))
    for receipt in receipts:
        files |= receipt["files"]
        for group, names in receipt["tensors"].items():
            for name, entry in names.items():
                tensors[group][name].append(entry)
    text = json.dumps({**manifest, "files": files, "tensors": tensors})
    (job.folder / MANIFEST).write_text(text, encoding="utf-8")
    for receipt in job.folder.glob("receipt-*"):
        receipt.unlink()
    describe(job.folder / MANIFEST)
    _sync_folder(job.folder)
    if target.exists():
        remove_folder(target)
    os.replace(job.folder, target)
    _sync_folder(target.parent)


def _await_receipts(job: _Job) -> list[dict[str, Any]]:
    paths = [job.folder / f"receipt-{rank:05d}.json" for rank in range(job.processes.count)]
    seen, patience = 0, time.monotonic() + PATIENCE_SECONDS
    while missing := [path for path in paths if not path.exists()]:
        found = len(os.listdir(job.folder))
        if found != seen:
            seen, patience = found, time.monotonic() + PATIENCE_SECONDS
        if time.monotonic() > patience:
            raise ValueError(f"{missing[0].stem} is not there, and nothing new came for {PATIENCE_SECONDS:.0f} s")
        time.sleep(POLL_SECONDS)
    receipts = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    for receipt in receipts:
        if "problem" in receipt:
            raise ValueError(receipt["problem"])
    return receipts


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
