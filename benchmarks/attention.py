#!/usr/bin/env python
"""Attention under the masks of packed text, images and videos (next-frame-and-scale prediction), 8 heads of 64.

    python benchmarks/attention.py --json out.json

One row of S positions, forward and all gradients; then forward alone, because torch's flex_attention has no gradient
on CPU. Masks come from the sequence package, as in training; peers get theirs, dense or in blocks, ready made. Memory
is the most a step takes on top of its inputs, masks included. A peer that would not fit in memory is left out.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np  # noqa: E402

from benchmarks import common, peers, worker  # noqa: E402
from benchmarks.common import Contender  # noqa: E402

HEADS, HEAD_DIM = 8, 64
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
MASKS = ("packed text", "NFSP image", "NFSP video")
COMPARED = ("packed text", "NFSP video")  # whose figures count, at LENGTH
LENGTH = 4096
FIGURES = {"speedup_vs_dense_sdpa": min, "memory_vs_dense_sdpa": max, "speedup_vs_best_peer": min}
ALLOWED = 1e-4
DENSE_COPIES = 6  # matrices of heads × S × S that a dense forward and backward keeps at once
MOST_OF_MEMORY = 0.6
BITS = 8
NAMES = ("out", "dq", "dk", "dv")
SEED = 0


# ---------------------------------------------------------------------- masks


class Numbers:
    """A text tokenizer of one id a character."""

    def encode(self, text: str, dropout: float = 0.0, rng: np.random.Generator | None = None) -> list[int]:
        return [16 + ord(character) % 64 for character in text]


def intervals(mask: str, length: int) -> np.ndarray:
    """int32 [1,1,S,4] of one packed row, laid out and packed like a training row."""
    from ernie5.sequence.layout import lay_out
    from ernie5.sequence.packing import collate, pack
    from ernie5.sequence.spec import LayoutSpec

    rng = np.random.default_rng(SEED)
    scales = (1, 2, 3, 4, 6, 8) if mask == "NFSP image" else (1, 2, 3, 4)
    spec = LayoutSpec(length=length, scales=scales, bits=BITS, max_bits=BITS)
    documents, room = [], length
    while room >= 32:
        document = lay_out(_sample(mask, rng, spec, room), Numbers(), spec, training=False)
        documents.append(document)
        room -= len(document)
    return collate([pack(documents, length)])["attention_intervals"]


def _sample(mask: str, rng: np.random.Generator, spec: Any, room: int) -> Any:
    """A text of 64 to 1,024 words, or a prompt and an image, or a prompt and a clip of up to 32 latent frames."""
    from ernie5.sequence.parts import Sample, Text, VisionLatent

    words = int(rng.integers(64, 1024)) if mask == "packed text" else int(rng.integers(8, 24))
    frames = 1 if mask == "NFSP image" else min(32, (room - words - 4) // spec.frame_tokens)
    if mask == "packed text" or words + 4 + frames * spec.frame_tokens > room or frames < 1:
        return Sample([Text("a" * min(words, room - 2))])
    latent = rng.standard_normal((frames, spec.scales[-1], spec.scales[-1], BITS), np.float32)
    return Sample([Text("a" * words), VisionLatent({BITS: latent}, video=mask == "NFSP video")])


def visible(columns: np.ndarray) -> np.ndarray:
    """bool [S,S] of intervals [1,1,S,4]."""
    rows = np.arange(columns.shape[2])[:, None]
    lower_start, lower_end, upper_start, upper_end = np.moveaxis(columns[0, 0], -1, 0)
    return ~(((lower_start <= rows) & (rows < lower_end)) | ((upper_start <= rows) & (rows < upper_end)))


def inputs(length: int) -> list[np.ndarray]:
    """q, k, v and the gradient of the output, float32 [1,S,heads,dim]."""
    rng = np.random.default_rng(SEED)
    return [rng.standard_normal((1, length, HEADS, HEAD_DIM), np.float32) for _ in range(4)]


def reference(mask: str, length: int) -> dict[str, np.ndarray]:
    """Output and gradients in float64, one head after the other."""
    seen = visible(intervals(mask, length))
    arrays = [a[0].astype(np.float64) for a in inputs(length)]
    out = {name: np.zeros((length, HEADS, HEAD_DIM)) for name in NAMES}
    for n in range(HEADS):
        q, k, v, dout = (a[:, n] for a in arrays)
        scores = np.where(seen, q @ k.T * HEAD_DIM**-0.5, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        dweights = dout @ v.T
        dscores = weights * (dweights - (dweights * weights).sum(-1, keepdims=True)) * HEAD_DIM**-0.5
        out["out"][:, n], out["dv"][:, n] = weights @ v, weights.T @ dout
        out["dq"][:, n], out["dk"][:, n] = dscores @ k, dscores.T @ q
    return out


# ---------------------------------------------------------------------- contenders


class _Paddle(worker.Contender):
    """What ours and Paddle's dense attention share."""

    def __init__(self, gradients: bool = True) -> None:
        from ernie5 import environment

        environment.use_cores()
        self.gradients = gradients

    def prepare(self, mask: str, length: int) -> None:
        import paddle

        self.mask = None
        q, k, v, dout = (paddle.to_tensor(a) for a in inputs(length))
        self.tensors, self.dout = [q, k, v], dout
        for tensor in self.tensors:
            tensor.stop_gradient = not self.gradients
        self.before = worker.trimmed_bytes()
        self.mask = self.make_mask(mask, length)

    def make_mask(self, mask: str, length: int) -> Any:
        raise NotImplementedError

    def attend(self) -> Any:
        raise NotImplementedError

    def mask_bytes(self) -> int:
        return max(0, worker.trimmed_bytes() - self.before)

    def step(self) -> None:
        for tensor in self.tensors:
            tensor.clear_gradient(False)
        self.out = self.attend()
        if self.gradients:
            self.out.backward(self.dout)

    def outputs(self) -> dict[str, np.ndarray]:
        found = [self.out, *(tensor.grad for tensor in self.tensors if self.gradients)]
        return {name: tensor.numpy()[0] for name, tensor in zip(NAMES, found, strict=False)}


