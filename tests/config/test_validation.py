"""Contradictions between keys, and the table of single-value bounds."""

from __future__ import annotations

import dataclasses
from typing import Any, get_type_hints

import pytest

from ernie5.config import Config, ModelConfig, validate, validate_model
from ernie5.config.validation import RANGES, vision_positions


def changed(changes: dict[str, Any]) -> Config:
    config = Config()
    for dotted, value in changes.items():
        *sections, name = dotted.split(".")
        target = config
        for section in sections:
            target = getattr(target, section)
        setattr(target, name, value)
    return config


def numeric_fields(cls: type, prefix: str = "") -> set[str]:
    found = set()
    for name, kind in get_type_hints(cls).items():
        if dataclasses.is_dataclass(kind):
            found |= numeric_fields(kind, f"{prefix}{name}.")
        elif kind in (int, float):
            found.add(f"{prefix}{name}")
    return found


def test_every_number_of_the_schema_has_bounds():
    assert set(RANGES) == numeric_fields(Config)


def test_defaults_are_valid():
    validate(Config())
    validate_model(ModelConfig())


@pytest.mark.parametrize("name", sorted(RANGES))
def test_a_value_below_its_bound_is_named(name):
    with pytest.raises(ValueError, match=rf"^config: {name} is -1; it must be "):
        validate(changed({name: -1}))


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"model.num_kv_heads": 3}, "model.num_heads = 4 is not a multiple of model.num_kv_heads = 3"),
        ({"model.head_dim": 33}, "model.head_dim = 33 is odd"),
        ({"model.rope_pattern": "hwx"}, "model.rope_pattern = 'hwx'"),
        ({"model.rope_pattern": ""}, "model.rope_pattern = ''"),
        ({"model.rope_pattern": "hwt" * 6}, "model.rope_pattern has 18 letters .* only 16 bands"),
        ({"model.experts_per_token": 33}, "model.experts_per_token = 33 is above model.num_experts = 32"),
        ({"model.router_activation": "relu"}, "model.router_activation = 'relu' is unknown"),
        (
            {"model.audio_levels": 7, "tokenizers.audio.levels": 7},
            "model.audio_levels = 7 is more than .*num_layers = 6",
        ),
        ({"model.merger_heads": 5}, "model.vision_vit_dim = 48 is not a multiple of model.merger_heads = 5"),
        ({"model.vocab_size": 1024}, "model.vocab_size = 1024 but tokenizers.text.vocab_size = 2048"),
        ({"tokenizers.vision.bits": [8]}, r"model.vision_bits = 16 but tokenizers.vision.bits \(last\) = 8"),
        ({"model.vision_num_scales": 3}, r"model.vision_num_scales = 3 but tokenizers.vision.scales \(number of\) = 4"),
        ({"tokenizers.vision.channels": 40}, "model.vision_cnn_dim = 48 but tokenizers.vision.channels = 40"),
        ({"tokenizers.vision.vit_dim": 64}, "model.vision_vit_dim = 48 but tokenizers.vision.vit_dim = 64"),
        ({"tokenizers.audio.levels": 2}, "model.audio_levels = 4 but tokenizers.audio.levels = 2"),
        (
            {"tokenizers.audio.codebook_size": 9},
            "model.audio_codebook_size = 256 but tokenizers.audio.codebook_size = 9",
        ),
        ({"model.speaker_dim": 16}, "model.speaker_dim = 16 but tokenizers.audio.speaker_dim = 32"),
        ({"tokenizers.vision.scales": [1, 2, 2, 4]}, "tokenizers.vision.scales = .* must be a growing list"),
        ({"tokenizers.vision.bits": []}, r"tokenizers.vision.bits = \[\] must be a growing list"),
        ({"tokenizers.vision.scales": [1, 2, 3, 5]}, "scales ends with 5, but image_size / spatial_stride = 32 / 8"),
        ({"tokenizers.vision.image_size": 36}, "scales ends with 4, but image_size / spatial_stride = 36 / 8"),
        ({"tokenizers.vision.frames": 4}, "frames = 4 is not 1 . a multiple of temporal_stride = 2"),
        ({"tokenizers.vision.vit_patch": 5}, "image_size = 32 is not a multiple of 2 x vit_patch = 10"),
        ({"tokenizers.vision.vit_heads": 5}, "vit_dim = 48 is not a multiple of vit_heads = 5"),
        (
            {"model.max_sequence_length": 90},
            "max_sequence_length = 90 cannot hold one clip: 5 frames .* take 94 positions",
        ),
        ({"tokenizers.audio.sample_rate": 22050}, "tokenizers.audio.sample_rate is 22050; .* built for 16000"),
        ({"tokenizers.audio.frame_ms": 40}, "tokenizers.audio.frame_ms is 40; .* built for 80"),
        ({"tokenizers.vision.spatial_stride": 16}, "tokenizers.vision.spatial_stride is 16; .* built for 8"),
        ({"data.on_bad_line": "ignore"}, "data.on_bad_line = 'ignore' is unknown"),
        ({"data.mixture": {"text": -1.0}}, "data.mixture .* has a negative share"),
        ({"data.mixture": {"text": 0.0}}, "data.mixture .* draws nothing"),
        ({"trainer.schedule": "linear"}, "trainer.schedule = 'linear' is unknown"),
        ({"trainer.max_steps": 10}, "trainer.warmup_steps = 50 is more than trainer.max_steps = 10"),
        ({"trainer.modality_weight_min": 3.0}, "trainer.modality_weight_min = 3.0 is above"),
        ({"trainer.modality_weights": {"smell": 1.0}}, "trainer.modality_weights names 'smell'"),
        ({"trainer.modality_weights": {"text": -1.0}}, "trainer.modality_weights.text is -1.0"),
        ({"trainer.batch_ramp": [[0]]}, "trainer.batch_ramp = .* list of .step, accumulation. pairs"),
        ({"trainer.batch_ramp": [[5, 1], [5, 2]]}, "trainer.batch_ramp = .*: the steps must grow"),
        ({"trainer.bits_schedule": [[0, 12], [9, 16]]}, "trainer.bits_schedule uses 12 bits"),
        ({"trainer.bits_schedule": [[5, 16]]}, "trainer.bits_schedule begins at step 5"),
        ({"trainer.bits_schedule": [[0, 8]]}, "trainer.bits_schedule ends with 8 bits; it must end with 16"),
        ({"run.dir": ""}, "run.dir is empty"),
        ({"parallel.tensor": 3}, "parallel.tensor = 3 does not divide model.num_heads = 4"),
        ({"parallel.expert": 5}, "parallel.expert = 5 does not divide model.num_experts = 32"),
        ({"parallel.pipeline": 4}, "pipeline x virtual_stages = 4 does not divide model.num_layers = 6"),
        ({"parallel.pipeline": 2}, "gradient_accumulation .* is 1 at the least; a pipeline of 2 stages .* needs 2"),
        ({"parallel.virtual_stages": 2}, "parallel.virtual_stages = 2 without a pipeline"),
        ({"parallel.context": 5}, "context x tensor = 5 does not divide model.max_sequence_length = 256"),
        ({"parallel.dispatcher": "mail"}, "parallel.dispatcher = 'mail' is unknown"),
        ({"parallel.dispatcher": "local", "parallel.expert": 2}, "dispatcher = 'local' with parallel.expert = 2"),
    ],
)
def test_contradictions_are_spelled_out(changes, wanted):
    with pytest.raises(ValueError, match=wanted):
        validate(changed(changes))


def test_several_contradictions_are_all_told_one_line_each():
    with pytest.raises(ValueError) as raised:
        validate(changed({"model.speaker_dim": 16, "data.on_bad_line": "x"}), "mine.yaml")
    lines = str(raised.value).splitlines()
    assert len(lines) == 2 and all(line.startswith("mine.yaml: ") for line in lines)


def test_positions_of_an_image_and_a_clip():
    assert vision_positions([1, 2, 3, 4], 1) == 2 + 4 + 9 + 16 + 1
    assert vision_positions([1, 2, 3, 4], 3) == 2 + 3 * 30
