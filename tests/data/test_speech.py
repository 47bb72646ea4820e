"""Synthetic speech: what is rendered is a pure function of what was asked, and splits share no voice."""

from __future__ import annotations

import numpy as np
import pytest

from ernie5.data import espeak
from ernie5.data.espeak import Utterance
from ernie5.data.speech import DIGIT_WORDS, PHRASES, SpeechSource
from ernie5.sequence.parts import Audio, Speaker, Text


@pytest.fixture(scope="module")
def source() -> SpeechSource:
    return SpeechSource(digits_per_voice=3, numbers_per_voice=1)


def _parts(sample: object, kind: type) -> list:
    return [part for part in sample.parts if isinstance(part, kind)]


def test_an_utterance_sounds_the_same_whatever_was_said_before() -> None:
    first = Utterance("seven", "en-us+f5")  # a voice with echo, breath and flutter
    alone = espeak.render([first])[0]
    after_others = espeak.render([Utterance("forty two", "en-gb+m3", 180, 30), Utterance("one", "en-us+f1"), first])[2]
    np.testing.assert_array_equal(alone, after_others)


def test_voice_accent_and_rate_are_heard() -> None:
    slow, fast, other, british = espeak.render(
        [
            Utterance("nine", "en-us+m1", 120),
            Utterance("nine", "en-us+m1", 200),
            Utterance("nine", "en-us+f2", 120),
            Utterance("four", "en-gb+m1", 120),
        ]
    )
    assert len(slow) > 1.2 * len(fast)
    assert len(slow) != len(other) or not np.array_equal(slow, other)
    assert not np.array_equal(british, espeak.render([Utterance("four", "en-us+m1", 120)])[0])


@pytest.mark.parametrize(
    ("utterance", "message"),
    [
        (Utterance(" ", "en-us"), "empty"),
        (Utterance("one", "en-us+nobody"), "no voice"),
        (Utterance("...", "en-us"), "no sound"),
    ],
)
def test_what_cannot_be_said_is_named(utterance: Utterance, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        espeak.render([utterance])


def test_tidy_sets_level_and_margins() -> None:
    wave = np.concatenate([np.zeros(3000), 0.1 * np.sin(np.arange(4000) / 5), np.zeros(9000)])
    tidied = espeak.tidy(wave, lead=0.1, trail=0.2)
    assert np.abs(tidied).max() == pytest.approx(0.6, abs=1e-3)
    assert not tidied[:1600].any() and not tidied[-3200:].any()
    assert len(tidied) == pytest.approx(4000 + 4800, abs=20)


def test_splits_share_no_voice_and_the_seed_decides(source: SpeechSource) -> None:
    train, heldout = source.samples("train"), source.samples("heldout")
    voices = [{sample.meta["voice"].split("+")[1] for sample in split} for split in (train, heldout)]
    assert voices[0] and voices[1] and not voices[0] & voices[1]
    again = SpeechSource(digits_per_voice=3, numbers_per_voice=1).samples("heldout")
    other = SpeechSource(digits_per_voice=3, numbers_per_voice=1, seed=1).samples("heldout")
    assert [s.meta for s in again] == [s.meta for s in heldout] != [s.meta for s in other]
    for a, b in zip(again, heldout, strict=True):
        np.testing.assert_array_equal(_parts(a, Audio)[0].wave, _parts(b, Audio)[0].wave)


def test_samples_of_both_tasks(source: SpeechSource) -> None:
    samples = source.samples("heldout")
    assert {sample.task for sample in samples} == set(source.tasks)
    for sample in samples:
        audio, text = _parts(sample, Audio)[0], _parts(sample, Text)
        assert audio.wave.dtype == np.float32 and np.abs(audio.wave).max() <= 1.0
        if sample.task == "speech_und":
            assert text[0].loss is False and text[1].text == sample.meta["text"] and not audio.generate
            assert sample.meta["text"] in PHRASES
        else:
            assert audio.generate and sample.meta["text"] in DIGIT_WORDS
            assert all(sample.meta["text"] in wording for wording in text[0].text)


def test_recordings_are_shared_and_the_speaker_says_something_else(source: SpeechSource) -> None:
    samples = source.samples("train")
    said = {id(_parts(s, Audio)[0].wave): s.meta for s in samples if s.task == "speech_und"}
    for sample in samples:
        if sample.task == "speech_gen":
            assert said[id(_parts(sample, Audio)[0].wave)] == sample.meta
            for speaker in _parts(sample, Speaker):
                shown = said[id(speaker.wave)]
                assert shown["voice"] == sample.meta["voice"] and shown["text"] != sample.meta["text"]
    named = [bool(_parts(sample, Speaker)) for sample in samples if sample.task == "speech_gen"]
    assert any(named) and not all(named), "some requests name no speaker"


def test_an_unknown_split_is_refused(source: SpeechSource) -> None:
    with pytest.raises(ValueError, match="'train' or 'heldout'"):
        source.samples("test")
