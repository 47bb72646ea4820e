"""Contradictions a configuration can hold, each told in one line: what is set, what it contradicts, what to do.

``RANGES`` bounds single values; the functions below relate values to one another. Loading validates, so code behind
it may assume every relation here.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from ernie5.config.schema import Config, DataConfig, ModelConfig, ParallelConfig, TokenizersConfig, TrainerConfig

SPECIAL_IDS = 16  # reserved at the start of every vocabulary
BYTE_IDS = 256  # the text tokenizer's alphabet
CNN_STRIDE, PATCH = 8, 4  # pixels a latent position and an understanding patch cover in the vision tokenizer's network
SAMPLE_RATE, FRAME_MS = 16000, 80  # of the audio codec's network
MODALITIES = ("text", "image", "video", "audio")
DISPATCHERS = ("local", "all_to_all", "all_to_all_overlapped", "deepep")

ANY = float("inf")
ABOVE_ZERO = float.fromhex("0x1p-1022")  # smallest normal float: a lower bound that excludes 0
COUNT, NATURAL, POSITIVE, SHARE, WEIGHT = (1, ANY), (0, ANY), (ABOVE_ZERO, ANY), (0, 1), (0, ANY)
BELOW_ONE = (0, 1 - 2**-53)

RANGES: dict[str, tuple[float, float]] = {
    "model.vocab_size": (SPECIAL_IDS + 1, ANY),
    "model.hidden_size": COUNT,
    "model.num_layers": COUNT,
    "model.num_heads": COUNT,
    "model.num_kv_heads": COUNT,
    "model.head_dim": COUNT,
    "model.num_experts": COUNT,
    "model.experts_per_token": COUNT,
    "model.expert_intermediate_size": COUNT,
    "model.shared_expert_intermediate_size": NATURAL,
    "model.moe_sub_batch": NATURAL,
    "model.routed_scaling_factor": POSITIVE,
    "model.rope_base": (1 + 2**-52, ANY),
    "model.norm_eps": POSITIVE,
    "model.initializer_range": POSITIVE,
    "model.max_sequence_length": (2, ANY),
    "model.mtp_depth": (0, 1),
    "model.vision_bits": COUNT,
    "model.vision_num_scales": COUNT,
    "model.vision_cnn_dim": COUNT,
    "model.vision_vit_dim": COUNT,
    "model.merger_heads": COUNT,
    "model.audio_levels": COUNT,
    "model.audio_codebook_size": (2, ANY),
    "model.speaker_dim": COUNT,
    "tokenizers.text.vocab_size": (SPECIAL_IDS + BYTE_IDS, ANY),
    "tokenizers.text.bpe_dropout": BELOW_ONE,
    "tokenizers.vision.image_size": COUNT,
    "tokenizers.vision.frames": COUNT,
    "tokenizers.vision.spatial_stride": COUNT,
    "tokenizers.vision.temporal_stride": COUNT,
    "tokenizers.vision.channels": COUNT,
    "tokenizers.vision.vit_dim": COUNT,
    "tokenizers.vision.vit_layers": COUNT,
    "tokenizers.vision.vit_heads": COUNT,
    "tokenizers.vision.vit_patch": COUNT,
    "tokenizers.vision.image_steps": COUNT,
    "tokenizers.vision.video_steps": NATURAL,
    "tokenizers.vision.vit_steps": NATURAL,
    "tokenizers.vision.batch_size": COUNT,
    "tokenizers.vision.video_batch_size": COUNT,
    "tokenizers.vision.learning_rate": POSITIVE,
    "tokenizers.vision.weight_commitment": WEIGHT,
    "tokenizers.vision.weight_entropy": WEIGHT,
    "tokenizers.vision.weight_adversarial": WEIGHT,
    "tokenizers.vision.weight_semantic": WEIGHT,
    "tokenizers.vision.seed": NATURAL,
    "tokenizers.audio.sample_rate": COUNT,
    "tokenizers.audio.frame_ms": COUNT,
    "tokenizers.audio.levels": COUNT,
    "tokenizers.audio.codebook_size": (2, ANY),
    "tokenizers.audio.latent_dim": COUNT,
    "tokenizers.audio.channels": COUNT,
    "tokenizers.audio.teacher_steps": NATURAL,
    "tokenizers.audio.speaker_steps": NATURAL,
    "tokenizers.audio.codec_steps": COUNT,
    "tokenizers.audio.batch_size": COUNT,
    "tokenizers.audio.learning_rate": POSITIVE,
    "tokenizers.audio.weight_semantic": WEIGHT,
    "tokenizers.audio.weight_commitment": WEIGHT,
    "tokenizers.audio.speaker_dim": COUNT,
    "tokenizers.audio.seed": NATURAL,
    "data.unconditional": SHARE,
    "data.history_mask": SHARE,
    "data.temporal_window": NATURAL,
    "data.answer_weight": WEIGHT,
    "data.flip_max": SHARE,
    "data.flip_per_frame": SHARE,
    "data.seed": NATURAL,
    "data.workers": NATURAL,
    "trainer.max_steps": COUNT,
    "trainer.rows_per_step": COUNT,
    "trainer.gradient_accumulation": COUNT,
    "trainer.learning_rate": POSITIVE,
    "trainer.warmup_steps": NATURAL,
    "trainer.decay_fraction": SHARE,
    "trainer.min_learning_rate_ratio": SHARE,
    "trainer.adam_beta1": BELOW_ONE,
    "trainer.adam_beta2": BELOW_ONE,
    "trainer.adam_eps": POSITIVE,
    "trainer.weight_decay": WEIGHT,
    "trainer.clip_norm": POSITIVE,
    "trainer.router_bias_speed": WEIGHT,
    "trainer.mtp_weight": WEIGHT,
    "trainer.modality_weight_min": POSITIVE,
    "trainer.modality_weight_max": POSITIVE,
    "trainer.save_steps": COUNT,
    "trainer.log_steps": COUNT,
    "trainer.seed": NATURAL,
    "parallel.tensor": COUNT,
    "parallel.pipeline": COUNT,
    "parallel.virtual_stages": COUNT,
    "parallel.context": COUNT,
    "parallel.sharding": COUNT,
    "parallel.sharding_stage": (1, 2),
    "parallel.expert": COUNT,
    "parallel.dispatch_chunks": COUNT,
    "parallel.timeout_seconds": POSITIVE,
    "evaluation.items": COUNT,
    "evaluation.batch_size": COUNT,
    "evaluation.text_chars": COUNT,
}


def validate(config: Config, source: str = "config") -> None:
    """Raises ``ValueError`` with one line per contradiction in ``config``, each beginning with ``source``."""
    problems = [*_range_problems(config, ""), *_model_problems(config.model)]
    if not problems:  # relations between sections make sense only where each value does
        problems += _vision_problems(config)
        problems += _pair_problems(config)
        problems += _tokenizer_problems(config.tokenizers)
        problems += _data_problems(config.data)
        problems += _trainer_problems(config.trainer, config.tokenizers.vision.bits)
        problems += parallel_problems(config.parallel, config.model, config.trainer)
        if not config.run.dir:
            problems.append("run.dir is empty; name the folder that shall hold the run, such as runs/mine")
    _raise(problems, source)


def validate_model(model: ModelConfig, source: str = "config") -> None:
    """The part of ``validate`` that needs the model section alone."""
    _raise([*_range_problems(model, "model."), *_model_problems(model)], source)


def vision_positions(scales: Sequence[int], latent_frames: int) -> int:
    """Positions of an image (1 latent frame) or clip in the sequence, begin and end included (report Figure 2)."""
    return 2 + latent_frames * (sum(side * side for side in scales[1:]) + 1)


def _raise(problems: Sequence[str], source: str) -> None:
    if problems:
        raise ValueError("\n".join(f"{source}: {problem}" for problem in problems))


def _range_problems(section: Any, prefix: str) -> Iterator[str]:
    for name, (low, high) in RANGES.items():
        if not name.startswith(prefix):
            continue
        value = section
        for part in name.removeprefix(prefix).split("."):
            value = getattr(value, part)
        if not low <= value <= high:
            yield f"{name} is {value}; it must be {_bounds(low, high)}"


def _bounds(low: float, high: float) -> str:
    if high == BELOW_ONE[1]:
        return "at least 0 and below 1"
    if high < ANY:
        return f"from {low} to {high}"
    if low == ABOVE_ZERO:
        return "above 0"
    return f"at least {low}" if isinstance(low, int) else "above 1"


def _model_problems(model: ModelConfig) -> Iterator[str]:
    if model.num_kv_heads > 0 and model.num_heads % model.num_kv_heads:
        yield (
            f"model.num_heads = {model.num_heads} is not a multiple of model.num_kv_heads = {model.num_kv_heads}; "
            "each key/value head serves the same number of heads"
        )
    if model.head_dim % 2:
        yield f"model.head_dim = {model.head_dim} is odd; rotary positions turn pairs, so make it even"
    if not model.rope_pattern or set(model.rope_pattern) - set("hwt"):
        yield f"model.rope_pattern = {model.rope_pattern!r}: it names the axis of each band with the letters h, w and t"
    elif len(model.rope_pattern) > max(model.head_dim // 2, 1):
        yield (
            f"model.rope_pattern has {len(model.rope_pattern)} letters but model.head_dim = {model.head_dim} "
            f"has only {model.head_dim // 2} bands"
        )
    if model.experts_per_token > model.num_experts:
        yield (
            f"model.experts_per_token = {model.experts_per_token} is above model.num_experts = {model.num_experts}; "
            "a token cannot use more experts than there are"
        )
    if model.router_activation not in ("sigmoid", "softmax"):
        yield f"model.router_activation = {model.router_activation!r} is unknown; there are sigmoid and softmax"
    if model.audio_levels > model.num_layers:
        yield (
            f"model.audio_levels = {model.audio_levels} is more than model.num_layers = {model.num_layers}; "
            "each codec level needs a layer of its own for its head"
        )
    if model.merger_heads > 0 and model.vision_vit_dim % model.merger_heads:
        yield (
            f"model.vision_vit_dim = {model.vision_vit_dim} is not a multiple of "
            f"model.merger_heads = {model.merger_heads}; the patch merger's attention splits it evenly"
        )


def _vision_problems(config: Config) -> Iterator[str]:
    vision = config.tokenizers.vision
    for name in ("scales", "bits"):
        values = getattr(vision, name)
        if not values or values[0] < 1 or any(b <= a for a, b in itertools.pairwise(values)):
            yield f"tokenizers.vision.{name} = {values} must be a growing list of whole numbers from 1 up"
            return
    for name, fixed in (("spatial_stride", CNN_STRIDE), ("vit_patch", PATCH)):
        if getattr(vision, name) != fixed:
            yield f"tokenizers.vision.{name} is {getattr(vision, name)}; the tokenizer's network is built for {fixed}"
    if vision.image_size % vision.spatial_stride or vision.scales[-1] != vision.image_size // vision.spatial_stride:
        yield (
            f"tokenizers.vision.scales ends with {vision.scales[-1]}, but image_size / spatial_stride = "
            f"{vision.image_size} / {vision.spatial_stride}; the last scale is the whole latent grid"
        )
    if (vision.frames - 1) % vision.temporal_stride:
        yield (
            f"tokenizers.vision.frames = {vision.frames} is not 1 + a multiple of temporal_stride = "
            f"{vision.temporal_stride}; the first frame stands alone, the rest go in groups of temporal_stride"
        )
    if vision.image_size % (2 * vision.vit_patch):
        yield (
            f"tokenizers.vision.image_size = {vision.image_size} is not a multiple of 2 x vit_patch = "
            f"{2 * vision.vit_patch}; an understanding token gathers 2 x 2 patches"
        )
    if vision.vit_dim % vision.vit_heads:
        yield f"tokenizers.vision.vit_dim = {vision.vit_dim} is not a multiple of vit_heads = {vision.vit_heads}"
    latent_frames = 1 + (vision.frames - 1) // vision.temporal_stride
    need = vision_positions(vision.scales, latent_frames) + 2
    if config.model.max_sequence_length < need:
        yield (
            f"model.max_sequence_length = {config.model.max_sequence_length} cannot hold one clip: "
            f"{vision.frames} frames with scales {vision.scales} take {need} positions with the document's ends; "
            "enlarge it or shorten the clip"
        )


def _pair_problems(config: Config) -> Iterator[str]:
    """Values that the tokenizers fix and the model must repeat."""
    model, tokenizers = config.model, config.tokenizers
    vision = tokenizers.vision
    pairs = (
        ("vocab_size", model.vocab_size, "text.vocab_size", tokenizers.text.vocab_size),
        ("vision_bits", model.vision_bits, "vision.bits (last)", vision.bits[-1] if vision.bits else None),
        ("vision_num_scales", model.vision_num_scales, "vision.scales (number of)", len(vision.scales)),
        ("vision_cnn_dim", model.vision_cnn_dim, "vision.channels", vision.channels),
        ("vision_vit_dim", model.vision_vit_dim, "vision.vit_dim", vision.vit_dim),
        ("audio_levels", model.audio_levels, "audio.levels", tokenizers.audio.levels),
        ("audio_codebook_size", model.audio_codebook_size, "audio.codebook_size", tokenizers.audio.codebook_size),
        ("speaker_dim", model.speaker_dim, "audio.speaker_dim", tokenizers.audio.speaker_dim),
    )
    for name, ours, other, theirs in pairs:
        if ours != theirs:
            yield f"model.{name} = {ours} but tokenizers.{other} = {theirs}; the two must be equal"


def _tokenizer_problems(tokenizers: TokenizersConfig) -> Iterator[str]:
    audio = tokenizers.audio
    for name, fixed in (("sample_rate", SAMPLE_RATE), ("frame_ms", FRAME_MS)):
        if getattr(audio, name) != fixed:
            yield f"tokenizers.audio.{name} is {getattr(audio, name)}; the codec's network is built for {fixed}"


def _data_problems(data: DataConfig) -> Iterator[str]:
    if data.on_bad_line not in ("error", "skip"):
        yield f"data.on_bad_line = {data.on_bad_line!r} is unknown; there are error and skip"
    if any(share < 0 for share in data.mixture.values()):
        yield f"data.mixture = {data.mixture} has a negative share"
    elif data.mixture and sum(data.mixture.values()) == 0:
        yield f"data.mixture = {data.mixture} draws nothing; give one task a share above 0"


def _trainer_problems(trainer: TrainerConfig, bits: Sequence[int]) -> Iterator[str]:
    if trainer.schedule not in ("wsd", "cosine"):
        yield f"trainer.schedule = {trainer.schedule!r} is unknown; there are wsd and cosine"
    if trainer.warmup_steps > trainer.max_steps:
        yield (
            f"trainer.warmup_steps = {trainer.warmup_steps} is more than trainer.max_steps = {trainer.max_steps}; "
            "the learning rate would never be reached"
        )
    if trainer.modality_weight_min > trainer.modality_weight_max:
        yield (
            f"trainer.modality_weight_min = {trainer.modality_weight_min} is above "
            f"trainer.modality_weight_max = {trainer.modality_weight_max}"
        )
    for name, weight in trainer.modality_weights.items():
        if name not in MODALITIES:
            yield f"trainer.modality_weights names {name!r}; the modalities are {', '.join(MODALITIES)}"
        elif weight < 0:
            yield f"trainer.modality_weights.{name} is {weight}; it must be at least 0"
    yield from _steps_problems("trainer.batch_ramp", trainer.batch_ramp, "accumulation")
    yield from _steps_problems("trainer.bits_schedule", trainer.bits_schedule, "bits")
    yield from _bits_problems(trainer.bits_schedule, bits)


def parallel_problems(parallel: ParallelConfig, model: ModelConfig, trainer: TrainerConfig) -> Iterator[str]:
    """What the degrees contradict; whether they fit the number of processes is known when those exist."""
    ranks = parallel.context * parallel.tensor
    shared = (
        ("tensor", parallel.tensor, "model.num_heads", model.num_heads),
        ("tensor", parallel.tensor, "model.num_kv_heads", model.num_kv_heads),
        ("tensor", parallel.tensor, "model.vocab_size", model.vocab_size),
        ("tensor", parallel.tensor, "model.shared_expert_intermediate_size", model.shared_expert_intermediate_size),
        ("expert", parallel.expert, "model.num_experts", model.num_experts),
        ("context x tensor", ranks, "model.max_sequence_length", model.max_sequence_length),
        (
            "pipeline x virtual_stages",
            parallel.pipeline * parallel.virtual_stages,
            "model.num_layers",
            model.num_layers,
        ),
    )
    for name, degree, other, value in shared:
        if value % degree:
            yield f"parallel.{name} = {degree} does not divide {other} = {value}; every rank takes an equal share"
    if parallel.virtual_stages > 1 and parallel.pipeline == 1:
        yield (
            f"parallel.virtual_stages = {parallel.virtual_stages} without a pipeline; "
            "raise parallel.pipeline or leave it at 1"
        )
    least = 2 * parallel.pipeline if parallel.virtual_stages > 1 else parallel.pipeline
    counts = [trainer.gradient_accumulation, *(entry[-1] for entry in trainer.batch_ramp if entry)]
    if parallel.pipeline > 1 and min(counts) < least:
        yield (
            f"trainer.gradient_accumulation (with batch_ramp) is {min(counts)} at the least; a pipeline of "
            f"{parallel.pipeline} stages with {parallel.virtual_stages} virtual ones needs {least} micro-batches"
        )
    if parallel.dispatcher not in DISPATCHERS:
        yield f"parallel.dispatcher = {parallel.dispatcher!r} is unknown; there are {', '.join(DISPATCHERS)}"
    elif parallel.dispatcher == "local" and parallel.expert > 1:
        yield f"parallel.dispatcher = 'local' with parallel.expert = {parallel.expert}; choose all_to_all"
    if parallel.sharding_stage > 1 and parallel.sharding == 1:
        yield (
            f"parallel.sharding_stage = {parallel.sharding_stage} but parallel.sharding = 1; "
            "set the number of ranks that share optimizer state and gradients"
        )


def _steps_problems(name: str, schedule: Sequence[Sequence[int]], second: str) -> Iterator[str]:
    if any(len(entry) != 2 or entry[0] < 0 or entry[1] < 1 for entry in schedule):
        yield f"{name} = {schedule} must be a list of [step, {second}] pairs, step from 0 and {second} from 1"
    elif any(b[0] <= a[0] for a, b in itertools.pairwise(schedule)):
        yield f"{name} = {schedule}: the steps must grow"


def _bits_problems(schedule: Sequence[Sequence[int]], bits: Sequence[int]) -> Iterator[str]:
    if not schedule or any(len(entry) != 2 for entry in schedule):
        return
    for _, width in schedule:
        if width not in bits:
            yield f"trainer.bits_schedule uses {width} bits; tokenizers.vision.bits = {list(bits)} has no such member"
            return
    if schedule[0][0] != 0:
        yield f"trainer.bits_schedule begins at step {schedule[0][0]}; begin it with [0, {bits[0]}]"
    if schedule[-1][1] != bits[-1]:
        yield (
            f"trainer.bits_schedule ends with {schedule[-1][1]} bits; it must end with {bits[-1]}, "
            "the last of tokenizers.vision.bits, which decoding uses"
        )
    if any(b[1] < a[1] for a, b in itertools.pairwise(schedule)):
        yield f"trainer.bits_schedule = {schedule}: the number of bits must not shrink"
