"""The codec's networks and its training: 80 ms of sound -> latent -> RVQ -> mel bands and pitch -> wave.

B recordings, F frames (80 ms), T = 8 F hops (10 ms), bins of the STFT, M mel bands, N = B * F, D latent dims, Q levels.
"Sound" is what the codec keeps of a hop, S = M + 2 numbers: compressed mel bands, voiced or not, octaves of the pitch.
Phases are made up by the vocoder, so waves match by ear and not sample by sample.
ERNIE 5.0 report §2.3.1: first code semantic (distilled), the others residual; losses after
SpeechTokenizer (2308.16692).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import Tensor, nn

from ernie5.config.schema import AudioTokenizerConfig
from ernie5.tokenizers import audio_features as features
from ernie5.tokenizers.audio_layers import ResidualBlock, TimeConv, initialise
from ernie5.tokenizers.audio_quantiser import ResidualQuantiser
from ernie5.tokenizers.audio_training import Budget, Order, Recordings, optimiser, steps_of, warped_mel
from ernie5.tokenizers.audio_voice import pitch, synthesise

SOUND = features.MELS + 2
MIDDLE_PITCH = 130.0  # Hz at 0 octaves
CODE_DIM = 16
CROP_FRAMES = 12  # of a training recording
UNQUANTISED = 0.2  # share of the steps before the codebooks start
WEIGHT_VOICED, WEIGHT_PITCH = 0.1, 0.5
DROPOUT = 0.3  # share of recordings a step that use fewer levels (quantiser dropout)
WARPS = (0.88, 0.94, 1.0, 1.0, 1.0, 1.07, 1.14)
_KMEANS_BATCHES = 12


class Codec(nn.Layer):
    """Encoder, quantiser, decoder, and the head that shows the first code to the semantic teacher."""

    def __init__(self, config: AudioTokenizerConfig, teacher_dim: int):
        super().__init__()
        hops, channels, latent = features.HOPS_PER_FRAME, config.channels, config.latent_dim
        self.enter = TimeConv(hops * SOUND, channels)
        self.encoder = nn.Sequential(ResidualBlock(channels), ResidualBlock(channels), nn.LayerNorm(channels))
        self.to_latent = nn.Linear(channels, latent)
        self.quantiser = ResidualQuantiser(latent, CODE_DIM, config.levels, config.codebook_size)
        self.from_latent = TimeConv(latent, channels)
        self.decoder = nn.Sequential(
            ResidualBlock(channels), ResidualBlock(channels), ResidualBlock(channels), nn.LayerNorm(channels)
        )
        self.leave = nn.Linear(channels, hops * SOUND)
        self.to_teacher = nn.Linear(latent, teacher_dim)

    def latent(self, sound: Tensor) -> Tensor:
        """[B, T, S] -> [B, F, D]."""
        batch, hops, numbers = sound.shape
        frames = sound.reshape([batch, hops // features.HOPS_PER_FRAME, features.HOPS_PER_FRAME * numbers])
        return self.to_latent(self.encoder(F.relu(self.enter(frames))))

    def sound(self, latent: Tensor) -> Tensor:
        """[B, F, D] -> [B, T, S]; the voiced entry is a logit."""
        out = self.leave(self.decoder(F.relu(self.from_latent(latent))))
        return out.reshape([out.shape[0], -1, SOUND])

    @paddle.no_grad()
    def encode(self, waves: np.ndarray) -> np.ndarray:
        """float32 [B, F * 1280] -> int64 [B, F, Q]."""
        mel = features.compress(np.abs(features.stft(waves)) @ features.mel_matrix())
        latent = self.latent(paddle.to_tensor(sound_of(mel, np.stack([pitch(wave) for wave in waves]))))
        return self.quantiser(latent.flatten(0, 1)).codes.numpy().reshape(*latent.shape[:2], -1)

    @paddle.no_grad()
    def decode(self, codes: np.ndarray) -> np.ndarray:
        """int [F, Q] -> float32 [F * 1280]."""
        latent = self.quantiser.look_up(paddle.to_tensor(codes.astype(np.int64)))
        sound = self.sound(latent.unsqueeze(0)).numpy()[0]
        octaves = np.clip(sound[:, -1], -1.5, 2.0)
        hertz = np.where(sound[:, -2] > 0, MIDDLE_PITCH * 2.0**octaves, 0.0)
        return synthesise(features.expand(sound[:, : features.MELS]), hertz)


def sound_of(mel: np.ndarray, hertz: np.ndarray) -> np.ndarray:
    """Compressed mel [..., T, M] and pitch [..., T] -> float32 [..., T, S]; unvoiced hops have 0 octaves."""
    voiced = hertz > 0
    octaves = np.log2(np.where(voiced, hertz, MIDDLE_PITCH) / MIDDLE_PITCH)
    return np.concatenate([mel, voiced[..., None], octaves[..., None]], axis=-1).astype(np.float32)


def distillation_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """SpeechTokenizer's: mean over dims d of -log sigmoid(cos over frames of student[.., d] and teacher[.., d]).

    [B, F, D] each. Its least value is log(1 + 1/e) = 0.313, at cosine 1.
    """
    return -F.log_sigmoid(F.cosine_similarity(student, teacher, axis=1)).mean()


def reconstruction_loss(made: Tensor, real: Tensor) -> Tensor:
    """Distance of sounds [B, T, S]: mel bands at three resolutions, is it voiced, and the pitch where it is.

    Mean absolute differences of single bands (loud ones count more), of four bands together, and of 40 ms together.
    """
    bands = features.MELS
    target = real[:, :, :bands]
    gap = made[:, :, :bands] - target
    batch, hops = gap.shape[:2]
    fine = (paddle.abs(gap) * (0.3 + target)).mean()
    wide = paddle.abs(gap.reshape([batch, hops, bands // 4, 4]).mean(axis=3)).mean()
    slow = paddle.abs(gap.reshape([batch, hops // 4, 4, bands]).mean(axis=2)).mean()
    voiced = real[:, :, bands]
    heard = F.binary_cross_entropy_with_logits(made[:, :, bands], voiced)
    octaves = (paddle.abs(made[:, :, bands + 1] - real[:, :, bands + 1]) * voiced).mean()
    return fine + wide + slow + WEIGHT_VOICED * heard + WEIGHT_PITCH * octaves


def train_codec(
    config: AudioTokenizerConfig, recordings: Recordings, targets: Sequence[np.ndarray], progress: bool
) -> Codec:
    """``targets``: the teacher's pooled features float32 [F, D_t] of each recording, standardised per dim."""
    rng = np.random.default_rng([config.seed, 3])
    network = Codec(config, targets[0].shape[1])
    initialise(network, rng)
    budget = Budget(config.codec_steps, config.batch_size, config.learning_rate, config.seed, progress)
    update = optimiser(network, budget)
    order = Order(len(recordings), rng)
    first_quantised = int(UNQUANTISED * config.codec_steps)
    for step in steps_of(budget, "audio codec"):
        if step == first_quantised:
            _start_codebooks(network, recordings, order, rng, config.batch_size)
        real, taught = _batch(recordings, targets, order.draw(config.batch_size), rng)
        latent = network.latent(real)
        flat = latent.flatten(0, 1)
        if step < first_quantised:
            quantised = network.quantiser.unquantised(flat)
        else:
            quantised = network.quantiser(flat, _kept_levels(config, rng), rng)
        made = network.sound(quantised.total.reshape(latent.shape))
        shown = network.to_teacher(quantised.first).reshape(taught.shape)
        loss = reconstruction_loss(made, real)
        loss = loss + config.weight_semantic * distillation_loss(shown, taught)
        update(loss + config.weight_commitment * quantised.commitment)
    network.eval()
    return network


