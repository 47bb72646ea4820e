"""Pitch tracking and the vocoder, on tones whose pitch is known."""

from __future__ import annotations

import numpy as np
import pytest

from ernie5.tokenizers import audio_features as features
from ernie5.tokenizers.audio_voice import pitch, synthesise

FRAMES = 8


def _buzz(hertz: float) -> np.ndarray:
    """Twelve harmonics of equal strength."""
    time = np.arange(FRAMES * features.FRAME) / features.SAMPLE_RATE
    return (0.05 * sum(np.cos(2 * np.pi * hertz * k * time + k) for k in range(1, 13))).astype(np.float32)


@pytest.mark.parametrize("hertz", [75.0, 110.0, 173.0, 260.0, 300.0])
def test_pitch_of_a_buzz(hertz: float) -> None:
    found = pitch(_buzz(hertz))
    assert found.shape == (FRAMES * features.HOPS_PER_FRAME,)
    np.testing.assert_allclose(found[8:-8], hertz, rtol=0.02)


def test_noise_and_silence_have_no_pitch() -> None:
    noise = np.random.default_rng(0).standard_normal(FRAMES * features.FRAME).astype(np.float32)
    assert (pitch(noise) > 0).mean() < 0.1
    assert not pitch(0 * noise).any()


@pytest.mark.parametrize("hertz", [0.0, 90.0, 220.0])
def test_what_is_synthesised_has_the_mel_bands_and_the_pitch_asked_for(hertz: float) -> None:
    bands = np.arange(features.MELS)
    mel = np.tile(0.01 + 0.1 * np.exp(-(((bands - 20) / 8.0) ** 2)), (FRAMES * features.HOPS_PER_FRAME, 1))
    wave = synthesise(mel.astype(np.float32), np.full(len(mel), hertz, np.float32))
    assert wave.shape == (FRAMES * features.FRAME,)
    made = (np.abs(features.stft(wave)) @ features.mel_matrix())[8:-8].mean(axis=0)
    smooth = np.convolve(made / mel[0], np.ones(9) / 9, "valid")
    assert np.median(smooth) == pytest.approx(1.0, abs=0.15)
    np.testing.assert_allclose(smooth, 1.0, atol=0.6)  # single harmonics stand out of the narrow low bands
    found = pitch(wave)[8:-8]
    if hertz:
        assert np.median(found) == pytest.approx(hertz, rel=0.03)
    else:
        assert (found > 0).mean() < 0.1


def test_synthesis_is_deterministic_and_silence_is_silent() -> None:
    mel, hertz = np.full((8, features.MELS), 0.05, np.float32), np.float32([0, 0, 100, 100, 110, 120, 0, 0])
    np.testing.assert_array_equal(synthesise(mel, hertz), synthesise(mel, hertz))
    assert not synthesise(0 * mel, hertz).any()
