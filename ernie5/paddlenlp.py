"""The one door to PaddleNLP: every name of it that this project uses, imported on first use and without noise.

Nothing else imports ``paddlenlp``, so replacing it costs this file. ``import ernie5.paddlenlp`` itself is free.

PaddleNLP's packages import everything they have: a hundred models, a server, data sets, and with them pandas, SciPy
and Arrow, 200 MB and two seconds. So those that a model or the trainer only passes through are put in place without
being run; whoever asks one of them for a name, here or in a program that imports ``paddlenlp`` itself, has it run then.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
import warnings
from importlib.metadata import version
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
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

LAZY = ("paddlenlp", "paddlenlp.data", "paddlenlp.transformers")
EARLIER = {"paddlenlp.trainer": "paddlenlp.prompt"}  # these two import each other, which works from one end only

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


class _Lazy(ModuleType):
    """A package whose ``__init__`` runs when a name is asked for that is not there yet; its modules can be imported."""

    def __getattr__(self, name: str) -> Any:
        spec = self.__spec__
        if name.startswith("__") or spec.loader_state == "run":
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        spec.loader_state = "run"
        spec.loader.exec_module(self)
        return getattr(self, name)


def _place_lazily() -> None:
    """Puts the packages of ``LAZY`` into ``sys.modules``, unless the program has imported PaddleNLP already."""
    found = importlib.util.find_spec(LAZY[0])
    if LAZY[0] in sys.modules or found is None:
        return
    root = Path(found.origin).parent.parent
    for name in LAZY:
        folder = root.joinpath(*name.split("."))
        spec = spec_from_file_location(name, folder / "__init__.py", submodule_search_locations=[str(folder)])
        module = module_from_spec(spec)
        module.__class__ = _Lazy
        sys.modules[name] = module
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
    sys.modules[LAZY[0]].__version__ = version("paddlenlp")  # its own modules ask for this one
    from paddle import disable_signal_handler

    disable_signal_handler()  # as its __init__ does


def _import_quietly(module: str) -> Any:
    """Imports ``module`` of PaddleNLP. Its warnings are about parts unused here, and its log handlers are undone."""
    _place_lazily()
    if module in EARLIER:
        _import_quietly(EARLIER[module])
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logger = importlib.import_module("paddlenlp.utils.log").logger
        logger.logger.setLevel("ERROR")
        imported = importlib.import_module(module)
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
