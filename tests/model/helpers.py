"""A tiny model and rows of every modality, made from random codes."""

from __future__ import annotations

import numpy as np
import paddle

from ernie5.model import Ernie5Config, Ernie5ForCausalLM
from ernie5.sequence.layout import lay_out
from ernie5.sequence.packing import collate, pack
from ernie5.sequence.parts import AudioCodes, Sample, SpeakerEmbedding, Text, VisionFeatures, VisionLatent
from ernie5.sequence.spec import LayoutSpec

SPEC = LayoutSpec(
    length=96, scales=(1, 2, 3), bits=6, max_bits=6, levels=2, codebook_size=12, speaker_dim=5, cnn_dim=8, vit_dim=8
)


class Letters:
    """One id a letter; enough of a text tokenizer for the layout."""

    def encode(self, text: str, dropout: float = 0.0, rng: np.random.Generator | None = None) -> list[int]:
        return [16 + ord(letter) % 40 for letter in text]


def tiny_config(**changes: object) -> Ernie5Config:
    values = {
        "vocab_size": 64,
        "hidden_size": 24,
        "num_layers": 3,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "num_experts": 8,
        "experts_per_token": 2,
        "expert_intermediate_size": 12,
        "shared_expert_intermediate_size": 8,
        "rope_base": 1.0e4,
        "initializer_range": 0.2,
        "max_sequence_length": SPEC.length,
        "vision_bits": SPEC.max_bits,
        "vision_num_scales": len(SPEC.scales),
        "vision_cnn_dim": SPEC.cnn_dim,
        "vision_vit_dim": SPEC.vit_dim,
        "merger_heads": 2,
        "audio_levels": SPEC.levels,
        "audio_codebook_size": SPEC.codebook_size,
        "speaker_dim": SPEC.speaker_dim,
    }
    return Ernie5Config(**{**values, **changes})


def tiny_model(dtype: str = "float64", **changes: object) -> Ernie5ForCausalLM:
    before = paddle.get_default_dtype()
    paddle.set_default_dtype(dtype)
    try:
        return Ernie5ForCausalLM(tiny_config(**changes))
    finally:
        paddle.set_default_dtype(before)


def latent(rng: np.random.Generator, frames: int) -> VisionLatent:
    side = SPEC.scales[-1]
    return VisionLatent({SPEC.bits: rng.standard_normal((frames, side, side, SPEC.bits))}, video=frames > 1)


def samples(rng: np.random.Generator) -> dict[str, Sample]:
    def features(frames: int) -> VisionFeatures:
        k = 4 if frames == 1 else 16
        cnn, vit = rng.standard_normal((2, frames * 4, k, 8))
        return VisionFeatures(cnn, vit, (frames, 2, 2), video=frames > 1)

    def codes(count: int, generate: bool) -> AudioCodes:
        return AudioCodes(rng.integers(0, SPEC.codebook_size, (count, SPEC.levels)), generate)

    speaker = SpeakerEmbedding(rng.standard_normal(SPEC.speaker_dim))
    return {
        "text": Sample([Text("to be or not")]),
        "image_gen": Sample([Text("a red one"), latent(rng, 1)]),
        "video_gen": Sample([Text("moves"), latent(rng, 3)]),
        "image_und": Sample([features(1), Text("what?", loss=False), Text("seven")]),
        "video_und": Sample([features(2), Text("left")]),
        "audio_und": Sample([codes(5, False), Text("nine")]),
        "audio_gen": Sample([Text("say"), speaker, codes(6, True)]),
    }


def batch_of(rows: list[list[Sample]], length: int = SPEC.length, dtype: str = "float64") -> dict[str, paddle.Tensor]:
    """Each list of samples becomes one packed row."""
    packed = [pack([lay_out(sample, Letters(), SPEC) for sample in row], length) for row in rows]
    arrays = collate(packed)
    return {
        name: paddle.to_tensor(value.astype(dtype) if value.dtype.kind == "f" else value)
        for name, value in arrays.items()
    }
