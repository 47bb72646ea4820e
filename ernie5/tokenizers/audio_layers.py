"""Layers over time that are matrix products: B items, L steps, C channels, always [B, L, C]."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import Tensor, nn


class TimeConv(nn.Layer):
    """Convolution over steps, stride 1, as one matrix product of a step with its neighbours; ends see zeros."""

    def __init__(self, channels_in: int, channels_out: int, kernel: int = 3, dilation: int = 1):
        super().__init__()
        self.kernel, self.dilation = kernel, dilation
        self.linear = nn.Linear(kernel * channels_in, channels_out)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, channels = x.shape
        reach = (self.kernel // 2) * self.dilation
        rows = F.pad(x, [reach, reach], data_format="NLC").reshape([-1, channels])
        windows = paddle.gather(rows, _window_rows(batch, length, self.kernel, self.dilation))
        return self.linear(windows.reshape([batch, length, self.kernel * channels]))


@lru_cache(maxsize=256)
def _window_rows(batch: int, length: int, kernel: int, dilation: int) -> Tensor:
    """int64 [B * L * kernel]: rows of the padded, flattened input that each step's window holds.

    One gather costs a tenth of the slices it replaces, whose gradients Paddle pads back one by one on CPU.
    """
    padded = length + 2 * (kernel // 2) * dilation
    starts = np.arange(batch)[:, None] * padded + np.arange(length)
    return paddle.to_tensor((starts[..., None] + np.arange(kernel) * dilation).reshape(-1))


class ResidualBlock(nn.Layer):
    """x + linear(relu(conv(norm(x))))."""

    def __init__(self, channels: int, dilation: int = 1):
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.mix = TimeConv(channels, channels, 3, dilation)
        self.out = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(F.relu(self.mix(self.norm(x))))


def initialise(layer: nn.Layer, rng: np.random.Generator) -> None:
    """Gives every weight matrix of ``layer`` normal values of variance 1 / fan-in, from ``rng`` alone."""
    for parameter in layer.parameters():
        if parameter.ndim == 2:
            scale = parameter.shape[0] ** -0.5
            parameter.set_value((rng.standard_normal(parameter.shape) * scale).astype(np.float32))
