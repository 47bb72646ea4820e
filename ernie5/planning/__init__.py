"""What a configuration costs before it is built: memory, messages and time of every rank, and layouts that fit."""

from ernie5.planning.layout import Layout, smallest_world
from ernie5.planning.machine import Machine, load_machine, machine_names
from ernie5.planning.plan import Plan, make_plan

__all__ = ["Layout", "Machine", "Plan", "load_machine", "machine_names", "make_plan", "smallest_world"]
