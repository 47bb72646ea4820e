"""From a sample of coded parts to a document: which tokens stand where and what each position learns.

Text: plain ids. Generated image: BOI, the inputs of scales 2..K, the whole frame, EOI; video the same with BOV ... EOV
and one such run a latent frame. The position holding scale k's input predicts scale k's bits, BOI / BOV or the frame
before predicts scale 1 (ERNIE 5.0 report Figure 2; VideoAR, arXiv 2601.05966, §4.2). Understood image, video or
audio: opening token, features, closing token, SEP. Generated audio: BOA, frames, EOA, where each position predicts the
next frame's codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ernie5.sequence.corruption import bit_flipper, flip_probabilities
from ernie5.sequence.document import Document, Writer
from ernie5.sequence.parts import AudioCodes, CodedPart, Sample, SpeakerEmbedding, Text, VisionFeatures, VisionLatent
from ernie5.sequence.spec import LayoutSpec
from ernie5.sequence.vocabulary import Kind, Special
from ernie5.tokenizers.scales import ScaleCodes


class Encoder(Protocol):
    """The part of a text tokenizer that the layout uses."""

    def encode(self, text: str, dropout: float = 0.0, rng: np.random.Generator | None = None) -> list[int]: ...


@dataclass(frozen=True)
class Block:
    """Tokens around a visual or audio block."""

    begin: Special
    end: Special
    generated: Kind
    understood: Kind


IMAGE = Block(Special.BOI, Special.EOI, Kind.IMAGE_GEN, Kind.IMAGE_UND)
VIDEO = Block(Special.BOV, Special.EOV, Kind.VIDEO_GEN, Kind.VIDEO_UND)
AUDIO = Block(Special.BOA, Special.EOA, Kind.AUDIO_GEN, Kind.AUDIO_UND)


def lay_out(
    sample: Sample,
    text_tokenizer: Encoder,
    spec: LayoutSpec,
    rng: np.random.Generator | None = None,
    training: bool = True,
) -> Document:
    """Lays a coded sample out as BOS ... EOS.

    With ``training`` and ``rng``: BPE-dropout, bit flips, hidden history frames, dropped prompts. ``rng`` also draws
    one of several wordings of a text (the first without it). Labels are always there. Raises
    ValueError when the sample does not fit the context, or a part does not fit the spec.
    """
    if not sample.parts:
        raise ValueError(f"a sample of task '{sample.task or 'unnamed'}' has no parts; give at least one")
    noise = rng if training else None
    given = sample.parts
    if noise is not None and spec.unconditional > 0 and _generates(given[-1]) and noise.random() < spec.unconditional:
        given = given[-1:]
    parts = [_prepared(part, text_tokenizer, spec, rng, noise) for part in given]
    length = 2 + sum(part_length(part, spec) for part in parts)
    if noise is not None and length > spec.length:  # BPE-dropout lengthens texts; a sample that fits stays usable
        parts = [_prepared(part, text_tokenizer, spec, rng, None) for part in given]
        length = 2 + sum(part_length(part, spec) for part in parts)
    check_length(length, spec, f"a sample of task '{sample.task or 'unnamed'}'")
    writer = Writer(spec, length)
    writer.special(Special.BOS)
    write_parts(writer, parts, noise)
    writer.special(Special.EOS, loss=True)
    return writer.document(sample.task)


def _generates(part: CodedPart) -> bool:
    return isinstance(part, VisionLatent) or (isinstance(part, AudioCodes) and part.generate)


@dataclass
class TextIds:
    """A text after its tokenizer."""

    ids: np.ndarray
    loss: bool


LaidPart = TextIds | VisionLatent | VisionFeatures | AudioCodes | SpeakerEmbedding


def encode_text(parts: Sequence[CodedPart], text_tokenizer: Encoder, spec: LayoutSpec) -> list[LaidPart]:
    """Parts ready for ``write_parts``: first wording, no dropout."""
    return [_prepared(part, text_tokenizer, spec, None, None) for part in parts]


def _prepared(
    part: CodedPart,
    text_tokenizer: Encoder,
    spec: LayoutSpec,
    rng: np.random.Generator | None,
    noise: np.random.Generator | None,
) -> LaidPart:
    """Encodes a text, checks everything else against the spec."""
    if not isinstance(part, Text):
        _check(part, spec)
        return part
    wordings = (part.text,) if isinstance(part.text, str) else part.text
    if not wordings:
        raise ValueError("a Text part holds no wording; give at least one string")
    text = wordings[int(rng.integers(len(wordings)))] if rng is not None and len(wordings) > 1 else wordings[0]
    ids = text_tokenizer.encode(text, spec.text_dropout if noise is not None else 0.0, noise)
    return TextIds(np.array(ids, np.int64), part.loss)


def _check(part: CodedPart, spec: LayoutSpec) -> None:
    """Raises ValueError where a part's arrays do not have the shapes of the spec."""
    if isinstance(part, VisionLatent):
        if spec.bits not in part.latents:
            raise ValueError(
                f"a vision latent has code widths {sorted(part.latents)}, the layout needs {spec.bits}; "
                "encode the data again with this vision tokenizer"
            )
        _same("a vision latent's (h, w, d)", part.latents[spec.bits].shape[1:], (*spec.scales[-1:] * 2, spec.bits))
    elif isinstance(part, VisionFeatures):
        tokens, patches = int(np.prod(part.grid)), part.cnn.shape[1]
        _same("patch features (N, K, D_cnn)", part.cnn.shape, (tokens, patches, spec.cnn_dim))
        _same("patch features (N, K, D_vit)", part.vit.shape, (tokens, patches, spec.vit_dim))
    elif isinstance(part, AudioCodes):
        _same("audio codes' levels", part.codes.shape[1:], (spec.levels,))
        if part.codes.size and not 0 <= part.codes.min() <= part.codes.max() < spec.codebook_size:
            raise ValueError(
                f"audio codes run from {part.codes.min()} to {part.codes.max()}, "
                f"the codebook holds {spec.codebook_size}; encode the data again with this audio tokenizer"
            )
    elif isinstance(part, SpeakerEmbedding):
        _same("a speaker embedding", np.shape(part.vector), (spec.speaker_dim,))
    else:
        raise ValueError(f"cannot lay out a {type(part).__name__}; encode it with the tokenizers first")


