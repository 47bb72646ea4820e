"""The embedded default data: which sources there are, and what the tokenizers are trained on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ernie5.config.schema import Config
from ernie5.data.clips import ClipSource
from ernie5.data.digits import DigitSource
from ernie5.data.icons import IconSource
from ernie5.data.manifest import ManifestSource
from ernie5.data.prose import TextSource
from ernie5.data.source import Source
from ernie5.data.speech import SpeechSource
from ernie5.sequence.parts import Audio, Image, Sample, Speaker, Text, Video


def sources(config: Config) -> list[Source]:
    """The sources of a run: the folders of ``data.manifests``, or the embedded data where that list is empty."""
    if config.data.manifests:
        vision, audio = config.tokenizers.vision, config.tokenizers.audio
        return [ManifestSource(folder, vision, audio, config.data.on_bad_line) for folder in config.data.manifests]
    return _embedded(config)


def _embedded(config: Config) -> list[Source]:
    seed = config.data.seed
    return [
        TextSource(),
        DigitSource(),
        IconSource(seed=seed),
        ClipSource(frames=config.tokenizers.vision.frames, seed=seed),
        SpeechSource(seed=seed),
    ]


def raw_samples(config: Config, split: str) -> list[Sample]:
    """Every sample of a split, source after source. Raises ValueError when there is none."""
    samples = [sample for source in sources(config) for sample in source.samples(split)]
    if not samples and split == "train":
        raise ValueError("the data holds no training sample; check data.manifests and the 'split' entries in them")
    return samples


def tokenizer_material(config: Config, kind: str) -> list[str] | tuple:
    """What a tokenizer is trained on, from the training split alone.

    "text": strings. "vision": images uint8 [N,H,W,3], captions, clips uint8 [M,T,H,W,3]. "audio": waves, transcripts,
    speakers ("" where a manifest names none). Where the manifests hold no picture or no recording, the embedded ones
    take their place.
    """
    samples = _train_samples(sources(config), kind)
    if kind == "text":
        return _texts(samples)
    collect, what = (_pictures, "picture") if kind == "vision" else (_recordings, "recording")
    if (found := collect(samples)) is None:
        print(f"data.manifests hold no {what}: the {kind} tokenizer learns from the embedded data instead", flush=True)
        found = collect(samples + _train_samples(_embedded(config), kind))
    return found


def _train_samples(chosen: Sequence[Source], kind: str) -> list[Sample]:
    return [sample for source in chosen if kind in source.feeds for sample in source.samples("train")]


def _texts(samples: Sequence[Sample]) -> list[str]:
    texts: dict[str, None] = {}
    for sample in samples:
        for part in sample.parts:
            if isinstance(part, Text):
                texts.update(dict.fromkeys((part.text,) if isinstance(part.text, str) else part.text))
    return list(texts)


def _words(sample: Sample) -> str:
    """The predicted text of a sample: its caption or transcript, in the first wording."""
    parts = [part.text for part in sample.parts if isinstance(part, Text) and part.loss]
    return " ".join(text if isinstance(text, str) else text[0] for text in parts)


def _pictures(samples: Sequence[Sample]) -> tuple[np.ndarray, list[str], np.ndarray] | None:
    pictures: dict[int, tuple[np.ndarray, str]] = {}
    clips: dict[int, np.ndarray] = {}
    for sample in samples:
        for part in sample.parts:
            if isinstance(part, Image):
                pictures.setdefault(id(part.pixels), (part.pixels, _words(sample)))
            elif isinstance(part, Video):
                clips.setdefault(id(part.frames), part.frames)
    if not pictures:
        return None
    shape = next(iter(pictures.values()))[0].shape
    if other := [clip.shape[1:] for clip in clips.values() if clip.shape[1:] != shape]:
        raise ValueError(f"pictures are {shape}, clips {other[0]}; add pictures of that size to a manifest")
    moving = np.stack(list(clips.values())) if clips else np.zeros((0, 1, *shape), np.uint8)
    return np.stack([p for p, _ in pictures.values()]), [c for _, c in pictures.values()], moving


def _recordings(samples: Sequence[Sample]) -> tuple[list[np.ndarray], list[str], list[str]] | None:
    found: dict[int, tuple[np.ndarray, str, str]] = {}
    for sample in samples:
        speaker = str(sample.meta.get("voice", sample.meta.get("speaker", "")))
        for part in sample.parts:
            if isinstance(part, Audio) and not any(isinstance(other, Speaker) for other in sample.parts):
                found.setdefault(id(part.wave), (part.wave, str(sample.meta.get("text", _words(sample))), speaker))
    if not found:
        return None
    waves, transcripts, speakers = (list(column) for column in zip(*found.values(), strict=True))
    return waves, transcripts, speakers
