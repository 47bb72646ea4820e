"""The layout of what is still to be generated: the same positions and groups as in training, and the walk over them.

A plan's document holds every position that can come to exist; what the prompt gives is filled in. Its steps say which
positions are fed together and what is predicted from them. The last group predicts nothing and is in no step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ernie5.sequence.document import Document, Writer
from ernie5.sequence.layout import (
    AUDIO,
    Encoder,
    check_length,
    encode_text,
    frame_codes,
    frame_inputs,
    open_frames,
    part_length,
    write_parts,
)
from ernie5.sequence.packing import collate, pack
from ernie5.sequence.parts import CodedPart
from ernie5.sequence.spec import LayoutSpec
from ernie5.sequence.vocabulary import Kind, Special

TARGETS = ("text", "image", "video", "audio")


@dataclass(frozen=True)
class Step:
    """Feed columns ``start .. stop-1``; then predict from the last ``predicts`` of them.

    Text: the next token. Audio: the codes of frame ``frame``. Image, video: the bits of ``scale`` (from 0) of latent
    frame ``frame``, one code per predicting column. ``predicts`` 0: the columns are only context for later steps.
    """

    start: int
    stop: int
    predicts: int
    frame: int = 0
    scale: int = 0


@dataclass(frozen=True)
class Plan:
    """``document`` up to its largest length, the steps over its columns,."""

    document: Document
    steps: tuple[Step, ...]
    target: str


def plan_generation(
    prompt: Sequence[CodedPart],
    target: str,
    text_tokenizer: Encoder,
    spec: LayoutSpec,
    size: int,
    context: np.ndarray | None = None,
) -> Plan:
    """Plans what follows a coded prompt.

    ``size``: text tokens, audio frames, or latent frames of a video (an image has one). ``context`` float
    [T0, h, w, d] are the latent frames with which a video starts. Raises ValueError for an unknown target, or when
    prompt and target exceed the context; text and audio are shortened to what fits, if at least one unit does.
    """
    if target not in TARGETS:
        raise ValueError(f"cannot generate '{target}'; choose one of {', '.join(TARGETS)}")
    parts = encode_text(prompt, text_tokenizer, spec)
    prompt_length = 1 + sum(part_length(part, spec) for part in parts)
    opening = 0 if target == "text" else 1
    units = _units(target, size, spec.length - prompt_length - opening)
    length = prompt_length + opening + units * (spec.frame_tokens if target in ("image", "video") else 1)
    check_length(length, spec, f"the prompt ({prompt_length} positions) with the {target} to generate")
    writer = Writer(spec, length)
    writer.special(Special.BOS)
    write_parts(writer, parts, None)
    if target in ("image", "video"):
        given = _open_vision(writer, units, target == "video", context)
        steps = _vision_steps(spec, writer.length, units, given)
        return Plan(writer.document(), steps, target)
    if target == "audio":
        writer.special(AUDIO.begin, kind=AUDIO.generated)
    known = writer.at
    token, kind = (Special.AUDIO, AUDIO.generated) if opening else (Special.EOS, Kind.TEXT)
    writer.text(np.full(units, token), loss=False, kind=kind)
    walk = tuple(Step(known + i - 1, known + i, 1, frame=i) for i in range(1, units))
    return Plan(writer.document(), (Step(0, known, 1), *walk), target)


def _units(target: str, size: int, room: int) -> int:
    if target == "image":
        return 1
    return max(1, min(size, room)) if target in ("text", "audio") else size


def _open_vision(writer: Writer, count: int, video: bool, context: np.ndarray | None) -> int:
    """Writes the block with the given frames in it; returns how many are given."""
    given = 0 if context is None else len(context)
    assert given < count, f"{given} context frames leave nothing of {count} to generate"
    start = open_frames(writer, count, video, np.zeros(count, bool), loss=False)
    if given:
        writer.frame_features(start, frame_inputs(frame_codes(context, writer.spec), writer.spec))
    return given


def _vision_steps(spec: LayoutSpec, length: int, count: int, given: int) -> tuple[Step, ...]:
    """Scale 1 from the opening token or the frame before, scales 2..K from their inputs."""
    block = length - count * spec.frame_tokens
    steps, start = [], 0
    for t in range(given, count):
        stop = block + t * spec.frame_tokens
        for k, size in enumerate(spec.pyramid.sizes):
            stop += size if k else 0
            steps.append(Step(start, stop, size, frame=t, scale=k))
            start = stop
    return tuple(steps)


def plan_batch(
    prompts: Sequence[Sequence[CodedPart]],
    target: str,
    text_tokenizer: Encoder,
    spec: LayoutSpec,
    size: int,
    contexts: Sequence[np.ndarray] | None = None,
    guided: bool = False,
) -> tuple[dict[str, np.ndarray], tuple[Step, ...]]:
    """One batch for several prompts, padded on the left so that their targets share columns.

    ``guided`` adds, after the rows of the prompts, one row each whose prompt is BOS alone: training drops prompts in
    this way, and classifier-free guidance compares the two. Text and audio get the size that fits every prompt.
    Returns the batch fields and the steps over its columns; the first step starts at column 0.
    """
    contexts = [None] * len(prompts) if contexts is None else contexts
    plans = [plan_generation(p, target, text_tokenizer, spec, size, c) for p, c in zip(prompts, contexts, strict=True)]
    shortest = min(len(plan.steps) for plan in plans)
    if target in ("text", "audio") and any(len(plan.steps) > shortest for plan in plans):
        plans = [plan_generation(p, target, text_tokenizer, spec, shortest) for p in prompts]
    if guided:
        units = size if target == "video" else shortest
        plans += [plan_generation([], target, text_tokenizer, spec, units, c) for c in contexts]
    columns = max(len(plan.document) for plan in plans)
    rows = [pack([plan.document], columns, offset=columns - len(plan.document)) for plan in plans]
    return collate(rows), next(plan.steps for plan in plans if len(plan.document) == columns)
