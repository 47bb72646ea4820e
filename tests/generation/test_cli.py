"""``tools/generate.py``: one line and exit code 2 for bad requests."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools" / "generate.py"


@pytest.fixture
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_tool", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to", "image", "--out", "a.png"], "the prompt is empty"),
        (["--prompt", "  ", "--to", "text"], "the prompt is empty"),
        (["--prompt", "seven", "--to", "image"], "--out is missing; name a .png file"),
        (
            ["--prompt", "seven", "--to", "image", "--out", "seven.wav"],
            "seven.wav: a generated image is written",
        ),
        (["--prompt", "seven", "--to", "video", "--out", "seven"], "written as .gif or .mp4"),
        (["--prompt", "seven", "--to", "image", "--out", "no/such/folder/seven.png"], "folder that exists"),
        (["--prompt", "seven", "--num-frames", "5"], "--num-frames: only a video has frames"),
        (["--prompt", "seven", "--guidance", "nan"], "--guidance: found nan"),
        (["--prompt", "seven", "--guidance", "-1"], "--guidance: found -1.0"),
        (["--prompt", "seven", "--checkpoint", "no/such/run"], "no/such/run: no such run directory"),
    ],
)
def test_bad_requests(
    tool: ModuleType, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys, "argv", ["generate.py", *arguments])
    assert tool.main() == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and error.startswith("generate: ")
