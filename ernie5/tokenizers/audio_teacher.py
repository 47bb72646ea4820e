"""The semantic teacher of the first code: what a Whisper-like encoder offers, and a small recogniser that does.

B recordings, T hops (10 ms), L = T / 2 steps of 20 ms (50 Hz), D features, V characters. ERNIE 5.0 report §2.3.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import Tensor, nn

from ernie5.tokenizers import audio_features as features
from ernie5.tokenizers.audio_layers import ResidualBlock, TimeConv, initialise
from ernie5.tokenizers.audio_training import Budget, Order, Recordings, optimiser, steps_of, warped_mel

STEPS_PER_FRAME = 4  # 50 Hz to 12.5 Hz
WARPS = tuple(float(round(x, 3)) for x in np.geomspace(0.84, 1.2, 13))


class SemanticTeacher(Protocol):
    """Anything that turns speech into features at 50 Hz, for instance a Whisper encoder."""

    def encode(self, waves: np.ndarray) -> np.ndarray:
        """float32 [B, F * 1280] at 16 kHz -> float32 [B, 4 F, D]."""
        ...


def pooled(teacher: SemanticTeacher, waves: np.ndarray) -> np.ndarray:
    """The teacher's features averaged over each codec frame: [B, F * 1280] -> float32 [B, F, D]."""
    encoded = np.asarray(teacher.encode(waves), np.float32)
    frames = waves.shape[1] // features.FRAME
    if encoded.ndim != 3 or encoded.shape[:2] != (len(waves), STEPS_PER_FRAME * frames):
        expected = f"[{len(waves)}, {STEPS_PER_FRAME * frames}, D]"
        raise ValueError(f"the semantic teacher returned {encoded.shape}, expected {expected}: 50 features a second")
    return encoded.reshape(len(waves), frames, STEPS_PER_FRAME, -1).mean(axis=2)


class SpeechRecogniser(nn.Layer):
    """Mel bands at 100 Hz -> characters at 50 Hz, trained with CTC on transcripts. The default teacher."""

    def __init__(self, alphabet: str, width: int = 128):
        super().__init__()
        self.alphabet = alphabet
        self.enter = TimeConv(2 * features.MELS, width, 5)
        self.blocks = nn.LayerList([ResidualBlock(width, dilation) for dilation in (1, 2, 4)])
        self.norm = nn.LayerNorm(width)
        self.scores = nn.Linear(width, len(alphabet) + 1)  # class 0 is CTC's blank

    def hidden(self, mel: Tensor) -> Tensor:
        """[B, T, M] -> [B, L, D], the features a teacher gives."""
        batch, hops, bands = mel.shape
        x = F.relu(self.enter(mel.reshape([batch, hops // 2, 2 * bands])))
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward(self, mel: Tensor) -> Tensor:
        """[B, T, M] -> character scores [B, L, 1 + V]."""
        return self.scores(self.hidden(mel))

    @paddle.no_grad()
    def encode(self, waves: np.ndarray) -> np.ndarray:
        """See ``SemanticTeacher.encode``."""
        magnitude = np.abs(features.stft(waves))
        mel = features.compress(magnitude @ features.mel_matrix())
        return self.hidden(paddle.to_tensor(mel)).numpy()

    def transcribe(self, waves: np.ndarray) -> list[str]:
        """[B, F * 1280] -> the most likely characters of each, repeats and blanks removed."""
        mel = features.compress(np.abs(features.stft(waves)) @ features.mel_matrix())
        with paddle.no_grad():
            best = self(paddle.to_tensor(mel)).argmax(axis=-1).numpy()
        texts = []
        for row in best:
            kept = row[np.insert(row[1:] != row[:-1], 0, True)]
            texts.append("".join(self.alphabet[i - 1] for i in kept if i > 0))
        return texts


def train_recogniser(recordings: Recordings, transcripts: Sequence[str], budget: Budget) -> SpeechRecogniser:
    """CTC on whole recordings with warped throats; one transcript a recording."""
    alphabet = "".join(sorted(set("".join(transcripts))))
    rng = np.random.default_rng([budget.seed, 1])
    network = SpeechRecogniser(alphabet)
    initialise(network, rng)
    update = optimiser(network, budget)
    targets = [np.array([1 + alphabet.index(c) for c in text], np.int32) for text in transcripts]
    order = Order(len(recordings), rng)
    for _ in steps_of(budget, "semantic teacher"):
        chosen = order.draw(budget.batch)
        mel = warped_mel(recordings.whole(chosen), rng.choice(WARPS, budget.batch))
        update(_ctc(network(paddle.to_tensor(mel)), [targets[i] for i in chosen]))
    network.eval()
    return network


def _ctc(scores: Tensor, targets: Sequence[np.ndarray]) -> Tensor:
    """Mean CTC loss a character of [B, L, 1 + V] scores."""
    lengths = np.array([len(target) for target in targets], np.int64)
    labels = np.zeros((len(targets), lengths.max()), np.int32)
    for row, target in enumerate(targets):
        labels[row, : len(target)] = target
    steps_seen = paddle.full([len(targets)], scores.shape[1], "int64")
    inputs = (scores.transpose([1, 0, 2]), paddle.to_tensor(labels), steps_seen, paddle.to_tensor(lengths))
    return F.ctc_loss(*inputs, reduction="mean")
