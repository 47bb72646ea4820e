"""The checkpoints of a run directory: which there are, and what goes."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

FINAL, MANIFEST = "final", "manifest.json"
_STEP = re.compile(r"step-(\d+)$")


def checkpoints_dir(run_dir: Path) -> Path:
    return run_dir / "checkpoints"


def is_complete(folder: Path) -> bool:
    """Whether the folder is one that ``Saver`` finished."""
    return (folder / MANIFEST).is_file()


def step_checkpoints(run_dir: Path) -> list[Path]:
    """Complete checkpoints, oldest step first. A folder gets its name only when complete."""
    found = [path for path in checkpoints_dir(run_dir).glob("step-*") if _STEP.match(path.name)]
    return sorted(found, key=step_of)


def step_of(folder: Path) -> int:
    return int(_STEP.match(folder.name)[1])


def remove_partial(run_dir: Path) -> None:
    """Removes what a kill left half-written. Nobody may be writing."""
    for leftover in checkpoints_dir(run_dir).glob(".*.partial"):
        shutil.rmtree(leftover)


def remove_old(run_dir: Path, keep: int | None) -> None:
    """Removes all but the ``keep`` newest checkpoints (None or 0 = keep all)."""
    for path in step_checkpoints(run_dir)[: -keep if keep else 0]:
        remove_folder(path)


def remove_folder(path: Path) -> None:
    """Takes its name away first: what is half removed must not look complete."""
    condemned = path.with_name(f".{path.name}.removed.partial")
    shutil.rmtree(condemned, ignore_errors=True)
    path.rename(condemned)
    shutil.rmtree(condemned)


def forget_run(run_dir: Path) -> None:
    """Removes what training wrote into ``run_dir`` (checkpoints, final weights, log, dashboards), to start afresh."""
    for folder in (checkpoints_dir(run_dir), run_dir / "vdl"):
        shutil.rmtree(folder, ignore_errors=True)
    for file in [run_dir / "train_log.jsonl", *run_dir.glob("nonfinite_step_*")]:
        file.unlink(missing_ok=True)
