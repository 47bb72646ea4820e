"""Every configuration in fleet_configs/ plans as its first lines say: memory, processes and launch line."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest

from ernie5.config import load_config
from ernie5.planning import load_machine, make_plan

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "fleet_configs"
CONFIGS = sorted(FOLDER.glob("*.yaml"))


@dataclass
class Statement:
    """A pair of lines: what a process needs, the planner's words for it, and how the run is started."""

    memory: str
    plan: list[str]
    start: list[str]


def statements(path: Path) -> list[Statement]:
    """Comment lines "Memory: X GB a ... (tools/plan.py ...)" and the "Start: ..." behind each; indented lines go on."""
    comment = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    text = re.sub(r"\n#\s{3,}", " ", "\n".join(comment))
    found = re.findall(r"^# Memory: ([\d.]+) GB a \w+ \((.*)\)\n# Start: (.*)$", text, flags=re.MULTILINE)
    return [Statement(memory, shlex.split(plan), shlex.split(start)) for memory, plan, start in found]


ALL = [(path, said) for path in CONFIGS if path.stem != "quickstart" for said in statements(path)]


def option(words: list[str], name: str, default: str) -> str:
    return words[words.index(name) + 1] if name in words else default


def overrides(words: list[str]) -> list[str]:
    return [word for word in words if re.match(r"\w+\.\w+=", word)]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_config_states_memory_and_launch_line(path):
    assert path.stem == "quickstart" or statements(path)


@pytest.mark.parametrize(("path", "said"), ALL, ids=[f"{path.stem}-{len(said.start)}" for path, said in ALL])
def test_statements_hold(path, said):
    machine, world = option(said.plan, "--machine", "laptop"), int(option(said.plan, "--gpus", "1"))
    name = str(path.relative_to(ROOT))
    assert said.plan[:2] == ["tools/plan.py", name] and name in said.start
    config = load_config(path, overrides(said.start))
    plan = make_plan(path.stem, config, load_machine(machine), world)
    assert plan.fits
    digits = len(said.memory.partition(".")[2])
    assert f"{plan.needed(plan.fullest.memory):.{digits}f}" == said.memory
    assert set(overrides(said.plan)) <= set(overrides(said.start))
    started = int(option(said.start, "--nnodes", "1")) * int(option(said.start, "--nproc_per_node", "1"))
    assert started == world
    assert f"planned for {machine}" in path.read_text(encoding="utf-8") or machine == "laptop"


def test_the_readme_lists_every_config():
    table = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert {Path(name).stem for name in re.findall(r"\((\w+\.yaml)\)", table)} == {path.stem for path in CONFIGS}
    for path, said in ALL:
        assert re.search(rf"\({path.name}\).*\| {re.escape(said.memory)} GB +\|", table), path.name


def test_cpu_configs_take_the_same_rows_a_step():
    rows = set()
    for path, said in ALL:
        if path.stem.startswith("cpu_"):
            config = load_config(path)
            plan = make_plan(path.stem, config, load_machine("laptop"), int(option(said.plan, "--gpus", "1")))
            rows.add(plan.tokens)
            assert plan.layout.world <= 8
    assert rows == {8 * 256}


def test_trillion_keeps_the_reports_recipe():
    """Report §3.2 and §5.1: degrees, learning rates, speeds of the router's bias, weights of multi-token prediction."""
    path = FOLDER / "ernie5_trillion.yaml"
    parts = [load_config(path, overrides(said.start)) for said in statements(path)]
    assert [c.model.max_sequence_length for c in parts] == [8192, 32768, 131072]
    for config in parts:
        p = config.parallel
        assert (p.tensor, p.pipeline, p.expert, p.sharding_stage) == (4, 12, 64, 1) and p.virtual_stages > 1
        assert config.model.rope_base == 1e6
    assert [c.trainer.router_bias_speed for c in parts] == [1e-4, 1e-5, 1e-5]
    assert [c.trainer.mtp_weight for c in parts] == [0.3, 0.1, 0.1]
    assert [c.trainer.schedule for c in parts] == ["wsd", "cosine", "cosine"]
    ends = [c.trainer.learning_rate * c.trainer.min_learning_rate_ratio for c in parts[1:]]
    assert ends[0] == pytest.approx(parts[2].trainer.learning_rate, rel=1e-2) and ends[1] == pytest.approx(
        1e-5, rel=1e-2
    )
    machine = load_machine("h200")
    tokens = [make_plan("x", config, machine, 768).tokens for config in parts]
    assert tokens == pytest.approx([56e6] * 3, rel=0.02)
    assert parts[0].trainer.gradient_accumulation * 16 * 8192 == pytest.approx(14e6, rel=0.02)


def test_trillion_fits_smaller_devices_twice_as_many_as_it_says():
    path = FOLDER / "ernie5_trillion.yaml"
    text = path.read_text(encoding="utf-8").replace("\n# ", " ")
    (said,) = re.findall(r"With (\d+) devices and half the accumulation .* take ([\d., and]+) GB of 80", text)
    needed = []
    for part in statements(path):
        config = load_config(path, overrides(part.start))
        config.trainer.gradient_accumulation //= 2
        config.trainer.batch_ramp = [[step, count // 2] for step, count in config.trainer.batch_ramp]
        plan = make_plan(path.stem, config, load_machine("h800"), int(said[0]))
        assert plan.fits and plan.limit == 80 and plan.tokens == pytest.approx(56e6, rel=0.02)
        needed.append(f"{plan.needed(plan.fullest.memory):.1f}")
    assert needed == re.findall(r"[\d.]+\d", said[1])
    assert f"({', '.join(needed[:2])} and {needed[2]} GB)" in (FOLDER / "README.md").read_text(encoding="utf-8")
