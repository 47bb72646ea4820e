"""Which text tokens may follow: the bytes decoded so far must stay well-formed UTF-16BE, aligned as in training.

A token may hold an odd number of bytes, so every token has two readings: 61 00 61 00 after a complete character is two
Chinese characters, after the byte 00 it is the letters "aa" and half of the next one. A sampled text that slips by one
byte stays slipped, because most tokens mean something in both readings; hence two rules, for sampling alone:

* Well-formed: a high surrogate is followed by a low one, a low one follows a high one, no text ends inside a character.
* Aligned: a token that the tokenizer's training text has at even offsets alone, or at odd ones alone, stays there.

The first rule admits every token that encoding a string without lone surrogates yields; the second every token that
encoding a text of the tokenizer's training yields, with any BPE-dropout. It binds single bytes too: a model trained on
other scripts than its tokenizer was cannot write all of their characters. Nothing here touches encoding or a loss.

V text tokens, P prompts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from ernie5.sequence.vocabulary import Special

# What the bytes so far leave open: nothing; one byte that completes the character; the low byte of a high surrogate;
# the low surrogate after a high one. Last: ill-formed.
COMPLETE, HALF, HALF_HIGH, HIGH, WRONG = range(5)
STATES = WRONG
# Where a token was seen, by the parity of its offset in the bytes of the text: bits.
EVEN, ODD, BOTH = 1, 2, 3
NEVER = 255


class Continuations:
    """The tokens that may follow in each state, and the state after each. A text starts in ``COMPLETE``."""

    def __init__(self, tokens: Sequence[bytes], parities: np.ndarray | None = None) -> None:
        """``tokens``: the bytes of every id, empty for specials. ``parities`` uint8 [V] of ``EVEN`` and ``ODD``, as
        ``seen_parities`` gives them; a token seen at neither, and every token without them, is bound by none."""
        self._next = _next_states(tokens)
        self._next[COMPLETE, Special.EOS] = COMPLETE
        if parities is not None:
            _forbid_other_parities(self._next, parities)
        self._missing = _missing_tokens(self._next)
        self._enough = int(self._missing[self._missing < NEVER].max(initial=0))  # more tokens left allow no more
        self._tables: dict[int, np.ndarray] = {}

    def allowed(self, states: np.ndarray, left: int) -> np.ndarray:
        """The tokens from which the text can still be complete within ``left`` more tokens: states [P] -> bool [P, V].

        The end of the text is allowed where a character is complete, other specials nowhere. Something is allowed
        wherever the tokens before were, each with ``left`` one larger than for the next.
        """
        left = min(left, self._enough)
        if left not in self._tables:
            self._tables[left] = self._missing <= left
        return self._tables[left][states]

    def tables(self) -> tuple[np.ndarray, np.ndarray]:
        """What both answers are read from: uint8 [STATES, V], the state after each token, and how many more tokens
        complete the text then (``NEVER``: the token must not follow)."""
        return self._next, self._missing

    def after(self, states: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """The states once ``ids`` [P], which must be allowed, have followed: states [P] -> [P]."""
        return self._next[states, ids]


def seen_parities(tokens: Sequence[bytes], words: Iterable[bytes]) -> np.ndarray:
    """Parities of the offsets at which each token's bytes stand in a word: uint8 [V] of ``EVEN`` and ``ODD``.

    With dropout, any merges inside a stretch of a word may happen and all others be skipped. So these are exactly the
    tokens that encoding those words can yield.
    """
    ids = {token: index for index, token in enumerate(tokens) if token}
    openings = {token[:size] for token in ids for size in range(1, len(token) + 1)}
    seen = np.zeros(len(tokens), np.uint8)
    for word in words:
        for start in range(len(word)):
            parity = ODD if start % 2 else EVEN
            for stop in range(start + 1, len(word) + 1):
                piece = word[start:stop]
                if piece not in openings:
                    break
                if piece in ids:
                    seen[ids[piece]] |= parity
    return seen


def _next_states(tokens: Sequence[bytes]) -> np.ndarray:
    """State after each token in each state: uint8 [STATES, V]; ``WRONG`` for specials."""
    lengths = np.array([len(token) for token in tokens])
    padded = np.zeros((len(tokens), lengths.max()), np.uint8)
    padded[np.arange(lengths.max()) < lengths[:, None]] = np.frombuffer(b"".join(tokens), np.uint8)
    by_byte = _byte_transitions()
    states = np.repeat(np.arange(STATES, dtype=np.uint8)[:, None], len(tokens), axis=1)
    for at in range(lengths.max()):
        states = np.where(at < lengths, by_byte[states, padded[:, at]], states)
    states[:, lengths == 0] = WRONG
    return states


def _byte_transitions() -> np.ndarray:
    """State after each byte in each state, ``WRONG`` included: uint8 [STATES + 1, 256]."""
    after = np.full((STATES + 1, 256), WRONG, np.uint8)
    after[COMPLETE] = HALF
    after[COMPLETE, 0xD8:0xDC] = HALF_HIGH
    after[COMPLETE, 0xDC:0xE0] = WRONG
    after[HIGH, 0xDC:0xE0] = HALF
    after[HALF], after[HALF_HIGH] = COMPLETE, HIGH
    return after


def _forbid_other_parities(states: np.ndarray, parities: np.ndarray) -> None:
    """Sets to ``WRONG``, in [STATES, V], where a token was seen at the other parity alone."""
    odd = np.isin(np.arange(STATES), (HALF, HALF_HIGH))[:, None]
    states[np.where(odd, parities == EVEN, parities == ODD)] = WRONG


def _missing_tokens(states: np.ndarray) -> np.ndarray:
    """How many tokens a text needs, after each token in each state, until it is complete: uint8 [STATES, V].

    ``NEVER`` where the token is ill-formed or leads to where no tokens complete it.
    """
    missing = np.full(STATES + 1, NEVER, np.uint8)
    missing[COMPLETE] = 0
    for _ in range(STATES):  # one more token each round; the longest way passes every state once
        best = missing[states].min(axis=1)
        missing[:STATES] = np.minimum(missing[:STATES], np.where(best < NEVER, best + 1, NEVER))
    return missing[states]
