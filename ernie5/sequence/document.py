"""One document being written position by position: BOS ... EOS, with everything a batch row needs of it.

n positions, d = ``max_bits``, Q codec levels, Nv scale features, Np patch tokens of K patches, Ns speakers.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ernie5.sequence.positions import grid_offsets, line
from ernie5.sequence.spec import LayoutSpec
from ernie5.sequence.vocabulary import IGNORE, NO_CODE, Kind, Special


@dataclass
class Patches:
    """Understanding features of one image or clip: Np tokens of K patches, standing at ``index``."""

    cnn: np.ndarray  # float32 [Np, K, D_cnn]
    vit: np.ndarray  # float32 [Np, K, D_vit]
    index: np.ndarray  # int64 [Np]


@dataclass
class Document:
    """Fields as in the batch (see ``packing``), without the batch axis; indices count from the document's start."""

    input_ids: np.ndarray  # int64 [n]
    positions: np.ndarray  # float32 [n, 3]
    group_start: np.ndarray  # int64 [n]: rows before it cannot see this column
    visible_until: np.ndarray  # int64 [n]: rows from here on cannot see this column
    labels_text: np.ndarray  # int64 [n]
    labels_mtp: np.ndarray  # int64 [n]
    labels_bits: np.ndarray  # int64 [n, d]
    labels_audio: np.ndarray  # int64 [n, Q]
    loss_weight: np.ndarray  # float32 [n], 0 where nothing is predicted
    kind: np.ndarray  # int64 [n]
    audio_codes: np.ndarray  # int64 [n, Q]
    vision_features: np.ndarray  # float32 [Nv, d]
    vision_index: np.ndarray  # int64 [Nv]
    vision_scale: np.ndarray  # int64 [Nv]
    patches: list[Patches]
    speaker: np.ndarray  # float32 [Ns, D_s]
    speaker_index: np.ndarray  # int64 [Ns]
    spec: LayoutSpec = field(repr=False)
    task: str = ""

    def __len__(self) -> int:
        return len(self.input_ids)


