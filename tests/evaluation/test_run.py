"""Figures stand in one file only when they were measured on the same items of the same weights."""

from __future__ import annotations

import json

import pytest

from ernie5.config import Config
from ernie5.evaluation import run
from ernie5.evaluation.measure import Measurement
from ernie5.evaluation.samples import Exhibit, read_index


@pytest.fixture
def evaluated(tmp_path, monkeypatch):
    """``evaluate`` over a run whose model is absent and whose metrics give their key's length."""
    final = tmp_path / "run" / "checkpoints" / "final"
    final.mkdir(parents=True)
    (final / "config.json").write_text("{}")
    (final / "model.safetensors").write_text("weights")
    (tmp_path / "run" / "train_log.jsonl").write_text('{"step": 7}\n')

    def measured(scope, only):
        assert scope.out_dir is not None
        keys = only or ["params_total", "text_bits_per_char"]
        return Measurement({key: len(key) for key in keys}, [Exhibit(key, "text", key, "") for key in keys])

    monkeypatch.setattr(run, "run_config", lambda run_dir: Config())
    monkeypatch.setattr(run, "load_run", lambda run_dir, checkpoint: (None, None, Config()))
    monkeypatch.setattr(run, "_held_out", lambda config: {})
    monkeypatch.setattr(run, "measure", measured)
    return lambda **options: run.evaluate(tmp_path / "run", **options)


def test_seed_items_and_weights_are_recorded(evaluated):
    values = evaluated(seed=3, items=20)
    assert (values["evaluation_seed"], values["evaluation_items"]) == (3, 20)
    assert (values["evaluation_checkpoint"], values["evaluation_step"]) == ("final", 7)


def test_figures_of_the_same_items_and_weights_are_kept(evaluated, tmp_path, capsys):
    evaluated()
    values = evaluated(only=["expert_load_entropy"])
    assert {"params_total", "expert_load_entropy"} <= set(values)
    assert {entry.section for entry in read_index(tmp_path / "run" / "samples")} >= {"params_total"}
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("other", ["seed", "items", "weights"])
def test_figures_of_other_items_or_weights_are_not(other, evaluated, tmp_path, capsys):
    evaluated()
    options = {"seed": {"seed": 1}, "items": {"items": 7}, "weights": {}}[other]
    if other == "weights":
        (tmp_path / "run" / "checkpoints" / "final" / "model.safetensors").write_text("later weights")
    values = evaluated(only=["text_bits_per_char"], **options)
    assert "params_total" not in values and values["text_bits_per_char"] == 18
    assert [entry.section for entry in read_index(tmp_path / "run" / "samples")] == ["text_bits_per_char"]
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and f"evaluation_{other}" in error[0]


def test_everything_goes_beside_the_named_file(evaluated, tmp_path):
    evaluated(out=tmp_path / "other" / "figures.json")
    assert json.loads((tmp_path / "other" / "figures.json").read_text())["params_total"] == 12
    assert (tmp_path / "other" / "samples" / "index.json").is_file()
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["checkpoints", "train_log.jsonl"]
