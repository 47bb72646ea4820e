"""A run directory comes back as the model that was saved."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from ernie5.config import Config, dump_config
from ernie5.generation.load import load_run, newest_checkpoint
from tests.generation.stand_ins import MODEL, SCALES, StandIns, tiny_model


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    bundle = SimpleNamespace(Tokenizers=SimpleNamespace(load=lambda folder: StandIns()))
    monkeypatch.setitem(sys.modules, "ernie5.tokenizers.bundle", bundle)
    config = Config(model=MODEL)
    vision, audio = config.tokenizers.vision, config.tokenizers.audio
    vision.image_size, vision.scales, vision.bits = 24, SCALES, [4, 8]
    vision.channels, vision.vit_dim = MODEL.vision_cnn_dim, MODEL.vision_vit_dim
    config.tokenizers.text.vocab_size = MODEL.vocab_size
    audio.levels, audio.codebook_size, audio.speaker_dim = (
        MODEL.audio_levels,
        MODEL.audio_codebook_size,
        MODEL.speaker_dim,
    )
    folder = tmp_path / "run"
    dump_config(config, folder / "config.yaml")
    return folder


def save(run_dir: Path, name: str, seed: int) -> None:
    tiny_model(seed).save_pretrained(str(run_dir / "checkpoints" / name), safe_serialization=True)


def weights(seed: int) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in tiny_model(seed).state_dict().items()}


def test_final_weights_win_over_steps(run_dir: Path) -> None:
    save(run_dir, "step-20", 1)
    save(run_dir, "final", 2)
    model, _, config = load_run(run_dir)
    assert not model.training
    assert config.model.audio_levels == 3
    for name, expected in weights(2).items():
        np.testing.assert_array_equal(model.state_dict()[name].numpy(), expected)


def test_the_highest_complete_step_else(run_dir: Path) -> None:
    for step, seed in ((3, 1), (20, 2), (9, 3)):
        save(run_dir, f"step-{step}", seed)
    (run_dir / "checkpoints" / "step-100").mkdir()
    assert newest_checkpoint(run_dir).name == "step-20"
    assert load_run(run_dir, run_dir / "checkpoints" / "step-3")[0] is not None


@pytest.mark.parametrize(
    ("missing", "message"), [("run", "no such run directory"), ("checkpoints", "no complete checkpoint")]
)
def test_what_is_missing_is_named(run_dir: Path, missing: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_run(run_dir / "other" if missing == "run" else run_dir)


def test_a_checkpoint_that_is_not_complete(run_dir: Path) -> None:
    with pytest.raises(ValueError, match="no complete checkpoint here; expected"):
        load_run(run_dir, run_dir)
