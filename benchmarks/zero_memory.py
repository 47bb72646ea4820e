#!/usr/bin/env python
"""What ZeRO leaves on a rank: bytes of optimizer state, and the most that a step takes beside parameters and state.

    python benchmarks/zero_memory.py --json out.json

Each layout trains the preset ``nano`` of four blocks for two steps on rows of text, as real processes over gloo.
Figures are those of the fullest rank, in MB: AdamW's moments, and Paddle's own count of the peak of the second step's
forward and backward passes and sums of gradients, less what was allocated before it. Beside them, what the planner
says.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks.plan_accuracy import text_rows  # noqa: E402
from ernie5.config import Config, ParallelConfig, TrainerConfig, model_preset  # noqa: E402
from ernie5.files import write_json  # noqa: E402

LAYOUTS: dict[str, tuple[int, dict]] = {  # name -> (processes, degrees)
    "ep2, 4 processes": (4, {"expert": 2}),
    "ep2, zero1x4": (4, {"expert": 2, "sharding": 4}),
    "ep2, zero2x4": (4, {"expert": 2, "sharding": 4, "sharding_stage": 2}),
    "zero1x2": (2, {"sharding": 2}),
    "zero2x2": (2, {"sharding": 2, "sharding_stage": 2}),
    "pp2, zero1x2": (4, {"pipeline": 2, "sharding": 2}),
    "pp2, zero2x2": (4, {"pipeline": 2, "sharding": 2, "sharding_stage": 2}),
}
MICRO_BATCHES, SECONDS = 4, 300
FIGURES = ("state", "step", "planned_state", "planned_step")


def config_of(name: str) -> Config:
    model = replace(model_preset("nano"), num_layers=4, num_kv_heads=2)
    return Config(
        model=model,
        trainer=TrainerConfig(rows_per_step=1, gradient_accumulation=MICRO_BATCHES),
        parallel=ParallelConfig(**LAYOUTS[name][1]),
    )


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    if options.worker:
        work(config_of(options.worker), Path(options.out))
        return 0
    figures = {}
    print(f"{'layout':20}" + "".join(f"{title:>15}" for title in FIGURES))
    for name in options.layouts or LAYOUTS:
        figures[name] = {**measured(name), **planned(name)}
        print(f"{name:20}" + "".join(f"{figures[name][title]:15.2f}" for title in FIGURES), flush=True)
    if options.json:
        write_json(Path(options.json), {"figures": figures, "micro_batches": MICRO_BATCHES})
    return 0


def measured(name: str) -> dict[str, float]:
    """MB of the fullest rank."""
    from ernie5.parallel.launch import launch

    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--worker", name, "--out", folder]
        launch(command, LAYOUTS[name][0], SECONDS)
        ranks = [json.loads(path.read_text()) for path in Path(folder).iterdir()]
    return {title: max(rank[title] for rank in ranks) / 1e6 for title in ("state", "step")}


def planned(name: str) -> dict[str, float]:
    """MB of the fullest stage."""
    from ernie5.planning import load_machine, make_plan

    stages = [
        stage.memory for stage in make_plan(name, config_of(name), load_machine("laptop"), LAYOUTS[name][0]).stages
    ]
    return {
        "planned_state": max(stage.optimizer for stage in stages) / 1e6,
        "planned_step": max(stage.gradients + stage.activations + stage.working for stage in stages) / 1e6,
    }


def work(config: Config, folder: Path) -> None:
    """Two steps in one of the processes; leaves its bytes in ``folder``."""
    import paddle
    from paddle.base import core

    from ernie5.model import Ernie5Config
    from ernie5.parallel.worker import Worker
    from ernie5.sequence.packing import collate
    from ernie5.trainer.optimizer import GuardedClip, build_optimizer

    worker = Worker(Ernie5Config.from_model_config(config.model), config.parallel)
    worker.model.train()
    inner = build_optimizer(worker.model, 1e-4, (0.9, 0.95), 1e-8, 0.1, GuardedClip(1.0, lambda norm: None))
    optimizer = worker.optimizer(inner)
    rows = text_rows(config.model, MICRO_BATCHES)
    for _ in range(2):
        before = core.host_memory_stat_current_value("Allocated", 0)
        core.host_memory_stat_reset_peak_value("Allocated", 0)
        losses = worker.forward_backward([collate([row]) for row in rows])
        peak = core.host_memory_stat_peak_value("Allocated", 0)
        optimizer.step()
        optimizer.clear_grad(set_to_zero=False)
        worker.finish_step(losses, 0.0)
    state = sum(
        value.size * value.element_size()
        for values in inner._accumulators.values()
        for value in values.values()
        if isinstance(value, paddle.Tensor)
    )
    write_json(folder / f"{os.environ['PADDLE_TRAINER_ID']}.json", {"state": state, "step": peak - before})


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layouts", nargs="*", choices=sorted(LAYOUTS), help="all of them by default")
    parser.add_argument("--json", help="where the figures go")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
