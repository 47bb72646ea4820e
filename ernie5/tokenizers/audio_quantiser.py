"""Residual vector quantisation: level q codes what levels 1..q-1 left over.

N vectors, D latent dims, Q levels, C codes a level, P dims of the first level's code space.
Level 1 looks at a learned P-dimensional shadow of the latent, which the semantic teacher shapes, and answers in D dims:
``out_1 = code[argmin |code - z W_in|] W_out``. The other levels take the nearest code to the residual as it is.
Codebooks follow the mean of what they are chosen for (EMA) and are no parameters of the optimiser.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import Tensor, nn

DECAY = 0.98  # of the running means
DEAD = 0.02  # a code whose running count falls under this share of the average is born again
_EPS = 1e-5


@dataclass
class Quantised:
    total: Tensor  # [N, D], sum of the levels; its gradient goes straight through to the latent
    first: Tensor  # [N, D], level 1 alone, likewise
    codes: Tensor  # int64 [N, Q]
    commitment: Tensor  # scalar: mean squared distance of each projected residual to its code


class Codebook(nn.Layer):
    """One level. ``train_with`` moves the codes; ``forward`` only reads them."""

    def __init__(self, latent_dim: int, size: int, code_dim: int | None = None):
        """``code_dim``: dims of a projected code space; None looks at the residual itself."""
        super().__init__()
        self.size = size
        self.project_in = nn.Linear(latent_dim, code_dim) if code_dim else nn.Identity()
        self.project_out = nn.Linear(code_dim, latent_dim) if code_dim else nn.Identity()
        code_dim = code_dim or latent_dim
        self.register_buffer("codes", paddle.zeros([size, code_dim]))
        self.register_buffer("count", paddle.ones([size]))
        self.register_buffer("total", paddle.zeros([size, code_dim]))

    def nearest(self, point: Tensor) -> Tensor:
        """[N, P] -> int64 [N]. The point's own square is the same for every code and left out."""
        bias = 0.5 * (self.codes * self.codes).sum(axis=1)
        return (paddle.matmul(point, self.codes, transpose_y=True) - bias).argmax(axis=1)

    def forward(self, residual: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """[N, D] -> (out [N, D], index [N], commitment scalar, point [N, P])."""
        point = self.project_in(residual)
        index = self.nearest(point.detach())
        chosen = F.embedding(index, self.codes)
        commitment = F.mse_loss(point, chosen.detach())
        straight_through = point + (chosen - point).detach()
        return self.project_out(straight_through), index, commitment, point

    def look_up(self, index: Tensor) -> Tensor:
        """int64 [N] -> [N, D], what ``forward`` returned for it."""
        return self.project_out(F.embedding(index, self.codes))

    @paddle.no_grad()
    def train_with(self, point: Tensor, index: Tensor, rng: np.random.Generator) -> None:
        """Moves the codes to the running mean of the points that chose them, and revives dead ones on points."""
        chosen = F.one_hot(index, self.size)
        self.count.set_value(DECAY * self.count + (1 - DECAY) * chosen.sum(axis=0))
        self.total.set_value(DECAY * self.total + (1 - DECAY) * paddle.matmul(chosen, point, transpose_x=True))
        dead = np.nonzero(self.count.numpy() < DEAD * float(self.count.mean()))[0]
        if len(dead):
            self._place(dead, point.numpy()[rng.integers(len(point), size=len(dead))])
        self.codes.set_value(self.total / (self.count + _EPS).unsqueeze(1))

    def _place(self, rows: np.ndarray, points: np.ndarray) -> None:
        count, total = self.count.numpy().copy(), self.total.numpy().copy()
        count[rows] = count.mean()
        total[rows] = points * count[rows, None]
        self.count.set_value(count)
        self.total.set_value(total)

    @paddle.no_grad()
    def start_from(self, residual: Tensor, rng: np.random.Generator, rounds: int = 10) -> None:
        """k-means on the projected residuals [N, D]; N should be several times the number of codes."""
        points = self.project_in(residual).numpy()
        codes = points[rng.permutation(len(points))[: self.size]]
        codes = np.concatenate([codes, points[rng.integers(len(points), size=self.size - len(codes))]])
        for _ in range(rounds):
            index = (points @ codes.T - 0.5 * (codes**2).sum(1)).argmax(1)
            count = np.bincount(index, minlength=self.size)
            total = np.zeros_like(codes)
            np.add.at(total, index, points)
            empty = count == 0
            codes = np.where(empty[:, None], codes, total / np.maximum(count, 1)[:, None])
            codes[empty] = points[rng.integers(len(points), size=int(empty.sum()))]
        share = np.maximum(count, 1).astype(np.float32) / len(points) * 256
        self.count.set_value(share)
        self.total.set_value((codes * share[:, None]).astype(np.float32))
        self.codes.set_value(codes.astype(np.float32))


class ResidualQuantiser(nn.Layer):
    """Q codebooks in a row."""

    def __init__(self, latent_dim: int, code_dim: int, levels: int, size: int):
        super().__init__()
        others = [Codebook(latent_dim, size) for _ in range(levels - 1)]
        self.levels = nn.LayerList([Codebook(latent_dim, size, code_dim), *others])

    def forward(self, latent: Tensor, kept: Tensor | None = None, rng: np.random.Generator | None = None) -> Quantised:
        """[N, D] -> ``Quantised``. ``kept`` int [N]: levels each vector may use (quantiser dropout); None = all.

        With ``rng`` the codebooks learn from this batch.
        """
        residual, total, first = latent, None, None
        codes, commitment = [], 0.0
        for number, level in enumerate(self.levels):
            out, index, distance, point = level(residual)
            if rng is not None:
                level.train_with(point.detach(), index, rng)
            if kept is not None and number > 0:
                out = out * (kept > number).astype(out.dtype).unsqueeze(1)
            residual = residual - out
            first = out if first is None else first
            total = out if total is None else total + out
            codes.append(index)
            commitment = commitment + distance
        return Quantised(total, first, paddle.stack(codes, axis=1), commitment / len(codes))

    def unquantised(self, latent: Tensor) -> Quantised:
        """What ``forward`` would return with endless codebooks; no codes. For the first steps of training."""
        level = self.levels[0]
        first = level.project_out(level.project_in(latent))
        return Quantised(latent, first, paddle.zeros([latent.shape[0], 0], "int64"), F.mse_loss(first, latent.detach()))

    def look_up(self, codes: Tensor) -> Tensor:
        """int64 [N, Q] -> [N, D], the sum of the levels."""
        return sum(level.look_up(codes[:, q]) for q, level in enumerate(self.levels))

    @paddle.no_grad()
    def start_from(self, latent: Tensor, rng: np.random.Generator) -> None:
        """Initialises level after level by k-means on what the levels before it leave of [N, D]."""
        residual = latent
        for level in self.levels:
            level.start_from(residual, rng)
            residual = residual - level(residual)[0]
