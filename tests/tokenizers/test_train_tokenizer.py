"""The command that trains a tokenizer: writes once, skips, trains again when told to, and reports bad input."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from ernie5.tokenizers.vision import VisionTokenizer

SMALL = [
    f"tokenizers.vision.{setting}"
    for setting in ("vit_steps=2", "image_steps=2", "video_steps=2", "batch_size=2", "video_batch_size=2")
]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    path = Path(__file__).resolve().parents[2] / "tools" / "train_tokenizer.py"
    spec = importlib.util.spec_from_file_location("train_tokenizer", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    images = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), dtype=np.uint8)
    material = (images, ["a dog", "a cat"] * 4, np.stack([images] * 5, axis=1))
    monkeypatch.setattr("ernie5.data.tokenizer_material", lambda config, kind: material)
    return module


def test_writes_skips_and_forces(command, tmp_path, capsys):
    config = tmp_path / "run.yaml"
    config.write_text(f"run: {{dir: {tmp_path / 'run'}}}\n")
    arguments = ["vision", str(config), *SMALL, "--quiet"]
    assert command.main(arguments) == 0
    folder = tmp_path / "run" / "tokenizers" / "vision"
    assert VisionTokenizer.load(folder).config.vit_steps == 2
    written = (folder / "weights.safetensors").stat().st_mtime_ns
    assert command.main(arguments) == 0 and "nothing to do" in capsys.readouterr().out
    assert (folder / "weights.safetensors").stat().st_mtime_ns == written
    assert command.main([*arguments, "--force"]) == 0
    assert (folder / "weights.safetensors").stat().st_mtime_ns != written


@pytest.mark.parametrize("override", ["tokenizers.vision.wings=2", "tokenizers.vision.vit_patch=8"])
def test_bad_configuration_is_one_line(command, tmp_path, capsys, override):
    config = tmp_path / "run.yaml"
    config.write_text(f"run: {{dir: {tmp_path / 'run'}}}\n")
    assert command.main(["vision", str(config), override]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and override.split(".")[-1].split("=")[0] in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("stopped_at", [1, 3])
def test_a_stop_leaves_no_child_behind(command, monkeypatch, stopped_at):
    """The signal comes while the text child runs, or while the other two do."""
    children = []

    class Child:
        returncode, terminated = 0, False

        def __init__(self, *_: object, **__: object) -> None:
            children.append(self)

        def wait(self) -> int:
            if len(children) == stopped_at and not self.terminated:
                raise SystemExit(143)
            return 0

        def poll(self) -> None:
            raise SystemExit(143)

        def terminate(self) -> None:
            self.terminated = True

    monkeypatch.setattr(command.subprocess, "Popen", Child)
    monkeypatch.setattr(command.signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit):
        command.main(["all", "run.yaml"])
    assert len(children) == stopped_at
    assert [child.terminated for child in children] == ([True] if stopped_at == 1 else [False, True, True])
