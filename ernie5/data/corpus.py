"""``CodedCorpus``: coded samples on disk, ready to be laid out. Large arrays are memory-mapped.

A folder: ``arrays.npy`` (all float arrays of the samples behind one another, float16), ``codes.npy`` (all integer
ones, int16), ``samples.json`` (parts with offsets, texts, tasks, meta) and ``config.json``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ernie5.files import read_versioned_json, replacing_folder
from ernie5.sequence.parts import AudioCodes, CodedPart, Sample, SpeakerEmbedding, Text, VisionFeatures, VisionLatent

FORMAT_VERSION = 1
REMEDY = "make it with tools/prepare_data.py"


class CodedCorpus:
    """``samples`` in order; ``tasks`` maps a task to the indices of its samples."""

    def __init__(self, samples: Sequence[Sample], tokenizers: str = "") -> None:
        self.samples = list(samples)
        self.tokenizers = tokenizers
        self.tasks: dict[str, list[int]] = {}
        for i, sample in enumerate(self.samples):
            self.tasks.setdefault(sample.task, []).append(i)

    def save(self, folder: str | Path) -> None:
        """Writes the folder complete or not at all."""
        store = {"arrays": _Store(np.float16), "codes": _Store(np.int16)}
        entries = [
            {"task": s.task, "meta": s.meta, "parts": [_pack(part, store) for part in s.parts]} for s in self.samples
        ]
        with replacing_folder(folder) as temporary:
            for name, values in store.items():
                np.save(temporary / f"{name}.npy", values.joined())
            (temporary / "samples.json").write_text(json.dumps(entries), encoding="utf-8")
            header = {"format_version": FORMAT_VERSION, "samples": len(entries), "tokenizers": self.tokenizers}
            (temporary / "config.json").write_text(json.dumps(header, indent=1), encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path, tokenizers: str | None = None) -> CodedCorpus:
        """Raises ValueError for a missing or corrupt corpus, or one made with other tokenizers than ``tokenizers``."""
        folder = Path(folder)
        header = read_versioned_json(folder / "config.json", FORMAT_VERSION, "coded corpus", REMEDY)
        if tokenizers is not None and header["tokenizers"] != tokenizers:
            raise ValueError(f"{folder}: coded with other tokenizers than the run's; {REMEDY} --force")
        try:
            store = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("arrays", "codes")}
            entries = json.loads((folder / "samples.json").read_text(encoding="utf-8"))
            samples = [Sample([_unpack(p, store) for p in e["parts"]], e["task"], e["meta"]) for e in entries]
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"{folder}: unreadable coded corpus ({error}); {REMEDY} --force") from None
        return cls(samples, header["tokenizers"])


class _Store:
    """Arrays behind one another; an array that is added twice is stored once."""

    def __init__(self, dtype: type) -> None:
        self.dtype, self.size = dtype, 0
        self._arrays: list[np.ndarray] = []
        self._places: dict[int, tuple[int, np.ndarray]] = {}

    def add(self, array: np.ndarray) -> list:
        """[offset, shape] of the array."""
        if id(array) not in self._places:
            self._places[id(array)] = (self.size, array)  # the reference keeps the id from being given anew
            self._arrays.append(np.asarray(array).astype(self.dtype).ravel())
            self.size += array.size
        return [self._places[id(array)][0], list(array.shape)]

    def joined(self) -> np.ndarray:
        return np.concatenate(self._arrays) if self._arrays else np.zeros(0, self.dtype)


def _pack(part: CodedPart, store: dict[str, _Store]) -> dict:
    if isinstance(part, Text):
        return {"text": part.text, "loss": part.loss}
    if isinstance(part, VisionLatent):
        return {"latents": {str(b): store["arrays"].add(x) for b, x in part.latents.items()}, "video": part.video}
    if isinstance(part, VisionFeatures):
        cnn, vit = store["arrays"].add(part.cnn), store["arrays"].add(part.vit)
        return {"cnn": cnn, "vit": vit, "grid": list(part.grid), "video": part.video}
    if isinstance(part, AudioCodes):
        return {"codes": store["codes"].add(part.codes), "generate": part.generate}
    return {"speaker": store["arrays"].add(part.vector)}


def _unpack(entry: dict, store: dict[str, np.ndarray]) -> CodedPart:
    def get(place: list, name: str = "arrays") -> np.ndarray:
        offset, shape = place
        return store[name][offset : offset + int(np.prod(shape))].reshape(shape)

    if "text" in entry:
        text = entry["text"]
        return Text(text if isinstance(text, str) else tuple(text), entry["loss"])
    if "latents" in entry:
        return VisionLatent({int(b): get(place) for b, place in entry["latents"].items()}, entry["video"])
    if "cnn" in entry:
        return VisionFeatures(get(entry["cnn"]), get(entry["vit"]), tuple(entry["grid"]), entry["video"])
    if "codes" in entry:
        return AudioCodes(get(entry["codes"], "codes"), entry["generate"])
    return SpeakerEmbedding(get(entry["speaker"]))
