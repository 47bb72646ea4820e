"""Typed configuration: dataclasses, the strict YAML loader, presets, and what a model costs before it is built."""

from ernie5.config.counting import (
    ParameterCount,
    block_flops,
    expert_flops,
    flops_per_token,
    head_flops,
    num_params,
    parameter_shapes,
    score_flops,
)
from ernie5.config.loader import dump_config, load_config
from ernie5.config.preset import PRESETS, model_preset
from ernie5.config.schema import (
    AudioTokenizerConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    ParallelConfig,
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
    "ParallelConfig",
    "ParameterCount",
    "RunConfig",
    "TextTokenizerConfig",
    "TokenizersConfig",
    "TrainerConfig",
    "VisionTokenizerConfig",
    "block_flops",
    "expert_flops",
    "dump_config",
    "flops_per_token",
    "head_flops",
    "load_config",
    "model_preset",
    "num_params",
    "parameter_shapes",
    "score_flops",
    "validate",
    "validate_model",
]
