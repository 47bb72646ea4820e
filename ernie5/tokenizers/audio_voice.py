"""Pitch out of a wave, and a wave out of mel bands and pitch (a source-filter vocoder). numpy only.

n samples at 16 kHz, T hops (10 ms), M mel bands, bins of the STFT. Pitch is in Hz a hop; 0 where nothing vibrates.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from scipy.fft import irfft, rfft
from scipy.signal import fftconvolve, medfilt, resample_poly

from ernie5.tokenizers import audio_features as features

LOWEST, HIGHEST = 60.0, 400.0  # Hz; above 300 the octave below may win, lags being whole samples at 4 kHz
_DECIMATION = 4
_RATE = features.SAMPLE_RATE // _DECIMATION
_HOP = features.HOP // _DECIMATION
_WINDOW = 256  # samples at 4 kHz: 64 ms, four periods of the lowest pitch
_CLEAR = 0.5  # normalised autocorrelation from which a hop counts as voiced
_NEAR_BEST = 0.85  # of the highest peak: the shortest such lag is the period, longer ones are its multiples
_AUDIBLE = 0.02  # of the recording's loudest hop
_SMOOTH = 9  # mel bands over which the source's own colour is measured


def pitch(wave: np.ndarray) -> np.ndarray:
    """float32 [F * 1280] -> float32 [T]: autocorrelation of 64 ms windows, the shortest of the near-best lags.

    A median over 50 ms removes single hops that disagree with their neighbours.
    """
    slow = resample_poly(wave, 1, _DECIMATION).astype(np.float32)
    margin = (_WINDOW - _HOP) // 2
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(slow, (margin, margin)), _WINDOW)[::_HOP]
    hann = np.hanning(_WINDOW).astype(np.float32)
    correlation = _autocorrelation((windows - windows.mean(1, keepdims=True)) * hann)
    power = correlation[:, :1]
    own = _autocorrelation(hann[None])
    correlation = correlation / np.maximum(power, 1e-12) / (own / own[:, :1])
    first, last = int(_RATE / HIGHEST), int(np.ceil(_RATE / LOWEST))
    left, here, right = (correlation[:, first + shift : last + 1 + shift] for shift in (-1, 0, 1))
    bend = np.maximum(2 * here - left - right, 1e-6)  # a parabola through three lags: its top lies between them
    height = np.where((here >= left) & (here > right), here + (left - right) ** 2 / (8 * bend), -1.0)
    best = height.max(axis=1)
    chosen = (height >= _NEAR_BEST * best[:, None]).argmax(axis=1)
    rows = np.arange(len(chosen))
    lag = first + chosen + ((right - left) / (2 * bend))[rows, chosen]
    voiced = (best > _CLEAR) & (power[:, 0] > _AUDIBLE**2 * power.max())
    hertz = np.where(voiced, _RATE / lag, 0.0)
    return medfilt(hertz, 5).astype(np.float32)


def _autocorrelation(windows: np.ndarray) -> np.ndarray:
    """[T, W] -> [T, W / 2]."""
    spectrum = rfft(windows, 2 * _WINDOW, axis=1)
    return irfft(spectrum.real**2 + spectrum.imag**2, axis=1)[:, : _WINDOW // 2]


def synthesise(mel: np.ndarray, hertz: np.ndarray, seed: int = 0) -> np.ndarray:
    """Mel magnitudes float32 [T, M] and pitch [T] -> float32 [T * 160].

    Pulses at the pitch where there is one and noise elsewhere, coloured so that their mel bands become ``mel``.
    """
    source = features.stft(_source(hertz, np.random.default_rng(seed)))
    colour = np.abs(source) @ features.mel_matrix() @ _band_average() + 1e-4
    gain = mel / colour @ _mel_to_bins()
    return features.inverse_stft(source * gain).astype(np.float32)


def _source(hertz: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """[T] -> float32 [T * 160] of unit power: a pulse whenever the phase completes a turn, noise where pitch is 0."""
    voiced = hertz > 0
    if voiced.any():  # glide over unvoiced stretches, so that a phase never jumps
        hops = np.arange(len(hertz))
        hertz = np.interp(hops, hops[voiced], hertz[voiced])
    centres = (np.arange(len(hertz)) + 0.5) * features.HOP
    samples = np.arange(len(hertz) * features.HOP)
    step = np.interp(samples, centres, hertz) / features.SAMPLE_RATE
    turns = np.floor(np.cumsum(step)).astype(int)
    starts = np.nonzero(np.diff(turns, prepend=0))[0]
    pulses = np.zeros(len(samples))
    pulses[starts] = 1.0 / np.sqrt(np.maximum(step[starts], 1e-6))
    pulses = fftconvolve(pulses, _chirp())[: len(pulses)]
    share = np.interp(samples, centres, voiced.astype(float))
    noise = rng.standard_normal(len(samples))
    return (np.sqrt(share) * pulses + np.sqrt(1.0 - share) * noise).astype(np.float32)


@lru_cache(maxsize=1)
def _chirp(length: int = 128) -> np.ndarray:
    """float [128]: a pulse whose frequencies arrive one after the other within 8 ms; lower peaks, the same colour."""
    bins = np.arange(length // 2 + 1)
    return irfft(np.exp(-1j * np.pi * bins**2 / (length // 2)), length)


@lru_cache(maxsize=1)
def _mel_to_bins() -> np.ndarray:
    """float32 [M, bins]: linear interpolation between band centres, constant beyond the outer ones."""
    matrix = features.mel_matrix()
    centres = np.arange(features.BINS) @ matrix
    return np.stack([np.interp(np.arange(features.BINS), centres, row) for row in np.eye(len(centres))]).astype(
        np.float32
    )


@lru_cache(maxsize=1)
def _band_average() -> np.ndarray:
    """float32 [M, M]: each band's mean over its neighbours."""
    near = np.abs(np.subtract.outer(np.arange(features.MELS), np.arange(features.MELS))) <= _SMOOTH // 2
    return (near / near.sum(axis=0)).astype(np.float32)
