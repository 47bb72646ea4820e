"""The quickstart's stages: skipped when finished, resumed when interrupted, repeated when their settings change."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from ernie5 import quickstart
from ernie5.config import Config, load_config
from ernie5.quickstart import DEFAULT_CONFIG, STAGES, locked, main, run_stages, stage_keys

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Chain:
    """Two stages whose commands append their name to ``log`` and write an output; the second can be made to fail."""

    run_dir: Path

    def run(self, config: Config, force: bool = False) -> int:
        return run_stages(self.stages(), config, self.run_dir, force)

    def stages(self) -> list:
        return [
            self.stage("first", "tokenizers.text", "echo first >> log; mkdir -p one; echo x >> one/out"),
            self.stage("second", "trainer", "echo second >> log; echo x >> two; test ! -e fail"),
        ]

    def stage(self, name, section, command):
        shell = ["bash", "-c", f"cd {self.run_dir} && {command}"]
        output = {"first": "one", "second": "two"}[name]
        real = replace(STAGES[4], name=name, sections=(section,), outputs=(output,))
        object.__setattr__(real, "command", lambda run_dir: shell)
        return real

    @property
    def log(self) -> list[str]:
        return (self.run_dir / "log").read_text().split()


@pytest.fixture
def chain(tmp_path):
    return Chain(tmp_path)


def test_finished_stages_are_skipped(chain):
    assert chain.run(Config()) == 0
    assert chain.run(Config()) == 0
    assert chain.log == ["first", "second"]
    stages = json.loads((chain.run_dir / "stages.json").read_text())["stages"]
    assert [(stage["name"], stage["state"]) for stage in stages] == [("first", "finished"), ("second", "finished")]


def test_a_failed_stage_says_so_and_keeps_what_it_wrote(chain, capsys):
    (chain.run_dir / "fail").touch()
    assert chain.run(Config()) == 1
    assert "stage 'second' could not finish (exit code 1" in capsys.readouterr().err
    (chain.run_dir / "fail").unlink()
    assert chain.run(Config()) == 0
    assert chain.log == ["first", "second", "second"]
    assert (chain.run_dir / "two").read_text().split() == ["x", "x"]


def test_changed_settings_repeat_a_stage_from_nothing_and_all_after_it(chain):
    config = Config()
    chain.run(config)
    config.trainer.max_steps = 7
    chain.run(config)
    assert chain.log == ["first", "second", "second"]
    assert (chain.run_dir / "two").read_text().split() == ["x"]
    config.tokenizers.text.vocab_size = 999
    chain.run(config)
    assert chain.log == ["first", "second", "second", "first", "second"]


def test_a_stage_stops_with_the_quickstart(tmp_path):
    code = "from ernie5.quickstart import _call; raise SystemExit(_call(['sleep', '600']))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    deadline = time.monotonic() + 30
    while not (found := children.read_text().split()) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.terminate()
    assert process.wait(timeout=30) == 130
    assert not Path(f"/proc/{found[0]}").exists()


def test_force_repeats_everything_and_lost_outputs_are_made_again(chain):
    chain.run(Config())
    chain.run(Config(), force=True)
    assert chain.log == ["first", "second"] * 2
    (chain.run_dir / "two").unlink()
    chain.run(Config())
    assert chain.log == ["first", "second"] * 2 + ["second"]


def test_after_a_stage_that_ran_all_later_ones_run(chain):
    chain.run(Config())
    shutil.rmtree(chain.run_dir / "one")
    chain.run(Config())
    assert chain.log == ["first", "second"] * 2


@pytest.mark.parametrize(("folder", "first"), [("checkpoints/final", "evaluate"), ("tokenizers", "prepare data")])
def test_changed_files_repeat_the_stages_that_read_them(folder, first, tmp_path):
    (tmp_path / folder).mkdir(parents=True)
    (tmp_path / folder / "weights").write_text("of step 10")
    before = stage_keys(STAGES, Config(), tmp_path)
    (tmp_path / folder / "weights").write_text("of step 20")
    after = stage_keys(STAGES, Config(), tmp_path)
    names = [stage.name for stage in STAGES]
    assert [name for name in names if before[name] != after[name]] == names[names.index(first) :]


def test_time_before_a_kill_is_counted(chain, monkeypatch):
    monkeypatch.setattr(quickstart, "NOTE_SECONDS", 0.05)
    monkeypatch.setattr(quickstart, "_write_state", killed_after_half_a_second(quickstart._write_state))
    slow = chain.stage("first", "tokenizers.text", "sleep 1; mkdir -p one; echo x >> one/out")
    with pytest.raises(Killed):
        run_stages([slow], Config(), chain.run_dir)
    monkeypatch.undo()
    assert run_stages([slow], Config(), chain.run_dir) == 0
    (entry,) = json.loads((chain.run_dir / "stages.json").read_text())["stages"]
    assert entry["state"] == "finished" and entry["seconds"] >= 1.4


class Killed(BaseException):
    """Stands in for a SIGKILL: nothing is written after it."""


def killed_after_half_a_second(write):
    def writing(run_dir, stages, state):
        write(run_dir, stages, state)
        if state["first"]["seconds"] > 0.5:
            raise Killed

    return writing


def test_two_quickstarts_in_one_directory_are_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(quickstart, "run_stages", lambda *arguments: 0)
    with locked(tmp_path):
        assert main(["--run", str(tmp_path)]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and f"process {os.getpid()}" in error[0]
    assert not (tmp_path / "config.yaml").exists()
    with locked(tmp_path):
        pass


def test_a_run_directory_that_cannot_be_made_is_one_line(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(["--run", str(tmp_path / "file" / "run")]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_a_changed_section_repeats_every_stage_that_rests_on_it(tmp_path):
    config = Config()
    before = stage_keys(STAGES, config, tmp_path)
    config.tokenizers.vision.image_steps += 1
    after = stage_keys(STAGES, config, tmp_path)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"tokenizers", "prepare data", "pretrain", "evaluate", "report"}


def test_bad_configuration_is_one_line_and_exit_code_2(tmp_path, capsys):
    bad = tmp_path / "bad.yaml"
    bad.write_text("trainer: {max_stepz: 3}\n")
    assert main(["--config", str(bad), "--run", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and "max_stepz" in error[0]
    assert not (tmp_path / "run").exists()


def test_quickstart_configuration_loads_and_says_what_it_needs():
    config = load_config(DEFAULT_CONFIG)
    assert config.model.preset == "nano"
    head = DEFAULT_CONFIG.read_text().splitlines()[:3]
    assert [line.split(":")[0] for line in head] == ["# Hardware", "# Time", "# Start"]


def test_help_needs_no_installation(tmp_path):
    environment = {**os.environ, "ERNIE5_VENV": str(tmp_path / "venv")}
    done = subprocess.run(
        ["bash", str(ROOT / "tools" / "quickstart.sh"), "--help"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert all(option in done.stdout for option in ("--run", "--config", "--force"))
    assert not (tmp_path / "venv").exists()


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_every_stage_calls_a_tool_with_arguments_it_takes(stage, tmp_path):
    command = stage.command(tmp_path)
    assert Path(command[1]).is_file()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = [sys.executable, command[1], "--help"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
