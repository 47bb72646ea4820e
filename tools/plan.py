#!/usr/bin/env python
"""Memory, messages and time of a configuration on a described machine, before anything is built.

    python tools/plan.py fleet_configs/quickstart.yaml
    python tools/plan.py fleet_configs/ernie5_trillion.yaml --machine h800 --gpus 1536 --picture plan.png
    python tools/plan.py fleet_configs/node_8gpu.yaml --machine a100 --search --gpus 8 --memory 80
    python tools/plan.py fleet_configs/ernie5_trillion.yaml --dry-run

A figure is a prediction: README and ernie5/planning say what it rests on. Exit code 0: it fits (--dry-run: everything
is as planned), 1: it does not, 2: bad input.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from ernie5.config import Config, load_config  # noqa: E402
from ernie5.files import write_json  # noqa: E402
from ernie5.planning import Layout, load_machine, machine_names, make_plan  # noqa: E402


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    try:
        config = load_config(options.config, options.overrides)
        if options.dry_run:
            return build(config, options.gpus)
        return plan(config, options)
    except ValueError as error:
        print(f"plan: {error}", file=sys.stderr)
        return 2


def plan(config: Config, options: argparse.Namespace) -> int:
    """Prints the plan, or what a search finds; 1 if nothing fits."""
    from ernie5.planning.report import plan_text, search_text
    from ernie5.planning.search import search

    name, machine = Path(options.config).stem, load_machine(options.machine or default_machine(config))
    if not options.search:
        shown = make_plan(name, config, machine, options.gpus)
        print(plan_text(shown))
    else:
        world = options.gpus or Layout.of(config.parallel).world
        found = search(name, config, machine, world, options.memory)
        print(search_text(found, world, options.memory or machine.memory_of_process(world)))
        if not found.plans:
            return 1
        shown = found.plans[0]
    if options.json:
        write_json(options.json, shown.to_dict())
    if options.picture:
        from ernie5.planning.picture import draw

        draw(shown, options.picture)
    return 0 if shown.fits else 1


def default_machine(config: Config) -> str:
    """The laptop for what fits one, else H800: what the report's trillion-parameter model would be trained on."""
    from ernie5.config import num_params

    return "laptop" if num_params(config.model).total < 2e8 else "h800"


def build(config: Config, world: int) -> int:
    """Builds every rank's part without memory and prints how it compares; 1 where it differs."""
    import ernie5.model  # noqa: F401  (before paddle)
    from ernie5.planning.dry_run import dry_run

    layout, wrong = Layout.of(config.parallel, world), 0
    for built in dry_run(config.model, layout):
        verdict = "as planned" if not built.differences else "; ".join(built.differences[:3])
        print(f"stage {built.stage:3}: {built.tensors:5} tensors, {built.parameters:15,} parameters a rank, {verdict}")
        wrong += bool(built.differences)
    print(f"{layout.pipeline} distinct parts, each on {layout.stage_ranks} of {layout.world} ranks; {wrong} differ")
    return 1 if wrong else 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="YAML of the run")
    parser.add_argument("overrides", nargs="*", help="section.key=value, such as parallel.tensor=2")
    names = ", ".join(machine_names())
    parser.add_argument("--machine", metavar="NAME", help=f"{names}, or a YAML of your own (default: by size)")
    parser.add_argument("--gpus", type=_count, default=0, metavar="N", help="processes, one a device (default: fewest)")
    parser.add_argument("--search", action="store_true", help="look for layouts of --gpus devices that fit --memory")
    parser.add_argument("--memory", type=_size, default=0.0, metavar="GB", help="of a device (default: the machine's)")
    parser.add_argument("--json", metavar="PATH", help="write the plan, or the best one found, here")
    parser.add_argument("--picture", metavar="PATH", help="draw it (.png, .svg, .pdf)")
    parser.add_argument("--dry-run", action="store_true", help="build every rank's part without memory and compare")
    return parser.parse_intermixed_args(arguments)


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of devices; give 1 or more")
    return int(text)


def _size(text: str) -> float:
    try:
        size = float(text)
    except ValueError:
        size = 0.0
    if not 0 < size < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no size in GB; give a number above 0")
    return size


if __name__ == "__main__":
    sys.exit(main())
