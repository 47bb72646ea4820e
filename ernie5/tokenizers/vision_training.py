"""Training of the vision tokenizer: teacher, then each member of the series on images and, inflated, on clips.

Order (ERNIE 5.0 report §2.2.1): the ViT learns to name what captions say; the narrowest member learns images as a 2-D
network, is inflated to causal 3-D and learns clips; every wider member starts from it and learns both again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import paddle
from paddle import Tensor, nn
from tqdm import tqdm

from ernie5.config.schema import VisionTokenizerConfig
from ernie5.tokenizers.scales import ScalePyramid
from ernie5.tokenizers.vision_augment import jitter
from ernie5.tokenizers.vision_losses import Adversary, SemanticAlignment, reconstruction_loss
from ernie5.tokenizers.vision_network import TokenizerNetwork, inflate, start_from_patches, widen
from ernie5.tokenizers.vision_quantiser import MultiScaleQuantiser
from ernie5.tokenizers.vision_vit import CaptionWords, VisionTransformer, WordHead, word_loss

WARMUP_STEPS = 20
NARROW_SHARE = 0.5  # steps of a narrower member, as a share of the widest one's
STARTING_IMAGES = 512  # images whose patches a member starts from
SEMANTIC_FRAMES = 8  # frames of a batch that the semantic loss looks at


def to_pixels(frames: np.ndarray) -> Tensor:
    """uint8 [..., H, W, 3] -> float32 [N, 3, H, W] in [-1, 1], leading axes flattened."""
    flat = frames.reshape(-1, *frames.shape[-3:]).transpose(0, 3, 1, 2)
    return paddle.to_tensor(flat.astype(np.float32) / 127.5 - 1)


def train_teacher(
    config: VisionTokenizerConfig, images: np.ndarray, captions: Sequence[str], progress: bool
) -> VisionTransformer:
    """A ViT that has learned to predict the captions' words. Raises ValueError when captions tell nothing apart."""
    words = CaptionWords(captions)
    if not words.words:
        raise ValueError(
            f"captions: found no word that some of the {len(captions)} captions share and others lack; the semantic "
            "teacher needs such words; give captions that describe their images"
        )
    teacher, head = VisionTransformer(config), WordHead(config, words.labels.mean(axis=0))
    rng = np.random.default_rng([config.seed, 0])
    optimizer, schedule = _optimizer(config, [teacher, head], config.vit_steps)
    for _ in _steps(config.vit_steps, "semantic teacher", progress):
        rows = rng.integers(len(images), size=config.batch_size)
        patches = teacher(to_pixels(jitter(images[rows], rng)))
        word_loss(head(patches), paddle.to_tensor(words.labels[rows])).backward()
        _update(optimizer, schedule)
    teacher.eval()
    return teacher


class MemberTrainer:
    """Trains one member of the series; the losses' weights come from the configuration."""

    def __init__(self, config: VisionTokenizerConfig, teacher: VisionTransformer, bits: int):
        self.config, self.teacher, self.bits = config, teacher, bits
        self.quantiser = MultiScaleQuantiser(ScalePyramid(config.scales))
        self.alignment = SemanticAlignment(config, bits)
        self.adversary = Adversary(config.channels, config.learning_rate) if config.weight_adversarial > 0 else None

    def losses(self, network: TokenizerNetwork, pixels: Tensor, clips: int) -> tuple[Tensor, Tensor]:
        """Total loss and drawn frames for pixels [clips*T, 3, H, W]."""
        config = self.config
        features = network.encoder.features(pixels)
        latent = network.encoder.bottleneck(features, pixels, clips)
        code = self.quantiser(latent.flatten(2))
        drawn = network.decoder(code.total.reshape(latent.shape), clips)
        loss = (
            reconstruction_loss(drawn, pixels)
            + config.weight_commitment * code.commitment
            + config.weight_entropy * code.entropy
        )
        if config.weight_semantic > 0:
            loss = loss + config.weight_semantic * self._semantic(network, pixels, features, latent, clips)
        if self.adversary is not None:
            loss = loss + config.weight_adversarial * self.adversary.generator_loss(drawn)
        return loss, drawn

    def _semantic(
        self, network: TokenizerNetwork, pixels: Tensor, features: Tensor, latent: Tensor, clips: int
    ) -> Tensor:
        """Compares some latent frames, evenly spread, each with the last raw frame it has seen."""
        stride, frames = self.config.temporal_stride, latent.shape[0]
        raw = np.arange(pixels.shape[0]).reshape(clips, -1)[:, ::stride].ravel()
        chosen = np.linspace(0, frames - 1, min(SEMANTIC_FRAMES, frames)).astype(int)
        latent, chosen = latent.index_select(paddle.to_tensor(chosen)), paddle.to_tensor(raw[chosen])
        features = features.index_select(chosen)
        with paddle.no_grad():
            patches = self.teacher(pixels.index_select(chosen))
        grid = [patches.shape[0], -1, self.teacher.side, self.teacher.side]
        return self.alignment(latent, features, patches.transpose([0, 2, 1]).reshape(grid))

    def run(
        self, network: TokenizerNetwork, steps: int, draw: Callable[[int], np.ndarray], name: str, progress: bool
    ) -> None:
        """Trains in place. ``draw(step)`` gives uint8 [B, H, W, 3] or [B, T, H, W, 3]."""
        optimizer, schedule = _optimizer(self.config, [network, self.alignment], steps)
        for step in _steps(steps, name, progress):
            frames = draw(step)
            pixels = to_pixels(frames)
            loss, drawn = self.losses(network, pixels, len(frames))
            loss.backward()
            _update(optimizer, schedule)
            if self.adversary is not None:
                self.adversary.learn(pixels, drawn)


