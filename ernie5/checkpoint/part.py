"""``Part``: what one process holds of a tensor, as ranges along one axis of the whole."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

Range = tuple[int, int]  # start, stop


@dataclass(frozen=True)
class Part:
    """``ranges`` of ``axis`` of a tensor of ``shape``, one behind the other. Without ranges: the whole tensor."""

    shape: tuple[int, ...]  # of the whole
    axis: int = 0
    ranges: tuple[Range, ...] = ()

    @property
    def local_shape(self) -> tuple[int, ...]:
        if not self.ranges:
            return self.shape
        length = sum(stop - start for start, stop in self.ranges)
        return (*self.shape[: self.axis], length, *self.shape[self.axis + 1 :])

    def along(self, axis: int) -> Part:
        """The same with at least one range, for a part that is the whole along any axis."""
        assert not self.ranges or self.axis == axis, f"split along {self.axis}, asked for {axis}"
        return self if self.ranges else Part(self.shape, axis, ((0, self.shape[axis]),))

    def of(self, whole: np.ndarray) -> np.ndarray:
        """The part of ``whole``; a view where it can be."""
        slices = [whole[(slice(None),) * self.axis + (slice(*part),)] for part in self.ranges]
        return np.concatenate(slices, self.axis) if len(slices) > 1 else slices[0] if slices else whole

    def put(self, local: np.ndarray, whole: np.ndarray) -> None:
        """Writes the part into its place in ``whole``."""
        for (start, stop), begin in self.starts():
            here = (slice(None),) * self.axis
            whole[(*here, slice(start, stop))] = local[(*here, slice(begin, begin + stop - start))]
        if not self.ranges:
            whole[...] = local

    def starts(self) -> Iterator[tuple[Range, int]]:
        """(range of the whole, where it begins in the part)."""
        begin = 0
        for start, stop in self.ranges:
            yield (start, stop), begin
            begin += stop - start

    def overlaps(self, other: Part) -> Iterator[tuple[Range, Range]]:
        """What ``other``, a part of the same tensor along the same axis, has of this one: (range here, range there)."""
        for (start, stop), here in self.starts():
            for (first, last), there in other.starts():
                low, high = max(start, first), min(stop, last)
                if low < high:
                    yield (here + low - start, here + high - start), (there + low - first, there + high - first)
