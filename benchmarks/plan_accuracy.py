#!/usr/bin/env python
"""What ``tools/plan.py`` predicts against what training takes: peak memory, parameter counts, the order of step times.

    python benchmarks/plan_accuracy.py --json out.json

Every run has processes of its own, as many as its layout asks for, which share the threads; several talk over gloo.
Rows are text, one of each process with a short document of every other modality. Memory is the most that a process
holds resident, less what it held before the model was built; the figure is the largest error of any process. Time is
the fastest of a few steps of the slowest process. Two runs have an order where their times differ by more than a tenth;
less is within what the same run differs by from one time to the next. The prediction is that of the machine ``laptop``.
Parameters are counted in models built without memory, whole and as each rank has them, for every file in
``fleet_configs/`` and every preset, and in the processes that were measured.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from tqdm import tqdm  # noqa: E402

from benchmarks import common  # noqa: E402
from benchmarks.plan_runs import LINK, RUNS  # noqa: E402
from ernie5.config import PRESETS, ModelConfig, ParallelConfig, load_config, model_preset, num_params  # noqa: E402
from ernie5.parallel.launch import LaunchError, launch  # noqa: E402
from ernie5.planning import Layout, Plan, load_machine  # noqa: E402

TIME_LIMIT = 300  # seconds of one run
CLEAR = 1.1  # ratio of two measured times from which their order is expected to be predicted
GIVE_BACK = {"ERNIE5_KEEP_ALLOCATOR": "0", "MALLOC_MMAP_THRESHOLD_": "65536"}

Found = dict[str, Any]  # what ``plan_runs.measure`` returns


def measured(words: str, processes: int, threads: int) -> list[Found]:
    """What the processes of a run found, by rank. Raises ``LaunchError`` with the last words of those that failed."""
    environment = {**GIVE_BACK, "OMP_NUM_THREADS": str(max(1, threads // processes)), "PYTHONPATH": str(common.ROOT)}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.plan_runs", words, folder]
        launch(command, processes, TIME_LIMIT, environment)
        return [json.loads(Path(folder, f"{rank}.json").read_text(encoding="utf-8")) for rank in range(processes)]


def report_memory(report: common.Report, found: dict[str, list[Found]], plans: dict[str, Plan]) -> None:
    """A row for the process of each run that is predicted worst."""
    rows, errors = [], {}
    for name, ranks in found.items():
        predicted = [plans[name].stages[values["stage"]].memory.total for values in ranks]
        off = [abs(size / values["peak"] - 1) for size, values in zip(predicted, ranks, strict=True)]
        rank = off.index(max(off))
        errors[name] = off[rank]
        sizes = predicted[rank], ranks[rank]["peak"], ranks[rank]["allocated"]
        over = [f"{sizes[0] / size - 1:+.1%}" for size in sizes[1:]]
        rows.append([name, f"{rank} of {len(ranks)}", *(f"{size / 2**20:,.0f}" for size in sizes), *over])
    columns = ["run", "rank", "predicted MB", "held", "in tensors", "error", "of tensors"]
    report.table("Memory of the process that is predicted worst", columns, rows)
    several = [errors[name] for name, ranks in found.items() if len(ranks) > 1]
    report.figure("memory_error_max", max(errors.values()))
    report.figure("memory_error_max_several", max(several, default=None))
    report.figure("memory_runs", len(errors))
    report.figure("memory_runs_several", len(several))


def report_time(report: common.Report, found: dict[str, list[Found]], plans: dict[str, Plan]) -> None:
    """``step_time_order``: share of the pairs with clearly different times that the plan orders alike."""
    taken = {name: max(values["seconds"] for values in ranks) for name, ranks in found.items()}
    predicted = {name: plans[name].time.total for name in found}
    ordered = sorted(taken, key=taken.get)
    rows = [[n, f"{predicted[n]:.3f}", f"{taken[n]:.3f}", f"{predicted[n] / taken[n]:.2f}"] for n in ordered]
    report.table("Seconds of a step, the fastest first", ["run", "predicted", "measured", "ratio"], rows)
    pairs = [(a, b) for a, b in combinations(found, 2) if not 1 / CLEAR < taken[a] / taken[b] < CLEAR]
    wrong = [(a, b) for a, b in pairs if (taken[a] < taken[b]) != (predicted[a] < predicted[b])]
    if wrong:
        report.table("Pairs in the wrong order", ["one", "other"], wrong)
    if pairs:
        report.figure("step_time_order", 1 - len(wrong) / len(pairs))
        report.figure("step_time_pairs", len(pairs))


def report_link(report: common.Report, link: Found) -> None:
    """The loopback device beside what the machine's description says of it."""
    machine = load_machine("laptop")
    rows = [
        ["GB/s of a process", f"{link['bandwidth'] / 1e9:.2f}", machine.intra_bandwidth],
        ["seconds of an empty message", f"{link['latency']:.1e}", machine.latency],
        ["more between computations", f"{link['wake_up']:.1e}", machine.wake_up],
    ]
    report.table("All-reduce between two processes", ["what", "measured", "in laptop.yaml"], rows)


