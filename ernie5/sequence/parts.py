"""A sample is a list of parts. Raw parts come from data and prompts; coded parts come from the tokenizers.

``T`` frames, ``H``/``W`` pixels, ``h``/``w`` latent grid, ``d`` bits, ``K`` patches of one token, ``Q`` codec levels.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass
class Text:
    """A stretch of text, or several wordings of it of which training draws one. ``loss``: is it predicted?"""

    text: str | tuple[str, ...]
    loss: bool = True


@dataclass
class Image:
    pixels: np.ndarray  # uint8 [H, W, 3]
    generate: bool = False


@dataclass
class Video:
    frames: np.ndarray  # uint8 [T, H, W, 3]
    generate: bool = False


@dataclass
class Audio:
    wave: np.ndarray  # float32 [n] in [-1, 1]
    sample_rate: int = 16000
    generate: bool = False


@dataclass
class Speaker:
    """A recording whose voice the following generated audio should have."""

    wave: np.ndarray
    sample_rate: int = 16000


@dataclass
class VisionLatent:
    """Generation path of an image (T' = 1) or a video: the tokenizer's continuous latent, one per bit width."""

    latents: dict[int, np.ndarray]  # bits d -> float [T', h, w, d], before quantisation
    video: bool = False


@dataclass
class VisionFeatures:
    """Understanding path: N tokens of K patches each, CNN and ViT features side by side (ERNIE 5.0 report §2.2.2)."""

    cnn: np.ndarray  # float [N, K, D_cnn]
    vit: np.ndarray  # float [N, K, D_vit]
    grid: tuple[int, int, int]  # (T'', h'', w'') with T''*h''*w'' = N
    video: bool = False


@dataclass
class AudioCodes:
    codes: np.ndarray  # int [n, Q], one row per 80 ms
    generate: bool = False


@dataclass
class SpeakerEmbedding:
    vector: np.ndarray  # float32 [D_speaker]


RawPart = Text | Image | Video | Audio | Speaker
CodedPart = Text | VisionLatent | VisionFeatures | AudioCodes | SpeakerEmbedding


@dataclass
class Sample:
    """Parts in reading order. ``task`` names the mixture entry; ``meta`` carries what an evaluator wants to know."""

    parts: list[RawPart | CodedPart]
    task: str = ""
    meta: dict = field(default_factory=dict)
