"""Whole runs of a tiny model: ten-line use, what a run leaves, batch ramp, guards, resume, refused checkpoints."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from ernie5.checkpoint import ALONE, Checkpoint, Saver, forget_run, step_checkpoints
from ernie5.model import Ernie5ForCausalLM
from ernie5.trainer import Ernie5Trainer, NonFiniteError, training_arguments
from ernie5.trainer.metrics import interval_means, load_metrics
from tests.trainer.tiny_run import SHAPE, MadeUpRows, tiny_config, tiny_model, tiny_trainer

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "tests.trainer.tiny_run"]
TIMED = {"tokens_per_second"}


def read_log(run_dir: Path) -> list[dict]:
    lines = (run_dir / "train_log.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name not in TIMED} for line in lines]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 14 steps with a growing batch, never interrupted, in a process of its own."""
    run_dir = tmp_path_factory.mktemp("finished")
    subprocess.run([*COMMAND, run_dir, "14"], cwd=ROOT, check=True, timeout=120)
    return run_dir


def test_ten_lines_train_and_leave_weights(tmp_path: Path) -> None:
    trainer = Ernie5Trainer(
        model=tiny_model(),
        args=training_arguments(tiny_config(2), tmp_path),
        train_dataset=MadeUpRows(),
    )
    trainer.train()
    assert [record["step"] for record in read_log(tmp_path)] == [1, 2]
    saved = load_file(tmp_path / "checkpoints" / "final" / "model.safetensors")
    for name, tensor in trainer.model.state_dict().items():
        np.testing.assert_array_equal(tensor.numpy(), saved[name])


def test_the_loss_falls(finished: Path) -> None:
    log = read_log(finished)
    assert log[-1]["loss/text"] < log[0]["loss/text"] - 0.2
    assert {"loss", "loss/text", "loss/mtp", "loss/image", "loss/audio", "learning_rate", "grad_norm"} <= set(log[0])


def test_the_batch_ramp_grows_what_a_step_consumes(finished: Path) -> None:
    log = read_log(finished)
    accumulation = [1] * 5 + [2] * 4 + [3] * 5
    assert [record["accumulation"] for record in log] == accumulation
    assert [record["rows_consumed"] for record in log] == (2 * np.cumsum(accumulation)).tolist()


def test_accumulation_is_the_mean_over_micro_batches(tmp_path: Path) -> None:
    """Two micro-batches of two rows each give the gradient that the mean of their losses has."""
    trainer = tiny_trainer(tmp_path, tiny_config(1, gradient_accumulation=2))
    trainer.train()
    model = tiny_model()
    model.set_loss_weights(0.3, 0.5, 2.0, {})
    model.train()
    import paddle

    total = 0.0
    for k in range(2):
        batch = trainer.data_collator([MadeUpRows()[2 * k], MadeUpRows()[2 * k + 1]])
        loss = model(**{name: paddle.to_tensor(value) for name, value in batch.items()})["loss"] / 2
        loss.backward()
        total += float(loss)
    squares = [float((p.grad.astype("float64") ** 2).sum()) for p in model.parameters() if p.grad is not None]
    (record,) = read_log(tmp_path)
    assert record["grad_norm"] == pytest.approx(sum(squares) ** 0.5, rel=1e-4)
    assert record["loss"] == pytest.approx(total, rel=1e-6)


def test_visualdl_holds_losses_and_expert_load(finished: Path) -> None:
    from visualdl.reader.reader import LogReader

    (record,) = (finished / "vdl").glob("vdlrecords.*")
    tags = LogReader(file_path=str(record)).get_tags()
    assert {"loss", "loss/text", "loss/image", "run/learning_rate", "run/tokens_per_second"} <= set(tags["scalar"])
    assert {"experts/normalised_entropy/router_00", "experts/dead_experts/router_02"} <= set(tags["scalar"])
    assert "experts/load/router_00" in tags["histogram"]
    values = LogReader(file_path=str(record)).get_data("scalar", "loss")
    assert [value.id for value in values] == [1, 3, 6, 9, 12, 14]