def report_parameters(report: common.Report, found: dict[str, list[Found]], plans: dict[str, Plan]) -> None:
    """``parameter_count_difference_max``: over whole models, parts built without memory, and measured processes."""
    differences = {
        name: max(abs(values["parameters"] - plans[name].stages[values["stage"]].held.total) for values in ranks)
        for name, ranks in found.items()
    }
    shapes = {name: (model_preset(name), ParallelConfig()) for name in PRESETS}
    for path in sorted((common.ROOT / "fleet_configs").glob("*.yaml")):
        config = load_config(path)
        shapes[path.name] = config.model, config.parallel
    for name, (model, parallel) in tqdm(shapes.items(), "parameters", leave=False, disable=None):
        differences[name] = max(count_differences(model, Layout.of(parallel)))
    rows = [[name, str(difference)] for name, difference in differences.items() if difference]
    if rows:
        report.table("Parameters counted otherwise", ["model", "difference"], rows)
    report.figure("parameter_count_difference_max", max(differences.values()))
    report.figure("parameter_counts", len(differences))


def count_differences(model: ModelConfig, layout: Layout) -> Iterator[int]:
    """Parameters too many or too few: of the whole model, and of the part of each stage's ranks."""
    import paddle

    from ernie5.model import Ernie5Config, Ernie5ForCausalLM
    from ernie5.planning.dry_run import dry_run
    from ernie5.planning.shards import held_by_stage

    with paddle.LazyGuard():
        built = Ernie5ForCausalLM(Ernie5Config.from_model_config(model))
    yield abs(sum(parameter.size for parameter in built.parameters()) - num_params(model).total)
    for part in dry_run(model, layout):
        yield abs(part.parameters - held_by_stage(model, layout, part.stage).total)


def main() -> int:
    parser = common.argument_parser(__doc__, rounds=1)
    options = parser.parse_args()
    report, found, failed = common.Report("Plan against measurement", options), {}, {}
    runs = [run for run in RUNS if not options.only or any(word in run.name for word in options.only)]
    link = measured(LINK, 2, options.threads)[0]
    for run in (bar := tqdm(runs, "runs", unit="run")):
        bar.set_postfix_str(run.name)
        try:
            found[run.name] = measured(json.dumps(asdict(run)), run.processes, options.threads)
        except LaunchError as error:
            failed[run.name] = str(error).splitlines()[-1]
    without = {name: ranks[0]["missing_kernels"] for name, ranks in found.items() if ranks[0]["missing_kernels"]}
    report.failures(failed | {f"kernels of {name}: references run instead": why for name, why in without.items()})
    if not found:
        return 1
    plans: dict[str, Plan] = {run.name: run.plan() for run in runs}
    report_link(report, link)
    report_memory(report, found, plans)
    report_time(report, found, plans)
    report_parameters(report, found, plans)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
