"""Measures one checkpoint: loads it with its tokenizers and held-out data, writes ``metrics.json`` and ``samples/``."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from ernie5.config import Config
from ernie5.data.embedded import raw_samples
from ernie5.evaluation.cost_metrics import read_log
from ernie5.evaluation.measure import Measurement, Scope
from ernie5.evaluation.metrics import chosen_metrics, measure
from ernie5.evaluation.routing_metrics import FILE
from ernie5.evaluation.samples import INDEX, write_samples
from ernie5.files import write_json
from ernie5.generation import load_run
from ernie5.generation.load import newest_checkpoint, run_config
from ernie5.sequence.parts import Sample
from ernie5.tokenizers.fingerprint import fingerprint


def evaluate(
    run_dir: Path,
    only: Sequence[str] = (),
    items: int | None = None,
    seed: int = 0,
    checkpoint: Path | None = None,
    out: Path | None = None,
) -> dict[str, float | str]:
    """Measures ``only`` (all metrics when empty) and returns every figure of the metrics file.

    ``items``: held-out items of a generated metric, by default ``evaluation.items`` of the run. ``checkpoint``: a
    folder of weights other than the run's newest. ``out``: the metrics file, by default ``run_dir/metrics.json``;
    samples and the experts' load are written beside it. With ``only`` its other figures stay, if they were measured
    on the same items (seed and number) of the same weights. Raises ValueError, in one line, for a missing run, a
    checkpoint of another shape, an unknown metric.
    """
    chosen_metrics(only, None)
    started = time.monotonic()
    run_config(run_dir)  # says that there is no such run before anything else
    checkpoint = checkpoint or newest_checkpoint(run_dir)
    model, tokenizers, config = load_run(run_dir, checkpoint)
    out, items = out or run_dir / "metrics.json", items or config.evaluation.items
    made_with = provenance(run_dir, checkpoint, seed, items)
    values = earlier(out, made_with) if only else {}
    scope = Scope(model, tokenizers, config, _held_out(config), run_dir, items, seed, out_dir=out.parent)
    result = measure(scope, only)
    if not values:
        _forget_others(out.parent, result)
    values |= result.values | made_with
    values["evaluation_seconds"] = round(time.monotonic() - started, 1)
    write_json(out, values)
    if result.exhibits:
        write_samples(out.parent / "samples", result.exhibits)
    return values


def provenance(run_dir: Path, checkpoint: Path, seed: int, items: int) -> dict[str, float | str]:
    """What figures must share to stand in one file: held-out items and weights (a hash; folder and step for people)."""
    named = re.fullmatch(r"step-(\d+)", checkpoint.name)
    log = read_log(run_dir)
    step = int(named[1]) if named else log[-1]["step"] if log else -1
    return {
        "evaluation_seed": seed,
        "evaluation_items": items,
        "evaluation_checkpoint": checkpoint.name,
        "evaluation_step": step,
        "evaluation_weights": fingerprint(checkpoint),
    }


def earlier(path: Path, made_with: dict[str, float | str]) -> dict[str, float | str]:
    """Figures of an earlier evaluation; none, with a line that says why, if they were measured otherwise."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        print(f"evaluate: {path} is unreadable ({error}); it starts from empty", file=sys.stderr)
        return {}
    values = values if isinstance(values, dict) else {}
    compared = ("evaluation_seed", "evaluation_items", "evaluation_weights")
    differing = [
        f"{key} {values.get(key)} -> {made_with[key]}" for key in compared if values.get(key) != made_with[key]
    ]
    if differing:
        print(f"evaluate: {path} starts from empty, its figures do not go with {', '.join(differing)}", file=sys.stderr)
        return {}
    return values


def _forget_others(folder: Path, result: Measurement) -> None:
    """Takes what an earlier evaluation left beside the metrics file, unless this one made it, out of the report."""
    (folder / "samples" / INDEX).unlink(missing_ok=True)
    if "expert_load_entropy" not in result.values:
        (folder / FILE).unlink(missing_ok=True)


def _held_out(config: Config) -> dict[str, list[Sample]]:
    """Held-out raw samples by task; where the data have none, a line says how to mark some."""
    by_task: dict[str, list[Sample]] = {}
    for sample in raw_samples(config, "heldout"):
        by_task.setdefault(sample.task, []).append(sample)
    if not by_task:
        hint = 'mark some manifest lines with "split": "heldout"'
        print(f"evaluate: no held-out samples in the data, so only costs are measured; {hint}", file=sys.stderr)
    return by_task
