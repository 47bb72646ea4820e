"""A run directory, as training leaves it, back into memory."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from ernie5.config import Config, load_config

if TYPE_CHECKING:
    from ernie5.model.modeling import Ernie5ForCausalLM
    from ernie5.tokenizers.bundle import Tokenizers

# What may differ between a run's configuration and a checkpoint's: it changes nothing that a trained model computes.
_FREE = {"preset", "recompute", "moe_sub_batch", "initializer_range"}
_STEP = re.compile(r"step-(\d+)$")


def load_run(run_dir: str | Path, checkpoint: str | Path | None = None) -> tuple[Ernie5ForCausalLM, Tokenizers, Config]:
    """(model in evaluation mode, tokenizers, configuration) of ``run_dir``.

    The weights are those of ``checkpoint`` if given, else of ``checkpoints/final``, else of the complete checkpoint
    with the highest step. Raises ValueError in one line where something is missing or unreadable, or where the
    checkpoint is of another model or of other tokenizers than the run's.
    """
    from ernie5.model.modeling import Ernie5ForCausalLM
    from ernie5.tokenizers.bundle import Tokenizers
    from ernie5.tokenizers.fingerprint import check_tokenizers

    run_dir = Path(run_dir)
    config = run_config(run_dir)
    checkpoint = newest_checkpoint(run_dir) if checkpoint is None else Path(checkpoint)
    if not _complete(checkpoint):
        raise ValueError(f"{checkpoint}: no complete checkpoint here; expected config.json and safetensors weights")
    check_tokenizers(run_dir / "tokenizers", checkpoint.parent)
    tokenizers = Tokenizers.load(run_dir / "tokenizers")
    model = Ernie5ForCausalLM.from_pretrained(str(checkpoint))
    _check_model(checkpoint, asdict(model.config.to_model_config()), run_dir, asdict(config.model))
    model.eval()
    return model, tokenizers, config


def run_config(run_dir: Path) -> Config:
    """The configuration a run was trained with."""
    if not run_dir.is_dir():
        raise ValueError(f"{run_dir}: no such run directory; train one with tools/pretrain.py")
    return load_config(run_dir / "config.yaml")


def newest_checkpoint(run_dir: Path) -> Path:
    """``checkpoints/final``, else the complete ``checkpoints/step-N`` of the highest N."""
    folder = run_dir / "checkpoints"
    final = folder / "final"
    if _complete(final):
        return final
    named = [(int(match[1]), path) for path in folder.glob("step-*") if (match := _STEP.match(path.name))]
    steps = [entry for entry in named if _complete(entry[1])]
    if not steps:
        raise ValueError(f"{folder}: no complete checkpoint here; let tools/pretrain.py finish or save one")
    return max(steps)[1]


def _check_model(checkpoint: Path, found: dict[str, object], run_dir: Path, expected: dict[str, object]) -> None:
    faults = [name for name in expected if name not in _FREE and found[name] != expected[name]]
    if faults:
        name, more = faults[0], f" and {len(faults) - 1} more" if len(faults) > 1 else ""
        raise ValueError(
            f"{checkpoint}: a model with {name} {found[name]}; {run_dir / 'config.yaml'} says {expected[name]}{more}; "
            "choose a checkpoint of this run"
        )


def _complete(path: Path) -> bool:
    return (path / "config.json").is_file() and any(path.glob("model*.safetensors"))
