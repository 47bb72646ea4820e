"""Checkpoints that know no layout: written in parts by many processes, complete or absent, read back in any split.

``RUN/checkpoints/step-N/`` holds safetensors files with parts of tensors under their global names, and
``manifest.json``, which is written last and says which part of which tensor is in which file, with the size and hash of
every file. A folder has its name only when all of it is there.
"""

from ernie5.checkpoint.part import Part
from ernie5.checkpoint.processes import ALONE, Processes
from ernie5.checkpoint.reading import Checkpoint
from ernie5.checkpoint.run import checkpoints_dir, forget_run, is_complete, remove_old, step_checkpoints
from ernie5.checkpoint.saving import Held, Saver, Tensors

__all__ = [
    "ALONE",
    "Checkpoint",
    "Held",
    "Part",
    "Processes",
    "Saver",
    "Tensors",
    "checkpoints_dir",
    "forget_run",
    "is_complete",
    "remove_old",
    "step_checkpoints",
]
