"""A contender that needs no peer: it squares numbers, slowly if asked to, wrongly if asked to."""

from __future__ import annotations

import time

import numpy as np

from benchmarks import worker


class Squares(worker.Contender):
    def __init__(self, pause: float = 0.0, wrong: bool = False, broken: bool = False) -> None:
        if broken:
            raise ValueError("this one cannot be built")
        print("chatter on standard output must not disturb the answers")
        self.pause, self.wrong = pause, wrong
        self.numbers = np.arange(4.0)

    def prepare(self, count: int) -> None:
        self.numbers = np.arange(float(count))

    def step(self) -> None:
        time.sleep(self.pause)
        self.squares = self.numbers**2 + self.wrong

    def outputs(self) -> dict[str, np.ndarray]:
        return {"squares": self.squares, "own": self.squares}

    def fail(self) -> None:
        raise ZeroDivisionError("on purpose")
