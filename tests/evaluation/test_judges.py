"""Judges answer rightly on pictures whose truth is known, and notice when there is nothing to see."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from ernie5.data.digits import DigitSource
from ernie5.data.icons import COLOURS, IconSource
from ernie5.evaluation.judges import (
    DIRECTIONS,
    NOTHING,
    PLACES,
    STILL,
    DigitJudge,
    IconJudge,
    MotionJudge,
    psnr,
)

PALETTE = {"red": (220, 40, 40), "blue": (40, 80, 220), "green": (30, 150, 60), "yellow": (240, 200, 20)}


def digits(split):
    samples = [sample for sample in DigitSource().samples(split) if sample.task == "digit_gen"]
    return np.stack([sample.parts[-1].pixels for sample in samples]), [sample.meta["digit"] for sample in samples]


@pytest.fixture(scope="module")
def digit_judge():
    return DigitJudge.train(*digits("train"))


@pytest.mark.parametrize("blur", [0.0, 1.0])
def test_digit_judge_reads_held_out_digits(digit_judge, blur):
    pictures, labels = digits("heldout")
    assert len(labels) == 1000
    if blur:
        pictures = np.stack([cv2.GaussianBlur(picture, (0, 0), blur) for picture in pictures])
    assert np.mean(digit_judge.read(pictures) == labels) >= 0.97


def test_digit_judge_sees_nothing_in_an_empty_picture(digit_judge):
    assert digit_judge.read(np.zeros((1, 32, 32, 3), np.uint8))[0] == -1


def icon(colour, place, size, shape, background=(255, 255, 255)):
    """A blurred-edge icon of ``size`` pixels drawn at four times the resolution."""
    centre = {"top": 2 + size / 2, "bottom": 30 - size / 2, "left": 2 + size / 2, "right": 30 - size / 2}
    words = place.split()
    row, column = (16, 16) if place == "center" else (centre[words[0]], centre[words[1]])
    canvas = np.full((128, 128, 3), background, np.uint8)
    middle, half = (int(column * 4), int(row * 4)), int(size * 2)
    if shape == "disc":
        cv2.circle(canvas, middle, half, PALETTE[colour], -1)
    else:
        points = np.array(
            [[middle[0], middle[1] - half], [middle[0] + half, middle[1] + half], [middle[0] - half, middle[1] + half]]
        )
        cv2.fillPoly(canvas, [points], PALETTE[colour])
    return cv2.resize(canvas, (32, 32), interpolation=cv2.INTER_AREA)


@pytest.mark.parametrize("size", [9, 12, 18])
@pytest.mark.parametrize("shape", ["disc", "triangle"])
@pytest.mark.parametrize("blur", [0.0, 0.8])
def test_icon_judge_measures_colour_and_place(size, shape, blur):
    truth = [(colour, place) for colour in PALETTE for place in PLACES]
    pictures = [icon(colour, place, size, shape) for colour, place in truth]
    if blur:
        pictures = [cv2.GaussianBlur(picture, (0, 0), blur) for picture in pictures]
    readings = IconJudge(PALETTE).read(np.stack(pictures))
    assert [(reading.colour, reading.place) for reading in readings] == truth


@pytest.mark.parametrize("blur", [0.0, 0.7])
def test_icon_judge_measures_real_icons(blur):
    samples = [sample for sample in IconSource(heldout=300).samples("heldout") if sample.task == "icon_gen"]
    pictures = [sample.parts[1].pixels for sample in samples]
    if blur:
        pictures = [cv2.GaussianBlur(picture, (0, 0), blur) for picture in pictures]
    readings = IconJudge(COLOURS).read(np.stack(pictures))
    right = [(r.colour, r.place) == (s.meta["colour"], s.meta["place"]) for r, s in zip(readings, samples, strict=True)]
    assert np.mean(right) >= 0.99


def test_icon_judge_ignores_specks_and_sees_an_empty_canvas():
    speckled = icon("blue", "top left", 12, "disc")
    speckled[28:30, 28:30] = (220, 40, 40)
    empty = np.full((32, 32, 3), 250, np.uint8)
    first, second = IconJudge(PALETTE).read(np.stack([speckled, empty]))
    assert (first.colour, first.place) == ("blue", "top left")
    assert (second.colour, second.place) == (NOTHING, NOTHING)


def moving(direction, background, ink, pixels=2):
    step = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0), "still": (0, 0)}[direction]
    clip = np.full((5, 32, 32, 3), background, np.uint8)
    for t in range(5):
        row, column = 12 + (t - 2) * pixels * step[0], 12 + (t - 2) * pixels * step[1]
        clip[t, row : row + 8, column : column + 8] = ink
    return clip


@pytest.mark.parametrize(("background", "ink"), [(0, 255), (255, (220, 40, 40))])
@pytest.mark.parametrize("noise", [0, 20])
def test_motion_judge_reads_directions_on_dark_and_white(background, ink, noise):
    clips = np.stack([moving(direction, background, ink) for direction in DIRECTIONS]).astype(int)
    clips = clips + np.random.default_rng(0).integers(-noise, noise + 1, clips.shape)
    assert MotionJudge().read(np.clip(clips, 0, 255).astype(np.uint8)) == list(DIRECTIONS)


def test_motion_judge_tells_still_from_empty():
    still, empty = moving("still", 0, 255), np.zeros((5, 32, 32, 3), np.uint8)
    assert MotionJudge().read(np.stack([still, empty])) == [STILL, NOTHING]


def test_psnr_matches_its_definition():
    reference = np.full((4, 4, 3), 100, np.uint8)
    assert psnr(reference, reference + 5) == pytest.approx(10 * np.log10(255**2 / 25))
    with pytest.raises(ValueError, match="one shape"):
        psnr(reference, reference[:2])
