"""What the model made while it was measured, written where a person can open it: PNG, GIF, MP4, WAV and text.

A metric returns ``Exhibit``s beside its numbers; ``write_samples`` puts them under ``samples/`` of a run, one folder a
section, with a grid of every section's pictures and an ``index.json`` that the report reads.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import cv2
import numpy as np
import soundfile
from PIL import Image as PillowImage

from ernie5.files import write_json

MAGNIFY = 4  # 32-pixel pictures are written at 128 pixels, each pixel a sharp square
FRAME_MS = 200
INDEX = "index.json"
KINDS = ("image", "clip", "audio", "text")


@dataclass
class Exhibit:
    """One thing to look at. ``media``: uint8 picture [H, W, 3] or clip [T, H, W, 3], float32 wave [n], or a string."""

    section: str
    kind: str  # one of KINDS
    media: np.ndarray | str
    prompt: str
    answer: str = ""  # what the model said, or what the judge saw or heard
    correct: bool | None = None  # None where nothing is judged
    sample_rate: int = 16000


@dataclass
class IndexEntry:
    """A line of ``samples/index.json``; ``file`` is relative to the samples folder and empty for text."""

    section: str
    kind: str
    file: str
    prompt: str
    answer: str
    correct: bool | None
    text: str = ""


def magnified(picture: np.ndarray, factor: int = MAGNIFY) -> np.ndarray:
    """uint8 [..., H, W, 3] -> [..., H*factor, W*factor, 3] by repeating pixels."""
    return picture.repeat(factor, axis=-3).repeat(factor, axis=-2)


def grid(pictures: Sequence[np.ndarray], columns: int = 10, gap: int = 2) -> np.ndarray:
    """Equal uint8 [H, W, 3] pictures -> one picture, row by row on light grey."""
    height, width = pictures[0].shape[:2]
    rows = -(-len(pictures) // columns)
    columns = min(columns, len(pictures))
    sheet = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, 3), 208, np.uint8)
    for number, picture in enumerate(pictures):
        top, left = gap + number // columns * (height + gap), gap + number % columns * (width + gap)
        sheet[top : top + height, left : left + width] = picture
    return sheet


def write_png(path: Path, picture: np.ndarray) -> None:
    PillowImage.fromarray(picture).save(path)


def write_gif(path: Path, clip: np.ndarray) -> None:
    """uint8 [T, H, W, 3]; the last frame rests longer, so that the eye sees where the loop begins."""
    frames = [PillowImage.fromarray(frame).quantize(128) for frame in clip]
    pauses = [FRAME_MS] * (len(frames) - 1) + [4 * FRAME_MS]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=pauses, loop=0)


def write_mp4(path: Path, clip: np.ndarray) -> None:
    """uint8 [T, H, W, 3] at 1000 / FRAME_MS frames a second."""
    size = (clip.shape[2], clip.shape[1])
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), 1000 / FRAME_MS, size)
    for frame in clip:
        writer.write(np.ascontiguousarray(frame[..., ::-1]))
    writer.release()


def write_samples(folder: Path, exhibits: Sequence[Exhibit]) -> list[IndexEntry]:
    """Replaces the folder's sections named by the exhibits, keeps the others, and rewrites ``index.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    sections: dict[str, list[Exhibit]] = {}
    for exhibit in exhibits:
        sections.setdefault(exhibit.section, []).append(exhibit)
    entries = [entry for entry in read_index(folder) if entry.section not in sections]
    for section, members in sections.items():
        shutil.rmtree(folder / section, ignore_errors=True)
        (folder / section).mkdir()
        entries += [_write_one(folder, number, member) for number, member in enumerate(members)]
        _write_sheet(folder, section, members)
        _write_transcript(folder, section, members)
    write_json(folder / INDEX, [asdict(entry) for entry in entries])
    return entries


def read_index(folder: Path) -> list[IndexEntry]:
    """The entries a former ``write_samples`` left; an empty list where there are none."""
    path = folder / INDEX
    return [IndexEntry(**entry) for entry in json.loads(path.read_text())] if path.is_file() else []


def _write_one(folder: Path, number: int, exhibit: Exhibit) -> IndexEntry:
    assert exhibit.kind in KINDS, exhibit.kind
    stem = f"{exhibit.section}/{number:02d}_{_slug(exhibit.prompt)}"
    file, text = "", ""
    if exhibit.kind == "image":
        file = f"{stem}.png"
        write_png(folder / file, magnified(exhibit.media))
    elif exhibit.kind == "clip":
        file = f"{stem}.gif"
        write_gif(folder / file, magnified(exhibit.media))
        write_mp4(folder / f"{stem}.mp4", magnified(exhibit.media))
    elif exhibit.kind == "audio":
        file = f"{stem}.wav"
        soundfile.write(folder / file, np.clip(exhibit.media, -1.0, 1.0), exhibit.sample_rate, subtype="PCM_16")
    else:
        text = str(exhibit.media)
    return IndexEntry(exhibit.section, exhibit.kind, file, exhibit.prompt, exhibit.answer, exhibit.correct, text)


def _write_sheet(folder: Path, section: str, members: Sequence[Exhibit]) -> None:
    """A grid of a section's pictures; clips become one row each, frame by frame."""
    pictures = [member.media for member in members if member.kind == "image"]
    if pictures and len({picture.shape for picture in pictures}) == 1:
        write_png(folder / f"{section}.png", magnified(grid(pictures), 2))
    clips = [member.media for member in members if member.kind == "clip"]
    if clips and len({clip.shape for clip in clips}) == 1:
        frames = [frame for clip in clips for frame in clip]
        write_png(folder / f"{section}.png", magnified(grid(frames, columns=clips[0].shape[0]), 2))


def _write_transcript(folder: Path, section: str, members: Sequence[Exhibit]) -> None:
    lines = []
    for member in members:
        verdict = {True: "right", False: "wrong", None: ""}[member.correct]
        said = member.media if member.kind == "text" else member.answer
        lines.append("\t".join(part for part in (member.prompt, said, verdict) if part))
    (folder / f"{section}.txt").write_text("\n".join(lines) + "\n")


def _slug(prompt: str) -> str:
    kept = "".join(letter if letter.isascii() and letter.isalnum() else "_" for letter in prompt.lower())
    return "_".join(part for part in kept.split("_") if part)[:40] or "sample"
