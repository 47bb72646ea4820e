"""The audio tokenizer as a whole, trained for a few steps on noise-like tones."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ernie5.config.schema import AudioTokenizerConfig
from ernie5.tokenizers.audio import AudioTokenizer

TINY = AudioTokenizerConfig(
    levels=3,
    codebook_size=16,
    latent_dim=16,
    channels=24,
    teacher_steps=4,
    speaker_steps=4,
    codec_steps=15,
    batch_size=4,
)


def _tone(hertz: float, samples: int) -> np.ndarray:
    return (0.4 * np.sin(2 * np.pi * hertz * np.arange(samples) / 16000)).astype(np.float32)


@pytest.fixture(scope="module")
def corpus() -> tuple[list[np.ndarray], list[str], list[str]]:
    rng = np.random.default_rng(0)
    hertz = rng.uniform(150, 3000, 12)
    waves = [_tone(h, int(n)) for h, n in zip(hertz, rng.integers(5000, 12000, 12), strict=True)]
    return waves, ["low" if h < 1000 else "high" for h in hertz], ["anna", "ben"] * 6


@pytest.fixture(scope="module")
def tokenizer(corpus: tuple) -> AudioTokenizer:
    return AudioTokenizer.train(TINY, *corpus, progress=False)


@pytest.mark.parametrize("samples", [1, 1280, 1281, 9000])
def test_round_trip_shapes(tokenizer: AudioTokenizer, samples: int) -> None:
    codes = tokenizer.encode(_tone(500, samples))
    frames = -(-samples // 1280)
    assert codes.shape == (frames, TINY.levels)
    assert np.issubdtype(codes.dtype, np.integer) and codes.min() >= 0 and codes.max() < TINY.codebook_size
    wave = tokenizer.decode(codes)
    assert wave.shape == (frames * 1280,) and wave.dtype == np.float32
    assert np.isfinite(wave).all() and np.abs(wave).max() <= 1.0


def test_batch_equals_single(tokenizer: AudioTokenizer, corpus: tuple) -> None:
    waves = corpus[0]
    for wave, codes in zip(waves, tokenizer.encode_batch(waves), strict=True):
        np.testing.assert_array_equal(codes, tokenizer.encode(wave))
    for wave, vector in zip(waves, tokenizer.speaker_embeddings(waves), strict=True):
        np.testing.assert_allclose(vector, tokenizer.speaker_embedding(wave), atol=1e-5)


def test_speaker_embedding_is_a_unit_vector(tokenizer: AudioTokenizer) -> None:
    vector = tokenizer.speaker_embedding(_tone(200, 7000))
    assert vector.shape == (TINY.speaker_dim,) and vector.dtype == np.float32
    assert np.linalg.norm(vector) == pytest.approx(1.0, abs=1e-5)


def test_training_is_deterministic(tokenizer: AudioTokenizer, corpus: tuple) -> None:
    again = AudioTokenizer.train(TINY, *corpus, progress=False)
    wave = corpus[0][0]
    np.testing.assert_array_equal(again.encode(wave), tokenizer.encode(wave))
    np.testing.assert_array_equal(again.decode(again.encode(wave)), tokenizer.decode(tokenizer.encode(wave)))
    np.testing.assert_array_equal(again.speaker_embedding(wave), tokenizer.speaker_embedding(wave))


def test_a_saved_tokenizer_is_the_same_tokenizer(tokenizer: AudioTokenizer, corpus: tuple, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "audio")
    loaded = AudioTokenizer.load(tmp_path / "audio")
    assert loaded.config == tokenizer.config
    codes = tokenizer.encode(corpus[0][3])
    np.testing.assert_array_equal(loaded.encode(corpus[0][3]), codes)
    np.testing.assert_array_equal(loaded.decode(codes), tokenizer.decode(codes))


def test_broken_checkpoints_are_named(tokenizer: AudioTokenizer, tmp_path: Path) -> None:
    folder = tmp_path / "audio"
    with pytest.raises(ValueError, match="no audio tokenizer here"):
        AudioTokenizer.load(folder)
    tokenizer.save(folder)
    head = json.loads((folder / "config.json").read_text())
    head["config"]["channels"] *= 2
    (folder / "config.json").write_text(json.dumps(head))
    with pytest.raises(ValueError, match="has shape"):
        AudioTokenizer.load(folder)
    head["config"].pop("channels")
    (folder / "config.json").write_text(json.dumps(head))
    with pytest.raises(ValueError, match="not those of this version"):
        AudioTokenizer.load(folder)
    tokenizer.save(folder)
    (folder / "weights.safetensors").write_bytes(b"\x10\x00garbage")
    with pytest.raises(ValueError, match="unreadable audio tokenizer weights"):
        AudioTokenizer.load(folder)


class _CountingTeacher:
    """50 features a second without any network: loudness of each 20 ms and its square."""

    def __init__(self) -> None:
        self.heard = 0

    def encode(self, waves: np.ndarray) -> np.ndarray:
        self.heard += len(waves)
        loudness = np.abs(waves).reshape(len(waves), -1, 320).mean(axis=2)
        return np.stack([loudness, loudness**2], axis=2)


def test_another_teacher_can_be_plugged_in(corpus: tuple) -> None:
    waves, _, speakers = corpus
    teacher = _CountingTeacher()
    made = AudioTokenizer.train(TINY, waves, [""] * len(waves), speakers, progress=False, teacher=teacher)
    assert teacher.heard == len(waves)
    assert made.encode(waves[0]).shape[1] == TINY.levels


def test_a_teacher_at_another_rate_is_refused(corpus: tuple) -> None:
    class Slow:
        def encode(self, waves: np.ndarray) -> np.ndarray:
            return np.zeros((len(waves), waves.shape[1] // 640, 4), np.float32)

    with pytest.raises(ValueError, match="50 features a second"):
        AudioTokenizer.train(TINY, *corpus, progress=False, teacher=Slow())


def test_bad_corpora_are_named(corpus: tuple) -> None:
    waves, texts, speakers = corpus
    with pytest.raises(ValueError, match="11 speakers"):
        AudioTokenizer.train(TINY, waves, texts, speakers[1:], progress=False)
    with pytest.raises(ValueError, match="recording 1: the wave is empty"):
        AudioTokenizer.train(TINY, [waves[0], waves[0][:0]], texts[:2], speakers[:2], progress=False)
    with pytest.raises(ValueError, match="no transcript"):
        AudioTokenizer.train(TINY, waves[:1], [""], speakers[:1], progress=False)
    with pytest.raises(ValueError, match="sample_rate is 8000"):
        AudioTokenizer.train(replace(TINY, sample_rate=8000), *corpus, progress=False)


@pytest.mark.parametrize(
    "codes", [np.zeros((0, 3), int), np.zeros((4, 2), int), np.full((4, 3), 16), np.full((4, 3), -1)]
)
def test_bad_codes_are_refused(tokenizer: AudioTokenizer, codes: np.ndarray) -> None:
    with pytest.raises(ValueError, match="audio codes"):
        tokenizer.decode(codes)
