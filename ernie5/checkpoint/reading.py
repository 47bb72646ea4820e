"""``Checkpoint``: reading any part of any tensor, whoever wrote it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from ernie5.checkpoint.part import Part
from ernie5.checkpoint.processes import Processes
from ernie5.checkpoint.run import MANIFEST
from ernie5.checkpoint.saving import FORMAT_VERSION
from ernie5.files import read_versioned_json

REMEDY = "resume from another checkpoint, or start afresh in another run.dir"


class Checkpoint:
    """The complete checkpoint in ``folder``; a context manager, which closes its files.

    Raises ``ValueError`` in one line, here and later, for whatever is missing, unreadable or not as the manifest says.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = read_versioned_json(folder / MANIFEST, FORMAT_VERSION, "complete checkpoint", REMEDY)
        self.step, self.ranks = self.manifest["step"], self.manifest["ranks"]
        self._files: dict[str, safe_open] = {}
        self._open = ExitStack()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()
        self._files.clear()

    def shapes(self, group: str) -> dict[str, tuple[int, ...]]:
        """Name -> shape of the whole tensor."""
        tensors = self.manifest["tensors"].get(group, {})
        return {name: tuple(entries[0]["shape"]) for name, entries in tensors.items()}

    def text(self, name: str) -> str:
        """One of the checkpoint's text files."""
        try:
            return (self.folder / name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{self.folder / name}: unreadable ({error}); {REMEDY}") from None

    def verify(self, processes: Processes) -> None:
        """Compares every file with its size and hash in the manifest, each on one of the processes."""
        names = sorted(self.manifest["files"])[processes.rank :: processes.count]
        processes.agree(next(filter(None, map(self._fault, names)), ""))

    def _fault(self, name: str) -> str:
        path, expected = self.folder / name, self.manifest["files"][name]
        try:
            size = path.stat().st_size
            if size != expected["bytes"]:
                return f"{path}: {size} bytes, the manifest says {expected['bytes']}; {REMEDY}"
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != expected["sha256"]:
                    return f"{path}: its contents have changed since it was written; {REMEDY}"
        except OSError as error:
            return f"{path}: unreadable ({error}); {REMEDY}"
        return ""

    def check_names(self, group: str, expected: Mapping[str, Iterable[int]]) -> None:
        """``ValueError`` names the first tensor missing, extra or of another shape than ``expected``."""
        saved, refusal = self.shapes(group), f"{self.folder} is a checkpoint of another shape"
        remedy = "use the configuration it was trained with, or start afresh in another run.dir"
        for name, shape in expected.items():
            if name not in saved:
                raise ValueError(f"{refusal}: '{name}' {list(shape)} of the model is not in it; {remedy}")
            if list(saved[name]) != list(shape):
                found = list(saved[name])
                raise ValueError(f"{refusal}: '{name}' is {found}, the model expects {list(shape)}; {remedy}")
        for name in saved:
            if name not in expected:
                raise ValueError(f"{refusal}: the model has no '{name}'; {remedy}")

    def read(self, group: str, name: str, part: Part) -> np.ndarray:
        """``part`` of a tensor, put together from the parts that were saved."""
        entries = self.manifest["tensors"][group][name]
        stored = [(entry["file"], _part(entry)) for entry in entries]
        if not part.ranges and not stored[0][1].ranges:
            return self._opened(stored[0][0]).get_tensor(name)
        axis = part.axis if part.ranges else stored[0][1].axis
        wanted, here = part.along(axis), (slice(None),) * axis
        out, filled = np.empty(wanted.local_shape, entries[0]["dtype"]), 0
        for file, other in stored:
            for (low, high), (first, last) in wanted.overlaps(other.along(axis)):
                there = self._opened(file).get_slice(name)
                out[(*here, slice(low, high))] = there[(*here, slice(first, last))]
                filled += high - low
        if filled != wanted.local_shape[axis]:
            raise ValueError(f"{self.folder}: '{name}' is not whole ({filled} of {wanted.local_shape[axis]}); {REMEDY}")
        return out

    def _opened(self, file: str) -> safe_open:
        if file not in self._files:
            path = self.folder / file
            try:
                self._files[file] = self._open.enter_context(safe_open(str(path), framework="np"))
            except (OSError, SafetensorError) as error:
                raise ValueError(f"{path}: unreadable ({error}); {REMEDY}") from None
        return self._files[file]


def _part(entry: Mapping) -> Part:
    return Part(tuple(entry["shape"]), entry["axis"], tuple((start, stop) for start, stop in entry["ranges"]))
