"""YAML in, typed configuration out: what is accepted, what is refused, and the one line that says why."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ernie5.config import Config, dump_config, load_config, model_preset


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_empty_file_gives_the_defaults(tmp_path):
    assert load_config(write(tmp_path, "")) == Config()


def test_values_are_typed(tmp_path):
    text = """
trainer: {learning_rate: 1e-3, clip_norm: 2, bits_schedule: [[0, 8], [100, 16]], modality_weights: {audio: 2}}
data: {manifests: [mine], mixture: {text: 1, digit_gen: 0.5}}
evaluation:
"""
    config = load_config(write(tmp_path, text))
    assert config.trainer.learning_rate == 0.001
    assert config.trainer.clip_norm == 2.0 and isinstance(config.trainer.clip_norm, float)
    assert config.trainer.bits_schedule == [[0, 8], [100, 16]]
    assert config.trainer.modality_weights == {"audio": 2.0}
    assert config.data.manifests == ["mine"]
    assert config.evaluation == Config().evaluation


def test_overrides_win_over_the_file_and_are_yaml(tmp_path):
    path = write(tmp_path, "trainer: {max_steps: 100}\n")
    config = load_config(
        path, ["trainer.max_steps=60", "data.manifests=[a, b]", "run.dir=runs/x", "model.recompute=yes"]
    )
    assert (config.trainer.max_steps, config.data.manifests, config.run.dir) == (60, ["a", "b"], "runs/x")
    assert config.model.recompute is True


def test_preset_is_the_ground_and_keys_lie_on_top(tmp_path):
    path = write(tmp_path, "model: {preset: nano, num_layers: 8}\n")
    config = load_config(path, ["model.hidden_size=64"])
    expected = model_preset("nano")
    expected.num_layers, expected.hidden_size = 8, 64
    assert config.model == expected


def test_override_may_choose_the_preset(tmp_path):
    path = write(tmp_path, "model: {num_layers: 3}\n")
    tokenizers = [
        "text.vocab_size=512",
        "vision.bits=[8]",
        "vision.channels=16",
        "vision.vit_dim=16",
        "audio.levels=2",
        "audio.codebook_size=32",
        "audio.speaker_dim=8",
    ]
    config = load_config(path, ["model.preset=tiny", *(f"tokenizers.{item}" for item in tokenizers)])
    assert (config.model.hidden_size, config.model.num_layers) == (model_preset("tiny").hidden_size, 3)


def test_dump_and_load_agree(tmp_path):
    path = write(tmp_path, "model: {preset: nano, norm_eps: 1e-7}\ndata: {mixture: {text: 0.25}}\n")
    config = load_config(path, ["trainer.batch_ramp=[[0, 1], [10, 2]]", "run.dir=läufe/eins"])
    dump_config(config, tmp_path / "deep" / "config.yaml")
    assert load_config(tmp_path / "deep" / "config.yaml") == config
    assert [item.name for item in (tmp_path / "deep").iterdir()] == ["config.yaml"]


@pytest.mark.parametrize(
    ("text", "overrides", "wanted"),
    [
        ("model: {hiden_size: 3}", [], r"run.yaml: unknown key 'hiden_size' in section 'model'; .*'hidden_size'"),
        ("modle: {}", [], r"run.yaml: unknown key 'modle' in the top level; did you mean 'model'"),
        ("run: {zzz: 1}", [], r"unknown key 'zzz' in section 'run'; known keys: dir"),
        ("tokenizers: {audio: {level: 1}}", [], r"'level' in section 'tokenizers.audio'; did you mean 'levels'"),
        ("", ["trainer.max_stps=5"], r"override 'trainer.max_stps=5': unknown key 'max_stps' in section 'trainer'"),
        (
            "",
            ["trainer.max_steps=abc"],
            r"override '.*': trainer.max_steps must be a whole number, found 'abc' \(str\)",
        ),
        ("", ["trainer.max_steps"], r"override 'trainer.max_steps': expected section.key=value"),
        ("", ["trainer.max_steps.x=1", "trainer=3"], r"override 'trainer=3': section 'trainer' must be a mapping"),
        ("trainer: {max_steps: 3}", ["trainer.max_steps.x=1"], r"'trainer.max_steps' is a value, not a section"),
        ("trainer: {max_steps: 2.0}", [], r"trainer.max_steps must be a whole number, found 2.0 \(float\)"),
        ("trainer: {max_steps: true}", [], r"trainer.max_steps must be a whole number, found True"),
        ("trainer: {max_steps: }", [], r"trainer.max_steps must be a whole number, found None"),
        ("trainer: {learning_rate: .nan}", [], r"trainer.learning_rate must be a finite number, found nan"),
        ("model: {recompute: 1}", [], r"model.recompute must be true or false, found 1"),
        ("run: {dir: 5}", [], r"run.dir must be text, found 5"),
        ("tokenizers: {vision: {scales: [1, x]}}", [], r"tokenizers.vision.scales\[1\] must be a whole number"),
        ("tokenizers: {vision: {scales: 4}}", [], r"scales must be a list \(a whole number each\), found 4"),
        ("data: {mixture: [text]}", [], r"data.mixture must be a mapping \(name: a finite number\)"),
        ("trainer: [1]", [], r"section 'trainer' must be a mapping of keys, found \[1\]"),
        ("- 1", [], r"run.yaml: a configuration is a mapping of sections, found list"),
        ("model: {preset: giant}", [], r"run.yaml: unknown model preset 'giant'; there are tiny, nano"),
        ("model: {preset: [a]}", [], r"unknown model preset \['a'\]"),
        ("trainer: {seed: 1, seed: 2}", [], r"run.yaml, line 1 .*key 'seed' is given twice"),
        ("model: {", [], r"run.yaml, line 1 column \d+: not valid YAML"),
        ("", ["run.dir=[a"], r"override 'run.dir=\[a', line 1.*not valid YAML"),
    ],
)
def test_bad_input_is_one_clear_line(tmp_path, text, overrides, wanted):
    with pytest.raises(ValueError) as raised:
        load_config(write(tmp_path, text), overrides)
    assert re.search(wanted, str(raised.value)), raised.value
    assert "\n" not in str(raised.value)


def test_missing_or_unreadable_file(tmp_path):
    with pytest.raises(ValueError, match=r"no\.yaml: cannot read the configuration file: No such file"):
        load_config(tmp_path / "no.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not UTF-8"):
        load_config(tmp_path / "bytes.yaml")
