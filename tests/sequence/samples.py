"""Random coded samples of every modality, for tests."""

from __future__ import annotations

import numpy as np

from ernie5.sequence.parts import AudioCodes, CodedPart, Sample, SpeakerEmbedding, Text, VisionFeatures, VisionLatent
from ernie5.sequence.spec import LayoutSpec


class Letters:
    """A text tokenizer of one id a character."""

    vocab_size = 216

    def encode(self, text: str, dropout: float = 0.0, rng: np.random.Generator | None = None) -> list[int]:
        return [16 + ord(character) % 200 for character in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(97 + token % 26) for token in ids)


def latent(rng: np.random.Generator, spec: LayoutSpec, frames: int = 1, video: bool | None = None) -> VisionLatent:
    side = spec.scales[-1]
    values = rng.normal(size=(frames, side, side, spec.bits)).astype(np.float32)
    return VisionLatent({spec.bits: values}, video=frames > 1 if video is None else video)


def features(rng: np.random.Generator, spec: LayoutSpec, frames: int = 1) -> VisionFeatures:
    grid = (frames, 2, 3)
    k = 4 if frames == 1 else 16
    shape = (frames * 6, k)
    cnn = rng.normal(size=(*shape, spec.cnn_dim)).astype(np.float32)
    return VisionFeatures(cnn, rng.normal(size=(*shape, spec.vit_dim)).astype(np.float32), grid, video=frames > 1)


def audio(rng: np.random.Generator, spec: LayoutSpec, frames: int, generate: bool) -> AudioCodes:
    return AudioCodes(rng.integers(0, spec.codebook_size, (frames, spec.levels)), generate)


def random_part(rng: np.random.Generator, spec: LayoutSpec) -> CodedPart:
    choice = int(rng.integers(7))
    if choice == 0:
        return latent(rng, spec)
    if choice == 1:
        return latent(rng, spec, frames=int(rng.integers(1, 5)), video=True)
    if choice == 2:
        return features(rng, spec, frames=int(rng.integers(1, 3)))
    if choice in (3, 4):
        return audio(rng, spec, int(rng.integers(1, 6)), generate=choice == 3)
    if choice == 5:
        return SpeakerEmbedding(rng.normal(size=spec.speaker_dim).astype(np.float32))
    return Text("abcdefgh"[: int(rng.integers(1, 8))], loss=bool(rng.integers(2)))


def random_sample(rng: np.random.Generator, spec: LayoutSpec, parts: int = 3) -> Sample:
    return Sample([random_part(rng, spec) for _ in range(parts)], task="random")
