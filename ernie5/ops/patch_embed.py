"""``patch_embed``: frames to tokens; normalisation, gathering of the patches and projection.

Shapes: B clips, T frames of H x W pixels with C channels, patches of pt x ph x pw, K = pt*ph*pw*C values of a patch,
T' x H' x W' patches of a clip, D width of a token.

Time is causal: ``lead`` missing frames stand before the first one, and as many after the last as fill its patch. A
missing frame adds nothing to a token: it is zero after normalisation. With lead = pt-1, the default, frame 0 stands
alone, frames 1..pt, pt+1..2pt, ... follow and T' = 1 + ceil((T-1)/pt), like the latent frames of the vision tokenizer;
an image is a one-frame clip. lead = 0 continues a clip whose earlier frames have been embedded already.
"""

from __future__ import annotations

from collections.abc import Sequence

import paddle

from ernie5.ops import kernels

VIDEO_DTYPES = {paddle.uint8, paddle.float32}  # that the kernel reads


def patch_embed(
    video: paddle.Tensor,
    weight: paddle.Tensor,
    bias: paddle.Tensor,
    patch: tuple[int, int, int],
    mean: Sequence[float],
    std: Sequence[float],
    lead: int | None = None,
) -> paddle.Tensor:
    """video [B,T,H,W,C], weight [K,D] with rows (frame, row, column, channel), bias [D] -> [B, T'*H'*W', D].

    A value v counts as (v/255 - mean)/std if the video is uint8, as (v - mean)/std if it is float; ``mean`` and ``std``
    hold a number a channel. Raises ValueError for frames that patches do not tile, and for no frames.
    """
    lead = patch[0] - 1 if lead is None else lead
    _check(video.shape, weight.shape, bias.shape, patch, mean, std, lead)
    if kernels.serves("patch_embed", weight, bias) and video.dtype in VIDEO_DTYPES:
        wanted = video.dtype == paddle.float32 and not video.stop_gradient
        moments = [float(m) for m in mean], [float(s) for s in std]
        return kernels.call("patch_embed", [video, weight, bias], [list(patch), *moments, lead, wanted])
    return _reference(video, weight, bias, patch, mean, std, lead)


def patch_times(frames: int, patch_frames: int, lead: int) -> int:
    """T -> T'."""
    return -(-(lead + frames) // patch_frames)


def _reference(
    video: paddle.Tensor,
    weight: paddle.Tensor,
    bias: paddle.Tensor,
    patch: tuple[int, int, int],
    mean: Sequence[float],
    std: Sequence[float],
    lead: int,
) -> paddle.Tensor:
    dtype = paddle.float64 if weight.dtype == paddle.float64 else paddle.float32
    clips, frames, height, width, channels = video.shape
    values = video.astype(dtype) / 255.0 if video.dtype == paddle.uint8 else video.astype(dtype)
    values = (values - paddle.to_tensor(mean, dtype=dtype)) / paddle.to_tensor(std, dtype=dtype)
    (pt, ph, pw), times = patch, patch_times(frames, patch[0], lead)
    missing = [[clips, count, height, width, channels] for count in (lead, times * pt - lead - frames)]
    before, after = ([paddle.zeros(shape, dtype=dtype)] if shape[1] else [] for shape in missing)
    values = paddle.concat([*before, values, *after], axis=1)
    values = values.reshape([clips, times, pt, height // ph, ph, width // pw, pw, channels])
    patches = values.transpose([0, 1, 3, 5, 2, 4, 6, 7]).reshape([clips, -1, weight.shape[0]])
    return (paddle.matmul(patches, weight.astype(dtype)) + bias.astype(dtype)).astype(weight.dtype)


def _check(
    video: list[int],
    weight: list[int],
    bias: list[int],
    patch: tuple[int, int, int],
    mean: Sequence[float],
    std: Sequence[float],
    lead: int,
) -> None:
    if len(video) != 5 or video[1] == 0:
        raise ValueError(f"patch_embed: found a video of shape {video}, expected [B, T, H, W, C] with T of 1 or more")
    (pt, ph, pw), (_, _, height, width, channels) = patch, video
    if min(patch) < 1 or (height > 0 and height % ph) or (width > 0 and width % pw):  # -1 in a static graph
        raise ValueError(
            f"patch_embed: found frames of {height} x {width} pixels, expected multiples of the patch {ph} x {pw}; "
            "resize or pad the frames"
        )
    if weight[0] != pt * ph * pw * channels or bias != weight[1:]:
        raise ValueError(
            f"patch_embed: found weight {weight} and bias {bias}, expected [{pt * ph * pw * channels}, D] and [D] for "
            f"patches {tuple(patch)} of {channels} channels"
        )
    if not 0 <= lead < pt:
        raise ValueError(f"patch_embed: found {lead} missing frames in front, expected 0 to {pt - 1}")
    if len(mean) != channels or len(std) != channels:
        raise ValueError(f"patch_embed: found {len(mean)} means and {len(std)} deviations for {channels} channels")
