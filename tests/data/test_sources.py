"""Embedded data: nothing is in both splits, and what a caption says can be measured from the pixels."""

from __future__ import annotations

import numpy as np
import pytest

from ernie5.config.schema import Config
from ernie5.data.clips import SPRITE, ClipSource, digit_mask
from ernie5.data.digits import DigitSource, load_digits
from ernie5.data.embedded import tokenizer_material
from ernie5.data.icons import COLOURS, ICONS, PLACES, IconSource, heldout_combinations
from ernie5.data.prose import SHORTEST_REPEAT, TextSource
from ernie5.data.source import fraction, package_file
from ernie5.sequence.parts import Image, Sample, Text, Video

MOTION = {"left": (0, -3), "right": (0, 3), "up": (-3, 0), "down": (3, 0)}  # (row, column) a frame
CENTRES = {name: np.array(at) * 15 + 8.5 for name, at in PLACES.items()}


@pytest.fixture(scope="module")
def digits() -> dict[str, list[Sample]]:
    return {split: DigitSource().samples(split) for split in ("train", "heldout")}


@pytest.fixture(scope="module")
def icons() -> dict[str, list[Sample]]:
    return {split: IconSource().samples(split) for split in ("train", "heldout")}


@pytest.fixture(scope="module")
def clips() -> dict[str, list[Sample]]:
    return {split: ClipSource().samples(split) for split in ("train", "heldout")}


@pytest.fixture(scope="module")
def prose() -> dict[str, list[Sample]]:
    return {split: TextSource(200_000).samples(split) for split in ("train", "heldout")}


def _media(sample: Sample) -> np.ndarray:
    part = next(part for part in sample.parts if isinstance(part, Image | Video))
    return part.pixels if isinstance(part, Image) else part.frames


def _caption(sample: Sample) -> str:
    text = next(part.text for part in reversed(sample.parts) if isinstance(part, Text))
    return text if isinstance(text, str) else text[0]


def test_digits_are_split_by_picture_and_evenly(digits):
    found = {split: {s.meta["index"] for s in samples} for split, samples in digits.items()}
    assert len(found["train"]) == 4000 and len(found["heldout"]) == 1000
    assert not found["train"] & found["heldout"]
    counts = np.bincount([s.meta["digit"] for s in digits["heldout"]])
    assert (counts == 200).all()  # a hundred pictures, to read and to draw


def test_a_training_digit_is_named_in_another_view_too(digits):
    first, drawn, second = digits["train"][:3]
    assert [s.task for s in (first, drawn, second)] == ["digit_und", "digit_gen", "digit_und"]
    assert first.meta == second.meta and _caption(first) == _caption(second)
    same, other = _media(first).astype(float), _media(second).astype(float)
    assert same.shape == other.shape and 0 < np.abs(same - other).mean() < 40
    assert all(s.meta["index"] != first.meta["index"] for s in digits["train"][3:6])


def test_digit_pictures_are_the_labelled_ones(digits):
    pixels, labels = load_digits()
    for sample in [s for s in digits["train"] if s.task == "digit_gen"][::251]:
        index = sample.meta["index"]
        np.testing.assert_array_equal(_media(sample)[2:-2, 2:-2, 1], pixels[index])
        assert sample.meta["digit"] == labels[index]


@pytest.mark.parametrize("source", [DigitSource(), IconSource(20, 5), ClipSource(20, 5)])
def test_reading_and_drawing_share_the_array(source):
    und, gen = source.samples("train")[:2]
    assert _media(und) is _media(gen)
    assert und.task.endswith("_und") and gen.task.endswith("_gen")
    assert isinstance(und.parts[1], Text) and not und.parts[1].loss and und.parts[2].loss
    assert gen.parts[-1].generate and not und.parts[0].generate


def test_no_heldout_colour_and_place_is_drawn_in_training(icons):
    found = {split: {(s.meta["colour"], s.meta["place"]) for s in samples} for split, samples in icons.items()}
    assert found["heldout"] == set(heldout_combinations()) and len(found["heldout"]) == 8
    assert not found["train"] & found["heldout"] and len(found["train"]) == 32
    assert {c for c, _ in found["train"]} == set(COLOURS) and {p for _, p in found["train"]} == set(PLACES)
    assert {s.meta["icon"] for s in icons["train"]} == set(ICONS)


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_icons_have_the_colour_and_place_of_their_caption(icons, split):
    for sample in icons[split][::2]:
        picture, meta = _media(sample).astype(float), sample.meta
        ink = 255 - picture.min(axis=-1)
        rows, columns = np.nonzero(ink > 100)
        centre = np.array([(rows.min() + rows.max() + 1) / 2, (columns.min() + columns.max() + 1) / 2])
        place = min(CENTRES, key=lambda name: np.abs(CENTRES[name] - centre).sum())
        strongest = picture[ink > 0.9 * ink.max()].mean(axis=0)
        colour = min(COLOURS, key=lambda name: np.linalg.norm(COLOURS[name] - strongest))
        assert (colour, place) == (meta["colour"], meta["place"]), meta
        assert _caption(sample) == f"a {meta['size']} {meta['colour']} {meta['icon']}, {meta['place']}"


