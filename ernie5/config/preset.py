"""Named model shapes: the YAML files in ``presets/``, smallest first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ernie5.config.schema import ModelConfig
from ernie5.config.strict_yaml import parse_yaml
from ernie5.config.typing_rules import Where, build
from ernie5.config.validation import validate_model

PRESET_DIR = Path(__file__).parent / "presets"
PRESETS = ("tiny", "nano", "mini", "small", "ernie5-trillion")


def model_preset(name: str) -> ModelConfig:
    """The validated shape called ``name``. Raises ``ValueError`` listing the names there are."""
    path = _preset_path(name, "model_preset")
    model = build(ModelConfig, parse_yaml(path.read_text(encoding="utf-8"), str(path)), lambda _: str(path), "model")
    model.preset = name
    validate_model(model, str(path))
    return model


def with_preset(values: dict[str, Any], where: Where) -> dict[str, Any]:
    """A ``model`` section with the values of its ``preset`` filled in underneath."""
    name = values.get("preset")
    if name in (None, ""):
        return values
    path = _preset_path(name, where("model.preset"))
    return {**parse_yaml(path.read_text(encoding="utf-8"), str(path)), **values}


def _preset_path(name: Any, where: str) -> Path:
    if name not in PRESETS:
        raise ValueError(f"{where}: unknown model preset {name!r}; there are {', '.join(PRESETS)}")
    return PRESET_DIR / f"{name}.yaml"
