"""How much of expert parallelism's communication is hidden behind computing (figure ``hidden_fraction``). Needs root.

Every rank is a process on one thread in a network namespace of its own, joined to the others by a link of limited rate
(veth pairs, a bridge, `tc ... tbf` at both ends). Unless --rate says otherwise, the rate is set so that communication
takes as long as the routed experts. Measured, in turns, are steps (forward and backward of the model's mixture of
experts: router, routed and shared experts)
  compute     of ``all_to_all`` with what was received before at hand, so that nothing waits;
  experts     the same without the shared expert;
  all_to_all  of the dispatcher that exchanges, computes and exchanges;
  overlapped  of the one that does both at once;
  chunks      of the latter with what was received before at hand: what computing in parts costs by itself.
hidden_fraction = (all_to_all - overlapped) / (all_to_all - compute). Before, the numbers of both are compared.
The forward pass computes a third and sends half: with communication c times as long as all of the layer's computing,
no order of work hides more than 1/2 + 1/(3c) of it where that is less than one.
The namespaces have no names: they are gone with the processes, however these end.

python benchmarks/overlap.py --json overlap.json --picture overlap.png
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import ernie5  # noqa: E402, F401  before paddle: it settles what Paddle reads when imported
from benchmarks import common  # noqa: E402

INSIDE = "ERNIE5_OVERLAP_NAMESPACE"  # set in the process that owns the switch's namespace
MODES = ("compute", "experts", "all_to_all", "overlapped", "chunks")
REPLAYED = {  # modes without communication, and of which dispatcher
    "compute": "all_to_all",
    "experts": "all_to_all",
    "chunks": "overlapped",
}
NETWORK = "10.55.0"
PORT = 23456
BURST = "128kb"
QUEUE = "4mb"  # what a link holds back before it drops: more than there ever is, see OUTPUT_BYTES
OUTPUT_BYTES = 131072  # what a TCP connection puts into its link's queue
PARTS_DEATH = 1  # PR_SET_PDEATHSIG
ALLOWED = 1e-5  # relative difference between the dispatchers: sums in another order, products of fewer rows at once


# ---------------------------------------------------------------------------------------------------------- one rank


class Rank:
    """The model's mixture of experts, and how to step through it in each mode."""

    def __init__(self, options: dict[str, Any]) -> None:
        import paddle
        import paddle.distributed as dist

        from ernie5.ops import kernels
        from ernie5.parallel import leaving
        from ernie5.parallel.dispatch import AllToAll, Overlapped

        paddle.set_device("cpu")
        leaving.prepare()
        dist.init_parallel_env()
        self.paddle, self.dist = paddle, dist
        self.group = dist.collective._get_default_group()
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        if not kernels.available("exchange_start"):
            raise RuntimeError(f"the kernels are not compiled: {kernels.library().problem}")
        self.dispatchers = {"all_to_all": AllToAll(self.group), "overlapped": Overlapped(self.group, options["chunks"])}
        self.dispatchers |= {mode: self.dispatchers[of] for mode, of in REPLAYED.items()}
        self.replays: dict[str, _Replay] = {}
        self._build(options)
        for mode, of in REPLAYED.items():
            self.replays[mode] = _Replay(partial(self.step, of))
        prefer_other_threads()

    def _build(self, options: dict[str, Any]) -> None:
        paddle = self.paddle
        from ernie5.model import Ernie5Config
        from ernie5.model.layers import MoE
        from ernie5.parallel.layers import SplitExperts

        shape = {
            "hidden_size": options["hidden"],
            "num_experts": options["experts"],
            "experts_per_token": options["top_k"],
            "expert_intermediate_size": options["width"],
            "shared_expert_intermediate_size": options["shared"],
        }
        paddle.seed(1)  # every rank has the same router and the same shared expert
        self.moe = MoE(Ernie5Config(**shape))
        self.routed = MoE(Ernie5Config(**shape | {"shared_expert_intermediate_size": 0}))
        shape["num_experts"] = options["experts"] // self.ranks
        self.moe.experts = SplitExperts(Ernie5Config(**shape), self.dispatchers["all_to_all"])
        self.routed.router, self.routed.experts = self.moe.router, self.moe.experts
        rng = np.random.default_rng(self.rank)
        rows = rng.standard_normal([2, options["tokens"], options["hidden"]], dtype=np.float32)
        self.x, self.dy = map(paddle.to_tensor, rows)
        self.x.stop_gradient = False
        self.valid = paddle.ones([options["tokens"]], dtype="bool")

    def step(self, mode: str) -> None:
        self.moe.experts.dispatcher = self.dispatchers[mode]
        for tensor in (self.x, *self.moe.parameters()):
            tensor.clear_gradient(False)
        with self.replays.get(mode, contextlib.nullcontext()):
            self.y = (self.routed if mode == "experts" else self.moe)(self.x, self.valid)
            self.y.backward(self.dy)

    def meet(self) -> None:
        """Waits for all ranks, by the threads that communicate.

        In ``dist.barrier`` this one, while it holds a lock of gloo's, may be displaced by the thread that waits for it.
        """
        from ernie5.parallel import exchange

        exchange.counts(np.zeros([self.ranks], np.int64), self.group)

    def outputs(self) -> dict[str, np.ndarray]:
        gradients = {f"d {name}": parameter.grad for name, parameter in self.moe.named_parameters()}
        return {name: tensor.numpy() for name, tensor in {"y": self.y, "dx": self.x.grad, **gradients}.items()}

    # what the parent asks

    def check(self) -> dict[str, float]:
        """Largest relative difference of any output between the two dispatchers, and of those that tokens see."""
        found = {}
        for mode in ("all_to_all", "overlapped"):
            self.step(mode)
            found[mode] = self.outputs()
        differences = {}
        for name, plain in found["all_to_all"].items():
            difference = np.abs(found["overlapped"][name] - plain).max()
            differences[name] = float(difference / max(np.abs(plain).max(), 1e-30))
        return differences

    def sent_bytes(self) -> int:
        """What a step sends to other ranks."""
        return self.replays["compute"].sent_bytes

    def time(self, mode: str, count: int) -> list[float]:
        seconds = []
        for _ in range(count):
            self.meet()
            began = time.monotonic()
            self.step(mode)
            seconds.append(time.monotonic() - began)
        return seconds

    def timeline(self, mode: str) -> dict[str, Any]:
        from ernie5.parallel.exchange import timeline

        self.meet()
        timeline.spans = []
        began = time.monotonic_ns()
        self.step(mode)
        ended = time.monotonic_ns()
        spans, timeline.spans = timeline.spans, None
        return {"began": began, "ended": ended, "spans": [list(span) for span in spans]}


