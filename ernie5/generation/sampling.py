"""Random choices from logits, in numpy: one generator a prompt, so a result does not depend on its neighbours.

P prompts, V classes, n codes of a scale, d bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Sampling:
    """How to choose. ``temperature`` 0 takes the most likely; ``top_k`` 0 and ``top_p`` 1 keep every class."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature: found {self.temperature}, expected a number from 0 (most likely) upwards")
        if self.top_k < 0:
            raise ValueError(f"top_k: found {self.top_k}, expected 0 (every class) or a positive count")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: found {self.top_p}, expected a share above 0 and up to 1")


class Sampler:
    """Draws with one generator a prompt, seeded by (seed, number of the prompt)."""

    def __init__(self, sampling: Sampling, seed: int, prompts: int) -> None:
        self.sampling = sampling
        self._generators = [np.random.default_rng([seed, prompt]) for prompt in range(prompts)]

    def classes(self, logits: np.ndarray) -> np.ndarray:
        """One class of each row: logits [P, V] (-inf = impossible) -> int64 [P]."""
        if self.sampling.temperature == 0:
            return logits.argmax(-1)
        edges = np.cumsum(class_probabilities(logits, self.sampling), axis=-1)
        return (edges < self._uniform((1,)) * edges[:, -1:]).sum(-1)

    def bits(self, logits: np.ndarray) -> np.ndarray:
        """Every bit on its own: logits [P, n, d, 2] -> uint8 [P, n, d]."""
        margin = (logits[..., 1] - logits[..., 0]).astype(np.float64)
        if self.sampling.temperature == 0:
            return (margin > 0).astype(np.uint8)
        odds = np.clip(margin / self.sampling.temperature, -500, 500)
        return (self._uniform(margin.shape[1:]) < 1 / (1 + np.exp(-odds))).astype(np.uint8)

    def uniforms(self, count: int) -> np.ndarray:
        """What ``classes`` would draw in its next ``count`` calls: float64 [P, count] in [0, 1)."""
        return self._uniform((count,)) if self.sampling.temperature else np.zeros((len(self._generators), count))

    def _uniform(self, shape: Sequence[int]) -> np.ndarray:
        return np.stack([generator.random(shape) for generator in self._generators])


def masked(logits: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    """Logits [P, V], -inf where not allowed: bool [P, <= V]; classes beyond its width are not."""
    width = allowed.shape[1]
    result = np.where(allowed, logits[:, :width], -np.inf)
    if width < logits.shape[1]:
        result = np.pad(result, [(0, 0), (0, logits.shape[1] - width)], constant_values=-np.inf)
    return result


def class_probabilities(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """Softmax of logits [P, V] over temperature, cut to the ``top_k`` likeliest and the fewest that reach ``top_p``.

    Returns float64 [P, V], rows sum to 1. Ties are cut in the order of classes.
    """
    logits = logits.astype(np.float64) / sampling.temperature
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    probabilities = weights / weights.sum(-1, keepdims=True)
    if sampling.top_k or sampling.top_p < 1:
        for row in probabilities:
            row[~_kept(row, sampling)] = 0.0
        probabilities /= probabilities.sum(-1, keepdims=True)
    return probabilities


def _kept(row: np.ndarray, sampling: Sampling) -> np.ndarray:
    """Which classes of one row [V] ``class_probabilities`` keeps, bool [V].

    Values are sorted, not classes: a tenth of the time of a stable order, and equals matter at the border alone.
    """
    ranked = np.sort(row)[::-1]
    count = int(np.count_nonzero(np.cumsum(ranked) - ranked < sampling.top_p))
    if sampling.top_k:
        count = min(count, sampling.top_k)
    kept = row > ranked[count - 1]
    equal = np.flatnonzero(row == ranked[count - 1])
    kept[equal[: count - np.count_nonzero(kept)]] = True
    return kept


def guide(logits: np.ndarray, guidance: float) -> np.ndarray:
    """Classifier-free guidance: [2P, ...], prompts first, prompt-free after -> u + guidance * (c - u) [P, ...]."""
    conditioned, free = np.split(logits, 2)
    return free + guidance * (conditioned - free)
