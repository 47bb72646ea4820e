"""What every metric that generates or decodes shares: batches, seeds and the strengths used."""

from __future__ import annotations

from typing import Any

import numpy as np

from ernie5.evaluation.measure import Scope, prompt_of
from ernie5.generation import generate
from ernie5.sequence.document import Document
from ernie5.sequence.parts import RawPart, Sample
from ernie5.sequence.spec import LayoutSpec

VISION = {"guidance": 2.0, "temperature": 0.3}  # decoding of every picture and clip that is measured
ANSWER_TOKENS = 24


def generate_all(
    scope: Scope,
    name: str,
    prompts: list[list[RawPart]],
    to: str,
    context: list[np.ndarray] | None = None,
    **options: Any,
) -> list[str | np.ndarray]:
    """``generate`` in the batches of the configuration, each with its own seed derived from ``name``.

    ``context``: one clip uint8 [T, H, W, 3] a prompt for a video to continue.
    """
    spec = LayoutSpec.from_config(scope.config)
    seed, size, results = scope.call_seed(name), scope.config.evaluation.batch_size, []
    for start in range(0, len(prompts), size):
        here = slice(start, start + size)
        if context is not None:
            options["context"] = context[here]
        results += generate(
            scope.model, scope.tokenizers, prompts[here], to=to, seed=seed + start, spec=spec, **options
        )
    return results


def answer_texts(scope: Scope, name: str, samples: list[Sample]) -> list[str]:
    """Greedy answers of the model to understanding samples."""
    prompts = [prompt_of(sample) for sample in samples]
    return [
        answer.strip()
        for answer in generate_all(scope, name, prompts, "text", max_new_tokens=ANSWER_TOKENS, temperature=0.0)
    ]


def reconstructed(scope: Scope, pictures: np.ndarray) -> np.ndarray:
    """uint8 [N, H, W, 3] -> the same through encoder, all scales of bits at the run's full width, and decoder."""
    return reconstructed_clips(scope, pictures[:, None])[:, 0]


def reconstructed_clips(scope: Scope, clips: np.ndarray) -> np.ndarray:
    """uint8 [N, T, H, W, 3] -> uint8 [N, T, H, W, 3] through the vision tokenizer, in batches."""
    size, bits, vision = scope.config.evaluation.batch_size, scope.config.model.vision_bits, scope.tokenizers.vision
    parts = [vision.reconstruct(clips[start : start + size], bits) for start in range(0, len(clips), size)]
    return np.concatenate(parts)


def first_fit(documents: list[Document], room: int) -> list[list[Document]]:
    """Groups of documents whose lengths fit ``room``, longest first, each into the first group with space."""
    groups: list[list[Document]] = []
    left: list[int] = []
    for document in sorted(documents, key=len, reverse=True):
        place = next((number for number, space in enumerate(left) if space >= len(document)), len(groups))
        if place == len(groups):
            groups.append([])
            left.append(room)
        groups[place].append(document)
        left[place] -= len(document)
    return groups
