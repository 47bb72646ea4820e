"""Coded corpus on disk: what comes back, and what is refused."""

from __future__ import annotations

import json
from dataclasses import fields

import numpy as np
import pytest

from ernie5.data import CodedCorpus, fingerprint
from ernie5.sequence.parts import Sample, VisionFeatures
from tests.data.coded import corpus


@pytest.fixture
def saved(tmp_path):
    made = corpus()
    made.save(tmp_path / "data")
    return made, tmp_path / "data"


def _assert_same(found: object, expected: object) -> None:
    if isinstance(expected, np.ndarray):
        assert found.shape == expected.shape
        if np.issubdtype(expected.dtype, np.integer):
            np.testing.assert_array_equal(found, expected)
        else:
            np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-6)  # float16 on disk
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            _assert_same(found[key], expected[key])
    else:
        assert found == expected


def test_every_part_comes_back(saved):
    made, folder = saved
    loaded = CodedCorpus.load(folder, "made-up")
    assert loaded.tasks == made.tasks and len(loaded.samples) == len(made.samples)
    for found, expected in zip(loaded.samples, made.samples, strict=True):
        assert (found.task, found.meta) == (expected.task, expected.meta)
        for a, b in zip(found.parts, expected.parts, strict=True):
            assert type(a) is type(b)
            for field in fields(b):
                _assert_same(getattr(a, field.name), getattr(b, field.name))


def test_large_arrays_are_mapped_not_read(saved):
    loaded = CodedCorpus.load(saved[1])
    part = next(part for sample in loaded.samples for part in sample.parts if isinstance(part, VisionFeatures))
    assert isinstance(part.cnn.base, np.memmap) or isinstance(part.cnn, np.memmap)


def test_a_shared_array_is_stored_once(tmp_path):
    part = next(part for sample in corpus().samples for part in sample.parts if isinstance(part, VisionFeatures))
    sizes = []
    for name, parts in (("once", [part]), ("thrice", [part] * 3)):
        CodedCorpus([Sample(parts, "t")]).save(tmp_path / name)
        sizes.append((tmp_path / name / "arrays.npy").stat().st_size)
    assert sizes[0] == sizes[1]


def test_an_empty_corpus_comes_back(tmp_path):
    CodedCorpus([]).save(tmp_path / "data")
    assert CodedCorpus.load(tmp_path / "data").samples == []


def test_codes_of_other_tokenizers_are_refused(saved):
    with pytest.raises(ValueError, match=r"coded with other tokenizers.*prepare_data.py --force"):
        CodedCorpus.load(saved[1], "others")


def _cut(folder, name):
    (folder / name).write_bytes((folder / name).read_bytes()[:300])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: _cut(folder, "arrays.npy"), "unreadable coded corpus"),
        (lambda folder: _cut(folder, "samples.json"), "unreadable coded corpus"),
        (lambda folder: (folder / "codes.npy").unlink(), "unreadable coded corpus"),
        (lambda folder: (folder / "config.json").unlink(), "no coded corpus here"),
        (lambda folder: (folder / "config.json").write_text(json.dumps({"format_version": 0})), "format_version 0"),
    ],
)
def test_a_damaged_corpus_is_one_line(saved, damage, message):
    damage(saved[1])
    with pytest.raises(ValueError, match=message) as caught:
        CodedCorpus.load(saved[1], "made-up")
    assert "\n" not in str(caught.value) and "tools/prepare_data.py" in str(caught.value)


def test_a_failed_save_leaves_the_old_corpus(saved):
    made, folder = saved
    with pytest.raises(TypeError):
        CodedCorpus([Sample([], "t", {"not json": object()})]).save(folder)
    assert len(CodedCorpus.load(folder).samples) == len(made.samples)
    assert [path.name for path in folder.parent.iterdir()] == ["data"]


def test_the_fingerprint_sees_every_file(tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.json").write_text("1")
    first = fingerprint(tmp_path)
    assert fingerprint(tmp_path) == first
    (tmp_path / "text" / "a.json").write_text("2")
    second = fingerprint(tmp_path)
    (tmp_path / "text" / "a.json").rename(tmp_path / "text" / "b.json")
    assert len({first, second, fingerprint(tmp_path)}) == 3
