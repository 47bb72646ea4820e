"""Quantiser and losses: straight-through gradients, values against float64, and games that can be won."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

from ernie5.config.schema import VisionTokenizerConfig
from ernie5.tokenizers.scales import ScalePyramid
from ernie5.tokenizers.vision_losses import Adversary, SemanticAlignment, reconstruction_loss
from ernie5.tokenizers.vision_quantiser import MultiScaleQuantiser, bit_entropy, sphere_code, unit_norm
from ernie5.tokenizers.vision_vit import CaptionWords


def test_quantiser_agrees_with_the_pyramid():
    pyramid = ScalePyramid([1, 2, 3, 4])
    latent = np.random.default_rng(0).normal(size=(3, 8, 16)).astype(np.float32)
    total = MultiScaleQuantiser(pyramid)(paddle.to_tensor(latent)).total.numpy()
    np.testing.assert_allclose(total.transpose(0, 2, 1), pyramid.decompose(latent.transpose(0, 2, 1)).total, atol=1e-5)


def test_gradient_passes_straight_through_the_code():
    latent = paddle.to_tensor(np.random.default_rng(1).normal(size=(2, 5, 1)).astype(np.float32), stop_gradient=False)
    weight = paddle.to_tensor(np.random.default_rng(2).normal(size=(2, 5, 1)).astype(np.float32))
    (MultiScaleQuantiser(ScalePyramid([1]))(latent).total * weight).sum().backward()
    x, w = latent.numpy().astype(np.float64)[..., 0], weight.numpy()[..., 0]
    norm = np.linalg.norm(x, axis=1, keepdims=True)
    wanted = w / norm - x * (w * x).sum(1, keepdims=True) / norm**3  # derivative of u = x/||x||
    np.testing.assert_allclose(latent.grad.numpy()[..., 0], wanted, atol=1e-5)


def test_commitment_pulls_latents_only():
    pyramid = ScalePyramid([1, 2])
    latent = np.random.default_rng(3).normal(size=(2, 4, 4)).astype(np.float32)
    found = float(MultiScaleQuantiser(pyramid)(paddle.to_tensor(latent)).commitment)
    residual, parts = latent.astype(np.float64), []
    for down, up in zip(pyramid.down, pyramid.up, strict=True):
        r = residual @ down.T
        u = r / np.linalg.norm(r, axis=1, keepdims=True)
        q = np.where(u > 0, 0.5, -0.5)
        parts.append(((u - q) ** 2).mean())
        residual = residual - q @ up.T
    assert found == pytest.approx(np.mean(parts), rel=1e-5)


@pytest.mark.parametrize("inverse_temperature", [1.0, 100.0])
def test_entropy_equals_reference(inverse_temperature):
    u = unit_norm(paddle.to_tensor(np.random.default_rng(4).normal(size=(6, 8, 5)).astype(np.float32)))
    p = 1 / (1 + np.exp(4 * u.numpy().astype(np.float64) / np.sqrt(8) * inverse_temperature))

    def entropy(p: np.ndarray) -> np.ndarray:
        p = np.clip(p, 1e-6, 1 - 1e-6)
        return -p * np.log(p) - (1 - p) * np.log(1 - p)

    wanted = (entropy(p).mean() - entropy(p.mean(axis=(0, 2))).mean()) / inverse_temperature
    assert float(bit_entropy(u, inverse_temperature)) == pytest.approx(wanted, rel=1e-3, abs=1e-6)


def test_entropy_prefers_certain_and_varied_bits():
    certain = np.sign(np.random.default_rng(5).normal(size=(64, 4, 1))).astype(np.float32) / 2
    stuck, unsure = np.full_like(certain, 0.5), 0.001 * certain
    values = [float(bit_entropy(paddle.to_tensor(u))) for u in (certain, stuck, unsure)]
    assert values[0] < values[1] and values[0] < values[2]


def test_sphere_code_is_a_corner():
    code = sphere_code(paddle.to_tensor(np.array([[0.1, -0.2, 0.0, 0.3]], np.float32)))
    np.testing.assert_allclose(code.numpy(), [[0.5, -0.5, -0.5, 0.5]])


def test_reconstruction_counts_colour_more_and_overshoot_hardly():
    pixels = paddle.zeros([1, 3, 4, 4])
    grey = paddle.full([1, 3, 4, 4], 0.3)
    tinted = grey * paddle.to_tensor([1.0, -1.0, 1.0]).reshape([1, 3, 1, 1])
    assert float(reconstruction_loss(tinted, pixels)) > 2 * float(reconstruction_loss(grey, pixels))
    white = paddle.ones([1, 3, 4, 4])
    assert float(reconstruction_loss(white * 1.5, white)) < 0.1 * float(reconstruction_loss(white * 0.5, white))


def test_semantic_loss_gives_gradients_and_falls():
    paddle.seed(0)
    config = VisionTokenizerConfig(channels=8, vit_dim=8)
    alignment = SemanticAlignment(config, 4)
    latent, features = paddle.randn([2, 4, 2, 2]), paddle.randn([2, 8, 4, 4])
    latent.stop_gradient = features.stop_gradient = False
    teacher = paddle.randn([2, 8, 4, 4])
    optimizer = paddle.optimizer.Adam(0.05, parameters=[*alignment.parameters(), latent, features])
    values = []
    for _ in range(40):
        loss = alignment(latent, features, teacher)
        loss.backward()
        assert np.abs(latent.grad.numpy()).max() > 0 and np.abs(features.grad.numpy()).max() > 0
        optimizer.step()
        optimizer.clear_grad()
        values.append(float(loss))
    assert values[-1] < 0.3 * values[0]


def test_adversary_learns_and_teaches():
    paddle.seed(0)
    adversary = Adversary(8, learning_rate=5e-3)
    rng = np.random.default_rng(0)
    real = paddle.to_tensor(np.sign(rng.normal(size=(8, 3, 16, 16))).astype(np.float32))
    drawn = paddle.to_tensor((0.1 * rng.normal(size=(8, 3, 16, 16))).astype(np.float32), stop_gradient=False)
    losses = [adversary.learn(real, drawn) for _ in range(40)]
    assert losses[-1] < 0.5 * losses[0] and adversary.mean_real > adversary.mean_drawn
    assert drawn.grad is None
    before = adversary.generator_loss(drawn)
    before.backward()
    better = drawn.detach() - 0.5 * paddle.sign(drawn.grad)
    assert float(adversary.generator_loss(better)) < float(before)


def test_lecam_anchors_scores():
    paddle.seed(0)
    adversary = Adversary(8, learning_rate=1e-3, lecam=1.0)
    plain = Adversary(8, learning_rate=1e-3, lecam=0.0)
    plain.discriminator.set_state_dict(adversary.discriminator.state_dict())
    adversary.mean_real = plain.mean_real = 50.0
    adversary.mean_drawn = plain.mean_drawn = -50.0
    pixels = paddle.randn([2, 3, 16, 16])
    gap = float(adversary.discriminator_loss(pixels, pixels)) - float(plain.discriminator_loss(pixels, pixels))
    assert 4000 < gap < 6000  # both scores are near 0: about 50^2 from either mean


def test_caption_words_tell_apart():
    captions = ["a small red car"] * 3 + ["a large red heart"] * 3 + ["a rare thing"]
    words = CaptionWords(captions)
    assert "a" not in words.words and "rare" not in words.words
    assert set(words.words) == {"small", "red", "car", "large", "heart"}
    np.testing.assert_array_equal(words.labels[:, words.words.index("red")], [1, 1, 1, 1, 1, 1, 0])
