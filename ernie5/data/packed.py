"""``PackedDataset``: row i of the training data, a pure function of (seed, i).

So any process can make any row, resuming needs no state beyond the number of rows consumed, and sharding is slicing.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ernie5.config.schema import Config
from ernie5.data.corpus import CodedCorpus
from ernie5.sequence.document import Document
from ernie5.sequence.layout import lay_out
from ernie5.sequence.packing import Row, pack
from ernie5.sequence.parts import Sample, Text
from ernie5.sequence.spec import LayoutSpec
from ernie5.tokenizers.text import TextTokenizer

SMALLEST_SLICE = 24  # positions worth giving to a slice of a long text
TRIES = 4  # draws for a sample that fits the rest of a row
CHARACTERS_PER_POSITION = 5  # more text than a position holds; the ids are cut to size


class PackedDataset:
    """Rows of ``model.max_sequence_length`` positions, packed with samples drawn by ``data.mixture``.

    The mixture weighs tasks by drawn samples; tasks of the corpus that it leaves out are not drawn, an empty mixture
    draws every sample alike. Long samples come a little less often than that, since they fit the end of a row less
    often; prose, which fills it, a little more often. Prose (a sample of one text) is drawn by its length, and where
    it is longer than the row's rest, cut to a random window that fills it.
    ``trainer.bits_schedule`` sets the width of the vision codes by the step a row belongs to; ``readers`` processes
    consume ``rows_per_step`` rows each of a micro-batch.
    """

    def __init__(
        self, corpus: CodedCorpus, text_tokenizer: TextTokenizer, config: Config, seed: int = 0, readers: int = 1
    ) -> None:
        self.corpus, self.text, self.seed = corpus, text_tokenizer, seed
        self.trainer = config.trainer
        self.rows_per_micro_batch = config.trainer.rows_per_step * readers
        self.specs = {bits: LayoutSpec.from_config(config, bits=bits) for bits in config.tokenizers.vision.bits}
        self.length = config.model.max_sequence_length
        self.tasks, shares = _shares(corpus, config.data.mixture)
        self.thresholds = np.cumsum(shares)
        self.pools = {task: Pool(corpus, corpus.tasks[task]) for task in self.tasks}
        self.fillers = Pool(corpus, [i for t in self.tasks for i in corpus.tasks[t] if is_prose(corpus.samples[i])])

    def __len__(self) -> int:
        """Rows of the whole run, the batch ramp included."""
        return self.rows_per_micro_batch * sum(self.accumulation(step) for step in range(self.trainer.max_steps))

    def accumulation(self, step: int) -> int:
        """Micro-batches of a step under ``trainer.batch_ramp``."""
        passed = [count for start, count in self.trainer.batch_ramp if step >= start]
        return passed[-1] if passed else self.trainer.gradient_accumulation

    def step_of(self, i: int) -> int:
        """The optimiser step that consumes row i."""
        ramp = sorted([[0, self.accumulation(0)], *(entry for entry in self.trainer.batch_ramp if entry[0] > 0)])
        rows = self.rows_per_micro_batch
        for (start, count), (stop, _) in zip(ramp, [*ramp[1:], [np.inf, 0]], strict=True):
            here = (stop - start) * rows * count
            if i < here:
                return start + int(i // (rows * count))
            i -= int(here)
        raise AssertionError("unreachable: the last stretch of the ramp has no end")

    def bits_at(self, step: int) -> int:
        passed = [bits for start, bits in self.trainer.bits_schedule if step >= start]
        return passed[-1] if passed else max(self.specs)

    def __getitem__(self, i: int) -> Row:
        return pack(self._documents(i)[0], self.length)

    def describe(self, i: int) -> list[dict]:
        """Task, meta and positions of every document of row i, for a dump."""
        documents, chosen = self._documents(i)
        return [
            {"sample": j, "task": self.corpus.samples[j].task, "meta": self.corpus.samples[j].meta, "positions": len(d)}
            for d, j in zip(documents, chosen, strict=True)
        ]

    def _documents(self, i: int) -> tuple[list[Document], list[int]]:
        rng = np.random.default_rng([self.seed, i])
        spec = self.specs[self.bits_at(self.step_of(i))]
        documents: list[Document] = []
        chosen: list[int] = []
        room = self.length
        while room >= SMALLEST_SLICE or not documents:
            j, document = self._fitting(spec, room, rng)
            if document is None:
                break
            documents.append(document)
            chosen.append(j)
            room -= len(document)
        return documents, chosen

    def _fitting(self, spec: LayoutSpec, room: int, rng: np.random.Generator) -> tuple[int, Document | None]:
        """A drawn sample of at most ``room`` positions; after ``TRIES`` a window of prose, None where there is none."""
        for _ in range(TRIES):
            j = self._draw(rng)
            document = self._fit(self.corpus.samples[j], spec, room, rng)
            if len(document) <= room:
                return j, document
        if not self.fillers.indices:
            return j, None
        j = self.fillers.draw(rng)
        return j, self._fit(self.corpus.samples[j], spec, room, rng)

    def _draw(self, rng: np.random.Generator) -> int:
        task = self.tasks[min(int(np.searchsorted(self.thresholds, rng.random(), side="right")), len(self.tasks) - 1)]
        return self.pools[task].draw(rng)

    def _fit(self, sample: Sample, spec: LayoutSpec, room: int, rng: np.random.Generator) -> Document:
        if not is_prose(sample):
            return lay_out(sample, self.text, spec, rng)
        return lay_out(sample, Window(sample.parts[0].text, self.text, room - 2, rng), spec, rng)


class Pool:
    """Samples to draw from: prose by its length, so that every stretch of it is as likely; anything else alike."""

    def __init__(self, corpus: CodedCorpus, indices: list[int]) -> None:
        self.indices = indices
        samples = [corpus.samples[i] for i in indices]
        prose = all(is_prose(sample) for sample in samples)
        self.ends = np.cumsum([len(sample.parts[0].text) if prose else 1 for sample in samples])

    def draw(self, rng: np.random.Generator) -> int:
        return self.indices[int(np.searchsorted(self.ends, rng.integers(self.ends[-1]), side="right"))]


class Window:
    """Stands in for the tokenizer of a prose sample: a stretch of the text that fills ``size`` positions.

    It starts at a random word; a text that fits is given whole.
    """

    def __init__(self, text: str, tokenizer: TextTokenizer, size: int, rng: np.random.Generator) -> None:
        self.tokenizer, self.size = tokenizer, size
        characters = size * CHARACTERS_PER_POSITION
        start = int(rng.integers(max(1, len(text) - characters // 2)))
        start = text.rfind(" ", 0, start + 1) + 1 if start else 0
        self.piece = text[start : start + characters]

    def encode(self, text: str, dropout: float = 0.0, rng: np.random.Generator | None = None) -> list[int]:
        return self.tokenizer.encode(self.piece, dropout, rng)[: self.size]


def is_prose(sample: Sample) -> bool:
    """A single text: the only kind of sample that may be cut."""
    return len(sample.parts) == 1 and isinstance(sample.parts[0], Text) and isinstance(sample.parts[0].text, str)


def _shares(corpus: CodedCorpus, mixture: Mapping[str, float]) -> tuple[list[str], np.ndarray]:
    if missing := [task for task, share in mixture.items() if share > 0 and task not in corpus.tasks]:
        raise ValueError(
            f"data.mixture names the task '{missing[0]}', the corpus has {', '.join(sorted(corpus.tasks))}; "
            "correct the name or add data for it"
        )
    shares = {task: share for task, share in mixture.items() if share > 0} or {
        t: len(i) for t, i in corpus.tasks.items()
    }
    total = sum(shares.values())
    return list(shares), np.array([share / total for share in shares.values()])
