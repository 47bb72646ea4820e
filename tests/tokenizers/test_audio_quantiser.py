"""Residual vector quantisation and the losses around it, against float64 references."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

from ernie5.tokenizers.audio_codec import distillation_loss
from ernie5.tokenizers.audio_quantiser import ResidualQuantiser

N, D, P, LEVELS, SIZE = 40, 12, 5, 3, 16


@pytest.fixture
def quantiser() -> ResidualQuantiser:
    rng = np.random.default_rng(0)
    quantiser = ResidualQuantiser(D, P, LEVELS, SIZE)
    for parameter in quantiser.parameters():
        parameter.set_value(rng.standard_normal(parameter.shape).astype(np.float32) * 0.4)
    for level in quantiser.levels:
        level.codes.set_value(rng.standard_normal(level.codes.shape).astype(np.float32))
    return quantiser


def _latent(seed: int = 1, count: int = N) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, D)).astype(np.float32)


def _reference(quantiser: ResidualQuantiser, latent: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    residual, total, codes = latent.astype(np.float64), np.zeros(latent.shape), []
    for number, level in enumerate(quantiser.levels):
        book = level.codes.numpy().astype(np.float64)
        point = residual
        if number == 0:
            point = residual @ level.project_in.weight.numpy() + level.project_in.bias.numpy()
        index = ((point[:, None] - book[None]) ** 2).sum(-1).argmin(1)
        out = book[index]
        if number == 0:
            out = out @ level.project_out.weight.numpy() + level.project_out.bias.numpy()
        residual, total = residual - out, total + out
        codes.append(index)
    return np.stack(codes, 1), total


def test_codes_and_sum_match_a_float64_reference(quantiser: ResidualQuantiser) -> None:
    latent = _latent()
    codes, total = _reference(quantiser, latent)
    result = quantiser(paddle.to_tensor(latent))
    np.testing.assert_array_equal(result.codes.numpy(), codes)
    np.testing.assert_allclose(result.total.numpy(), total, atol=1e-5)
    np.testing.assert_allclose(quantiser.look_up(result.codes).numpy(), total, atol=1e-5)


def test_gradient_passes_straight_through(quantiser: ResidualQuantiser) -> None:
    latent = paddle.to_tensor(_latent(), stop_gradient=False)
    weights = np.random.default_rng(2).standard_normal((N, D)).astype(np.float32)
    (quantiser(latent).total * paddle.to_tensor(weights)).sum().backward()
    np.testing.assert_allclose(latent.grad.numpy(), weights, atol=1e-5)


def test_dropped_levels_add_nothing(quantiser: ResidualQuantiser) -> None:
    latent = paddle.to_tensor(_latent())
    kept = paddle.to_tensor(np.arange(N) % LEVELS + 1)
    result = quantiser(latent, kept)
    partial = np.zeros((N, D), np.float32)
    for number, level in enumerate(quantiser.levels):
        partial += level.look_up(result.codes[:, number]).numpy() * (kept.numpy() > number)[:, None]
    np.testing.assert_allclose(result.total.numpy(), partial, atol=1e-5)


def test_commitment_is_the_distance_to_the_codes(quantiser: ResidualQuantiser) -> None:
    quantiser.levels = quantiser.levels[1:]  # plain levels only
    latent = _latent()
    codes, total = [], latent.astype(np.float64)
    distances = []
    for level in quantiser.levels:
        book = level.codes.numpy().astype(np.float64)
        index = ((total[:, None] - book[None]) ** 2).sum(-1).argmin(1)
        distances.append(((total - book[index]) ** 2).mean())
        total = total - book[index]
        codes.append(index)
    found = float(quantiser(paddle.to_tensor(latent)).commitment)
    assert found == pytest.approx(np.mean(distances), rel=1e-5)


def test_kmeans_start_and_ema_bring_codes_to_the_data(quantiser: ResidualQuantiser) -> None:
    rng = np.random.default_rng(3)
    latent = paddle.to_tensor(_latent(4, 400))
    before = float(((quantiser(latent).total - latent) ** 2).mean())
    quantiser.start_from(latent, rng)
    started = float(((quantiser(latent).total - latent) ** 2).mean())
    level = quantiser.levels[1]
    residual = latent - quantiser.levels[0](latent)[0]
    for _ in range(30):
        _, index, distance, point = level(residual)
        level.train_with(point.detach(), index, rng)
    assert started < 0.7 * before
    assert float(level(residual)[2]) <= float(distance) * 1.01


def test_dead_codes_are_revived(quantiser: ResidualQuantiser) -> None:
    level = quantiser.levels[1]
    level.codes.set_value(np.full(level.codes.shape, 50.0, np.float32))
    level.total.set_value(np.full(level.codes.shape, 50.0, np.float32))
    residual, rng = paddle.to_tensor(_latent(5, 300)), np.random.default_rng(6)
    for _ in range(400):
        _, index, _, point = level(residual)
        level.train_with(point.detach(), index, rng)
    assert len(np.unique(level(residual)[1].numpy())) == SIZE


def test_distillation_loss_matches_its_formula() -> None:
    rng = np.random.default_rng(7)
    student, teacher = rng.standard_normal((2, 3, 9, 4)).astype(np.float32)
    cosine = (student * teacher).sum(1) / np.linalg.norm(student, axis=1) / np.linalg.norm(teacher, axis=1)
    expected = np.log1p(np.exp(-cosine.astype(np.float64))).mean()
    found = float(distillation_loss(paddle.to_tensor(student), paddle.to_tensor(teacher)))
    assert found == pytest.approx(expected, rel=1e-5)
    perfect = float(distillation_loss(paddle.to_tensor(teacher), paddle.to_tensor(3 * teacher)))
    assert perfect == pytest.approx(np.log(1 + np.exp(-1)), rel=1e-4)
