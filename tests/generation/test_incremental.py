"""Decoding with a cache, group by group, equals one forward pass over the whole document."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import paddle
import pytest

from ernie5.generation.walk import Walk
from ernie5.sequence.layout import frame_codes, frame_inputs, lay_out
from ernie5.sequence.packing import collate, pack
from ernie5.sequence.parts import AudioCodes, CodedPart, Sample, Text, VisionLatent
from ernie5.sequence.plan import plan_batch
from ernie5.sequence.spec import LayoutSpec
from ernie5.sequence.vocabulary import IGNORE
from tests.generation.stand_ins import LOW_BITS, SPEC, tiny_model
from tests.sequence.samples import Letters, audio, features, latent

TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}
MODEL = tiny_model()
PROMPTS = {
    "short": lambda rng, spec: [Text("ab")],
    "image and text": lambda rng, spec: [features(rng, spec), Text("what is it")],
    "clip": lambda rng, spec: [features(rng, spec, 2), Text("abc")],
    "speech": lambda rng, spec: [audio(rng, spec, 4, False), Text("abcdef")],
    "generated before": lambda rng, spec: [Text("a"), audio(rng, spec, 3, True), latent(rng, spec), Text("bc")],
}


def full_forward(parts: Sequence[CodedPart], spec: LayoutSpec) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Batch of one document, and logits of every head at every position, codes of ``labels_audio`` fed back."""
    batch = collate([pack([document := lay_out(Sample(list(parts)), Letters(), spec)], len(document))])
    tensors = {name: paddle.to_tensor(value) for name, value in batch.items()}
    logits: dict[str, np.ndarray] = {}
    with paddle.no_grad():
        hidden = MODEL.embed(tensors)
        common = (tensors["positions"], tensors["attention_intervals"], tensors["input_ids"] != 0)
        blocks, levels = len(MODEL.layers), spec.levels
        hidden = MODEL.run_layers(hidden, *common, last=blocks - levels + 1)
        codes = []
        for level in range(levels):
            codes.append(MODEL.audio_logits(hidden, level).numpy()[0])
            if level + 1 < levels:
                hidden = hidden + MODEL.audio_feedback(tensors["labels_audio"][..., level], level)
                here = blocks - levels + 1 + level
                hidden = MODEL.run_layers(hidden, *common, first=here, last=here + 1)
        logits["audio"] = np.stack(codes, 1)
        logits["text"] = MODEL.text_logits(hidden).numpy()[0]
        logits["bits"] = MODEL.bit_logits(hidden).numpy()[0]
    return batch, logits


def check(
    prompts: list[list[CodedPart]], target: CodedPart, spec: LayoutSpec, walker: Callable, head: str, size: int
) -> None:
    """Every step's logits equal those of the full forward at the predicting positions of the same document."""
    full = [full_forward([*prompt, target], spec) for prompt in prompts]
    name = {"text": "text", "audio": "audio", "bits": "video" if getattr(target, "video", False) else "image"}[head]
    fields, steps = plan_batch(prompts, name, Letters(), spec, size)
    walk = Walk(MODEL, fields)
    with paddle.no_grad():
        walker(walk, steps, target, spec, full)


def compare(walk: Walk, step, got: np.ndarray, full: list, head: str, after: int) -> None:
    """``after``: positions of the full document that the plan leaves out at its end."""
    for row, (batch, logits) in enumerate(full):
        length = batch["input_ids"].shape[1] - after
        here = slice(step.stop - step.predicts - walk.columns + length, step.stop - walk.columns + length)
        np.testing.assert_allclose(got[row], logits[head][here], **TOLERANCE)


def text_walker(walk, steps, target, spec, full) -> None:
    ids = Letters().encode(target.text)
    for i, step in enumerate(steps):
        compare(walk, step, walk.text_logits(step.start, step.stop)[:, None], full, "text", 0)
        if i < len(ids):
            walk.fields["input_ids"][:, step.stop] = ids[i]