class _Replay:
    """Answers exchanges with what they brought when ``step`` ran last: computing without communication."""

    def __init__(self, step: Any) -> None:
        from ernie5.parallel import exchange

        self.module, self.begin = exchange, exchange.start
        self.brought: list[Any] = []
        self.sent_bytes = 0
        exchange.start = self._record
        step()
        exchange.start = self.begin

    def _record(self, rows: Any, sent: list[int], received: list[int], group: Any, label: str = "") -> Any:
        flight = self.begin(rows, sent, received, group, label)
        self.brought.append(flight.wait())
        row_bytes = rows.element_size() * int(np.prod(rows.shape[1:]))
        self.sent_bytes += row_bytes * (sum(sent) - sent[group.rank])
        return self.module.InFlight(self.brought[-1], lambda: None)

    def __enter__(self) -> None:
        left = iter(self.brought)
        self.module.start = lambda *_: self.module.InFlight(next(left), lambda: None)

    def __exit__(self, *_: object) -> None:
        self.module.start = self.begin


def serve(options: dict[str, Any]) -> None:
    """The process of a rank: first its end of the network, then what the parent asks, one JSON line each."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print goes with the errors
    ctypes.CDLL(None).prctl(PARTS_DEATH, signal.SIGKILL)
    prefer_this_process()

    def answer(value: Any) -> None:
        print(json.dumps(value), file=answers, flush=True)

    answer("here")
    rank = None
    for line in sys.stdin:
        request = json.loads(line)
        method, arguments = request["method"], request["arguments"]
        if method == "connect":
            address = f"{NETWORK}.{options['rank'] + 1}/24"
            _ip("link", "set", "lo", "up")
            _ip("address", "add", address, "dev", "eth0")
            _ip("link", "set", "eth0", "up")
            Path("/proc/sys/net/ipv4/tcp_limit_output_bytes").write_text(f"{OUTPUT_BYTES}", encoding="ascii")
            answer(None)
        elif method == "shape":
            shape_link("eth0", arguments["mbit"])
            answer(None)
        elif method == "build":
            rank = Rank(options)
            answer(None)
        else:
            answer(getattr(rank, method)(**arguments))


def prefer_this_process() -> None:
    """The largest share of the processor, of the ordinary kind, for this session.

    The kernel may group processes by session; then their niceness counts within the session only, and the session has
    one of its own.
    """
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    os.setpriority(os.PRIO_PROCESS, 0, -20)
    with contextlib.suppress(FileNotFoundError):
        Path("/proc/self/autogroup").write_text("-20", encoding="utf-8")


def prefer_other_threads() -> None:
    """Lets the threads that communicate cut in at once where every core computes: as many cores as ranks are enough."""
    for thread in map(int, os.listdir("/proc/self/task")):
        if thread != os.getpid():
            os.sched_setscheduler(thread, os.SCHED_FIFO, os.sched_param(1))


# -------------------------------------------------------------------------------------------------------- the network


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


def shape_link(device: str, mbit: float) -> None:
    """Limits what leaves by ``device``."""
    rate = f"{mbit:.3f}mbit"
    tbf = ["root", "tbf", "rate", rate, "burst", BURST, "limit", QUEUE]
    subprocess.run(["tc", "qdisc", "replace", "dev", device, *tbf], check=True)


class Node:
    """A rank's process, seen from the parent, in whose namespace the switch is."""

    def __init__(self, rank: int, options: argparse.Namespace) -> None:
        self.rank, self.device = rank, f"port{rank}"
        self.log = tempfile.NamedTemporaryFile("w+", prefix="ernie5-overlap-", suffix=".log")  # noqa: SIM115
        endpoints = [f"{NETWORK}.{other + 1}:{PORT}" for other in range(options.ranks)]
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "eth0",
            "PADDLE_DISTRI_BACKEND": "gloo",
            "PADDLE_TRAINER_ID": str(rank),
            "PADDLE_TRAINERS_NUM": str(options.ranks),
            "PADDLE_TRAINER_ENDPOINTS": ",".join(endpoints),
            "PADDLE_CURRENT_ENDPOINT": endpoints[rank],
            "PADDLE_MASTER": f"{NETWORK}.1:{PORT + 1}",
        }
        settings = json.dumps({**vars(options), "rank": rank})
        self.process = subprocess.Popen(
            ["unshare", "--net", sys.executable, __file__, "--serve", settings],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            start_new_session=True,
        )
        self.answer()
        _ip("link", "add", self.device, "type", "veth", "peer", "name", "eth0", "netns", str(self.process.pid))
        _ip("link", "set", self.device, "master", "switch", "up")
        self.ask("connect")

    def send(self, method: str, **arguments: Any) -> None:
        print(json.dumps({"method": method, "arguments": arguments}), file=self.process.stdin, flush=True)

    def answer(self) -> Any:
        line = self.process.stdout.readline()
        if not line:
            lines = Path(self.log.name).read_text(encoding="utf-8", errors="replace").strip().splitlines()
            raise SystemExit(f"overlap: rank {self.rank} ended: {lines[-1] if lines else 'no message'}")
        return json.loads(line)

    def ask(self, method: str, **arguments: Any) -> Any:
        self.send(method, **arguments)
        return self.answer()

    def shape(self, mbit: float) -> None:
        shape_link(self.device, mbit)
        self.ask("shape", mbit=mbit)


