"""This rank's part of a micro-batch: the columns of its context rank, and of those the tokens of its tensor rank.

Shapes: B rows, S positions, c context ranks, n tensor ranks, T = B*S/(c*n) tokens of this rank.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import paddle

from ernie5.parallel.topology import Topology
from ernie5.sequence.vocabulary import IGNORE

Batch = Mapping[str, np.ndarray]
BY_POSITION = (
    "input_ids",
    "next_ids",
    "audio_codes",
    "labels_text",
    "labels_mtp",
    "labels_bits",
    "labels_audio",
    "loss_weight",
    "kind",
)
FEATURES = {
    "vision_index": ("vision_features", "vision_scale"),
    "patch_index": ("patch_cnn", "patch_vit", "patch_mask"),
    "speaker_index": ("speaker",),
}


def local_part(batch: Batch, topology: Topology) -> dict[str, np.ndarray]:
    """Fields of ``ernie5.sequence.packing.collate`` -> those of this rank.

    Positions keep the B rows of the context rank, the intervals those of the whole row; every other field becomes flat,
    [T,...], unless the rank has all of it. ``next_ids`` and ``mtp_intervals`` join where ranks compute together.
    """
    if not topology.spread:
        return dict(batch)
    whole = {**batch, "next_ids": _next_ids(batch["input_ids"]), "mtp_intervals": mtp_intervals(batch)}
    rows, length = batch["input_ids"].shape
    context, tensor = topology.config.context, topology.config.tensor
    if context * tensor == 1:
        return whole
    width = length // context
    columns = slice(topology.place.context * width, (topology.place.context + 1) * width)
    count = rows * width // tensor
    here = slice(topology.place.tensor * count, (topology.place.tensor + 1) * count)
    part = {"attention_intervals": whole["attention_intervals"], "mtp_intervals": whole["mtp_intervals"]}
    part["positions"] = whole["positions"][:, columns]
    for name in BY_POSITION:
        values = whole[name][:, columns]
        part[name] = values.reshape([rows * width, *values.shape[2:]])[here]
    numbers = np.full(rows * length, -1, np.int64)  # where a position of the whole batch is here
    numbers.reshape([rows, length])[:, columns] = np.arange(rows * width).reshape([rows, width]) - here.start
    for index, names in FEATURES.items():
        places = numbers[whole[index]]
        kept = (places >= 0) & (places < count)
        part[index] = places[kept]
        for name in names:
            part[name] = whole[name][kept]
    return part


def to_tensors(batch: Batch, dtype: str) -> dict[str, paddle.Tensor]:
    """On this process's device, with real numbers in ``dtype``."""
    return {
        name: paddle.to_tensor(value.astype(dtype) if value.dtype.kind == "f" else value)
        for name, value in batch.items()
    }


def mtp_intervals(batch: Batch) -> np.ndarray:
    """int32 [B,1,S,4]: positions with an MTP label see those before them in their document; the others are hidden."""
    labelled, document = batch["labels_mtp"] != IGNORE, batch["document"]
    length = document.shape[1]
    columns = np.arange(length)
    last = np.stack([np.searchsorted(row, row, side="right") for row in _ascending(document)])
    start = np.where(labelled, last, 0)
    values = [start, np.full_like(start, length), np.zeros_like(start), np.broadcast_to(columns, start.shape)]
    return np.stack(values, axis=-1).astype(np.int32)[:, None]


def _ascending(document: np.ndarray) -> np.ndarray:
    """Document numbers with padding (0) wherever it is made the number of what stands before it."""
    return np.maximum.accumulate(document, axis=1)


def _next_ids(ids: np.ndarray) -> np.ndarray:
    return np.concatenate([ids[:, 1:], np.zeros_like(ids[:, :1])], axis=1)
