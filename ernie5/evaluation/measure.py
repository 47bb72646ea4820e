"""The shape of a metric: what it is given and what it gives back.

A metric is a function ``Scope -> Measurement``. It returns the figure itself under its key, and beside it
``<key>_ceiling`` (the judge on real held-out samples, or the best the tokenizer allows) and ``<key>_baseline`` (a guess
that looks at nothing), so that a reader can tell a good model from a lenient judge.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ernie5.config.schema import Config
from ernie5.evaluation.samples import Exhibit
from ernie5.sequence.parts import Audio, Image, RawPart, Sample, Text, Video

if TYPE_CHECKING:
    from ernie5.tokenizers.bundle import Tokenizers


@dataclass
class Scope:
    """Everything a metric may look at. ``samples``: held-out raw samples by task, in a fixed order."""

    model: Any
    tokenizers: Tokenizers
    config: Config
    samples: Mapping[str, Sequence[Sample]]
    run_dir: Path
    items: int = 100  # held-out items of a generated metric
    seed: int = 0  # another seed draws other items and other random choices
    out_dir: Path | None = None  # for files that belong to the figures; None: the run's own
    cache: dict[str, Any] = field(default_factory=dict)  # what several metrics share, such as a trained judge

    def rng(self, name: str) -> np.random.Generator:
        return np.random.default_rng([self.seed, zlib.crc32(name.encode())])

    def draw(self, task: str, count: int | None = None) -> list[Sample]:
        """``count`` held-out samples of ``task`` without repetition, all of them where there are fewer.

        Raises ValueError when the run's data hold none.
        """
        available = self.samples.get(task, ())
        if not len(available):
            known = ", ".join(sorted(self.samples)) or "none"
            raise ValueError(f"evaluation: no held-out samples of task {task!r} (tasks with some: {known})")
        count = min(self.items if count is None else count, len(available))
        return [available[int(i)] for i in self.rng(task).permutation(len(available))[:count]]

    def call_seed(self, name: str) -> int:
        """A seed for one call of ``generate``, different for every metric and every ``seed``."""
        return int(self.rng(name).integers(2**31))


@dataclass
class Measurement:
    """``values``: flat key -> number. ``exhibits``: what was generated on the way, for people."""

    values: dict[str, float]
    exhibits: list[Exhibit] = field(default_factory=list)


MetricFunction = Callable[[Scope], Measurement]


@dataclass(frozen=True)
class Metric:
    """One entry of the registry. ``tasks``: the held-out samples it needs; ``keys``: the figures it promises."""

    keys: tuple[str, ...]
    tasks: tuple[str, ...]
    measure: MetricFunction
    doing: str  # shown while it runs


def generated_part(sample: Sample) -> int:
    """Position of the part that the model has to produce: the first one marked ``generate``, else the last text."""
    for position, part in enumerate(sample.parts):
        if isinstance(part, Image | Video | Audio) and part.generate:
            return position
    assert isinstance(sample.parts[-1], Text), f"a sample of task {sample.task!r} ends without an answer"
    return len(sample.parts) - 1


def prompt_of(sample: Sample) -> list[RawPart]:
    """The parts before the generated one; of a text in several wordings, the first."""
    return [first_wording(part) for part in sample.parts[: generated_part(sample)]]


def target_of(sample: Sample) -> RawPart:
    """The part that the model has to produce, as the data have it."""
    return first_wording(sample.parts[generated_part(sample)])


def first_wording(part: RawPart) -> RawPart:
    return Text(part.text[0], part.loss) if isinstance(part, Text) and not isinstance(part.text, str) else part


def prompt_text(sample: Sample) -> str:
    """The words of the prompt, for captions under pictures; empty when the prompt is only media."""
    return " ".join(part.text.strip() for part in prompt_of(sample) if isinstance(part, Text)).strip()


def share(flags: Sequence[bool]) -> float:
    """Accuracy: the share of true flags."""
    return float(np.mean(np.asarray(flags, dtype=bool)))


def majority_share(labels: Sequence[Any]) -> float:
    """Accuracy of always giving the most frequent label."""
    return max(Counter(labels).values()) / len(labels)
