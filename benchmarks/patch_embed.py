#!/usr/bin/env python
"""Spatiotemporal patch embedding of uint8 clips, forward: normalisation, patches and projection to tokens.

    python benchmarks/patch_embed.py --json out.json

Rivals: a 3-D convolution whose stride is its kernel, and patches copied into a matrix that is multiplied, in Paddle
and in torch. Every contender starts from the same bytes. Floor: the larger of the products of frames that exist at the
machine's best fp32 rate (that of the vectors: a matrix unit may pass it), and the bytes of video, weight and tokens at
its copy rate.
"""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np  # noqa: E402

from benchmarks import common, floor, peers, worker  # noqa: E402
from benchmarks.common import Contender  # noqa: E402

MEAN, STD = [0.48, 0.46, 0.41], [0.27, 0.26, 0.28]
ALLOWED = 1e-5
SEED = 0
CONV, UNFOLD = "conv3d", "unfold + matmul"
RIVALS = {  # figure -> contender it compares with
    "speedup_vs_conv3d": f"Paddle {CONV}",
    "speedup_vs_unfold_matmul": f"Paddle {UNFOLD}",
    "speedup_vs_torch_conv3d": f"torch {CONV}",
    "speedup_vs_torch_unfold_matmul": f"torch {UNFOLD}",
}


