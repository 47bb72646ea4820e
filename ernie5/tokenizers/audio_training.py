"""What the three audio networks share while they train: spectra of the recordings, the optimiser, the progress bar.

N recordings, T hops (10 ms), bins of the STFT, M mel bands.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import paddle
from paddle import Tensor, nn
from tqdm import tqdm

from ernie5.tokenizers import audio_features as features
from ernie5.tokenizers.audio_voice import pitch


@dataclass(frozen=True)
class Budget:
    """How long and how fast one network learns."""

    steps: int
    batch: int  # recordings a step
    rate: float  # highest learning rate
    seed: int
    progress: bool


class Recordings:
    """Magnitudes and pitch of every recording, computed once; half precision, 185 MB an hour of sound."""

    def __init__(self, waves: Sequence[np.ndarray]):
        padded = [features.pad_to_frames(wave) for wave in waves]
        self.magnitudes = [np.abs(features.stft(wave)).astype(np.float16) for wave in padded]
        self.pitch = [pitch(wave) for wave in padded]
        self.frames = np.array([len(magnitude) // features.HOPS_PER_FRAME for magnitude in self.magnitudes])

    def __len__(self) -> int:
        return len(self.magnitudes)

    def whole(self, chosen: np.ndarray) -> np.ndarray:
        """Magnitudes float32 [len(chosen), T, bins] of the chosen recordings, silence behind the shorter ones."""
        return self.crop(chosen, np.zeros(len(chosen), int), int(self.frames[chosen].max()))[0]

    def crop(self, chosen: np.ndarray, starts: np.ndarray, frames: int) -> tuple[np.ndarray, np.ndarray]:
        """Magnitudes [B, T, bins] and pitch [B, T] of ``frames`` codec frames, from frame ``starts[b]`` of each."""
        hops = features.HOPS_PER_FRAME
        magnitudes = np.zeros((len(chosen), frames * hops, features.BINS), np.float32)
        hertz = np.zeros((len(chosen), frames * hops), np.float32)
        for row, (i, start) in enumerate(zip(chosen, starts, strict=True)):
            window = slice(start * hops, (start + frames) * hops)
            length = len(self.pitch[i][window])
            magnitudes[row, :length], hertz[row, :length] = self.magnitudes[i][window], self.pitch[i][window]
        return magnitudes, hertz


class Order:
    """Numbers 0..n-1 in a fresh random order every epoch."""

    def __init__(self, count: int, rng: np.random.Generator):
        self.count, self.rng = count, rng
        self._queue = np.zeros(0, int)

    def draw(self, batch: int) -> np.ndarray:
        """int [batch], without repetition inside an epoch."""
        while len(self._queue) < batch:
            self._queue = np.concatenate([self._queue, self.rng.permutation(self.count)])
        chosen, self._queue = self._queue[:batch], self._queue[batch:]
        return chosen


@lru_cache(maxsize=64)
def _warped_mel(factor: float) -> np.ndarray:
    return features.warp_matrix(factor) @ features.mel_matrix()


def warped_mel(magnitudes: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """[B, T, bins] -> compressed mel [B, T, M] after multiplying the frequencies of row b by ``factors[b]``."""
    out = np.empty((*magnitudes.shape[:2], features.MELS), np.float32)
    for factor in np.unique(factors):
        rows = np.nonzero(factors == factor)[0]
        out[rows] = magnitudes[rows] @ _warped_mel(float(factor))
    return features.compress(out)


def optimiser(network: nn.Layer, budget: Budget) -> Callable[[Tensor], None]:
    """AdamW with a short warm-up and a cosine to zero. The returned function takes the loss and makes one step."""
    cosine = paddle.optimizer.lr.CosineAnnealingDecay(budget.rate, budget.steps)
    warm = paddle.optimizer.lr.LinearWarmup(cosine, max(1, budget.steps // 20), budget.rate / 20, budget.rate)
    clip = nn.ClipGradByGlobalNorm(1.0)
    adam = paddle.optimizer.AdamW(warm, 0.9, 0.98, parameters=network.parameters(), weight_decay=0.01, grad_clip=clip)

    def update(loss: Tensor) -> None:
        loss.backward()
        adam.step()
        adam.clear_grad()
        warm.step()

    return update


def steps_of(budget: Budget, what: str) -> Iterable[int]:
    """0..steps-1 behind a progress bar with the expected time left."""
    return tqdm(range(budget.steps), desc=what, unit="step", disable=not budget.progress)
