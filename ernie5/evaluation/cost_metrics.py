"""What the model costs: its parameters, counted from the configuration, and its speed, read from the training log."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from ernie5.config.counting import num_params
from ernie5.evaluation.measure import Measurement, Scope

LOG_FILE = "train_log.jsonl"


def cost(scope: Scope) -> Measurement:
    """Parameters of the built model, its active share, and the median speed of training where a log exists."""
    count = num_params(scope.config.model)
    built = sum(int(np.prod(parameter.shape)) for parameter in scope.model.parameters())
    assert built == count.total, f"the configuration counts {count.total} parameters, the model holds {built}"
    values = {
        "params_total": count.total,
        "params_active": count.active,
        "active_fraction": count.expert_active_fraction,
        "active_fraction_all_parameters": count.active_fraction,
    }
    speeds = [row["tokens_per_second"] for row in read_log(scope.run_dir) if row.get("tokens_per_second")]
    if speeds:
        values["train_tokens_per_second"] = float(np.median(speeds))
    return Measurement(values)


def read_log(run_dir: Path) -> list[dict]:
    """Rows of ``train_log.jsonl`` in order of step; of a step logged twice (before and after a resume), the later.

    A line cut short by a kill is left out. An absent file gives an empty list.
    """
    path = run_dir / LOG_FILE
    rows: dict[int, dict] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows[row["step"]] = row
    return [rows[step] for step in sorted(rows)]
