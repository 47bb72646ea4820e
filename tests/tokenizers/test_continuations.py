"""Which tokens may follow: against Python's own decoder, against what encoding yields, and by sampling at random."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ernie5.sequence.vocabulary import NUM_SPECIALS, Special
from ernie5.tokenizers.continuations import (
    BOTH,
    COMPLETE,
    EVEN,
    HALF,
    HALF_HIGH,
    HIGH,
    ODD,
    Continuations,
    seen_parities,
)
from ernie5.tokenizers.text import WORD, TextTokenizer

ENGLISH = ["the small red heart, top left; the other 1234 hearts move right\n\n"]
MIXED = [*ENGLISH, "你好，世界 – naïve café 😀 愀戀挀"]
TOKENIZER = TextTokenizer.train([text for text in MIXED for _ in range(4)], 360, progress=False)
WORDS = sorted({word for text in MIXED for word in WORD.findall(text)})
ENGLISH_TOKENIZER = TextTokenizer.train(ENGLISH * 4, 360, progress=False)
WELL_FORMED = Continuations(TOKENIZER._bytes)
DROPOUT = st.sampled_from([0.0, 0.02, 0.3, 0.7, 1.0])
HALVES = st.characters(min_codepoint=0xD800, max_codepoint=0xDFFF, categories=["Cs"])
CHARACTERS = st.one_of(
    st.characters(exclude_categories=["Cs"]),
    st.characters(min_codepoint=0x10000),
    st.characters(min_codepoint=0x4E00, max_codepoint=0x9FFF),
    st.sampled_from("the heart 你好😀愀"),
)


def admits(continuations: Continuations, ids: list[int]) -> bool:
    """Whether ``ids``, as a whole text, could be sampled when just as many tokens are left."""
    states = np.array([COMPLETE])
    for left, index in zip(reversed(range(len(ids))), ids, strict=True):
        if not continuations.allowed(states, left)[0, index]:
            return False
        states = continuations.after(states, np.array([index]))
    return bool(states == COMPLETE)


def is_well_formed(raw: bytes) -> bool:
    try:
        raw.decode("utf-16-be")
    except UnicodeDecodeError:
        return False
    return True


@settings(max_examples=300, deadline=None)
@given(text=st.text(CHARACTERS, max_size=40), dropout=DROPOUT, seed=st.integers(0, 9))
def test_every_encoding_of_a_text_is_well_formed(text, dropout, seed):
    assert admits(WELL_FORMED, TOKENIZER.encode(text, dropout, np.random.default_rng(seed)))


@settings(max_examples=300, deadline=None)
@given(text=st.text(st.one_of(HALVES, HALVES, CHARACTERS), max_size=6), dropout=DROPOUT)
def test_nothing_but_lone_surrogates_is_kept_out(text, dropout):
    ids = TOKENIZER.encode(text, dropout, np.random.default_rng(0))
    assert admits(WELL_FORMED, ids) == is_well_formed(text.encode("utf-16-be", "surrogatepass"))


@settings(max_examples=200, deadline=None)
@given(words=st.lists(st.sampled_from(WORDS)), dropout=DROPOUT, seed=st.integers(0, 99))
def test_every_encoding_of_the_training_words_is_aligned(words, dropout, seed):
    rng = np.random.default_rng(seed)
    assert admits(TOKENIZER.continuations, [index for word in words for index in TOKENIZER.encode(word, dropout, rng)])


def test_seen_parities_are_those_that_dropout_reaches():
    """No more and no fewer than many encodings of the words show."""
    shown = np.zeros(TOKENIZER.vocab_size, np.uint8)
    rng = np.random.default_rng(0)
    for word in WORDS:
        for dropout in np.repeat([0.05, 0.2, 0.4, 0.6, 0.8], 300):
            offset = 0
            for index in TOKENIZER.encode(word, dropout, rng):
                shown[index] |= ODD if offset % 2 else EVEN
                offset += len(TOKENIZER._bytes[index])
    np.testing.assert_array_equal(TOKENIZER.parities, shown)


def test_parities_of_a_few_tokens():
    tokens = [b"", b"\0", b"a", b"\0a", b"a\0", b"b"]
    assert seen_parities(tokens, ["aa".encode("utf-16-be")]).tolist() == [0, EVEN, ODD, EVEN, ODD, 0]
    assert seen_parities(tokens, [b"\0a\x61\x00"]).tolist() == [0, BOTH, BOTH, EVEN, EVEN, 0]


@pytest.mark.parametrize("before", [b"", b"\0", b"\x4e", b"\xd8", b"\xdb\xff", b"\xd8\0\xdc", b"\0a\xd8\0\xdf\xffz"])
def test_bytes_follow_as_in_pythons_decoder(before):
    """Every byte in every state, and how many more bytes a complete text then takes."""
    rule = Continuations([b""] * NUM_SPECIALS + [bytes([byte]) for byte in range(256)])
    states = np.array([COMPLETE])
    for byte in before:
        states = rule.after(states, np.array([NUM_SPECIALS + byte]))
    endings = [b"", b"\0", b"\xdc\0", b"\0\xdc\0"]  # the shortest that completes, if any does
    for byte in range(256):
        complete = [len(rest) for rest in endings if is_well_formed(before + bytes([byte]) + rest)]
        for left in range(5):
            expected = bool(complete) and complete[0] <= left
            assert rule.allowed(states, left)[0, NUM_SPECIALS + byte] == expected, (byte, left)
    ends = rule.allowed(states, 5)[0, :NUM_SPECIALS]
    assert ends.tolist() == [is_well_formed(before) and index == Special.EOS for index in range(NUM_SPECIALS)]


def test_a_pair_of_surrogates_in_one_token():
    high, low = NUM_SPECIALS, NUM_SPECIALS + 1
    rule = Continuations([b""] * NUM_SPECIALS + [b"\xd8", b"\x3d\xde\x00", b"\xd8\x3d"])
    assert rule.allowed(np.array([COMPLETE]), 1)[0, high] and not rule.allowed(np.array([COMPLETE]), 0)[0, high]
    half = rule.after(np.array([COMPLETE]), np.array([high]))
    assert rule.after(half, np.array([low])) == COMPLETE
    assert not rule.allowed(np.array([COMPLETE]), 300)[0, low + 1]  # no token completes what it begins


def test_no_state_without_a_way_out():
    """Low surrogates seen as low bytes alone cannot follow a high one, so none is begun."""
    parities = np.full(NUM_SPECIALS + 256, BOTH, np.uint8)
    parities[NUM_SPECIALS + 0xDC : NUM_SPECIALS + 0xE0] = ODD
    rule = Continuations([b""] * NUM_SPECIALS + [bytes([byte]) for byte in range(256)], parities)
    allowed = rule.allowed(np.array([COMPLETE]), 300)[0, NUM_SPECIALS:]
    assert not allowed[0xD8:0xE0].any() and allowed.sum() == 248


def sampled(tokenizer: TextTokenizer, size: int, follow: bool = True, rows: int = 200) -> list[bytes]:
    """Bytes of texts of up to ``size`` tokens drawn evenly from those allowed and seen in training.

    Without ``follow`` the state stays that of the beginning.
    """
    rule, rng, ids = tokenizer.continuations, np.random.default_rng(0), []
    seen = tokenizer.parities > 0
    states = np.full(rows, COMPLETE)
    for left in reversed(range(size)):
        allowed = rule.allowed(states, left) & seen
        ids.append((allowed * rng.random(allowed.shape)).argmax(-1))
        states = rule.after(states, ids[-1]) if follow else states
    return [b"".join(tokenizer._bytes[index] for index in row) for row in np.array(ids).T]


@pytest.mark.parametrize("size", [1, 2, 7, 60])
def test_sampled_texts_are_complete_and_aligned(size):
    for raw in sampled(ENGLISH_TOKENIZER, size):
        assert raw.decode("utf-16-be").isascii()
    assert all(map(is_well_formed, sampled(TOKENIZER, size)))


def test_without_its_state_the_rule_breaks():
    """Each step alone looks fine; the text does not."""
    texts = sampled(ENGLISH_TOKENIZER, 7, follow=False)
    sound = [raw for raw in texts if is_well_formed(raw) and raw.decode("utf-16-be").isascii()]
    assert len(sound) < len(texts) / 2


def test_every_row_has_its_own_state():
    states = np.array([COMPLETE, HALF, HIGH, COMPLETE, HALF_HIGH, HALF])
    rule = TOKENIZER.continuations
    together = rule.allowed(states, 4)
    assert together.shape == (6, TOKENIZER.vocab_size)
    for row, state in enumerate(states):
        np.testing.assert_array_equal(together[row], rule.allowed(np.array([state]), 4)[0])
    assert len(np.unique(together, axis=0)) == 4
    ids = together.argmax(-1)
    assert rule.after(states, ids).tolist() == [
        rule.after(states[row : row + 1], ids[row : row + 1])[0] for row in range(6)
    ]
