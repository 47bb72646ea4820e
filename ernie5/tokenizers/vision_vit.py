"""The semantic teacher: a small ViT that learns to name what it sees from captions (ERNIE 5.0 report §2.2.1, §2.2.2).

Shapes: N frames, P = side*side patches, D = vit_dim, C = CNN channels, V words. Pixels are float32 in [-1, 1].
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import Tensor, nn

from ernie5.config.schema import VisionTokenizerConfig

RAREST = 1 / 400  # share of captions a word must occur in


class VisionTransformer(nn.Layer):
    """Convolutional stem down to the patch grid, position embeddings, pre-norm transformer: -> [N, P, D]."""

    def __init__(self, config: VisionTokenizerConfig):
        super().__init__()
        dim, half = config.vit_dim, max(config.vit_patch // 2, 1)
        self.side = config.image_size // config.vit_patch
        self.stem1 = nn.Conv2D(3, dim // 2, 3, stride=half, padding=1)
        self.norm1 = nn.BatchNorm2D(dim // 2)
        self.stem2 = nn.Conv2D(dim // 2, dim, 3, stride=config.vit_patch // half, padding=1)
        self.norm2 = nn.BatchNorm2D(dim)
        self.stem3 = nn.Conv2D(dim, dim, 3, padding=1)
        self.position = self.create_parameter(
            [1, self.side * self.side, dim], default_initializer=nn.initializer.Normal(0.0, 0.02)
        )
        self.blocks = nn.LayerList([TransformerBlock(dim, config.vit_heads) for _ in range(config.vit_layers)])
        self.summary = Summary(self.side * self.side * dim, dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.stem2(F.relu(self.norm1(self.stem1(pixels))))
        x = x + self.stem3(F.relu(self.norm2(x)))
        x = x.flatten(2).transpose([0, 2, 1])
        x = x + self.position.expand(x.shape)
        for i, block in enumerate(self.blocks):
            x = self.summary(x) if i == len(self.blocks) - 1 else x
            x = block(x)
        return self.norm(x)


class Summary(nn.Layer):
    """Tells every patch what the whole frame shows: x [N, P, D] + MLP of all patches together.

    With position-wise weights this learns shapes from a few thousand pictures; attention alone takes far longer.
    """

    def __init__(self, size: int, dim: int, hidden: int = 128):
        super().__init__()
        self.read, self.write = nn.Linear(size, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        whole = self.write(F.relu(self.read(F.relu(x).flatten(1))))
        return x + whole.unsqueeze(1).expand(x.shape)


class TransformerBlock(nn.Layer):
    """Attention over all patches of a frame, then an MLP of width 4D.

    Heads are cut out of the channel-major layout [N, 3D, P], where no five-way transpose is needed (slow on CPU).
    """

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        n, p, dim = x.shape
        width = dim // self.heads
        q, k, v = self.qkv(self.norm1(x)).transpose([0, 2, 1]).reshape([n, 3, self.heads, width, p]).unbind(1)
        attention = F.softmax(paddle.matmul(q * width**-0.5, k, transpose_x=True), axis=-1)  # [N, heads, P, P]
        mixed = paddle.matmul(v, attention, transpose_y=True).reshape([n, dim, p]).transpose([0, 2, 1])
        x = x + self.out(mixed)
        return x + self.down(F.relu(self.up(self.norm2(x))))


class WordHead(nn.Layer):
    """Scores every word of the captions from the mean of all patches: [N, P, D] -> [N, V]."""

    def __init__(self, config: VisionTokenizerConfig, frequency: np.ndarray):
        """``frequency`` [V]: share of captions holding each word; the scores start there."""
        super().__init__()
        odds = np.log(frequency / (1 - frequency)).astype(np.float32)
        self.scores = nn.Linear(
            config.vit_dim, len(odds), bias_attr=paddle.ParamAttr(initializer=nn.initializer.Assign(odds))
        )

    def forward(self, patches: Tensor) -> Tensor:
        return self.scores(patches.mean(axis=1))


class CaptionWords:
    """Vocabulary of the training captions and their bags of words.

    A word of (nearly) every caption says nothing, and one of fewer than ``RAREST`` of them is not learned in a short
    training; both are left out.
    """

    def __init__(self, captions: Sequence[str], limit: int = 512):
        bags = [set(_words(caption)) for caption in captions]
        counts = Counter(word for bag in bags for word in sorted(bag))
        least = max(2, RAREST * len(bags))
        useful = [(word, count) for word, count in counts.items() if least <= count <= 0.9 * len(bags)]
        useful.sort(key=lambda item: (-item[1], item[0]))
        self.words = [word for word, _ in useful[:limit]]
        index = {word: i for i, word in enumerate(self.words)}
        self.labels = np.zeros([len(bags), len(self.words)], np.float32)  # [captions, V] of 0/1
        for row, bag in enumerate(bags):
            self.labels[row, [index[word] for word in sorted(bag) if word in index]] = 1.0


def word_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """Independent yes/no per word, summed over words and averaged over captions: [N, V] -> scalar."""
    return F.binary_cross_entropy_with_logits(scores, labels, reduction="sum") / scores.shape[0]


def _words(caption: str) -> list[str]:
    return re.findall(r"\w+", caption.lower())
