"""Named Material Design icons (from qtawesome's fonts), coloured, sized and placed, with exact captions.

Held out are combinations of colour and place: none of them is drawn in training, whatever the icon.
"""

from __future__ import annotations

import json
from functools import lru_cache

import numpy as np
from PIL import Image as Picture
from PIL import ImageDraw, ImageFont

from ernie5.data.source import check_split, fraction, package_file
from ernie5.sequence.parts import Image, Sample, Text

SIZE = 32
ICONS = (  # noqa: SIM905 - fifty words read better as one text
    "airplane apple battery bell bone book bus butterfly cake camera car circle cloud cookie crown diamond duck egg "
    "elephant fire fish flag flower gift ghost hammer heart hexagon home key leaf lock mushroom owl penguin pig pill "
    "pumpkin puzzle rabbit rocket shield skull square star tooth tree triangle truck umbrella"
).split()
COLOURS = {
    "red": (220, 30, 30),
    "orange": (255, 140, 0),
    "green": (20, 150, 40),
    "blue": (30, 60, 220),
    "purple": (140, 30, 170),
    "pink": (255, 110, 190),
    "cyan": (0, 180, 200),
    "black": (20, 20, 20),
}
PLACES = {
    "top left": (0, 0),
    "top right": (0, 1),
    "bottom left": (1, 0),
    "bottom right": (1, 1),
    "center": (0.5, 0.5),
}
SIZES = {"small": 11, "large": 15}  # pixels of the longer side
QUESTIONS = ("what is this?", "what do you see?", "name the picture")
NUM_HELDOUT = 8  # of the 40 combinations of colour and place


@lru_cache(maxsize=1)
def heldout_combinations() -> frozenset[tuple[str, str]]:
    """Eight (colour, place) pairs: one of each colour, the one with the smallest hash, places spread by rotation."""
    places = sorted(PLACES, key=fraction)
    colours = sorted(COLOURS, key=fraction)
    return frozenset((colour, places[i % len(places)]) for i, colour in enumerate(colours[:NUM_HELDOUT]))


@lru_cache(maxsize=1)
def _font() -> tuple[ImageFont.FreeTypeFont, dict[str, str]]:
    folder = package_file("qtawesome", "fonts")
    font = next(iter(sorted(folder.glob("materialdesignicons6-webfont-*.ttf"))), None)
    charmap = next(iter(sorted(folder.glob("materialdesignicons6-webfont-charmap-*.json"))), None)
    if font is None or charmap is None:
        raise ValueError(f"{folder}: no Material Design font here; run tools/setup.sh for the pinned qtawesome")
    return ImageFont.truetype(str(font), 96), json.loads(charmap.read_text())


@lru_cache(maxsize=1024)
def icon_mask(name: str, size: int) -> np.ndarray:
    """Coverage in [0,1], float32 [h,w], the longer side ``size`` pixels."""
    font, charmap = _font()
    canvas = Picture.new("L", (144, 144))
    ImageDraw.Draw(canvas).text((20, 20), chr(int(charmap[name], 16)), font=font, fill=255)
    canvas = canvas.crop(canvas.getbbox())
    scale = size / max(canvas.size)
    shape = (max(1, round(canvas.width * scale)), max(1, round(canvas.height * scale)))
    return np.asarray(canvas.resize(shape, Picture.Resampling.BOX), np.float32) / 255


def paste(canvas: np.ndarray, mask: np.ndarray, colour: tuple[int, int, int], top: int, left: int) -> np.ndarray:
    """A copy of the uint8 canvas [H,W,3] with the coloured mask at (top, left); what lies outside is cut off."""
    out = canvas.astype(np.float32)
    y0, x0 = max(top, 0), max(left, 0)
    y1, x1 = min(top + mask.shape[0], canvas.shape[0]), min(left + mask.shape[1], canvas.shape[1])
    if y1 > y0 and x1 > x0:
        alpha = mask[y0 - top : y1 - top, x0 - left : x1 - left, None]
        out[y0:y1, x0:x1] = out[y0:y1, x0:x1] * (1 - alpha) + np.float32(colour) * alpha
    return np.round(out).astype(np.uint8)


def render(icon: str, colour: str, size: str, place: str, jitter: tuple[int, int] = (0, 0)) -> np.ndarray:
    """uint8 [32,32,3] on white; ``jitter`` moves the icon inwards by up to two pixels from its place."""
    mask = icon_mask(icon, SIZES[size])
    row, column = PLACES[place]
    free = SIZE - np.array(mask.shape) - 2
    top, left = (1 + round(free[i] * along) for i, along in enumerate((row, column)))
    top += jitter[0] * (1 if row < 1 else -1)
    left += jitter[1] * (1 if column < 1 else -1)
    return paste(np.full((SIZE, SIZE, 3), 255, np.uint8), mask, COLOURS[colour], top, left)


class IconSource:
    """Samples of ``icon_und`` and ``icon_gen``; ``meta`` has icon, colour, size and place."""

    tasks = ("icon_und", "icon_gen")
    feeds = frozenset({"text", "vision"})

    def __init__(self, train: int = 4000, heldout: int = 400, seed: int = 0) -> None:
        self.counts = {"train": train, "heldout": heldout}
        self.seed = seed

    def samples(self, split: str) -> list[Sample]:
        check_split(split)
        unseen = split == "heldout"
        pairs = [(c, p) for c in COLOURS for p in PLACES if ((c, p) in heldout_combinations()) == unseen]
        rng = np.random.default_rng([self.seed, unseen])
        samples = []
        for i in range(self.counts[split]):
            colour, place = pairs[i % len(pairs)]
            icon, size = ICONS[rng.integers(len(ICONS))], list(SIZES)[rng.integers(len(SIZES))]
            jitter = tuple(int(x) for x in rng.integers(0, 2, 2))
            samples += icon_samples(icon, colour, size, place, jitter)
        return samples


def icon_samples(icon: str, colour: str, size: str, place: str, jitter: tuple[int, int]) -> list[Sample]:
    picture = render(icon, colour, size, place, jitter)
    meta = {"icon": icon, "colour": colour, "size": size, "place": place}
    caption = f"a {size} {colour} {icon}, {place}"
    wordings = (caption, caption, f"draw a {size} {colour} {icon}, {place}")
    return [
        Sample([Image(picture), Text(QUESTIONS, loss=False), Text(caption)], "icon_und", meta),
        Sample([Text(wordings), Image(picture, generate=True)], "icon_gen", meta),
    ]
