"""Runs the backbone group by group over a laid-out batch, keys and values of earlier groups kept in a cache.

R rows of the batch, S columns, n columns of one step, D hidden, Q codec levels.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np
import paddle
from paddle.utils.dlpack import from_dlpack

from ernie5.ops.decode import DecodeCache, GoingText
from ernie5.sequence.vocabulary import NO_CODE

Choose = Callable[[int, np.ndarray], np.ndarray]  # (level, logits [R, C+1]) -> codes int64 [R]

_BY_COLUMN = ("input_ids", "positions", "audio_codes")
_BY_INDEX = {
    "vision_index": ("vision_features", "vision_scale"),
    "patch_index": ("patch_cnn", "patch_vit", "patch_mask"),
    "speaker_index": ("speaker",),
}


class Walk:
    """``fields`` is a batch as ``collate`` makes it; what is generated is written into it before its column is fed."""

    def __init__(self, model: Any, fields: dict[str, np.ndarray]) -> None:
        self.model, self.fields = model, fields
        self.rows, self.columns = fields["input_ids"].shape
        self._cache = model.new_cache()
        if isinstance(self._cache, DecodeCache):
            self._cache.reserve(self.rows, self.columns)
        self._blocks = len(model.layers)
        self._positions = paddle.to_tensor(fields["positions"])
        self._intervals = paddle.to_tensor(fields["attention_intervals"])
        self._valid = paddle.to_tensor(fields["document"] > 0)
        self._ids = from_dlpack(fields["input_ids"])  # the same memory: sees what is written there

    def feed(self, start: int, stop: int, choose: Choose | None = None) -> paddle.Tensor:
        """Columns ``start .. stop-1`` through all blocks -> hidden [R, n, D].

        ``choose`` samples the codes that the last column predicts, level by level, each fed back before the next block
        (report §2.3.2); they are left in ``labels_audio``, from which earlier generated audio is fed back too.
        """
        hidden = self.model.embed(self._slice(start, stop))
        positions, valid = self._positions[:, start:stop], self._valid[:, start:stop]
        intervals = self._intervals[:, :, :stop]

        def run(state: paddle.Tensor, first: int, last: int) -> paddle.Tensor:
            return self.model.run_layers(state, positions, intervals, valid, self._cache, start, first, last)

        codes = self.fields["labels_audio"][:, start:stop]
        if choose is None and codes.max(initial=NO_CODE) < 0:
            return run(hidden, 0, self._blocks)
        return self._feed_codes(hidden, run, codes, choose)

    def text_logits(self, start: int, stop: int) -> np.ndarray:
        """Feeds columns ``start .. stop-1``; logits [R, V] of the text token after them."""
        step = getattr(self._cache, "step", None)
        if step is None or not step.takes(self.rows * (stop - start)) or start < self._only_text_from:
            return self.model.text_logits(self.feed(start, stop)[:, -1]).numpy()
        given = (self._positions, self._intervals, self._valid, self._cache, start)
        return step.run(None, *given, ids=self._ids, rows=stop - start, logits=True)[1].numpy()

    def can_write(self, start: int) -> bool:
        """Whether ``write`` serves from column ``start`` on."""
        step = getattr(self._cache, "step", None)
        return step is not None and step.takes(self.rows) and start >= self._only_text_from

    def write(self, going: GoingText, start: int) -> np.ndarray:
        """Feeds column ``start`` and the tokens that follow -> those tokens, int64 [R, n]; see ``DecodeStep.write``."""
        return self._cache.step.write(going, self._positions, self._intervals, self._valid, self._cache, start)

    @cached_property
    def _only_text_from(self) -> int:
        """The column after the last that holds a feature or a code; those of a text to come hold none."""
        held = [index % self.columns for index in (self.fields[name] for name in _BY_INDEX)]
        for name in ("audio_codes", "labels_audio"):
            held.append(np.nonzero(self.fields[name].max(axis=(0, 2)) >= 0)[0])
        return int(np.concatenate(held).max(initial=-1)) + 1

    def _feed_codes(
        self, hidden: paddle.Tensor, run: Callable, codes: np.ndarray, choose: Choose | None
    ) -> paddle.Tensor:
        levels, done = codes.shape[-1], 0
        for level in range(levels):
            here = self._blocks - levels + 1 + level
            hidden, done = run(hidden, done, here), here
            if choose is not None:
                codes[:, -1, level] = choose(level, self.model.audio_logits(hidden[:, -1], level).numpy())
            if here < self._blocks:
                hidden = hidden + self.model.audio_feedback(paddle.to_tensor(codes[..., level]), level)
        return hidden

    def place_features(self, start: int, features: np.ndarray, scale: int) -> None:
        """Puts scale features [R, n, d] of one scale number at columns ``start ..``; missing bits are 0."""
        rows, count, bits = features.shape
        padded = np.zeros((rows * count, self.fields["vision_features"].shape[1]), np.float32)
        padded[:, :bits] = features.reshape(-1, bits)
        index = np.arange(rows)[:, None] * self.columns + np.arange(start, start + count)
        new = {
            "vision_features": padded,
            "vision_index": index.ravel(),
            "vision_scale": np.full(rows * count, scale),
        }
        for name, values in new.items():
            self.fields[name] = np.concatenate([self.fields[name], values])

    def _slice(self, start: int, stop: int) -> dict[str, paddle.Tensor]:
        """The fields of some columns, flat indices renumbered to them."""
        part = {name: np.ascontiguousarray(self.fields[name][:, start:stop]) for name in _BY_COLUMN}
        for index, names in _BY_INDEX.items():
            row, column = np.divmod(self.fields[index], self.columns)
            inside = (start <= column) & (column < stop)
            if inside.any():
                part[index] = row[inside] * (stop - start) + column[inside] - start
                part |= {name: self.fields[name][inside] for name in names}
        return {name: paddle.to_tensor(values) for name, values in part.items()}