class Writer:
    """Fills a document of a known number of positions from left to right.

    Kinds: an opening token and what it holds have their block's kind, a speaker is audio that is only read; closing
    tokens, SEP, BOS and EOS are text.
    """

    def __init__(self, spec: LayoutSpec, length: int) -> None:
        self.spec, self.length = spec, length
        self.at = 0  # next position to fill
        self.index = 0  # its running text index
        self.input_ids = np.zeros(length, np.int64)
        self.positions = np.zeros((length, 3), np.float32)
        self.group_start = np.arange(length)
        self.visible_until = np.full(length, length)
        self.labels_text = np.full(length, IGNORE)
        self.labels_bits = np.full((length, spec.max_bits), IGNORE)
        self.labels_audio = np.full((length, spec.levels), IGNORE)
        self.loss_weight = np.zeros(length, np.float32)
        self.kind = np.full(length, int(Kind.TEXT))
        self.audio_codes = np.full((length, spec.levels), NO_CODE)
        self._features: list[np.ndarray] = []
        self._feature_index: list[np.ndarray] = []
        self._feature_scale: list[np.ndarray] = []
        self._patches: list[Patches] = []
        self._speakers: list[np.ndarray] = []
        self._speaker_index: list[int] = []

    def _line(self, ids: np.ndarray | int, count: int, kind: Kind) -> int:
        """Writes ``count`` positions of running index; returns where the first of them stands."""
        start = self.at
        here = slice(start, start + count)
        self.input_ids[here] = ids
        self.positions[here] = line(self.index, count)
        self.kind[here] = kind
        self.at += count
        self.index += count
        return start

    def _block(self, token: Special, offsets: np.ndarray, kind: Kind) -> int:
        """Writes a visual block; the running index resumes after its largest coordinate."""
        start, count = self.at, len(offsets)
        here = slice(start, start + count)
        self.input_ids[here] = token
        self.positions[here] = offsets + self.index
        self.kind[here] = kind
        self.at += count
        self.index += int(np.ceil(offsets.max())) + 1
        return start

    def text(self, ids: np.ndarray, loss: bool, kind: Kind = Kind.TEXT, weight: float = 1.0) -> None:
        """Plain tokens; with ``loss`` the position before each of them learns to predict it."""
        ids = np.asarray(ids, np.int64)
        start = self._line(ids, len(ids), kind)
        if loss:
            assert start > 0, "nothing stands before the first token to predict it"
            self.labels_text[start - 1 : self.at - 1] = ids
            self.loss_weight[start - 1 : self.at - 1] = weight

    def special(self, token: Special, loss: bool = False, kind: Kind = Kind.TEXT) -> None:
        self.text(np.array([token]), loss, kind)

    def speaker(self, vector: np.ndarray) -> None:
        self._speaker_index.append(self._line(Special.SPEAKER, 1, Kind.AUDIO_UND))
        self._speakers.append(np.asarray(vector, np.float32))

    def patches(self, cnn: np.ndarray, vit: np.ndarray, grid: tuple[int, int, int], kind: Kind) -> None:
        """Understanding tokens of a (frames, rows, columns) grid, one group that sees itself in full."""
        start = self._block(Special.PATCH, grid_offsets(*grid), kind)
        self.group_start[start : self.at] = start
        index = np.arange(start, self.at)
        self._patches.append(Patches(np.asarray(cnn, np.float32), np.asarray(vit, np.float32), index))

    def audio(self, codes: np.ndarray, kind: Kind) -> None:
        """Frames of codes [x, Q], one position each."""
        start = self._line(Special.AUDIO, len(codes), kind)
        self.audio_codes[start : self.at] = codes

    def audio_targets(self, start: int, codes: np.ndarray) -> None:
        """Position ``start + x`` learns frame x, and the position of the last frame the end, at every level."""
        stop = start + len(codes)
        self.labels_audio[start:stop] = codes
        self.labels_audio[stop] = self.spec.codebook_size
        self.loss_weight[start : stop + 1] = 1.0

    def frames(self, count: int, kind: Kind) -> int:
        """The positions of ``count`` generated latent frames, without features; returns where they start."""
        table = self.spec.frame
        offsets = np.tile(table.offsets, (count, 1))
        offsets[:, 0] = np.repeat(np.arange(count), len(table.offsets))
        start = self._block(Special.VISION, offsets, kind)
        frame_starts = start + np.arange(count)[:, None] * len(table.offsets)
        self.group_start[start : self.at] = (frame_starts + table.group_start).ravel()
        return start

    def frame_features(self, start: int, features: np.ndarray) -> None:
        """Features [T', m, d] of the first T' frames of the block at ``start``."""
        frames, tokens, bits = features.shape
        padded = np.zeros((frames * tokens, self.spec.max_bits), np.float32)
        padded[:, :bits] = features.reshape(-1, bits)
        self._features.append(padded)
        self._feature_index.append(np.arange(start, start + frames * tokens))
        self._feature_scale.append(np.tile(self.spec.frame.scale, frames))

    def frame_targets(self, start: int, bits: np.ndarray) -> None:
        """Bits [T', m, d] of all codes: the opening token and every position but the last learn them in order."""
        frames, tokens, width = bits.shape
        here = slice(start - 1, start - 1 + frames * tokens)
        self.labels_bits[here, :width] = bits.reshape(-1, width)
        self.loss_weight[here] = np.tile(self.spec.frame.weights, frames)

    def limit_history(self, start: int, count: int, hidden: np.ndarray) -> None:
        """Ends the sight of frames: of those outside the temporal window, and of ``hidden`` [T'] ones at once.

        One interval a column can name one first blind row, so a frame that later frames cannot see is hidden from the
        rest of the document as well.
        """
        tokens, window = self.spec.frame_tokens, self.spec.temporal_window
        seen_by = np.arange(count) + (window if window else count)
        seen_by[hidden] = np.arange(count)[hidden]
        until = np.where(seen_by < count - 1, start + (seen_by + 1) * tokens, self.length)
        self.visible_until[start : start + count * tokens] = np.repeat(until, tokens)

    def document(self, task: str = "") -> Document:
        assert self.at == self.length, f"{self.at} of {self.length} positions were written"
        spec = self.spec
        mtp = np.full(self.length, IGNORE)
        mtp[:-1] = np.where(self.labels_text[:-1] != IGNORE, self.labels_text[1:], IGNORE)
        return Document(
            input_ids=self.input_ids,
            positions=self.positions,
            group_start=self.group_start,
            visible_until=self.visible_until,
            labels_text=self.labels_text,
            labels_mtp=mtp,
            labels_bits=self.labels_bits,
            labels_audio=self.labels_audio,
            loss_weight=self.loss_weight,
            kind=self.kind,
            audio_codes=self.audio_codes,
            vision_features=_joined(self._features, np.zeros((0, spec.max_bits), np.float32)),
            vision_index=_joined(self._feature_index, np.zeros(0, np.int64)),
            vision_scale=_joined(self._feature_scale, np.zeros(0, np.int64)),
            patches=self._patches,
            speaker=np.array(self._speakers, np.float32).reshape(-1, spec.speaker_dim),
            speaker_index=np.array(self._speaker_index, np.int64),
            spec=spec,
            task=task,
        )


def _joined(arrays: list[np.ndarray], empty: np.ndarray) -> np.ndarray:
    return np.concatenate(arrays) if arrays else empty