class Network:
    """All ranks and the switch between them."""

    def __init__(self, options: argparse.Namespace) -> None:
        _ip("link", "add", "switch", "type", "bridge")
        _ip("link", "set", "switch", "up")
        self.nodes: list[Node] = []
        for rank in range(options.ranks):
            self.nodes.append(Node(rank, options))

    def __enter__(self) -> Network:
        return self

    def __exit__(self, *_: object) -> None:
        for node in self.nodes:
            node.process.kill()
            node.process.wait()

    def ask(self, method: str, **arguments: Any) -> list[Any]:
        """The same of every rank at once."""
        for node in self.nodes:
            node.send(method, **arguments)
        return [node.answer() for node in self.nodes]

    def shape(self, mbit: float) -> None:
        for node in self.nodes:
            node.shape(mbit)

    def seconds(self, mode: str, count: int) -> list[float]:
        """Of each step, what the slowest rank needed."""
        return [max(step) for step in zip(*self.ask("time", mode=mode, count=count), strict=True)]


# ------------------------------------------------------------------------------------------------------- measurement


def find_rate(network: Network) -> float:
    """Mbit/s at which what ``all_to_all`` waits takes as long as the routed experts."""
    common.progress("choosing the rate")
    compute, experts = (statistics.median(network.seconds(mode, 5)) for mode in ("compute", "experts"))
    mbit = 8e-6 * max(network.ask("sent_bytes")) / experts
    for _ in range(2):  # headers and acknowledgements take some of it
        network.shape(mbit)
        waits = statistics.median(network.seconds("all_to_all", 3)) - compute
        mbit *= min(max(waits / experts, 0.5), 2.0)  # one slow step must not choose a link of nothing
    return mbit


def measure(network: Network, options: argparse.Namespace) -> tuple[dict[str, list[float]], float, dict[str, float]]:
    """(seconds of each mode's steps, rate of the links in Mbit/s, largest differences between the dispatchers)."""
    common.progress("comparing the dispatchers")
    differences = network.ask("check")
    largest = {name: max(one[name] for one in differences) for name in differences[0]}
    if max(largest.values()) > ALLOWED:
        raise SystemExit(f"overlap: the dispatchers disagree: {largest}")
    mbit = options.rate or find_rate(network)
    network.shape(mbit)
    times: dict[str, list[float]] = {mode: [] for mode in MODES}
    for number in range(options.rounds + 1):
        common.progress(f"round {number} of {options.rounds}, {mbit:.0f} Mbit/s")
        first = number % len(MODES)
        for mode in MODES[first:] + MODES[:first]:
            seconds = network.seconds(mode, 1)
            times[mode] += seconds if number else []  # the first round warms up
    return times, mbit, largest


