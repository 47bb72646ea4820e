"""Which tokenizers a run's codes and checkpoints belong to: a hash of their files, kept beside the checkpoints."""

from __future__ import annotations

import hashlib
from pathlib import Path

from ernie5.files import read_versioned_json, write_json

FORMAT_VERSION = 1
RECORD = "tokenizers.json"
REMEDY = "train the model anew: tools/prepare_data.py --force, then tools/pretrain.py --fresh"


def fingerprint(tokenizers_dir: str | Path) -> str:
    """A hash of every file below a tokenizers' folder: codes belong to the tokenizers that made them."""
    digest = hashlib.sha256()
    folder = Path(tokenizers_dir)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(str(path.relative_to(folder)).encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def record_tokenizers(tokenizers_dir: Path, checkpoints: Path) -> None:
    """Notes in the folder of checkpoints which tokenizers they are trained with."""
    write_json(checkpoints / RECORD, {"format_version": FORMAT_VERSION, "fingerprint": fingerprint(tokenizers_dir)})


def check_tokenizers(tokenizers_dir: Path, checkpoints: Path) -> None:
    """Raises ValueError where ``checkpoints`` has a note of other tokenizers; passes where it has none."""
    record = checkpoints / RECORD
    if not record.exists():
        return
    noted = read_versioned_json(record, FORMAT_VERSION, "note of the tokenizers", REMEDY)
    if noted.get("fingerprint") != fingerprint(tokenizers_dir):
        raise ValueError(f"{tokenizers_dir} was trained anew since the checkpoints in {checkpoints}; {REMEDY}")
