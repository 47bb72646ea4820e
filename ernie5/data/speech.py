"""Spoken digit words and two-digit numbers in many synthetic voices: what was said, and say it.

The split is by voice: variants in ``HELDOUT_VARIANTS`` never speak in training, in either accent. All phrases occur in
both splits.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from ernie5.data import espeak
from ernie5.data.espeak import Utterance
from ernie5.data.source import check_split
from ernie5.sequence.parts import Audio, Sample, Speaker, Text

DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
NUMBER_WORDS = tuple(f"{ten} {unit}".removesuffix(" zero") for ten in TENS for unit in DIGIT_WORDS)
PHRASES = DIGIT_WORDS + NUMBER_WORDS

TRAIN_VARIANTS = ("f1", "f3", "f4", "f5", "m1", "m2", "m4", "m5", "m7", "m8")
HELDOUT_VARIANTS = ("f2", "m3", "m6")
RATES = (135, 185)  # words per minute, drawn between
PITCHES = (30, 65)
RANGES = (35, 65)
UNNAMED = 6  # one in so many requests to speak names no speaker
LEAD, TRAIL = 0.10, 0.14  # seconds of silence kept around an utterance

QUESTIONS = ("what was said?", "what did you hear?", "which number was spoken?")
REQUESTS = ("say: {}", "speak: {}", "say the word {}")


@dataclass
class Recording:
    said: Utterance
    wave: np.ndarray  # float32 [n] at 16 kHz; every sample that uses the recording holds this very array


@dataclass
class SpeechSource:
    """Samples of the tasks ``speech_und`` and ``speech_gen``; the counts are recordings a voice. Pure in ``seed``."""

    digits_per_voice: int = 40  # each digit word this often / 10, with new rate and pitch every time
    numbers_per_voice: int = 80
    seed: int = 0
    tasks: tuple[str, ...] = field(default=("speech_und", "speech_gen"), init=False)
    feeds: frozenset[str] = field(default=frozenset({"audio"}), init=False)

    def samples(self, split: str) -> list[Sample]:
        """All samples of "train" or "heldout"; ``meta`` has the text and the voice."""
        check_split(split)
        recordings = self._train if split == "train" else self._heldout
        understanding = [_understanding(recording) for recording in recordings]
        return understanding + self._generation(recordings)

    @cached_property
    def _train(self) -> list[Recording]:
        return self._record(TRAIN_VARIANTS)

    @cached_property
    def _heldout(self) -> list[Recording]:
        return self._record(HELDOUT_VARIANTS)

    def _record(self, variants: tuple[str, ...]) -> list[Recording]:
        plan = self._plan(variants)
        waves = espeak.render(plan)
        return [Recording(said, espeak.tidy(wave, LEAD, TRAIL)) for said, wave in zip(plan, waves, strict=True)]

    def _plan(self, variants: tuple[str, ...]) -> list[Utterance]:
        """Every voice says the phrases in a fresh order; rate, pitch and range are drawn for each utterance."""
        rng = np.random.default_rng([self.seed, *map(ord, "".join(variants))])
        plan = []
        for voice in (f"{accent}+{variant}" for accent in espeak.ACCENTS for variant in variants):
            for phrases, count in ((DIGIT_WORDS, self.digits_per_voice), (NUMBER_WORDS, self.numbers_per_voice)):
                order = rng.permutation(np.resize(rng.permutation(len(phrases)), count))
                for phrase in order:
                    rate, pitch, spread = rng.integers(*np.transpose((RATES, PITCHES, RANGES)), endpoint=True).tolist()
                    plan.append(Utterance(phrases[phrase], voice, rate, pitch, spread))
        return plan

    def _generation(self, recordings: list[Recording]) -> list[Sample]:
        """One sample a digit recording; the voice is shown by another recording of the same voice, another phrase.

        Every ``UNNAMED``-th shows no voice, so that a request without a speaker can be followed too.
        """
        rng = np.random.default_rng([self.seed, len(recordings)])
        by_voice: dict[str, list[Recording]] = {}
        for recording in recordings:
            by_voice.setdefault(recording.said.voice, []).append(recording)
        samples = []
        for i, recording in enumerate(r for r in recordings if r.said.text in DIGIT_WORDS):
            others = [r for r in by_voice[recording.said.voice] if r.said.text != recording.said.text]
            other = others[rng.integers(len(others))]
            samples.append(_generation(recording, None if i % UNNAMED == 0 else other))
        return samples


def _meta(recording: Recording) -> dict:
    return {"text": recording.said.text, "voice": recording.said.voice}


def _understanding(recording: Recording) -> Sample:
    parts = [Audio(recording.wave), Text(QUESTIONS, loss=False), Text(recording.said.text)]
    return Sample(parts, task="speech_und", meta=_meta(recording))


def _generation(recording: Recording, other: Recording | None) -> Sample:
    prompts = tuple(request.format(recording.said.text) for request in REQUESTS)
    voice = [] if other is None else [Speaker(other.wave)]
    parts = [Text(prompts), *voice, Audio(recording.wave, generate=True)]
    return Sample(parts, task="speech_gen", meta=_meta(recording))
