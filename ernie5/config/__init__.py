"""Typed configuration: dataclasses, the strict YAML loader, presets, and what a model costs before it is built."""

from ernie5.config.counting import ParameterCount, flops_per_token, num_params
from ernie5.config.loader import dump_config, load_config
from ernie5.config.preset import PRESETS, model_preset
from ernie5.config.schema import (
    AudioTokenizerConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    RunConfig,
    TextTokenizerConfig,
    TokenizersConfig,
    TrainerConfig,
    VisionTokenizerConfig,
)
from ernie5.config.validation import validate, validate_model

__all__ = [
    "PRESETS",
    "AudioTokenizerConfig",
    "Config",
    "DataConfig",
    "EvaluationConfig",
    "ModelConfig",
    "ParameterCount",
    "RunConfig",
    "TextTokenizerConfig",
    "TokenizersConfig",
    "TrainerConfig",
    "VisionTokenizerConfig",
    "dump_config",
    "flops_per_token",
    "load_config",
    "model_preset",
    "num_params",
    "validate",
    "validate_model",
]
