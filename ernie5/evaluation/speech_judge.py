"""Hears one of a closed list of phrases in a recording: pocketsphinx with its own acoustic model and a closed grammar.

The judge knows nothing of the model under test. How often it is right on real recordings is the ceiling of every
figure that rests on it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ernie5.data.speech import DIGIT_WORDS

SAMPLE_RATE = 16000
_PEAK = 0.6  # every recording is brought to this level
_NOISE = 2.5e-3  # standard deviation of the noise added: the acoustic model has never met digital silence
_MARGIN = 0.1  # seconds of that noise before and after


class SpeechJudge:
    """One decoder with the grammar of ``phrases``; each phrase is one or more words of the CMU dictionary."""

    def __init__(self, phrases: Sequence[str] = DIGIT_WORDS) -> None:
        from pocketsphinx import Decoder

        if not phrases:
            raise ValueError("a speech judge needs at least one phrase to listen for, got none")
        self._decoder = Decoder(lm=None, loglevel="FATAL", samprate=SAMPLE_RATE, cmn="batch", bestpath=False)
        for word in sorted({word for phrase in phrases for word in phrase.split()}):
            if self._decoder.lookup_word(word) is None:
                raise ValueError(f"the judge's dictionary has no word {word!r}; listen for words it knows")
        grammar = f"#JSGF V1.0; grammar phrases; public <phrase> = {' | '.join(phrases)};"
        self._decoder.add_jsgf_string("phrases", grammar)
        self._decoder.activate_search("phrases")

    def hear(self, wave: np.ndarray) -> str:
        """float32 [n] at 16 kHz -> the phrase heard, "" when none fits or the recording is silent."""
        peak = np.abs(wave).max(initial=0.0)
        if peak == 0.0:
            return ""
        level = np.pad(wave * (_PEAK / peak), round(_MARGIN * SAMPLE_RATE))
        noisy = level + _NOISE * np.random.default_rng(0).standard_normal(len(level))
        pcm = (np.clip(noisy, -1.0, 1.0) * 32767).astype(np.int16)
        self._decoder.start_utt()
        self._decoder.process_raw(pcm.tobytes(), no_search=False, full_utt=True)
        self._decoder.end_utt()
        hypothesis = self._decoder.hyp()
        return hypothesis.hypstr if hypothesis else ""

    def accuracy(self, waves: Sequence[np.ndarray], truths: Sequence[str]) -> float:
        """Share of recordings heard as their own phrase."""
        assert len(waves) == len(truths) > 0
        return float(np.mean([self.hear(wave) == truth for wave, truth in zip(waves, truths, strict=True)]))