class Ours(_Paddle):
    """``ernie5.ops.attention.flashmask_attention``."""

    def make_mask(self, mask: str, length: int) -> Any:
        import paddle

        return paddle.to_tensor(intervals(mask, length)), length

    def attend(self) -> Any:
        from ernie5.ops.attention import IntervalMask, flashmask_attention

        return flashmask_attention(*self.tensors, IntervalMask(*self.mask))


class PaddleDense(_Paddle):
    """Paddle's ``scaled_dot_product_attention`` with an additive mask [1,1,S,S]."""

    def make_mask(self, mask: str, length: int) -> Any:
        import paddle

        seen = visible(intervals(mask, length))
        return paddle.to_tensor(np.where(seen, np.float32(0), np.float32(-1e30))[None, None])

    def attend(self) -> Any:
        import paddle.nn.functional as F

        return F.scaled_dot_product_attention(*self.tensors, attn_mask=self.mask)


class Torch(worker.Contender):
    """torch's attention, [1,heads,S,dim] as it likes it: ``sdpa`` with a dense mask, or compiled ``flex``."""

    def __init__(self, form: str, additive: bool = True, gradients: bool = True) -> None:
        import torch

        self.torch, self.form, self.additive, self.gradients = torch, form, additive, gradients
        if form == "flex":
            from torch.nn.attention.flex_attention import flex_attention

            self.flex = torch.compile(flex_attention, dynamic=False)

    def prepare(self, mask: str, length: int) -> None:
        torch = self.torch
        self.mask = None
        *tensors, self.dout = (torch.from_numpy(a).transpose(1, 2).contiguous() for a in inputs(length))
        self.tensors = [tensor.requires_grad_(self.gradients) for tensor in tensors]
        self.before = worker.trimmed_bytes()
        columns = intervals(mask, length)
        self.mask = self._blocks(columns, length) if self.form == "flex" else self._dense(columns)

    def _dense(self, columns: np.ndarray) -> Any:
        seen = self.torch.from_numpy(visible(columns))[None, None]
        if not self.additive:
            return seen
        return self.torch.zeros(seen.shape).masked_fill_(~seen, -1e30)

    def _blocks(self, columns: np.ndarray, length: int) -> Any:
        from torch.nn.attention.flex_attention import create_block_mask

        lts, lte, uts, ute = self.torch.from_numpy(columns[0, 0].astype(np.int64)).unbind(-1)

        def seen(b: Any, h: Any, row: Any, column: Any) -> Any:
            below = (lts[column] <= row) & (row < lte[column])
            return ~(below | ((uts[column] <= row) & (row < ute[column])))

        return create_block_mask(seen, None, None, length, length, device="cpu")

    def mask_bytes(self) -> int:
        return max(0, worker.trimmed_bytes() - self.before)

    def step(self) -> None:
        for tensor in self.tensors:
            tensor.grad = None
        if self.form == "flex":
            self.out = self.flex(*self.tensors, block_mask=self.mask)
        else:
            self.out = self.torch.nn.functional.scaled_dot_product_attention(*self.tensors, attn_mask=self.mask)
        if self.gradients:
            self.out.backward(self.dout)

    def outputs(self) -> dict[str, np.ndarray]:
        found = [self.out.detach(), *(tensor.grad for tensor in self.tensors if self.gradients)]
        return {name: tensor[0].transpose(0, 1).numpy() for name, tensor in zip(NAMES, found, strict=False)}


