"""English prose that comes with Python: the language reference's topics and the standard library's docstrings."""

from __future__ import annotations

import ast
import re
import sysconfig
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

from ernie5.data.source import check_split, fraction
from ernie5.sequence.parts import Sample, Text

HELDOUT_SHARE = 0.1
SKIPPED = {"test", "tests", "idlelib", "site-packages", "lib2to3", "pydoc_data", "encodings", "__pycache__"}
SHORTEST = 120  # characters of a docstring worth reading
SHORTEST_REPEAT = 40  # characters of a paragraph that may not stand twice


class TextSource:
    """Samples of ``text``, one per topic or module. Split by the hash of its name; ``meta`` has the name.

    ``characters`` caps the docstrings that join the topics in training.
    """

    tasks = ("text",)
    feeds = frozenset({"text"})

    def __init__(self, characters: int = 1_000_000) -> None:
        self.characters = characters

    def samples(self, split: str) -> list[Sample]:
        check_split(split)
        documents = {f"topic {name}": text for name, text in _topics().items()} | _docstrings(self.characters)
        heldout = {name: text for name, text in documents.items() if fraction(name) < HELDOUT_SHARE}
        train = {name: text for name, text in documents.items() if name not in heldout}
        chosen = heldout if split == "heldout" else _without_repeats(train, heldout.values())
        return [Sample([Text(text)], "text", {"name": name}) for name, text in chosen.items()]


def _without_repeats(documents: dict[str, str], others: Iterable[str]) -> dict[str, str]:
    """Documents without the paragraphs that ``others`` or an earlier one has: topics quote each other at length."""
    seen = {_squeezed(paragraph) for text in others for paragraph in text.split("\n\n")}
    kept = {}
    for name, text in documents.items():
        new = []
        for paragraph in text.split("\n\n"):
            key = _squeezed(paragraph)
            if key not in seen or len(key) < SHORTEST_REPEAT:
                new.append(paragraph)
            seen.add(key)
        if sum(map(len, new)) >= SHORTEST:
            kept[name] = "\n\n".join(new)
    return kept


def _squeezed(paragraph: str) -> str:
    return " ".join(paragraph.split())


@lru_cache(maxsize=1)
def _topics() -> dict[str, str]:
    from pydoc_data.topics import topics

    return {name: _tidy(text) for name, text in sorted(topics.items()) if len(text) > SHORTEST}


@lru_cache(maxsize=2)
def _docstrings(characters: int) -> dict[str, str]:
    """ "module PATH" -> its docstrings, each once, until ``characters`` are found.

    The order of modules is a hash too, but not the one that splits them.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    names = {f"module {path.relative_to(root)}": path for path in root.rglob("*.py")}
    seen: set[str] = set()
    found = {}
    for name in sorted(names, key=lambda name: fraction(f"order {name}")):
        if characters <= 0:
            break
        texts = [text for text in _module_docstrings(names[name], root) if text not in seen]
        if texts:
            seen.update(texts)
            found[name] = "\n\n".join(texts)
            characters -= len(found[name])
    return found


def _module_docstrings(path: Path, root: Path) -> list[str]:
    if SKIPPED & set(path.relative_to(root).parts) or path.stat().st_size > 400_000:
        return []
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return []
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)]
    texts = (_tidy(ast.get_docstring(node) or "") for node in nodes)
    return list(dict.fromkeys(text for text in texts if len(text) >= SHORTEST and ">>>" not in text))


def _tidy(text: str) -> str:
    """Without trailing blanks and runs of empty lines."""
    return re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t]+\n", "\n", text)).strip()
