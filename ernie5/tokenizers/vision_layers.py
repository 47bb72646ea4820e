"""Causal spatio-temporal convolutions whose one-frame case is a 2-D convolution (ERNIE 5.0 report §2.2.1, VideoAR).

Shapes: B clips, T frames, N = B*T frames in a flat batch (clip-major), C channels, H x W pixels of a feature map,
kt temporal taps. Every layer maps ``x [N, C, H, W]`` with ``clips = B``; spatial operations never look across frames.

Time is only ever padded with zeros before the first frame, so a single frame meets the last temporal slice alone. A
``TemporalState`` carries each layer's last frames from one chunk of a clip to the next: chunks give what the whole
clip gives.
"""

from __future__ import annotations

import paddle
import paddle.nn.functional as F
from paddle import Tensor, nn


class TemporalState:
    """What the layers of one network remember between consecutive chunks of the same clips."""

    def __init__(self) -> None:
        self.first = True  # no chunk has been seen yet
        self.past: dict[int, Tensor] = {}  # id of a layer -> its last kt-1 input frames [B, kt-1, C, H, W]


class CausalConv3D(nn.Layer):
    """Convolution over (kt, k, k) with stride 1, zero padding, and no sight of later frames.

    The weight is [kt, out, in, k, k]; slice kt-1 is the current frame's and is what an image sees.
    """

    def __init__(self, channels_in: int, channels_out: int, kernel: int = 3, taps: int = 1):
        super().__init__()
        self.kernel, self.taps = kernel, taps
        bound = (3.0 / (channels_in * kernel * kernel)) ** 0.5
        self.weight = self.create_parameter(
            [taps, channels_out, channels_in, kernel, kernel],
            default_initializer=nn.initializer.Uniform(-bound, bound),
        )
        self.bias = self.create_parameter([channels_out], is_bias=True)

    def forward(self, x: Tensor, clips: int, state: TemporalState | None = None) -> Tensor:
        one_frame = x.shape[0] == clips and state is None
        if self.taps == 1 or one_frame:
            return F.conv2d(x, self.weight[-1], self.bias, padding=self.kernel // 2)
        taps_last = self.weight.transpose([1, 0, 2, 3, 4]).flatten(1, 2)  # [out, kt*in, k, k]
        return F.conv2d(self._with_past(x, clips, state), taps_last, self.bias, padding=self.kernel // 2)

    def _with_past(self, x: Tensor, clips: int, state: TemporalState | None) -> Tensor:
        """Stacks each frame's kt-1 predecessors before it on the channel axis: [N, kt*C, H, W]."""
        frames = x.reshape([clips, -1, *x.shape[1:]])
        length = frames.shape[1]
        past = state.past.get(id(self)) if state is not None else None
        if past is None:
            past = paddle.zeros([clips, self.taps - 1, *x.shape[1:]], dtype=x.dtype)
        frames = paddle.concat([past, frames], axis=1)
        if state is not None:
            state.past[id(self)] = frames[:, length:]
        return paddle.concat([frames[:, i : i + length] for i in range(self.taps)], axis=2).flatten(0, 1)


class TemporalMerge(nn.Layer):
    """Joins frames 0 | 1..r | r+1..2r | ... into latent frames with a linear map; causal, 1 + (T-1)/r out of T.

    The first frame stands alone behind r-1 zero frames. Weight [r, out, in, 1, 1]; slice r-1 is the image's.
    """

    def __init__(self, channels_in: int, channels_out: int, ratio: int):
        super().__init__()
        self.ratio = ratio
        bound = (3.0 / channels_in) ** 0.5
        self.weight = self.create_parameter(
            [ratio, channels_out, channels_in, 1, 1], default_initializer=nn.initializer.Uniform(-bound, bound)
        )
        self.bias = self.create_parameter([channels_out], is_bias=True)

    def forward(self, x: Tensor, clips: int, state: TemporalState | None = None) -> Tensor:
        first = state is None or state.first
        if self.ratio == 1 or (first and x.shape[0] == clips):
            return F.conv2d(x, self.weight[-1], self.bias)
        frames = x.reshape([clips, -1, *x.shape[1:]])
        if first:
            pad = paddle.zeros([clips, self.ratio - 1, *x.shape[1:]], dtype=x.dtype)
            frames = paddle.concat([pad, frames], axis=1)
        stacked = frames.reshape([-1, self.ratio * x.shape[1], *x.shape[2:]])
        return F.conv2d(stacked, self.weight.transpose([1, 0, 2, 3, 4]).flatten(1, 2), self.bias)


class TemporalSplit(nn.Layer):
    """The way back: each latent frame gives r frames, of which the very first latent frame keeps only the last.

    Weight [r, out, in, 1, 1]; slice r-1 is the image's.
    """

    def __init__(self, channels_in: int, channels_out: int, ratio: int):
        super().__init__()
        self.ratio, self.channels_out = ratio, channels_out
        bound = (3.0 / channels_in) ** 0.5
        self.weight = self.create_parameter(
            [ratio, channels_out, channels_in, 1, 1], default_initializer=nn.initializer.Uniform(-bound, bound)
        )
        self.bias = self.create_parameter([channels_out], is_bias=True)

    def forward(self, x: Tensor, clips: int, state: TemporalState | None = None) -> Tensor:
        first = state is None or state.first
        if self.ratio == 1 or (first and x.shape[0] == clips):
            return F.conv2d(x, self.weight[-1], self.bias)
        y = F.conv2d(x, self.weight.flatten(0, 1), self.bias.tile([self.ratio]))
        y = y.reshape([clips, -1, self.channels_out, *x.shape[2:]])
        if first:
            y = y[:, self.ratio - 1 :]
        return y.flatten(0, 1)


class ResidualBlock(nn.Layer):
    """Norm, SiLU, causal 3x3 convolution, SiLU, 1x1 convolution, added to the input.

    The norm's statistics are taken inside one frame only.
    """

    def __init__(self, channels: int, taps: int = 1):
        super().__init__()
        self.norm = frame_norm(channels)
        self.conv1 = CausalConv3D(channels, channels, taps=taps)
        self.conv2 = CausalConv3D(channels, channels, kernel=1)

    def forward(self, x: Tensor, clips: int, state: TemporalState | None = None) -> Tensor:
        y = self.conv1(F.silu(self.norm(x)), clips, state)
        return x + self.conv2(F.silu(y), clips)


def frame_norm(channels: int) -> nn.Layer:
    """Group normalisation of one frame; no statistic crosses time, which causality and chunking need."""
    groups = next(g for g in (8, 4, 2, 1) if channels % g == 0)
    return nn.GroupNorm(groups, channels)


def inflate_weight(weight_2d: Tensor, shape_3d: list[int], split: bool) -> Tensor:
    """[1, out, in, k, k] -> [kt, ...]: the last slice takes the 2-D weights and the others start at zero.

    For a ``TemporalSplit`` every slice takes them: a clip at rest is then decoded as its image, frame by frame.
    """
    taps = shape_3d[0]
    if split:
        return weight_2d.tile([taps, 1, 1, 1, 1])
    if taps == 1:
        return weight_2d
    return paddle.concat([paddle.zeros([taps - 1, *shape_3d[1:]], dtype=weight_2d.dtype), weight_2d])
