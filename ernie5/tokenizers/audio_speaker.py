"""Whose voice it is: one unit vector a recording, the same for whatever is said (ERNIE 5.0 report §2.3.2).

B recordings, T hops (10 ms), M mel bands, D embedding dims, V training voices.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import Tensor, nn

from ernie5.tokenizers import audio_features as features
from ernie5.tokenizers.audio_layers import initialise
from ernie5.tokenizers.audio_training import Budget, Order, Recordings, optimiser, steps_of, warped_mel

SHARPNESS = 16.0  # of the softmax over cosines
WARPS = (0.85, 1.0, 1.17)  # each voice with another throat counts as another voice


class SpeakerEncoder(nn.Layer):
    """Mel bands of single hops -> channels -> their mean and spread over the audible hops -> unit vector."""

    def __init__(self, dim: int, width: int = 128):
        super().__init__()
        self.first = nn.Linear(2 * features.MELS, width)
        self.second = nn.Linear(width, width)
        self.out = nn.Linear(2 * width, dim)

    def forward(self, mel: Tensor) -> Tensor:
        """[B, T, M] -> [B, D], rows of length 1. Silent hops count for nothing."""
        batch, hops, bands = mel.shape
        pairs = mel.reshape([batch, hops // 2, 2 * bands])
        x = F.relu(self.second(F.relu(self.first(pairs))))
        audible = (pairs.max(axis=2) > 0.5).astype(x.dtype) + 1e-4
        weight = (audible / audible.sum(axis=1, keepdim=True)).unsqueeze(1)
        mean = paddle.matmul(weight, x).squeeze(1)
        square = paddle.matmul(weight, x * x).squeeze(1)
        spread = paddle.sqrt(F.relu(square - mean * mean) + 1e-4)
        return F.normalize(self.out(paddle.concat([mean, spread], axis=1)), axis=1)

    @paddle.no_grad()
    def embed(self, waves: np.ndarray) -> np.ndarray:
        """float32 [B, F * 1280] -> float32 [B, D]."""
        mel = features.compress(np.abs(features.stft(waves)) @ features.mel_matrix())
        return self(paddle.to_tensor(mel)).numpy()


def train_speaker_encoder(recordings: Recordings, speakers: Sequence[str], dim: int, budget: Budget) -> SpeakerEncoder:
    """Tells the voices of ``speakers``, each at ``len(WARPS)`` throat lengths, apart by cosine."""
    rng = np.random.default_rng([budget.seed, 2])
    network = SpeakerEncoder(dim)
    names = sorted(set(speakers))
    voice = np.array([names.index(speaker) for speaker in speakers])
    anchors = nn.Linear(dim, len(names) * len(WARPS), bias_attr=False)
    both = nn.LayerList([network, anchors])
    initialise(both, rng)
    update = optimiser(both, budget)
    order = Order(len(recordings), rng)
    for _ in steps_of(budget, "speaker encoder"):
        chosen, throat = order.draw(budget.batch), rng.integers(len(WARPS), size=budget.batch)
        mel = warped_mel(recordings.whole(chosen), np.array(WARPS)[throat])
        vector = network(paddle.to_tensor(mel))
        cosine = paddle.matmul(vector, F.normalize(anchors.weight, axis=0))
        update(F.cross_entropy(SHARPNESS * cosine, paddle.to_tensor(voice[chosen] * len(WARPS) + throat)))
    network.eval()
    return network
