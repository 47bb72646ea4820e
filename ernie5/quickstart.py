"""The stages of the quickstart, run one after another, each skipped when it is already finished for its settings.

A stage's key is a hash of the configuration sections and folders it reads and of the keys of the stages before it, so
that changing the evaluation repeats the evaluation, training longer repeats it too, and changing a tokenizer repeats
all that rests on it. After a stage that ran, all later ones run. A stage that was interrupted, or that runs again with
an equal key, keeps what it wrote and starts with it; one whose key changed starts from nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ernie5.config import Config, dump_config, load_config
from ernie5.files import write_json

ROOT = Path(__file__).resolve().parent.parent
STAGES_FILE = "stages.json"
LOCK_FILE = "quickstart.lock"
NOTE_SECONDS = 5.0  # a stage that is killed loses at most so much of its time in the stages file
FORMAT_VERSION = 1
DEFAULT_CONFIG = ROOT / "fleet_configs" / "quickstart.yaml"


@dataclass(frozen=True)
class Stage:
    """``sections``: dotted configuration sections it reads. ``outputs``: what it writes, relative to the run.

    ``folder``: the folder of the run whose files it reads, where another command than the quickstart can change them.
    """

    name: str
    doing: str
    tool: str
    arguments: tuple[str, ...]
    sections: tuple[str, ...]
    outputs: tuple[str, ...]
    seconds: float  # on two cores with the quickstart's configuration, for the estimate
    folder: str = ""

    def command(self, run_dir: Path) -> list[str]:
        filled = [argument.format(run=run_dir, config=run_dir / "config.yaml") for argument in self.arguments]
        return [sys.executable, str(ROOT / "tools" / self.tool), *filled]


STAGES: tuple[Stage, ...] = (
    Stage(
        "tokenizers",
        "learn to code text, pictures and clips, and speech",
        "train_tokenizer.py",
        ("all", "{config}"),
        ("tokenizers", "data.manifests", "data.seed"),
        ("tokenizers/text", "tokenizers/vision", "tokenizers/audio"),
        130,
    ),
    Stage(
        "prepare data",
        "turns every sample into codes, once",
        "prepare_data.py",
        ("{config}",),
        ("tokenizers", "data.manifests", "data.on_bad_line", "data.seed", "model.max_sequence_length"),
        ("data/train",),
        40,
        "tokenizers",
    ),
    Stage(
        "pretrain",
        "one model learns all four modalities",
        "pretrain.py",
        ("{config}",),
        ("model", "data", "trainer"),
        ("checkpoints", "vdl", "train_log.jsonl"),
        480,
    ),
    Stage(
        "evaluate",
        "measures held-out items and writes samples",
        "evaluate.py",
        ("{run}",),
        ("evaluation",),
        ("metrics.json", "samples"),
        80,
        "checkpoints/final",
    ),
    Stage("report", "puts it on one page", "report.py", ("{run}",), (), ("report.html",), 5),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code: 0 finished, 2 for bad input, otherwise the failed stage's own."""
    parser = argparse.ArgumentParser(
        prog="tools/quickstart.sh",
        description="Installs, trains tokenizers and the model on the embedded data, evaluates, and writes a report.",
    )
    parser.add_argument("--run", type=Path, metavar="DIR", help="run directory (default: run.dir of the configuration)")
    parser.add_argument("--config", type=Path, metavar="FILE", default=DEFAULT_CONFIG, help="default: %(default)s")
    parser.add_argument("--force", action="store_true", help="repeat every stage, finished or not")
    options = parser.parse_args(arguments)
    try:
        config = load_config(options.config)
        run_dir = (options.run or Path(config.run.dir)).resolve()
        config = dataclasses.replace(config, run=dataclasses.replace(config.run, dir=str(run_dir)))
        run_dir.mkdir(parents=True, exist_ok=True)
        with locked(run_dir):
            dump_config(config, run_dir / "config.yaml")
            return run_stages(STAGES, config, run_dir, options.force)
    except (ValueError, OSError) as error:
        print(f"quickstart: {error}", file=sys.stderr)
        return 2


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Keeps a second quickstart out of the directory; the lock ends with the process, however that ends.

    Raises ValueError that names the process when there is one already.
    """
    path = run_dir / LOCK_FILE
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ValueError(
                f"{run_dir} is in use by another quickstart (process {file.read().strip()}); wait for it, or choose "
                "another directory with --run"
            ) from None
        file.truncate(0)
        print(os.getpid(), file=file, flush=True)
        yield


def run_stages(stages: Sequence[Stage], config: Config, run_dir: Path, force: bool = False) -> int:
    """Runs what is not finished. Returns 0, or the exit code of the stage that failed."""
    state = {} if force else _read_state(run_dir)
    started = time.monotonic()
    keys = stage_keys(stages, config, run_dir)
    done = [_finished(stage, state, keys, run_dir) for stage in stages]
    todo = list(stages[[*done, False].index(False) :])
    print(
        f"quickstart: {len(todo)} of {len(stages)} stages to run, about {_clock(_estimate(todo, state))}; in {run_dir}"
    )
    for number, stage in enumerate(stages, start=1):
        title = f"[{number}/{len(stages)}] {stage.name}: {stage.doing}"
        if stage not in todo:
            print(f"{title} (finished before, {_clock(state[stage.name]['seconds'])})")
            continue
        left = _estimate(todo[todo.index(stage) :], state)
        print(f"\n{title} (about {_clock(_estimate([stage], state))}; {_clock(left)} to the end)", flush=True)
        key = stage_keys(stages, config, run_dir)[stage.name]  # anew: earlier stages write what this one reads
        code, state = _run_stage(stage, stages, key, state, run_dir)
        if code:
            return code
    measured_now = any(stage.tool == "evaluate.py" for stage in todo)
    _farewell(run_dir, time.monotonic() - started, with_table=not measured_now)
    return 0


def stage_keys(stages: Sequence[Stage], config: Config, run_dir: Path) -> dict[str, str]:
    """Stage name -> hash of what it reads, the keys of all earlier stages included."""
    from ernie5.tokenizers.fingerprint import fingerprint

    values, keys, earlier = dataclasses.asdict(config), {}, ""
    for stage in stages:
        read = {dotted: _lookup(values, dotted) for dotted in stage.sections}
        files = fingerprint(run_dir / stage.folder) if stage.folder else ""
        text = json.dumps([stage.name, read, files, earlier], sort_keys=True)
        keys[stage.name] = hashlib.sha256(text.encode()).hexdigest()[:16]
        earlier += keys[stage.name]
    return keys


def _lookup(values: dict, dotted: str) -> object:
    for name in dotted.split("."):
        values = values[name]
    return values


def _run_stage(
    stage: Stage, stages: Sequence[Stage], key: str, state: dict[str, dict], run_dir: Path
) -> tuple[int, dict[str, dict]]:
    before = state.get(stage.name, {})
    if before.get("key") != key:
        _remove(run_dir, stage.outputs)
        before = {}
    spent = before.get("seconds") or 0.0 if before.get("state") == "started" else 0.0
    started = time.monotonic()

    def note(stage_state: str = "started") -> None:
        seconds = round(spent + time.monotonic() - started, 1)
        state[stage.name] = {"name": stage.name, "key": key, "state": stage_state, "seconds": seconds}
        _write_state(run_dir, stages, state)

    note()
    code = _call(stage.command(run_dir), note)
    note("started" if code else "finished")
    seconds = time.monotonic() - started
    if code:
        print(
            f"quickstart: stage '{stage.name}' could not finish (exit code {code} after {_clock(seconds)}); the lines "
            "above say why. The same command goes on from here.",
            file=sys.stderr,
        )
    else:
        print(f"quickstart: {stage.name} finished in {_clock(seconds)}", flush=True)
    return code, state


def _call(command: list[str], note: Callable[[], None] = lambda: None) -> int:
    """Exit code of the command, which is stopped with this process: an interrupt or a SIGTERM gives 130.

    ``note`` is called every ``NOTE_SECONDS`` while it runs.
    """
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    with subprocess.Popen(command) as process:
        try:
            while True:
                try:
                    return process.wait(NOTE_SECONDS)
                except subprocess.TimeoutExpired:
                    note()
        except KeyboardInterrupt:
            process.terminate()
            process.wait()
            return 130
        finally:
            signal.signal(signal.SIGTERM, before)


def _finished(stage: Stage, state: dict[str, dict], keys: dict[str, str], run_dir: Path) -> bool:
    entry = state.get(stage.name, {})
    there = all((run_dir / output).exists() for output in stage.outputs)
    return entry.get("state") == "finished" and entry.get("key") == keys[stage.name] and there


def _estimate(stages: Sequence[Stage], state: dict[str, dict]) -> float:
    """Seconds: what a stage took the last time it finished here, else what it takes on two cores."""
    done = {name: entry["seconds"] for name, entry in state.items() if entry.get("state") == "finished"}
    return sum(done.get(stage.name, stage.seconds) for stage in stages)


def _remove(run_dir: Path, outputs: Sequence[str]) -> None:
    for output in outputs:
        path = run_dir / output
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _read_state(run_dir: Path) -> dict[str, dict]:
    try:
        value = json.loads((run_dir / STAGES_FILE).read_text(encoding="utf-8"))
        return {entry["name"]: entry for entry in value["stages"] if value["format_version"] == FORMAT_VERSION}
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return {}


def _write_state(run_dir: Path, stages: Sequence[Stage], state: dict[str, dict]) -> None:
    entries = [state[stage.name] for stage in stages if stage.name in state]
    write_json(run_dir / STAGES_FILE, {"format_version": FORMAT_VERSION, "stages": entries})


def _farewell(run_dir: Path, seconds: float, with_table: bool) -> None:
    """Where to look. The table of figures is left out where the evaluation has just printed it."""
    from ernie5.evaluation.requirements import formatted_table

    metrics = run_dir / "metrics.json"
    if with_table and metrics.is_file():
        print("\n" + formatted_table(json.loads(metrics.read_text(encoding="utf-8"))))
    print(f"\nquickstart: done in {_clock(seconds)}. Look at")
    for name, what in (("report.html", "everything on one page"), ("samples", "pictures, clips, sound, text")):
        print(f"  {run_dir / name}  ({what})")
    tool = f"{sys.executable} {ROOT / 'tools' / 'generate.py'}"
    print(f'Ask it something:\n  {tool} --checkpoint {run_dir} --prompt "a handwritten four" --to image --out 4.png')


def _clock(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} min"


if __name__ == "__main__":
    sys.exit(main())
