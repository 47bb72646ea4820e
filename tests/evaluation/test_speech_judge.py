"""The judge hears real samples, leaves no trace between calls, and stays silent at silence."""

from __future__ import annotations

import numpy as np
import pytest

from ernie5.data import espeak
from ernie5.data.espeak import Utterance
from ernie5.data.speech import DIGIT_WORDS
from ernie5.evaluation.audio_quality import audio_reconstruction_snr
from ernie5.evaluation.speech_judge import SpeechJudge


@pytest.fixture(scope="module")
def judge() -> SpeechJudge:
    return SpeechJudge()


@pytest.fixture(scope="module")
def waves() -> list[np.ndarray]:
    return [espeak.tidy(wave) for wave in espeak.render([Utterance(word, "en-us+m3", 150) for word in DIGIT_WORDS])]


def test_real_digits_are_heard_at_any_level(judge: SpeechJudge, waves: list[np.ndarray]) -> None:
    assert judge.accuracy(waves, DIGIT_WORDS) >= 0.9
    assert [judge.hear(0.1 * wave) for wave in waves] == [judge.hear(wave) for wave in waves]


def test_earlier_recordings_leave_no_trace(judge: SpeechJudge, waves: list[np.ndarray]) -> None:
    forwards = [judge.hear(wave) for wave in waves]
    assert [judge.hear(wave) for wave in waves[::-1]][::-1] == forwards


def test_the_grammar_decides_what_can_be_heard(waves: list[np.ndarray]) -> None:
    heard = SpeechJudge(["seven", "forty two"]).hear(waves[7])
    assert heard == "seven"


def test_silence_is_nothing(judge: SpeechJudge) -> None:
    assert judge.hear(np.zeros(8000, np.float32)) == ""
    assert judge.hear(np.zeros(0, np.float32)) == ""


@pytest.mark.parametrize(("phrases", "message"), [([], "at least one"), (["blorptangle"], "blorptangle")])
def test_impossible_grammars_are_refused(phrases: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SpeechJudge(phrases)


def test_reconstruction_figures() -> None:
    wave = np.sin(np.arange(12800) / 7).astype(np.float32)
    noise = np.random.default_rng(0).standard_normal(len(wave)).astype(np.float32)
    noise *= np.linalg.norm(wave) / np.linalg.norm(noise) / 10
    assert audio_reconstruction_snr(wave, wave + noise).waveform_snr == pytest.approx(20.0, abs=0.01)
    flipped = audio_reconstruction_snr(wave, -wave)
    assert flipped.waveform_snr == pytest.approx(-6.02, abs=0.01) and flipped.spectral_snr > 60
    assert audio_reconstruction_snr(wave, 0 * wave).waveform_snr == pytest.approx(0.0, abs=0.01)
