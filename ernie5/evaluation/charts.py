"""Charts of the report: loss curves per modality and the load of every expert, as inline SVG.

R routers (one a layer, the multi-token-prediction block last), E experts.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

INK, MUTED, LINE = "#1d2433", "#6b7385", "#dfe3ea"
CURVES = {
    "text": ("text (nats a token)", "#2f5fd0"),
    "image": ("image (nats a bit)", "#c2571a"),
    "video": ("video (nats a bit)", "#8a3fb5"),
    "audio": ("audio (nats a code)", "#13806b"),
}
HOTTEST = 4.0  # times its fair share, where the colour scale of the expert map ends
SMOOTH_SHARE = 0.04  # of the curve's length, the window of the thick line
STYLE = {
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "svg.hashsalt": "ernie5",
    "svg.fonttype": "none",
}


def loss_curves(rows: Sequence[dict]) -> str:
    """One panel a modality, as logged (thin) and smoothed (thick). An empty string when nothing was logged."""
    series = {name: _series(rows, f"loss/{name}") for name in CURVES}
    series = {name: points for name, points in series.items() if len(points[0]) > 1}
    if not series:
        return ""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, len(series), figsize=(3.1 * len(series), 2.6), squeeze=False)
        for axis, (name, (steps, losses)) in zip(axes[0], series.items(), strict=True):
            title, colour = CURVES[name]
            axis.plot(steps, losses, color=colour, alpha=0.25, linewidth=0.8)
            axis.plot(steps, smoothed(losses), color=colour, linewidth=1.8)
            axis.set_title(title, loc="left", fontsize=10)
            axis.set_xlabel("step")
            low, high = np.min(losses), np.quantile(losses, 0.98)
            axis.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low) + 1e-6)
        figure.tight_layout()
        return _svg(figure)


def expert_load_map(loads: Mapping[str, np.ndarray], layers: int) -> str:
    """Counts [R, E] by modality -> heat maps side by side of each expert's share times E; 1 is its fair share."""
    shares = {name: load / np.maximum(load.sum(1, keepdims=True), 1) * load.shape[1] for name, load in loads.items()}
    rows = len(next(iter(shares.values())))
    labels = [f"layer {i + 1}" if i < layers else "MTP" for i in range(rows)]
    with plt.rc_context({**STYLE, "axes.grid": False, "axes.spines.left": False, "axes.spines.bottom": False}):
        figure, axes = plt.subplots(
            1, len(shares), figsize=(12.4, 1.0 + 0.3 * rows), squeeze=False, layout="constrained"
        )
        for axis, (name, share) in zip(axes[0], shares.items(), strict=True):
            picture = axis.imshow(share, aspect="auto", cmap="YlGnBu", vmin=0.0, vmax=HOTTEST)
            axis.set_title(name, loc="left", fontsize=10)
            axis.set_xlabel("expert")
            axis.set_yticks(range(rows), labels if axis is axes[0][0] else [""] * rows)
            axis.tick_params(length=0)
        bar = figure.colorbar(picture, ax=list(axes[0]), pad=0.01, extend="max")
        bar.set_label("times fair share")
        return _svg(figure)


def load_entropy(load: np.ndarray) -> np.ndarray:
    """Counts [R, E] -> [R] entropy of the shares over log E: 1 when every expert works equally."""
    share = load / np.maximum(load.sum(axis=1, keepdims=True), 1)
    return -(share * np.log(np.maximum(share, 1e-12))).sum(1) / np.log(load.shape[1])


def smoothed(values: np.ndarray) -> np.ndarray:
    """Centred moving average over ``SMOOTH_SHARE`` of the curve; the window shrinks towards both ends."""
    half = int(SMOOTH_SHARE * len(values) / 2)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    reach = np.minimum(np.minimum(np.arange(len(values)), np.arange(len(values))[::-1]), half)
    low, high = np.arange(len(values)) - reach, np.arange(len(values)) + reach + 1
    return (sums[high] - sums[low]) / (high - low)


def _series(rows: Sequence[dict], key: str) -> tuple[np.ndarray, np.ndarray]:
    points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
    return np.array([p[0] for p in points]), np.array([p[1] for p in points], dtype=float)


def _svg(figure: Figure) -> str:
    """The figure as an SVG element that scales with the page."""
    target = io.StringIO()
    figure.savefig(target, format="svg", metadata={"Date": None})
    plt.close(figure)
    text = target.getvalue()
    return re.sub(
        r'<svg ([^>]*?)width="[^"]*" height="[^"]*"', r'<svg \1class="chart"', text[text.index("<svg") :], count=1
    )
