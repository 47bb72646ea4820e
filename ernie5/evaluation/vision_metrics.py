"""Images: read a digit, draw a digit, draw an icon as its caption says, and what the tokenizer alone loses."""

from __future__ import annotations

import re

import numpy as np

from ernie5.data.digits import DigitSource
from ernie5.data.icons import COLOURS
from ernie5.data.speech import DIGIT_WORDS
from ernie5.evaluation.generating import VISION, answer_texts, generate_all, reconstructed
from ernie5.evaluation.judges import PLACES, DigitJudge, IconJudge, psnr
from ernie5.evaluation.measure import Measurement, Scope, majority_share, prompt_of, prompt_text, share, target_of
from ernie5.evaluation.samples import Exhibit
from ernie5.sequence.parts import Image, Sample

SHOWN = 20


def digit_judge(scope: Scope) -> DigitJudge:
    """The judge of this run, trained once on the digits that the model trained on, never on held-out ones."""
    if "digit_judge" not in scope.cache:
        real = [sample for sample in DigitSource().samples("train") if sample.task == "digit_gen"]
        pictures = np.stack([_picture(sample) for sample in real])
        scope.cache["digit_judge"] = DigitJudge.train(pictures, [sample.meta["digit"] for sample in real])
    return scope.cache["digit_judge"]


def image_understanding(scope: Scope) -> Measurement:
    """The answer must name the held-out digit and no other. Ceiling: the digit judge on the same pictures."""
    samples = scope.draw("digit_und", 3 * scope.items)
    digits = [sample.meta["digit"] for sample in samples]
    answers = answer_texts(scope, "image_understanding", samples)
    right = [named_digits(answer) == [digit] for answer, digit in zip(answers, digits, strict=True)]
    pictures = np.stack([_picture(sample) for sample in samples])
    key = "image_understanding_accuracy"
    values = {
        key: share(right),
        f"{key}_ceiling": share(digit_judge(scope).read(pictures) == digits),
        f"{key}_baseline": majority_share(digits),
    }
    exhibits = [
        Exhibit("image_understanding", "image", picture, prompt_text(sample) or "(picture)", answer, bool(ok))
        for picture, sample, answer, ok in zip(pictures[:SHOWN], samples, answers, right, strict=False)
    ]
    return Measurement(values, exhibits)


