"""The three ways of walking a plan: tokens, scales of frames, codes of audio frames.

P prompts; R = P rows, or 2P with guidance (see ``plan_batch``); h, w latent grid; d bits; Q codec levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ernie5.generation.sampling import Sampler, guide
from ernie5.generation.walk import Walk
from ernie5.sequence.plan import Step
from ernie5.sequence.spec import LayoutSpec
from ernie5.sequence.vocabulary import NUM_SPECIALS, Special


@dataclass
class Decoder:
    """One batch on its way. ``prompts`` rows are kept; with ``guidance`` not 1 as many prompt-free ones follow them.

    ``vocabulary`` is the number of text ids there are, where the model has room for more.
    """

    walk: Walk
    steps: Sequence[Step]
    sampler: Sampler
    spec: LayoutSpec
    prompts: int
    guidance: float = 1.0
    vocabulary: int | None = None

    def _logits(self, values: np.ndarray) -> np.ndarray:
        """Logits of the prompts, [P, ...], from those of all rows."""
        return values if self.walk.rows == self.prompts else guide(values, self.guidance)

    def _all_rows(self, values: np.ndarray) -> np.ndarray:
        """What was chosen for the prompts, for all rows."""
        return values if self.walk.rows == self.prompts else np.concatenate([values, values])

    def text(self) -> list[list[int]]:
        """Token ids of each prompt, up to and without EOS. Other specials, and ids without a text, are never chosen."""
        ids: list[list[int]] = [[] for _ in range(self.prompts)]
        running = np.ones(self.prompts, bool)
        for step in self.steps:
            hidden = self.walk.feed(step.start, step.stop)
            logits = self._logits(self.walk.model.text_logits(hidden[:, -1]).numpy())
            end = logits[:, Special.EOS].copy()
            logits[:, :NUM_SPECIALS] = -np.inf
            logits[:, Special.EOS] = end
            if self.vocabulary is not None:
                logits[:, self.vocabulary :] = -np.inf
            chosen = self.sampler.classes(logits)
            running &= chosen != Special.EOS
            for row in np.flatnonzero(running):
                ids[row].append(int(chosen[row]))
            if not running.any():
                break
            self.walk.fields["input_ids"][:, step.stop] = self._all_rows(np.where(running, chosen, Special.EOS))
        return ids

    def frames(self) -> np.ndarray:
        """Quantised latent frames float32 [P, T', h, w, d], those generated only."""
        pyramid, side = self.spec.pyramid, self.spec.scales[-1]
        frames, bits = [], []
        for step in self.steps:
            hidden = self.walk.feed(step.start, step.stop)
            logits = self.walk.model.bit_logits(hidden[:, -step.predicts :]).numpy()[..., : self.spec.bits, :]
            bits = [*bits[: step.scale], self.sampler.bits(self._logits(logits))]
            total = pyramid.accumulate(bits)
            following = (step.scale + 1) % len(pyramid)
            if following == 0:
                frames.append(total.reshape(self.prompts, side, side, -1))
            features = self._all_rows(pyramid.input_for(following, total))
            self.walk.place_features(step.stop, features, following + 1 if following else 0)
        return np.stack(frames, axis=1)

    def audio(self) -> list[np.ndarray]:
        """Codes int64 [frames, Q] of each prompt, at least one frame; the first level decides on the end."""
        end = self.spec.codebook_size
        running = np.ones(self.prompts, bool)
        frames: list[list[np.ndarray]] = [[] for _ in range(self.prompts)]
        for step in self.steps:

            def choose(level: int, values: np.ndarray, first: bool = step.frame == 0) -> np.ndarray:
                logits = self._logits(values)
                if level or first:
                    logits[:, end] = -np.inf
                return self._all_rows(self.sampler.classes(logits))

            self.walk.feed(step.start, step.stop, choose)
            codes = self.walk.fields["labels_audio"][:, step.stop - 1]
            running &= codes[: self.prompts, 0] != end
            for row in np.flatnonzero(running):
                frames[row].append(codes[row].copy())
            if not running.any():
                break
            self.walk.fields["audio_codes"][:, step.stop] = np.where(codes == end, 0, codes)
        return [np.stack(row) for row in frames]
