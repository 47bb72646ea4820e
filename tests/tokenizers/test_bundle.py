"""From raw to coded samples, with stand-ins that record what they were asked."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from ernie5.sequence.parts import (
    Audio,
    AudioCodes,
    Image,
    Sample,
    Speaker,
    SpeakerEmbedding,
    Text,
    Video,
    VisionFeatures,
    VisionLatent,
)
from ernie5.tokenizers.bundle import Tokenizers


class Vision:
    """Codes are the mean of each clip, so that a mix-up shows."""

    bits_series = (8, 16)

    def __init__(self) -> None:
        self.seen: list[tuple[int, ...]] = []

    def encode(self, frames: np.ndarray, bits: int) -> np.ndarray:
        self.seen.append(frames.shape)
        mean = frames.mean(axis=(1, 2, 3, 4), dtype=np.float32)
        return np.broadcast_to(mean[:, None, None, None, None], (len(frames), (frames.shape[1] + 1) // 2, 4, 4, bits))

    def features(self, frames: np.ndarray) -> tuple[np.ndarray, np.ndarray, tuple[int, int, int]]:
        self.seen.append(frames.shape)
        groups, k = -(-frames.shape[1] // 4), 4 if frames.shape[1] == 1 else 16
        mean = frames.mean(axis=(1, 2, 3, 4), dtype=np.float32)
        values = np.broadcast_to(mean[:, None, None, None], (len(frames), 16 * groups, k, 3))
        return values, -values, (groups, 4, 4)


class Sound:
    config = SimpleNamespace(sample_rate=16000)

    def __init__(self) -> None:
        self.batches: list[list[int]] = []

    def encode_batch(self, waves: list[np.ndarray]) -> list[np.ndarray]:
        self.batches.append([len(wave) for wave in waves])
        return [np.full((-(-len(wave) // 1280), 4), round(float(wave[0]) * 100)) for wave in waves]

    def speaker_embedding(self, wave: np.ndarray) -> np.ndarray:
        return np.full(8, wave[0])


@pytest.fixture
def bundle() -> Tokenizers:
    return Tokenizers(SimpleNamespace(), Vision(), Sound())


def _picture(value: int) -> np.ndarray:
    return np.full((32, 32, 3), value, np.uint8)


def test_every_part_becomes_its_own_code(bundle):
    clip, wave = np.full((5, 32, 32, 3), 9, np.uint8), np.full(3000, 0.5, np.float32)
    voice = np.full(2000, 0.25, np.float32)
    samples = [
        Sample([Image(_picture(1)), Text("q", loss=False), Text("a")], "see", {"n": 1}),
        Sample([Text("draw"), Image(_picture(2), generate=True)], "draw"),
        Sample([Video(clip), Text("what?")], "watch"),
        Sample([Text("film"), Video(clip, generate=True)], "film"),
        Sample([Text("say"), Speaker(voice), Audio(wave, generate=True)], "say"),
        Sample([Audio(wave), Text("word")], "hear"),
    ]
    see, draw, watch, film, say, hear = bundle.encode_samples(samples, progress=False)
    assert isinstance(see.parts[0], VisionFeatures) and (see.parts[0].cnn == 1).all() and not see.parts[0].video
    assert see.parts[1:] == samples[0].parts[1:] and (see.task, see.meta) == ("see", {"n": 1})
    assert isinstance(draw.parts[1], VisionLatent) and not draw.parts[1].video
    assert {bits: latent.shape for bits, latent in draw.parts[1].latents.items()} == {
        8: (1, 4, 4, 8),
        16: (1, 4, 4, 16),
    }
    assert (draw.parts[1].latents[8] == 2).all()
    assert watch.parts[0].video and watch.parts[0].grid == (2, 4, 4) and watch.parts[0].vit.shape == (32, 16, 3)
    assert film.parts[1].video and film.parts[1].latents[16].shape == (3, 4, 4, 16)
    assert isinstance(say.parts[1], SpeakerEmbedding) and (say.parts[1].vector == 0.25).all()
    assert isinstance(say.parts[2], AudioCodes) and say.parts[2].generate and say.parts[2].codes.shape == (3, 4)
    assert not hear.parts[0].generate and (hear.parts[0].codes == 50).all()
    assert samples[0].parts[0].pixels is not None and isinstance(samples[0].parts[0], Image)  # the input stays raw


def test_a_shared_array_is_encoded_once_and_shapes_are_batched(bundle):
    pictures = [_picture(i) for i in range(300)]
    samples = [Sample([Image(picture), Text("x")]) for picture in pictures for _ in range(2)]
    samples.append(Sample([Image(np.zeros((16, 16, 3), np.uint8))]))
    coded = bundle.encode_samples(samples, progress=False)
    assert sorted(bundle.vision.seen) == [(1, 1, 16, 16, 3), (44, 1, 32, 32, 3), (256, 1, 32, 32, 3)]
    assert [int(sample.parts[0].cnn[0, 0, 0]) for sample in coded[:600:2]] == [i % 256 for i in range(300)]
    assert coded[0].parts[0] is coded[1].parts[0]


def test_recordings_share_batches_with_similar_lengths(bundle):
    lengths = np.random.default_rng(0).permutation(100) * 100 + 100
    samples = [Sample([Audio(np.full(n, n / 1e4, np.float32))]) for n in lengths]
    coded = bundle.encode_samples(samples, progress=False)
    assert [len(batch) for batch in bundle.audio.batches] == [64, 36]
    assert max(bundle.audio.batches[0]) < min(bundle.audio.batches[1])
    for sample, n in zip(coded, lengths, strict=True):
        assert len(sample.parts[0].codes) == -(-n // 1280) and sample.parts[0].codes[0, 0] == n // 100


def test_text_and_coded_parts_stay(bundle):
    coded = [Text("a"), AudioCodes(np.zeros((2, 4), int)), SpeakerEmbedding(np.zeros(8, np.float32))]
    (sample,) = bundle.encode_samples([Sample(coded)], progress=True)
    assert all(a is b for a, b in zip(sample.parts, coded, strict=True))
    assert bundle.encode_samples([], progress=False) == []


@pytest.mark.parametrize("part", [Audio(np.zeros(10), 44100), Speaker(np.zeros(10), 8000)])
def test_another_sample_rate_is_refused(bundle, part):
    with pytest.raises(ValueError, match=f"{part.sample_rate} samples a second, expected 16000"):
        bundle.encode_samples([Sample([part])], progress=False)


def test_a_missing_tokenizer_is_named(tmp_path):
    with pytest.raises(ValueError, match="no text tokenizer here"):
        Tokenizers.load(tmp_path)
