"""Sound as magnitudes and back: framing, STFT, log compression, mel bands, frequency warping. numpy only.

n samples, F codec frames (80 ms), T = F * H hops (10 ms), H hops of one frame, B linear bins, M mel bands.
A hop's window is centred on the middle of its 160 samples, so frame f is made of samples [1280 f, 1280 (f + 1)) and a
margin of 176 samples on either side. Silence is exactly 0 after ``compress``, hence zero padding is silence.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from scipy.fft import irfft, rfft

SAMPLE_RATE = 16000
HOP = 160  # samples, 10 ms
FRAME = 1280  # samples, 80 ms: 12.5 Hz (ERNIE 5.0 report §2.3.1)
HOPS_PER_FRAME = FRAME // HOP
WINDOW = 512  # samples of one transform
BINS = WINDOW // 2 + 1
MELS = 64
FLOOR = 1e-4  # magnitude that counts as silence; a full-scale sine has magnitude 1
_SCALE = 4.0  # nats of one unit of compressed magnitude
_MARGIN = (WINDOW - HOP) // 2
_hann = np.hanning(WINDOW + 1)[:-1].astype(np.float32)


def check_wave(wave: np.ndarray) -> np.ndarray:
    """Returns float32 [n]; raises ValueError for what is not one channel of finite samples in [-1, 1]."""
    wave = np.asarray(wave)
    if wave.ndim != 1:
        raise ValueError(f"a wave is one channel [n], found shape {wave.shape}; average the channels first")
    if len(wave) == 0:
        raise ValueError("the wave is empty: expected at least one sample at 16 kHz")
    if not np.issubdtype(wave.dtype, np.floating):
        raise ValueError(f"a wave is float in [-1, 1], found {wave.dtype}; divide integer samples by their full scale")
    if not np.isfinite(wave).all():
        raise ValueError(f"the wave has {np.count_nonzero(~np.isfinite(wave))} samples that are NaN or infinite")
    return wave.astype(np.float32)


def num_frames(samples: int) -> int:
    """Codec frames of a wave: the last one may be partly silence."""
    return -(-samples // FRAME)


def _windows(waves: np.ndarray) -> np.ndarray:
    """[..., F * 1280] -> a view [..., T, 512] over the zero-padded waves."""
    padded = np.pad(waves, [(0, 0)] * (waves.ndim - 1) + [(_MARGIN, _MARGIN)])
    return np.lib.stride_tricks.sliding_window_view(padded, WINDOW, axis=-1)[..., ::HOP, :]


def stft(waves: np.ndarray) -> np.ndarray:
    """float32 [..., F * 1280] -> complex64 [..., T, B], scaled so that a full-scale sine reaches 1."""
    return rfft(_windows(waves) * _hann, axis=-1) * np.float32(4.0 / WINDOW)


def inverse_stft(spectrum: np.ndarray) -> np.ndarray:
    """complex64 [..., T, B] -> float32 [..., T * 160], least squares over overlapping windows."""
    pieces = irfft(spectrum, n=WINDOW, axis=-1) * (np.float32(WINDOW / 4.0) * _hann)
    return _overlap_add(pieces) / _window_energy(spectrum.shape[-2])


def _overlap_add(pieces: np.ndarray) -> np.ndarray:
    """[..., T, 512] -> [..., T * 160]; windows are added in four blocks of at most one hop each."""
    hops = pieces.shape[-2]
    blocks = -(-WINDOW // HOP)
    total = np.zeros((*pieces.shape[:-2], hops + blocks, HOP), np.float32)
    for block in range(blocks):
        part = pieces[..., block * HOP : (block + 1) * HOP]
        total[..., block : block + hops, : part.shape[-1]] += part
    flat = total.reshape(*pieces.shape[:-2], -1)
    return flat[..., _MARGIN : _MARGIN + hops * HOP]


@lru_cache(maxsize=64)
def _window_energy(hops: int) -> np.ndarray:
    energy = _overlap_add(np.broadcast_to(_hann**2, (hops, WINDOW)))
    return np.maximum(energy, 1e-3)


def compress(magnitude: np.ndarray) -> np.ndarray:
    """Magnitude >= 0 -> log scale with 0 at silence (-80 dB) and about 2.3 at full scale."""
    return (np.log(magnitude + FLOOR) - np.log(FLOOR)) / _SCALE


def expand(compressed: np.ndarray) -> np.ndarray:
    """The inverse of ``compress``; what lies under silence becomes 0."""
    return np.maximum(np.exp(compressed * _SCALE) - 1.0, 0.0) * FLOOR


def _mel(hertz: np.ndarray) -> np.ndarray:
    return 2595.0 * np.log10(1.0 + hertz / 700.0)


@lru_cache(maxsize=8)
def mel_matrix(bands: int = MELS, low: float = 40.0, high: float = 8000.0) -> np.ndarray:
    """float32 [B, M]: triangular HTK mel bands, each with weights that sum to 1 (a band is a mean magnitude)."""
    edges = np.linspace(_mel(np.float64(low)), _mel(np.float64(high)), bands + 2)
    bins = _mel(np.arange(BINS) * SAMPLE_RATE / WINDOW)[:, None]
    rise = (bins - edges[:-2]) / (edges[1:-1] - edges[:-2])
    fall = (edges[2:] - bins) / (edges[2:] - edges[1:-1])
    weights = np.maximum(np.minimum(rise, fall), 0.0)
    empty = weights.sum(0) == 0  # bands narrower than one bin take the nearest
    nearest = np.abs(bins - edges[1:-1]).argmin(0)
    weights[nearest[empty], np.nonzero(empty)[0]] = 1.0
    return (weights / weights.sum(0)).astype(np.float32)


@lru_cache(maxsize=64)
def warp_matrix(factor: float) -> np.ndarray:
    """float32 [B, B]: ``magnitude @ warp`` has every frequency multiplied by ``factor`` (another throat and pitch)."""
    source = np.arange(BINS) / factor
    low = np.floor(source).astype(int)
    matrix = np.zeros((BINS + 1, BINS), np.float32)
    inside = low < BINS - 1
    columns = np.nonzero(inside)[0]
    matrix[low[inside], columns] = 1.0 - (source - low)[inside]
    matrix[low[inside] + 1, columns] = (source - low)[inside]
    return matrix[:BINS]


def pad_to_frames(wave: np.ndarray, frames: int | None = None) -> np.ndarray:
    """[n] -> [F * 1280] with zeros at the end."""
    frames = num_frames(len(wave)) if frames is None else frames
    return np.pad(wave, (0, frames * FRAME - len(wave)))
