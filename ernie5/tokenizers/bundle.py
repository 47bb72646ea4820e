"""The three tokenizers of a run, and samples of raw parts -> samples of coded parts.

B media in a batch, T frames, N understanding tokens, K patches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ernie5.sequence.parts import (
    Audio,
    AudioCodes,
    Image,
    RawPart,
    Sample,
    Speaker,
    SpeakerEmbedding,
    Video,
    VisionFeatures,
    VisionLatent,
)
from ernie5.tokenizers.audio import AudioTokenizer
from ernie5.tokenizers.text import TextTokenizer
from ernie5.tokenizers.vision import VisionTokenizer

PIXELS_PER_BATCH = 256 * 32 * 32  # bounds the memory of one call
WAVES_PER_BATCH = 64
Key = tuple[str, int]


@dataclass
class Tokenizers:
    """``text``, ``vision`` and ``audio`` side by side; sub-folders of the same names on disk."""

    text: TextTokenizer
    vision: VisionTokenizer
    audio: AudioTokenizer

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizers:
        """Raises ValueError in one line where one is missing or unreadable."""
        folder = Path(folder)
        return cls(
            TextTokenizer.load(folder / "text"),
            VisionTokenizer.load(folder / "vision"),
            AudioTokenizer.load(folder / "audio"),
        )

    def save(self, folder: str | Path) -> None:
        for name in ("text", "vision", "audio"):
            getattr(self, name).save(Path(folder) / name)

    def encode_samples(self, samples: Sequence[Sample], progress: bool = True) -> list[Sample]:
        """Media parts become codes and features; texts and parts already coded stay.

        The same array is encoded once, and all media of one kind and shape in batches. Raises ValueError for a
        recording at another sample rate than the audio tokenizer's.
        """
        wanted: dict[str, dict[int, np.ndarray]] = {name: {} for name in ("latent", "features", "audio", "speaker")}
        for sample in samples:
            for part in sample.parts:
                self._check_rate(part)
                if (need := _need(part)) is not None:
                    kind, array = need
                    wanted[kind].setdefault(id(array), array)
        total = sum(len(arrays) for arrays in wanted.values())
        coded: dict[Key, Any] = {}
        with tqdm(total=total, desc="encoding media", disable=not progress or not total, unit="item") as bar:
            for kind, encode in self._encoders().items():
                for key, value in encode(wanted[kind]):
                    coded[kind, key] = value
                    bar.update()
        return [replace(sample, parts=[_coded(part, coded) for part in sample.parts]) for sample in samples]

    def _check_rate(self, part: RawPart) -> None:
        rate = self.audio.config.sample_rate
        if isinstance(part, Audio | Speaker) and part.sample_rate != rate:
            raise ValueError(f"a recording has {part.sample_rate} samples a second, expected {rate}; resample it")

    def _encoders(self) -> dict[str, Callable[[dict[int, np.ndarray]], Iterable[tuple[int, Any]]]]:
        return {
            "latent": self._latents,
            "features": self._features,
            "audio": self._audio,
            "speaker": self._speakers,
        }

    def _latents(self, arrays: dict[int, np.ndarray]) -> Iterable[tuple[int, dict[int, np.ndarray]]]:
        for keys, frames in _batches(arrays):
            per_width = {bits: self.vision.encode(frames, bits) for bits in self.vision.bits_series}
            for i, key in enumerate(keys):
                yield key, {bits: latents[i] for bits, latents in per_width.items()}

    def _features(self, arrays: dict[int, np.ndarray]) -> Iterable[tuple[int, VisionFeatures]]:
        for keys, frames in _batches(arrays):
            cnn, vit, grid = self.vision.features(frames)
            for i, key in enumerate(keys):
                yield key, VisionFeatures(cnn[i], vit[i], grid, video=frames.shape[1] > 1)

    def _audio(self, arrays: dict[int, np.ndarray]) -> Iterable[tuple[int, np.ndarray]]:
        keys = sorted(arrays, key=lambda key: len(arrays[key]))  # similar lengths share a batch
        for start in range(0, len(keys), WAVES_PER_BATCH):
            chunk = keys[start : start + WAVES_PER_BATCH]
            yield from zip(chunk, self.audio.encode_batch([arrays[key] for key in chunk]), strict=True)

    def _speakers(self, arrays: dict[int, np.ndarray]) -> Iterable[tuple[int, np.ndarray]]:
        for key, wave in arrays.items():
            yield key, self.audio.speaker_embedding(wave)


def _need(part: RawPart) -> tuple[str, np.ndarray] | None:
    """What has to be encoded for a part: the kind of code, and the array."""
    if isinstance(part, Image | Video):
        return ("latent" if part.generate else "features"), part.pixels if isinstance(part, Image) else part.frames
    if isinstance(part, Audio | Speaker):
        return ("audio" if isinstance(part, Audio) else "speaker"), part.wave
    return None


def _coded(part: RawPart, coded: dict[Key, Any]) -> Any:
    need = _need(part)
    if need is None:
        return part
    value = coded[need[0], id(need[1])]
    if need[0] == "latent":
        return VisionLatent(value, video=isinstance(part, Video))
    if need[0] == "audio":
        return AudioCodes(np.asarray(value), part.generate)
    return SpeakerEmbedding(value) if need[0] == "speaker" else value


def _batches(arrays: dict[int, np.ndarray]) -> Iterable[tuple[list[int], np.ndarray]]:
    """Keys and uint8 [B,T,H,W,3] of equal shapes; a picture is a clip of one frame."""
    by_shape: dict[tuple[int, ...], list[int]] = {}
    for key, array in arrays.items():
        shape = array.shape if array.ndim == 4 else (1, *array.shape)
        by_shape.setdefault(shape, []).append(key)
    for shape, keys in by_shape.items():
        size = max(1, PIXELS_PER_BATCH // int(np.prod(shape[:3])))
        for start in range(0, len(keys), size):
            chunk = keys[start : start + size]
            yield chunk, np.stack([arrays[key].reshape(shape) for key in chunk])
