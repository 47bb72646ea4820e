"""Judges that read pictures and clips without the model: a learned one for digits, measured ones for icons and motion.

N pictures, T frames, H/W pixels. Every judge takes uint8 RGB and says what it sees in the words of the captions; how
often it is right on real held-out samples is the ceiling of the metric that rests on it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from sklearn.svm import SVC

NOTHING = "nothing"  # the answer of a judge that finds no foreground
STILL = "still"  # the answer of the motion judge when nothing moved
PLACES = ("top left", "top right", "bottom left", "bottom right", "center")
DIRECTIONS = ("left", "right", "up", "down")

_HOG = cv2.HOGDescriptor((28, 28), (14, 14), (7, 7), (7, 7), 9)
_GLYPH_BOX = 20  # pixels of the longer side after normalisation, as in MNIST itself
_CANVAS = 28


def to_gray(pictures: np.ndarray) -> np.ndarray:
    """uint8 [..., H, W, 3] -> float32 [..., H, W] in 0..255, the plain mean of the channels."""
    return pictures.astype(np.float32).mean(axis=-1)


def psnr(reference: np.ndarray, candidate: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of uint8 arrays of one shape; the mean squared error runs over everything."""
    if reference.shape != candidate.shape:
        raise ValueError(f"psnr compares arrays of one shape, found {reference.shape} and {candidate.shape}")
    error = np.mean((reference.astype(np.float64) - candidate.astype(np.float64)) ** 2)
    return float(10.0 * np.log10(255.0**2 / max(error, 1e-10)))


# --- digits -------------------------------------------------------------------------------------------------------


