"""Measures one checkpoint: loads it with its tokenizers and held-out data, writes ``metrics.json`` and ``samples/``."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from ernie5.config import Config
from ernie5.data.embedded import raw_samples
from ernie5.evaluation.measure import Scope
from ernie5.evaluation.metrics import chosen_metrics, measure
from ernie5.evaluation.samples import write_samples
from ernie5.files import write_json
from ernie5.generation import load_run
from ernie5.sequence.parts import Sample


def evaluate(
    run_dir: Path,
    only: Sequence[str] = (),
    items: int | None = None,
    seed: int = 0,
    checkpoint: Path | None = None,
    out: Path | None = None,
) -> dict[str, float]:
    """Measures ``only`` (all metrics when empty) and returns every figure of the metrics file.

    ``items``: held-out items of a generated metric, by default ``evaluation.items`` of the run. ``checkpoint``: a
    folder of weights other than the run's newest. ``out``: the metrics file, by default ``run_dir/metrics.json``;
    with ``only`` its other figures stay. Raises ValueError, in one line, for a missing run, a checkpoint of
    another shape, an unknown metric.
    """
    chosen_metrics(only, None)
    started = time.monotonic()
    model, tokenizers, config = load_run(run_dir, checkpoint)
    scope = Scope(model, tokenizers, config, _held_out(config), run_dir, items or config.evaluation.items, seed)
    result = measure(scope, only)
    out = out or run_dir / "metrics.json"
    values = _earlier(out) if only else {}
    values |= result.values | {"evaluation_seed": seed, "evaluation_items": scope.items}
    values["evaluation_seconds"] = round(time.monotonic() - started, 1)
    write_json(out, values)
    if result.exhibits:
        write_samples(run_dir / "samples", result.exhibits)
    return values


def _held_out(config: Config) -> dict[str, list[Sample]]:
    """Held-out raw samples by task; where the data have none, a line says how to mark some."""
    by_task: dict[str, list[Sample]] = {}
    for sample in raw_samples(config, "heldout"):
        by_task.setdefault(sample.task, []).append(sample)
    if not by_task:
        hint = 'mark some manifest lines with "split": "heldout"'
        print(f"evaluate: no held-out samples in the data, so only costs are measured; {hint}", file=sys.stderr)
    return by_task


def _earlier(path: Path) -> dict[str, float]:
    """Figures of an earlier evaluation; none where there is no readable file."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}
