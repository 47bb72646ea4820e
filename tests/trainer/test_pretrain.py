"""``tools/pretrain.py`` on a corpus of a few texts: runs, continues, and refuses what does not fit."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import yaml

from ernie5.config import load_config
from ernie5.data import CodedCorpus, fingerprint
from ernie5.sequence.parts import AudioCodes, Sample, Text
from ernie5.tokenizers.text import TextTokenizer
from ernie5.trainer.start import differences
from tests.trainer.tiny_run import SHAPE

TOOL = Path(__file__).parents[2] / "tools" / "pretrain.py"


def tool_main(arguments: list[str]) -> int:
    spec = importlib.util.spec_from_file_location("pretrain_tool", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main(arguments)


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    """A run directory with a text tokenizer and a coded corpus, and the configuration that trains on it."""
    run_dir = tmp_path / "run"
    texts = [f"the small red bird number {i} sings in the tree and the fox listens" for i in range(40)]
    TextTokenizer.train(texts, 300, progress=False).save(run_dir / "tokenizers" / "text")
    rng = np.random.default_rng(0)
    spoken = [
        Sample([Text("say: one"), AudioCodes(rng.integers(0, 8, (5, 2)), generate=True)], "speech_gen")
        for _ in range(4)
    ]
    samples = [Sample([Text(text)], "text") for text in texts] + spoken
    CodedCorpus(samples, fingerprint(run_dir / "tokenizers")).save(run_dir / "data" / "train")
    model = {name: value for name, value in asdict(SHAPE).items() if name not in ("preset",)}
    values = {
        "model": {**model, "vocab_size": 320, "max_sequence_length": 64},
        "tokenizers": {
            "text": {"vocab_size": 320},
            "vision": {"scales": [1, 2], "image_size": 16, "bits": [2, 4], "channels": 8, "vit_dim": 8, "vit_heads": 2},
            "audio": {"levels": 2, "codebook_size": 8, "speaker_dim": 4},
        },
        "trainer": {
            "max_steps": 4,
            "rows_per_step": 2,
            "warmup_steps": 1,
            "save_steps": 2,
            "log_steps": 2,
            "bits_schedule": [[0, 2], [2, 4]],
        },
        "run": {"dir": str(run_dir)},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def steps(config_file: Path) -> list[int]:
    lines = (config_file.parent / "run" / "train_log.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines]


def test_it_trains_continues_and_asks_before_mixing_configurations(config_file: Path, capsys) -> None:
    assert tool_main([str(config_file)]) == 0
    run_dir = config_file.parent / "run"
    assert steps(config_file) == [1, 2, 3, 4]
    assert (run_dir / "checkpoints" / "final" / "config.json").exists()
    assert load_config(run_dir / "config.yaml") == load_config(config_file)
    assert tool_main([str(config_file), "trainer.max_steps=5"]) == 0
    assert steps(config_file) == [1, 2, 3, 4, 5]
    capsys.readouterr()
    assert tool_main([str(config_file), "trainer.learning_rate=0.5"]) == 2
    message = capsys.readouterr().err
    assert "trainer.learning_rate: 0.002 -> 0.5" in message and "--resume" in message and "--fresh" in message
    assert tool_main([str(config_file), "trainer.learning_rate=0.003", "trainer.max_steps=6", "--resume"]) == 0
    assert steps(config_file) == [1, 2, 3, 4, 5, 6]
    assert tool_main([str(config_file), "trainer.max_steps=3", "--fresh"]) == 0
    assert steps(config_file) == [1, 2, 3]


@pytest.mark.parametrize(
    "override, message",
    [
        ("run.dir=/nowhere/at/all", "text"),
        ("data.mixture={poems: 1.0}", "data.mixture names the task 'poems'"),
        ("trainer.max_stepz=1", "max_stepz"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(config_file: Path, capsys, override: str, message: str) -> None:
    assert tool_main([str(config_file), override]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("pretrain: ") and message in error


def test_a_model_of_another_shape_is_refused_on_resume(config_file: Path, capsys) -> None:
    assert tool_main([str(config_file), "trainer.max_steps=2"]) == 0
    capsys.readouterr()
    run_dir = config_file.parent / "run"
    records = [
        run_dir / "config.yaml",
        run_dir / "checkpoints" / "config.yaml",
        run_dir / "checkpoints/tokenizers.json",
    ]
    before = [path.read_bytes() for path in records]
    assert tool_main([str(config_file), "model.num_experts=4", "--resume"]) == 2
    assert "checkpoint of another shape" in capsys.readouterr().err
    assert [path.read_bytes() for path in records] == before


@pytest.mark.parametrize("how", [[], ["--resume"]])
def test_tokenizers_trained_anew_are_refused_until_the_run_starts_afresh(config_file: Path, capsys, how) -> None:
    assert tool_main([str(config_file), "trainer.max_steps=1"]) == 0
    run_dir = config_file.parent / "run"
    texts = ["another text for other merges"] * 3
    TextTokenizer.train(texts, 290, progress=False).save(run_dir / "tokenizers" / "text")
    CodedCorpus([Sample([Text(text)], "text") for text in texts], fingerprint(run_dir / "tokenizers")).save(
        run_dir / "data" / "train"
    )
    capsys.readouterr()
    assert tool_main([str(config_file), "trainer.max_steps=2", *how]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "trained anew since the checkpoints" in error and "--fresh" in error
    assert tool_main([str(config_file), "trainer.max_steps=1", "--fresh"]) == 0


def test_differences_name_keys_but_not_the_length_of_a_run(config_file: Path) -> None:
    old = load_config(config_file)
    assert differences(old, load_config(config_file, ["trainer.max_steps=9", "data.workers=3"])) == []
    changed = load_config(config_file, ["data.seed=3", "trainer.warmup_steps=2"])
    assert differences(old, changed) == ["data.seed: 0 -> 3", "trainer.warmup_steps: 1 -> 2"]
