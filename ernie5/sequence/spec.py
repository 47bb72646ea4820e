"""What the layout of a sequence depends on, gathered from the configuration, with the tables of its scale schedule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ernie5.config.schema import Config, ModelConfig
from ernie5.sequence.positions import scale_offsets
from ernie5.tokenizers.scales import ScalePyramid


@dataclass(frozen=True)
class FrameTable:
    """Constants of one latent frame, m positions: inputs of scales 2..K, then the whole frame pooled to one cell."""

    offsets: np.ndarray  # float32 [m, 3]: (0, h, w) relative to the block's base
    group_start: np.ndarray  # int64 [m]: first position of the own group, relative to the frame
    scale: np.ndarray  # int64 [m]: scale number 2..K of the feature, 0 for the whole frame
    weights: np.ndarray  # float32 [m]: loss weights of scales 1..K in order of prediction, mean 1


@dataclass(frozen=True)
class LayoutSpec:
    """Shapes and options of the layout; ``from_config`` reads them from a ``Config``."""

    length: int = 256  # positions of a row: the context
    scales: tuple[int, ...] = (1, 2, 3, 4)  # side of each scale's grid
    bits: int = 16  # width of the vision codes in use
    max_bits: int = 16  # width of the model's features and labels; unused bits are 0 and ignored
    levels: int = 4  # codec levels Q
    codebook_size: int = 256  # C; label C ends the audio
    speaker_dim: int = 32
    cnn_dim: int = 48
    vit_dim: int = 48
    temporal_window: int = 0  # latent frames a video frame looks back; 0 = all
    history_mask: float = 0.0  # probability that later frames cannot see a history frame
    flip_max: float = 0.0
    flip_per_frame: float = 0.0
    text_dropout: float = 0.0  # BPE-dropout while training
    answer_weight: float = 1.0  # loss weight of text predicted after an understood image, clip or recording
    unconditional: float = 0.0  # probability that a generation sample loses its prompt while training

    def __post_init__(self) -> None:
        if not self.scales or self.scales[0] != 1:
            raise ValueError(
                f"tokenizers.vision.scales: found {list(self.scales)}, expected a first scale of side 1, "
                "because one position predicts it; start the list with 1"
            )
        if not 0 < self.bits <= self.max_bits:
            raise ValueError(
                f"codes of {self.bits} bits do not fit model.vision_bits {self.max_bits}; raise that value"
            )

    @classmethod
    def of_model(cls, model: ModelConfig, scales: Sequence[int], series: Sequence[int], **options: Any) -> LayoutSpec:
        """Shapes of a model beside a vision tokenizer of these scales and code widths.

        ``model`` is anything with the fields of ``ModelConfig``. The code width in use is the largest of the series
        that the model holds; every field can be given in ``options``.
        """
        fitting = [width for width in series if width <= model.vision_bits]
        shapes = {
            "length": model.max_sequence_length,
            "scales": tuple(scales),
            "bits": max(fitting, default=model.vision_bits),
            "max_bits": model.vision_bits,
            "levels": model.audio_levels,
            "codebook_size": model.audio_codebook_size,
            "speaker_dim": model.speaker_dim,
            "cnn_dim": model.vision_cnn_dim,
            "vit_dim": model.vision_vit_dim,
        }
        return cls(**{**shapes, **options})

    @classmethod
    def from_config(cls, config: Config, **options: Any) -> LayoutSpec:
        """Everything as configured; ``options`` replace fields, for instance ``bits`` while a smaller width trains."""
        data = config.data
        training = {
            "temporal_window": data.temporal_window,
            "history_mask": data.history_mask,
            "flip_max": data.flip_max,
            "flip_per_frame": data.flip_per_frame,
            "unconditional": data.unconditional,
            "text_dropout": config.tokenizers.text.bpe_dropout,
            "answer_weight": data.answer_weight,
        }
        vision = config.tokenizers.vision
        return cls.of_model(config.model, vision.scales, vision.bits, **{**training, **options})

    @cached_property
    def pyramid(self) -> ScalePyramid:
        return ScalePyramid(self.scales)

    @property
    def frame_tokens(self) -> int:
        """Positions m of one generated latent frame, which is also the number of codes it holds (scale 1 has one)."""
        return self.pyramid.tokens

    @cached_property
    def frame(self) -> FrameTable:
        fed = [*range(1, len(self.scales)), 0]  # whole frame last, at scale 1's grid
        sizes = [self.pyramid.sizes[k] for k in fed]
        starts = np.cumsum([0, *sizes[:-1]])
        weights = np.repeat(np.array(self.pyramid.sizes, np.float64) ** -0.5, self.pyramid.sizes)
        return FrameTable(
            offsets=np.concatenate([scale_offsets(self.scales[k], self.scales[-1]) for k in fed]),
            group_start=np.repeat(starts, sizes),
            scale=np.repeat([k + 1 if k else 0 for k in fed], sizes),
            weights=(weights / weights.mean()).astype(np.float32),
        )
