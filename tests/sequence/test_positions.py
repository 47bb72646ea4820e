from __future__ import annotations

import numpy as np
import pytest

from ernie5.sequence.layout import lay_out
from ernie5.sequence.parts import AudioCodes, Sample, Text, VisionLatent
from ernie5.sequence.positions import centred
from ernie5.sequence.spec import LayoutSpec
from ernie5.sequence.vocabulary import Special
from tests.sequence.samples import Letters, audio, features, latent

SPEC = LayoutSpec(bits=8, scales=(1, 2, 4))
RNG = np.random.default_rng(0)


def positions(*parts) -> tuple[np.ndarray, np.ndarray]:
    document = lay_out(Sample(list(parts)), Letters(), SPEC)
    return document.input_ids, document.positions


@pytest.mark.parametrize("part", [Text("hello there"), audio(RNG, SPEC, 5, True), audio(RNG, SPEC, 5, False)])
def test_text_and_audio_are_one_dimensional(part: Text | AudioCodes) -> None:
    ids, found = positions(Text("abc"), part)
    np.testing.assert_array_equal(found, np.arange(len(ids), dtype=np.float32)[:, None] * np.ones(3))


@pytest.mark.parametrize(("side", "final"), [(1, 4), (2, 4), (3, 4), (3, 7), (4, 4)])
def test_scales_share_the_centre_and_fill_the_final_grid(side: int, final: int) -> None:
    places = centred(side, final)
    assert places.mean() == pytest.approx((final - 1) / 2)
    assert np.diff(places) == pytest.approx(final / side)
    assert places[0] == pytest.approx(final / side / 2 - 0.5)


def test_video_coordinates_and_where_the_index_resumes() -> None:
    ids, found = positions(Text("abc"), latent(RNG, SPEC, frames=6))
    vision = found[ids == Special.VISION].reshape(6, SPEC.frame_tokens, 3)
    base = 1 + 3 + 1
    np.testing.assert_array_equal(vision[..., 0], base + np.arange(6)[:, None] * np.ones(SPEC.frame_tokens))
    assert (vision[:, :, 1:] == vision[:1, :, 1:]).all()
    np.testing.assert_allclose(vision[0, :4, 1:] - base, [[0.5, 0.5], [0.5, 2.5], [2.5, 0.5], [2.5, 2.5]])
    np.testing.assert_allclose(vision[0, -1, 1:] - base, 1.5)
    end = found[ids == Special.EOV][0]
    np.testing.assert_array_equal(end, vision.max() + 1)
    np.testing.assert_array_equal(found[-1], end + 1)


def test_understanding_grid() -> None:
    ids, found = positions(features(RNG, SPEC, frames=2))
    patches = found[ids == Special.PATCH] - 2
    np.testing.assert_array_equal(patches, [[t, h, w] for t in range(2) for h in range(2) for w in range(3)])
    np.testing.assert_array_equal(found[ids == Special.EOV][0], 2 + 2 + 1)


def test_one_scale_frame() -> None:
    spec = LayoutSpec(bits=8, scales=(1,))
    part = VisionLatent({8: RNG.normal(size=(1, 1, 1, 8))})
    document = lay_out(Sample([part]), Letters(), spec)
    np.testing.assert_array_equal(document.positions[:, 0], np.arange(5))
