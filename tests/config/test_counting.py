"""Parameter counts and FLOPs from the configuration against the built model and against sums done by hand."""

from __future__ import annotations

import dataclasses
import math

import pytest

from ernie5.config import PRESETS, ModelConfig, flops_per_token, model_preset, num_params, parameter_shapes
from ernie5.config.preset import PRESET_DIR


def built_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Parameter name -> shape, of the model declared without memory."""
    import paddle

    from ernie5.model import Ernie5Config, Ernie5ForCausalLM

    with paddle.LazyGuard():
        network = Ernie5ForCausalLM(Ernie5Config.from_model_config(model))
    return {name: tuple(parameter.shape) for name, parameter in network.named_parameters()}


VARIANTS = {
    "tiny": {},
    "no mtp, no shared expert": {"mtp_depth": 0, "shared_expert_intermediate_size": 0},
    "every size different": {
        "vocab_size": 301,
        "hidden_size": 48,
        "num_layers": 3,
        "num_heads": 6,
        "num_kv_heads": 3,
        "head_dim": 10,
        "num_experts": 7,
        "experts_per_token": 3,
        "expert_intermediate_size": 22,
        "shared_expert_intermediate_size": 14,
        "vision_bits": 9,
        "vision_num_scales": 5,
        "vision_cnn_dim": 20,
        "vision_vit_dim": 24,
        "merger_heads": 3,
        "audio_levels": 3,
        "audio_codebook_size": 37,
        "speaker_dim": 11,
    },
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_counts_equal_the_built_model(variant):
    model = dataclasses.replace(model_preset("tiny"), **VARIANTS[variant])
    shapes, count = built_shapes(model), num_params(model)
    assert parameter_shapes(model) == shapes
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    experts = sum(size for name, size in sizes.items() if ".experts." in name)
    assert count.total == sum(sizes.values()) == sum(count.parts.values())
    assert count.expert_total == experts
    assert count.expert_active * model.num_experts == experts * model.experts_per_token
    assert count.active == count.total - count.expert_total + count.expert_active


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_counts_as_it_is_built(name):
    model = model_preset(name)
    shapes = built_shapes(model)
    assert parameter_shapes(model) == shapes
    assert num_params(model).total == sum(math.prod(shape) for shape in shapes.values())


def test_presets_are_the_files_and_grow():
    assert {path.stem for path in PRESET_DIR.glob("*.yaml")} == set(PRESETS)
    totals = [num_params(model_preset(name)).total for name in PRESETS]
    assert totals == sorted(totals)


def test_nano_is_small_and_sparse():
    """Below a tenth of the expert parameters is at work, the shared expert counted or not."""
    nano = model_preset("nano")
    count, shared = num_params(nano), nano.shared_expert_intermediate_size
    routed, active = (n * nano.expert_intermediate_size for n in (nano.num_experts, nano.experts_per_token))
    assert count.total < 8e6 and count.expert_active_fraction < 0.10
    assert (active + shared) / (routed + shared) < 0.10


def test_small_meets_the_totals_of_the_report():
    small, count = model_preset("small"), num_params(model_preset("small"))
    assert (small.num_experts, small.experts_per_token, small.num_layers) == (64, 8, 16)
    assert count.active == pytest.approx(454e6, rel=0.005)
    assert 3.15e9 <= count.total < 3.25e9


def test_trillion_is_ultra_sparse():
    count = num_params(model_preset("ernie5-trillion"))
    assert count.total == pytest.approx(2.4e12, rel=0.01)
    assert count.expert_active_fraction < 0.03 and count.active_fraction < 0.03


@pytest.mark.parametrize("name", ["mini", "small", "ernie5-trillion"])
def test_rope_pattern_of_the_larger_presets_fills_every_band(name):
    model = model_preset(name)
    assert len(model.rope_pattern) == model.head_dim // 2
    assert model.rope_pattern.count("h") == model.rope_pattern.count("w")


def test_unknown_preset_lists_what_there_is():
    with pytest.raises(
        ValueError, match="unknown model preset 'big'; there are tiny, nano, mini, small, ernie5-trillion"
    ):
        model_preset("big")


def test_flops_by_hand():
    model = ModelConfig(
        vocab_size=100,
        hidden_size=8,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=4,
        num_experts=4,
        experts_per_token=2,
        expert_intermediate_size=6,
        shared_expert_intermediate_size=5,
        mtp_depth=0,
    )
    attention = 8 * 8 + 2 * 8 * 4 + 8 * 8
    scores = 2 * (2 * 4) * (11 + 1) / 2  # q.k and p.v with 6 keys on average
    layer = attention + scores + 8 * 4 + 2 * 3 * 8 * 6 + 3 * 8 * 5
    assert flops_per_token(model, 11) == 2 * (2 * layer + 100 * 8)
    with_mtp = flops_per_token(dataclasses.replace(model, mtp_depth=1), 11)
    assert with_mtp == 2 * (3 * layer + 2 * 100 * 8 + 2 * 8 * 8)
