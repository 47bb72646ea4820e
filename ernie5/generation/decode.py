"""The three ways of walking a plan: tokens, scales of frames, codes of audio frames.

P prompts; R = P rows, or 2P with guidance (see ``plan_batch``); h, w latent grid; d bits; Q codec levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ernie5.generation.sampling import Sampler, guide, masked
from ernie5.generation.walk import Walk
from ernie5.sequence.plan import Step
from ernie5.sequence.spec import LayoutSpec
from ernie5.sequence.vocabulary import Special
from ernie5.tokenizers.continuations import COMPLETE, Continuations


@dataclass
class Decoder:
    """One batch on its way. ``prompts`` rows are kept; with ``guidance`` not 1 as many prompt-free ones follow them.

    ``continuations`` of the text tokenizer are needed for text alone.
    """

    walk: Walk
    steps: Sequence[Step]
    sampler: Sampler
    spec: LayoutSpec
    prompts: int
    guidance: float = 1.0
    continuations: Continuations | None = None

    def _logits(self, values: np.ndarray) -> np.ndarray:
        """Logits of the prompts, [P, ...], from those of all rows."""
        return values if self.walk.rows == self.prompts else guide(values, self.guidance)

    def _all_rows(self, values: np.ndarray) -> np.ndarray:
        """What was chosen for the prompts, for all rows."""
        return values if self.walk.rows == self.prompts else np.concatenate([values, values])

    def text(self) -> list[list[int]]:
        """Token ids of each prompt, up to and without EOS.

        Only tokens that keep the text well-formed are chosen (``Continuations``), and a text is complete when the steps
        are used up. Other specials, and ids without a text, are never chosen.
        """
        assert self.continuations is not None, "text is generated with the continuations of its tokenizer"
        ids: list[list[int]] = [[] for _ in range(self.prompts)]
        running = np.ones(self.prompts, bool)
        states = np.full(self.prompts, COMPLETE)
        end = int(Special.EOS)  # NumPy compares with a member of an enum many times slower
        for left, step in zip(reversed(range(len(self.steps))), self.steps, strict=True):
            logits = self._logits(self.walk.text_logits(step.start, step.stop))
            chosen = self.sampler.classes(masked(logits, self.continuations.allowed(states, left)))
            states = self.continuations.after(states, chosen)
            running &= chosen != end
            for row in np.flatnonzero(running):
                ids[row].append(int(chosen[row]))
            if not running.any():
                break
            self.walk.fields["input_ids"][:, step.stop] = self._all_rows(np.where(running, chosen, end))
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