def contenders(gradients: bool, options: Any) -> list[Contender]:
    same = {"gradients": gradients}
    found = [
        Contender("ours", peers.OURS, Ours, same),
        Contender("Paddle SDPA, dense mask", peers.PADDLENLP, PaddleDense, same),
        Contender("torch SDPA, dense mask", peers.TORCH, Torch, {"form": "sdpa", **same}),
    ]
    if not gradients:
        found.append(Contender("torch flex_attention", peers.TORCH, Torch, {"form": "flex", **same}))
    if options.all:
        boolean = {"form": "sdpa", "additive": False, **same}
        found.append(Contender("torch SDPA, boolean mask", peers.TORCH, Torch, boolean))
    return common.chosen(found, options)


def fits(name: str, length: int) -> bool:
    """Whether a dense step of Paddle, which keeps whole matrices of scores, fits into the memory that is free."""
    lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    copies = DENSE_COPIES * HEADS if name.startswith("Paddle") else 2
    return 4 * copies * length**2 < MOST_OF_MEMORY * free


# ---------------------------------------------------------------------- measurement


def measure(field: common.Field, mask: str, length: int, gradients: bool, report: common.Report) -> None:
    """One mask at one length, by every contender of the field that fits."""
    options = report.options
    away = {name: field.workers.pop(name) for name in list(field.workers) if not fits(name, length)}
    field.failed.clear()
    field.each(lambda w: w.ask("prepare", mask=mask, length=length))
    masks = field.each(lambda w: w.call("mask_bytes"))
    errors = {}
    if length <= options.checked:
        errors = common.check(field, reference(mask, length), lambda name: ALLOWED)
    used = field.each(lambda w: w.ask("memory"))
    times = common.interleave(field, options.rounds)
    seconds = common.medians(times)
    memory = {name: used[name]["peak"] - used[name]["before"] + masks[name] for name in seconds}
    rows = []
    for name in sorted(seconds, key=seconds.get):
        error = f"{errors[name]:.1e}" if name in errors else None
        rows.append((name, seconds[name] * 1e3, common.spread(times[name]), memory[name] / 2**20, error))
    share = visible(intervals(mask, length)).mean()
    what = "forward and gradients" if gradients else "forward"
    columns = ["contender", "median ms", "scatter", "memory MB", "error"]
    report.table(f"{mask}, S = {length} ({share:.0%} of the pairs visible), {what}", columns, rows)
    report.failures(field.failed | dict.fromkeys(away, "would not fit in memory"))
    keep_figures("" if gradients else "forward_", f"_{label(mask)}_{length}", seconds, memory, report)
    field.workers |= away


def label(mask: str) -> str:
    return mask.lower().replace(" ", "_")


def keep_figures(
    prefix: str, suffix: str, seconds: dict[str, float], memory: dict[str, int], report: common.Report
) -> None:
    """Every mask and length under a name of its own."""
    dense = [name for name in seconds if name.startswith("Paddle SDPA")]
    report.speedup(f"{prefix}speedup_vs_dense_sdpa{suffix}", seconds, dense)
    report.speedup(f"{prefix}speedup_vs_best_peer{suffix}", seconds, seconds.keys() - {"ours"})
    if dense and "ours" in memory:
        report.figure(f"{prefix}memory_vs_dense_sdpa{suffix}", memory["ours"] / memory[dense[0]])


def main() -> int:
    parser = common.argument_parser(__doc__, rounds=7)
    parser.add_argument("--lengths", nargs="*", type=int, default=list(LENGTHS))
    parser.add_argument("--masks", nargs="*", default=list(MASKS), choices=list(MASKS))
    parser.add_argument("--checked", type=int, default=2048, help="longest row that is compared with float64")
    parser.add_argument("--backward-only", action="store_true", help="leave out the tables of forward alone")
    options = parser.parse_args()
    report = common.Report("Attention", options)
    for gradients in (True,) if options.backward_only else (True, False):
        with common.Field(contenders(gradients, options), options) as field:
            report.failures(field.failed)
            for length in options.lengths:
                for mask in options.masks:
                    measure(field, mask, length, gradients, report)
    for prefix in ("", "forward_"):
        for name, choose in FIGURES.items():
            parts = [f"{prefix}{name}_{label(mask)}_{LENGTH}" for mask in COMPARED]
            report.merge(prefix + name, parts, choose)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
