"""Sound <-> codes: the facade of the audio tokenizer (ERNIE 5.0 report §2.3.1).

n samples at 16 kHz, F = ceil(n / 1280) frames of 80 ms (12.5 Hz), Q codes a frame, D_s dims of a speaker embedding.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path

import numpy as np
import paddle
from paddle import nn
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from ernie5.config.schema import AudioTokenizerConfig
from ernie5.files import read_versioned_json, replacing_folder
from ernie5.tokenizers import audio_features as features
from ernie5.tokenizers.audio_codec import Codec, train_codec
from ernie5.tokenizers.audio_speaker import SpeakerEncoder, train_speaker_encoder
from ernie5.tokenizers.audio_teacher import SemanticTeacher, pooled, train_recogniser
from ernie5.tokenizers.audio_training import Budget, Recordings

FORMAT_VERSION = 1
_REMEDY = "train it with tools/train_tokenizer.py audio"


class AudioTokenizer:
    """Trained codec and speaker encoder. Build it with ``train`` or ``load``; all calls take and give numpy arrays."""

    def __init__(self, config: AudioTokenizerConfig, codec: Codec, speaker: SpeakerEncoder):
        self.config = config
        self._codec, self._speaker = codec, speaker
        codec.eval()
        speaker.eval()

    @classmethod
    def train(
        cls,
        config: AudioTokenizerConfig,
        waves: Sequence[np.ndarray],
        transcripts: Sequence[str],
        speakers: Sequence[str],
        progress: bool = True,
        teacher: SemanticTeacher | None = None,
    ) -> AudioTokenizer:
        """Teacher, speaker encoder, codec, in this order.

        ``waves``: float [n] at 16 kHz; ``transcripts`` may be empty strings when a ``teacher`` is given; ``speakers``
        names the voice of each wave. Raises ValueError for lists of different lengths, bad waves, missing transcripts.
        """
        check_config(config)
        checked = _checked_corpus(waves, transcripts, speakers, teacher is None)
        recordings = Recordings(checked)
        if teacher is None:
            budget = Budget(config.teacher_steps, config.batch_size, config.learning_rate, config.seed, progress)
            teacher = train_recogniser(recordings, transcripts, budget)
        budget = Budget(config.speaker_steps, 2 * config.batch_size, config.learning_rate, config.seed, progress)
        speaker = train_speaker_encoder(recordings, speakers, config.speaker_dim, budget)
        codec = train_codec(config, recordings, _targets(teacher, checked), progress)
        return cls(config, codec, speaker)

    def encode(self, wave: np.ndarray) -> np.ndarray:
        """float [n] -> int64 [F, Q]; the last frame is filled up with silence."""
        return self.encode_batch([wave])[0]

    def encode_batch(self, waves: Sequence[np.ndarray]) -> list[np.ndarray]:
        """``encode`` for many waves; those of equal frame count go through the network together."""
        return by_length([features.check_wave(wave) for wave in waves], self._codec.encode)

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """int [F, Q] -> float32 [F * 1280] in [-1, 1]."""
        codes = np.asarray(codes)
        shape = f"[F, {self.config.levels}] with F > 0"
        if codes.ndim != 2 or codes.shape[1] != self.config.levels or not len(codes):
            raise ValueError(f"audio codes have shape {codes.shape}, expected {shape}")
        if codes.min() < 0 or codes.max() >= self.config.codebook_size:
            found, last = f"{codes.min()}..{codes.max()}", self.config.codebook_size - 1
            raise ValueError(f"audio codes lie in {found}, expected 0..{last}; remove end marks")
        return np.clip(self._codec.decode(codes), -1.0, 1.0)

    def speaker_embedding(self, wave: np.ndarray) -> np.ndarray:
        """float [n] -> float32 [D_s] of length 1."""
        return self.speaker_embeddings([wave])[0]

    def speaker_embeddings(self, waves: Sequence[np.ndarray]) -> list[np.ndarray]:
        """``speaker_embedding`` for many waves."""
        return by_length([features.check_wave(wave) for wave in waves], self._speaker.embed)

    def save(self, folder: str | os.PathLike) -> None:
        """Writes ``config.json`` and ``weights.safetensors``; the folder appears complete or not at all."""
        weights = {name: value.numpy() for name, value in _both(self._codec, self._speaker).state_dict().items()}
        head = {"format_version": FORMAT_VERSION, "teacher_dim": self._codec.to_teacher.weight.shape[1]}
        with replacing_folder(folder) as temporary:
            save_file(weights, str(temporary / "weights.safetensors"))
            text = json.dumps({**head, "config": asdict(self.config)}, indent=1)
            (temporary / "config.json").write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | os.PathLike) -> AudioTokenizer:
        """Raises ValueError in one line for a missing, corrupt or differently shaped checkpoint."""
        path = Path(folder) / "config.json"
        head = read_versioned_json(path, FORMAT_VERSION, "audio tokenizer", _REMEDY)
        known = {field.name for field in fields(AudioTokenizerConfig)}
        if not isinstance(head.get("config"), dict) or set(head["config"]) != known or "teacher_dim" not in head:
            raise ValueError(f"{path}: the audio tokenizer's settings are not those of this version; {_REMEDY}")
        config = AudioTokenizerConfig(**head["config"])
        check_config(config)
        codec, speaker = Codec(config, head["teacher_dim"]), SpeakerEncoder(config.speaker_dim)
        _load_weights(_both(codec, speaker), Path(folder) / "weights.safetensors")
        return cls(config, codec, speaker)


def check_config(config: AudioTokenizerConfig) -> None:
    """Raises ValueError for settings that this codec cannot have."""
    if config.sample_rate != features.SAMPLE_RATE:
        raise ValueError(f"tokenizers.audio.sample_rate is {config.sample_rate}, this codec works at 16000; resample")
    if config.frame_ms * features.SAMPLE_RATE != 1000 * features.FRAME:
        raise ValueError(f"tokenizers.audio.frame_ms is {config.frame_ms}, this codec has frames of 80 ms (12.5 Hz)")
    for name in ("levels", "codebook_size", "latent_dim", "channels", "batch_size", "speaker_dim"):
        if getattr(config, name) < 1:
            raise ValueError(f"tokenizers.audio.{name} is {getattr(config, name)}, expected at least 1")


def _both(codec: Codec, speaker: SpeakerEncoder) -> nn.Layer:
    return nn.LayerDict({"codec": codec, "speaker": speaker})


def _load_weights(network: nn.Layer, path: Path) -> None:
    """Fills ``network``; every tensor must be there, none may be left over, and shapes must agree."""
    try:
        stored = load_file(str(path))
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: unreadable audio tokenizer weights ({error}); {_REMEDY}") from None
    wanted = network.state_dict()
    different = sorted(set(stored) ^ set(wanted))
    if different:
        raise ValueError(f"{path}: {different[0]!r} is in only one of file and network; {_REMEDY}")
    for name, tensor in wanted.items():
        if list(stored[name].shape) != list(tensor.shape):
            found, expected = list(stored[name].shape), list(tensor.shape)
            raise ValueError(f"{path}: {name} has shape {found}, the configuration says {expected}; {_REMEDY}")
    network.set_state_dict({name: paddle.to_tensor(value) for name, value in stored.items()})


def _checked_corpus(
    waves: Sequence[np.ndarray], transcripts: Sequence[str], speakers: Sequence[str], need_text: bool
) -> list[np.ndarray]:
    if not len(waves) == len(transcripts) == len(speakers):
        found = f"{len(waves)} waves, {len(transcripts)} transcripts, {len(speakers)} speakers"
        raise ValueError(f"the audio tokenizer needs one transcript and one speaker a wave, found {found}")
    if not len(waves):
        raise ValueError("the audio tokenizer needs recordings to learn from, got none")
    checked = []
    for number, (wave, text) in enumerate(zip(waves, transcripts, strict=True)):
        try:
            checked.append(features.check_wave(wave))
        except ValueError as error:
            raise ValueError(f"recording {number}: {error}") from None
        if need_text and not text:
            raise ValueError(f"recording {number} has no transcript; give one, or a semantic teacher that needs none")
    return checked


def _targets(teacher: SemanticTeacher, waves: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The teacher's pooled features of each wave [F, D_t], each dim with mean 0 and spread 1 over the corpus."""
    targets = by_length(waves, partial(pooled, teacher))
    everything = np.concatenate(targets)
    mean, spread = everything.mean(axis=0), everything.std(axis=0) + 1e-6
    return [((target - mean) / spread).astype(np.float32) for target in targets]


def by_length(
    waves: Sequence[np.ndarray], network: Callable[[np.ndarray], np.ndarray], largest: int = 64
) -> list[np.ndarray]:
    """Applies ``network`` [B, F * 1280] -> [B, ...] to groups of waves of equal frame count; keeps the order."""
    frames = np.array([features.num_frames(len(wave)) for wave in waves])
    results: list[np.ndarray] = [None] * len(waves)
    for count in np.unique(frames):
        rows = np.nonzero(frames == count)[0]
        for chunk in np.array_split(rows, -(-len(rows) // largest)):
            out = network(np.stack([features.pad_to_frames(waves[i]) for i in chunk]))
            for i, item in zip(chunk, out, strict=True):
                results[i] = item
    return results
