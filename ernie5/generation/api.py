"""``generate``: prompts of any mix of modalities in, one modality out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import paddle

from ernie5.generation.decode import Decoder
from ernie5.generation.sampling import Sampler, Sampling
from ernie5.generation.walk import Walk
from ernie5.sequence.parts import CodedPart, RawPart, Sample, Text
from ernie5.sequence.plan import TARGETS, plan_batch
from ernie5.sequence.spec import LayoutSpec

Prompt = Sequence[RawPart]
Result = str | np.ndarray


def generate(
    model: Any,
    tokenizers: Any,
    prompt: Prompt | Sequence[Prompt],
    to: str,
    *,
    max_new_tokens: int | None = None,
    num_frames: int | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    guidance: float = 1.0,
    seed: int = 0,
    context: np.ndarray | Sequence[np.ndarray] | None = None,
    spec: LayoutSpec | None = None,
) -> list[Result]:
    """Continues each prompt with text, an image, a video or audio.

    Args:
        model: an ``Ernie5ForCausalLM``. tokenizers: the ``Tokenizers`` it was trained with.
        prompt: raw parts in reading order, or a list of such prompts, which are decoded together.
        to: "text", "image", "video" or "audio".
        max_new_tokens: most text tokens or 80 ms audio frames; default what the context still holds.
        num_frames: raw frames of a video, those of ``context`` included; default the tokenizer's training clip.
        temperature: of tokens, codes and bits; 0 takes the most likely.
        top_k, top_p: of text tokens and audio codes.
        guidance: classifier-free guidance of images, videos and audio; 1 is none and halves the work.
        seed: with the number of the prompt it fixes every random choice.
        context: uint8 [T, H, W, 3], real frames that a video continues; one clip, or one a prompt, of one shape.
        spec: layout options that are not in the model, such as the temporal window; default none of them.

    Returns one result a prompt: str of complete characters, uint8 [H, W, 3], uint8 [num_frames, H, W, 3] (context
    included, as the tokenizer restores it), or float32 [n] in [-1, 1] at 16 kHz. Raises ValueError, in one line, for an
    empty prompt, an unknown target, a bad option, or a prompt that does not fit the context.
    """
    prompts = _as_batch(prompt)
    sampling = Sampling(temperature, top_k, top_p)
    _check_options(prompts, to, max_new_tokens, guidance, context)
    spec = spec or LayoutSpec.of_model(model.config, tokenizers.vision.config.scales, tokenizers.vision.bits_series)
    coded = _encode(prompts, tokenizers)
    latents = _context_latents(context, len(prompts), tokenizers.vision, spec.bits)
    size = max_new_tokens or spec.length
    if to == "video":
        num_frames = tokenizers.vision.config.frames if num_frames is None else num_frames
        size = _latent_frames(num_frames, latents, tokenizers.vision)
    fields, steps = plan_batch(coded, to, tokenizers.text, spec, size, latents, guided=guidance != 1)
    training = model.training
    model.eval()
    try:
        with paddle.no_grad():
            sampler = Sampler(sampling, seed, len(prompts))
            rule = tokenizers.text.continuations if to == "text" else None
            decoder = Decoder(Walk(model, fields), steps, sampler, spec, len(prompts), guidance, rule)
            return _results(decoder, to, tokenizers, latents, num_frames)
    finally:
        model.train() if training else model.eval()


def _as_batch(prompt: Prompt | Sequence[Prompt]) -> list[list[RawPart]]:
    if prompt and isinstance(prompt[0], (list, tuple)):
        return [list(parts) for parts in prompt]
    return [list(prompt)]


def _check_options(
    prompts: list[list[RawPart]], to: str, max_new_tokens: int | None, guidance: float, context: Any
) -> None:
    if to not in TARGETS:
        raise ValueError(f"cannot generate '{to}'; choose one of {', '.join(TARGETS)}")
    for number, parts in enumerate(prompts):
        if all(isinstance(part, Text) and not _words(part) for part in parts) and context is None:
            raise ValueError(f"prompt {number} is empty; give some text, an image, audio or a video")
    if max_new_tokens is not None and max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: found {max_new_tokens}, expected a positive number")
    if guidance != 1 and to == "text":
        raise ValueError(f"guidance: found {guidance}, but text is generated without it; leave it at 1")
    if context is not None and to != "video":
        raise ValueError(f"context frames can only be continued as a video, not as {to}; put them into the prompt")


def _words(part: Text) -> str:
    return (part.text if isinstance(part.text, str) else "".join(part.text)).strip()


def _encode(prompts: list[list[RawPart]], tokenizers: Any) -> list[list[CodedPart]]:
    """Parts coded; prompts of text alone need no tokenizer here."""
    if all(isinstance(part, Text) for parts in prompts for part in parts):
        return prompts
    return [sample.parts for sample in tokenizers.encode_samples([Sample(parts) for parts in prompts], progress=False)]


def _context_latents(context: Any, prompts: int, vision: Any, bits: int) -> np.ndarray | None:
    """Latents float [P, T0, h, w, d] of the frames to continue."""
    if context is None:
        return None
    clips = [context] * prompts if isinstance(context, np.ndarray) and context.ndim == 4 else list(context)
    shapes = sorted({np.shape(clip) for clip in clips})
    if len(clips) != prompts or len(shapes) > 1 or len(shapes[0]) != 4:
        raise ValueError(
            f"context: found {len(clips)} clips of shapes {shapes} for {prompts} prompts, "
            "expected one clip a prompt, all of one shape [T, H, W, 3]"
        )
    return vision.encode(np.stack(clips), bits)


def _latent_frames(num_frames: int, latents: np.ndarray | None, vision: Any) -> int:
    if num_frames < 1:
        raise ValueError(f"num_frames: found {num_frames}, expected a positive number")
    count, given = vision.num_latent_frames(num_frames), 0 if latents is None else latents.shape[1]
    if given >= count:
        raise ValueError(
            f"num_frames: found {num_frames}, but the context fills {vision.num_frames(given)} frames already; "
            "ask for more"
        )
    return count


def _results(
    decoder: Decoder, to: str, tokenizers: Any, latents: np.ndarray | None, num_frames: int | None
) -> list[Result]:
    if to == "text":
        return [tokenizers.text.decode(ids) for ids in decoder.text()]
    if to == "audio":
        return [tokenizers.audio.decode(codes) for codes in decoder.audio()]
    frames = decoder.frames()
    if latents is not None:
        frames = np.concatenate([_restored(latents, decoder.spec), frames], axis=1)
    pixels = tokenizers.vision.decode(frames, decoder.spec.bits)
    return list(pixels[:, 0] if to == "image" else pixels[:, :num_frames])


def _restored(latents: np.ndarray, spec: LayoutSpec) -> np.ndarray:
    """Latents [P, T0, h, w, d] after quantisation at all scales."""
    flat = latents.reshape(*latents.shape[:2], -1, latents.shape[-1])
    return spec.pyramid.decompose(flat).total.reshape(latents.shape)
