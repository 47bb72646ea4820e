"""Plain mappings to typed dataclasses: every key known, every value of its declared type, or one clear line."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

D = TypeVar("D")
Where = Callable[[str], str]  # dotted key -> the file or override it came from


def build(cls: type[D], values: Any, where: Where, path: str = "") -> D:
    """An instance of the dataclass ``cls`` from a mapping; keys left out keep their defaults.

    Raises ``ValueError`` naming the source, the section and the nearest known key, or the value and the type wanted.
    """
    if values is None:
        values = {}
    if not isinstance(values, Mapping):
        raise ValueError(f"{where(path)}: {_title(path)} must be a mapping of keys, found {_shown(values)}")
    hints = get_type_hints(cls)
    arguments = {}
    for key, value in values.items():
        dotted = f"{path}.{key}" if path else str(key)
        if key not in hints:
            raise ValueError(
                f"{where(dotted)}: unknown key {key!r} in {_title(path)}; {_nearest(str(key), list(hints))}"
            )
        arguments[key] = convert(hints[key], value, where, dotted)
    return cls(**arguments)


def convert(kind: Any, value: Any, where: Where, path: str) -> Any:
    """``value`` as the annotated type ``kind``: int (no bool), finite float, str, bool, list, dict or dataclass."""
    origin, inner = get_origin(kind), get_args(kind)
    if dataclasses.is_dataclass(kind):
        return build(kind, value, where, path)
    if origin is list and isinstance(value, list):
        return [convert(inner[0], item, where, f"{path}[{i}]") for i, item in enumerate(value)]
    if origin is dict and isinstance(value, Mapping):
        return {convert(inner[0], k, where, path): convert(inner[1], v, where, f"{path}.{k}") for k, v in value.items()}
    if kind is float and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    if kind in (int, str, bool) and type(value) is kind:
        return value
    raise ValueError(f"{where(path)}: {path} must be {_name(kind)}, found {_shown(value)}")


def _title(path: str) -> str:
    return f"section '{path}'" if path else "the top level"


def _nearest(key: str, known: list[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(known)}"


def _shown(value: Any) -> str:
    return f"{value!r} ({type(value).__name__})"


def _name(kind: Any) -> str:
    names = {int: "a whole number", float: "a finite number", str: "text", bool: "true or false"}
    if isinstance(kind, types.GenericAlias) and get_origin(kind) is list:
        return f"a list ({_name(get_args(kind)[0])} each)"
    if isinstance(kind, types.GenericAlias):
        return f"a mapping (name: {_name(get_args(kind)[1])})"
    return names[kind]
