"""The helper that starts processes: it returns what they print, and never waits for one that hangs."""

from __future__ import annotations

import os
import sys
import time

import pytest

from ernie5.parallel.launch import LaunchError, launch

RANK = "import os, sys, time; rank = os.environ['PADDLE_TRAINER_ID']; "


def python(code: str) -> list[str]:
    return [sys.executable, "-c", RANK + code]


@pytest.mark.dist
def test_output_comes_back_by_rank():
    outputs = launch(python("print('I am', rank, os.environ['EXTRA'])"), 3, 20, {"EXTRA": "x"})
    assert outputs == [f"I am {rank} x\n" for rank in range(3)]


@pytest.mark.dist
@pytest.mark.parametrize(
    ("code", "timeout", "message"),
    [
        ("print('before'); time.sleep(60 if rank == '0' else 0); sys.exit(3)", 20, "rank 1 of 2 ended with code 3"),
        ("print('before', flush=True); time.sleep(60 * (rank == '1'))", 2, "after 2 s rank 1 of 2 had not ended"),
    ],
)
def test_a_rank_that_fails_or_hangs_ends_all_and_shows_the_last_lines(code, timeout, message):
    began = time.monotonic()
    with pytest.raises(LaunchError, match=message) as caught:
        launch(python(f"print('pid', os.getpid(), flush=True); {code}"), 2, timeout)
    assert time.monotonic() - began < 15
    assert "[rank 1] before" in str(caught.value)
    pids = [int(line.split()[-1]) for line in str(caught.value).splitlines() if " pid " in line]
    assert len(pids) == 2
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
