"""Encoder and decoder of the vision tokenizer: most arithmetic sits at 1/4 and 1/8 resolution, time only at 1/8.

Shapes: B clips, T frames, T' latent frames = 1 + (T-1)/tau, N = B*T flat frames, C = channels, W = 2C, d bits;
grids for 32-pixel images: 8x8 at stride 4, 4x4 at stride 8. Pixels are float32 in [-1, 1].
"""

from __future__ import annotations

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import Tensor, nn

from ernie5.config.schema import VisionTokenizerConfig
from ernie5.tokenizers.vision_layers import (
    CausalConv3D,
    ResidualBlock,
    TemporalMerge,
    TemporalSplit,
    TemporalState,
    frame_norm,
    inflate_weight,
)

PATCH = 4  # pixels a side of the stem's patch; features live at this stride
SPLITS = ("decoder.split.weight", "decoder.shortcut.weight")
TAPS = 3  # temporal taps of an inflated convolution


class Encoder(nn.Layer):
    """Pixels [N, 3, H, W] -> latent [B*T', d, H/8, W/8]."""

    def __init__(self, config: VisionTokenizerConfig, bits: int, temporal: bool):
        super().__init__()
        channels, wide = config.channels, 2 * config.channels
        taps, ratio = (TAPS, config.temporal_stride) if temporal else (1, 1)
        self.stem = CausalConv3D(3 * PATCH * PATCH, channels)
        self.fine = ResidualBlock(channels)
        self.merge = TemporalMerge(channels * 4, wide, ratio)
        self.shortcut = TemporalMerge(12 * PATCH * PATCH, bits, ratio)
        self.coarse = ResidualBlock(wide, taps)
        self.norm = frame_norm(wide)
        self.to_bits = CausalConv3D(wide, bits, kernel=1)
        self.amplitude = bits**-0.5  # of one channel of a code

    def features(self, pixels: Tensor) -> Tensor:
        """CNN features of single frames before the bottleneck: [N, C, H/4, W/4] (report §2.2.2)."""
        x = self.stem(F.pixel_unshuffle(pixels, PATCH), pixels.shape[0])
        return self.fine(x, pixels.shape[0])

    def bottleneck(self, fine: Tensor, pixels: Tensor, clips: int, state: TemporalState | None = None) -> Tensor:
        """Features [N, C, H/4, W/4] and their pixels -> latent [B*T', d, H/8, W/8]."""
        x = self.merge(F.pixel_unshuffle(fine, 2), clips, state)
        x = self.coarse(x, clips, state)
        latent = self.to_bits(F.silu(self.norm(x)), clips)
        latent = latent + self.shortcut(F.pixel_unshuffle(pixels, 2 * PATCH), clips, state)
        return latent * self.amplitude

    def forward(self, pixels: Tensor, clips: int, state: TemporalState | None = None) -> Tensor:
        return self.bottleneck(self.features(pixels), pixels, clips, state)


class Decoder(nn.Layer):
    """Quantised latent [B*T', d, h, w] -> pixels [N, 3, 8h, 8w], not clipped."""

    def __init__(self, config: VisionTokenizerConfig, bits: int, temporal: bool):
        super().__init__()
        channels, wide = config.channels, 2 * config.channels
        taps, ratio = (TAPS, config.temporal_stride) if temporal else (1, 1)
        self.from_bits = CausalConv3D(bits, wide)
        self.amplitude = bits**-0.5
        self.coarse = nn.LayerList([ResidualBlock(wide, taps) for _ in range(2)])
        self.split = TemporalSplit(wide, channels * 4, ratio)
        self.shortcut = TemporalSplit(bits, 12 * PATCH * PATCH, ratio)
        self.fine = ResidualBlock(channels)
        self.norm = frame_norm(channels)
        self.expand = CausalConv3D(channels, 16 * 4)  # 16 channels at stride 2
        self.paint = CausalConv3D(16, 3 * 4)

    def forward(self, latent: Tensor, clips: int, state: TemporalState | None = None) -> Tensor:
        signs = latent * (1 / self.amplitude)
        x = self.from_bits(signs, clips)
        for block in self.coarse:
            x = block(x, clips, state)
        x = F.pixel_shuffle(self.split(x, clips, state), 2)
        frames = x.shape[0]
        x = self.fine(x, frames)
        x = F.silu(F.pixel_shuffle(self.expand(F.silu(self.norm(x)), frames), 2))
        flat = F.pixel_shuffle(self.shortcut(signs, clips, state), 2 * PATCH)
        return flat + F.pixel_shuffle(self.paint(x, frames), 2)


class TokenizerNetwork(nn.Layer):
    """One member of the series: encoder and decoder around ``bits`` channels, 2-D or causal 3-D (``temporal``)."""

    def __init__(self, config: VisionTokenizerConfig, bits: int, temporal: bool):
        super().__init__()
        self.config, self.bits, self.temporal = config, bits, temporal
        self.encoder = Encoder(config, bits, temporal)
        self.decoder = Decoder(config, bits, temporal)


