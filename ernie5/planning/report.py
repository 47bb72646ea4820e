"""A plan, and what a search found, as tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from ernie5.config import num_params
from ernie5.planning.layout import micro_batches
from ernie5.planning.memory import MILD_SKEW, RankMemory
from ernie5.planning.plan import BUSY, GB, Plan, StagePlan
from ernie5.planning.search import Found, overrides

COLUMNS = ("parameters", "gradients", "optimizer", "activations", "working")


def plan_text(plan: Plan) -> str:
    """The whole plan: what is trained on what, memory of every stage, messages, the step, and the verdict."""
    sections = (_head(plan), _memory(plan), _messages(plan), _step(plan), _verdict(plan))
    return "\n\n".join(section for section in sections if section)


def layout_words(plan: Plan) -> str:
    """The axes in use, such as ``tensor 4 · pipeline 12 x 5 chunks · experts over 64 · ZeRO-1 over 16``."""
    layout, words = plan.layout, []
    if layout.data > 1:
        words.append(f"data {layout.data}")
    if layout.tensor > 1:
        words.append(f"tensor {layout.tensor}")
    if layout.pipeline > 1:
        words.append(f"pipeline {layout.pipeline}" + (f" x {layout.virtual} chunks" if layout.virtual > 1 else ""))
    if layout.context > 1:
        words.append(f"context {layout.context}")
    if layout.expert > 1:
        words.append(f"experts over {layout.expert} ({layout.dispatcher})")
    if layout.sharding > 1:
        words.append(f"ZeRO-{layout.sharding_stage} over {layout.sharding}")
    return " · ".join(words) or "one process"


def _head(plan: Plan) -> str:
    model, trainer, count = plan.config.model, plan.config.trainer, num_params(plan.config.model)
    world, machine = plan.layout.world, plan.machine
    nodes = -(-world // machine.processes_here(world))
    what = "process" if machine.shared else "device"
    where = f"{world} {what}{'' if world == 1 else 'es' if machine.shared else 's'} of {machine.name}"
    saving = [
        word for word, used in (("recomputation", model.recompute), ("expert sub-batches", model.moe_sub_batch)) if used
    ]
    batch = f"{micro_batches(trainer)} x {trainer.rows_per_step} rows of {model.max_sequence_length:,}"
    return "\n".join(
        (
            f"{plan.name}: {where}" + (f", {nodes} nodes" if nodes > 1 else "") + f", {machine.precision}",
            f"  layout  {layout_words(plan)}",
            f"  model   {_count(count.total)} parameters, {_count(count.active)} of them at work for a token"
            + (f"; {' and '.join(saving)}" if saving else ""),
            f"  step    {batch} positions on each of {plan.layout.batch_ranks} = {_count(plan.tokens)} tokens, "
            f"{plan.flops:.2g} operations",
        )
    )


def _memory(plan: Plan) -> str:
    unit, name = (GB, "GB") if plan.limit >= 8 and plan.fullest.memory.total >= GB else (1e6, "MB")
    head = ["stage", "blocks", "held", *COLUMNS, "needed", f"x{MILD_SKEW:g} skew", "worst skew"]
    rows = []
    for stage in plan.stages:
        parts = [f"{getattr(stage.memory, column) / unit:,.1f}" for column in COLUMNS]
        sums = [f"{plan.needed(memory) * GB / unit:,.1f}" for memory in (stage.memory, stage.skewed, stage.worst)]
        rows.append([str(stage.stage), str(stage.blocks), _count(stage.held.total), *parts, *sums])
    limit = f"{plan.limit * GB / unit:,.0f} {name}"
    held = f"needed: tensors, {plan.machine.slack:.0%} for the allocator, {plan.machine.reserve:g} GB for libraries"
    return f"Memory of a rank at the fullest moment of a step, in {name} of {limit} ({held})\n{table(head, rows)}"


def _messages(plan: Plan) -> str:
    if not plan.traffic:
        return ""
    rows = [
        [t.kind, t.what, t.link, size_words(t.sent), _seconds(t.seconds), _seconds(t.exposed)]
        for t in sorted(plan.traffic, key=lambda t: -t.seconds)
    ]
    title = f"Messages of a rank of stage {plan.slowest} in one step"
    return f"{title}\n{table(['kind', 'what', 'link', 'sent', 'time', 'not hidden'], rows, left=3)}"


def _step(plan: Plan) -> str:
    time = plan.time
    parts = {
        "products": time.compute,
        "other operators, passing through memory": time.traffic,
        "dispatch of operators": time.overhead,
        "messages": time.communication,
        "optimizer": time.optimizer,
        f"pipeline bubble, {plan.bubble:.1%} of the turns": time.bubble,
    }
    rows = [[name, _seconds(value), f"{value / time.total:.1%}"] for name, value in parts.items() if value > 0]
    rate = f"{_count(plan.tokens / time.total)} tokens/s, {plan.utilisation:.1%} of the devices' rate"
    return f"One step: {_seconds(time.total)}, {rate}\n{table(['part', 'time', 'share'], rows, left=1)}"


def _verdict(plan: Plan) -> str:
    full = plan.fullest
    needed = plan.needed(full.memory)
    lines = []
    if needed > plan.limit:
        lines.append(f"DOES NOT FIT: stage {full.stage} needs {needed:,.1f} of {plan.limit:,.1f} GB; {advice(plan)}")
    else:
        tight = ", tight" if needed > BUSY * plan.limit else ""
        lines.append(f"Fits: {needed:,.2f} of {plan.limit:,.1f} GB on stage {full.stage}, the fullest{tight}.")
    if plan.layout.expert > 1:
        lines += [_skew_line(plan, f"its experts get {MILD_SKEW:g} times their share", "skewed")]
        lines += [_skew_line(plan, f"all tokens of {plan.layout.expert} ranks choose one rank's experts", "worst")]
    return "\n".join(lines)


def _skew_line(plan: Plan, what: str, field: str) -> str:
    def of(stage: StagePlan) -> RankMemory:
        return getattr(stage, field)

    stage = max(plan.stages, key=lambda stage: of(stage).total)
    needed = plan.needed(of(stage))
    verdict = "still fits" if needed <= plan.limit else "out of memory"
    return f"If {what}: {needed:,.2f} GB on stage {stage.stage}, {verdict}."


def advice(plan: Plan) -> str:
    """What to change first, from what takes the most."""
    memory, config, layout = plan.fullest.memory, plan.config, plan.layout
    temporary = memory.activations + memory.working
    if temporary > memory.parameters + memory.gradients + memory.optimizer:
        if not config.model.recompute:
            return "activations take the most: set model.recompute=true"
        if config.trainer.rows_per_step > 1:
            return "activations take the most: lower trainer.rows_per_step and raise trainer.gradient_accumulation"
        return "activations take the most: raise parallel.tensor or parallel.context, or set model.moe_sub_batch"
    if memory.optimizer > memory.parameters and layout.sharding < layout.data * layout.sharding:
        return "optimizer state takes the most: raise parallel.sharding"
    return "parameters and their state take the most: more devices, or raise parallel.expert or parallel.pipeline"


def search_text(found: Found, world: int, limit: float) -> str:
    """A line a layout, fastest first, and the words that choose the first."""
    if not found.plans:
        closest = found.closest
        if closest is None:
            return f"No layout of {world} devices divides this model and batch ({found.tried} tried)."
        needed = closest.needed(closest.fullest.memory)
        return (
            f"None of {found.tried} layouts of {world} devices fits {limit:g} GB. The closest needs {needed:,.1f} GB: "
            f"{layout_words(closest)}\n  {' '.join(overrides(closest.config))}"
        )
    head = ["", "layout", "rows", "recompute", "GB", "x2 skew", "bubble", "step", "tokens/s", "of rate"]
    rows = []
    for number, plan in enumerate(found.plans, start=1):
        skewed = max(plan.needed(stage.skewed) for stage in plan.stages)
        trainer = plan.config.trainer
        rows.append(
            [
                str(number),
                layout_words(plan),
                f"{micro_batches(trainer)} x {trainer.rows_per_step}",
                "yes" if plan.config.model.recompute else "no",
                f"{plan.needed(plan.fullest.memory):,.1f}",
                f"{skewed:,.1f}" + ("" if skewed <= plan.limit else " !"),
                f"{plan.bubble:.1%}",
                _seconds(plan.time.total),
                _count(plan.tokens / plan.time.total),
                f"{plan.utilisation:.1%}",
            ]
        )
    best = " ".join(overrides(found.plans[0].config))
    note = "! would not fit if a rank's experts received twice their share"
    return (
        f"{len(found.plans)} fastest of the layouts of {world} devices that fit {limit:g} GB ({found.tried} tried)\n"
        f"{table(head, rows, left=2)}\n{note}\nThe first: {best}"
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 0) -> str:
    """Aligned columns under a rule; the first ``left`` are text, the others numbers."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        padded = [c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))]
        return ("  " + "  ".join(padded)).rstrip()

    return "\n".join([line(head), "  " + "─" * (sum(widths) + 2 * len(widths) - 2), *map(line, rows)])


def _count(value: float) -> str:
    for size, letter in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k")):
        if value >= 0.9995 * size:
            return f"{value / size:,.3g}{letter}" if value < 999.5 * size else f"{value / size:,.0f}{letter}"
    return f"{value:,.0f}"


def size_words(value: float) -> str:
    for size, letter in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if value >= size:
            return f"{value / size:,.1f} {letter}"
    return f"{value / 1e3:,.1f} kB"


def _seconds(value: float) -> str:
    return f"{value:,.1f} s" if value >= 10 else f"{value:.2f} s" if value >= 1 else f"{value * 1e3:,.1f} ms"
