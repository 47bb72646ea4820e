"""What a step and an interval of steps measured: losses by modality, tokens, expert load.

Shapes: R routers (one a layer, the MTP block's last), E experts.
"""

from __future__ import annotations

import time
from collections import defaultdict

import numpy as np


def load_metrics(load: np.ndarray) -> dict[str, np.ndarray]:
    """Token counts [R,E] -> per router [R]: max / mean load, entropy / log E (report Figure 10), experts with no token.

    A router that saw no token has max / mean 0 and entropy 0.
    """
    load = load.astype(np.float64)
    total = load.sum(-1, keepdims=True)
    share = load / np.maximum(total, 1.0)
    entropy = -(share * np.log(np.where(share > 0, share, 1.0))).sum(-1) / np.log(load.shape[-1])
    return {
        "max_over_mean": share.max(-1) * load.shape[-1],
        "normalised_entropy": entropy,
        "dead_experts": (load == 0).sum(-1),
    }


class StepMeter:
    """Collects the micro-batches of one step: their shares of the step's losses, which add up, and tokens."""

    def __init__(self) -> None:
        self.losses: dict[str, float] = defaultdict(float)
        self.tokens = 0
        self.rows: list[int] = []
        self.started = time.perf_counter()

    def add(self, losses: dict[str, float], tokens: int, rows: list[int]) -> None:
        for name, value in losses.items():
            self.losses[name] += value
        self.tokens += tokens
        self.rows += rows

    def finish(self) -> dict[str, float]:
        """The record of the step, and a fresh start."""
        record = dict(self.losses)
        elapsed = time.perf_counter() - self.started
        record |= {"tokens": self.tokens, "tokens_per_second": round(self.tokens / elapsed, 1)}
        self.__init__()
        return record


class IntervalMeter:
    """Means over the steps since the last log, and the expert load summed over them."""

    def __init__(self) -> None:
        self.records: list[dict] = []
        self.load: np.ndarray | None = None

    def add_load(self, load: np.ndarray) -> None:
        self.load = load if self.load is None else self.load + load

    def finish(self) -> tuple[dict[str, float], np.ndarray | None]:
        """``interval_means`` of the interval and its summed load, and a fresh start."""
        means = interval_means(self.records)
        load = self.load
        self.__init__()
        return means, load


def interval_means(records: list[dict]) -> dict[str, float]:
    """Mean of every figure over the records that have it; the last value of the schedules; tokens over their time."""
    names = {name for record in records for name in record if name != "step"}
    columns = {name: [record[name] for record in records if name in record] for name in sorted(names)}
    means = {name: sum(values) / len(values) for name, values in columns.items()}
    for name in ("learning_rate", "rows_consumed", "accumulation", "vision_bits"):
        if name in columns:
            means[name] = columns[name][-1]
    if "tokens_per_second" in columns:
        seconds = sum(r["tokens"] / r["tokens_per_second"] for r in records if r["tokens_per_second"] > 0)
        means["tokens_per_second"] = sum(columns["tokens"]) / seconds if seconds > 0 else 0.0
    return means
