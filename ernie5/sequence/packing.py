"""Documents -> one row of a fixed length -> a batch. Documents in a row never see each other.

Batch fields; B rows, S positions, d bits of the model, Q codec levels, N* items of one kind in the whole batch:

| field | dtype, shape | meaning |
|---|---|---|
| input_ids | int64 [B,S] | ids; VISION / PATCH / AUDIO / SPEAKER where a feature stands; PAD = 0 |
| positions | float32 [B,S,3] | Uni-RoPE (t, h, w) |
| attention_intervals | int32 [B,1,S,4] | (LTS, LTE, UTS, UTE) of every key column, see ``mask`` |
| vision_features, vision_scale | float32 [Nv,d], int64 [Nv] | scale features, scale number (0 = whole frame) |
| vision_index | int64 [Nv] | where they stand, b*S + s; so the other indices |
| patch_cnn, patch_vit, patch_mask | float32 [Np,K,D], [Np,K,D], [Np,K] | patches to understand; K = the largest |
| patch_index | int64 [Np] | |
| speaker, speaker_index | float32 [Ns,D_s], int64 [Ns] | speaker embeddings |
| audio_codes | int64 [B,S,Q] | codes of the frame standing here, else -1 |
| labels_text, labels_mtp | int64 [B,S] | next token, and the one after it; -100 = no loss, here and below |
| labels_bits | int64 [B,S,d] | bits predicted here |
| labels_audio | int64 [B,S,Q] | codes of the next frame; C = end of audio |
| loss_weight | float32 [B,S] | weight of what is predicted here |
| kind, document | int64 [B,S] | ``Kind``; number of the document in its row, 0 = padding |
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ernie5.sequence.document import Document
from ernie5.sequence.vocabulary import IGNORE, NO_CODE

Row = dict[str, np.ndarray]

_FILL = {
    "input_ids": 0,
    "positions": 0,
    "audio_codes": NO_CODE,
    "labels_text": IGNORE,
    "labels_mtp": IGNORE,
    "labels_bits": IGNORE,
    "labels_audio": IGNORE,
    "loss_weight": 0,
    "kind": 0,
}
_INDEXED = {
    "vision_index": ("vision_features", "vision_scale"),
    "patch_index": ("patch_cnn", "patch_vit", "patch_mask"),
    "speaker_index": ("speaker",),
}
_SMALLEST_K = 4  # patches of one token where a batch holds none


def pack(documents: Sequence[Document], length: int, offset: int = 0) -> Row:
    """Puts documents side by side into a row of ``length``, the first at ``offset``; padding fills the rest.

    Indices count within the row. A padding column sees itself alone and nothing sees it.
    """
    assert documents, "a row needs at least one document"
    total = offset + sum(len(document) for document in documents)
    assert total <= length, f"documents of {total} positions do not fit a row of {length}"
    row = {name: _empty(getattr(documents[0], name), length, fill) for name, fill in _FILL.items()}
    row["document"] = np.zeros(length, np.int64)
    row["attention_intervals"] = intervals = _padding_intervals(length)
    indexed: dict[str, list[np.ndarray]] = {name: [] for keys in _INDEXED.items() for name in (keys[0], *keys[1])}
    for number, document in enumerate(documents, start=1):
        here = slice(offset, offset + len(document))
        for name in _FILL:
            row[name][here] = getattr(document, name)
        row["document"][here] = number
        intervals[0, here, 0] = document.visible_until + offset
        intervals[0, here, 3] = document.group_start + offset
        _add_features(indexed, document, offset)
        offset += len(document)
    return row | _joined_features(indexed, documents[0])


def _empty(like: np.ndarray, length: int, fill: int) -> np.ndarray:
    return np.full((length, *like.shape[1:]), fill, like.dtype)


def _padding_intervals(length: int) -> np.ndarray:
    """[1, S, 4] for columns that see only themselves; LTE and UTS hold for every column."""
    columns = np.arange(length, dtype=np.int32)
    return np.stack([columns + 1, np.full_like(columns, length), np.zeros_like(columns), columns], axis=-1)[None]


def _add_features(indexed: dict[str, list[np.ndarray]], document: Document, offset: int) -> None:
    indexed["vision_features"].append(document.vision_features)
    indexed["vision_scale"].append(document.vision_scale)
    indexed["vision_index"].append(document.vision_index + offset)
    indexed["speaker"].append(document.speaker)
    indexed["speaker_index"].append(document.speaker_index + offset)
    for patches in document.patches:
        indexed["patch_cnn"].append(patches.cnn)
        indexed["patch_vit"].append(patches.vit)
        indexed["patch_mask"].append(np.ones(patches.cnn.shape[:2], np.float32))
        indexed["patch_index"].append(patches.index + offset)


def _joined_features(indexed: dict[str, list[np.ndarray]], document: Document) -> Row:
    spec = document.spec
    empty = {
        "patch_cnn": np.zeros((0, _SMALLEST_K, spec.cnn_dim), np.float32),
        "patch_vit": np.zeros((0, _SMALLEST_K, spec.vit_dim), np.float32),
        "patch_mask": np.zeros((0, _SMALLEST_K), np.float32),
        "patch_index": np.zeros(0, np.int64),
    }
    return {name: _stacked(arrays) if arrays else empty[name] for name, arrays in indexed.items()}


def _stacked(arrays: list[np.ndarray]) -> np.ndarray:
    """Concatenates along axis 0; a second axis of different sizes (patches of one token) is padded with zeros."""
    if arrays[0].ndim > 1 and len({array.shape[1] for array in arrays}) > 1:
        width = max(array.shape[1] for array in arrays)
        rest = ((0, 0),) * (arrays[0].ndim - 2)
        arrays = [np.pad(array, ((0, 0), (0, width - array.shape[1]), *rest)) for array in arrays]
    return np.concatenate(arrays)


def collate(rows: Sequence[Row]) -> dict[str, np.ndarray]:
    """Stacks rows of one length into a batch; feature indices become flat, b*S + s."""
    lengths = {len(row["input_ids"]) for row in rows}
    assert len(lengths) == 1, f"rows of different lengths {sorted(lengths)} cannot be stacked"
    (length,) = lengths
    batch = {name: np.stack([row[name] for row in rows]) for name in (*_FILL, "document", "attention_intervals")}
    for index, names in _INDEXED.items():
        batch[index] = np.concatenate([row[index] + b * length for b, row in enumerate(rows)])
        for name in names:
            filled = [row[name] for row in rows if len(row[name])] or [rows[0][name]]
            batch[name] = _stacked(filled)
    return batch
