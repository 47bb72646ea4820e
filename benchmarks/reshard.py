"""Checkpoints saved in one layout and resumed in another, and runs whose processes are killed.

    python benchmarks/reshard.py [--layouts one dp2 tp2 ...] [--kills 20] --json reshard.json

Every layout trains a tiny model for some steps and saves; then every layout continues from every other's checkpoint. In
float64 on the reference ops the losses must be those of one process that was never stopped. The model and its rows are
those of ``parity.py``; the processes are real and talk over gloo.

Then ranks of a run that saves at every step are killed at random moments, half of them while it saves, and the run is
started again each time. Each time the newest checkpoint must be whole and no older than the last one announced, and in
the end losses and weights must be the very bits of a run without kills.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.parity import LAYOUTS, ROWS, SHAPE, Rows  # noqa: E402
from ernie5.checkpoint import ALONE, Checkpoint, step_checkpoints  # noqa: E402
from ernie5.checkpoint.run import step_of  # noqa: E402
from ernie5.files import write_json  # noqa: E402

ONE = "one"
CHOSEN = (ONE, "dp2", "tp2", "pp2", "ep2", "zero1x2", "zero2x2", "cp2", "tp2.pp2", "ep2.tp2")
KILLED = "pp2.ep2"
LIMIT, BEFORE, AFTER, SECONDS = 1e-8, 3, 6, 600  # steps before the checkpoint, and at the end


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    if options.worker:
        work(options.worker, options.steps, options.save_every, [Path(run) for run in options.runs])
        return 0
    unknown = [name for name in options.layouts if name != ONE and name not in LAYOUTS]
    if unknown:
        print(f"reshard: no layout {unknown[0]!r}; there are {ONE}, {', '.join(LAYOUTS)}", file=sys.stderr)
        return 2
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        if len(options.layouts) > 1:
            figures |= reshard(options.layouts, Path(folder))
        if options.kills:
            figures |= kill(options.kill_layout, options.kills, options.seed, Path(folder))
    if options.json:
        write_json(Path(options.json), {"figures": figures, "layouts": options.layouts, "seed": options.seed})
    judged = [v for k, v in figures.items() if k != "kills" and not k.startswith("killed_while")]
    return 0 if all(value <= LIMIT for value in judged) else 1


# ------------------------------------------------------------------------------------------------ every pair of layouts


def reshard(layouts: list[str], folder: Path) -> dict[str, float]:
    """Largest relative difference of losses and of final weights, over all ordered pairs and of each."""
    print("never stopped", flush=True)
    launch(ONE, AFTER, 0, [folder / "whole"])
    expected = losses(folder / "whole"), weights(folder / "whole")
    for name in tqdm(layouts, desc="trains and saves", mininterval=1):
        launch(name, BEFORE, 0, [folder / f"from-{name}"])
    figures = {}
    for target in tqdm(layouts, desc="continues from every other", mininterval=1):
        runs = {source: folder / f"{source}-to-{target}" for source in layouts}
        for source, run in runs.items():
            step = Path("checkpoints") / f"step-{BEFORE}"
            shutil.copytree(folder / f"from-{source}" / step, run / step)
        launch(target, AFTER, 0, list(runs.values()))
        for source, run in runs.items():
            found = losses(run), weights(run)
            pair = f"{source}->{target}"
            figures[f"loss:{pair}"] = difference(expected[0], found[0], lambda value: np.abs(value))
            figures[f"parameters:{pair}"] = difference(expected[1], found[1], lambda value: np.abs(value).max())
            shutil.rmtree(run)
    for kind in ("loss", "parameters"):
        figures[f"{kind}_max"] = max(v for k, v in figures.items() if k.startswith(f"{kind}:"))
        print(f"{len(layouts) ** 2} ordered pairs: largest difference of {kind} {figures[f'{kind}_max']:.1e}")
    return figures


def difference(expected: dict, found: dict, scale: object) -> float:
    assert expected.keys() == found.keys(), sorted(expected.keys() ^ found.keys())
    pairs = [(value, found[key]) for key, value in expected.items()]
    return max(float((np.abs(b - a) / np.maximum(scale(a), 1e-12)).max()) for a, b in pairs)


def losses(run: Path) -> dict[str, np.ndarray]:
    """Every loss of the steps after the checkpoint."""
    records = [json.loads(line) for line in (run / "train_log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, records[-1]["step"] + 1))
    return {
        f"{record['step']}/{name}": np.float64(value)
        for record in records[BEFORE:]
        for name, value in record.items()
        if name.startswith("loss")
    }


def weights(run: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return load_file(run / "checkpoints" / "final" / "model.safetensors")


# ----------------------------------------------------------------------------------------------------------- kill -9


def kill(layout: str, kills: int, seed: int, folder: Path) -> dict[str, float]:
    """What the kills did: corrupt or too old checkpoints, and the difference from a run without kills."""
    from ernie5.parallel.launch import LaunchError

    rng, run, steps = random.Random(seed), folder / "killed", 3 * kills + 4
    launch(layout, steps, 1, [folder / "unharmed"])
    corrupt = older = 0
    while_saving, announced = 0, -1
    for number in tqdm(range(kills), desc=f"kill -9 of a rank of {layout}", mininterval=1):
        saving = number % 2 == 0
        with killer(run, announced, saving, rng) as victim, contextlib.suppress(LaunchError):
            launch(layout, steps, 1, [run], folder / "logs")
            raise SystemExit(f"the run ended before kill {number + 1}; give it more steps")
        announced = max(announced, last_announced(folder / "logs" / "rank-0.log"))
        while_saving += bool(victim.get("saving"))
        newest = step_checkpoints(run)[-1:] or [None]
        found = step_of(newest[0]) if newest[0] else -1
        older += found < announced
        corrupt += not _whole(newest[0])
    assert announced > 0, f"no checkpoint was announced; see {folder / 'logs'}"
    launch(layout, steps, 1, [run])
    same = (run / "train_log.jsonl", folder / "unharmed" / "train_log.jsonl")
    killed, unharmed = ([_without_times(line) for line in path.read_text().splitlines()] for path in same)
    apart = difference(weights(folder / "unharmed"), weights(run), lambda value: np.abs(value).max())
    figures = {"kills": kills, "killed_while_saving": while_saving, "corrupt": corrupt, "older_than_announced": older}
    figures |= {"killed_steps_that_differ": sum(a != b for a, b in zip(killed, unharmed, strict=True))}
    figures |= {"killed_parameters": apart}
    print(json.dumps(figures))
    return figures


@contextlib.contextmanager
def killer(run: Path, announced: int, saving: bool, rng: random.Random) -> Iterator[dict]:
    """Kills one of the processes at a random moment once the run has gone on, or while a checkpoint is written."""
    done, victim = threading.Event(), {}

    def wait_and_kill() -> None:
        goal = announced + rng.randint(2, 3)
        while not done.wait(0.002):
            if any(step_of(path) >= goal for path in step_checkpoints(run)):
                break
        partial = run / "checkpoints"
        while saving and not done.wait(0.0002) and not any(partial.glob(".step-*.partial")):
            pass
        done.wait(rng.uniform(0, 0.004 if saving else 0.5))
        pids = [int(path.read_text()) for path in sorted(run.glob("pid-*"))]
        if pids and not done.is_set():
            victim["saving"] = any(partial.glob(".step-*.partial"))
            with contextlib.suppress(ProcessLookupError):
                os.kill(rng.choice(pids), signal.SIGKILL)

    thread = threading.Thread(target=wait_and_kill)
    thread.start()
    try:
        yield victim
    finally:
        done.set()
        thread.join()


def last_announced(log: Path) -> int:
    names = [line.split()[1] for line in log.read_text().splitlines() if line.startswith("checkpoint step-")]
    return max([int(name.removeprefix("step-")) for name in names], default=-1)


def _whole(folder: Path | None) -> bool:
    if folder is None:
        return True
    try:
        with Checkpoint(folder) as checkpoint:
            checkpoint.verify(ALONE)
    except ValueError as error:
        print(error, file=sys.stderr)
        return False
    return True


def _without_times(line: str) -> dict:
    return {name: value for name, value in json.loads(line).items() if name != "tokens_per_second"}


# ------------------------------------------------------------------------------------------------ inside the processes


def launch(layout: str, steps: int, save_every: int, runs: list[Path], logs: Path | None = None) -> None:
    """Trains each of ``runs`` to ``steps``, one after the other in the same processes."""
    from ernie5.parallel.launch import launch as start

    if logs:
        logs.mkdir(exist_ok=True)
    command = [sys.executable, __file__, "--worker", layout, "--steps", str(steps), "--save-every", str(save_every)]
    ranks = 1 if layout == ONE else LAYOUTS[layout][0]
    start([*command, "--runs", *map(str, runs)], ranks, SECONDS, {"ERNIE5_KERNELS": "reference"}, logs)


def work(layout: str, steps: int, save_every: int, runs: list[Path]) -> None:
    """One process of ``layout``."""
    import paddle

    from ernie5.config.schema import Config, DataConfig, ParallelConfig, TrainerConfig
    from ernie5.model import Ernie5Config, Ernie5ForCausalLM
    from ernie5.parallel.worker import Worker
    from ernie5.trainer import Ernie5Trainer, training_arguments

    paddle.set_default_dtype("float64")
    shape = Ernie5Config(**SHAPE)
    worker = None if layout == ONE else Worker(shape, ParallelConfig(**LAYOUTS[layout][1]), seed=1)
    rank, readers = (worker.processes.rank, worker.row_ranks) if worker else (0, 1)
    model = worker.model if worker else Ernie5ForCausalLM(shape, seed=1)
    for run in runs:
        run.mkdir(parents=True, exist_ok=True)
        (run / f"pid-{rank}").write_text(str(os.getpid()))
        trainer = TrainerConfig(
            max_steps=steps,
            rows_per_step=1,
            gradient_accumulation=ROWS // readers,
            learning_rate=1e-2,
            warmup_steps=1,
            decay_fraction=0.0,
            save_steps=save_every or BEFORE,
            log_steps=1000,
        )
        args = training_arguments(Config(trainer=trainer, data=DataConfig(workers=0)), run)
        Ernie5Trainer(model=model, args=args, train_dataset=_Dataset(), data_collator=_wide, worker=worker).train(
            resume=True
        )


class _Dataset:
    """Row i of ``parity.Rows``."""

    def __init__(self) -> None:
        self.rows = Rows()

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        return self.rows.batch([i])


def _wide(rows: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    (batch,) = rows
    return {name: value.astype(np.float64) if value.dtype.kind == "f" else value for name, value in batch.items()}


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layouts", nargs="*", default=list(CHOSEN), help=f"out of {ONE}, {', '.join(LAYOUTS)}")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--kill-layout", default=KILLED, help="whose processes are killed")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and ranks")
    parser.add_argument("--json", help="where the figures go")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--save-every", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--runs", nargs="*", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