def _same(what: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if tuple(found) != tuple(expected):
        raise ValueError(
            f"{what}: found shape {tuple(found)}, expected {tuple(expected)}; tokenizers and model disagree, "
            "encode the data again or train a model for these tokenizers"
        )


def part_length(part: LaidPart, spec: LayoutSpec) -> int:
    """Positions that ``write_parts`` fills for it."""
    if isinstance(part, TextIds):
        return len(part.ids)
    if isinstance(part, VisionLatent):
        return 2 + len(part.latents[spec.bits]) * spec.frame_tokens
    if isinstance(part, VisionFeatures):
        return 3 + len(part.cnn)
    if isinstance(part, AudioCodes):
        return len(part.codes) + (2 if part.generate else 3)
    return 1


def check_length(length: int, spec: LayoutSpec, what: str) -> None:
    if length > spec.length:
        raise ValueError(
            f"{what} takes {length} positions, the context holds {spec.length}; "
            "shorten it or raise model.max_sequence_length"
        )


def write_parts(writer: Writer, parts: Sequence[LaidPart], noise: np.random.Generator | None) -> None:
    """Writes the parts in order; text predicted after something understood is an answer, with a weight of its own."""
    weight = 1.0
    for part in parts:
        if isinstance(part, TextIds):
            writer.text(part.ids, part.loss, weight=weight)
        elif isinstance(part, VisionLatent):
            _write_generated(writer, part, noise)
        elif isinstance(part, VisionFeatures):
            _write_understood(writer, part)
            weight = writer.spec.answer_weight
        elif isinstance(part, AudioCodes):
            _write_audio(writer, part)
            weight = weight if part.generate else writer.spec.answer_weight
        else:
            writer.speaker(part.vector)


def frame_codes(latent: np.ndarray, spec: LayoutSpec, noise: np.random.Generator | None = None) -> ScaleCodes:
    """Scales of a latent [T', h, w, d], flipped when ``noise`` is given and the spec asks for it."""
    frames = np.reshape(latent, (len(latent), -1, latent.shape[-1]))
    if noise is None or spec.flip_max <= 0:
        return spec.pyramid.decompose(frames)
    p = flip_probabilities(len(frames), len(spec.scales), spec.flip_max, spec.flip_per_frame, noise)
    return spec.pyramid.decompose(frames, bit_flipper(p, noise))


def frame_inputs(codes: ScaleCodes, spec: LayoutSpec) -> np.ndarray:
    """Features [T', m, d] in layout order: scales 2..K, then the whole frame pooled to one cell."""
    return np.concatenate([*codes.inputs, spec.pyramid.input_for(0, codes.total)], axis=1)


def open_frames(writer: Writer, count: int, video: bool, hidden: np.ndarray, loss: bool) -> int:
    """BOI or BOV and the bare positions of ``count`` frames; returns where the frames start."""
    block = VIDEO if video else IMAGE
    writer.special(block.begin, loss, block.generated)
    start = writer.frames(count, block.generated)
    writer.limit_history(start, count, hidden)
    return start


def _write_generated(writer: Writer, part: VisionLatent, noise: np.random.Generator | None) -> None:
    spec = writer.spec
    latent = part.latents[spec.bits]
    codes = frame_codes(latent, spec, noise)
    hidden = np.zeros(len(latent), bool)
    if part.video and noise is not None and spec.history_mask > 0:
        hidden = noise.random(len(latent)) < spec.history_mask
    start = open_frames(writer, len(latent), part.video, hidden, loss=True)
    writer.frame_features(start, frame_inputs(codes, spec))
    writer.frame_targets(start, np.concatenate(codes.bits, axis=1))
    writer.special((VIDEO if part.video else IMAGE).end, loss=True)


def _write_understood(writer: Writer, part: VisionFeatures) -> None:
    block = VIDEO if part.video else IMAGE
    writer.special(block.begin, kind=block.understood)
    writer.patches(part.cnn, part.vit, part.grid, block.understood)
    writer.special(block.end)
    writer.special(Special.SEP)


def _write_audio(writer: Writer, part: AudioCodes) -> None:
    kind = AUDIO.generated if part.generate else AUDIO.understood
    start = writer.at
    writer.special(AUDIO.begin, part.generate, kind)
    writer.audio(part.codes, kind)
    if part.generate:
        writer.audio_targets(start, part.codes)
    writer.special(AUDIO.end)
    if not part.generate:
        writer.special(Special.SEP)
