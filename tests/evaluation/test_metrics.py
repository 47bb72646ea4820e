"""Metrics against generators whose worth is known: an oracle reaches the ceiling, a contrary one falls to nothing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from ernie5.config import Config, DataConfig, EvaluationConfig
from ernie5.data.clips import ClipSource
from ernie5.data.digits import DigitSource
from ernie5.data.icons import IconSource
from ernie5.data.speech import SpeechSource
from ernie5.evaluation import audio_metrics, generating, metrics, showcase, video_metrics, vision_metrics
from ernie5.evaluation.measure import Scope, generated_part, prompt_of, target_of
from ernie5.sequence.parts import Audio, Image, Text, Video

ITEMS = 40


class CleanVision:
    """A tokenizer that loses nothing."""

    def reconstruct(self, frames, bits):
        return frames

    def num_frames(self, latent_frames):
        return 1 + 2 * (latent_frames - 1)


class CleanAudio:
    def encode(self, wave):
        return wave

    def decode(self, codes):
        return codes


class CleanTokenizers:
    vision, audio = CleanVision(), CleanAudio()


def by_task(*sources):
    """Held-out samples by task; of those with the same prompt, the first, so that a prompt names its sample."""
    grouped = {}
    for source in sources:
        for sample in source.samples("heldout"):
            grouped.setdefault(sample.task, {}).setdefault(prompt_key(prompt_of(sample)), sample)
    return {task: list(members.values()) for task, members in grouped.items() if members}


def prompt_key(parts):
    media = [getattr(part, name) for part in parts for name in ("pixels", "frames", "wave") if hasattr(part, name)]
    return tuple(part.text for part in parts if isinstance(part, Text)), tuple(map(id, media))


@pytest.fixture(scope="module")
def samples():
    speech = SpeechSource(digits_per_voice=10, numbers_per_voice=4)
    return by_task(DigitSource(), IconSource(heldout=80), ClipSource(heldout=60), speech)


@pytest.fixture(scope="module")
def shared_cache():
    return {}


@pytest.fixture
def scope(samples, tmp_path, shared_cache):
    return Scope(None, CleanTokenizers(), Config(), samples, tmp_path, items=ITEMS, cache=shared_cache)


class Generator:
    """Stands in for ``generate``: finds the sample behind a prompt and answers through ``answer(sample)``."""

    def __init__(self, samples, answer):
        self.known = {prompt_key(prompt_of(sample)): sample for group in samples.values() for sample in group}
        self.answer, self.calls = answer, []

    def __call__(self, model, tokenizers, prompts, to, **options):
        self.calls.append({"to": to, "prompts": len(prompts), **options})
        return [self.answer(self.known[prompt_key(parts)]) for parts in prompts]


def truth(sample):
    part = target_of(sample)
    return next(getattr(part, name) for name in ("pixels", "frames", "wave", "text") if hasattr(part, name))


def contrary(sample):
    """Nothing of what was asked: an empty canvas, the clip backwards, silence."""
    part = sample.parts[generated_part(sample)]
    if isinstance(part, Image):
        return np.full_like(part.pixels, 255 if "colour" in sample.meta else 0)
    if isinstance(part, Video):
        return part.frames[::-1]
    return np.zeros_like(part.wave) if isinstance(part, Audio) else "nothing at all"


JUDGED = [
    (vision_metrics.image_understanding, "image_understanding_accuracy"),
    (vision_metrics.image_generation, "image_generation_accuracy"),
    (vision_metrics.icon_understanding, "icon_understanding_accuracy"),
    (vision_metrics.caption_attributes, "caption_attribute_accuracy"),
    (audio_metrics.speech_understanding, "speech_understanding_accuracy"),
    (audio_metrics.speech_generation, "speech_generation_accuracy"),
    (video_metrics.video_generation, "video_generation_accuracy"),
    (video_metrics.video_understanding, "video_understanding_accuracy"),
]
UNDERSTANDING = [key for _, key in JUDGED if "understanding" in key]


@pytest.mark.parametrize(("metric", "key"), JUDGED, ids=lambda value: value if isinstance(value, str) else "")
def test_oracle_reaches_the_ceiling_and_contrary_answers_fail(metric, key, scope, samples, monkeypatch):
    monkeypatch.setattr(generating, "generate", Generator(samples, truth))
    values = metric(scope).values
    if key in UNDERSTANDING:
        assert values[key] == 1.0
    else:
        assert abs(values[key] - values[f"{key}_ceiling"]) <= 0.03
        assert values[f"{key}_tokenizer"] == pytest.approx(values[f"{key}_ceiling"], abs=0.03)
    assert values[f"{key}_ceiling"] >= 0.85
    assert 0 < values[f"{key}_baseline"] < 0.5

    monkeypatch.setattr(generating, "generate", Generator(samples, contrary))
    assert metric(scope).values[key] <= 0.02


def test_digits_are_asked_for_equally_often_and_at_least_a_hundred_times(scope, samples, monkeypatch):
    generator = Generator(samples, truth)
    asked = []
    generator.answer = lambda sample: asked.append(sample.meta["digit"]) or truth(sample)
    monkeypatch.setattr(generating, "generate", generator)
    vision_metrics.image_generation(scope)
    assert sorted(asked) == sorted([*range(10)] * 10)
    assert [call["prompts"] for call in generator.calls] == [50, 50]
    assert len({call["seed"] for call in generator.calls}) == 2


def test_icons_are_asked_for_in_unseen_combinations_only(samples):
    trained = IconSource(train=400).samples("train")
    seen = {(sample.meta["colour"], sample.meta["place"]) for sample in trained}
    assert seen.isdisjoint((sample.meta["colour"], sample.meta["place"]) for sample in samples["icon_gen"])


def test_next_frame_compares_with_copying_the_last_known_frame(scope, samples, monkeypatch):
    scope.config = Config(evaluation=EvaluationConfig(batch_size=16))
    generator = Generator(samples, truth)
    monkeypatch.setattr(generating, "generate", generator)
    perfect = video_metrics.next_frame(scope).values
    assert perfect["video_next_frame_psnr"] > 90
    assert generator.calls[0]["context"][0].shape == (3, 32, 32, 3) and generator.calls[0]["num_frames"] == 5
    assert all(len(call["context"]) == call["prompts"] for call in generator.calls) and len(generator.calls) == 3

    def copies(sample):
        frames = truth(sample)
        return np.concatenate([frames[:3], frames[2:3], 255 - frames[2:3]])

    monkeypatch.setattr(generating, "generate", Generator(samples, copies))
    values = video_metrics.next_frame(scope).values
    assert values["video_next_frame_psnr"] == pytest.approx(values["video_copy_last_psnr"])
    assert 5 < values["video_copy_last_psnr"] < 30
    assert values["video_next_frames_psnr"] < values["video_next_frames_psnr_baseline"] < values["video_copy_last_psnr"]


def test_another_seed_draws_other_items_and_the_same_seed_the_same(samples, tmp_path):
    def drawn(seed):
        scope = Scope(None, None, Config(), samples, tmp_path, items=ITEMS, seed=seed)
        return [sample.meta["index"] for sample in scope.draw("digit_und")]

    assert drawn(0) == drawn(0) != drawn(1)
    assert len(set(drawn(0))) == ITEMS


def test_missing_samples_are_named(scope):
    with pytest.raises(ValueError, match="no held-out samples of task 'poetry'"):
        scope.draw("poetry")


def test_reconstruction_of_a_tokenizer_that_loses_nothing(scope):
    values = vision_metrics.image_reconstruction(scope).values
    assert values["image_reconstruction_psnr"] > 90 > values["image_reconstruction_psnr_baseline"] > 5
    sound = audio_metrics.audio_reconstruction(scope).values
    for key in ("audio_reconstruction_snr", "audio_reconstruction_spectral_snr"):
        assert sound[key] > 60 and sound[f"{key}_baseline"] == pytest.approx(0.0, abs=0.01)


def test_the_baseline_of_a_caption_is_its_most_frequent_answer(scope, samples, monkeypatch):
    monkeypatch.setattr(generating, "generate", Generator(samples, truth))
    values = vision_metrics.caption_attributes(scope).values
    asked = [(sample.meta["colour"], sample.meta["place"]) for sample in scope.draw("icon_gen")]
    pair = max(asked, key=asked.count)
    assert values["caption_attribute_accuracy_baseline"] == asked.count(pair) / len(asked) > 1 / 40
    assert values["caption_colour_accuracy_baseline"] >= asked.count(pair) / len(asked)


def test_own_data_are_shown_but_not_judged_whatever_their_tasks_are_called(samples, tmp_path, monkeypatch):
    clips = [replace(sample, meta={}) for sample in samples["clip_gen"][:3]]
    known = Generator(samples, truth)
    monkeypatch.setattr(showcase, "generate_all", lambda scope, name, prompts, *_, **__: known(None, None, prompts, ""))
    monkeypatch.setattr(metrics, "REGISTRY", [metric for metric in metrics.REGISTRY if metric.tasks])
    config = Config(data=DataConfig(manifests=["mine"]))
    result = metrics.measure(Scope(None, None, config, {"clip_gen": clips}, tmp_path), progress=False)
    assert result.values == {} and [exhibit.section for exhibit in result.exhibits] == ["own"] * 3
