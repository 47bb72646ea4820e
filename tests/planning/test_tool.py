"""``tools/plan.py``: what it prints and writes, and one line for bad input."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART, TRILLION, NODE = (
    str(ROOT / "fleet_configs" / f"{n}.yaml") for n in ("quickstart", "ernie5_trillion", "gpu_8")
)


@pytest.fixture(scope="module")
def plan():
    spec = importlib.util.spec_from_file_location("plan_tool", ROOT / "tools" / "plan.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def test_a_plan_is_a_table_json_and_a_picture(plan, capsys, tmp_path):
    files = tmp_path / "plan.json", tmp_path / "plan.png"
    assert (
        plan([TRILLION, "--machine", "h200", "--gpus", "768", "--json", str(files[0]), "--picture", str(files[1])]) == 0
    )
    text = capsys.readouterr().out
    for word in ("768 devices", "pipeline 12 x 5 chunks", "x2 skew", "worst skew", "pipeline bubble", "Fits: "):
        assert word in text
    assert max(map(len, text.splitlines())) <= 130
    content = json.loads(files[0].read_text())
    assert len(content["stages"]) == 12 and content["fits"] is True
    stage = content["stages"][content["slowest_stage"]]
    assert sum(stage["memory"].values()) < sum(stage["worst"].values())
    assert content["seconds_per_step"] == pytest.approx(sum(content["seconds"].values()))
    assert files[1].read_bytes().startswith(b"\x89PNG")


def test_what_does_not_fit_is_said_and_the_exit_code_is_one(plan, capsys):
    assert plan([TRILLION, "--machine", "h800", "--gpus", "768"]) == 1
    assert "DOES NOT FIT: stage 11 needs" in capsys.readouterr().out


def test_search_prints_layouts_and_the_words_for_the_first(plan, capsys):
    arguments = [NODE, "--machine", "h100", "--search", "--gpus", "8"]
    assert plan([*arguments, "--memory", "80"]) == 0
    text = capsys.readouterr().out
    assert "fastest of the layouts of 8 devices that fit 80 GB" in text and "The first: parallel.tensor=" in text
    words = text.rpartition("The first: ")[2].split()
    assert plan([NODE, *words, "--machine", "h100", "--gpus", "8"]) == 0
    assert plan([*arguments, "--memory", "5"]) == 1
    assert "fits 5 GB. The closest needs" in capsys.readouterr().out


def test_dry_run_says_what_it_built(plan, capsys):
    assert (
        plan([QUICKSTART, "--dry-run", "parallel.pipeline=2", "parallel.tensor=2", "trainer.gradient_accumulation=2"])
        == 0
    )
    text = capsys.readouterr().out
    assert text.count("as planned") == 2 and "2 distinct parts, each on 2 of 4 ranks; 0 differ" in text


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["missing.yaml"], "missing.yaml: cannot read the configuration file"),
        ([QUICKSTART, "--gpus", "3", "parallel.tensor=2"], "does not divide 3 processes"),
        ([QUICKSTART, "parallel.tensor=4"], "parallel.tensor = 4 does not divide model.num_kv_heads = 2"),
        ([QUICKSTART, "--machine", "cray"], "machine 'cray' is unknown"),
        ([QUICKSTART, "--picture", "plan.doc"], "plan.doc: a picture ends with .png, .svg or .pdf"),
    ],
)
def test_bad_input_is_one_line(plan, capsys, arguments, wanted):
    assert plan(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("plan: ") and wanted in error and error.count("\n") == 1


@pytest.mark.parametrize("arguments", [["--gpus", "0"], ["--gpus", "x"], ["--memory", "-1"], ["--memory", "nan"]])
def test_bad_numbers_are_refused(plan, capsys, arguments):
    with pytest.raises(SystemExit) as caught:
        plan([QUICKSTART, *arguments])
    assert caught.value.code == 2 and "; give " in capsys.readouterr().err
