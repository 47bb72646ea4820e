"""Speech: write down what is said, say what is written, and what the codec alone loses."""

from __future__ import annotations

import re

import numpy as np

from ernie5.evaluation.audio_quality import audio_reconstruction_snr
from ernie5.evaluation.generating import answer_texts, generate_all
from ernie5.evaluation.measure import Measurement, Scope, majority_share, prompt_of, prompt_text, share, target_of
from ernie5.evaluation.samples import Exhibit
from ernie5.evaluation.speech_judge import SpeechJudge
from ernie5.sequence.parts import Audio

SHOWN = 12
SPEECH_TEMPERATURE = 0.7
LONGEST_FRAMES = 40  # 80 ms each; a spoken number lasts about one second


def speech_understanding(scope: Scope) -> Measurement:
    """Held-out voices; the answer must be exactly what was said. Ceiling: pocketsphinx on the same recordings."""
    samples = scope.draw("speech_und", 2 * scope.items)
    truths = [_plain(sample.meta["text"]) for sample in samples]
    answers = answer_texts(scope, "speech_understanding", samples)
    right = [_plain(answer) == truth for answer, truth in zip(answers, truths, strict=True)]
    waves = [next(part.wave for part in sample.parts if isinstance(part, Audio)) for sample in samples]
    key = "speech_understanding_accuracy"
    values = {
        key: share(right),
        f"{key}_ceiling": speech_judge(scope, "speech_und").accuracy(waves, truths),
        f"{key}_baseline": majority_share(truths),
    }
    exhibits = [
        Exhibit("speech_understanding", "audio", wave, prompt_text(sample) or "(speech)", answer, bool(ok))
        for wave, sample, answer, ok in list(zip(waves, samples, answers, right, strict=True))[:SHOWN]
    ]
    return Measurement(values, exhibits)


def speech_generation(scope: Scope) -> Measurement:
    """The judge hears the word spoken on request. Ceiling: the same judge on real recordings of the same words."""
    samples = scope.draw("speech_gen")
    truths = [_plain(sample.meta["text"]) for sample in samples]
    prompts = [prompt_of(sample) for sample in samples]
    options = {"max_new_tokens": LONGEST_FRAMES, "temperature": SPEECH_TEMPERATURE}
    waves = generate_all(scope, "speech_generation", prompts, "audio", **options)
    real = [target_of(sample).wave for sample in samples]
    judge = speech_judge(scope, "speech_gen")
    heard = [judge.hear(wave) for wave in waves]
    right = [a == b for a, b in zip(heard, truths, strict=True)]
    key = "speech_generation_accuracy"
    ceiling = judge.accuracy(real, truths)
    values = {
        key: share(right),
        f"{key}_ceiling": ceiling,
        "speech_generation_ceiling": ceiling,
        f"{key}_tokenizer": judge.accuracy([restored(scope, wave) for wave in real], truths),
        f"{key}_baseline": majority_share(truths),
    }
    exhibits = [
        Exhibit("speech_generation", "audio", wave, prompt_text(sample), said or "(nothing)", bool(ok))
        for wave, sample, said, ok in list(zip(waves, samples, heard, right, strict=True))[:SHOWN]
    ]
    return Measurement(values, exhibits)


def audio_reconstruction(scope: Scope) -> Measurement:
    """SNR of held-out speech through the codec, of the waveform and of the mel spectrum. Baseline: silence."""
    samples = scope.draw("speech_gen", 40)
    waves = [target_of(sample).wave for sample in samples]
    copies = [restored(scope, wave) for wave in waves]
    kept = [audio_reconstruction_snr(a, b) for a, b in zip(waves, copies, strict=True)]
    silent = [audio_reconstruction_snr(wave, np.zeros_like(wave)) for wave in waves]
    values = {
        "audio_reconstruction_snr": float(np.mean([one.waveform_snr for one in kept])),
        "audio_reconstruction_snr_baseline": float(np.mean([one.waveform_snr for one in silent])),
        "audio_reconstruction_spectral_snr": float(np.mean([one.spectral_snr for one in kept])),
        "audio_reconstruction_spectral_snr_baseline": float(np.mean([one.spectral_snr for one in silent])),
    }
    exhibits = []
    for sample, wave, copy in list(zip(samples, waves, copies, strict=True))[:3]:
        exhibits.append(Exhibit("audio_reconstruction", "audio", wave, f"{sample.meta['text']} (real)"))
        exhibits.append(Exhibit("audio_reconstruction", "audio", copy, f"{sample.meta['text']} (restored)"))
    return Measurement(values, exhibits)


def speech_judge(scope: Scope, task: str) -> SpeechJudge:
    """A judge whose grammar holds every phrase of the task's held-out samples."""
    return SpeechJudge(sorted({_plain(sample.meta["text"]) for sample in scope.samples[task]}))


def restored(scope: Scope, wave: np.ndarray) -> np.ndarray:
    """float32 [n] through the codec and back, cut to its length."""
    codec = scope.tokenizers.audio
    return codec.decode(codec.encode(wave))[: len(wave)]


def _plain(text: str) -> str:
    return " ".join(re.findall(r"[a-z]+", text.lower()))
