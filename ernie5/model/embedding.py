"""From batch fields to the first hidden state: text, scale features, merged patches, codec frames, speakers.

Shapes: N features of one kind in the batch, K patches of one token, d bits, Q codec levels, C codebook size, D hidden.
"""

from __future__ import annotations

import paddle
import paddle.nn.functional as F
from paddle import nn

from ernie5.model.configuration import Ernie5Config

LARGEST_K = 16  # patches of one token: 2x2 of an image, 2x2 over 4 frames of a clip


class VisionEmbedding(nn.Layer):
    """Accumulated scale features [N,d] -> [N,D]: a linear map plus a learned scale embedding (VideoAR, arXiv
    2601.05966, eq. 7).

    Codes have norm 1, entries of 1/sqrt(d); they are scaled by sqrt(d) to unit variance first.
    """

    def __init__(self, config: Ernie5Config) -> None:
        super().__init__()
        self.weight = self.create_parameter([config.vision_bits, config.hidden_size])
        self.bias = self.create_parameter([config.hidden_size], is_bias=True)
        self.scales = self.create_parameter([config.vision_num_scales + 1, config.hidden_size])

    def forward(self, features: paddle.Tensor, scale: paddle.Tensor) -> paddle.Tensor:
        spread = features.astype(self.weight.dtype) * features.shape[-1] ** 0.5
        return paddle.matmul(spread, self.weight) + self.bias + F.embedding(scale, self.scales)


class PatchMerger(nn.Layer):
    """Attention over the 2K CNN and ViT patches of one token, then their mean (report §2.2.2).

    ``mask`` [N,K] is 1 where a patch exists, so images (K = 4) and clips (K = 16) share a batch. ``slots`` tell the
    patches of a token apart, above all their frames: attention and mean alone would not see the order of time.
    """

    def __init__(self, config: Ernie5Config) -> None:
        super().__init__()
        dim = config.vision_vit_dim
        self.heads = config.merger_heads
        self.norm_cnn = nn.LayerNorm(config.vision_cnn_dim)
        self.norm_vit = nn.LayerNorm(dim)
        self.cnn = nn.Linear(config.vision_cnn_dim, dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, config.hidden_size)
        self.slots = self.create_parameter([LARGEST_K, dim])

    def forward(self, cnn: paddle.Tensor, vit: paddle.Tensor, mask: paddle.Tensor) -> paddle.Tensor:
        """cnn [N,K,D_cnn], vit [N,K,D_vit], mask [N,K] -> [N,D]."""
        dtype = self.proj.weight.dtype
        slots = self.slots[: cnn.shape[1]]
        cnn = self.cnn(self.norm_cnn(cnn.astype(dtype))) + slots
        patches = paddle.concat([cnn, self.norm_vit(vit.astype(dtype)) + slots], axis=1)
        present = paddle.concat([mask, mask], axis=1).astype(dtype)
        count, width, dim = patches.shape
        qkv = self.qkv(patches).reshape([count, width, 3, self.heads, dim // self.heads]).transpose([2, 0, 3, 1, 4])
        scores = paddle.matmul(qkv[0] * (dim // self.heads) ** -0.5, qkv[1], transpose_y=True)
        scores = scores + (present.reshape([count, 1, 1, width]) - 1.0) * 1.0e30
        merged = paddle.matmul(F.softmax(scores, axis=-1), qkv[2]).transpose([0, 2, 1, 3]).reshape([count, width, dim])
        merged = (patches + self.out(merged)) * present.unsqueeze(-1)
        return self.proj(merged.sum(1) / present.sum(1, keepdim=True))


class AudioEmbedding(nn.Layer):
    """Sum of level-specific code embeddings (report §2.3.2); the same tables feed a frame's codes back by level."""

    def __init__(self, config: Ernie5Config) -> None:
        super().__init__()
        self.levels, self.codebook = config.audio_levels, config.audio_codebook_size
        self.weight = self.create_parameter([self.levels * self.codebook, config.hidden_size])

    def forward(self, codes: paddle.Tensor) -> paddle.Tensor:
        """codes int64 [N,Q] in [0,C) -> [N,D]."""
        offsets = paddle.arange(self.levels, dtype=codes.dtype) * self.codebook
        return F.embedding(codes + offsets, self.weight).sum(1)

    def level(self, codes: paddle.Tensor, level: int) -> paddle.Tensor:
        """Codes [...] of one level -> [..., D]; codes outside [0,C) (no code, end of audio) give zero."""
        known = (codes >= 0) & (codes < self.codebook)
        rows = F.embedding(paddle.where(known, codes, paddle.zeros_like(codes)) + level * self.codebook, self.weight)
        return rows * known.unsqueeze(-1).astype(rows.dtype)


class Embedding(nn.Layer):
    """Text ids everywhere, overwritten where a feature stands."""

    def __init__(self, config: Ernie5Config) -> None:
        super().__init__()
        self.tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.vision = VisionEmbedding(config)
        self.patches = PatchMerger(config)
        self.audio = AudioEmbedding(config)
        self.speaker = nn.Linear(config.speaker_dim, config.hidden_size)

    def forward(self, batch: dict[str, paddle.Tensor]) -> paddle.Tensor:
        """Batch fields (see ``ernie5.sequence.packing``) -> [B,S,D]. Absent or empty feature fields are skipped."""
        hidden = self.tokens(batch["input_ids"])
        shape = hidden.shape
        wide = paddle.float32 if hidden.dtype == paddle.bfloat16 else hidden.dtype
        index, rows = [], []

        def add(at: paddle.Tensor, values: paddle.Tensor) -> None:
            index.append(at)
            rows.append(values.astype(wide))

        if _present(batch, "vision_index"):
            add(batch["vision_index"], self.vision(batch["vision_features"], batch["vision_scale"]))
        if _present(batch, "patch_index"):
            add(batch["patch_index"], self.patches(batch["patch_cnn"], batch["patch_vit"], batch["patch_mask"]))
        if _present(batch, "speaker_index"):
            add(batch["speaker_index"], self.speaker(batch["speaker"].astype(wide)))
        if "audio_codes" in batch:
            codes = batch["audio_codes"].reshape([-1, batch["audio_codes"].shape[-1]])
            at = paddle.nonzero(codes[:, 0] >= 0).flatten()
            if at.shape[0]:
                add(at, self.audio(codes.gather(at)))
        if not index:
            return hidden
        flat = hidden.astype(wide).reshape([-1, shape[-1]])
        return paddle.scatter(flat, paddle.concat(index), paddle.concat(rows)).reshape(shape).astype(hidden.dtype)


def _present(batch: dict[str, paddle.Tensor], name: str) -> bool:
    return name in batch and batch[name].shape[0] > 0