def image_generation(scope: Scope) -> Measurement:
    """Every digit is asked for equally often; the judge reads what was drawn."""
    count = max(scope.items, 100)
    by_digit: dict[int, list[Sample]] = {}
    for sample in scope.draw("digit_gen", len(scope.samples["digit_gen"])):
        by_digit.setdefault(sample.meta["digit"], []).append(sample)
    classes = sorted(by_digit)
    asked = [by_digit[classes[i % len(classes)]] for i in range(count)]
    asked = [members[(i // len(classes)) % len(members)] for i, members in enumerate(asked)]
    digits = np.array([sample.meta["digit"] for sample in asked])
    prompts = [prompt_of(sample) for sample in asked]
    pictures = np.stack(generate_all(scope, "image_generation", prompts, "image", **VISION))
    real = np.stack([target_of(sample).pixels for sample in asked])
    judge = digit_judge(scope)
    seen = judge.read(pictures)
    key = "image_generation_accuracy"
    values = {
        key: share(seen == digits),
        f"{key}_ceiling": share(judge.read(real) == digits),
        f"{key}_tokenizer": share(judge.read(reconstructed(scope, real)) == digits),
        f"{key}_baseline": 1.0 / len(classes),
    }
    exhibits = [
        Exhibit("image_generation", "image", picture, prompt_text(sample), _digit_word(mark), bool(mark == digit))
        for picture, sample, mark, digit in list(zip(pictures, asked, seen, digits, strict=True))[: 4 * len(classes)]
    ]
    return Measurement(values, exhibits)


def caption_attributes(scope: Scope) -> Measurement:
    """Colour and place of icons in combinations never trained on, measured from the pixels; both must be right."""
    samples = scope.draw("icon_gen")
    pictures = np.stack(generate_all(scope, "caption", [prompt_of(sample) for sample in samples], "image", **VISION))
    real = np.stack([target_of(sample).pixels for sample in samples])
    judge = IconJudge(COLOURS)
    readings = judge.read(pictures)
    truth = [(sample.meta["colour"], sample.meta["place"]) for sample in samples]
    colour = [reading.colour == wanted[0] for reading, wanted in zip(readings, truth, strict=True)]
    place = [reading.place == wanted[1] for reading, wanted in zip(readings, truth, strict=True)]
    both = np.logical_and(colour, place)
    key = "caption_attribute_accuracy"
    values = {
        key: share(both),
        f"{key}_ceiling": share([(r.colour, r.place) == t for r, t in zip(judge.read(real), truth, strict=True)]),
        f"{key}_tokenizer": share(
            [(r.colour, r.place) == t for r, t in zip(judge.read(reconstructed(scope, real)), truth, strict=True)]
        ),
        f"{key}_baseline": majority_share(truth),
        "caption_colour_accuracy": share(colour),
        "caption_colour_accuracy_baseline": majority_share([wanted[0] for wanted in truth]),
        "caption_place_accuracy": share(place),
        "caption_place_accuracy_baseline": majority_share([wanted[1] for wanted in truth]),
    }
    exhibits = [
        Exhibit("icons", "image", picture, prompt_text(sample), f"{reading.colour}, {reading.place}", bool(ok))
        for picture, sample, reading, ok in list(zip(pictures, samples, readings, both, strict=True))[: 2 * SHOWN]
    ]
    return Measurement(values, exhibits)


def icon_understanding(scope: Scope) -> Measurement:
    """The answer must name the held-out icon's colour and place, a combination never trained on."""
    samples = scope.draw("icon_und", 2 * scope.items)
    answers = answer_texts(scope, "icon_understanding", samples)
    truth = [(sample.meta["colour"], sample.meta["place"]) for sample in samples]
    right = [named_attributes(answer) == wanted for answer, wanted in zip(answers, truth, strict=True)]
    pictures = np.stack([_picture(sample) for sample in samples])
    readings = IconJudge(COLOURS).read(pictures)
    key = "icon_understanding_accuracy"
    values = {
        key: share(right),
        f"{key}_ceiling": share([(r.colour, r.place) == t for r, t in zip(readings, truth, strict=True)]),
        f"{key}_baseline": majority_share(truth),
    }
    exhibits = [
        Exhibit("icon_understanding", "image", picture, prompt_text(sample), answer, bool(ok))
        for picture, sample, answer, ok in zip(pictures[:SHOWN], samples, answers, right, strict=False)
    ]
    return Measurement(values, exhibits)


def image_reconstruction(scope: Scope) -> Measurement:
    """PSNR of held-out pictures through the vision tokenizer. Baseline: one flat picture of the mean colour."""
    tasks = [task for task in ("digit_gen", "icon_gen") if len(scope.samples.get(task, ()))]
    pictures = [target_of(sample).pixels for task in tasks for sample in scope.draw(task)]
    pictures = np.stack(pictures)
    restored = reconstructed(scope, pictures)
    flat = [np.broadcast_to(np.rint(picture.mean((0, 1))).astype(np.uint8), picture.shape) for picture in pictures]
    key = "image_reconstruction_psnr"
    values = {
        key: float(np.mean([psnr(a, b) for a, b in zip(pictures, restored, strict=True)])),
        f"{key}_baseline": float(np.mean([psnr(a, b) for a, b in zip(pictures, flat, strict=True)])),
    }
    half = len(pictures) // 2
    shown = [*range(6), *range(half, half + 6)] if len(tasks) == 2 else [*range(min(12, len(pictures)))]
    exhibits = [
        Exhibit("image_reconstruction", "image", np.concatenate([pictures[i], restored[i]], 1), "real | restored")
        for i in shown
        if i < len(pictures)
    ]
    return Measurement(values, exhibits)


def named_digits(answer: str) -> list[int]:
    """Digits named in an answer, in order of appearance: ``"a handwritten seven"`` -> ``[7]``."""
    return [DIGIT_WORDS.index(word) for word in re.findall(r"[a-z]+", answer.lower()) if word in DIGIT_WORDS]


def named_attributes(answer: str) -> tuple[str, str]:
    """The one colour and the one place named in an answer, "" for none or several."""
    colours = [word for word in re.findall(r"[a-z]+", answer.lower()) if word in COLOURS]
    places = [place for place in PLACES if place in answer.lower()]
    return colours[0] if len(colours) == 1 else "", places[0] if len(places) == 1 else ""


def _digit_word(digit: int) -> str:
    return "nothing" if digit < 0 else DIGIT_WORDS[digit]


def _picture(sample: Sample) -> np.ndarray:
    """The only picture of a sample."""
    return next(part.pixels for part in sample.parts if isinstance(part, Image))
