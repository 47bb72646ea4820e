"""What stands where, and what each position learns."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from ernie5.config import Config
from ernie5.sequence.corruption import flip_probabilities
from ernie5.sequence.layout import lay_out
from ernie5.sequence.parts import AudioCodes, CodedPart, Image, Sample, SpeakerEmbedding, Text, VisionLatent
from ernie5.sequence.spec import LayoutSpec
from ernie5.sequence.vocabulary import IGNORE, NO_CODE, Kind, Special
from tests.sequence.samples import Letters, audio, features, latent

SPEC = LayoutSpec(bits=8, max_bits=16, scales=(1, 2, 4), levels=3, codebook_size=50)


def ids_of(text: str) -> list[int]:
    return Letters().encode(text)


def test_text_learns_every_next_token_and_the_one_after() -> None:
    document = lay_out(Sample([Text("abc")]), Letters(), SPEC)
    a, b, c = ids_of("abc")
    assert document.input_ids.tolist() == [Special.BOS, a, b, c, Special.EOS]
    assert document.labels_text.tolist() == [a, b, c, Special.EOS, IGNORE]
    assert document.labels_mtp.tolist() == [b, c, Special.EOS, IGNORE, IGNORE]
    assert document.loss_weight.tolist() == [1, 1, 1, 1, 0]


def test_text_without_loss_is_only_read() -> None:
    document = lay_out(Sample([Text("ab", loss=False), Text("c")]), Letters(), SPEC)
    (c,) = ids_of("c")
    assert document.labels_text.tolist() == [IGNORE, IGNORE, c, Special.EOS, IGNORE]
    assert document.labels_mtp.tolist() == [IGNORE, IGNORE, Special.EOS, IGNORE, IGNORE]


def test_image_layout_and_targets() -> None:
    rng = np.random.default_rng(0)
    part = latent(rng, SPEC)
    document = lay_out(Sample([Text("ab"), part]), Letters(), SPEC)
    tokens, opening = SPEC.frame_tokens, 3
    assert document.input_ids.tolist() == [
        Special.BOS,
        *ids_of("ab"),
        Special.BOI,
        *[Special.VISION] * tokens,
        Special.EOI,
        Special.EOS,
    ]
    codes = SPEC.pyramid.decompose(part.latents[8].reshape(16, 8))
    np.testing.assert_array_equal(document.labels_bits[opening : opening + tokens, :8], np.concatenate(codes.bits))
    assert (document.labels_bits[:, 8:] == IGNORE).all()
    assert (document.labels_bits[:opening] == IGNORE).all()
    assert (document.labels_bits[opening + tokens :] == IGNORE).all()
    features = np.concatenate([*codes.inputs, codes.total.mean(0, keepdims=True)])
    np.testing.assert_allclose(document.vision_features[:, :8], features, atol=1e-6)
    assert not document.vision_features[:, 8:].any()
    assert document.vision_index.tolist() == list(range(opening + 1, opening + 1 + tokens))
    assert document.vision_scale.tolist() == [2] * 4 + [3] * 16 + [0]
    last = opening + tokens
    assert document.labels_text[opening - 1] == Special.BOI
    assert document.labels_text[last : last + 2].tolist() == [Special.EOI, Special.EOS]
    assert (document.labels_text[opening:last] == IGNORE).all()
    assert (document.kind == Kind.IMAGE_GEN).nonzero()[0].tolist() == list(range(opening, last + 1))


def test_video_frame_predicts_the_next_frames_first_scale() -> None:
    part = latent(np.random.default_rng(1), SPEC, frames=3)
    document = lay_out(Sample([part]), Letters(), SPEC)
    tokens, opening = SPEC.frame_tokens, 1
    assert document.input_ids[opening] == Special.BOV
    whole = [opening + (frame + 1) * tokens for frame in range(3)]
    for frame in range(3):
        codes = SPEC.pyramid.decompose(part.latents[8][frame].reshape(16, 8))
        before = opening if frame == 0 else whole[frame - 1]
        np.testing.assert_array_equal(document.labels_bits[before, :8], codes.bits[0][0])
        scale_2 = slice(before + 1, before + 5)
        np.testing.assert_array_equal(document.labels_bits[scale_2, :8], codes.bits[1])
        np.testing.assert_allclose(document.vision_features[scale_2.start - opening - 1][:8], codes.inputs[0][0])
    assert document.labels_text[whole[2]] == Special.EOV
    assert (document.labels_bits[whole[2]] == IGNORE).all()


@pytest.mark.parametrize(("frames", "ends"), [(1, (Special.BOI, Special.EOI)), (2, (Special.BOV, Special.EOV))])
def test_understanding_has_no_loss_before_the_answer(frames: int, ends: tuple[Special, Special]) -> None:
    part = features(np.random.default_rng(0), SPEC, frames)
    document = lay_out(Sample([part, Text("a")]), Letters(), SPEC)
    count = len(part.cnn)
    (a,) = ids_of("a")
    assert document.input_ids.tolist() == [
        Special.BOS,
        ends[0],
        *[Special.PATCH] * count,
        ends[1],
        Special.SEP,
        a,
        Special.EOS,
    ]
    assert (document.labels_text != IGNORE).nonzero()[0].tolist() == [count + 3, count + 4]
    assert document.loss_weight.sum() == 2
    np.testing.assert_array_equal(document.patches[0].index, np.arange(2, 2 + count))


def test_generated_audio_targets() -> None:
    rng = np.random.default_rng(0)
    part = audio(rng, SPEC, 4, generate=True)
    speaker = SpeakerEmbedding(rng.normal(size=SPEC.speaker_dim))
    document = lay_out(Sample([Text("a"), speaker, part]), Letters(), SPEC)
    begin = 3
    assert document.input_ids[2:].tolist() == [
        Special.SPEAKER,
        Special.BOA,
        *[Special.AUDIO] * 4,
        Special.EOA,
        Special.EOS,
    ]
    np.testing.assert_array_equal(document.labels_audio[begin : begin + 4], part.codes)
    np.testing.assert_array_equal(document.labels_audio[begin + 4], [SPEC.codebook_size] * 3)
    assert (document.labels_audio[:begin] == IGNORE).all() and (document.labels_audio[begin + 5 :] == IGNORE).all()
    np.testing.assert_array_equal(document.audio_codes[begin + 1 : begin + 5], part.codes)
    assert (document.audio_codes[[0, 1, 2, 3, 8, 9]] == NO_CODE).all()
    assert document.labels_text[1] == IGNORE and document.labels_text[2] == Special.BOA
    np.testing.assert_allclose(document.speaker[0], speaker.vector, rtol=1e-6)
    assert document.speaker_index.tolist() == [2]


def test_understood_audio_has_no_targets() -> None:
    document = lay_out(Sample([audio(np.random.default_rng(0), SPEC, 4, False), Text("a")]), Letters(), SPEC)
    assert (document.labels_audio == IGNORE).all()
    assert document.input_ids[[1, 6, 7]].tolist() == [Special.BOA, Special.EOA, Special.SEP]


@pytest.mark.parametrize("scales", [(1, 2, 3, 4), (1, 2, 4, 8), (1,)])
def test_scale_weights_average_one_and_fall_with_the_root_of_area(scales: tuple[int, ...]) -> None:
    spec = replace(SPEC, scales=scales)
    document = lay_out(Sample([latent(np.random.default_rng(0), spec)]), Letters(), spec)
    weights = document.loss_weight[1 : 1 + spec.frame_tokens]
    assert weights.mean() == pytest.approx(1.0)
    starts = np.cumsum([0, *(side * side for side in scales)])[:-1]
    np.testing.assert_allclose(weights[starts] * np.array(scales), weights[0], rtol=1e-6)


def test_one_wording_is_drawn_and_the_first_taken_without_rng() -> None:
    sample = Sample([Text(("a", "b", "c"))])
    assert lay_out(sample, Letters(), SPEC).input_ids[1] == ids_of("a")[0]
    rng = np.random.default_rng(0)
    drawn = {int(lay_out(sample, Letters(), SPEC, rng).input_ids[1]) for _ in range(40)}
    assert drawn == set(ids_of("abc"))


@pytest.mark.parametrize("last", [latent(np.random.default_rng(0), SPEC), AudioCodes(np.zeros((2, 3), int), True)])
def test_prompts_of_generation_samples_are_dropped_at_the_given_rate(last: CodedPart) -> None:
    spec, rng = replace(SPEC, unconditional=0.3), np.random.default_rng(0)
    sample = Sample([Text("abc"), last])
    whole = len(lay_out(sample, Letters(), spec))
    lengths = [len(lay_out(sample, Letters(), spec, rng)) for _ in range(300)]
    assert set(lengths) == {whole, whole - 3}
    assert np.mean(np.array(lengths) < whole) == pytest.approx(0.3, abs=0.08)
    assert len(lay_out(Sample([last, Text("abc")]), Letters(), replace(spec, unconditional=1.0), rng)) == whole


# ---------------------------------------------------------------------- bit-flip self-correction


def reference_decompose(latent_frame: np.ndarray, spec: LayoutSpec, flips: list[np.ndarray]) -> tuple[list, list]:
    """Infinity's loop in float64 over explicit cells: labels and what feeds on, given which bits are flipped."""
    side, d = spec.scales[-1], latent_frame.shape[-1]
    total = np.zeros((side, side, d))
    labels, feeds = [], []
    for k, grid in enumerate(spec.scales):
        residual = latent_frame.astype(np.float64) - total
        step = side // grid
        pooled = residual.reshape(grid, step, grid, step, d).mean((1, 3))
        label = pooled > 0
        code = np.where(label ^ flips[k].reshape(label.shape).astype(bool), 1.0, -1.0) / np.sqrt(d)
        for y in range(side):
            for x in range(side):
                total[y, x] += bilinear(code, (y + 0.5) / step - 0.5, (x + 0.5) / step - 0.5)
        labels.append(label.reshape(-1, d))
        feeds.append(total.copy())
    return labels, feeds


