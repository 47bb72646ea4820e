"""Own data: a folder with a ``manifest.jsonl``, one sample a line, each a list of parts (or an object with "parts").

    [{"image": "a.png"}, {"text": "what is this?", "loss": false}, {"text": "a cat"}]
    {"task": "draw", "split": "train", "parts": [{"text": "a cat"}, {"image": "a.png", "generate": true}]}

Parts: ``text`` (a string or several wordings), ``image``, ``video``, ``audio`` (with ``generate``), ``speaker`` (a
recording whose voice the following audio has). Paths are relative to the manifest. ``split`` is "train" (default) or
"heldout"; ``speaker_name`` names the voice of a line's recordings. ``meta["source"]`` of a sample is "FILE:LINE".
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from ernie5.config.schema import AudioTokenizerConfig, VisionTokenizerConfig
from ernie5.data.media import read_audio, read_image, read_video
from ernie5.data.source import SPLITS, check_split
from ernie5.sequence.parts import Audio, Image, RawPart, Sample, Speaker, Text, Video

NAME = "manifest.jsonl"
PART_KEYS = {
    "text": {"loss"},
    "image": {"generate"},
    "video": {"generate"},
    "audio": {"generate"},
    "speaker": set(),
}
SAMPLE_KEYS = {"task", "split", "parts", "speaker_name"}


class ManifestSource:
    """Samples of one folder. ``on_bad_line``: "error" stops at the first bad line, "skip" reports and counts them."""

    feeds = frozenset({"text", "vision", "audio"})

    def __init__(
        self, folder: str | Path, vision: VisionTokenizerConfig, audio: AudioTokenizerConfig, on_bad_line: str = "error"
    ) -> None:
        self.folder = Path(folder)
        self.vision, self.audio = vision, audio
        self.on_bad_line = on_bad_line
        self.skipped = 0
        self._samples: dict[str, list[Sample]] | None = None

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(sorted({sample.task for split in SPLITS for sample in self.samples(split)}))

    def samples(self, split: str) -> list[Sample]:
        check_split(split)
        if self._samples is None:
            self._samples = self._read()
        return self._samples[split]

    def _read(self) -> dict[str, list[Sample]]:
        path = self.folder / NAME
        if not path.is_file():
            raise ValueError(f"{path}: no such manifest; a data folder holds a {NAME}, one sample a line")
        samples: dict[str, list[Sample]] = {split: [] for split in SPLITS}
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
            if not line.strip():
                continue
            try:
                split, sample = self._sample(line)
            except ValueError as error:
                message = f"{path}:{number}: {error}"
                if self.on_bad_line == "error":
                    raise ValueError(f"{message}; mend the line, or set data.on_bad_line=skip") from None
                print(f"skipped {message}", file=sys.stderr)
                self.skipped += 1
                continue
            sample.meta["source"] = f"{path}:{number}"
            samples[split].append(sample)
        if self.skipped:
            print(f"{path}: {self.skipped} bad lines skipped, {sum(map(len, samples.values()))} kept", file=sys.stderr)
        return samples

    def _sample(self, line: str) -> tuple[str, Sample]:
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"not JSON ({error.msg} at column {error.colno})") from None
        if isinstance(value, list):
            value = {"parts": value}
        if not isinstance(value, dict) or not isinstance(value.get("parts"), list) or not value["parts"]:
            raise ValueError('expected a list of parts, or an object with a non-empty list "parts"')
        if unknown := set(value) - SAMPLE_KEYS:
            raise ValueError(f"unknown key '{sorted(unknown)[0]}'; a sample knows {', '.join(sorted(SAMPLE_KEYS))}")
        split = value.get("split", "train")
        if split not in SPLITS:
            raise ValueError(f"split is {split!r}, expected 'train' or 'heldout'")
        parts = [self._part(part, i) for i, part in enumerate(value["parts"], start=1)]
        meta = {"speaker": value["speaker_name"]} if "speaker_name" in value else {}
        return split, Sample(parts, str(value.get("task", self.folder.name)), meta)

    def _part(self, part: object, number: int) -> RawPart:
        kinds = [key for key in PART_KEYS if isinstance(part, dict) and key in part]
        if len(kinds) != 1:
            raise ValueError(f"part {number} is {json.dumps(part)[:80]}, expected one of {', '.join(PART_KEYS)} in it")
        kind = kinds[0]
        if unknown := set(part) - PART_KEYS[kind] - {kind}:
            raise ValueError(f"part {number} ({kind}) has an unknown key '{sorted(unknown)[0]}'")
        content, generate = part[kind], part.get("generate", False)
        if not isinstance(generate, bool) or not isinstance(part.get("loss", True), bool):
            raise ValueError(f"part {number} ({kind}): 'generate' and 'loss' are true or false")
        if kind == "text":
            return Text(_wordings(content, number), part.get("loss", True))
        if not isinstance(content, str):
            raise ValueError(f"part {number} ({kind}) is {content!r}, expected a path relative to the manifest")
        return self._media(kind, self.folder / content, generate)

    def _media(self, kind: str, path: Path, generate: bool) -> RawPart:
        if kind == "image":
            return Image(read_image(path, self.vision.image_size), generate)
        if kind == "video":
            return Video(_fit_frames(read_video(path, self.vision.image_size), self.vision.frames), generate)
        rate = self.audio.sample_rate
        wave = read_audio(path, rate)
        return Speaker(wave, rate) if kind == "speaker" else Audio(wave, rate, generate)


def _wordings(content: object, number: int) -> str | tuple[str, ...]:
    if isinstance(content, str) and content:
        return content
    if isinstance(content, list) and content and all(isinstance(text, str) and text for text in content):
        return tuple(content)
    raise ValueError(f"part {number} (text) is {content!r}, expected a non-empty string or a list of them")


def _fit_frames(frames: np.ndarray, count: int) -> np.ndarray:
    """``count`` frames: the first ones, or all and the last repeated."""
    if len(frames) >= count:
        return frames[:count]
    return np.concatenate([frames, np.repeat(frames[-1:], count - len(frames), axis=0)])
