"""What every benchmark shares: the shapes, contenders in processes of their own, interleaved timing, and the report."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import select
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import peers

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "RESULTS.md"
ANSWER_SECONDS = 900.0  # the longest wait for one answer: compiling a model takes minutes
SETTLE_SECONDS = 5.0  # the longest wait for threads that spin after their work
SLOW_FACTOR = 4.0  # a contender this much slower than the fastest takes part in every fourth round only
HOPELESS_FACTOR = 15.0  # and one this much slower in the first round only


@dataclass(frozen=True)
class Shape:
    """The model of every benchmark. ``experts`` × ``width`` routed, ``top_k`` of them a token, one shared of 128."""

    name: str
    experts: int
    width: int
    hidden: int = 512
    layers: int = 4
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 64
    vocabulary: int = 8192
    top_k: int = 4
    shared: int = 128
    length: int = 512
    batch: int = 4

    @property
    def tokens(self) -> int:
        return self.batch * self.length


SHAPES = {shape.name: shape for shape in (Shape("E64", 64, 128), Shape("E256", 256, 64))}


# ---------------------------------------------------------------------- contenders


class ContenderError(RuntimeError):
    """A contender that cannot be measured, and why, in one line."""


@dataclass
class Contender:
    """One line of a table: a class of a benchmark module, its settings, and whose interpreter runs it."""

    name: str
    kind: str  # peers.OURS, TORCH, PADDLENLP or PADDLEFORMERS
    cls: type
    settings: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)


class Worker:
    """The process of a contender. It computes only while a request is open."""

    def __init__(self, contender: Contender, options: argparse.Namespace) -> None:
        self.name = contender.name
        python = peers.interpreter(contender.kind)
        if python is None:
            raise ContenderError(f"not installed; run {peers.how_to_install(contender.kind)}")
        self.log = tempfile.NamedTemporaryFile("w+", prefix="ernie5-benchmark-", suffix=".log")  # noqa: SIM115
        module = contender.cls.__module__
        module = f"benchmarks.{Path(sys.argv[0]).stem}" if module == "__main__" else module
        what = [module, contender.cls.__name__, json.dumps(contender.settings)]
        self.process = subprocess.Popen(
            [python, "-m", "benchmarks.worker", *what, *(["realtime"] if options.realtime else [])],
            cwd=ROOT,
            env=_process_environment(contender, options.threads),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
        )

    def wait_until_ready(self) -> None:
        """Raises ContenderError where the contender could not be built."""
        self._answer()

    def ask(self, method: str, **arguments: Any) -> Any:
        print(json.dumps({"method": method, "arguments": arguments}), file=self.process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> Any:
        ready = select.select([self.process.stdout], [], [], ANSWER_SECONDS)[0]
        line = self.process.stdout.readline() if ready else ""
        if not line:
            reason = "its process ended" if ready else f"no answer within {ANSWER_SECONDS:.0f} s"
            last = self.last_words()
            self.close()
            raise ContenderError(f"{reason}: {last}")
        answer = json.loads(line)
        if "error" in answer:
            raise ContenderError(answer["error"].splitlines()[0][:300])
        return answer["value"]

    def last_words(self) -> str:
        lines = Path(self.log.name).read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return lines[-1][:300] if lines else "it left no message"

    def time(self, count: int = 1) -> list[float]:
        return self.ask("time", count=count)

    def outputs(self) -> dict[str, np.ndarray]:
        with tempfile.TemporaryDirectory() as folder:
            path = f"{folder}/outputs.npz"
            self.ask("outputs", path=path)
            with np.load(path) as arrays:
                return dict(arrays)

    def call(self, name: str, **arguments: Any) -> Any:
        """A method of the contender itself."""
        return self.ask("call", name=name, arguments=arguments)

    def settle(self) -> None:
        """Waits until no thread of the process runs any more: OpenMP threads spin for a while after their work."""
        end = time.monotonic() + SETTLE_SECONDS
        quiet = 0
        while quiet < 3 and time.monotonic() < end:
            quiet = 0 if self._running() else quiet + 1
            time.sleep(0.002)
        if quiet < 3:
            raise ContenderError("its idle threads never stopped spinning")

    def _running(self) -> bool:
        folder = f"/proc/{self.process.pid}/task"
        for thread in os.listdir(folder):
            with contextlib.suppress(OSError), open(f"{folder}/{thread}/stat", encoding="utf-8") as stat:
                if stat.read().rpartition(")")[2].split()[0] == "R":
                    return True
        return False

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.log):
            with contextlib.suppress(OSError):
                stream.close()


def _process_environment(contender: Contender, threads: int) -> dict[str, str]:
    """Ours and the exported variables, without those that this process's own imports may have set."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "MKL_", "KMP_"))}
    return {**inherited, **peers.variables(contender.kind, threads), **contender.environment}