def bilinear(grid: np.ndarray, y: float, x: float) -> np.ndarray:
    last = len(grid) - 1
    y, x = min(max(y, 0.0), last), min(max(x, 0.0), last)
    top, left = min(int(y), last), min(int(x), last)
    bottom, right = min(top + 1, last), min(left + 1, last)
    a, b = y - top, x - left
    upper = grid[top, left] * (1 - b) + grid[top, right] * b
    return upper * (1 - a) + (grid[bottom, left] * (1 - b) + grid[bottom, right] * b) * a


class Recorded:
    """Generator stand-in that lets ``lay_out`` draw as usual and keeps the uniform numbers."""

    def __init__(self, seed: int) -> None:
        self._rng, self.draws = np.random.default_rng(seed), []

    def random(self, *args: object, **kwargs: object) -> np.ndarray:
        self.draws.append(self._rng.random(*args, **kwargs))
        return self.draws[-1]


@pytest.mark.parametrize("frames", [1, 3])
def test_flipped_labels_equal_the_loop_reference(frames: int) -> None:
    spec = replace(SPEC, flip_max=0.25, flip_per_frame=0.05)
    part, rng = latent(np.random.default_rng(5), spec, frames), Recorded(7)
    document = lay_out(Sample([part]), Letters(), spec, rng)
    probabilities = flip_probabilities(frames, 3, 0.25, 0.05, np.random.default_rng(7))
    clean = lay_out(Sample([part]), Letters(), spec, rng, training=False)
    assert (clean.labels_bits != document.labels_bits).any()
    labels = document.labels_bits[1 : 1 + frames * spec.frame_tokens, :8].reshape(frames, -1, 8)
    whole = document.vision_features[:, :8].reshape(frames, -1, 8)[:, -1]
    for t in range(frames):
        flips = [draw[t] < probabilities[t, k] for k, draw in enumerate(rng.draws[1:4])]
        expected, feeds = reference_decompose(part.latents[8][t], spec, flips)
        np.testing.assert_array_equal(labels[t], np.concatenate(expected))
        np.testing.assert_allclose(whole[t], feeds[-1].mean((0, 1)), atol=1e-5)


