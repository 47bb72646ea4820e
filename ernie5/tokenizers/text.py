"""Text <-> ids: byte-pair encoding over UTF-16BE bytes (ERNIE 5.0 report §3.1), with BPE-dropout in training.

The text is cut into words (a leading space belongs to its word), each word becomes UTF-16BE bytes, each byte one
character of a private alphabet, and the ``tokenizers`` library learns and applies the merges on those characters.
BPE-dropout (Provilkov et al. 2020) needs its own loop over the same merges, because the library's cannot be seeded.
Which tokens may follow in a text that is sampled is said in ``continuations.py``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.trainers import BpeTrainer
from tqdm import tqdm

from ernie5.files import read_versioned_json, replacing_folder, write_json
from ernie5.sequence.vocabulary import NUM_SPECIALS, Special
from ernie5.tokenizers.continuations import BOTH, Continuations, seen_parities

FORMAT_VERSION = 1
PARITIES = "parities.json"  # has a version of its own: folders of tokenizers trained without it stay readable
PARITIES_VERSION = 1
REMEDY = "train it with tools/train_tokenizer.py text"
# Byte b is the character chr(0x100 + b): letters, none of them white space, so that blanks can separate words on
# their way into the library.
ALPHABET = [chr(0x100 + byte) for byte in range(256)]
SMALLEST_VOCABULARY = NUM_SPECIALS + len(ALPHABET)
# Letters, digits in groups of three, punctuation, white space. Runs are bounded, so that the work of one word is;
# every character matches one branch, so that the words joined are the text again.
WORD = re.compile(r" ?[^\W\d_]{1,32}|\d{1,3}| ?(?:[^\w\s]|_){1,16}|\s{1,16}(?!\S)|\s{1,16}")
NO_MERGE = 1 << 60
CACHED_WORDS = 200_000


def _word_bytes(word: str) -> bytes:
    return word.encode("utf-16-be", "surrogatepass")


def _to_alphabet(word: str) -> str:
    return "".join([ALPHABET[byte] for byte in _word_bytes(word)])


def _special_name(special: Special) -> str:
    return f"<{special.name.lower()}>"  # outside the alphabet, so no text can contain it


class TextTokenizer:
    """Ids 0..15 are ``Special``, 16..271 the 256 bytes, the rest what merges made.

    ``parities`` uint8 [vocab_size] says at which offsets, even or odd, the training text has each token
    (``seen_parities``); None where that is not known.
    """

    def __init__(self, library: tokenizers.Tokenizer, parities: np.ndarray | None = None) -> None:
        self._library = library
        vocabulary = library.get_vocab(with_added_tokens=True)
        self.vocab_size = len(vocabulary)
        _check_vocabulary(vocabulary)
        self._bytes = [b""] * self.vocab_size
        for token, index in vocabulary.items():
            if index >= NUM_SPECIALS:
                self._bytes[index] = bytes(ord(character) - 0x100 for character in token)
        merges = [tuple(merge) for merge in json.loads(library.to_str())["model"]["merges"]]
        self._ranks = {(vocabulary[a], vocabulary[b]): rank for rank, (a, b) in enumerate(merges)}
        self._merged = [vocabulary[a + b] for a, b in merges]
        self._cache: dict[str, list[int]] = {}
        self.parities = parities

    @cached_property
    def continuations(self) -> Continuations:
        """Which tokens may follow in a sampled text; without known parities whatever is well-formed."""
        return Continuations(self._bytes, self.parities)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, progress: bool = True) -> TextTokenizer:
        """Learns merges until the vocabulary has ``vocab_size`` entries or no pair of symbols is left to merge."""
        if vocab_size < SMALLEST_VOCABULARY:
            raise ValueError(
                f"tokenizers.text.vocab_size is {vocab_size}, but specials and bytes alone take {SMALLEST_VOCABULARY}"
            )
        library = tokenizers.Tokenizer(BPE())
        library.pre_tokenizer = WhitespaceSplit()
        trainer = BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[_special_name(special) for special in Special],
            initial_alphabet=ALPHABET,
            show_progress=progress,
        )
        seen: set[str] = set()

        def lines() -> Iterator[str]:
            for text in texts:
                words = WORD.findall(text)
                seen.update(words)
                yield " ".join(map(_to_alphabet, words))

        library.train_from_iterator(lines(), trainer)
        tokenizer = cls(library)
        words = tqdm(seen, desc="offsets of tokens", disable=not progress, unit="word")
        tokenizer.parities = seen_parities(tokenizer._bytes, map(_word_bytes, words))
        return tokenizer

    def encode(self, text: str, dropout: float = 0.0, rng: np.random.Generator | None = None) -> list[int]:
        """Ids of ``text``, without BOS or EOS.

        ``dropout`` in [0, 1] is the chance that a merge is skipped at a step; the result then depends on ``rng`` alone.
        """
        words = WORD.findall(text)
        if dropout == 0.0:
            return [index for word in words for index in self._whole(word)]
        assert rng is not None and 0.0 < dropout <= 1.0, "dropout lies in [0, 1] and needs an rng"
        return self._encode_with_dropout(words, dropout, rng)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ``ids``; specials are left out, and a byte without its partner at the end reads U+FFFD.

        Raises ``ValueError`` for an id outside the vocabulary.
        """
        try:
            raw = b"".join([self._bytes[index] for index in ids])
        except IndexError:
            raise ValueError(f"text id outside the vocabulary of {self.vocab_size} entries") from None
        text = raw[: len(raw) // 2 * 2].decode("utf-16-be", "surrogatepass")
        return text + "\ufffd" if len(raw) % 2 else text

    def save(self, directory: str | Path) -> None:
        with replacing_folder(directory) as folder:
            (folder / "tokenizer.json").write_text(self._library.to_str(), encoding="utf-8")
            write_json(folder / "config.json", {"format_version": FORMAT_VERSION, "vocab_size": self.vocab_size})
            if self.parities is not None:
                digits = "".join(map(str, self.parities.tolist()))
                write_json(folder / PARITIES, {"format_version": PARITIES_VERSION, "parities": digits})

    @classmethod
    def load(cls, directory: str | Path) -> TextTokenizer:
        """Raises ``ValueError`` in one line when the folder is missing, corrupt or of another format."""
        config = read_versioned_json(Path(directory) / "config.json", FORMAT_VERSION, "text tokenizer", REMEDY)
        path = Path(directory) / "tokenizer.json"
        try:
            tokenizer = cls(tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8")))
        except Exception as error:  # noqa: BLE001 - the library raises bare Exception for a file it cannot read
            reason = str(error).splitlines()[0]
            raise ValueError(f"{path}: unreadable text tokenizer ({reason}); {REMEDY}") from None
        if tokenizer.vocab_size != config.get("vocab_size"):
            raise ValueError(
                f"{path}: {tokenizer.vocab_size} entries, but config.json says {config.get('vocab_size')}; {REMEDY}"
            )
        tokenizer.parities = _read_parities(Path(directory) / PARITIES, tokenizer.vocab_size)
        return tokenizer

    def _whole(self, word: str) -> list[int]:
        """Ids of a word with every merge applied, by the library; remembered."""
        ids = self._cache.get(word)
        if ids is None:
            if len(self._cache) >= CACHED_WORDS:
                self._cache.clear()
            ids = self._cache[word] = self._library.encode(_to_alphabet(word), add_special_tokens=False).ids
        return ids

    def _encode_with_dropout(self, words: list[str], dropout: float, rng: np.random.Generator) -> list[int]:
        """Every merge step of a word has a draw: how many of the best candidates are skipped before one is kept."""
        lengths = [len(_word_bytes(word)) for word in words]
        keep = 1.0 - dropout
        skips = (rng.geometric(keep, sum(lengths)) - 1).tolist() if keep > 0 else [NO_MERGE] * sum(lengths)
        ids: list[int] = []
        start = 0
        for word, length in zip(words, lengths, strict=True):
            whole = self._whole(word)
            if any(skips[start : start + length - len(whole)]):  # one step a merge
                ids += self._merge(_word_bytes(word), skips[start : start + length])
            else:
                ids += whole
            start += length
        return ids

    def _merge(self, raw: bytes, skips: list[int]) -> list[int]:
        """BPE on one word. Step s skips ``skips[s]`` candidates, best first; a step that skips them all is the last."""
        ranks_of, merged = self._ranks, self._merged
        symbols = [NUM_SPECIALS + byte for byte in raw]
        ranks = [ranks_of.get(pair, NO_MERGE) for pair in pairwise(symbols)]
        for skip in skips:
            best = min(ranks, default=NO_MERGE)
            if best == NO_MERGE:
                break
            at = ranks.index(best)
            if skip:
                candidates = sorted((rank, i) for i, rank in enumerate(ranks) if rank != NO_MERGE)
                if skip >= len(candidates):
                    break
                best, at = candidates[skip]
            symbols[at : at + 2] = [merged[best]]
            del ranks[at]
            if at:
                ranks[at - 1] = ranks_of.get((symbols[at - 1], symbols[at]), NO_MERGE)
            if at + 1 < len(symbols):
                ranks[at] = ranks_of.get((symbols[at], symbols[at + 1]), NO_MERGE)
        return symbols


def _read_parities(path: Path, vocab_size: int) -> np.ndarray | None:
    """uint8 [vocab_size]; None where the tokenizer was trained without them."""
    if not path.exists():
        return None
    digits = read_versioned_json(path, PARITIES_VERSION, "parities of a text tokenizer", REMEDY).get("parities")
    if not isinstance(digits, str) or not re.fullmatch(f"[0-{BOTH}]{{{vocab_size}}}", digits):
        raise ValueError(f"{path}: expected {vocab_size} digits from 0 to {BOTH}, one a token; {REMEDY}")
    return np.frombuffer(digits.encode(), np.uint8) - ord("0")


def _check_vocabulary(vocabulary: dict[str, int]) -> None:
    expected = {_special_name(special): int(special) for special in Special}
    expected.update({character: NUM_SPECIALS + byte for byte, character in enumerate(ALPHABET)})
    for token, index in expected.items():
        if vocabulary.get(token) != index:
            raise ValueError(f"entry {token} has id {vocabulary.get(token)}, expected {index}")
    if sorted(vocabulary.values()) != list(range(len(vocabulary))):
        raise ValueError("the ids are not consecutive")