def train_series(
    config: VisionTokenizerConfig, teacher: VisionTransformer, images: np.ndarray, clips: np.ndarray, progress: bool
) -> dict[int, TokenizerNetwork]:
    """Every member of the series, {bits: causal 3-D network}, narrowest first."""
    members: dict[int, TokenizerNetwork] = {}
    for number, bits in enumerate(config.bits):
        rng = np.random.default_rng([config.seed, 1 + number])
        some = to_pixels(images[rng.integers(len(images), size=STARTING_IMAGES)])
        trainer = MemberTrainer(config, teacher, bits)
        if number == 0:
            network = TokenizerNetwork(config, bits, temporal=False)
            start_from_patches(network, some.numpy(), rng)
        else:
            network = widen(network, bits, some.numpy(), _lost(config, network, some), rng)
        share = 1.0 if bits == config.bits[-1] else NARROW_SHARE
        image_steps, video_steps = round(share * config.image_steps), round(share * config.video_steps)
        trainer.run(network, image_steps, _image_batches(config, images, rng), f"{bits}-bit images", progress)
        if not network.temporal:
            network = inflate(network)
        if len(clips):
            trainer.run(network, video_steps, _mixed_batches(config, images, clips, rng), f"{bits}-bit clips", progress)
        network.eval()
        members[bits] = network
    return members


def _lost(config: VisionTokenizerConfig, network: TokenizerNetwork, pixels: Tensor) -> np.ndarray:
    """Pixels [M, 3, H, W] minus what a member makes of them."""
    with paddle.no_grad():
        latent = network.encoder(pixels, len(pixels))
        total = MultiScaleQuantiser(ScalePyramid(config.scales))(latent.flatten(2)).total
        drawn = network.decoder(total.reshape(latent.shape), len(pixels)).clip(-1.0, 1.0)
    return (pixels - drawn).numpy()


def _image_batches(
    config: VisionTokenizerConfig, images: np.ndarray, rng: np.random.Generator
) -> Callable[[int], np.ndarray]:
    return lambda step: jitter(images[rng.integers(len(images), size=config.batch_size)], rng)


def _mixed_batches(
    config: VisionTokenizerConfig, images: np.ndarray, clips: np.ndarray, rng: np.random.Generator
) -> Callable[[int], np.ndarray]:
    """Clips, and every fourth step images, so that pictures stay as good as they were."""
    pictures = _image_batches(config, images, rng)

    def draw(step: int) -> np.ndarray:
        return pictures(step) if step % 4 == 3 else clips[rng.integers(len(clips), size=config.video_batch_size)]

    return draw


def _optimizer(
    config: VisionTokenizerConfig, layers: list[nn.Layer], steps: int
) -> tuple[paddle.optimizer.Optimizer, paddle.optimizer.lr.LRScheduler]:
    """AdamW with a short warm-up and a cosine down to 2 % of the rate."""
    rate, warmup = config.learning_rate, min(WARMUP_STEPS, max(steps // 10, 1))
    cosine = paddle.optimizer.lr.CosineAnnealingDecay(rate, max(steps - warmup, 1), eta_min=0.02 * rate)
    schedule = paddle.optimizer.lr.LinearWarmup(cosine, warmup, rate / (warmup + 1), rate)
    optimizer = paddle.optimizer.AdamW(
        schedule,
        beta2=0.99,
        weight_decay=0.02,
        parameters=[p for layer in layers for p in layer.parameters()],
        grad_clip=nn.ClipGradByGlobalNorm(1.0),
    )
    return optimizer, schedule


def _update(optimizer: paddle.optimizer.Optimizer, schedule: paddle.optimizer.lr.LRScheduler) -> None:
    optimizer.step()
    optimizer.clear_grad()
    schedule.step()


def _steps(count: int, name: str, progress: bool) -> tqdm:
    return tqdm(range(count), desc=name, unit="step", disable=not progress, mininterval=1.0)
