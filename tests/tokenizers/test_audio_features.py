"""The front end: framing, transforms, compression."""

from __future__ import annotations

import numpy as np
import pytest

from ernie5.tokenizers import audio_features as features


@pytest.fixture
def wave() -> np.ndarray:
    time = np.arange(4 * features.FRAME) / features.SAMPLE_RATE
    return (0.5 * np.sin(2 * np.pi * 440 * time) * np.hanning(len(time))).astype(np.float32)


def test_stft_matches_a_float64_transform(wave: np.ndarray) -> None:
    spectrum = features.stft(wave)
    hop = 13
    start = hop * features.HOP + features.HOP // 2 - features.WINDOW // 2
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(features.WINDOW) / features.WINDOW)
    expected = np.fft.rfft(wave[start : start + features.WINDOW].astype(np.float64) * window) * 4 / features.WINDOW
    assert spectrum.shape == (4 * features.HOPS_PER_FRAME, features.BINS)
    np.testing.assert_allclose(spectrum[hop], expected, atol=1e-6)


def test_inverse_stft_restores_the_wave(wave: np.ndarray) -> None:
    np.testing.assert_allclose(features.inverse_stft(features.stft(wave)), wave, atol=1e-6)


def test_full_scale_sine_has_magnitude_one() -> None:
    sine = np.sin(2 * np.pi * 1000 * np.arange(4 * features.FRAME) / features.SAMPLE_RATE).astype(np.float32)
    assert np.abs(features.stft(sine))[16].max() == pytest.approx(1.0, abs=0.01)


def test_compression_has_an_inverse_and_silence_is_zero() -> None:
    magnitude = np.float32([0, 1e-4, 1e-2, 1.0])
    assert features.compress(magnitude)[0] == 0
    np.testing.assert_allclose(features.expand(features.compress(magnitude)), magnitude, rtol=1e-4, atol=1e-9)


def test_mel_bands_are_means_and_cover_their_centres() -> None:
    matrix = features.mel_matrix()
    np.testing.assert_allclose(matrix.sum(axis=0), 1.0, rtol=1e-5)
    centres = (matrix * np.arange(features.BINS)[:, None]).sum(axis=0)
    assert np.all(np.diff(centres) >= 0) and centres[-1] > 230


def test_warp_moves_a_peak_by_its_factor() -> None:
    spectrum = np.zeros(features.BINS, np.float32)
    spectrum[100] = 1.0
    assert (spectrum @ features.warp_matrix(1.2)).argmax() == 120
    np.testing.assert_array_equal(spectrum[:-1] @ features.warp_matrix(1.0)[:-1, :-1], spectrum[:-1])


@pytest.mark.parametrize(
    ("wave", "message"),
    [
        (np.zeros(0, np.float32), "empty"),
        (np.zeros((10, 2), np.float32), "one channel"),
        (np.array([0.0, np.nan], np.float32), "NaN"),
        (np.zeros(10, np.int16), "full scale"),
    ],
)
def test_bad_waves_are_named(wave: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        features.check_wave(wave)


@pytest.mark.parametrize(("samples", "frames"), [(1, 1), (1280, 1), (1281, 2), (16000, 13)])
def test_frame_count(samples: int, frames: int) -> None:
    assert features.num_frames(samples) == frames
