"""A small coded corpus of made-up media and real texts, and a tokenizer for it."""

from __future__ import annotations

import numpy as np

from ernie5.config.schema import Config
from ernie5.data.corpus import CodedCorpus
from ernie5.sequence.parts import AudioCodes, Sample, SpeakerEmbedding, Text, VisionFeatures, VisionLatent
from ernie5.tokenizers.text import TextTokenizer

SENTENCE = "a row holds documents and a document holds groups while padding fills what is left of the row"
WORDS = SENTENCE.split(" ")


def prose(rng: np.random.Generator, words: int) -> str:
    return " ".join(rng.choice(WORDS, words))


def configuration(**mixture: float) -> Config:
    config = Config()
    config.data.mixture = mixture
    config.trainer.rows_per_step, config.trainer.max_steps = 4, 50
    return config


def _latent(rng: np.random.Generator, frames: int) -> VisionLatent:
    latents = {bits: rng.normal(size=(frames, 4, 4, bits)).astype(np.float32) for bits in (8, 16)}
    return VisionLatent(latents, video=frames > 1)


def _features(rng: np.random.Generator) -> VisionFeatures:
    cnn, vit = (rng.normal(size=(16, 4, 48)).astype(np.float32) for _ in range(2))
    return VisionFeatures(cnn, vit, (1, 4, 4))


def corpus(count: int = 12) -> CodedCorpus:
    """Tasks ``text`` (two short texts and a long one), ``see``, ``draw``, ``film``, ``say``."""
    rng = np.random.default_rng(0)
    samples = [Sample([Text(prose(rng, words))], "text", {"words": words}) for words in (30, 30, 3000)]
    voice = SpeakerEmbedding(rng.normal(size=32).astype(np.float32))
    for i in range(count):
        codes = rng.integers(0, 256, (6, 4))
        question = Text(("what is this?", "name it"), loss=False)
        samples += [
            Sample([_features(rng), question, Text("a row")], "see", {"i": i}),
            Sample([Text("draw a row"), _latent(rng, 1)], "draw", {"i": i}),
            Sample([Text("a row moves"), _latent(rng, 3)], "film", {"i": i}),
            Sample([Text("say: row"), voice, AudioCodes(codes, generate=True)], "say", {"i": i}),
        ]
    return CodedCorpus(samples, "made-up")


def tokenizer() -> TextTokenizer:
    rng = np.random.default_rng(1)
    texts = [prose(rng, 500), "draw a row moves", "say: what is this? name it"]
    return TextTokenizer.train(texts, 320, progress=False)
