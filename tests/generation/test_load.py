"""A run directory comes back as the model that was saved."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import save_file

from ernie5.config import Config, dump_config
from ernie5.generation.load import load_run, newest_checkpoint
from ernie5.model import Ernie5Config, Ernie5ForCausalLM
from ernie5.tokenizers.fingerprint import record_tokenizers
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


def test_a_step_of_the_trainer_loads_with_its_optimizer_state_and_not_by_it_alone(run_dir: Path) -> None:
    save(run_dir, "step-3", 1)
    for step in (3, 9):
        folder = run_dir / "checkpoints" / f"step-{step}"
        folder.mkdir(exist_ok=True)
        save_file({"a|moment1_0": np.zeros(3, np.float32)}, folder / "optimizer.safetensors")
    (run_dir / "checkpoints" / "step-9" / "config.json").write_text("{}")
    assert newest_checkpoint(run_dir).name == "step-3"
    model, _, _ = load_run(run_dir)
    np.testing.assert_array_equal(next(iter(model.state_dict().values())).numpy(), next(iter(weights(1).values())))


@pytest.mark.parametrize(
    ("changed", "fits"), [({"preset": "mine", "recompute": True}, True), ({"audio_codebook_size": 21}, False)]
)
def test_a_checkpoint_of_another_shape(run_dir: Path, tmp_path: Path, changed: dict, fits: bool) -> None:
    other = Ernie5ForCausalLM(Ernie5Config.from_model_config(replace(MODEL, **changed)), seed=0)
    other.save_pretrained(str(tmp_path / "other"))
    if fits:
        load_run(run_dir, tmp_path / "other")
    else:
        with pytest.raises(ValueError, match=r"audio_codebook_size 21.*config.yaml says 20; choose") as caught:
            load_run(run_dir, tmp_path / "other")
        assert "\n" not in str(caught.value)


def test_tokenizers_trained_anew_are_named(run_dir: Path) -> None:
    save(run_dir, "final", 1)
    note = run_dir / "tokenizers" / "text" / "config.json"
    note.parent.mkdir(parents=True)
    note.write_text("1")
    record_tokenizers(run_dir / "tokenizers", run_dir / "checkpoints")
    load_run(run_dir)
    note.write_text("2")
    with pytest.raises(ValueError, match="was trained anew since the checkpoints"):
        load_run(run_dir)
