"""The one door to PaddleNLP: every name of it that this project uses, imported on first use and without noise.

Nothing else imports ``paddlenlp``, so replacing it costs this file. ``import ernie5.paddlenlp`` itself is free; the
first name asked for pays for PaddleNLP's start-up (about two seconds, most of it spent on parts unused here).
"""

from __future__ import annotations

import importlib
import logging
import os
import warnings
from typing import TYPE_CHECKING, Any

import ernie5  # noqa: F401  (sets the environment before paddle loads)

if TYPE_CHECKING:
    from paddlenlp.trainer import (
        PrinterCallback,
        ProgressCallback,
        Trainer,
        TrainerCallback,
        TrainerControl,
        TrainerState,
        TrainingArguments,
    )
    from paddlenlp.transformers import PretrainedConfig, PretrainedModel

HOME = {
    "PretrainedConfig": "paddlenlp.transformers.configuration_utils",
    "PretrainedModel": "paddlenlp.transformers.model_utils",
    "PrinterCallback": "paddlenlp.trainer",
    "ProgressCallback": "paddlenlp.trainer",
    "Trainer": "paddlenlp.trainer",
    "TrainerCallback": "paddlenlp.trainer",
    "TrainerControl": "paddlenlp.trainer",
    "TrainerState": "paddlenlp.trainer",
    "TrainingArguments": "paddlenlp.trainer",
}

__all__ = [
    "PretrainedConfig",
    "PretrainedModel",
    "PrinterCallback",
    "ProgressCallback",
    "Trainer",
    "TrainerCallback",
    "TrainerControl",
    "TrainerState",
    "TrainingArguments",
]


def _import_quietly(module: str) -> Any:
    """Imports ``module`` of PaddleNLP. Its warnings are about parts unused here, and its log handlers are undone."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        imported = importlib.import_module(module)
        logger = importlib.import_module("paddlenlp.utils.log").logger
    root.handlers[:] = handlers  # a dependency calls logging.basicConfig, which would print every library's log
    root.setLevel(level)
    logger.logger.setLevel(os.environ.get("PADDLENLP_LOG_LEVEL", "WARNING"))
    return imported


def __getattr__(name: str) -> Any:
    if name not in HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(_import_quietly(HOME[name]), name)
    globals()[name] = value
    return value
