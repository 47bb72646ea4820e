"""Samples that the context cannot hold are found before training, by their line."""

from __future__ import annotations

import pytest

from ernie5.data.lengths import fitting
from ernie5.sequence.layout import lay_out
from ernie5.sequence.parts import Sample, Text
from ernie5.sequence.spec import LayoutSpec
from tests.data.coded import configuration, corpus, tokenizer

TOKENIZER, CONFIG = tokenizer(), configuration()
LONG = "row " * 300
TOO_LONG = {
    "text": [Text(LONG), Text("end")],
    "second wording": [Text(("a row", LONG)), Text("end")],
    "wordings alone": [Text(("a row", LONG))],
}


def test_what_fits_is_kept_and_prose_of_any_length():
    samples = corpus().samples
    assert fitting(samples, TOKENIZER, CONFIG) == samples


@pytest.mark.parametrize("parts", TOO_LONG.values(), ids=TOO_LONG.keys())
def test_a_sample_that_is_too_long_is_named_by_its_line(parts, capsys):
    samples = [Sample([Text("a"), Text("row")]), Sample(parts, "both", {"source": "manifest.jsonl:7"})]
    with pytest.raises(ValueError, match=r"^manifest.jsonl:7: .*'both' takes \d+ positions, the context holds 256"):
        fitting(samples, TOKENIZER, CONFIG)
    lenient = configuration()
    lenient.data.on_bad_line = "skip"
    assert fitting(samples, TOKENIZER, lenient) == samples[:1]
    report = capsys.readouterr().err
    assert "skipped manifest.jsonl:7: " in report and "1 samples do not fit and were skipped, 1 kept" in report
    with pytest.raises(ValueError, match="no sample fits the context of 256"):
        fitting(samples[1:], TOKENIZER, lenient)


def test_the_limit_is_that_of_the_layout():
    sample = next(sample for sample in corpus().samples if sample.task == "film")
    config = configuration()
    config.model.max_sequence_length = len(lay_out(sample, TOKENIZER, LayoutSpec.from_config(config)))
    assert fitting([sample], TOKENIZER, config) == [sample]
    config.model.max_sequence_length -= 1
    with pytest.raises(ValueError, match="shorten it"):
        fitting([sample], TOKENIZER, config)
