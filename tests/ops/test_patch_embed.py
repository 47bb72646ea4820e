import numpy as np
import paddle
import pytest
from paddle.static import InputSpec

from ernie5.ops import kernels
from ernie5.ops.patch_embed import _reference, patch_embed, patch_times
from ernie5.tokenizers.vision_layers import TemporalMerge

MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
SHAPES = [  # B, T, H, W, patch, D
    (2, 5, 8, 12, (2, 4, 4), 33),
    (3, 1, 28, 14, (2, 14, 14), 16),
    (1, 6, 5, 7, (3, 5, 7), 5),
    (2, 4, 6, 6, (1, 2, 3), 48),
]
LARGE = (9, 1, 128, 128, (1, 4, 4), 64)  # more tokens than a cache keeps


def draw(shape, rng, kind="uint8"):
    clips, frames, height, width, patch, dim = shape
    size = (clips, frames, height, width, 3)
    video = rng.integers(0, 256, size).astype(np.uint8) if kind == "uint8" else rng.standard_normal(size)
    weight = rng.standard_normal((int(np.prod(patch)) * 3, dim))
    return video, weight, rng.standard_normal(dim)


def embed_patch_by_patch(video, weight, bias, patch, lead):
    """float64; every token is the sum over the values of its patch that exist."""
    values = (video / (255.0 if video.dtype == np.uint8 else 1.0) - np.array(MEAN)) / np.array(STD)
    (clips, frames, height, width, _), (pt, ph, pw) = video.shape, patch
    grid = (clips, patch_times(frames, pt, lead), height // ph, width // pw)
    tokens = np.tile(bias, (*grid, 1))
    weight = weight.reshape(pt, ph, pw, 3, -1)
    for b, t, y, x in np.ndindex(*grid):
        for k in range(pt):
            frame = t * pt - lead + k
            if 0 <= frame < frames:
                part = values[b, frame, y * ph : (y + 1) * ph, x * pw : (x + 1) * pw]
                tokens[b, t, y, x] += np.einsum("hwc,hwcd->d", part, weight[k])
    return tokens.reshape(clips, -1, len(bias))


@pytest.mark.parametrize("kind", ["uint8", "float64"])
@pytest.mark.parametrize("shape", SHAPES)
def test_reference_adds_up_every_patch(shape, kind):
    video, weight, bias = draw(shape, np.random.default_rng(0), kind)
    for lead in range(shape[4][0]):
        tokens = patch_embed(*map(paddle.to_tensor, (video, weight, bias)), shape[4], MEAN, STD, lead)
        expected = embed_patch_by_patch(video, weight, bias, shape[4], lead)
        np.testing.assert_allclose(tokens.numpy(), expected, atol=1e-11)


@pytest.mark.skipif(not kernels.available("patch_embed"), reason="no compiled kernels on this machine")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["uint8", "float32"])
@pytest.mark.parametrize("shape", [*SHAPES, LARGE])
def test_kernel_equals_the_reference(shape, kind, dtype):
    rng = np.random.default_rng(1)
    video, weight, bias = draw(shape, rng, kind)
    results = []
    upstream = None
    for function in (patch_embed, _reference):
        pixels = paddle.to_tensor(video.astype(kind), stop_gradient=kind == "uint8")
        w, b = (paddle.to_tensor(x, dtype="float32").astype(dtype).detach() for x in (weight, bias))
        w.stop_gradient = b.stop_gradient = False
        tokens = function(pixels, w, b, shape[4], MEAN, STD, shape[4][0] - 1)
        upstream = rng.standard_normal(tokens.shape) if upstream is None else upstream
        tokens.backward(paddle.to_tensor(upstream, dtype="float32").astype(dtype))
        found = [tokens, w.grad, b.grad, *([] if kind == "uint8" else [pixels.grad])]
        results.append([x.astype("float32").numpy() for x in found])
    for got, wanted in zip(*results, strict=True):
        scale = np.abs(wanted).max()
        np.testing.assert_allclose(got / scale, wanted / scale, atol=2e-5 if dtype == "float32" else 2e-2)


@pytest.mark.parametrize("value, mean", [(0, 0.0), (255, 1.0), (122, 122 / 255)])
def test_pictures_of_the_mean_give_the_bias(value, mean):
    """Whatever is folded into the weight, v/255 and the mean must not cancel after they were multiplied and summed."""
    rng = np.random.default_rng(6)
    weight, bias = (rng.standard_normal(size).astype(np.float32) for size in ((32 * 32 * 3, 8), 8))
    video = paddle.full([1, 1, 64, 64, 3], value, "uint8")
    tokens = patch_embed(video, *map(paddle.to_tensor, (weight, bias)), (1, 32, 32), [mean] * 3, [0.1] * 3)
    np.testing.assert_allclose(tokens.numpy(), np.broadcast_to(bias, (1, 4, 8)), atol=1e-4)


