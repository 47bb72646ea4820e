"""Pictures, clips and recordings: files <-> arrays. A file that is missing or cannot be read is one clear line."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import soundfile
from PIL import Image as Picture
from PIL import ImageSequence, UnidentifiedImageError
from scipy.signal import resample_poly

from ernie5.files import replacing

FRAMES_PER_SECOND = 5
# What Pillow raises for files that are no pictures, cut short, or larger in memory than any picture should be.
UNREADABLE = (UnidentifiedImageError, OSError, SyntaxError, ValueError, Picture.DecompressionBombError)


def _existing(path: str | Path, what: str) -> Path:
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such {what} file; check the path")
    return path


def fit(picture: np.ndarray, side: int) -> np.ndarray:
    """The centre square of uint8 [H,W,3], resized to [side,side,3]."""
    height, width = picture.shape[:2]
    edge = min(height, width)
    top, left = (height - edge) // 2, (width - edge) // 2
    square = picture[top : top + edge, left : left + edge]
    if edge == side:
        return np.ascontiguousarray(square)
    return cv2.resize(square, (side, side), interpolation=cv2.INTER_AREA if edge > side else cv2.INTER_LINEAR)


def read_image(path: str | Path, side: int) -> np.ndarray:
    """uint8 [side,side,3] RGB; transparency is laid on white."""
    path = _existing(path, "image")
    try:
        with Picture.open(path) as picture:
            return fit(_on_white(picture), side)
    except UNREADABLE as error:
        raise ValueError(
            f"{path}: not a readable image ({_short(error)}); expected PNG, JPEG, WebP, GIF or BMP"
        ) from None


def _on_white(picture: Picture.Image) -> np.ndarray:
    rgba = np.asarray(picture.convert("RGBA"), np.float32)
    alpha = rgba[..., 3:] / 255
    return np.round(rgba[..., :3] * alpha + 255 * (1 - alpha)).astype(np.uint8)


def read_video(path: str | Path, side: int, max_frames: int = 512) -> np.ndarray:
    """uint8 [T,side,side,3] RGB, at most ``max_frames`` from the start. GIF and WebP by Pillow, the rest by OpenCV."""
    path = _existing(path, "video")
    try:
        if path.suffix.lower() in (".gif", ".webp"):
            with Picture.open(path) as picture:
                frames = [
                    fit(_on_white(f), side)
                    for _, f in zip(range(max_frames), ImageSequence.Iterator(picture), strict=False)
                ]
        else:
            frames = _capture(path, side, max_frames)
    except (*UNREADABLE, cv2.error) as error:
        raise ValueError(f"{path}: not a readable video ({_short(error)}); expected GIF, WebP or MP4") from None
    if not frames:
        raise ValueError(f"{path}: no frame could be read; expected GIF, WebP or MP4")
    return np.stack(frames)


def _capture(path: Path, side: int, max_frames: int) -> list[np.ndarray]:
    capture = cv2.VideoCapture(str(path))
    frames = []
    try:
        while len(frames) < max_frames:
            found, frame = capture.read()
            if not found:
                break
            frames.append(fit(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB), side))
    finally:
        capture.release()
    return frames


def read_audio(path: str | Path, sample_rate: int) -> np.ndarray:
    """float32 [n] in [-1,1], mono, at ``sample_rate``."""
    path = _existing(path, "audio")
    try:
        wave, rate = soundfile.read(str(path), dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, RuntimeError, OSError) as error:
        raise ValueError(f"{path}: not a readable recording ({_short(error)}); expected WAV, FLAC or OGG") from None
    if not len(wave):
        raise ValueError(f"{path}: the recording is empty; expected at least one sample")
    wave = wave.mean(axis=1)
    if rate != sample_rate:
        divisor = int(np.gcd(rate, sample_rate))
        wave = resample_poly(wave, sample_rate // divisor, rate // divisor)
    return np.clip(wave, -1, 1).astype(np.float32)


def _short(error: Exception) -> str:
    return str(error).splitlines()[0][:120] if str(error) else type(error).__name__


def write_image(path: str | Path, pixels: np.ndarray) -> None:
    """uint8 [H,W,3] to the format of the suffix."""
    with replacing(path) as temporary:
        Picture.fromarray(pixels).save(temporary)


def write_video(path: str | Path, frames: np.ndarray, fps: int = FRAMES_PER_SECOND) -> None:
    """uint8 [T,H,W,3] to a looping GIF or WebP, or to MP4."""
    with replacing(path) as temporary:
        if Path(path).suffix.lower() in (".gif", ".webp"):
            pictures = [Picture.fromarray(frame) for frame in frames]
            pictures[0].save(temporary, save_all=True, append_images=pictures[1:], duration=1000 // fps, loop=0)
            return
        size = (frames.shape[2], frames.shape[1])
        writer = cv2.VideoWriter(str(temporary), cv2.VideoWriter_fourcc(*"mp4v"), fps, size)
        for frame in frames:
            writer.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
        writer.release()
        if not temporary.is_file() or not temporary.stat().st_size:
            raise ValueError(f"{path}: OpenCV could not write this video; use .gif or .mp4")


def write_audio(path: str | Path, wave: np.ndarray, sample_rate: int = 16000) -> None:
    """float32 [n] in [-1,1] to 16-bit WAV (or FLAC, OGG by suffix)."""
    with replacing(path) as temporary:
        soundfile.write(str(temporary), np.clip(wave, -1, 1), sample_rate)
