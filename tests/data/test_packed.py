"""Packed rows: pure in (seed, i), filled, mixed as asked, with the code width of their step."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from ernie5.data.corpus import CodedCorpus
from ernie5.data.packed import PackedDataset, Window
from ernie5.sequence.packing import collate
from ernie5.sequence.parts import Sample, Text
from ernie5.sequence.vocabulary import IGNORE, Kind, Special
from tests.data.coded import configuration, corpus, prose, tokenizer

CORPUS, TOKENIZER = corpus(), tokenizer()
ALL = {"text": 0.2, "see": 0.2, "draw": 0.2, "film": 0.2, "say": 0.2}


def dataset(seed: int = 0, made: CodedCorpus = CORPUS, **mixture: float) -> PackedDataset:
    return PackedDataset(made, TOKENIZER, configuration(**mixture), seed)


def _same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def test_a_row_depends_on_seed_and_number_alone(tmp_path):
    rows = {i: dataset(**ALL)[i] for i in (7, 0, 3)}  # a fresh data set each, any order
    whole = dataset(**ALL)
    assert all(_same(whole[i], rows[i]) for i in range(9) if i in rows)
    assert not _same(whole[0], whole[1]) and not _same(dataset(seed=1, **ALL)[0], whole[0])
    CORPUS.save(tmp_path / "data")
    on_disk = [dataset(made=CodedCorpus.load(tmp_path / "data"), **ALL) for _ in range(2)]
    assert _same(on_disk[0][5], on_disk[1][5])


def test_rows_fill_the_context():
    rows = [dataset(**ALL)[i] for i in range(40)]
    used = [(row["document"] > 0).sum() for row in rows]
    assert all(len(row["input_ids"]) == 256 for row in rows)
    assert np.mean(used) > 0.9 * 256
    batch = collate(rows[:4])
    assert batch["input_ids"].shape == (4, 256) and batch["labels_bits"].shape == (4, 256, 16)


def test_prose_fills_a_row_exactly_and_starts_at_a_word():
    data = dataset(text=1.0)
    whole = CORPUS.samples[2].parts[0].text
    for i in range(30):
        row = data[i]
        chunks = [row["input_ids"][row["document"] == n] for n in range(1, row["document"].max() + 1)]
        for ids in chunks:
            assert ids[0] == Special.BOS and ids[-1] == Special.EOS
            text = TOKENIZER.decode(ids.tolist()).rstrip("\ufffd")
            assert text.split(" ")[0] in whole.split(" ")
        if data.describe(i)[0]["meta"]["words"] == 3000 and len(chunks) == 1:
            assert (row["document"] > 0).all()


def test_prose_is_drawn_by_its_length():
    drawn = Counter(dataset(text=1.0).describe(i)[0]["meta"]["words"] for i in range(300))
    assert drawn[3000] > 0.95 * 300


def test_windows_reach_the_whole_text():
    text = prose(np.random.default_rng(0), 2000)
    rng = np.random.default_rng(0)
    pieces = [Window(text, TOKENIZER, 60, rng) for _ in range(300)]
    starts = np.array([text.index(window.piece) for window in pieces]) / len(text)
    assert all(0.15 < share < 0.35 for share in np.histogram(starts, 4, (0, 1))[0] / 300)
    assert all(start == 0 or text[round(start * len(text)) - 1] == " " for start in starts)
    assert all(len(window.encode("")) == 60 for window, start in zip(pieces, starts, strict=True) if start < 0.9)


def test_shares_follow_the_mixture():
    mixture = {"see": 0.5, "draw": 0.3, "say": 0.2}
    counts = Counter(entry["task"] for i in range(400) for entry in dataset(**mixture).describe(i))
    total = sum(counts.values())
    assert counts.keys() == mixture.keys()
    for task, share in mixture.items():
        assert counts[task] / total == pytest.approx(share, abs=0.06)


def test_an_empty_mixture_draws_every_sample_alike():
    counts = Counter(entry["task"] for i in range(200) for entry in dataset().describe(i))
    assert counts.keys() == CORPUS.tasks.keys()
    assert counts["see"] > 3 * counts["text"] / 2


def test_a_task_that_the_data_lack_is_named():
    with pytest.raises(ValueError, match=r"data.mixture names the task 'dance', the corpus has draw, film"):
        dataset(dance=1.0)


def test_a_row_without_prose_ends_in_padding():
    row = dataset(film=1.0)[0]
    assert row["input_ids"][-1] == Special.PAD and row["document"].max() == 2


def test_a_sample_longer_than_the_context_is_refused():
    long = CodedCorpus([Sample([Text("row " * 300), Text("end")], "both")])
    with pytest.raises(ValueError, match="the context holds 256"):
        dataset(made=long)[0]


def test_the_description_is_the_row():
    data = dataset(**ALL)
    for i in range(20):
        row, entries = data[i], data.describe(i)
        lengths = np.bincount(row["document"])[1:]
        assert lengths.tolist() == [entry["positions"] for entry in entries]
        assert all(CORPUS.samples[entry["sample"]].task == entry["task"] for entry in entries)


def test_prompts_are_dropped_at_the_configured_rate():
    config = configuration(draw=1.0)
    config.data.unconditional = 0.3
    data = PackedDataset(CORPUS, TOKENIZER, config, 0)
    ids = np.concatenate([data[i]["input_ids"] for i in range(200)])
    before = ids[np.flatnonzero(ids == Special.BOI) - 1]
    assert np.mean(before == Special.BOS) == pytest.approx(0.3, abs=0.06)


def test_the_code_width_follows_the_schedule():
    config = configuration(draw=1.0)
    config.trainer.bits_schedule = [[0, 8], [5, 16]]
    config.trainer.batch_ramp = [[2, 3]]
    data = PackedDataset(CORPUS, TOKENIZER, config, 0)
    first_wide = 4 * (1 + 1 + 3 + 3 + 3)  # rows of steps 0..4
    for i, width in ((0, 8), (first_wide - 1, 8), (first_wide, 16)):
        row = data[i]
        bits = row["labels_bits"][(row["kind"] == Kind.IMAGE_GEN) & (row["labels_bits"] != IGNORE).any(axis=1)]
        assert ((bits != IGNORE).sum(axis=1) == width).all()


@pytest.mark.parametrize("ramp", [[], [[0, 2]], [[3, 2], [10, 5]], [[0, 3], [10, 1]]])
def test_steps_and_length_agree_with_the_ramp(ramp):
    config = configuration()
    config.trainer.batch_ramp, config.trainer.gradient_accumulation = ramp, 2
    data = PackedDataset(CORPUS, TOKENIZER, config, 0)
    expected = [step for step in range(50) for _ in range(4 * data.accumulation(step))]
    assert len(data) == len(expected)
    assert [data.step_of(i) for i in range(len(data))] == expected
