"""``tools/launch.py`` around Paddle's launcher: attempts, what a user sees of them, and that nothing of one is left."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("relaunch_script.py")
TOOL = SCRIPT.parents[2] / "tools" / "launch.py"


def command(run_dir: Path, kind: str) -> list[str]:
    options = ["--nproc_per_node", "2", "--max_restarts", "2", "--run_dir", str(run_dir)]
    return [sys.executable, str(TOOL), *options, str(SCRIPT), str(run_dir), kind]


def launched(run_dir: Path, kind: str) -> subprocess.CompletedProcess:
    return subprocess.run(command(run_dir, kind), capture_output=True, text=True, timeout=120)


def left(run_dir: Path) -> list[int]:
    """The ranks of all attempts that still live."""
    alive = []
    for pid in [int(path.name) for path in (run_dir / "pids").iterdir()]:
        status = Path(f"/proc/{pid}/status")
        if status.exists() and "\nState:\tZ" not in status.read_text():
            alive.append(pid)
    return alive


@pytest.mark.dist
@pytest.mark.slow
def test_a_restart_goes_on_from_the_last_checkpoint_and_a_stopped_rank_does_not_stay(tmp_path):
    done = launched(tmp_path, "stop")
    assert done.returncode == 0, done.stderr
    steps = [line for line in done.stdout.splitlines() if line.startswith("step")]
    assert [int(line.split()[1]) for line in steps] == [1, 2, 3, 4, 3, 4, 5, 6], "rank 0's output is the launcher's"
    said = [line for line in done.stderr.splitlines() if line.startswith("launch: ")]
    assert len(said) == 1
    assert "in step 4; restart 1 of 2, from" in said[0] and "step-2; " in said[0], said
    assert "ernie5: rank 1 on here did not come" in done.stdout
    assert len(list((tmp_path / "pids").iterdir())) == 4 and not left(tmp_path)
    assert (tmp_path / "log" / "workerlog.1").exists()


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "code", "attempts", "message"),
    [
        ("bug", 75, 2, "in step 4, as the one before: starting again would not help"),
        ("refuse", 2, 1, "script: parallel.tensor = 3 does not fit"),
    ],
)
def test_what_would_fail_again_is_not_started_again(tmp_path, kind, code, attempts, message):
    done = launched(tmp_path, kind)
    assert done.returncode == code
    assert message in done.stdout + done.stderr
    assert len(list((tmp_path / "pids").iterdir())) == 2 * attempts and not left(tmp_path)
    if kind == "bug":
        assert done.stderr.count("[rank 1] RuntimeError: the bug of rank 1") == attempts


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_no_rank_outlives_the_launcher(tmp_path, number):
    with subprocess.Popen(command(tmp_path, "sleep"), stdout=subprocess.PIPE, text=True) as launcher:
        assert "step 1" in launcher.stdout.readline()
        launcher.send_signal(number)
        launcher.wait(30)
    end = time.monotonic() + 5
    while left(tmp_path) and time.monotonic() < end:
        time.sleep(0.05)
    assert not left(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nproc_per_node", "2"], "no script is named"),
        (["--max_restarts", "-1", "tools/pretrain.py"], "--max_restarts -1"),
        (["tools/pretrain.py", "nowhere.yaml"], "nowhere.yaml"),
        (["--backend", "gloo", "tools/pretrain.py"], "--backend only in modes that have no restarts"),
    ],
)
def test_bad_input_is_one_line(arguments, message, capsys, monkeypatch):
    spec = importlib.util.spec_from_file_location("launch_tool", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", sys.argv)
    for name in [name for name in os.environ if name.startswith("PADDLE_")]:
        monkeypatch.delenv(name)
    assert module.main(arguments) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