def test_sizes_differ(icons):
    longest = {"small": [], "large": []}
    for sample in icons["train"][::20]:
        rows, columns = np.nonzero(_media(sample).min(axis=-1) < 200)
        longest[sample.meta["size"]].append(max(np.ptp(rows), np.ptp(columns)) + 1)
    assert max(longest["small"]) < min(longest["large"])


def test_colours_are_well_apart():
    values = np.array(list(COLOURS.values()), float)
    distances = np.linalg.norm(values[:, None] - values[None], axis=-1) + 999 * np.eye(len(values))
    assert distances.min() > 90


def _ink_centres(clip: np.ndarray) -> np.ndarray:
    """[T, 2] centre of what differs from the background, in (row, column)."""
    ink = np.abs(clip.astype(float) - clip[0, 0, 0]).sum(axis=-1)
    grid = np.indices(ink.shape[1:])
    return np.stack([(grid * frame).sum(axis=(1, 2)) / frame.sum() for frame in ink])


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_clips_move_as_their_caption_says(clips, split):
    for sample in clips[split][::6]:
        clip = _media(sample)
        assert clip.shape == (5, 32, 32, 3)
        background = clip[0, 0, 0].astype(int) if "icon" in sample.meta else np.zeros(3, int)
        amount = np.abs(clip - background).sum(axis=(1, 2, 3))
        assert (amount == amount[0]).all(), "nothing leaves the picture"
        steps = np.diff(_ink_centres(clip), axis=0)
        np.testing.assert_allclose(steps, [MOTION[sample.meta["direction"]]] * 4, atol=1e-6)
        assert _caption(sample).endswith(f"{sample.meta['object']} moves {sample.meta['direction']}")


def test_clips_held_out_are_new(clips):
    pairs = {
        split: {(s.meta["colour"], s.meta["direction"]) for s in samples if "icon" in s.meta}
        for split, samples in clips.items()
    }
    assert pairs["heldout"] and not pairs["train"] & pairs["heldout"]
    directions = [s.meta["direction"] for s in clips["heldout"]]
    assert {directions.count(d) for d in MOTION} == {len(directions) // 4}


def test_captions_use_the_right_article(clips):
    captions = [_caption(sample) for samples in clips.values() for sample in samples]
    assert any(caption.startswith("an orange ") for caption in captions)
    assert not any(caption.startswith("a orange ") for caption in captions)


def _paragraphs(samples: list[Sample]) -> set[str]:
    found = {" ".join(p.split()) for s in samples for p in s.parts[0].text.split("\n\n")}
    return {paragraph for paragraph in found if len(paragraph) >= SHORTEST_REPEAT}


def test_no_paragraph_of_the_heldout_prose_is_trained_on(prose):
    train, heldout = _paragraphs(prose["train"]), _paragraphs(prose["heldout"])
    assert len(heldout) > 50 and not train & heldout
    names = {split: {s.meta["name"] for s in samples} for split, samples in prose.items()}
    assert not names["train"] & names["heldout"]


def test_a_cap_on_the_prose_favours_no_split(prose):
    counts = {split: sum(s.meta["name"].startswith("module ") for s in samples) for split, samples in prose.items()}
    assert counts["train"] > 3 * counts["heldout"]


def test_training_prose_does_not_repeat_itself(prose):
    texts = [" ".join(p.split()) for s in prose["train"] for p in s.parts[0].text.split("\n\n")]
    long = [text for text in texts if len(text) >= SHORTEST_REPEAT]
    assert len(long) == len(set(long))
    assert 300_000 < sum(len(s.parts[0].text) for s in prose["train"]) < 1_200_000


@pytest.mark.parametrize("source", [DigitSource, lambda: IconSource(50, 10), lambda: ClipSource(50, 10)])
def test_samples_are_a_pure_function(source):
    first, second = source().samples("train"), source().samples("train")
    assert [s.meta for s in first] == [s.meta for s in second]
    assert all(np.array_equal(_media(a), _media(b)) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("source", [DigitSource(), IconSource(), ClipSource(), TextSource()])
def test_an_unknown_split_is_refused(source):
    with pytest.raises(ValueError, match="'train' or 'heldout', found 'test'"):
        source.samples("test")


def test_the_hash_is_the_same_on_every_machine():
    assert fraction("digit 7") == pytest.approx(0.80144958, abs=1e-8)


def test_a_missing_package_names_the_command_that_installs_it():
    with pytest.raises(ValueError, match=r"no_such_package.*tools/setup.sh"):
        package_file("no_such_package", "data.csv")


def test_vision_material_is_the_training_split_with_its_captions():
    images, captions, clips = tokenizer_material(Config(), "vision")
    assert images.dtype == clips.dtype == np.uint8
    assert images.shape == (12000, 32, 32, 3) and clips.shape == (2000, 5, 32, 32, 3)
    assert len(captions) == 12000 and captions[0].startswith("a handwritten ")
    heldout = {s.parts[0].pixels.tobytes() for s in DigitSource().samples("heldout") if s.task == "digit_und"}
    assert not heldout & {image.tobytes() for image in images[:8000]}


def test_moving_digits_are_whole():
    pixels, _ = load_digits()
    for digit in pixels[::50]:
        kept = digit_mask(digit).sum() * 255 * (20 / SPRITE) ** 2
        assert kept == pytest.approx(digit.sum(dtype=float), rel=0.01)
