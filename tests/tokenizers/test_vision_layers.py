"""Causal layers: against paddle's 3-D convolution, in chunks, and inflated from 2-D."""

from __future__ import annotations

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest

from ernie5.config.schema import VisionTokenizerConfig
from ernie5.tokenizers.vision_layers import CausalConv3D, TemporalMerge, TemporalSplit, TemporalState
from ernie5.tokenizers.vision_network import TokenizerNetwork, inflate, start_from_patches, widen


def tiny() -> VisionTokenizerConfig:
    return VisionTokenizerConfig(image_size=16, scales=[1, 2], channels=8, vit_dim=8, vit_heads=2, bits=[4, 6])


def randomise(layer: paddle.nn.Layer) -> None:
    for parameter in layer.parameters():
        parameter.set_value(0.2 * paddle.randn(parameter.shape))


def flat(clips: paddle.Tensor) -> paddle.Tensor:
    return clips.flatten(0, 1)


def test_causal_convolution_is_conv3d_padded_in_front():
    paddle.seed(0)
    layer = CausalConv3D(4, 5, taps=3)
    randomise(layer)
    x = paddle.randn([2, 6, 4, 7, 7])
    found = layer(flat(x), 2).reshape([2, 6, 5, 7, 7])
    padded = F.pad(x.transpose([0, 2, 1, 3, 4]), [1, 1, 1, 1, 2, 0], data_format="NCDHW")
    wanted = F.conv3d(padded, layer.weight.transpose([1, 2, 0, 3, 4]), layer.bias).transpose([0, 2, 1, 3, 4])
    np.testing.assert_allclose(found.numpy(), wanted.numpy(), atol=1e-5)


def test_merge_joins_groups_behind_the_first_frame():
    paddle.seed(0)
    layer = TemporalMerge(3, 4, ratio=2)
    randomise(layer)
    x = paddle.randn([1, 5, 3, 2, 2])
    y = layer(flat(x), 1)
    pair = F.conv2d(x[:, 3], layer.weight[0]) + F.conv2d(x[:, 4], layer.weight[1], layer.bias)
    assert y.shape == [3, 4, 2, 2]
    np.testing.assert_allclose(y[2].numpy(), pair[0].numpy(), atol=1e-5)
    np.testing.assert_allclose(y[:1].numpy(), layer(x[:, 0], 1).numpy(), atol=1e-5)


def test_split_gives_one_frame_then_groups():
    paddle.seed(0)
    layer = TemporalSplit(3, 4, ratio=2)
    randomise(layer)
    x = paddle.randn([3, 3, 2, 2])
    y = layer(x, 1)
    assert y.shape == [5, 4, 2, 2]
    np.testing.assert_allclose(y[0].numpy(), layer(x[:1], 1)[0].numpy(), atol=1e-5)
    np.testing.assert_allclose(y[3].numpy(), F.conv2d(x[2:], layer.weight[0], layer.bias)[0].numpy(), atol=1e-5)


@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_later_frames_change_nothing_earlier(side):
    paddle.seed(1)
    network = TokenizerNetwork(tiny(), 4, temporal=True)
    randomise(network)
    network.eval()
    if side == "encoder":
        x, module, changed_from, kept = paddle.randn([7, 3, 16, 16]), network.encoder, 3, 2  # frame 3 -> latent 2
    else:
        x, module, changed_from, kept = paddle.randn([4, 4, 2, 2]), network.decoder, 2, 3  # latent 2 -> frames 3, 4
    other = paddle.concat([x[:changed_from], paddle.randn(x[changed_from:].shape)])
    a, b = module(x, 1).numpy(), module(other, 1).numpy()
    np.testing.assert_array_equal(a[:kept], b[:kept])
    assert np.abs(a[kept:] - b[kept:]).min(axis=0).max() > 0


@pytest.mark.parametrize("cuts", [(1, 3, 5, 7), (3, 7), (5, 7)])
def test_chunks_equal_the_whole(cuts):
    paddle.seed(2)
    network = TokenizerNetwork(tiny(), 4, temporal=True)
    randomise(network)
    network.eval()
    x = paddle.randn([2, 7, 3, 16, 16])
    state, pieces = TemporalState(), []
    for start, stop in zip((0, *cuts), cuts, strict=False):
        piece = network.encoder(flat(x[:, start:stop]), 2, state)
        pieces.append(piece.reshape([2, -1, *piece.shape[1:]]))
        state.first = False
    whole = network.encoder(flat(x), 2).reshape([2, 4, 4, 2, 2])
    np.testing.assert_allclose(paddle.concat(pieces, axis=1).numpy(), whole.numpy(), atol=1e-5)


def test_inflation_keeps_images():
    paddle.seed(3)
    network = TokenizerNetwork(tiny(), 4, temporal=False)
    randomise(network)
    deep = inflate(network)
    images, codes = paddle.randn([3, 3, 16, 16]), paddle.randn([3, 4, 2, 2])
    np.testing.assert_array_equal(deep.encoder(images, 3).numpy(), network.encoder(images, 3).numpy())
    np.testing.assert_array_equal(deep.decoder(codes, 3).numpy(), network.decoder(codes, 3).numpy())


def test_inflated_network_decodes_a_clip_frame_by_frame_at_first():
    paddle.seed(4)
    network = TokenizerNetwork(tiny(), 4, temporal=False)
    deep = inflate(network)
    codes = paddle.randn([3, 4, 2, 2])
    frames, alone = deep.decoder(codes, 1).numpy(), network.decoder(codes, 3).numpy()
    np.testing.assert_allclose(frames[[0, 2, 4]], alone, atol=1e-5)
    np.testing.assert_allclose(frames[[1, 3]], alone[1:], atol=1e-5)


def test_widening_keeps_the_shared_bits_and_the_picture():
    paddle.seed(5)
    rng = np.random.default_rng(0)
    narrow = TokenizerNetwork(tiny(), 4, temporal=True)
    randomise(narrow)
    pixels = rng.normal(size=(8, 3, 16, 16)).astype(np.float32)
    wide = widen(narrow, 6, pixels, pixels * 0.5, rng)
    x = paddle.to_tensor(pixels[:5])
    old, new = narrow.encoder(x, 1).numpy(), wide.encoder(x, 1).numpy()
    np.testing.assert_allclose(new[:, :4] * 6**0.5, old * 4**0.5, atol=1e-4)
    code = np.sign(old) * 4**-0.5
    wider = np.concatenate([np.sign(old), np.ones_like(old[:, :2])], axis=1) * 6**-0.5
    drawn = [net.decoder(paddle.to_tensor(c), 1).numpy() for net, c in ((narrow, code), (wide, wider))]
    np.testing.assert_allclose(drawn[1], drawn[0], atol=1e-4)
    assert np.abs(new[:, 4:]).mean() > 0.1


def test_training_starts_from_principal_components():
    rng = np.random.default_rng(0)
    basis = rng.normal(size=(6, 192))
    pixels = F.pixel_shuffle(
        paddle.to_tensor((rng.normal(size=(64 * 4, 6)) @ basis * 0.1).reshape(64, 2, 2, 192).transpose(0, 3, 1, 2)), 8
    )
    network = TokenizerNetwork(tiny(), 6, temporal=False)
    start_from_patches(network, pixels.astype("float32").numpy(), rng)
    x = pixels.astype("float32")
    signs = network.encoder.shortcut(F.pixel_unshuffle(x, 8), 64)
    back = F.pixel_shuffle(network.decoder.shortcut(signs, 64), 8)
    np.testing.assert_allclose(back.numpy(), x.numpy(), atol=1e-3)
