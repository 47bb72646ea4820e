"""The README's commands exist with the options they use, its Python imports resolve, its manifest lines are JSON."""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from ernie5.config import (
    AudioTokenizerConfig,
    Config,
    TextTokenizerConfig,
    TokenizersConfig,
    VisionTokenizerConfig,
    dump_config,
    model_preset,
)

ROOT = Path(__file__).resolve().parents[1]
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)


def commands() -> list[list[str]]:
    """Words of every shell line that calls something in ``tools/``."""
    blocks = [block.replace("\\\n", " ") for language, block in BLOCKS if language == "bash"]
    lines = [line for block in blocks for line in block.splitlines()]
    parts = [part.strip() for line in lines for part in line.split("&&")]
    return [shlex.split(part) for part in parts if "tools/" in part]


@cache
def help_text(tool: str) -> str:
    runner = ["bash"] if tool.endswith(".sh") else [sys.executable]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [*runner, str(ROOT / tool), "--help"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_command_exists_and_knows_its_options(words):
    at = next(i for i, word in enumerate(words) if word.startswith("tools/"))
    assert (ROOT / words[at]).is_file()
    text = help_text(words[at])
    options = [word for word in words[at:] if word.startswith("--")]
    assert [option for option in options if option not in text] == []


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_configurations_named_in_commands_exist(words):
    named = [word for word in words if word.startswith("fleet_configs/")]
    assert all((ROOT / name).is_file() for name in named)


PLAIN = argparse.ArgumentParser.parse_known_args


class Parsed(Exception):
    """A command line was read without complaint."""


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_command_lines_are_read_as_written(words, monkeypatch):
    """The real words through the tool's own parser; what would follow is cut off."""
    position = next(i for i, word in enumerate(words) if word.startswith("tools/"))
    tool = {"tools/quickstart.sh": "ernie5/quickstart.py"}.get(words[position], words[position])
    monkeypatch.setattr(sys, "path", [*sys.path])
    spec = importlib.util.spec_from_file_location(f"{Path(tool).stem}_of_the_readme", ROOT / tool)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    for name in ("parse_known_args", "parse_known_intermixed_args"):
        monkeypatch.setattr(argparse.ArgumentParser, name, cut_after(getattr(argparse.ArgumentParser, name)))
    monkeypatch.setattr(sys, "argv", words[position:])
    with pytest.raises(Parsed):
        module.main()


def cut_after(parse):
    """``parse``, but the outermost call raises ``Parsed`` when every word has a meaning."""

    def parsing(self, *arguments, **keywords):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(argparse.ArgumentParser, "parse_known_args", PLAIN)
            _, unknown = parse(self, *arguments, **keywords)
        if not unknown:
            raise Parsed
        self.error(f"unrecognised {unknown}")

    return parsing


def imports() -> list[tuple[str, str]]:
    trees = [ast.parse(block) for language, block in BLOCKS if language == "python"]
    froms = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return [(node.module, alias.name) for node in froms for alias in node.names]


@pytest.mark.parametrize(("module", "name"), imports())
def test_python_imports_resolve(module, name):
    assert hasattr(importlib.import_module(module), name)


def test_manifest_lines_load_as_samples(tmp_path):
    """The own-data recipe: the README's lines beside media of those names."""
    from ernie5.data.manifest import ManifestSource
    from ernie5.data.media import write_audio, write_image, write_video

    lines = [line for language, block in BLOCKS if language == "json" for line in block.splitlines()]
    (tmp_path / "manifest.jsonl").write_text("\n".join(lines) + "\n")
    rng = np.random.default_rng(0)
    for name in {
        value for line in lines for part in json.loads(line)["parts"] for value in part.values() if is_file(value)
    }:
        if name.endswith(".png"):
            write_image(tmp_path / name, rng.integers(0, 256, (48, 40, 3), dtype=np.uint8))
        elif name.endswith(".wav"):
            write_audio(tmp_path / name, rng.uniform(-0.5, 0.5, 8000).astype(np.float32))
        else:
            write_video(tmp_path / name, rng.integers(0, 256, (5, 32, 32, 3), dtype=np.uint8))
    config = Config()
    source = ManifestSource(tmp_path, config.tokenizers.vision, config.tokenizers.audio)
    samples = [sample for split in ("train", "heldout") for sample in source.samples(split)]
    assert len(samples) == len(lines) >= 4
    assert {type(part).__name__ for sample in samples for part in sample.parts} == {"Text", "Image", "Audio", "Video"}


def is_file(value: object) -> bool:
    return isinstance(value, str) and value.endswith((".png", ".wav", ".mp4"))


def test_training_from_python_runs(tmp_path, monkeypatch):
    """The README's training lines, on a run of the tiny preset with text alone."""
    from ernie5.data import CodedCorpus
    from ernie5.sequence.parts import Sample, Text
    from ernie5.tokenizers.text import TextTokenizer

    texts = [f"line {i} says that {i} and {i + 1} make {2 * i + 1}" for i in range(60)]
    run = tmp_path / "runs" / "quickstart"
    TextTokenizer.train(texts, 300, progress=False).save(run / "tokenizers" / "text")
    CodedCorpus([Sample([Text(text)], "text") for text in texts]).save(run / "data" / "train")
    text_part = TextTokenizerConfig(vocab_size=512)
    vision = VisionTokenizerConfig(bits=[4, 8], channels=16, vit_dim=16)
    audio = AudioTokenizerConfig(levels=2, codebook_size=32, speaker_dim=8)
    config = Config(model=model_preset("tiny"), tokenizers=TokenizersConfig(text_part, vision, audio))
    dump_config(config, run / "config.yaml")
    (snippet,) = [block for language, block in BLOCKS if language == "python" and "Ernie5Trainer" in block]
    assert snippet.count("max_steps=100") == 1
    monkeypatch.chdir(tmp_path)
    quick = snippet.replace("max_steps=100", "max_steps=2").replace("warmup_steps=10", "warmup_steps=1")
    exec(compile(quick, "README.md", "exec"), {})
    assert (tmp_path / "runs" / "mine" / "checkpoints" / "final" / "model.safetensors").is_file()


def test_metrics_have_a_place():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text.index("<!-- metrics:begin -->") < text.index("<!-- metrics:end -->")
