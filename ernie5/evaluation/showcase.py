"""Own data: what the model makes of a few held-out samples of every task that has no metric of its own."""

from __future__ import annotations

import numpy as np

from ernie5.evaluation.generating import VISION, generate_all
from ernie5.evaluation.measure import Measurement, Scope, prompt_of, prompt_text, target_of
from ernie5.evaluation.samples import Exhibit
from ernie5.sequence.parts import Audio, Image, RawPart, Sample, Video

SHOWN = 8  # held-out samples of a task
SECTION = "own"  # where they stand among the samples
KINDS = {Image: "image", Video: "video", Audio: "audio"}
OPTIONS = {
    "text": {"max_new_tokens": 60, "temperature": 0.0},
    "image": VISION,
    "video": VISION,
    "audio": {"temperature": 0.7},
}


def own_tasks(scope: Scope, judged: frozenset[str]) -> Measurement:
    """Continues the prompts of held-out samples whose task is not in ``judged``; nothing is measured."""
    exhibits = []
    for task in scope.samples:
        if task in judged:
            continue
        samples = [sample for sample in scope.draw(task, SHOWN) if prompt_of(sample)]
        for kind in sorted({kind_of(target_of(sample)) for sample in samples}):
            chosen = [sample for sample in samples if kind_of(target_of(sample)) == kind]
            made = generate_all(scope, f"own {task}", [prompt_of(s) for s in chosen], kind, **OPTIONS[kind])
            exhibits += [exhibit(task, sample, result) for sample, result in zip(chosen, made, strict=True)]
    return Measurement({}, exhibits)


def kind_of(part: RawPart) -> str:
    """What a part is, as ``generate`` names it."""
    return KINDS.get(type(part), "text")


def exhibit(task: str, sample: Sample, result: str | np.ndarray) -> Exhibit:
    """A generated picture, clip or recording; for a text, the medium it was asked about with the text beside it."""
    caption = f"{task}: {prompt_text(sample)}"
    if not isinstance(result, str):
        kind = {1: "audio", 3: "image", 4: "clip"}[result.ndim]
        return Exhibit(SECTION, kind, result, caption)
    for part in sample.parts:
        if isinstance(part, Image):
            return Exhibit(SECTION, "image", part.pixels, caption, result)
        if isinstance(part, Video):
            return Exhibit(SECTION, "clip", part.frames, caption, result)
        if isinstance(part, Audio):
            return Exhibit(SECTION, "audio", part.wave, caption, result)
    return Exhibit(SECTION, "text", result, caption)