def audio_walker(walk, steps, target, spec, full) -> None:
    for step in steps:
        seen = []
        last = step.frame == len(target.codes)
        codes = np.full(spec.levels, spec.codebook_size) if last else target.codes[step.frame]

        def choose(level: int, logits: np.ndarray, codes: np.ndarray = codes, seen: list = seen) -> np.ndarray:
            seen.append(logits)
            return np.full(len(logits), codes[level])

        walk.feed(step.start, step.stop, choose)
        compare(walk, step, np.stack(seen, 1)[:, None], full, "audio", 1)
        if not last:
            walk.fields["audio_codes"][:, step.stop] = codes


def vision_walker(walk, steps, target, spec, full) -> None:
    fed = frame_inputs(frame_codes(target.latents[spec.bits], spec), spec)
    sizes = spec.pyramid.sizes
    for step in steps:
        hidden = walk.feed(step.start, step.stop)
        compare(walk, step, MODEL.bit_logits(hidden[:, -step.predicts :]).numpy(), full, "bits", 2)
        k = (step.scale + 1) % len(sizes)
        place = sum(sizes[1:k]) if k else spec.frame_tokens - 1
        values = fed[step.frame, place : place + sizes[k]]
        walk.place_features(step.stop, np.tile(values, (walk.rows, 1, 1)), k + 1 if k else 0)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_text(prompt: str) -> None:
    rng = np.random.default_rng(0)
    check([PROMPTS[prompt](rng, SPEC)], Text("hello you"), SPEC, text_walker, "text", 10)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_audio(prompt: str) -> None:
    rng = np.random.default_rng(1)
    check([PROMPTS[prompt](rng, SPEC)], audio(rng, SPEC, 5, True), SPEC, audio_walker, "audio", 6)


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("spec", [SPEC, LOW_BITS], ids=["8 bits", "4 bits"])
def test_image(prompt: str, spec: LayoutSpec) -> None:
    rng = np.random.default_rng(2)
    check([PROMPTS[prompt](rng, spec)], latent(rng, spec), spec, vision_walker, "bits", 1)


@pytest.mark.parametrize("window", [0, 1])
@pytest.mark.parametrize("prompt", ["short", "image and text", "generated before"])
def test_video(prompt: str, window: int) -> None:
    rng, spec = np.random.default_rng(3), replace(SPEC, temporal_window=window)
    check([PROMPTS[prompt](rng, spec)], latent(rng, spec, 4), spec, vision_walker, "bits", 4)


@pytest.mark.parametrize(
    ("walker", "head", "size"), [(text_walker, "text", 10), (audio_walker, "audio", 6), (vision_walker, "bits", 1)]
)
def test_prompts_of_every_length_in_one_batch(walker: Callable, head: str, size: int) -> None:
    rng = np.random.default_rng(4)
    target = {"text": Text("hello you"), "audio": audio(rng, SPEC, 5, True), "bits": latent(rng, SPEC)}[head]
    check([build(rng, SPEC) for build in PROMPTS.values()], target, SPEC, walker, head, size)


def test_given_frames_stand_as_if_generated() -> None:
    rng = np.random.default_rng(5)
    clip = latent(rng, SPEC, 3)
    _, logits = full_forward([Text("ab"), clip], SPEC)
    fields, steps = plan_batch([[Text("ab")]], "video", Letters(), SPEC, 3, [clip.latents[8][:2]])
    walk = Walk(MODEL, fields)
    assert len(steps) == len(SPEC.scales)
    with paddle.no_grad():
        got = MODEL.bit_logits(walk.feed(steps[0].start, steps[0].stop)[:, -1:]).numpy()
    place = 1 + 2 + 1 + 2 * SPEC.frame_tokens - 1
    np.testing.assert_allclose(got[0, 0], logits["bits"][place], **TOLERANCE)


def test_the_comparison_notices_a_missing_feedback(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(6)
    target: AudioCodes | VisionLatent = audio(rng, SPEC, 5, True)
    feedback = MODEL.audio_feedback
    full = full_forward([Text("ab"), target], SPEC)
    monkeypatch.setattr(MODEL, "audio_feedback", lambda codes, level: feedback(paddle.full_like(codes, IGNORE), level))
    other = full_forward([Text("ab"), target], SPEC)
    assert np.abs(full[1]["audio"][:, 1:] - other[1]["audio"][:, 1:]).max() > 100 * TOLERANCE["atol"]
