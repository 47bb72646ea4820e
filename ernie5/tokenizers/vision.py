"""The vision tokenizer as the rest of the house sees it: numpy frames in, numpy latents, features and frames out.

Shapes: B clips or images, T raw frames (1 = image), T' = 1 + (T-1)/tau latent frames, h x w latent grid, d bits;
N merged tokens of K patches, D_cnn = channels, D_vit = vit_dim. Frames are uint8 [B, T, H, W, 3] (or [B, H, W, 3]).
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import paddle
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from ernie5.config.schema import VisionTokenizerConfig
from ernie5.files import read_versioned_json, replacing_folder, write_json
from ernie5.tokenizers.scales import ScalePyramid
from ernie5.tokenizers.vision_layers import TemporalState
from ernie5.tokenizers.vision_network import PATCH, TokenizerNetwork
from ernie5.tokenizers.vision_training import to_pixels, train_series, train_teacher
from ernie5.tokenizers.vision_vit import VisionTransformer

FORMAT_VERSION = 1
REMEDY = "train it anew with tools/train_tokenizer.py vision"
MERGE = 2  # patches a side of one understanding token
MERGED_FRAMES = 4  # frames of one understanding token of a video
BATCH_FRAMES = 256  # frames computed at once


class VisionTokenizer:
    """A series of tokenizers with growing bit count, and the features of the understanding path."""

    def __init__(self, config: VisionTokenizerConfig):
        check_config(config)
        self.config = config
        self.pyramid = ScalePyramid(config.scales)
        self.members = {bits: TokenizerNetwork(config, bits, temporal=True) for bits in config.bits}
        self.teacher = VisionTransformer(config)
        self.cnn_scale = np.ones([2, config.channels], np.float32)  # mean and deviation that ``features`` removes
        self.vit_scale = np.ones([2, config.vit_dim], np.float32)
        self.cnn_scale[0], self.vit_scale[0] = 0, 0
        self._eval()

    @property
    def bits_series(self) -> list[int]:
        return list(self.config.bits)

    @classmethod
    def train(
        cls,
        config: VisionTokenizerConfig,
        images: np.ndarray,
        captions: Sequence[str],
        clips: np.ndarray,
        progress: bool = True,
    ) -> VisionTokenizer:
        """images uint8 [N, H, W, 3] with their captions; clips uint8 [M, frames, H, W, 3], M may be 0.

        Deterministic in ``config.seed``. Raises ValueError for arrays that do not fit the configuration.
        """
        check_config(config)
        images, clips = np.asarray(images), np.asarray(clips)
        _check_material(config, images, captions, clips)
        paddle.seed(config.seed)
        result = cls(config)
        result.teacher = train_teacher(config, images, captions, progress)
        result.members = train_series(config, result.teacher, images, clips, progress)
        result._eval()
        result._measure_scales(images[:1024])
        return result

    def num_latent_frames(self, frames: int) -> int:
        """T -> T'. Raises ValueError unless T = 1 + m * temporal_stride."""
        stride = self.config.temporal_stride
        if frames < 1 or (frames - 1) % stride:
            raise ValueError(
                f"video: found {frames} frames, expected 1 + a multiple of {stride}, such as {1 + stride} or "
                f"{1 + 2 * stride}; cut or extend the clip"
            )
        return 1 + (frames - 1) // stride

    def num_frames(self, latent_frames: int) -> int:
        """T' -> T."""
        return 1 + (latent_frames - 1) * self.config.temporal_stride

    def encode(self, frames: np.ndarray, bits: int, chunk: int | None = None) -> np.ndarray:
        """Continuous latent before quantisation, float32 [B, T', h, w, d].

        ``chunk`` raw frames (a multiple of the temporal stride) are held at once; the result is the same.
        """
        frames = self._checked(frames)
        length = frames.shape[1]
        self.num_latent_frames(length)
        pieces = [frames] if chunk is None else [frames[:, a:b] for a, b in self._chunks(length, chunk)]
        rows = self._row_batches(len(frames), pieces[0].shape[1])
        return np.concatenate(
            [np.concatenate(list(self.encode_stream((p[r] for p in pieces), bits)), axis=1) for r in rows]
        )

    def encode_stream(self, chunks: Iterator[np.ndarray], bits: int) -> Iterator[np.ndarray]:
        """Encodes consecutive chunks of the same clips, uint8 [B, T_i, H, W, 3], and yields their latents.

        The first chunk has 1 + a multiple of the temporal stride frames, every later one a multiple of it. Only the
        last frames of each layer's input are remembered in between.
        """
        network, state = self._member(bits), TemporalState()
        for chunk in chunks:
            chunk = self._checked(chunk)
            clips, length = chunk.shape[:2]
            self.num_latent_frames(length if state.first else length + 1)
            with paddle.no_grad():
                latent = network.encoder(to_pixels(chunk), clips, state).numpy()
            state.first = False
            latent = latent.transpose(0, 2, 3, 1)
            yield np.ascontiguousarray(latent.reshape(clips, -1, *latent.shape[1:]))

    def decode(self, quantised: np.ndarray, bits: int) -> np.ndarray:
        """Accumulated codes float32 [B, T', h, w, d] -> frames uint8 [B, T, H, W, 3]."""
        quantised = np.asarray(quantised, np.float32)
        side = self.config.scales[-1]
        if quantised.ndim != 5 or quantised.shape[2:] != (side, side, bits):
            raise ValueError(
                f"decode: found an array of shape {list(quantised.shape)}, expected [B, T', {side}, {side}, {bits}]"
            )
        network = self._member(bits)
        result = []
        for rows in self._row_batches(len(quantised), self.num_frames(quantised.shape[1])):
            part = quantised[rows]
            flat = np.ascontiguousarray(part.reshape(-1, *part.shape[2:]).transpose(0, 3, 1, 2))
            with paddle.no_grad():
                pixels = network.decoder(paddle.to_tensor(flat), len(part)).numpy()
            drawn = np.clip(np.rint((pixels + 1) * 127.5), 0, 255).astype(np.uint8).transpose(0, 2, 3, 1)
            result.append(drawn.reshape(len(part), -1, *drawn.shape[1:]))
        return np.concatenate(result)

    def quantise(self, latent: np.ndarray) -> np.ndarray:
        """Latent [B, T', h, w, d] -> sum of all its scales, same shape; what a faithful backbone would hand back."""
        flat = latent.reshape(*latent.shape[:2], -1, latent.shape[-1])
        return self.pyramid.decompose(flat).total.reshape(latent.shape)

    def reconstruct(self, frames: np.ndarray, bits: int) -> np.ndarray:
        """Frames -> codes -> frames, uint8 [B, T, H, W, 3]."""
        return self.decode(self.quantise(self.encode(frames, bits)), bits)

    def features(self, frames: np.ndarray) -> tuple[np.ndarray, np.ndarray, tuple[int, int, int]]:
        """Features before any bottleneck (report §2.2.2): cnn [B, N, K, D_cnn], vit [B, N, K, D_vit], grid.

        Each frame is embedded alone. K = 4 (2x2 patches) for an image; K = 16 (2x2 patches of 4 neighbouring frames,
        the last frame repeated to fill) for a video. Tokens run over (T'', h'', w'') = grid, patches over (t, y, x).
        """
        frames = self._checked(frames)
        clips, length = frames.shape[:2]
        group = 1 if length == 1 else MERGED_FRAMES
        cnn, vit = self._frame_features(frames.reshape(-1, *frames.shape[2:]))
        merged = [_merge(x.reshape(clips, length, *x.shape[1:]), group) for x in (cnn, vit)]
        side = self.teacher.side // MERGE
        return merged[0], merged[1], (-(-length // group), side, side)

    def save(self, folder: str | os.PathLike) -> None:
        """Writes config.json and weights.safetensors; an existing folder is replaced when all is written."""
        weights = {name: np.ascontiguousarray(value) for name, value in self._weights().items()}
        with replacing_folder(folder) as temporary:
            save_file(weights, str(temporary / "weights.safetensors"))
            write_json(
                temporary / "config.json", {"format_version": FORMAT_VERSION, "config": dataclasses.asdict(self.config)}
            )

    @classmethod
    def load(cls, folder: str | os.PathLike) -> VisionTokenizer:
        """Raises ValueError in one line for a missing, corrupt or differently shaped checkpoint."""
        folder = Path(folder)
        header = read_versioned_json(folder / "config.json", FORMAT_VERSION, "vision tokenizer", REMEDY)
        try:
            result = cls(VisionTokenizerConfig(**header["config"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{folder / 'config.json'}: not a vision tokenizer's configuration ({error}); {REMEDY}"
            ) from None
        path = folder / "weights.safetensors"
        try:
            weights = load_file(str(path))
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path}: unreadable weights ({error}); {REMEDY}") from None
        result._set_weights(weights, path)
        return result

    def _weights(self) -> dict[str, np.ndarray]:
        weights = {"cnn_scale": self.cnn_scale, "vit_scale": self.vit_scale}
        for prefix, layer in self._layers().items():
            weights.update({f"{prefix}.{name}": value.numpy() for name, value in layer.state_dict().items()})
        return weights

    def _set_weights(self, weights: dict[str, np.ndarray], path: Path) -> None:
        wanted = {name: value.shape for name, value in self._weights().items()}
        found = {name: value.shape for name, value in weights.items()}
        wrong = next((name for name in sorted({*wanted, *found}) if wanted.get(name) != found.get(name)), None)
        if wrong is not None:
            expected, got = (list(s[wrong]) if wrong in s else "nothing" for s in (wanted, found))
            raise ValueError(f"{path}: {wrong} is {got}, config.json says {expected}; {REMEDY}")
        for prefix, layer in self._layers().items():
            layer.set_state_dict({name: weights[f"{prefix}.{name}"] for name in layer.state_dict()})
        self.cnn_scale, self.vit_scale = weights["cnn_scale"], weights["vit_scale"]

    def _layers(self) -> dict[str, paddle.nn.Layer]:
        return {"teacher": self.teacher, **{f"member_{bits}": net for bits, net in self.members.items()}}

    def _eval(self) -> None:
        for layer in self._layers().values():
            layer.eval()

    def _member(self, bits: int) -> TokenizerNetwork:
        if bits not in self.members:
            raise ValueError(f"bits: found {bits}, this tokenizer has members with {self.bits_series} bits")
        return self.members[bits]

    def _frame_features(self, frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """uint8 [N, H, W, 3] -> standardised cnn [N, g, g, C] and vit [N, g, g, D] on the patch grid."""
        encoder, side = self.members[self.config.bits[-1]].encoder, self.teacher.side
        cnn, vit = [], []
        for start in range(0, len(frames), BATCH_FRAMES):
            pixels = to_pixels(frames[start : start + BATCH_FRAMES])
            with paddle.no_grad():
                cnn.append(encoder.features(pixels).numpy().transpose(0, 2, 3, 1))
                vit.append(self.teacher(pixels).numpy().reshape(len(pixels), side, side, -1))
        scales = (self.cnn_scale, self.vit_scale)
        return tuple((np.concatenate(x) - s[0]) / s[1] for x, s in zip((cnn, vit), scales, strict=True))

    def _measure_scales(self, images: np.ndarray) -> None:
        """Sets each channel's mean and deviation over the patches of some training images."""
        cnn, vit = self._frame_features(images)
        self.cnn_scale = np.stack([cnn.mean((0, 1, 2)), cnn.std((0, 1, 2)) + 1e-4]).astype(np.float32)
        self.vit_scale = np.stack([vit.mean((0, 1, 2)), vit.std((0, 1, 2)) + 1e-4]).astype(np.float32)

    def _checked(self, frames: np.ndarray) -> np.ndarray:
        frames = np.asarray(frames)
        frames = frames[:, None] if frames.ndim == 4 else frames
        size = self.config.image_size
        if frames.dtype != np.uint8 or frames.ndim != 5 or frames.shape[2:] != (size, size, 3) or not frames.size:
            raise ValueError(
                f"frames: found {frames.dtype} of shape {list(frames.shape)}, expected uint8 "
                f"[B, T, {size}, {size}, 3]; resize pictures to the tokenizer's image_size first"
            )
        return frames

    def _chunks(self, length: int, chunk: int) -> list[tuple[int, int]]:
        """The first frame and as many strides as fit into ``chunk`` frames, then ``chunk`` frames each."""
        stride = self.config.temporal_stride
        if chunk < stride or chunk % stride:
            raise ValueError(f"chunk: found {chunk} frames, expected a multiple of the temporal stride {stride}")
        edges = [0, *range(1 + chunk - stride, length, chunk), length]
        return list(pairwise(edges))

    def _row_batches(self, rows: int, frames: int) -> list[slice]:
        step = max(BATCH_FRAMES // frames, 1)
        return [slice(a, a + step) for a in range(0, rows, step)]


def check_config(config: VisionTokenizerConfig) -> None:
    """Raises ValueError, naming the key, for a shape the network cannot have."""
    grid = config.image_size // max(config.spatial_stride, 1)
    faults = [
        (config.spatial_stride != 2 * PATCH, f"spatial_stride is {config.spatial_stride}, expected {2 * PATCH}"),
        (
            config.vit_patch != PATCH,
            f"vit_patch is {config.vit_patch}, expected {PATCH}, the CNN features' stride",
        ),
        (
            config.image_size % (2 * PATCH) or config.scales[-1:] != [grid],
            f"scales end in {config.scales[-1:]}, expected image_size/spatial_stride = {grid}",
        ),
        (
            (config.frames - 1) % max(config.temporal_stride, 1),
            f"frames is {config.frames}, expected 1 + a multiple of temporal_stride {config.temporal_stride}",
        ),
        (
            not config.bits or sorted(set(config.bits)) != list(config.bits) or config.bits[0] < 1,
            f"bits is {config.bits}, expected a growing series such as [8, 16]",
        ),
        (
            config.vit_dim % config.vit_heads,
            f"vit_dim is {config.vit_dim}, no multiple of vit_heads {config.vit_heads}",
        ),
    ]
    for wrong, message in faults:
        if wrong:
            raise ValueError(f"tokenizers.vision.{message}")


def _check_material(
    config: VisionTokenizerConfig, images: np.ndarray, captions: Sequence[str], clips: np.ndarray
) -> None:
    size = config.image_size
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != (size, size, 3) or not len(images):
        raise ValueError(
            f"images: found {images.dtype} {list(images.shape)}, expected uint8 [N, {size}, {size}, 3], N > 0"
        )
    if len(captions) != len(images):
        raise ValueError(f"captions: found {len(captions)} for {len(images)} images, expected one each")
    if clips.size and (clips.dtype != np.uint8 or clips.shape[1:] != (config.frames, size, size, 3)):
        raise ValueError(
            f"clips: found {clips.dtype} {list(clips.shape)}, expected uint8 [M, {config.frames}, {size}, {size}, 3]"
        )


def _merge(x: np.ndarray, group: int) -> np.ndarray:
    """[B, T, g, g, D] -> [B, N, K, D]: 2x2 patches of ``group`` frames a token, the last frame repeated to fill."""
    clips, length, side, _, dim = x.shape
    missing = -length % group
    if missing:
        x = np.concatenate([x, np.repeat(x[:, -1:], missing, axis=1)], axis=1)
    x = x.reshape(clips, -1, group, side // MERGE, MERGE, side // MERGE, MERGE, dim).transpose(0, 1, 3, 5, 2, 4, 6, 7)
    return np.ascontiguousarray(x.reshape(clips, -1, group * MERGE * MERGE, dim))
