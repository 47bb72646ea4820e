"""Writing files so that a reader never meets a half-written one."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary name beside ``path`` with the same suffix; renames it to ``path`` when the block succeeds.

    If the block raises, the temporary file is removed and ``path`` stays as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replacing_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Yields an empty folder beside ``path``; it takes the place of ``path`` when the block succeeds."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        if path.is_dir():
            shutil.rmtree(path)
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_json(path: str | os.PathLike, value: object) -> None:
    """Writes ``value`` as indented UTF-8 JSON, atomically."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_versioned_json(path: str | os.PathLike, format_version: int, what: str, remedy: str) -> dict:
    """Reads a JSON object that must carry ``format_version``.

    Raises ``ValueError`` in one line for a missing or corrupt file and for another version; ``what`` names the thing
    ("text tokenizer"), ``remedy`` the command that makes it anew.
    """
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no {what} here; {remedy}") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: unreadable {what} ({error}); {remedy}") from None
    found = value.get("format_version") if isinstance(value, dict) else None
    if found != format_version:
        raise ValueError(f"{path}: {what} of format_version {found}, expected {format_version}; {remedy}")
    return value
