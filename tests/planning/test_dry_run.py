"""Parts built without memory against the plan, for every shipped configuration."""

from __future__ import annotations

from pathlib import Path

import pytest

from ernie5.config import ParallelConfig, load_config, model_preset
from ernie5.planning import Layout, shards
from ernie5.planning.dry_run import dry_run

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "fleet_configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_config_is_built_as_planned(path):
    config = load_config(path)
    layout = Layout.of(config.parallel)
    built = list(dry_run(config.model, layout))
    assert len(built) == layout.pipeline
    assert [part.differences for part in built if part.differences] == []


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("TENSOR_AXES", {}, "layers.0.attention.q_proj.weight is (128, 64), planned (128, 128)"),
        ("HOME_OF_TOP", ("norm.",), "bit_head.weight is planned but not built"),
    ],
)
def test_a_wrong_plan_is_seen(monkeypatch, name, value, wanted):
    monkeypatch.setattr(shards, name, value)
    layout = Layout.of(ParallelConfig(tensor=2, pipeline=2))
    assert wanted in next(iter(dry_run(model_preset("nano"), layout))).differences