@pytest.mark.parametrize("spec", [replace(SPEC, flip_max=0.0), replace(SPEC, flip_max=1e-12)])
def test_no_flips_is_clean(spec: LayoutSpec) -> None:
    part = latent(np.random.default_rng(5), spec, 2)
    noisy = lay_out(Sample([part]), Letters(), spec, np.random.default_rng(1))
    clean = lay_out(Sample([part]), Letters(), spec)
    np.testing.assert_array_equal(noisy.labels_bits, clean.labels_bits)
    np.testing.assert_array_equal(noisy.vision_features, clean.vision_features)


def test_flip_probabilities_grow_with_time_and_inherit() -> None:
    draws = np.stack([flip_probabilities(5, 3, 0.25, 0.01, np.random.default_rng(seed)) for seed in range(400)])
    low, high = 0.01 * np.arange(5)[:, None], 0.25 + 0.01 * np.arange(5)[:, None]
    assert (draws >= low).all() and (draws <= high).all()
    assert (draws[:, 1:, 0] >= draws[:, :-1, -1]).all()
    np.testing.assert_allclose(draws[:, :, 1:].mean(0), np.broadcast_to(low + 0.125, (5, 3))[:, 1:], atol=0.02)
    assert flip_probabilities(100, 2, 0.25, 0.05, np.random.default_rng(0)).max() == 0.5


