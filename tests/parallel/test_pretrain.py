"""``tools/pretrain.py`` as several processes: the same losses as one, which also goes on where they stopped."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from visualdl.reader.reader import LogReader

from ernie5.parallel.launch import LaunchError, launch
from tests.trainer.test_pretrain import TOOL, config_file  # noqa: F401  (a fixture)

ROOT = Path(__file__).parents[2]
SIZES = ["model.num_kv_heads=2", "trainer.rows_per_step=1", "trainer.warmup_steps=1", "trainer.decay_fraction=0"]


def train(config: Path, ranks: int, run_dir: Path, *overrides: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """(loss of every step, final weights)."""
    if not run_dir.exists():
        run_dir.mkdir()
        for name in ("tokenizers", "data"):
            (run_dir / name).symlink_to(config.parent / "run" / name)
    command = [sys.executable, str(TOOL), str(config), f"run.dir={run_dir}", *SIZES, *overrides]
    launch(command, ranks, 200, {"PYTHONPATH": str(ROOT)})
    lines = (run_dir / "train_log.jsonl").read_text().splitlines()
    losses = np.array([json.loads(line)["loss"] for line in lines])
    return losses, load_file(run_dir / "checkpoints" / "final" / "model.safetensors")


def expert_scalars(run_dir: Path) -> dict[str, list[float]]:
    """What the dashboards show of the load of every router, by tag."""
    (record,) = (run_dir / "vdl").glob("vdlrecords.*")
    reader = LogReader(file_path=str(record))
    tags = [tag for tag in reader.get_tags()["scalar"] if tag.startswith("experts/")]
    return {tag: [value.value for value in reader.get_data("scalar", tag)] for tag in tags}


@pytest.mark.dist
@pytest.mark.slow
def test_two_stages_of_two_readers_train_as_one_process_which_continues_from_them(config_file, tmp_path):  # noqa: F811
    expected, weights = train(config_file, 1, tmp_path / "one", "trainer.gradient_accumulation=4")
    many = ("trainer.gradient_accumulation=2", "parallel.pipeline=2", "parallel.sharding=2", "parallel.expert=2")
    found, split = train(config_file, 4, tmp_path / "many", *many)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert split.keys() == weights.keys()
    load, wanted = expert_scalars(tmp_path / "many"), expert_scalars(tmp_path / "one")
    assert load.keys() == wanted.keys() and "experts/max_over_mean/router_02" in load, "of both stages, and of MTP"
    for tag, values in wanted.items():
        np.testing.assert_allclose(load[tag], values, rtol=0.05, err_msg=tag)
    shutil.rmtree(tmp_path / "many" / "checkpoints" / "step-4")  # the newest is now step-2, of the four processes
    found, split = train(config_file, 1, tmp_path / "many", "trainer.gradient_accumulation=4")
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    for name, value in weights.items():
        np.testing.assert_allclose(split[name], value, atol=1e-2, err_msg=name)
    with pytest.raises(LaunchError, match=r"rows_per_step x gradient_accumulation x readers: 4 -> 1\); --resume"):
        train(config_file, 1, tmp_path / "many", "trainer.max_steps=5")


@pytest.mark.dist
def test_degrees_that_do_not_fit_end_every_process_with_one_line(config_file, tmp_path):  # noqa: F811
    with pytest.raises(LaunchError, match=r"rank \d\] pretrain: parallel: tensor 1 .* = 3 does not divide the 2 proc"):
        train(config_file, 2, tmp_path / "run3", "parallel.sharding=3")
