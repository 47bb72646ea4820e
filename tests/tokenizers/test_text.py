"""Text tokenizer: exact round trips, seeded BPE-dropout, agreement with the library, saved files."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ernie5.sequence.vocabulary import NUM_SPECIALS, Special
from ernie5.tokenizers.continuations import COMPLETE
from ernie5.tokenizers.fingerprint import fingerprint
from ernie5.tokenizers.text import SMALLEST_VOCABULARY, WORD, TextTokenizer

CORPUS = [
    *["the small red heart, top left; the other 1234 hearts move right\n\n"] * 5,
    *["你好，世界 – naïve café 😀"] * 3,
]
TOKENIZER = TextTokenizer.train(CORPUS, 340, progress=False)
# A high and a low surrogate in a row are one character in UTF-16, so only such a pair of halves cannot come back.
ANY_TEXT = st.one_of(
    st.text(max_size=60),
    st.text(st.characters(min_codepoint=0x10000), max_size=10),
    st.text(st.characters(min_codepoint=0xDC00, max_codepoint=0xDFFF, categories=["Cs"]), max_size=5),
    st.text(" \n\tthe_1.", max_size=80),
)


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return TOKENIZER


@settings(max_examples=200, deadline=None)
@given(text=ANY_TEXT, dropout=st.sampled_from([0.0, 0.1, 0.7, 1.0]), seed=st.integers(0, 9))
def test_any_text_comes_back(text, dropout, seed):
    ids = TOKENIZER.encode(text, dropout, np.random.default_rng(seed))
    assert TOKENIZER.decode(ids) == text
    assert all(NUM_SPECIALS <= index < TOKENIZER.vocab_size for index in ids)


def test_every_character_comes_back(tokenizer):
    """All of Unicode, halves of surrogate pairs included."""
    for start in range(0, 0x110000, 0x1000):
        blank = " " if start == 0xD000 else ""  # keeps the halves of surrogate pairs apart
        text = blank.join(map(chr, range(start, start + 0x1000)))
        assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(max_examples=100, deadline=None)
@given(text=st.text())
def test_words_are_the_text(text):
    assert "".join(WORD.findall(text)) == text


def test_a_space_belongs_to_its_word_and_digits_stand_in_short_groups():
    assert WORD.findall("the red  heart 12345") == ["the", " red", " ", " heart", " ", "123", "45"]


def test_no_dropout_equals_the_library(tokenizer):
    """The own loop without skips merges as the library does, on every word of the corpus and on unseen ones."""
    words = {word for text in [*CORPUS, "thethe hearth 😀😀 aaaaaaaaaaaaaaaa 世世界界"] for word in WORD.findall(text)}
    for word in words:
        raw = word.encode("utf-16-be")
        assert tokenizer._merge(raw, [0] * len(raw)) == tokenizer._whole(word)


def test_dropout_depends_on_the_rng_alone(tokenizer):
    text = CORPUS[0] * 3

    def draw(seed: int) -> list[int]:
        return tokenizer.encode(text, 0.2, np.random.default_rng(seed))

    first = draw(5)
    fresh = TextTokenizer(tokenizer._library)  # an empty cache draws the same
    assert first == draw(5) == fresh.encode(text, 0.2, np.random.default_rng(5))
    assert first != draw(6)


def test_dropout_makes_more_and_smaller_pieces(tokenizer):
    text = CORPUS[0] * 20
    sizes = [len(tokenizer.encode(text, p, np.random.default_rng(0))) for p in (0.0, 0.1, 0.5, 1.0)]
    assert sizes == sorted(sizes) and sizes[0] < sizes[1]
    assert sizes[-1] == 2 * len(text)  # every merge dropped: two bytes a character


def test_dropout_follows_the_paper(tokenizer):
    """A two-byte word has one merge, tried once: it stays apart with probability p."""
    rng = np.random.default_rng(0)
    apart = np.mean([len(tokenizer.encode("e", 0.3, rng)) == 2 for _ in range(4000)])
    assert abs(apart - 0.3) < 0.03


@pytest.mark.parametrize("dropout", [0.02, 0.3])
def test_words_without_a_skip_take_no_short_cut_that_shows(tokenizer, dropout):
    """Every word through the loop, with the same draws, gives the same ids."""
    text = CORPUS[0] * 20
    words = [word.encode("utf-16-be") for word in WORD.findall(text)]
    skips = iter((np.random.default_rng(3).geometric(1 - dropout, 2 * len(text)) - 1).tolist())
    expected = [index for raw in words for index in tokenizer._merge(raw, [next(skips) for _ in raw])]
    assert tokenizer.encode(text, dropout, np.random.default_rng(3)) == expected


def test_specials_come_first_and_are_silent(tokenizer):
    assert tokenizer.decode([Special.BOS, *tokenizer.encode("heart"), Special.EOS]) == "heart"
    assert tokenizer.decode(tokenizer.encode("<bos>")) == "<bos>"


def test_a_lone_byte_at_the_end_is_shown(tokenizer):
    assert tokenizer.decode([*tokenizer.encode("a"), NUM_SPECIALS]) == "a\ufffd"


def test_an_id_outside_the_vocabulary_is_refused(tokenizer):
    with pytest.raises(ValueError, match="outside the vocabulary of 340"):
        tokenizer.decode([340])


def test_frequent_words_are_one_piece(tokenizer):
    assert len(tokenizer.encode(" the")) == 1
    assert tokenizer.vocab_size == 340


def test_a_vocabulary_too_small_for_the_bytes_is_refused():
    with pytest.raises(ValueError, match=str(SMALLEST_VOCABULARY)):
        TextTokenizer.train(CORPUS, 100, progress=False)


def test_saved_and_loaded_is_the_same(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "text")
    loaded = TextTokenizer.load(tmp_path / "text")
    text = CORPUS[0] + CORPUS[-1]
    assert loaded.encode(text) == tokenizer.encode(text)
    assert loaded.encode(text, 0.3, np.random.default_rng(1)) == tokenizer.encode(text, 0.3, np.random.default_rng(1))
    np.testing.assert_array_equal(loaded.parities, tokenizer.parities)
    loaded.save(tmp_path / "again")
    assert fingerprint(tmp_path / "again") == fingerprint(tmp_path / "text")


def test_a_folder_without_parities_stays_as_it_is(tokenizer, tmp_path):
    """Tokenizers trained before there were any: same files when saved again, and whatever is well-formed may follow."""
    tokenizer.save(tmp_path / "text")
    (tmp_path / "text" / "parities.json").unlink()
    loaded = TextTokenizer.load(tmp_path / "text")
    loaded.save(tmp_path / "again")
    assert fingerprint(tmp_path / "again") == fingerprint(tmp_path / "text")
    assert loaded.encode(CORPUS[0]) == tokenizer.encode(CORPUS[0])
    some, more = (each.continuations.allowed(np.array([COMPLETE]), 9)[0] for each in (tokenizer, loaded))
    assert set(np.flatnonzero(some)) < set(np.flatnonzero(more))


def _truncate(folder):
    path = folder / "tokenizer.json"
    path.write_text(path.read_text()[:500])


def _other_version(folder):
    (folder / "config.json").write_text(json.dumps({"format_version": 99}))


def _fewer_entries(folder):
    (folder / "config.json").write_text(json.dumps({"format_version": 1, "vocab_size": 7}))


def _parities_of_another(folder):
    (folder / "parities.json").write_text(json.dumps({"format_version": 1, "parities": "013"}))


def _foreign(folder):
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace("<pad>", "<gap>"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_truncate, "unreadable text tokenizer"),
        (_other_version, "format_version 99, expected 1"),
        (_fewer_entries, "340 entries, but config.json says 7"),
        (_parities_of_another, "expected 340 digits from 0 to 3"),
        (lambda folder: (folder / "parities.json").write_text('{"format_version": 9}'), "format_version 9, expected 1"),
        (_foreign, "entry <pad> has id None"),
        (lambda folder: (folder / "config.json").unlink(), "no text tokenizer here"),
        (lambda folder: (folder / "config.json").write_text("{"), "unreadable text tokenizer"),
    ],
)
def test_a_damaged_tokenizer_is_one_line(tokenizer, tmp_path, damage, message):
    tokenizer.save(tmp_path / "text")
    damage(tmp_path / "text")
    with pytest.raises(ValueError, match=message) as caught:
        TextTokenizer.load(tmp_path / "text")
    assert "\n" not in str(caught.value) and "tools/train_tokenizer.py text" in str(caught.value)
