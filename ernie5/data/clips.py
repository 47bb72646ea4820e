"""Short clips of real digits and icons in motion, with exact captions: "a red star moves up"."""

from __future__ import annotations

import cv2
import numpy as np

from ernie5.data.digits import caption as digit_caption
from ernie5.data.digits import load_digits, split_indices
from ernie5.data.icons import COLOURS, ICONS, icon_mask, paste
from ernie5.data.source import check_split
from ernie5.sequence.parts import Sample, Text, Video

SIZE = 32
FRAMES = 5
SPEED = 3  # pixels a frame
SPRITE = 16  # pixels of the longer side
DIRECTIONS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
QUESTIONS = ("what happens?", "what moves, and where?", "describe the clip")


def digit_mask(digit: np.ndarray) -> np.ndarray:
    """uint8 [28,28] -> coverage in [0,1], float32 [16,16]: the 20 pixels around the digit, wherever it stands."""
    corner = []
    for axis in (0, 1):
        inked = np.flatnonzero(digit.max(axis=1 - axis))
        middle = (inked[0] + inked[-1] + 1) // 2
        corner.append(int(np.clip(middle - 10, 0, 8)))
    square = digit[corner[0] : corner[0] + 20, corner[1] : corner[1] + 20].astype(np.float32) / 255
    return cv2.resize(square, (SPRITE, SPRITE), interpolation=cv2.INTER_AREA)


def render_clip(
    mask: np.ndarray,
    colour: tuple[int, int, int],
    background: int,
    direction: str,
    across: int,
    start: int,
    frames: int = FRAMES,
) -> np.ndarray:
    """uint8 [frames,32,32,3]: the mask moves ``SPEED`` pixels a frame from ``start`` (pixels from the edge it leaves);
    ``across`` is its place along the other axis."""
    step = np.array(DIRECTIONS[direction])
    axis = int(np.flatnonzero(step)[0])
    first = start if step[axis] > 0 else SIZE - mask.shape[axis] - start
    canvas = np.full((SIZE, SIZE, 3), background, np.uint8)
    clip = []
    for t in range(frames):
        corner = [across, across]
        corner[axis] = first + t * SPEED * int(step[axis])
        clip.append(paste(canvas, mask, colour, *corner))
    return np.stack(clip)


class ClipSource:
    """Samples of ``clip_und`` and ``clip_gen``: half digits, half icons. ``meta`` has the direction and the object.

    Held-out clips move held-out digits, and icons of colours in directions never combined in training.
    """

    tasks = ("clip_und", "clip_gen")
    feeds = frozenset({"text", "vision"})

    def __init__(self, train: int = 2000, heldout: int = 200, frames: int = FRAMES, seed: int = 0) -> None:
        self.counts = {"train": train, "heldout": heldout}
        self.frames, self.seed = frames, seed

    def samples(self, split: str) -> list[Sample]:
        check_split(split)
        rng = np.random.default_rng([self.seed, 7, split == "heldout"])
        pixels, labels = load_digits()
        indices = split_indices(split)
        samples = []
        for i in range(self.counts[split]):
            direction = list(DIRECTIONS)[i % 4]
            if i // 4 % 2:
                index = int(indices[rng.integers(len(indices))])
                mask = digit_mask(pixels[index])
                name, colour, background = digit_caption(int(labels[index])), (255, 255, 255), 0
                meta = {"object": name, "digit": int(labels[index])}
            else:
                icon = ICONS[rng.integers(len(ICONS))]
                word = _colour(rng, direction, split == "heldout")
                mask, colour, background = icon_mask(icon, SPRITE), COLOURS[word], 255
                name = f"{'an' if word[0] in 'aeiou' else 'a'} {word} {icon}"
                meta = {"object": name, "icon": icon, "colour": word}
            across = int(rng.integers(1, SIZE - SPRITE))
            clip = render_clip(mask, colour, background, direction, across, int(rng.integers(0, 4)), self.frames)
            samples += _clip_samples(clip, f"{name} moves {direction}", {**meta, "direction": direction})
        return samples


def _colour(rng: np.random.Generator, direction: str, unseen: bool) -> str:
    """Each direction keeps two of the eight colours for the held-out split."""
    colours, turn = list(COLOURS), list(DIRECTIONS).index(direction)
    kept = {colours[turn], colours[turn + 4]}
    pool = [colour for colour in colours if (colour in kept) == unseen]
    return pool[rng.integers(len(pool))]


def _clip_samples(clip: np.ndarray, caption: str, meta: dict) -> list[Sample]:
    return [
        Sample([Video(clip), Text(QUESTIONS, loss=False), Text(caption)], "clip_und", meta),
        Sample([Text((caption, f"show {caption}")), Video(clip, generate=True)], "clip_gen", meta),
    ]
