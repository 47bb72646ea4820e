"""Clips: make the motion that was asked for, continue a real clip, and say what moves where."""

from __future__ import annotations

import re

import numpy as np

from ernie5.evaluation.generating import VISION, answer_texts, generate_all, reconstructed_clips
from ernie5.evaluation.judges import DIRECTIONS, MotionJudge, psnr
from ernie5.evaluation.measure import Measurement, Scope, majority_share, prompt_of, prompt_text, share, target_of
from ernie5.evaluation.samples import Exhibit
from ernie5.sequence.parts import Sample, Text, Video

CONTEXT_LATENT_FRAMES = 2  # latent frames of a real clip that the model continues
SHOWN = 12


def video_generation(scope: Scope) -> Measurement:
    """Direction of motion in the clip made on request, measured from its frames."""
    samples = scope.draw("clip_gen")
    real = np.stack([target_of(sample).frames for sample in samples])
    prompts = [prompt_of(sample) for sample in samples]
    frames = real.shape[1]
    clips = generate_all(scope, "video_generation", prompts, "video", num_frames=frames, **VISION)
    clips = np.stack(clips)
    directions = [sample.meta["direction"] for sample in samples]
    judge = MotionJudge()
    seen = judge.read(clips)
    right = [a == b for a, b in zip(seen, directions, strict=True)]
    key = "video_generation_accuracy"
    values = {
        key: share(right),
        f"{key}_ceiling": _agreement(judge.read(real), directions),
        f"{key}_tokenizer": _agreement(judge.read(reconstructed_clips(scope, real)), directions),
        f"{key}_baseline": majority_share(directions),
    }
    rows = list(zip(clips, samples, seen, right, strict=True))
    shown = []
    for direction in DIRECTIONS:
        shown += [row for row in rows if row[1].meta["direction"] == direction][: SHOWN // len(DIRECTIONS)]
    exhibits = [
        Exhibit(
            "video_generation",
            "clip",
            clip,
            prompt_text(sample),
            f"moves {direction}" if direction in DIRECTIONS else direction,
            ok,
        )
        for clip, sample, direction, ok in shown
    ]
    return Measurement(values, exhibits)


def next_frame(scope: Scope) -> Measurement:
    """PSNR of the first frame after the context against the real one; copying the last real frame is the baseline.

    The model sees the first latent frames of a real clip and its caption, and predicts the next latent frame greedily.
    ``video_next_frames_psnr``: the mean over all raw frames of that latent frame. Ceiling: the tokenizer's own
    restoration of the same frames.
    """
    samples = scope.draw("clip_gen")
    real = np.stack([target_of(sample).frames for sample in samples])
    known = scope.tokenizers.vision.num_frames(CONTEXT_LATENT_FRAMES)
    until = scope.tokenizers.vision.num_frames(CONTEXT_LATENT_FRAMES + 1)
    prompts, context = [prompt_of(sample) for sample in samples], list(real[:, :known])
    options = {"num_frames": until, "temperature": 0.0}
    clips = np.stack(generate_all(scope, "next_frame", prompts, "video", context, **options))
    restored = reconstructed_clips(scope, real[:, :until])
    truth = real[:, known:until]
    copied = np.repeat(real[:, known - 1 : known], until - known, axis=1)
    made, kept = clips[:, known:until], restored[:, known:until]
    values = {"video_copy_last_psnr": _mean_psnr(truth[:, :1], copied[:, :1])}
    for key, count in (("video_next_frame_psnr", 1), ("video_next_frames_psnr", until - known)):
        values[key] = _mean_psnr(truth[:, :count], made[:, :count])
        values[f"{key}_ceiling"] = _mean_psnr(truth[:, :count], kept[:, :count])
        values[f"{key}_baseline"] = _mean_psnr(truth[:, :count], copied[:, :count])
    exhibits = [
        Exhibit("video_next_frame", "clip", np.concatenate([whole[:until], clip[:until]], 2), prompt_text(sample))
        for whole, clip, sample in list(zip(real, clips, samples, strict=True))[:8]
    ]
    return Measurement(values, exhibits)


def video_understanding(scope: Scope) -> Measurement:
    """The answer must name the direction; ``_object`` counts answers that also name the rest of the caption."""
    samples = scope.draw("clip_und", 2 * scope.items)
    directions = [sample.meta["direction"] for sample in samples]
    answers = answer_texts(scope, "video_understanding", samples)
    right = [named_directions(answer) == [truth] for answer, truth in zip(answers, directions, strict=True)]
    whole = [_words(answer) in _wordings(sample) for answer, sample in zip(answers, samples, strict=True)]
    real = np.stack([next(part.frames for part in sample.parts if isinstance(part, Video)) for sample in samples])
    key = "video_understanding_accuracy"
    values = {
        key: share(right),
        f"{key}_ceiling": _agreement(MotionJudge().read(real), directions),
        f"{key}_baseline": majority_share(directions),
        "video_understanding_object_accuracy": share(whole),
        "video_understanding_object_accuracy_baseline": majority_share([_wordings(sample)[0] for sample in samples]),
    }
    exhibits = [
        Exhibit("video_understanding", "clip", clip, prompt_text(sample) or "(clip)", answer, bool(ok))
        for clip, sample, answer, ok in list(zip(real, samples, answers, whole, strict=True))[:SHOWN]
    ]
    return Measurement(values, exhibits)


def named_directions(answer: str) -> list[str]:
    """Directions named in an answer, in order of appearance."""
    return [word for word in re.findall(r"[a-z]+", answer.lower()) if word in DIRECTIONS]


def _words(text: str) -> str:
    return " ".join(re.findall(r"[a-z]+", text.lower()))


def _wordings(sample: Sample) -> list[str]:
    """Every accepted wording of the answer of an understanding sample, in plain lower-case words."""
    answer = sample.parts[-1]
    assert isinstance(answer, Text)
    return [_words(text) for text in ([answer.text] if isinstance(answer.text, str) else answer.text)]


def _agreement(seen: list[str], truth: list[str]) -> float:
    return share([a == b for a, b in zip(seen, truth, strict=True)])


def _mean_psnr(truth: np.ndarray, candidate: np.ndarray) -> float:
    return float(np.mean([psnr(a, b) for a, b in zip(truth, candidate, strict=True)]))
