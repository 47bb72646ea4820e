"""A plan as one picture: memory of every stage against what there is, where a step's time goes, what is sent."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from ernie5.files import replacing
from ernie5.planning.memory import MILD_SKEW
from ernie5.planning.plan import GB, Plan
from ernie5.planning.report import layout_words, size_words

INK, MUTED, LINE = "#1d2433", "#6b7385", "#dfe3ea"
MEMORY = {
    "parameters": "#2f5fd0",
    "gradients": "#6f9be8",
    "optimizer": "#13806b",
    "activations": "#e0a43b",
    "working": "#c2571a",
}
OTHER = "#b9bfca"  # allocator and libraries
TIME = {
    "compute": ("products", "#2f5fd0"),
    "traffic": ("other operators", "#6f9be8"),
    "overhead": ("dispatch of operators", "#8a3fb5"),
    "communication": ("messages", "#c2571a"),
    "optimizer": ("optimizer", "#13806b"),
    "bubble": ("bubble", "#b9bfca"),
}
STYLE = {
    "font.size": 10,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def draw(plan: Plan, path: str | Path) -> None:
    """Writes the picture to ``path``; its suffix chooses the format (png, svg, pdf). ``ValueError`` for another."""
    path = Path(path)
    kinds = plt.figure().canvas.get_supported_filetypes()
    plt.close()
    if path.suffix[1:].lower() not in kinds:
        raise ValueError(f"{path}: a picture ends with .png, .svg or .pdf, not {path.suffix or 'without a suffix'!r}")
    messages = len(plan.traffic)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            3 if messages else 2,
            1,
            figsize=(11, 6.2 + 0.34 * messages + (0.6 if messages else 0)),
            height_ratios=[4.2, 0.7, *([0.25 + 0.36 * messages] if messages else [])],
            layout="constrained",
        )
        figure.suptitle(
            f"{plan.name}: {plan.layout.world} of {plan.machine.name}\n{layout_words(plan)}", x=0.01, ha="left"
        )
        _draw_memory(axes[0], plan)
        _draw_time(axes[1], plan)
        if messages:
            _draw_messages(axes[2], plan)
        with replacing(path) as temporary:
            figure.savefig(temporary, dpi=130)
        plt.close(figure)


def _draw_memory(axis: Axes, plan: Plan) -> None:
    stages = [stage.stage for stage in plan.stages]
    bottom = [0.0] * len(stages)
    for name, colour in MEMORY.items():
        values = [getattr(stage.memory, name) / GB for stage in plan.stages]
        axis.bar(stages, values, 0.62, bottom, color=colour, label=name)
        bottom = [low + value for low, value in zip(bottom, values, strict=True)]
    others = [plan.needed(stage.memory) - low for stage, low in zip(plan.stages, bottom, strict=True)]
    axis.bar(stages, others, 0.62, bottom, color=OTHER, label="allocator, libraries")
    limit = f"a process may use {plan.limit:,.3g} GB"
    if plan.limit < 3 * max(plan.needed(stage.memory) for stage in plan.stages):
        axis.axhline(plan.limit, color="#b3261e", linewidth=1.4, label=limit)
    else:  # a line so far up would flatten the bars
        axis.plot([], [], color="#b3261e", linewidth=1.4, label=f"{limit} (above)")
    if plan.layout.expert > 1:
        for field, marker, label in (("skewed", "_", f"experts x{MILD_SKEW:g}"), ("worst", "x", "worst expert skew")):
            heights = [plan.needed(getattr(stage, field)) for stage in plan.stages]
            axis.scatter(stages, heights, marker=marker, color=INK, s=46, label=label, zorder=3)
    axis.set_xticks(stages)
    axis.set_xlim(-0.8, len(stages) - 0.2)
    axis.set_xlabel("pipeline stage")
    axis.set_ylabel("GB of a rank")
    axis.set_title("memory", loc="left", fontsize=11)
    axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _draw_time(axis: Axes, plan: Plan) -> None:
    left = 0.0
    for name, (label, colour) in TIME.items():
        value = getattr(plan.time, name)
        if value > 0:
            share = value / plan.time.total
            axis.barh([0], [value], 0.6, left, color=colour, label=f"{label} {share:.0%}" if share >= 0.005 else label)
        left += value
    axis.set_yticks([])
    axis.set_xlim(0, left)
    axis.set_xlabel("seconds")
    axis.set_title(f"one step, {plan.tokens / plan.time.total:,.0f} tokens/s", loc="left", fontsize=11)
    axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _draw_messages(axis: Axes, plan: Plan) -> None:
    traffic = sorted(plan.traffic, key=lambda t: t.seconds)
    names = [f"{t.kind} ({t.link})" for t in traffic]
    longest = max(t.seconds for t in traffic)
    axis.barh(names, [t.exposed for t in traffic], 0.6, color="#c2571a", label="not hidden")
    hidden = [t.seconds - t.exposed for t in traffic]
    axis.barh(names, hidden, 0.6, [t.exposed for t in traffic], color="#eac3ab", label="behind computation")
    for row, t in enumerate(traffic):
        axis.text(t.seconds + 0.01 * longest, row, size_words(t.sent), va="center", color=MUTED, fontsize=9)
    axis.set_xlim(0, 1.14 * longest)
    axis.set_xlabel("seconds")
    axis.set_title(f"messages of a rank of stage {plan.slowest} in one step", loc="left", fontsize=11)
    axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
