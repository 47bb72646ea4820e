"""The column intervals against visibility worked out pair by pair from what stands where."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from ernie5.sequence import layout
from ernie5.sequence.layout import lay_out
from ernie5.sequence.mask import dense_mask
from ernie5.sequence.packing import collate, pack
from ernie5.sequence.parts import AudioCodes, Sample, Text, VisionFeatures, VisionLatent
from ernie5.sequence.spec import LayoutSpec
from tests.sequence.samples import Letters, random_sample


@dataclass
class Cell:
    """One position, described without intervals."""

    document: int
    group: int
    clip: int = -1  # number of the generated clip, -1 outside
    frame: int = -1


def cells_of(sample: Sample, spec: LayoutSpec, document: int, clips: list[int]) -> list[Cell]:
    """Walks the parts one token at a time; ``clips`` collects the number of frames of each generated block."""
    cells = [Cell(document, 0)]

    def single(count: int) -> None:
        for _ in range(count):
            cells.append(Cell(document, cells[-1].group + 1))

    for part in sample.parts:
        if isinstance(part, Text):
            single(len(part.text))
        elif isinstance(part, VisionLatent):
            single(1)
            clips.append(len(part.latents[spec.bits]))
            for frame in range(clips[-1]):
                for side in [*spec.scales[1:], 1]:
                    group = cells[-1].group + 1
                    cells.extend(Cell(document, group, len(clips) - 1, frame) for _ in range(side * side))
            single(1)
        elif isinstance(part, VisionFeatures):
            single(1)
            group = cells[-1].group + 1
            cells.extend(Cell(document, group) for _ in range(len(part.cnn)))
            single(2)
        elif isinstance(part, AudioCodes):
            single(len(part.codes) + (2 if part.generate else 3))
        else:
            single(1)
    single(1)
    return cells


def sees(row: Cell, column: Cell, window: int, clips: list[int], hidden: list[np.ndarray]) -> bool:
    if row.document != column.document or row.group < column.group:
        return False
    if column.clip < 0 or (row.clip == column.clip and row.frame == column.frame):
        return True
    last_seer = column.frame + (window or clips[column.clip])
    if hidden[column.clip][column.frame]:
        last_seer = column.frame
    if row.clip == column.clip:
        return row.frame <= last_seer
    return last_seer >= clips[column.clip] - 1


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("window", [0, 1, 2])
def test_intervals_equal_pairwise_visibility(seed: int, window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng([seed, window])
    scales = [(1, 2, 3), (1, 3), (1,)][seed % 3]
    spec = LayoutSpec(length=400, scales=scales, temporal_window=window, history_mask=0.4, bits=8)
    hidden: list[np.ndarray] = []
    original = layout.open_frames

    def recording(writer, count, video, hide, loss):
        hidden.append(hide)
        return original(writer, count, video, hide, loss)

    monkeypatch.setattr(layout, "open_frames", recording)
    samples = [random_sample(rng, spec, parts=int(rng.integers(1, 5))) for _ in range(3)]
    documents = [lay_out(sample, Letters(), spec, rng) for sample in samples]
    length = sum(map(len, documents)) + 5
    offset = int(rng.integers(3))
    mask = dense_mask(collate([pack(documents, length, offset)])["attention_intervals"])[0]

    clips: list[int] = []
    cells = [cell for number, sample in enumerate(samples) for cell in cells_of(sample, spec, number, clips)]
    expected = np.eye(length, dtype=bool)
    for r, row in enumerate(cells):
        for c, column in enumerate(cells):
            expected[offset + r, offset + c] = sees(row, column, window, clips, hidden)
    np.testing.assert_array_equal(mask, expected)


def test_rows_select_absolute_queries() -> None:
    rng = np.random.default_rng(0)
    spec = LayoutSpec(bits=8)
    batch = collate([pack([lay_out(random_sample(rng, spec), Letters(), spec)], 256) for _ in range(2)])
    rows = np.array([7, 3, 100])
    whole = dense_mask(batch["attention_intervals"])
    np.testing.assert_array_equal(dense_mask(batch["attention_intervals"], rows), whole[:, rows])
