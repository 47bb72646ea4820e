"""``Processes``: the few things that saving and reading need of the others in a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Processes:
    """This one is ``rank`` of ``count``. ``gather(value)`` gives every process the values of all, by rank."""

    rank: int
    count: int
    gather: Callable[[Any], list[Any]]

    @property
    def first(self) -> bool:
        return self.rank == 0

    def agree(self, problem: str) -> None:
        """Raises ``ValueError`` with the first problem of any process on all of them; "" is none."""
        for found in self.gather(problem):
            if found:
                raise ValueError(found)

    def on_first(self, action: Callable[[], Any]) -> Any:
        """What ``action`` returns on the first process, where alone it runs; its ``ValueError`` too is everybody's."""
        value, problem = None, ""
        if self.first:
            try:
                value = action()
            except ValueError as error:
                problem = str(error)
        self.agree(problem)
        return self.gather(value)[0]


ALONE = Processes(0, 1, lambda value: [value])
