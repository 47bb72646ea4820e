"""The one way in: a YAML file plus dotted overrides becomes a validated ``Config``; and the way back to YAML."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from ernie5.config.preset import with_preset
from ernie5.config.schema import Config
from ernie5.config.strict_yaml import parse_yaml
from ernie5.config.typing_rules import build
from ernie5.config.validation import validate
from ernie5.files import replacing


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads ``path``, applies ``section.key=value`` overrides (values are YAML), starts ``model`` from its preset.

    Raises ``ValueError`` with one line for a missing file, bad YAML, an unknown key, a wrong type or a contradiction.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise ValueError(f"{path}: cannot read the configuration file: {reason}") from None
    values = parse_yaml(text, str(path))
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise ValueError(f"{path}: a configuration is a mapping of sections, found {type(values).__name__}")
    sources = {}
    for override in overrides:
        sources[_apply_override(values, override)] = f"override '{override}'"

    def where(dotted: str) -> str:
        for key, source in sources.items():
            if dotted == key or dotted.startswith((f"{key}.", f"{key}[")):
                return source
        return str(path)

    if isinstance(values.get("model"), dict):
        values["model"] = with_preset(values["model"], where)
    config = build(Config, values, where)
    validate(config, f"{path} with overrides" if overrides else str(path))
    return config


def _apply_override(values: dict[str, Any], override: str) -> str:
    """Sets ``a.b=value`` in the nested mapping and returns the dotted key."""
    dotted, equals, text = override.partition("=")
    names = [name.strip() for name in dotted.split(".")]
    if not equals or not all(names):
        raise ValueError(f"override '{override}': expected section.key=value, such as trainer.max_steps=50")
    target = values
    for depth, name in enumerate(names[:-1]):
        if target.get(name) is None:
            target[name] = {}
        target = target[name]
        if not isinstance(target, dict):
            raise ValueError(f"override '{override}': '{'.'.join(names[: depth + 1])}' is a value, not a section")
    target[names[-1]] = parse_yaml(text, f"override '{override}'")
    return ".".join(names)


def dump_config(config: Config, path: str | Path) -> None:
    """Writes every value of ``config`` as YAML that ``load_config`` reads back equal; never leaves half a file."""
    values = dataclasses.asdict(config)
    text = yaml.safe_dump(values, sort_keys=False, default_flow_style=None, width=120, allow_unicode=True)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
