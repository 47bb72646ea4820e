"""The vision tokenizer as others use it: shapes, chunks, training, saving, and bad input."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ernie5.config.schema import VisionTokenizerConfig
from ernie5.tokenizers.vision import VisionTokenizer
from ernie5.tokenizers.vision_augment import jitter


def tiny(**changes: object) -> VisionTokenizerConfig:
    shape = {"image_size": 16, "scales": [1, 2], "channels": 8, "vit_dim": 8, "vit_heads": 2, "bits": [4, 6]}
    training = {"vit_steps": 4, "image_steps": 4, "video_steps": 4, "batch_size": 4, "video_batch_size": 2}
    return VisionTokenizerConfig(**{**shape, **training, **changes})


def material(seed: int = 0) -> tuple[np.ndarray, list[str], np.ndarray]:
    """Squares, bright or dark, and clips of them."""
    rng = np.random.default_rng(seed)
    images, captions = np.zeros([24, 16, 16, 3], np.uint8), []
    for i in range(24):
        y, x = rng.integers(0, 8, 2)
        images[i, y : y + 8, x : x + 8] = (255, 60)[i % 2]
        captions.append(("a bright square", "a dark square")[i % 2])
    return images, captions, np.stack([np.roll(images[:6], t, axis=2) for t in range(5)], axis=1)


@pytest.fixture(scope="module")
def trained() -> VisionTokenizer:
    return VisionTokenizer.train(tiny(weight_adversarial=0.01), *material(), progress=False)


def clips(count: int, frames: int) -> np.ndarray:
    return np.random.default_rng(7).integers(0, 256, (count, frames, 16, 16, 3), dtype=np.uint8)


@pytest.mark.parametrize("bits", [4, 6])
@pytest.mark.parametrize(("frames", "latent_frames"), [(1, 1), (5, 3), (9, 5)])
def test_shapes(trained, bits, frames, latent_frames):
    video = clips(3, frames)
    latent = trained.encode(video, bits)
    assert latent.shape == (3, latent_frames, 2, 2, bits) and latent.dtype == np.float32
    assert trained.num_latent_frames(frames) == latent_frames and trained.num_frames(latent_frames) == frames
    drawn = trained.decode(trained.quantise(latent), bits)
    assert drawn.shape == video.shape and drawn.dtype == np.uint8


@pytest.mark.parametrize("chunk", [2, 4, 100])
def test_chunked_encoding_equals_whole(trained, chunk):
    video = clips(2, 13)
    np.testing.assert_allclose(trained.encode(video, 6, chunk=chunk), trained.encode(video, 6), atol=1e-5)


def test_first_frame_of_a_clip_is_an_image(trained):
    video = clips(2, 5)
    np.testing.assert_allclose(trained.encode(video, 6)[:, :1], trained.encode(video[:, :1], 6), atol=1e-5)


@pytest.mark.parametrize(("frames", "tokens", "patches", "grid"), [(1, 4, 4, (1, 2, 2)), (5, 8, 16, (2, 2, 2))])
def test_features(trained, frames, tokens, patches, grid):
    video = clips(2, frames)
    cnn, vit, found = trained.features(video)
    assert found == grid and cnn.shape == vit.shape == (2, tokens, patches, 8)
    alone = trained.features(video[:, -1:])
    for merged, single in zip((cnn, vit), alone[:2], strict=True):
        np.testing.assert_allclose(merged[:, -1, -4:], single[:, -1], atol=1e-4)  # the last frame fills the last group


def test_tokens_hold_their_own_patches(trained):
    image = np.zeros([1, 16, 16, 3], np.uint8)
    lit = image.copy()
    lit[0, :4, 12:] = 255  # patch (0, 3) of 4x4, so the top right token, patch (0, 1)
    stem = trained.members[6].encoder.stem
    weight = stem.weight.numpy()
    try:  # with a stem that sees one patch and a silent block, exactly one feature vector changes
        centre = np.zeros_like(weight)
        centre[:, :, :, 1, 1] = weight[:, :, :, 1, 1]
        stem.weight.set_value(centre)
        silent = trained.members[6].encoder.fine.conv2.weight
        kept = silent.numpy()
        silent.set_value(np.zeros_like(kept))
        changed = np.abs(trained.features(lit)[0] - trained.features(image)[0]).sum(-1)[0] > 1e-4
        silent.set_value(kept)
    finally:
        stem.weight.set_value(weight)
    np.testing.assert_array_equal(np.argwhere(changed), [[1, 1]])


def test_features_are_standardised(trained):
    cnn, vit, _ = trained.features(material()[0])
    for x in (cnn, vit):
        np.testing.assert_allclose(x.mean((0, 1, 2)), 0, atol=1e-2)
        np.testing.assert_allclose(x.std((0, 1, 2)), 1, atol=5e-2)


def test_training_improves_reconstruction_and_is_deterministic():
    images, captions, video = material()
    settings = {"image_steps": 120, "video_steps": 30, "bits": [8], "batch_size": 8}
    result = VisionTokenizer.train(tiny(**settings), images, captions, video, progress=False)
    error = np.square(result.reconstruct(images, 8)[:, 0].astype(float) - images).mean()
    assert error < 0.35 * images.astype(float).var()
    short = [VisionTokenizer.train(tiny(), images, captions, video, progress=False) for _ in range(2)]
    np.testing.assert_array_equal(*(tokenizer.encode(images, 6) for tokenizer in short))


def test_training_without_clips():
    images, captions, _ = material()
    result = VisionTokenizer.train(tiny(), images, captions, np.zeros([0, 5, 16, 16, 3], np.uint8), progress=False)
    assert result.encode(images, 6).shape == (24, 1, 2, 2, 6)


def test_saved_is_loaded(trained, tmp_path):
    trained.save(tmp_path / "vision")
    loaded = VisionTokenizer.load(tmp_path / "vision")
    video = clips(2, 5)
    assert loaded.config == trained.config and loaded.bits_series == [4, 6]
    for bits in (4, 6):
        np.testing.assert_array_equal(loaded.encode(video, bits), trained.encode(video, bits))
    for a, b in zip(loaded.features(video)[:2], trained.features(video)[:2], strict=True):
        np.testing.assert_array_equal(a, b)
    code = trained.quantise(trained.encode(video, 6))
    np.testing.assert_array_equal(loaded.decode(code, 6), trained.decode(code, 6))


def _truncate(folder):
    path = folder / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:200])


def _reshape(folder):
    path = folder / "weights.safetensors"
    weights = load_file(path)
    weights["member_6.encoder.to_bits.weight"] = weights["member_6.encoder.to_bits.weight"][:, :5].copy()
    save_file(weights, path)


def _drop(folder):
    path = folder / "weights.safetensors"
    save_file({k: v for k, v in load_file(path).items() if k != "cnn_scale"}, path)


def _edit_header(key, value):
    def edit(folder):
        header = json.loads((folder / "config.json").read_text())
        (header if key == "format_version" else header["config"])[key] = value
        (folder / "config.json").write_text(json.dumps(header))

    return edit


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (_truncate, "unreadable weights"),
        (_reshape, r"member_6.encoder.to_bits.weight is \[1, 5, 16, 1, 1\]"),
        (_drop, "cnn_scale is nothing"),
        (_edit_header("format_version", 99), "format_version 99"),
        (_edit_header("channels", 16), "config.json says"),
        (_edit_header("wings", 2), "wings"),
        (_edit_header("bits", [6, 4]), "bits is"),
        (lambda folder: (folder / "config.json").write_text("{"), "unreadable vision tokenizer"),
        (lambda folder: (folder / "config.json").unlink(), "no vision tokenizer here"),
        (lambda folder: (folder / "weights.safetensors").unlink(), "unreadable weights"),
    ],
)
def test_bad_checkpoints_say_so_in_one_line(trained, tmp_path, spoil, says):
    trained.save(tmp_path / "vision")
    spoil(tmp_path / "vision")
    with pytest.raises(ValueError, match=says) as error:
        VisionTokenizer.load(tmp_path / "vision")
    assert "\n" not in str(error.value) and "train_tokenizer.py" in str(error.value)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda t: t.encode(clips(1, 4), 6), "found 4 frames"),
        (lambda t: t.encode(clips(1, 5), 7), "bits: found 7"),
        (lambda t: t.encode(clips(1, 5), 6, chunk=3), "chunk: found 3"),
        (lambda t: t.encode(np.zeros([1, 1, 8, 8, 3], np.uint8), 6), "expected uint8"),
        (lambda t: t.features(np.zeros([1, 16, 16, 3], np.float32)), "found float32"),
        (lambda t: t.decode(np.zeros([1, 1, 2, 2, 4], np.float32), 6), "decode: found"),
        (lambda t: VisionTokenizer(tiny(scales=[1, 3])), "scales end in"),
        (lambda t: VisionTokenizer(tiny(frames=4)), "frames is 4"),
        (lambda t: VisionTokenizer(tiny(vit_heads=3)), "vit_heads 3"),
        (lambda t: VisionTokenizer.train(tiny(), material()[0], ["a"], material()[2]), "found 1 for 24 images"),
        (lambda t: VisionTokenizer.train(tiny(), material()[0], ["same"] * 24, material()[2]), "no word that some"),
        (lambda t: VisionTokenizer.train(tiny(), material()[0], ["a"] * 24, material()[2][:, :3]), "clips: found"),
    ],
)
def test_bad_input_says_so(trained, call, says):
    with pytest.raises(ValueError, match=says):
        call(trained)


def test_jitter_keeps_borders_and_content():
    images = material()[0]
    moved = jitter(images, np.random.default_rng(0))
    assert moved.shape == images.shape and (moved != images).any()
    mass = moved.astype(float).sum((1, 2, 3)) / images.astype(float).sum((1, 2, 3))
    assert mass.min() > 0.6 and mass.max() < 1.5
    white = np.full([4, 16, 16, 3], 255, np.uint8)
    np.testing.assert_array_equal(jitter(white, np.random.default_rng(1)), white)
    still = jitter(images, np.random.default_rng(2), shift=0, turn=0, scale=0)
    np.testing.assert_array_equal(still, images)