def _kept_levels(config: AudioTokenizerConfig, rng: np.random.Generator) -> Tensor:
    """int64 [batch * CROP_FRAMES]: levels the frames of each recording may use."""
    dropped = rng.random(config.batch_size) < DROPOUT
    kept = np.where(dropped, rng.integers(1, config.levels + 1, config.batch_size), config.levels)
    return paddle.to_tensor(kept.repeat(CROP_FRAMES))


@paddle.no_grad()
def _start_codebooks(
    network: Codec, recordings: Recordings, order: Order, rng: np.random.Generator, batch: int
) -> None:
    """k-means on the latents of a few unwarped batches."""
    latents = []
    for _ in range(_KMEANS_BATCHES):
        chosen = order.draw(batch)
        sound = _sound(recordings, chosen, np.zeros(len(chosen), int), np.ones(len(chosen)))
        latents.append(network.latent(sound).flatten(0, 1))
    network.quantiser.start_from(paddle.concat(latents), rng)


def _sound(recordings: Recordings, chosen: np.ndarray, starts: np.ndarray, warps: np.ndarray) -> Tensor:
    """[B, T, S] of the crops, every frequency multiplied by ``warps`` [B]: other throats, other pitch."""
    magnitudes, hertz = recordings.crop(chosen, starts, CROP_FRAMES)
    return paddle.to_tensor(sound_of(warped_mel(magnitudes, warps), hertz * warps[:, None]))


def _batch(
    recordings: Recordings, targets: Sequence[np.ndarray], chosen: np.ndarray, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Random crops: sound [B, T, S] and the teacher's features [B, F, D_t], zeros behind the end."""
    starts = rng.integers(np.maximum(recordings.frames[chosen] - CROP_FRAMES, 0) + 1)
    taught = np.zeros((len(chosen), CROP_FRAMES, targets[0].shape[1]), np.float32)
    for row, (i, start) in enumerate(zip(chosen, starts, strict=True)):
        piece = targets[i][start : start + CROP_FRAMES]
        taught[row, : len(piece)] = piece
    return _sound(recordings, chosen, starts, rng.choice(WARPS, len(chosen))), paddle.to_tensor(taught)