# ---------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (Sample([Text("a" * 300)], task="text"), r"task 'text' takes 302 positions.*holds 256.*max_sequence_length"),
        (Sample([latent(np.random.default_rng(0), SPEC, 12)], task="clip"), r"task 'clip' takes 256"),
        (Sample([]), "no parts"),
        (Sample([Text(())]), "no wording"),
        (Sample([VisionLatent({16: np.zeros((1, 4, 4, 16))})]), r"widths \[16\].*needs 8"),
        (Sample([VisionLatent({8: np.zeros((1, 2, 2, 8))})]), r"\(2, 2, 8\), expected \(4, 4, 8\)"),
        (Sample([AudioCodes(np.zeros((2, 4), int))]), r"levels.*\(4,\), expected \(3,\)"),
        (Sample([AudioCodes(np.full((2, 3), 50))]), "from 50 to 50"),
        (Sample([SpeakerEmbedding(np.zeros(3))]), "speaker"),
        (Sample([Image(np.zeros((8, 8, 3), np.uint8))]), "cannot lay out a Image"),
    ],
)
def test_bad_samples_get_one_line(sample: Sample, message: str) -> None:
    spec = replace(SPEC, length=256 if sample.task != "clip" else 255)
    with pytest.raises(ValueError, match=message) as error:
        lay_out(sample, Letters(), spec)
    assert "\n" not in str(error.value)


def test_exactly_the_context_fits() -> None:
    assert len(lay_out(Sample([Text("a" * 254)]), Letters(), SPEC)) == 256


@pytest.mark.parametrize("wrong", [{"scales": (2, 4)}, {"bits": 32}])
def test_impossible_specs(wrong: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        replace(SPEC, **wrong)


def test_spec_from_config() -> None:
    config = Config()
    spec = LayoutSpec.from_config(config)
    assert (spec.length, spec.bits, spec.max_bits, spec.flip_max) == (256, 16, 16, config.data.flip_max)
    assert LayoutSpec.from_config(config, bits=8).bits == 8


class Stuttering:
    """Dropout doubles every text."""

    def encode(self, text: str, dropout: float = 0.0, rng: np.random.Generator | None = None) -> list[int]:
        return [20] * (len(text) * (2 if dropout else 1))


def test_dropout_never_pushes_a_fitting_sample_past_the_context():
    spec = LayoutSpec(length=20, text_dropout=0.5)
    sample = Sample([Text("fourteen chars")])
    assert len(lay_out(sample, Stuttering(), spec, np.random.default_rng(0))) == 16
    with pytest.raises(ValueError, match="context holds 20"):
        lay_out(Sample([Text("more than nineteen chars")]), Stuttering(), spec, np.random.default_rng(0))
