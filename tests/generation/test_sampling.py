from __future__ import annotations

import numpy as np
import pytest

from ernie5.generation.sampling import Sampler, Sampling, class_probabilities, guide, masked

LOGITS = np.log(np.array([[0.5, 0.3, 0.15, 0.05]], np.float32))


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(), [0.5, 0.3, 0.15, 0.05]),
        (Sampling(temperature=0.5), np.array([0.25, 0.09, 0.0225, 0.0025]) / 0.365),
        (Sampling(top_k=2), [0.625, 0.375, 0, 0]),
        (Sampling(top_p=0.6), [0.625, 0.375, 0, 0]),
        (Sampling(top_p=0.5), [1, 0, 0, 0]),
        (Sampling(top_p=1e-6), [1, 0, 0, 0]),
        (Sampling(top_k=3, top_p=0.7), [0.625, 0.375, 0, 0]),
        (Sampling(top_k=9), [0.5, 0.3, 0.15, 0.05]),
    ],
)
def test_class_probabilities(sampling: Sampling, expected: list[float]) -> None:
    np.testing.assert_allclose(class_probabilities(LOGITS, sampling)[0], expected, atol=1e-6)


@pytest.mark.parametrize("sampling", [Sampling(top_k=7), Sampling(top_p=0.6), Sampling(top_k=40, top_p=0.9)])
def test_equals_at_the_border_are_cut_as_by_a_stable_ranking(sampling: Sampling) -> None:
    logits = np.round(np.random.default_rng(0).normal(0, 2, (5, 300)))
    whole = class_probabilities(logits, Sampling())
    found = class_probabilities(logits, sampling)
    for row, kept in zip(whole, found, strict=True):
        order = np.argsort(-row, kind="stable")
        before = np.cumsum(row[order]) - row[order]
        expected = order[: sampling.top_k or None][before[: sampling.top_k or None] < sampling.top_p]
        assert set(np.flatnonzero(kept)) == set(expected)


def test_drawn_classes_follow_the_probabilities() -> None:
    drawn = Sampler(Sampling(), 0, 4000).classes(np.repeat(LOGITS, 4000, 0))
    np.testing.assert_allclose(np.bincount(drawn, minlength=4) / 4000, [0.5, 0.3, 0.15, 0.05], atol=0.03)


def test_impossible_classes_are_never_drawn() -> None:
    logits = np.zeros((500, 4), np.float32)
    logits[:, [0, 3]] = -np.inf
    assert set(Sampler(Sampling(temperature=3.0), 0, 500).classes(logits)) == {1, 2}


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(0), Sampling(top_k=1), Sampling(top_p=0.1), Sampling(3.0, top_k=2, top_p=0.9)]
)
def test_a_mask_comes_before_every_other_choice(sampling: Sampling) -> None:
    """The likeliest that is allowed is drawn, though one forbidden is likelier; what lies beyond the mask is not."""
    logits = np.repeat(np.array([[9.0, 0.0, 5.0, 9.0]], np.float32), 2, 0)
    allowed = np.array([[False, True, False], [False, False, True]])
    kept = masked(logits, allowed)
    assert np.isneginf(kept).tolist() == [[True, False, True, True], [True, True, False, True]]
    assert Sampler(sampling, 0, 2).classes(kept).tolist() == [1, 2]
    assert logits[0].tolist() == [9, 0, 5, 9]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_bits_follow_their_own_odds(temperature: float) -> None:
    logits = np.zeros((2, 3000, 3, 2), np.float32)
    logits[..., 1] = [-2.0, 0.0, 1.0]
    drawn = Sampler(Sampling(temperature), 1, 2).bits(logits).mean((0, 1))
    np.testing.assert_allclose(drawn, 1 / (1 + np.exp(-np.array([-2.0, 0.0, 1.0]) / temperature)), atol=0.03)


def test_zero_temperature_is_the_likeliest() -> None:
    sampler = Sampler(Sampling(temperature=0), 0, 1)
    assert sampler.classes(LOGITS[:, ::-1]).tolist() == [3]
    assert sampler.bits(np.array([[[[0.0, 0.1], [0.1, 0.0]]]])).tolist() == [[[1, 0]]]


def test_a_prompt_draws_the_same_whatever_its_neighbours() -> None:
    logits = np.random.default_rng(0).normal(size=(3, 50)).astype(np.float32)
    many, few = Sampler(Sampling(), 5, 3), Sampler(Sampling(), 5, 1)
    for _ in range(5):
        assert many.classes(logits)[0] == few.classes(logits[:1])[0]


@pytest.mark.parametrize("guidance", [0.0, 1.0, 2.5])
def test_guidance(guidance: float) -> None:
    conditioned, free = np.random.default_rng(0).normal(size=(2, 3, 4))
    np.testing.assert_allclose(
        guide(np.concatenate([conditioned, free]), guidance), free + guidance * (conditioned - free)
    )


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}]
)
def test_bad_options(wrong: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Sampling(**wrong)
