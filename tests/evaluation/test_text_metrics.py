"""Every token of held-out text is scored once, with as much context as the window gives, and by the model alone."""

from __future__ import annotations

import numpy as np
import pytest

from ernie5.config import model_preset
from ernie5.evaluation.generating import first_fit
from ernie5.evaluation.text_metrics import text_nats, windows
from ernie5.model import Ernie5Config, Ernie5ForCausalLM
from ernie5.sequence.packing import collate, pack
from ernie5.sequence.spec import LayoutSpec
from ernie5.sequence.vocabulary import IGNORE, Special


def labels(document):
    return [int(label) for label in document.labels_text if label != IGNORE]


@pytest.mark.parametrize("count", [0, 1, 14, 15, 16, 40, 200])
def test_windows_score_every_token_and_the_end_once(count):
    spec = LayoutSpec(length=16)
    ids = [*range(100, 100 + count)]
    documents = windows(ids, spec)
    assert [label for document in documents for label in labels(document)] == [*ids, int(Special.EOS)]
    assert all(len(document) <= spec.length for document in documents)


def test_a_later_window_repeats_what_came_before_it():
    first, second, *_ = windows([*range(100, 160)], LayoutSpec(length=16))
    assert len(labels(second)) == 8
    begin = int(second.input_ids[1])
    assert second.input_ids[1:9].tolist() == [*range(begin, begin + 8)]
    assert labels(second)[0] == begin + 7 and labels(first)[-1] == begin + 6


def test_first_fit_keeps_every_document_within_the_row():
    spec = LayoutSpec(length=32)
    documents = [windows([99] * count, spec)[0] for count in (3, 20, 7, 28, 1, 9)]
    groups = first_fit(documents, spec.length)
    assert sorted(len(d) for group in groups for d in group) == sorted(map(len, documents))
    assert all(sum(map(len, group)) <= spec.length for group in groups)
    assert len(groups) == 3


def test_nats_add_up_over_rows_and_do_not_depend_on_packing():
    model = Ernie5ForCausalLM(Ernie5Config.from_model_config(model_preset("tiny")), seed=1)
    spec = LayoutSpec.of_model(model.config, (1, 2), (model.config.vision_bits,))
    rng = np.random.default_rng(0)
    texts = [rng.integers(20, model.config.vocab_size, count).tolist() for count in (5, 12, 9)]
    documents = [document for text in texts for document in windows(text, spec)]
    apart = sum(text_nats(model, collate([pack([document], spec.length)])) for document in documents)
    together = text_nats(model, collate([pack(group, spec.length) for group in first_fit(documents, spec.length)]))
    assert together == pytest.approx(apart, rel=1e-4)
    tokens = sum(len(text) + 1 for text in texts)
    assert together / tokens == pytest.approx(np.log(model.config.vocab_size), rel=0.1)
