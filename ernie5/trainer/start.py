"""Whether a run starts or continues, decided by the configuration its checkpoints were made with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path

from ernie5.checkpoint import Checkpoint, checkpoints_dir, forget_run, step_checkpoints
from ernie5.checkpoint.state import MODEL
from ernie5.config import Config, dump_config, load_config
from ernie5.parallel.layout import Layout, world_size
from ernie5.tokenizers.fingerprint import check_tokenizers, record_tokenizers

RECORD = "config.yaml"
COMPARED = ("model", "tokenizers", "data", "trainer")
# May change between the parts of one run: how long it goes on and how it is watched.
FREE = ("trainer.max_steps", "trainer.save_steps", "trainer.log_steps", "trainer.async_save", "data.workers")


def differences(old: Config, new: Config, ranks: tuple[int, int] = (1, 1)) -> list[str]:
    """Dotted keys on which a continued run may not differ, each with both values.

    ``ranks``: processes before and after. They may share the work as they like, if a step has as many rows as before.
    """
    before, after = _compared(old, ranks[0]), _compared(new, ranks[1])
    keys = sorted(key for key in before.keys() | after.keys() if key.split(".")[0] in COMPARED and key not in FREE)
    return [f"{key}: {before.get(key)} -> {after.get(key)}" for key in keys if before.get(key) != after.get(key)]


def _compared(config: Config, ranks: int) -> dict[str, object]:
    flat = _flat(asdict(config))
    rows = flat.pop("trainer.rows_per_step") * Layout(config.parallel, ranks).rows
    step_rows = rows * flat.pop("trainer.gradient_accumulation")
    ramp = [[step, rows * accumulation] for step, accumulation in flat.pop("trainer.batch_ramp")]
    return flat | {
        "trainer.rows_per_step x gradient_accumulation x readers": step_rows,
        "trainer.batch_ramp in rows": ramp,
    }


def start(config: Config, run_dir: Path, choice: str = "auto") -> bool:
    """Whether to resume the run in ``run_dir``: "auto" resumes an equal run, "resume" any, "fresh" none.

    ``ValueError`` if "auto" meets a run of another configuration, or either a run with other tokenizers. Writes
    nothing (``record_start`` does); "fresh" removes what the old run wrote.
    """
    if choice == "fresh":
        forget_run(run_dir)
    record = checkpoints_dir(run_dir) / RECORD
    found = step_checkpoints(run_dir)
    if found and choice == "auto" and record.exists():
        with Checkpoint(found[-1]) as newest:
            changed = differences(load_config(record), config, (newest.ranks, world_size()))
        if changed:
            raise ValueError(
                f"{run_dir} holds a run of another configuration ({'; '.join(changed[:3])}"
                f"{'; ...' if len(changed) > 3 else ''}); --resume continues it with the new values, --fresh removes it"
            )
    if found:
        check_tokenizers(run_dir / "tokenizers", checkpoints_dir(run_dir))
    return bool(found)


def record_start(config: Config, run_dir: Path, shapes: Mapping[str, Iterable[int]]) -> None:
    """Writes the configuration and what its checkpoints belong to, once nothing speaks against training.

    ``ValueError``, with nothing written, if the newest checkpoint does not fit a model of these tensors.
    """
    found = step_checkpoints(run_dir)
    if found:
        with Checkpoint(found[-1]) as newest:
            newest.check_names(MODEL, shapes)
    dump_config(config, run_dir / "config.yaml")
    dump_config(config, checkpoints_dir(run_dir) / RECORD)
    record_tokenizers(run_dir / "tokenizers", checkpoints_dir(run_dir))


def _flat(values: dict, prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
