"""A tiny model on made-up rows for the trainer's tests.

``python -m tests.trainer.tiny_run DIR STEPS [--resume] [--pause SECONDS]``
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace

import numpy as np

import ernie5  # noqa: F401
from ernie5.config.schema import Config, ModelConfig
from ernie5.model import Ernie5Config, Ernie5ForCausalLM
from ernie5.sequence.vocabulary import IGNORE, NO_CODE, Kind, Special
from ernie5.trainer import Ernie5Trainer, training_arguments

LENGTH = 24
SHAPE = ModelConfig(
    vocab_size=64,
    hidden_size=32,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=16,
    num_experts=8,
    experts_per_token=2,
    expert_intermediate_size=16,
    shared_expert_intermediate_size=16,
    max_sequence_length=LENGTH,
    vision_bits=4,
    vision_num_scales=2,
    vision_cnn_dim=8,
    vision_vit_dim=8,
    merger_heads=2,
    audio_levels=2,
    audio_codebook_size=8,
    speaker_dim=4,
)


class MadeUpRows:
    """Row i: text, eight image positions, four audio positions. ``poison`` rows carry an infinite loss weight."""

    def __init__(self, poison: int = -1, pause: float = 0.0) -> None:
        self.poison, self.pause = poison, pause

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        time.sleep(self.pause)
        rng = np.random.default_rng((7, i))
        columns = np.arange(LENGTH, dtype=np.int32)
        end = np.full_like(columns, LENGTH)
        row = {
            "input_ids": rng.integers(16, SHAPE.vocab_size, LENGTH),
            "positions": np.repeat(np.arange(LENGTH, dtype=np.float32)[:, None], 3, axis=1),
            "attention_intervals": np.stack([end, end, np.zeros_like(columns), columns], -1)[None],
            "audio_codes": np.full((LENGTH, SHAPE.audio_levels), NO_CODE, np.int64),
            "labels_text": np.full(LENGTH, IGNORE, np.int64),
            "labels_mtp": np.full(LENGTH, IGNORE, np.int64),
            "labels_bits": np.full((LENGTH, SHAPE.vision_bits), IGNORE, np.int64),
            "labels_audio": np.full((LENGTH, SHAPE.audio_levels), IGNORE, np.int64),
            "loss_weight": np.ones(LENGTH, np.float32),
            "kind": np.full(LENGTH, Kind.TEXT, np.int64),
            "document": np.ones(LENGTH, np.int64),
            "vision_features": np.zeros((0, SHAPE.vision_bits), np.float32),
            "vision_scale": np.zeros(0, np.int64),
            "vision_index": np.zeros(0, np.int64),
            "patch_cnn": np.zeros((0, 4, SHAPE.vision_cnn_dim), np.float32),
            "patch_vit": np.zeros((0, 4, SHAPE.vision_vit_dim), np.float32),
            "patch_mask": np.zeros((0, 4), np.float32),
            "patch_index": np.zeros(0, np.int64),
            "speaker": np.zeros((0, SHAPE.speaker_dim), np.float32),
            "speaker_index": np.zeros(0, np.int64),
        }
        row["input_ids"][1::2] = row["input_ids"][::2]  # something to learn: every second token repeats
        row["labels_text"][:11] = row["input_ids"][1:12]
        row["labels_mtp"][:10] = row["input_ids"][2:12]
        row["kind"][12:20], row["kind"][20:] = Kind.IMAGE_GEN, Kind.AUDIO_GEN
        row["labels_bits"][12:20] = rng.integers(0, 2, (8, SHAPE.vision_bits))
        row["labels_audio"][20:24] = rng.integers(0, SHAPE.audio_codebook_size, (4, SHAPE.audio_levels))
        if i % 3 == 0:
            row["input_ids"][22:] = Special.PAD
        if i == self.poison:
            row["loss_weight"][3] = np.inf
        return row

    def describe(self, i: int) -> dict:
        return {"task": "made_up", "number": i}


def tiny_config(steps: int, **trainer: object) -> Config:
    config = Config(model=SHAPE)
    config.data.workers = 1
    values = {"max_steps": steps, "rows_per_step": 2, "warmup_steps": 3, "save_steps": 4, "log_steps": 3, **trainer}
    for name, value in values.items():
        assert hasattr(config.trainer, name), name
        setattr(config.trainer, name, value)
    return config


def tiny_model(**changes: object) -> Ernie5ForCausalLM:
    return Ernie5ForCausalLM(Ernie5Config.from_model_config(replace(SHAPE, **changes)), seed=5)


def tiny_trainer(
    run_dir: str, config: Config, rows: MadeUpRows | None = None, model: Ernie5ForCausalLM | None = None
) -> Ernie5Trainer:
    args = training_arguments(config, run_dir)
    return Ernie5Trainer(model=model or tiny_model(), args=args, train_dataset=rows or MadeUpRows())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("dir")
    parser.add_argument("steps", type=int)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--pause", type=float, default=0.0)
    args = parser.parse_args()
    config = tiny_config(args.steps, learning_rate=1.0e-2, batch_ramp=[[5, 2], [9, 3]])
    tiny_trainer(args.dir, config, MadeUpRows(pause=args.pause)).train(resume=args.resume)


if __name__ == "__main__":
    main()