class Field:
    """The contenders that run, and why the others do not. Closes every process at the end."""

    def __init__(self, contenders: Iterable[Contender], options: argparse.Namespace) -> None:
        self.workers: dict[str, Worker] = {}
        self.failed: dict[str, str] = {}
        self.kinds: dict[str, str] = {}
        for contender in contenders:
            self.kinds[contender.name] = contender.kind
            try:
                self.workers[contender.name] = Worker(contender, options)
            except ContenderError as error:
                self.failed[contender.name] = str(error)
        self.each(lambda worker: worker.wait_until_ready())
        for name, reason in self.each(lambda worker: worker.ask("missing_kernels")).items():
            if reason:
                self.failed[f"kernels of {name}: references run instead"] = reason

    def __enter__(self) -> Field:
        return self

    def __exit__(self, *_: object) -> None:
        progress("")
        for worker in self.workers.values():
            worker.close()

    def each(self, action: Callable[[Worker], Any]) -> dict[str, Any]:
        """``action`` on every contender that still runs, one after the other; one that fails is out from then on."""
        results = {}
        for name, worker in list(self.workers.items()):
            progress(name)
            try:
                results[name] = action(worker)
                worker.settle()
            except ContenderError as error:
                self.drop(name, str(error))
        return results

    def drop(self, name: str, reason: str) -> None:
        self.failed[name] = reason
        self.workers.pop(name).close()


# ---------------------------------------------------------------------- timing


def interleave(field_: Field, rounds: int, turn: int = 1) -> dict[str, list[float]]:
    """Seconds of every contender, one turn each a round: A B C, B C A, ... One process computes at any time.

    A turn is ``turn`` timed steps after one that is not timed where ``turn`` > 1, because a process that slept finds
    its caches cold; medians are taken over all rounds. Every contender runs twice before; the slow ones sit out.
    """
    stride = _strides(field_, rounds)
    times: dict[str, list[float]] = {name: [] for name in stride}
    for number in range(rounds):
        names = [name for name in times if name in field_.workers and number % stride[name] == 0]
        for name in _rotated(names, number):
            progress(f"round {number + 1} of {rounds}: {name}")
            seconds = field_.workers[name].time(turn + (turn > 1))
            times[name] += seconds[1:] if turn > 1 else seconds
            field_.workers[name].settle()
    return times


def _strides(field_: Field, rounds: int) -> dict[str, int]:
    """How many rounds lie between two turns of a contender, after warming all of them up."""
    first = field_.each(lambda worker: worker.time()[0])
    fastest = min(first.values(), default=0.0)
    second = field_.each(lambda worker: worker.time()[0] if first[worker.name] < HOPELESS_FACTOR * fastest else None)
    seconds = {name: first[name] if again is None else again for name, again in second.items()}
    fastest = min(seconds.values(), default=0.0)
    stride = {}
    for name, value in seconds.items():
        stride[name] = rounds if value > HOPELESS_FACTOR * fastest else 4 if value > SLOW_FACTOR * fastest else 1
    return stride


def _rotated(names: list[str], by: int) -> list[str]:
    by = by % len(names) if names else 0
    return names[by:] + names[:by]


