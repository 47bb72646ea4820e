"""How much of a wave survives the codec: sample by sample, and in the spectrum.

The codec keeps magnitudes and makes up phases, so the waveform figure is near or below 0 dB even where speech is clear;
the spectral figure says what is heard. Both are stated, neither replaces the judge's accuracy.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ernie5.tokenizers import audio_features as features


@dataclass
class Reconstruction:
    waveform_snr: float  # dB, sample by sample
    spectral_snr: float  # dB, of log-compressed mel magnitudes


def audio_reconstruction_snr(real: np.ndarray, restored: np.ndarray) -> Reconstruction:
    """Compares float [n] waves at 16 kHz; the longer one is cut to the shorter."""
    length = min(len(real), len(restored))
    real, restored = real[:length], restored[:length]
    return Reconstruction(_snr(real, restored), _snr(_mel(real), _mel(restored)))


def _mel(wave: np.ndarray) -> np.ndarray:
    return features.compress(np.abs(features.stft(features.pad_to_frames(wave))) @ features.mel_matrix())


def _snr(signal: np.ndarray, other: np.ndarray) -> float:
    """10 log10 of the signal's energy over the difference's; 100 dB at most."""
    power = np.sum(np.square(signal, dtype=np.float64))
    noise = np.sum(np.square(signal.astype(np.float64) - other))
    return float(10.0 * np.log10(max(power, 1e-12) / max(noise, 1e-10 * power, 1e-12)))