def test_a_float_video_without_gradient_costs_none():
    video, weight, bias = draw(SHAPES[0], np.random.default_rng(2), "float32")
    pixels, w, b = (paddle.to_tensor(x, dtype="float32", stop_gradient=False) for x in (video, weight, bias))
    pixels.stop_gradient = True
    patch_embed(pixels, w, b, SHAPES[0][4], MEAN, STD).sum().backward()
    assert pixels.grad is None and w.grad is not None and b.grad is not None


def test_a_clip_may_be_embedded_in_pieces():
    video, weight, bias = draw(SHAPES[0], np.random.default_rng(3))
    w, b = (paddle.to_tensor(x, dtype="float32") for x in (weight, bias))
    pieces = [
        patch_embed(paddle.to_tensor(video[:, a:z]), w, b, SHAPES[0][4], MEAN, STD, lead)
        for a, z, lead in ((0, 3, 1), (3, 5, 0))
    ]
    whole = patch_embed(paddle.to_tensor(video), w, b, SHAPES[0][4], MEAN, STD)
    np.testing.assert_allclose(paddle.concat(pieces, axis=1).numpy(), whole.numpy(), atol=1e-5)


@pytest.mark.parametrize("frames", [1, 5])
def test_time_is_padded_as_in_the_vision_tokenizer(frames):
    """``TemporalMerge`` over unshuffled pixels is a patch embedding of width ``bits``."""
    rng = np.random.default_rng(4)
    merge = TemporalMerge(3 * 16, 8, 2)
    video = rng.integers(0, 256, (2, frames, 8, 12, 3)).astype(np.uint8)
    pixels = paddle.to_tensor(video.reshape(-1, 8, 12, 3).transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1)
    latent = merge(paddle.nn.functional.pixel_unshuffle(pixels, 4), 2)
    weight = merge.weight.reshape([2, 8, 3, 4, 4]).transpose([0, 3, 4, 2, 1]).reshape([-1, 8])
    tokens = patch_embed(paddle.to_tensor(video), weight, merge.bias, (2, 4, 4), [0.5] * 3, [0.5] * 3)
    flat = latent.transpose([0, 2, 3, 1]).reshape(tokens.shape)
    np.testing.assert_allclose(tokens.numpy(), flat.numpy(), atol=1e-5)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"video": [1, 2, 9, 8, 3]}, "9 x 8 pixels, expected multiples of the patch 4 x 4"),
        ({"video": [1, 2, 8, 6, 3]}, "8 x 6 pixels"),
        ({"video": [1, 0, 8, 8, 3]}, "T of 1 or more"),
        ({"video": [2, 8, 8, 3]}, r"expected \[B, T, H, W, C\]"),
        ({"weight": [95, 8]}, r"expected \[96, D\]"),
        ({"lead": 2}, "expected 0 to 1"),
        ({"mean": [0.5]}, "1 means and 3 deviations for 3 channels"),
    ],
)
def test_bad_input_is_one_line(change, message):
    given = {"video": [1, 2, 8, 8, 3], "weight": [96, 8], "lead": 1, "mean": MEAN} | change
    video, weight = (paddle.zeros(given[name]) for name in ("video", "weight"))
    with pytest.raises(ValueError, match=message) as error:
        patch_embed(video, weight, paddle.zeros([8]), (2, 4, 4), given["mean"], STD, given["lead"])
    assert "\n" not in str(error.value)


class Embedder(paddle.nn.Layer):
    def __init__(self):
        super().__init__()
        self.weight = self.create_parameter([96, 8])
        self.bias = self.create_parameter([8], is_bias=True)

    def forward(self, video):
        return patch_embed(video, self.weight, self.bias, (2, 4, 4), MEAN, STD)


def test_saved_program_gives_the_same_tokens(tmp_path):
    layer = Embedder()
    layer.eval()
    spec = [InputSpec([-1, 5, 8, 12, 3], "uint8")]
    paddle.jit.save(paddle.jit.to_static(layer, input_spec=spec, full_graph=True), str(tmp_path / "model"))
    video = paddle.to_tensor(np.random.default_rng(5).integers(0, 256, (2, 5, 8, 12, 3)).astype(np.uint8))
    loaded = paddle.jit.load(str(tmp_path / "model"))
    np.testing.assert_allclose(loaded(video).numpy(), layer(video).numpy(), atol=1e-5)
