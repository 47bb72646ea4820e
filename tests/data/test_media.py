"""Media files: what is written is read back, and what cannot be read is one line that names the file."""

from __future__ import annotations

import numpy as np
import pytest
import soundfile
from PIL import Image as Picture

from ernie5.data import media


@pytest.fixture
def picture() -> np.ndarray:
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[4:20, 8:30] = (220, 30, 60)
    return pixels


@pytest.fixture
def clip(picture) -> np.ndarray:
    return np.stack([np.roll(picture, 3 * t, axis=0) for t in range(5)])


def test_a_png_comes_back_exactly(tmp_path, picture):
    media.write_image(tmp_path / "a.png", picture)
    np.testing.assert_array_equal(media.read_image(tmp_path / "a.png", 32), picture)


def test_an_image_is_cut_to_its_centre_square_and_resized(tmp_path):
    wide = np.zeros((40, 100, 3), np.uint8)
    wide[:, 30:70] = 255  # the centre square
    media.write_image(tmp_path / "wide.png", wide)
    assert (media.read_image(tmp_path / "wide.png", 16) == 255).all()


def test_transparency_lies_on_white(tmp_path):
    Picture.new("RGBA", (8, 8), (10, 20, 30, 0)).save(tmp_path / "clear.png")
    assert (media.read_image(tmp_path / "clear.png", 8) == 255).all()


@pytest.mark.parametrize(("name", "tolerance"), [("a.gif", 4), ("a.webp", 12), ("a.mp4", 40)])
def test_a_clip_comes_back(tmp_path, clip, name, tolerance):
    media.write_video(tmp_path / name, clip)
    found = media.read_video(tmp_path / name, 32)
    assert found.shape == clip.shape and found.dtype == np.uint8
    assert np.abs(found.astype(int) - clip).mean() < tolerance
    assert media.read_video(tmp_path / name, 32, max_frames=3).shape[0] == 3


def test_a_recording_comes_back(tmp_path):
    wave = np.sin(np.arange(16000) * 0.1).astype(np.float32) * 0.5
    media.write_audio(tmp_path / "a.wav", wave)
    np.testing.assert_allclose(media.read_audio(tmp_path / "a.wav", 16000), wave, atol=1e-4)


def test_a_recording_becomes_mono_at_the_wanted_rate(tmp_path):
    time = np.arange(44100) / 44100
    tone = np.sin(2 * np.pi * 440 * time)
    soundfile.write(tmp_path / "a.wav", np.stack([tone, tone * 0.5], axis=1), 44100)
    found = media.read_audio(tmp_path / "a.wav", 16000)
    assert found.shape == (16000,) and found.dtype == np.float32
    spectrum = np.abs(np.fft.rfft(found))
    assert spectrum.argmax() == 440
    assert np.abs(found[1000:-1000]).max() == pytest.approx(0.75, abs=0.01)


READERS = {
    "png": lambda path: media.read_image(path, 32),
    "gif": lambda path: media.read_video(path, 32),
    "mp4": lambda path: media.read_video(path, 32),
    "wav": lambda path: media.read_audio(path, 16000),
}


@pytest.mark.parametrize("suffix", READERS)
def test_a_missing_file_is_one_line(tmp_path, suffix):
    path = tmp_path / f"gone.{suffix}"
    with pytest.raises(ValueError, match=f"gone.{suffix}: no such") as caught:
        READERS[suffix](path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", READERS)
@pytest.mark.parametrize("content", [b"", b"this is no media file at all" * 20])
def test_a_corrupt_file_is_one_line(tmp_path, suffix, content):
    path = tmp_path / f"bad.{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"bad.{suffix}: .*expected") as caught:
        READERS[suffix](path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", ["png", "gif"])
def test_a_file_cut_short_is_one_line(tmp_path, suffix):
    noise = np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3), np.uint8)
    path = tmp_path / f"half.{suffix}"
    if suffix == "png":
        media.write_image(path, noise[0])
    else:
        media.write_video(path, noise)
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(ValueError, match=f"half.{suffix}: not a readable"):
        READERS[suffix](path)


def test_an_empty_recording_is_refused(tmp_path):
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), 16000)
    with pytest.raises(ValueError, match=r"empty.wav: the recording is empty"):
        media.read_audio(tmp_path / "empty.wav", 16000)


def test_a_failed_write_leaves_the_old_file(tmp_path, picture):
    path = tmp_path / "a.png"
    media.write_image(path, picture)
    with pytest.raises(TypeError):
        media.write_image(path, picture.astype(float)[..., :2])
    np.testing.assert_array_equal(media.read_image(path, 32), picture)
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]
