"""``Ernie5Config``: the shape of the model as a PaddleNLP ``PretrainedConfig`` (saved as ``config.json``)."""

from __future__ import annotations

from dataclasses import asdict, fields

from ernie5.config.schema import ModelConfig
from ernie5.paddlenlp import PretrainedConfig


class Ernie5Config(PretrainedConfig):
    """Every field of ``ModelConfig`` is an attribute; unknown keywords go to ``PretrainedConfig``."""

    model_type = "ernie5"

    def __init__(self, **kwargs: object) -> None:
        shape = {name: kwargs.pop(name, default) for name, default in asdict(ModelConfig()).items()}
        kwargs["tie_word_embeddings"] = False  # the text head multiplies by the embedding itself; nothing to re-tie
        super().__init__(**kwargs)
        for name, value in shape.items():  # last: PaddleNLP has a ``recompute`` of its own, off unless told
            setattr(self, name, value)

    @classmethod
    def from_model_config(cls, config: ModelConfig) -> Ernie5Config:
        return cls(**asdict(config))

    def to_model_config(self) -> ModelConfig:
        return ModelConfig(**{field.name: getattr(self, field.name) for field in fields(ModelConfig)})