def draw(network: Network, path: str, title: str) -> None:
    """One step of both dispatchers: what each rank computed, waited for, sent and received."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    colours = {"compute": "tab:blue", "wait": "tab:red", "send": "tab:green", "receive": "tab:olive"}
    figure, axes = pyplot.subplots(2, 1, figsize=(14, 2 + 1.6 * len(network.nodes)), sharex=True)
    for axis, mode in zip(axes, ("all_to_all", "overlapped"), strict=True):
        steps = network.ask("timeline", mode=mode)
        first = min(step["began"] for step in steps)
        longest = max(step["ended"] for step in steps) - first
        rows, written = [], {}  # where the last label of a row ends
        for rank, step in enumerate(steps):
            spans = [["compute", "", step["began"], step["ended"]], *step["spans"]]
            for lane, label, began, ended in spans:
                row = len(colours) * rank + {"compute": 0, "wait": 0, "send": 1, "receive": 2}[lane]
                place = ((began - first) * 1e-6, (ended - began) * 1e-6)
                edge = "white" if label else "none"
                axis.broken_barh([place], (-row - 0.9, 0.8), facecolor=colours[lane], edgecolor=edge, linewidth=0.6)
                wide = len(label) * longest * 1e-6 / 140  # of the label, about
                if lane != "wait" and wide < place[1] and place[0] >= written.get(row, 0):
                    axis.text(place[0] + 1, -row - 0.5, label, fontsize=6, va="center", color="white", clip_on=True)
                    written[row] = place[0] + wide
            rows += [
                (-len(colours) * rank - i - 0.5, f"rank {rank} {name}")
                for i, name in enumerate(("compute", "send", "receive"))
            ]
        axis.set_yticks([place for place, _ in rows], [name for _, name in rows], fontsize=8)
        axis.set_title(f"{mode}", fontsize=10, loc="left")
    axes[-1].set_xlabel("ms (red: computing waits for rows)")
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--json", metavar="PATH", help='write {"figures": {name: number}, ...}')
    found.add_argument("--append", action="store_true", help="append what was measured to benchmarks/RESULTS.md")
    found.add_argument("--picture", metavar="PATH", help="draw what ran when (PNG)")
    found.add_argument("--rounds", type=int, default=5, help="timed steps of every mode (default 5)")
    found.add_argument("--ranks", type=int, default=2, choices=(2, 3, 4))
    found.add_argument(
        "--rate", type=float, help="of each link, Mbit/s (default: communication takes as long as the routed experts)"
    )
    sizes = {"tokens": 4096, "hidden": 512, "width": 4096, "shared": 4096, "experts": 8, "top_k": 2, "chunks": 2}
    for name, value in sizes.items():
        found.add_argument(f"--{name.replace('_', '-')}", type=int, default=value, help=f"default {value}")
    found.set_defaults(realtime=False)
    return found


def main() -> int:
    if len(sys.argv) == 3 and sys.argv[1] == "--serve":
        serve(json.loads(sys.argv[2]))
        return 0
    options = parser().parse_args()
    if INSIDE not in os.environ:
        os.environ[INSIDE] = "1"
        os.execvp("unshare", ["unshare", "--net", sys.executable, __file__, *sys.argv[1:]])
    report = common.Report("Hidden communication", options)
    with Network(options) as network:
        network.ask("build")
        times, mbit, differences = measure(network, options)
        seconds = common.medians(times)
        shape = f"{options.tokens} tokens a rank, {options.experts} experts, top {options.top_k}, D {options.hidden}"
        title = f"{options.ranks} ranks, {shape}, F {options.width}, {options.chunks} chunks, {mbit:.0f} Mbit/s"
        if options.picture:
            draw(network, options.picture, title)
    communication = seconds["all_to_all"] - seconds["compute"]
    rows = [(mode, seconds[mode] * 1e3, common.spread(times[mode])) for mode in MODES]
    report.table(f"{title}: ms a step", ["mode", "median", "scatter"], rows)
    report.table("Largest difference from all_to_all", ["output", "relative"], differences.items())
    report.figure("hidden_fraction", (seconds["all_to_all"] - seconds["overlapped"]) / communication)
    report.figure("communication_over_experts", communication / seconds["experts"])
    report.figure("communication_over_compute", communication / seconds["compute"])
    report.figure("rate_mbit", mbit)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