def test_router_biases_move_towards_the_mean_load(finished: Path) -> None:
    saved = load_file(finished / "checkpoints" / "final" / "model.safetensors")
    biases = [value for name, value in saved.items() if name.endswith("correction_bias")]
    assert len(biases) == SHAPE.num_layers + 1
    for bias in biases:
        assert np.abs(bias).max() > 0
        np.testing.assert_allclose(bias / 1e-3, np.round(bias / 1e-3), atol=1e-3)  # whole numbers of updates


# ---------------------------------------------------------------------- resume


def test_a_killed_run_resumes_bit_equal(finished: Path, tmp_path: Path) -> None:
    """SIGKILL twice while steps after a checkpoint are under way; each relaunch repeats them exactly and goes on."""
    log = tmp_path / "train_log.jsonl"
    for until, resume in ((6, []), (10, ["--resume"])):
        _run_until_killed(tmp_path, until, resume)
        with log.open("a") as file:
            file.write('{"step": 99, "lo')  # a line the kill cut
        (tmp_path / "checkpoints" / f".step-{until}.1.partial").mkdir()
    subprocess.run([*COMMAND, tmp_path, "14", "--resume"], cwd=ROOT, check=True, timeout=120)
    assert read_log(tmp_path) == read_log(finished)
    whole = load_file(finished / "checkpoints" / "final" / "model.safetensors")
    resumed = load_file(tmp_path / "checkpoints" / "final" / "model.safetensors")
    assert whole.keys() == resumed.keys()
    for name, value in whole.items():
        np.testing.assert_array_equal(resumed[name], value)
    assert not list((tmp_path / "checkpoints").glob(".*"))


def _run_until_killed(run_dir: Path, step: int, resume: list[str]) -> None:
    """Kills a run once ``step`` is in its log; checkpoints come every 4 steps, so one of another step is the newest."""
    process = subprocess.Popen([*COMMAND, run_dir, "14", "--pause", "0.05", *resume], cwd=ROOT)
    log = run_dir / "train_log.jsonl"
    deadline = time.time() + 60
    while f'"step": {step},' not in (log.read_text() if log.exists() else ""):
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.01)
    process.kill()
    process.wait()


def test_random_states_continue(tmp_path: Path) -> None:
    import random

    import paddle

    from ernie5.trainer.state import random_text, restore_random

    for draw in (lambda: random.random(), lambda: np.random.rand(2).tolist(), lambda: paddle.rand([2]).tolist()):  # noqa: NPY002
        draw()
        Saver(tmp_path, ALONE, background=False).save(3, {}, random_text(), {})
        expected = [draw(), draw()]
        restore_random(Checkpoint(tmp_path / "checkpoints" / "step-3"), 0, 1)
        assert [draw(), draw()] == expected