def start_from_patches(network: TokenizerNetwork, pixels: np.ndarray, rng: np.random.Generator) -> None:
    """Sets both shortcuts from the principal components of 8x8-pixel patches, so that training starts from a codec.

    ``pixels`` float32 [M, 3, H, W] in [-1, 1]. The last layers before both sums start small.
    """
    encoder, decoder = network.encoder, network.decoder
    patches = _patches(pixels)
    mean = patches.mean(axis=0)
    into, out = _principal_components(patches - mean, network.bits, rng)
    for layer, weight, bias in ((encoder.shortcut, into, -into @ mean), (decoder.shortcut, out, mean)):
        layer.weight.set_value(weight.astype(np.float32)[None, :, :, None, None])
        layer.bias.set_value(bias.astype(np.float32))
    for layer in (encoder.to_bits, decoder.paint):
        layer.weight.set_value(layer.weight * 0.1)


def _patches(pixels: np.ndarray) -> np.ndarray:
    """[M, 3, H, W] -> float64 [M*h*w, 192], in the order of the shortcuts' channels."""
    patches = F.pixel_unshuffle(paddle.to_tensor(pixels), 2 * PATCH).numpy().transpose(0, 2, 3, 1)
    return patches.reshape(-1, patches.shape[-1]).astype(np.float64)


def _principal_components(centred: np.ndarray, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Into [count, 192] and out of [192, count] the leading components of patches, for ``count`` bits of equal share.

    The components' spread is halved on a log scale and a random rotation mixes them, so that every bit carries as much
    (as in iterative quantisation, Gong & Lazebnik 2011). What comes in has unit variance on average.
    """
    variance, vectors = np.linalg.eigh(np.cov(centred, rowvar=False))
    variance, vectors = np.maximum(variance[::-1][:count], 1e-4), vectors[:, ::-1][:, :count]
    gain = variance**-0.25 / np.sqrt(np.sqrt(variance).mean())
    rotation = np.linalg.qr(rng.normal(size=(count, count)))[0]
    return rotation * gain @ vectors.T, vectors / gain @ rotation.T


def inflate(network: TokenizerNetwork) -> TokenizerNetwork:
    """The causal 3-D network that gives an image exactly what this 2-D one does (VideoAR's inflation rule)."""
    assert not network.temporal, "the network is inflated already"
    result = TokenizerNetwork(network.config, network.bits, temporal=True)
    flat = network.state_dict()
    state = {
        name: inflate_weight(flat[name], value.shape, name in SPLITS) if value.ndim == 5 else flat[name]
        for name, value in result.state_dict().items()
    }
    result.set_state_dict(state)
    return result


def widen(
    network: TokenizerNetwork, bits: int, pixels: np.ndarray, lost: np.ndarray, rng: np.random.Generator
) -> TokenizerNetwork:
    """The next member of the series: more bits, the shared slice kept.

    Both projections work in units of a code's amplitude 1/sqrt(d), so the old rows and columns are copied as they are
    and the old bits stay what they were. The new bits look at ``pixels`` [M, 3, H, W] along the principal components
    of what the narrower member has ``lost`` of them. New decoder columns start at zero: at first the wider member
    decodes exactly what the narrower one does.
    """
    assert bits > network.bits, f"{bits} bits do not widen {network.bits}"
    result = TokenizerNetwork(network.config, bits, network.temporal)
    fresh, state = result.state_dict(), network.state_dict()
    old = network.bits
    into, _ = _principal_components(_patches(lost), bits - old, rng)
    patches = _patches(pixels)
    into = into / (patches @ into.T).std(axis=0)[:, None]
    for name in ("encoder.to_bits", "encoder.shortcut"):
        for part, axis in ((f"{name}.weight", 1), (f"{name}.bias", 0)):
            added = paddle.split(fresh[part], [old, bits - old], axis=axis)[1]
            state[part] = paddle.concat([state[part], 0.1 * added], axis=axis)
    for part in ("decoder.from_bits.weight", "decoder.shortcut.weight"):
        added = paddle.split(fresh[part], [old, bits - old], axis=2)[1]
        state[part] = paddle.concat([state[part], paddle.zeros_like(added)], axis=2)
    shortcut = state["encoder.shortcut.weight"].numpy()
    shortcut[:-1, old:], shortcut[-1, old:, :, 0, 0] = 0, into
    bias = state["encoder.shortcut.bias"].numpy()
    bias[old:] = -into @ patches.mean(axis=0)
    state["encoder.shortcut.weight"], state["encoder.shortcut.bias"] = (
        paddle.to_tensor(shortcut),
        paddle.to_tensor(bias),
    )
    result.set_state_dict(state)
    return result
