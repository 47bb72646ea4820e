"""A tiny model with random weights, and tokenizers that code by arithmetic instead of networks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import paddle

from ernie5.config import ModelConfig
from ernie5.model import Ernie5Config, Ernie5ForCausalLM
from ernie5.sequence.parts import (
    Audio,
    AudioCodes,
    Image,
    Sample,
    Speaker,
    SpeakerEmbedding,
    Text,
    Video,
    VisionFeatures,
)
from ernie5.sequence.spec import LayoutSpec
from ernie5.sequence.vocabulary import NUM_SPECIALS
from ernie5.tokenizers.continuations import Continuations
from tests.sequence.samples import Letters

MODEL = ModelConfig(
    vocab_size=512,
    hidden_size=32,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    num_experts=6,
    experts_per_token=2,
    expert_intermediate_size=16,
    shared_expert_intermediate_size=16,
    max_sequence_length=160,
    vision_bits=8,
    vision_num_scales=3,
    vision_cnn_dim=12,
    vision_vit_dim=12,
    merger_heads=2,
    audio_levels=3,
    audio_codebook_size=20,
    speaker_dim=6,
    initializer_range=0.3,  # large enough that every position changes every later one visibly
)
SCALES = [1, 2, 3]
SPEC = LayoutSpec.of_model(MODEL, SCALES, [4, 8])
LOW_BITS = replace(SPEC, bits=4)


def tiny_model(seed: int = 0) -> Ernie5ForCausalLM:
    model = Ernie5ForCausalLM(Ernie5Config.from_model_config(MODEL), seed=seed)
    rng = np.random.default_rng(seed)
    for parameter in model.parameters():  # heads and biases may start at zero, which would hide errors
        if not parameter.numpy().any():
            parameter.set_value(paddle.to_tensor(rng.normal(0, 0.3, parameter.shape).astype(np.float32)))
    model.eval()
    return model


class Vision:
    """2 raw frames a latent frame after the first; 4 pixels a latent cell."""

    config = SimpleNamespace(scales=SCALES, frames=3)
    bits_series = (4, 8)

    def num_latent_frames(self, frames: int) -> int:
        return 1 + (frames - 1 + 1) // 2

    def num_frames(self, latent_frames: int) -> int:
        return 1 + 2 * (latent_frames - 1)

    def encode(self, frames: np.ndarray, bits: int) -> np.ndarray:
        kept = frames[:, ::2, ::4, ::4, :1].astype(np.float32) / 255 - 0.5
        return kept * np.linspace(-1, 1, bits, dtype=np.float32) + 0.01

    def decode(self, quantised: np.ndarray, bits: int) -> np.ndarray:
        assert quantised.shape[-1] == bits
        grey = np.clip(127 + 100 * quantised.mean(-1, keepdims=True), 0, 255).astype(np.uint8)
        pixels = grey.repeat(4, axis=2).repeat(4, axis=3).repeat(3, axis=4)
        return np.concatenate([pixels[:, :1], pixels[:, 1:].repeat(2, axis=1)], axis=1)

    def features(self, frames: np.ndarray) -> VisionFeatures:
        video = len(frames) > 1
        shape = (4, 16 if video else 4, 12)
        values = np.resize(frames.astype(np.float32) / 255, shape)
        return VisionFeatures(values, values[::-1].copy(), (1, 2, 2), video)


class Words(Letters):
    """Every id a whole character, so that any may follow any."""

    continuations = Continuations([b""] * NUM_SPECIALS + [b"\0a"] * (Letters.vocab_size - NUM_SPECIALS))


class Sound:
    def decode(self, codes: np.ndarray) -> np.ndarray:
        assert codes.min() >= 0 and codes.max() < MODEL.audio_codebook_size
        return np.repeat(codes[:, 0] / 20, 1280).astype(np.float32)


class StandIns:
    text, vision, audio = Words(), Vision(), Sound()

    def encode_samples(self, samples: Sequence[Sample], progress: bool = True) -> list[Sample]:
        return [Sample([self._coded(part) for part in sample.parts]) for sample in samples]

    def _coded(self, part):
        if isinstance(part, Text):
            return part
        if isinstance(part, Image):
            return self.vision.features(part.pixels[None])
        if isinstance(part, Video):
            return self.vision.features(part.frames)
        if isinstance(part, Speaker):
            return SpeakerEmbedding(np.resize(part.wave, 6))
        assert isinstance(part, Audio)
        frames = -(-len(part.wave) // 1280)
        return AudioCodes((np.resize(np.abs(part.wave) * 19, (frames, 3))).astype(np.int64))