def test_resuming_a_finished_run_changes_nothing_and_more_steps_extend_it(tmp_path: Path) -> None:
    tiny_trainer(tmp_path, tiny_config(5)).train()
    before = read_log(tmp_path)
    weights = load_file(tmp_path / "checkpoints" / "final" / "model.safetensors")
    tiny_trainer(tmp_path, tiny_config(5)).train(resume=True)
    assert read_log(tmp_path) == before
    after = load_file(tmp_path / "checkpoints" / "final" / "model.safetensors")
    for name, value in weights.items():
        np.testing.assert_array_equal(after[name], value)
    tiny_trainer(tmp_path, tiny_config(6)).train(resume=True)
    assert [record["step"] for record in read_log(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_a_run_is_never_overwritten_unasked(tmp_path: Path) -> None:
    tiny_trainer(tmp_path, tiny_config(4)).train()
    with pytest.raises(ValueError, match="already holds a run"):
        tiny_trainer(tmp_path, tiny_config(4)).train()
    forget_run(tmp_path)
    tiny_trainer(tmp_path, tiny_config(2)).train()
    assert [path.name for path in step_checkpoints(tmp_path)] == ["step-2"]


def test_only_the_newest_checkpoints_are_kept(finished: Path) -> None:
    assert [path.name for path in step_checkpoints(finished)] == ["step-12", "step-14"]


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_layers": 3}, r"'layers\.2\..*' \[32.*\] of the model is not in it"),
        ({"vocab_size": 96}, r"'embedding.tokens.weight' is \[64, 32\], the model expects \[96, 32\]"),
        ({"mtp_depth": 0}, "the model has no 'mtp"),
    ],
)
def test_a_checkpoint_of_another_shape_is_refused(tmp_path: Path, change, message: str) -> None:
    tiny_trainer(tmp_path, tiny_config(4)).train()
    with pytest.raises(ValueError, match=message) as caught:
        tiny_trainer(tmp_path, tiny_config(8), model=tiny_model(**change)).train(resume=True)
    assert "checkpoint of another shape" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model-00000-000.safetensors", b"{", "1 bytes, the manifest says"),
        ("optimizer-00000-000.safetensors", None, "its contents have changed"),
        ("training.json", b"{}", "2 bytes, the manifest says"),
        ("manifest.json", b"{", "unreadable complete checkpoint"),
    ],
)
def test_a_corrupt_checkpoint_is_refused(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    tiny_trainer(tmp_path, tiny_config(2)).train()
    path = tmp_path / "checkpoints" / "step-2" / name
    path.write_bytes(content or path.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match=f"{name}: {message}"):
        tiny_trainer(tmp_path, tiny_config(8)).train(resume=True)


def test_a_step_can_be_loaded_as_a_model(finished: Path) -> None:
    whole = Ernie5ForCausalLM.from_pretrained(finished / "checkpoints" / "final").state_dict()
    for name, tensor in Ernie5ForCausalLM.from_pretrained(finished / "checkpoints" / "step-14").state_dict().items():
        np.testing.assert_array_equal(tensor.numpy(), whole[name].numpy())


def test_a_loss_that_is_not_finite_stops_before_the_update(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, tiny_config(8, gradient_accumulation=2), MadeUpRows(poison=10))
    message = r"step 3: loss is not finite .* on rows 8\.\.11; stopped before the update"
    with pytest.raises(NonFiniteError, match=message):
        trainer.train()
    assert [record["step"] for record in read_log(tmp_path)] == [1, 2]
    twin_dir = tmp_path / "twin"
    twin = tiny_trainer(twin_dir, tiny_config(8, gradient_accumulation=2, save_steps=2))
    twin.args.max_steps = 8
    _stop_after(twin, 2)
    twin.train()
    weights = {name: tensor.numpy() for name, tensor in twin.model.named_parameters()}
    for name, tensor in trainer.model.named_parameters():
        np.testing.assert_array_equal(tensor.numpy(), weights[name])
    report = json.loads((tmp_path / "nonfinite_step_3.json").read_text())
    assert report["step"] == 3 and report["quantity"] == "loss" and report["rows_of_the_step"] == [8, 9, 10, 11]
    assert [entry["row"] for entry in report["last_micro_batch"]] == [10, 11]
    assert report["last_micro_batch"][0]["content"] == {"task": "made_up", "number": 10}
    assert report["last_micro_batch"][0]["positions"] == {"text": 12, "image_gen": 8, "audio_gen": 4}
    batch = np.load(tmp_path / "nonfinite_step_3.npz")
    assert np.isinf(batch["loss_weight"][0, 3]) and np.isfinite(batch["loss_weight"][1]).all()


def _stop_after(trainer: Ernie5Trainer, step: int) -> None:
    from ernie5.paddlenlp import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs) -> None:
            control.should_training_stop = state.global_step >= step

    trainer.add_callback(Stop())


# ---------------------------------------------------------------------- figures


def test_load_metrics_know_the_extremes() -> None:
    figures = load_metrics(np.array([[5, 5, 5, 5], [20, 0, 0, 0], [0, 0, 0, 0], [10, 10, 0, 0]]))
    np.testing.assert_allclose(figures["max_over_mean"], [1, 4, 0, 2])
    np.testing.assert_allclose(figures["normalised_entropy"], [1, 0, 0, 0.5], atol=1e-12)
    assert figures["dead_experts"].tolist() == [0, 3, 4, 2]


def test_interval_means_weigh_speed_by_time() -> None:
    records = [
        {"step": 1, "loss": 1.0, "loss/text": 4.0, "tokens": 100, "tokens_per_second": 50.0, "learning_rate": 0.1},
        {"step": 2, "loss": 3.0, "tokens": 100, "tokens_per_second": 100.0, "learning_rate": 0.2},
    ]
    means = interval_means(records)
    assert means["loss"] == 2.0 and means["loss/text"] == 4.0 and means["learning_rate"] == 0.2
    assert means["tokens_per_second"] == pytest.approx(200 / 3)