@dataclass(frozen=True)
class Case:
    """``clips`` of ``frames`` square frames of ``side`` pixels; patches of pt x p x p pixels become ``width`` numbers.

    ``lead`` missing frames stand before the first, so that frame 0 is alone in its patch where lead = pt-1.
    """

    clips: int
    frames: int
    side: int
    patch: tuple[int, int, int]
    lead: int
    width: int

    @property
    def times(self) -> int:
        return -(-(self.lead + self.frames) // self.patch[0])

    @property
    def grid(self) -> int:
        return self.side // self.patch[1]

    @property
    def depth(self) -> int:
        return int(np.prod(self.patch)) * 3

    @property
    def tokens(self) -> int:
        return self.clips * self.times * self.grid**2

    def floor_seconds(self, rates: dict[str, float]) -> tuple[float, float]:
        """(products, memory)."""
        video = self.clips * self.frames * self.side**2 * 3
        bytes_ = video + 4 * (self.depth * self.width + self.width + self.tokens * self.width)
        return 2 * video * self.width / rates["sgemm"], bytes_ / rates["copy"]

    def __str__(self) -> str:
        patch = "x".join(map(str, self.patch))
        return f"[{self.clips}, {self.frames}, {self.side}, {self.side}, 3], patch {patch}, D {self.width}"


CASES = {
    "clip_512": Case(2, 8, 224, (2, 14, 14), 0, 512),
    "clip_1152": Case(2, 8, 224, (2, 14, 14), 0, 1152),
    "causal_1152": Case(2, 9, 224, (2, 14, 14), 1, 1152),
    "images_1152": Case(4, 1, 224, (1, 14, 14), 0, 1152),
    "tokenizer": Case(256, 1, 32, (1, 4, 4), 0, 48),  # a batch of the vision tokenizer's pictures
}


def inputs(case: Case) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """video [B,T,H,W,3], weight [K,D] and bias [D], the same in every process."""
    rng = np.random.default_rng(SEED)
    video = rng.integers(0, 256, (case.clips, case.frames, case.side, case.side, 3), np.uint8)
    weight = rng.standard_normal((case.depth, case.width), np.float32) / case.depth**0.5
    return video, weight, rng.standard_normal(case.width, np.float32)


def patches(case: Case, values: np.ndarray) -> np.ndarray:
    """Normalised [B,T,H,W,3] -> [tokens, K]."""
    (pt, p, _), times, grid = case.patch, case.times, case.grid
    whole = np.zeros((case.clips, times * pt, *values.shape[2:]), values.dtype)
    whole[:, case.lead : case.lead + case.frames] = values
    whole = whole.reshape(case.clips, times, pt, grid, p, grid, p, 3)
    return whole.transpose(0, 1, 3, 5, 2, 4, 6, 7).reshape(case.tokens, case.depth)


def reference(case: Case) -> dict[str, np.ndarray]:
    """Tokens in float64."""
    video, weight, bias = inputs(case)
    values = (video / 255.0 - np.array(MEAN)) / np.array(STD)
    return {"tokens": patches(case, values) @ weight.astype(np.float64) + bias}


# ---------------------------------------------------------------------- contenders


class _Clips(worker.Contender):
    """``step`` sets ``self.tokens``."""

    tokens: Any

    def outputs(self) -> dict[str, np.ndarray]:
        return {"tokens": self.tokens.numpy().reshape(-1, self.tokens.shape[-1])}


def paddle_on_every_core() -> Any:
    """Paddle under the settings that ``import ernie5`` makes before it."""
    environment = importlib.import_module("ernie5.environment")
    paddle = importlib.import_module("paddle")
    environment.use_cores()
    return paddle


class Ours(_Clips):
    """``ernie5.ops.patch_embed``; with ERNIE5_KERNELS=reference it is Paddle's transpose and matmul."""

    def __init__(self, case: str) -> None:
        paddle = paddle_on_every_core()
        from ernie5.ops.patch_embed import patch_embed

        self.case, self.embed, self.guard = CASES[case], patch_embed, paddle.no_grad
        self.operands = [paddle.to_tensor(array) for array in inputs(self.case)]

    def step(self) -> None:
        with self.guard():
            self.tokens = self.embed(*self.operands, self.case.patch, MEAN, STD, self.case.lead)


class PaddleConv3D(_Clips):
    """Normalise, pad, put channels first, ``conv3d``."""

    def __init__(self, case: str) -> None:
        self.case, self.paddle = CASES[case], paddle_on_every_core()
        paddle = self.paddle
        video, weight, bias = inputs(self.case)
        self.video, self.bias = paddle.to_tensor(video), paddle.to_tensor(bias)
        self.weight = paddle.to_tensor(kernel(self.case, weight))
        self.mean, self.std = paddle.to_tensor(MEAN), paddle.to_tensor(STD)

    def step(self) -> None:
        paddle, case = self.paddle, self.case
        with paddle.no_grad():
            values = (self.video.astype("float32") / 255.0 - self.mean) / self.std
            values = values.transpose([0, 4, 1, 2, 3])
            behind = case.times * case.patch[0] - case.lead - case.frames
            if case.lead or behind:
                values = paddle.nn.functional.pad(values, [0, 0, 0, 0, case.lead, behind], data_format="NCDHW")
            cells = paddle.nn.functional.conv3d(values, self.weight, self.bias, stride=case.patch)
            self.tokens = cells.flatten(2).transpose([0, 2, 1])


class Torch(_Clips):
    """The same on torch, or with patches copied into a matrix (``unfold``)."""

    def __init__(self, case: str, unfold: bool) -> None:
        import torch

        self.case, self.torch, self.unfold = CASES[case], torch, unfold
        video, weight, bias = inputs(self.case)
        self.video, self.bias = torch.from_numpy(video), torch.from_numpy(bias)
        self.weight = torch.from_numpy(weight if unfold else kernel(self.case, weight))
        self.mean, self.std = torch.tensor(MEAN), torch.tensor(STD)

    def step(self) -> None:
        torch, case = self.torch, self.case
        (pt, p, _), grid = case.patch, case.grid
        with torch.inference_mode():
            values = (self.video.float() / 255.0 - self.mean) / self.std
            behind = case.times * pt - case.lead - case.frames
            if case.lead or behind:
                values = torch.nn.functional.pad(values, (0, 0, 0, 0, 0, 0, case.lead, behind))
            if self.unfold:
                cells = values.reshape(case.clips, case.times, pt, grid, p, grid, p, 3)
                matrix = cells.permute(0, 1, 3, 5, 2, 4, 6, 7).reshape(case.tokens, case.depth)
                self.tokens = torch.addmm(self.bias, matrix, self.weight)
            else:
                values = values.permute(0, 4, 1, 2, 3)
                cells = torch.nn.functional.conv3d(values, self.weight, self.bias, stride=case.patch)
                self.tokens = cells.flatten(2).transpose(1, 2).contiguous()


def kernel(case: Case, weight: np.ndarray) -> np.ndarray:
    """Weight [K,D] -> [D,3,pt,p,p], as convolutions take it."""
    return np.ascontiguousarray(weight.reshape(*case.patch, 3, case.width).transpose(4, 3, 0, 1, 2))


def contenders(case: str, options: Any) -> list[Contender]:
    plain = {"ERNIE5_KERNELS": "reference"}
    found = [
        Contender("ours", peers.OURS, Ours, {"case": case}),
        Contender(f"Paddle {CONV}", peers.PADDLENLP, PaddleConv3D, {"case": case}, plain),
        Contender(f"Paddle {UNFOLD}", peers.PADDLENLP, Ours, {"case": case}, plain),
        Contender(f"torch {CONV}", peers.TORCH, Torch, {"case": case, "unfold": False}),
        Contender(f"torch {UNFOLD}", peers.TORCH, Torch, {"case": case, "unfold": True}),
    ]
    return common.chosen(found, options)


# ---------------------------------------------------------------------- measurement


def measure(name: str, options: Any, report: common.Report, rates: dict[str, float]) -> None:
    case = CASES[name]
    with common.Field(contenders(name, options), options) as field:
        errors = common.check(field, reference(case), lambda _: ALLOWED)
        times = common.interleave(field, options.rounds, turn=options.turn)
    seconds = common.medians(times)
    products, memory = case.floor_seconds(rates)
    for figure, rival in RIVALS.items():
        report.speedup(f"{figure}_{name}", seconds, [rival])
    report.ratio(f"fraction_of_floor_{name}", seconds, max(products, memory))
    rows = [(f"floor: the larger of {products * 1e3:.2f} products, {memory * 1e3:.2f} memory",
             max(products, memory) * 1e3, None, None)]  # fmt: skip
    for contender in sorted(seconds, key=seconds.get):
        scatter = common.spread(times[contender])
        rows.append((contender, seconds[contender] * 1e3, scatter, f"{errors[contender]:.1e}"))
    report.table(f"{name}: {case}: ms", ["contender", "median", "scatter", "error"], rows)
    report.failures(field.failed)


def main() -> int:
    parser = common.argument_parser(__doc__, rounds=11)
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--turn", type=int, default=5, help="timed steps a turn, after one that is not timed")
    options = parser.parse_args()
    report = common.Report("Patch embedding of uint8 clips, forward", options)
    rates = floor.measure(options)
    report.table("Machine", ["rate", "value"], floor.rows(rates))
    for name in options.cases:
        measure(name, options, report, rates)
    for name in (*RIVALS, "fraction_of_floor"):
        report.worst(name, options.cases)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