def medians(times: dict[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(seconds) for name, seconds in times.items() if seconds}


def spread(seconds: Sequence[float]) -> float:
    """Half the distance between the quartiles over the median: how far single runs scatter."""
    low, middle, high = np.percentile(seconds, [25, 50, 75])
    return float((high - low) / 2 / middle)


def best(values: dict[str, float], names: Iterable[str]) -> tuple[str, float] | None:
    """The fastest of ``names`` and its time; None where none of them ran."""
    present = {name: values[name] for name in names if name in values}
    return min(present.items(), key=lambda item: item[1]) if present else None


def progress(text: str) -> None:
    """One line on a terminal, overwritten by the next."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text[:100]}", end="", file=sys.stderr, flush=True)


# ---------------------------------------------------------------------- agreement


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """Norm of the difference over the norm of what was expected."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    if found.shape != expected.shape:
        raise ContenderError(f"found shape {found.shape}, expected {expected.shape}")
    return float(np.linalg.norm(found - expected) / max(np.linalg.norm(expected), 1e-30))


def check(field_: Field, expected: dict[str, np.ndarray], tolerance: Callable[[str], float]) -> dict[str, float]:
    """Largest relative error of every contender over the outputs it shares with ``expected``.

    One that is further off than ``tolerance(name)`` computes something else and is not timed.
    """
    errors = field_.each(lambda worker: _largest_error(worker.outputs(), expected))
    for name, error in errors.items():
        if not error <= tolerance(name):
            field_.drop(name, f"wrong result: relative error {error:.1e}, allowed {tolerance(name):.0e}")
    return errors


def _largest_error(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> float:
    shared = [name for name in expected if name in found]
    if not shared:
        raise ContenderError("it returned nothing to compare")
    return max(relative_error(found[name], expected[name]) for name in shared)


def as_bfloat16(values: np.ndarray) -> np.ndarray:
    """float32 values rounded to the nearest that bfloat16 holds, so that every precision starts from the same ones."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
    return rounded.astype(np.uint32).view(np.float32)


# ---------------------------------------------------------------------- report


@dataclass
class Report:
    """Tables for people, figures for programs. ``figures`` maps a name to a number."""

    title: str
    options: argparse.Namespace
    figures: dict[str, float] = field(default_factory=dict)
    sections: list[str] = field(default_factory=list)

    def table(self, heading: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        text = markdown_table(columns, rows)
        self.sections.append(f"**{heading}**\n\n{text}")
        progress("")
        print(f"\n{heading}\n{text}", flush=True)

    def failures(self, failed: dict[str, str]) -> None:
        if failed:
            self.table("Not measured", ["contender", "why"], failed.items())

    def figure(self, name: str, value: float | None) -> None:
        """Keeps a figure; None, where what it compares with did not run, leaves it out."""
        if value is not None:
            self.figures[name] = float(value)

    def speedup(self, name: str, seconds: dict[str, float], rivals: Iterable[str], ours: str = "ours") -> None:
        """The fastest rival's time over ours, where both ran."""
        fastest = best(seconds, rivals)
        self.figure(name, fastest[1] / seconds[ours] if fastest and ours in seconds else None)

    def ratio(self, name: str, seconds: dict[str, float], floor: float, ours: str = "ours") -> None:
        """``floor`` seconds over ours: how much of what the machine can do is reached."""
        self.figure(name, floor / seconds[ours] if ours in seconds else None)

    def merge(self, name: str, parts: Iterable[str], choose: Callable = min) -> None:
        """The figure ``name`` as the smallest (or what ``choose`` picks) of other figures, those that there are."""
        values = [self.figures[part] for part in parts if part in self.figures]
        if values:
            self.figures[name] = float(choose(values))

    def worst(self, name: str, suffixes: Iterable[str], choose: Callable = min) -> None:
        """``merge`` of the variants ``name_suffix``."""
        self.merge(name, [f"{name}_{suffix}" for suffix in suffixes], choose)

    def finish(self) -> int:
        rows = [(name, f"{value:.4g}") for name, value in sorted(self.figures.items())]
        self.table("Figures", ["figure", "value"], rows)
        if self.options.json:
            content = {"figures": self.figures, **describe_run(), "realtime": self.options.realtime}
            Path(self.options.json).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        if self.options.append:
            facts = describe_run()
            head = f"\n## {self.title}\n" + "".join(f"* {key.capitalize()}: {value}\n" for key, value in facts.items())
            with RESULTS.open("a", encoding="utf-8") as file:
                file.write(head + "\n" + "\n\n".join(self.sections) + "\n")
        return 0


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table that reads well both as text and as markdown: numbers to four digits, columns aligned."""
    cells = [list(columns), *([_cell(value) for value in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in cells]
    lines = ["| " + " | ".join(row) + " |" for row in padded]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def describe_run() -> dict[str, str]:
    """Machine, commit and command of this run."""
    command = shlex.join(["python", os.path.relpath(sys.argv[0], ROOT), *sys.argv[1:]])
    return {"machine": machine(), "commit": commit(), "command": f"`{command}`"}


def machine() -> str:
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    model = next((line.partition(":")[2].strip() for line in info.splitlines() if line.startswith("model name")), "?")
    flags = next((line.split() for line in info.splitlines() if line.startswith("flags")), [])
    sets = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags]
    gigabytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{len(os.sched_getaffinity(0))} cores of {model} ({', '.join(sets)}), {gigabytes:.0f} GB"


def commit() -> str:
    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    changed = " with changes" if git("status", "--porcelain", "--untracked-files=no") else ""
    return (git("rev-parse", "--short", "HEAD") or "unknown") + changed


def argument_parser(description: str, rounds: int) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="PATH", help='write {"figures": {name: number}, ...}')
    parser.add_argument("--append", action="store_true", help="append what was measured to benchmarks/RESULTS.md")
    parser.add_argument("--rounds", type=int, default=rounds, help=f"turns of every contender (default {rounds})")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="default: every core")
    parser.add_argument("--realtime", action="store_true", help="keep other processes from cutting in (needs root)")
    parser.add_argument("--all", action="store_true", help="also the peers' settings that are not their best")
    parser.add_argument("--only", nargs="*", metavar="WORD", help="contenders whose name holds one of these words")
    return parser


def chosen(contenders: Iterable[Contender], options: argparse.Namespace) -> list[Contender]:
    """The contenders that ``--only`` names; ours always."""
    if options.only is None:
        return list(contenders)
    return [c for c in contenders if c.kind == peers.OURS or any(word in c.name for word in options.only)]
