"""What a machine can do, from a YAML file: one of those in ``machines/`` by name, or a path.

Every file says in comments where each figure comes from. Sizes are decimal (1 GB = 1e9 bytes), rates per second.
"""

from __future__ import annotations

import difflib
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path

from ernie5.config.strict_yaml import parse_yaml
from ernie5.config.typing_rules import build

MACHINES = Path(__file__).parent / "machines"
ABOVE_ZERO = (
    "devices_per_node",
    "memory",
    "float32_flops",
    "memory_bandwidth",
    "intra_bandwidth",
    "efficiency",
    "lone_core",
)
AT_LEAST_ZERO = (
    "bfloat16_flops",
    "inter_bandwidth",
    "latency",
    "activation_passes",
    "block_overhead",
    "reserve",
    "slack",
    "attention_flops",
    "operand_passes",
    "wake_up",
)


@dataclass(frozen=True)
class Precision:
    """Bytes a value takes, by what it is."""

    parameter: int
    gradient: int
    optimizer: int  # AdamW's two moments, and a float32 copy of a narrower parameter
    activation: int
    logits: int  # logits kept for the loss, which the kernel overwrites with their gradient
    split_logits: int  # the same where the vocabulary is divided: with the float32 softmax where they are narrower
    split_loss: int  # matrices like those that the loss of a divided vocabulary needs to run backward


PRECISIONS = {
    "float32": Precision(4, 4, 8, 4, 4, 4, 3),
    "bfloat16": Precision(2, 2, 12, 2, 2, 6, 1),  # gradients are of the type of their parameter
}


@dataclass(frozen=True)
class Machine:
    """A node and its links. "Device": an accelerator, or a core where ``shared``, which processes divide evenly."""

    name: str
    devices_per_node: int
    memory: float  # GB of one device; of the whole node where ``shared``
    shared: bool
    float32_flops: float  # TFLOP/s of one device, dense, with trainer.bf16 off
    bfloat16_flops: float  # the same with it on; 0: unknown
    memory_bandwidth: float  # GB/s of one device
    intra_bandwidth: float  # GB/s one device sends within the node
    inter_bandwidth: float  # GB/s one device sends to other nodes; 0: it has no others
    latency: float  # seconds before the first byte of a message, of several behind one another
    efficiency: float  # share of ``flops`` that matrix products of a training step reach
    activation_passes: int  # memory is passed so often for a value kept for the backward pass; 0: within ``efficiency``
    block_overhead: float  # seconds of a block's forward pass that do not depend on its size; three times that in all
    reserve: float  # GB of each process that hold no tensor: libraries, contexts, communication buffers
    slack: float  # share of the tensors' memory that the allocator holds on top
    # What a file may leave out: so it is on GPUs, whose attention runs on the units that multiply, whose operands are
    # within ``efficiency``, and where nobody sleeps until a message comes.
    attention_flops: float = 0.0  # TFLOP/s of one device in q.k and p.v, whatever the precision; 0: as products
    operand_passes: float = 0.0  # passes of memory for a value that a product reads or writes; 0: see efficiency
    lone_core: float = 1.0  # share of memory_bandwidth that a process with one core reaches outside products
    wake_up: float = 0.0  # seconds more of a message where its ranks computed before it
    precision: str = "float32"  # in which a plan has it compute; no key of the file

    def computing_in(self, precision: str) -> Machine:
        """The machine as a plan in this precision sees it; ``ValueError`` where its rate is unknown."""
        found = replace(self, precision=precision)
        if not found.flops > 0:
            raise ValueError(f"machine '{self.name}' has no {precision}_flops; add them to its file")
        return found

    @property
    def flops(self) -> float:
        return self.bfloat16_flops if self.precision == "bfloat16" else self.float32_flops

    @property
    def bytes_of(self) -> Precision:
        return PRECISIONS[self.precision]

    def crowd(self, world: int) -> float:
        """Processes on a core, at least 1; 1 where each has a device of its own."""
        return max(1.0, world / self.devices_per_node) if self.shared else 1.0

    def seconds_of_passes(self, size: float, world: int) -> float:
        """To pass ``size`` bytes through memory outside products, where further cores help little.

        Nothing where ``efficiency`` has it already.
        """
        if not self.activation_passes:
            return 0.0
        alone = self.shared and world >= self.devices_per_node
        rate = self.memory_bandwidth * 1e9 * (self.lone_core if alone else 1.0)
        return size * self.crowd(world) / rate

    def idle_share(self, stage_ranks: int, world: int) -> float:
        """Of the time of a turn that its stage waits, what is lost: where several processes share a core, others run.

        One stage at work has ``stage_ranks`` processes.
        """
        return self.crowd(stage_ranks) / self.crowd(world)

    def processes_here(self, world: int) -> int:
        """Processes of one node."""
        return world if self.shared else min(world, self.devices_per_node)

    def memory_of_process(self, world: int) -> float:
        """GB."""
        return self.memory / world if self.shared else self.memory

    def flops_of_process(self, world: int) -> float:
        """FLOP/s that a process reaches."""
        return self._of_process(self.flops * 1e12 * self.efficiency, world)

    def attention_flops_of_process(self, world: int) -> float:
        """FLOP/s that a process reaches between q.k and p.v."""
        return self._of_process(self.attention_flops * 1e12, world) or self.flops_of_process(world)

    def bandwidth_of_process(self, world: int) -> float:
        """Bytes a second of memory, by all the threads a process may have."""
        return self._of_process(self.memory_bandwidth * 1e9, world)

    def _of_process(self, rate: float, world: int) -> float:
        return rate * self.devices_per_node / world if self.shared else rate


def machine_names() -> list[str]:
    return sorted(path.stem for path in MACHINES.glob("*.yaml"))


def load_machine(name: str | Path) -> Machine:
    """A shipped machine by name, or one described in a file of your own (``name`` ends with .yaml).

    Raises ``ValueError`` in one line for an unknown name, an unknown or missing key, or a value out of range.
    """
    path = Path(name) if str(name).endswith(".yaml") else MACHINES / f"{name}.yaml"
    if not path.is_file():
        near = difflib.get_close_matches(str(name), machine_names(), n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(
            f"machine '{name}' is unknown: {hint}there are {', '.join(machine_names())}; or give a file .yaml"
        )
    values = parse_yaml(path.read_text(encoding="utf-8"), str(path)) or {}
    keys = [field.name for field in fields(Machine) if field.default is MISSING]
    missing = [key for key in keys if isinstance(values, dict) and key not in values]
    if missing:
        raise ValueError(f"{path}: key {missing[0]!r} is missing; compare {MACHINES / 'h100.yaml'}")
    machine = build(Machine, values, lambda _: str(path), "")
    _check(machine, str(path))
    return machine


def _check(machine: Machine, where: str) -> None:
    for name in ABOVE_ZERO:
        if not getattr(machine, name) > 0:
            raise ValueError(f"{where}: {name} is {getattr(machine, name)}; it must be above 0")
    for name in AT_LEAST_ZERO:
        if getattr(machine, name) < 0:
            raise ValueError(f"{where}: {name} is {getattr(machine, name)}; it must be at least 0")
