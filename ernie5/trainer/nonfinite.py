"""What a loss or a gradient that is not finite leaves behind: its step, rows and documents, and the batch."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ernie5.files import replacing, write_json
from ernie5.sequence.vocabulary import Kind


class NonFiniteError(ValueError):
    """A loss or gradient norm is NaN or infinite; raised before any parameter changes."""


def describe_rows(dataset: Any, rows: list[int], batch: Mapping[str, np.ndarray]) -> list[dict]:
    """One entry a row: its number, documents, positions of each kind, and what the dataset says of it."""
    entries = []
    for place, row in enumerate(rows):
        entry: dict = {"row": row}
        if "document" in batch:
            entry["documents"] = int(batch["document"][place].max())
        if "kind" in batch:
            found = Counter(batch["kind"][place].tolist())
            entry["positions"] = {Kind(kind).name.lower(): number for kind, number in sorted(found.items())}
        if hasattr(dataset, "describe"):
            entry["content"] = json.loads(json.dumps(dataset.describe(row), default=str))
        entries.append(entry)
    return entries


def dump(
    run_dir: Path, step: int, quantity: str, values: dict[str, float], rows: list[int], loader: Any, batch: Mapping
) -> Path:
    """Writes ``nonfinite_step_N.json`` (the names) and ``.npz`` (the last micro-batch's arrays); returns the former.

    ``rows`` are those of all micro-batches of the step; the last ``len(loader.last_rows)`` of them made ``batch``.
    """
    report = {
        "step": step,
        "quantity": quantity,
        "values": {name: str(value) for name, value in values.items()},
        "rows_of_the_step": rows,
        "last_micro_batch": describe_rows(loader.dataset, loader.last_rows, batch),
    }
    with replacing(run_dir / f"nonfinite_step_{step}.npz") as temporary:
        np.savez_compressed(temporary, **{name: np.asarray(value) for name, value in batch.items()})
    path = run_dir / f"nonfinite_step_{step}.json"
    write_json(path, report)
    return path
