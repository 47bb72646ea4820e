"""The three ways of walking a plan: tokens, scales of frames, codes of audio frames.

P prompts; R = P rows, or 2P with guidance (see ``plan_batch``); h, w latent grid; d bits; Q codec levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from ernie5.generation.sampling import Sampler, guide, masked
from ernie5.generation.walk import Walk
from ernie5.ops.decode import GoingText
from ernie5.sequence.plan import Step
from ernie5.sequence.spec import LayoutSpec
from ernie5.sequence.vocabulary import Special
from ernie5.tokenizers.continuations import COMPLETE, Continuations

TOKENS_A_CALL = 32  # of text: between two calls Python looks after interrupts


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
        assert self.walk.rows == self.prompts, "text is generated without guidance"
        end = int(Special.EOS)  # NumPy compares with a member of an enum many times slower
        states, columns = np.full(self.prompts, COMPLETE), []
        for number, step in enumerate(self.steps):
            if number and self.walk.can_write(step.start):
                columns += self._write(columns[-1], states, step.start, len(self.steps) - number)
                break
            logits = self.walk.text_logits(step.start, step.stop)
            left = len(self.steps) - number - 1
            chosen = self.sampler.classes(masked(logits, self.continuations.allowed(states, left)))
            if number:
                chosen = np.where(columns[-1] == end, end, chosen)
            states = self.continuations.after(states, chosen).astype(np.int64)
            columns.append(chosen)
            if (chosen == end).all():
                break
            self.walk.fields["input_ids"][:, step.stop] = chosen
        return [_before(end, row) for row in np.stack(columns, 1).tolist()]

    def _write(self, ids: np.ndarray, states: np.ndarray, start: int, count: int) -> list[np.ndarray]:
        """The next ``count`` tokens after ``ids``, those of column ``start``, by the kernel that writes many a call."""
        following, missing = self.continuations.tables()
        end, sampling, columns = int(Special.EOS), self.sampler.sampling, []
        while len(columns) < count and not (ids == end).all():
            left = count - len(columns)
            uniforms = self.sampler.uniforms(min(left, TOKENS_A_CALL))
            going = GoingText(ids, states, following, missing, end, left - 1, uniforms, **asdict(sampling))
            columns += list(self.walk.write(going, start + len(columns)).T)
            ids, states = going.ids, going.states
        return columns

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


def _before(end: int, ids: list[int]) -> list[int]:
    """``ids`` up to the first ``end``."""
    return ids[: ids.index(end)] if end in ids else ids
