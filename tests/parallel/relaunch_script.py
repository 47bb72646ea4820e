"""What tests/parallel/test_relaunch.py starts as two ranks: ``relaunch_script.py RUN_DIR KIND``, a run of six steps.

It takes up its work at the last "checkpoint"; rank 1 fails in the way KIND says, and rank 0 as its watchdog would.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path


def main(run_dir: Path, kind: str) -> int:
    rank = int(os.environ["PADDLE_TRAINER_ID"])
    (run_dir / "pids").mkdir(exist_ok=True)
    (run_dir / "pids" / str(os.getpid())).touch()
    done = sorted(int(path.name.removeprefix("step-")) for path in (run_dir / "checkpoints").glob("step-*"))
    first = done[-1] if done else 0
    if kind == "refuse":
        print("script: parallel.tensor = 3 does not fit", file=sys.stderr)
        return 2
    for step in range(first + 1, 7):
        print("step", step, "of rank", rank, flush=True)
        if kind == "sleep":
            time.sleep(60)
        if step == 4 and (kind == "bug" or not first):
            return failed(rank, kind)
        if rank == 0:
            with (run_dir / "train_log.jsonl").open("a") as log:
                log.write(json.dumps({"step": step}) + "\n")
            if step % 2 == 0:
                (run_dir / "checkpoints" / f"step-{step}").mkdir(parents=True)
    return 0


def failed(rank: int, kind: str) -> int:
    if rank == 0:
        time.sleep(0.5)
        print("ernie5: rank 1 on here did not come", file=sys.stderr, flush=True)
        return 75
    if kind == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    raise RuntimeError("the bug of rank 1")


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2]))