def _normalised_glyph(gray: np.ndarray) -> np.ndarray:
    """[H, W] -> uint8 [28, 28]: slant removed by second moments, bounding box scaled and centred by mass."""
    ink = np.clip(gray - 32.0, 0.0, None)
    moments = cv2.moments(ink)
    if moments["m00"] < 1.0:
        return np.zeros((_CANVAS, _CANVAS), np.uint8)
    slant = moments["mu11"] / moments["mu02"] if moments["mu02"] > 1e-2 else 0.0
    height, width = ink.shape
    shear = np.float32([[1, slant, -slant * moments["m01"] / moments["m00"]], [0, 1, 0]])
    flags = cv2.WARP_INVERSE_MAP | cv2.INTER_LINEAR
    ink = cv2.warpAffine(ink, shear, (width, height), flags=flags)
    rows, columns = np.nonzero(ink > 48.0)
    if len(rows) == 0:
        return np.zeros((_CANVAS, _CANVAS), np.uint8)
    box = ink[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    scale = _GLYPH_BOX / max(box.shape)
    size = (max(1, round(box.shape[1] * scale)), max(1, round(box.shape[0] * scale)))
    box = cv2.resize(box, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    mass = cv2.moments(box)
    centre = (mass["m10"] / mass["m00"], mass["m01"] / mass["m00"])
    shift = np.float32([[1, 0, (_CANVAS - 1) / 2 - centre[0]], [0, 1, (_CANVAS - 1) / 2 - centre[1]]])
    glyph = cv2.warpAffine(box, shift, (_CANVAS, _CANVAS))
    return np.clip(glyph * (255.0 / max(glyph.max(), 1.0)), 0, 255).astype(np.uint8)


def _digit_features(pictures: np.ndarray) -> np.ndarray:
    """uint8 [N, H, W, 3] -> float32 [N, D]: gradient histograms beside coarse pixels of the normalised glyph."""
    features = []
    for gray in to_gray(pictures):
        glyph = _normalised_glyph(gray)
        coarse = cv2.resize(glyph, (14, 14), interpolation=cv2.INTER_AREA).reshape(-1) / 255.0
        features.append(np.concatenate([_HOG.compute(glyph).reshape(-1), 0.5 * coarse]))
    return np.stack(features).astype(np.float32)


@dataclass
class DigitJudge:
    """A support vector machine on real handwritten digits, white on black. Build it with ``train``."""

    classifier: SVC

    @classmethod
    def train(cls, pictures: np.ndarray, digits: Sequence[int], seed: int = 0) -> DigitJudge:
        """Fits on uint8 [N, H, W, 3] pictures and, for half of them, a copy blurred a little (sigma 0.5 to 1.0)."""
        rng = np.random.default_rng(seed)
        chosen = rng.permutation(len(pictures))[: len(pictures) // 2]
        blurred = np.stack([cv2.GaussianBlur(pictures[i], (0, 0), rng.uniform(0.5, 1.0)) for i in chosen])
        labels = np.asarray(digits)
        features = _digit_features(np.concatenate([pictures, blurred]))
        classifier = SVC(C=10.0, gamma="scale", random_state=seed)
        return cls(classifier.fit(features, np.concatenate([labels, labels[chosen]])))

    def read(self, pictures: np.ndarray) -> np.ndarray:
        """uint8 [N, H, W, 3] -> int [N], the digit seen in each; an empty picture reads as -1."""
        answers = self.classifier.predict(_digit_features(pictures)).astype(int)
        return np.where(to_gray(pictures).max(axis=(1, 2)) < 64.0, -1, answers)


# --- icons --------------------------------------------------------------------------------------------------------


@dataclass
class IconReading:
    colour: str
    place: str
    box: tuple[int, int, int, int]  # top, left, bottom, right in pixels, the last two exclusive


@dataclass
class IconJudge:
    """Measures colour and place of one coloured icon on white; nothing is learned. ``palette`` names RGB colours."""

    palette: Mapping[str, tuple[int, int, int]]
    margin: float = 2.0  # pixels between a corner icon and the picture's edge
    foreground: float = 60.0  # distance from white, summed over channels, above which a pixel is the icon's

    def read(self, pictures: np.ndarray) -> list[IconReading]:
        """uint8 [N, H, W, 3] -> one reading a picture; colour and place are ``NOTHING`` on an empty canvas."""
        return [self._read_one(picture) for picture in pictures]

    def _read_one(self, picture: np.ndarray) -> IconReading:
        distance = (255.0 - picture.astype(np.float32)).sum(axis=-1)
        mask = _largest_blob(distance > self.foreground)
        if mask.sum() < 6:
            return IconReading(NOTHING, NOTHING, (0, 0, 0, 0))
        rows, columns = np.nonzero(mask)
        box = (rows.min(), columns.min(), rows.max() + 1, columns.max() + 1)
        return IconReading(self._colour(picture, mask), self._place(box, mask.shape), tuple(map(int, box)))

    def _colour(self, picture: np.ndarray, mask: np.ndarray) -> str:
        """Nearest palette colour in Lab of the median core pixel; the core lies away from the blended outline."""
        pixels = picture[mask].astype(np.float32)
        strength = (255.0 - pixels).max(axis=-1)
        core = np.median(pixels[strength >= np.quantile(strength, 0.6)], axis=0)
        names = list(self.palette)
        colours = np.float32([core, *self.palette.values()])[None] / 255.0
        lab = cv2.cvtColor(colours, cv2.COLOR_RGB2LAB)[0]
        return names[int(np.argmin(((lab[1:, 1:] - lab[0, 1:]) ** 2).sum(-1) + 0.25 * (lab[1:, 0] - lab[0, 0]) ** 2))]

    def _place(self, box: tuple[int, int, int, int], shape: tuple[int, int]) -> str:
        """The nearest of the five places where a box of this size can stand: four corners and the centre."""
        top, left, bottom, right = box
        offsets = []
        for low, high, side in ((top, bottom, shape[0]), (left, right, shape[1])):
            reach = max(side / 2 - self.margin - (high - low) / 2, 1.0)  # centre of a corner box from the middle
            offsets.append(((low + high) / 2 - side / 2) / reach)
        anchors = {"top left": (-1, -1), "top right": (-1, 1), "bottom left": (1, -1), "bottom right": (1, 1)}
        anchors["center"] = (0, 0)
        gaps = {name: np.hypot(offsets[0] - row, offsets[1] - column) for name, (row, column) in anchors.items()}
        return min(gaps, key=gaps.get)


def _largest_blob(mask: np.ndarray) -> np.ndarray:
    """Keeps the connected parts at least a quarter as big as the biggest: icons have several parts, noise is small."""
    count, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    if count < 2:
        return mask
    areas = stats[1:, cv2.CC_STAT_AREA]
    return np.isin(labels, 1 + np.nonzero(areas >= 0.25 * areas.max())[0])


# --- motion -------------------------------------------------------------------------------------------------------


@dataclass
class MotionJudge:
    """Direction in which the foreground's centre travels; the background's colour is read from the border."""

    least_travel: float = 1.5  # pixels from first to last frame under which a clip counts as still
    foreground: float = 48.0  # largest channel difference from the background above which a pixel counts

    def read(self, clips: np.ndarray) -> list[str]:
        """uint8 [N, T, H, W, 3] -> one of ``DIRECTIONS``, ``STILL`` or ``NOTHING`` a clip."""
        return [self._read_one(clip) for clip in clips]

    def _read_one(self, clip: np.ndarray) -> str:
        border = np.concatenate([clip[:, 0], clip[:, -1], clip[:, :, 0], clip[:, :, -1]], axis=1)
        background = np.median(border.reshape(-1, 3), axis=0)
        weight = np.abs(clip.astype(np.float32) - background).max(axis=-1)  # [T, H, W]
        weight = np.where(weight > self.foreground, weight, 0.0)
        mass = weight.sum(axis=(1, 2))
        seen = np.nonzero(mass > 0.1 * mass.max())[0] if mass.max() > 0 else np.zeros(0, int)
        if len(seen) < 2:
            return NOTHING
        rows = (weight[seen].sum(2) * np.arange(clip.shape[1])).sum(1) / mass[seen]
        columns = (weight[seen].sum(1) * np.arange(clip.shape[2])).sum(1) / mass[seen]
        down, right = (np.polyfit(seen, axis, 1)[0] * (seen[-1] - seen[0]) for axis in (rows, columns))
        if max(abs(down), abs(right)) < self.least_travel:
            return STILL
        if abs(right) >= abs(down):
            return "right" if right > 0 else "left"
        return "down" if down > 0 else "up"
