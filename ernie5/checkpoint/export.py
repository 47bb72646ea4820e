"""The weights of a checkpoint as one model: whole tensors in the usual files, for ``from_pretrained``."""

from __future__ import annotations

import json
import math
import os
import secrets
import shutil
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from ernie5.checkpoint.part import Part
from ernie5.checkpoint.processes import Processes
from ernie5.checkpoint.reading import Checkpoint
from ernie5.checkpoint.run import remove_folder
from ernie5.checkpoint.state import MODEL

SHARD_BYTES = 4 << 30
CONFIG = "config.json"


def export_weights(checkpoint: Checkpoint, target: Path, processes: Processes, shard_bytes: int = SHARD_BYTES) -> None:
    """Writes ``target``, which is complete or absent: ``model.safetensors``, or numbered files with an index.

    Every process calls it, and writes some of the files. Raises ``ValueError`` on all if one of them cannot.
    """
    partial = target.with_name(f".{target.name}.{processes.gather(secrets.token_hex(4))[0]}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    shards = _shards(checkpoint, shard_bytes)
    names = [_file_name(number, len(shards)) for number in range(len(shards))]
    problem = ""
    try:
        for number in range(processes.rank, len(shards), processes.count):
            tensors = {name: _whole(checkpoint, name) for name in shards[number]}
            save_file(tensors, partial / names[number], metadata={"format": "np"})
    except (OSError, SafetensorError) as error:
        problem = f"{target} is not written: {error}; free space and resume, the last checkpoint is complete"
    try:
        processes.agree(problem)
        if processes.first:
            (partial / CONFIG).write_text(checkpoint.text(CONFIG), encoding="utf-8")
            if len(shards) > 1:
                _write_index(checkpoint, partial, dict(zip(names, shards, strict=True)))
            if target.exists():
                remove_folder(target)
            os.replace(partial, target)
        processes.gather(None)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _whole(checkpoint: Checkpoint, name: str) -> np.ndarray:
    return np.ascontiguousarray(checkpoint.read(MODEL, name, Part(checkpoint.shapes(MODEL)[name])))


def _bytes(checkpoint: Checkpoint) -> dict[str, int]:
    entries = checkpoint.manifest["tensors"][MODEL]
    return {name: math.prod(e[0]["shape"]) * np.dtype(e[0]["dtype"]).itemsize for name, e in entries.items()}


def _shards(checkpoint: Checkpoint, shard_bytes: int) -> list[list[str]]:
    """Names of the tensors in every file, each of ``shard_bytes`` at most, or of one tensor."""
    shards, size = [[]], 0
    for name, count in sorted(_bytes(checkpoint).items()):
        if shards[-1] and size + count > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += count
    return shards


def _file_name(number: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def _write_index(checkpoint: Checkpoint, folder: Path, shards: dict[str, list[str]]) -> None:
    index = {
        "metadata": {"total_size": sum(_bytes(checkpoint).values())},
        "weight_map": {name: file for file, names in shards.items() for name in names},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
