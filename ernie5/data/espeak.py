"""eSpeak NG through ctypes: text in, 16 kHz waves out. Synthetic voices; no files, no network.

The same text and delivery give the same samples whatever was said before: see ``espeak_worker.py``.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from math import gcd
from pathlib import Path

import numpy as np
from scipy.signal import firwin, resample_poly

SAMPLE_RATE = 16000
ACCENTS = {"en-us": "gmw/en-US", "en-gb": "gmw/en"}  # eSpeak does not find en-gb by that name
WORKERS = 2  # processes that speak side by side; the result does not depend on it
SILENCE = 0.01  # of the peak: what stays below it at either end is silence


@dataclass(frozen=True)
class Utterance:
    """What is said and how. ``voice`` is an accent of ``ACCENTS`` and an eSpeak variant: "en-us+f2"."""

    text: str
    voice: str
    rate: int = 140  # words per minute
    pitch: int = 50  # 0..100
    range: int = 50  # 0..100, how far the pitch moves

    def request(self) -> str:
        accent, plus, variant = self.voice.partition("+")
        return json.dumps([ACCENTS.get(accent, accent) + plus + variant, self.rate, self.pitch, self.range, self.text])


def render(utterances: Sequence[Utterance]) -> list[np.ndarray]:
    """Each utterance as float32 [n] at 16 kHz, level and silence as the engine made them; about 2 ms a word.

    Raises ValueError for an empty text, an unknown voice, or a text that comes out silent.
    """
    for utterance in utterances:
        if not utterance.text.strip():
            raise ValueError("nothing to say: the text of an utterance is empty; give at least one word")
    for voice in {utterance.voice for utterance in utterances}:
        _check_variant(voice)
    share = -(-len(utterances) // WORKERS)
    shares = [utterances[i : i + share] for i in range(0, len(utterances), share)]
    with ThreadPoolExecutor(WORKERS) as pool:
        return [wave for waves in pool.map(_render_share, shares) for wave in waves]


def _check_variant(voice: str) -> None:
    """eSpeak itself takes the plain voice when a variant does not exist."""
    import espeakng_loader

    variant = voice.partition("+")[2]
    if variant and not (Path(espeakng_loader.get_data_path()) / "voices" / "!v" / variant).is_file():
        raise ValueError(f"eSpeak has no voice {voice!r}: no variant {variant!r}; expected a name such as 'en-us+f2'")


def _render_share(utterances: Sequence[Utterance]) -> list[np.ndarray]:
    """``render`` by one worker process."""
    source_rate, recordings = _read(_speak("\n".join(utterance.request() for utterance in utterances)))
    waves = []
    for utterance, pcm in zip(utterances, recordings, strict=True):
        if pcm is None:
            raise ValueError(f"eSpeak has no voice {utterance.voice!r}; expected a name such as 'en-us+f2'")
        if not np.any(pcm):
            raise ValueError(f"eSpeak made no sound of {utterance.text!r}; write it as English words")
        waves.append(resample(pcm.astype(np.float32) / 32768.0, source_rate, SAMPLE_RATE))
    return waves


def _speak(requests: str) -> bytes:
    import espeakng_loader

    library = espeakng_loader.get_library_path()
    data = str(Path(espeakng_loader.get_data_path()).parent)
    command = [sys.executable, str(Path(__file__).with_name("espeak_worker.py")), library, data]
    done = subprocess.run(command, input=requests.encode(), capture_output=True, check=False)
    if done.returncode != 0:
        detail = (done.stderr.decode(errors="replace").strip().splitlines() or ["no message"])[-1]
        raise ValueError(f"eSpeak NG does not run from {library} ({detail}); reinstall espeakng-loader")
    return done.stdout


def _read(stream: bytes) -> tuple[int, list[np.ndarray | None]]:
    """The worker's output -> (sample rate, int16 [n] an utterance or None for an unknown voice)."""
    position, recordings = 4, []
    while position < len(stream):
        count = int(np.frombuffer(stream, "<i4", 1, position)[0])
        position += 4
        recordings.append(None if count < 0 else np.frombuffer(stream, "<i2", count, position))
        position += 2 * max(count, 0)
    return int(np.frombuffer(stream, "<i4", 1)[0]), recordings


def resample(wave: np.ndarray, source_rate: int, target_rate: int) -> np.ndarray:
    """float32 [n] -> float32 [ceil(n * target / source)], polyphase filtered."""
    divisor = gcd(source_rate, target_rate)
    up, down = target_rate // divisor, source_rate // divisor
    return resample_poly(wave, up, down, window=_low_pass(max(up, down))).astype(np.float32)


@lru_cache(maxsize=8)
def _low_pass(ratio: int) -> np.ndarray:
    """Taps that keep what both rates can carry, for an up- and downsampling whose larger factor is ``ratio``."""
    return firwin(20 * ratio + 1, 1.0 / ratio, window=("kaiser", 5.0)).astype(np.float32)


def tidy(wave: np.ndarray, lead: float = 0.2, trail: float = 0.25, peak: float = 0.6) -> np.ndarray:
    """float32 [n] at 16 kHz -> the sound between ``lead`` and ``trail`` seconds of silence, at a common peak."""
    top = np.abs(wave).max()
    loud = np.nonzero(np.abs(wave) > SILENCE * top)[0]
    core = wave[loud[0] : loud[-1] + 1] * (peak / top)
    return np.pad(core, (round(lead * SAMPLE_RATE), round(trail * SAMPLE_RATE))).astype(np.float32)
