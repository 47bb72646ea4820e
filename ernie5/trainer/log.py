"""``train_log.jsonl``: one line a step, in step with the checkpoints."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from ernie5.files import replacing

LOG_NAME = "train_log.jsonl"


class TrainLog:
    """Appends records to ``run_dir/train_log.jsonl``; a checkpoint keeps a copy, from which a resumed run starts."""

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / LOG_NAME
        self._file = None

    def append(self, record: dict) -> None:
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a", encoding="utf-8")
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def so_far(self) -> dict[Path, int]:
        """The file and its length in bytes; nothing if there is none."""
        return {self.path: self.path.stat().st_size} if self.path.exists() else {}

    def restore_from(self, folder: Path) -> None:
        """Forgets what came after the checkpoint in ``folder``, lines cut by a kill included."""
        self.close()
        with replacing(self.path) as temporary:
            if (folder / LOG_NAME).exists():
                shutil.copyfile(folder / LOG_NAME, temporary)
            else:
                temporary.touch()

    def records(self) -> list[dict]:
        if not self.path.exists():
            return []
        return [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
