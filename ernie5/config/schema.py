"""Typed configuration: one dataclass a section, validated as a whole by ``validate``.

Every field is used somewhere; the loader refuses keys that are not listed here. Units are in the names or comments.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class ModelConfig:
    """Shape of the backbone and its heads. [R] marks what the ERNIE 5.0 report states, the rest is our choice."""

    preset: str = ""  # name of the preset these values started from, for reports only
    vocab_size: int = 2048
    hidden_size: int = 128
    num_layers: int = 6
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 32
    num_experts: int = 32  # routed experts of every layer; every layer is MoE [R]
    experts_per_token: int = 2
    expert_intermediate_size: int = 128
    shared_expert_intermediate_size: int = 128  # 0 = no shared expert
    router_activation: str = "sigmoid"  # sigmoid | softmax
    routed_scaling_factor: float = 1.0
    rope_base: float = 1.0e6  # [R]
    rope_pattern: str = "hwt"  # axis of each of the head_dim/2 bands, highest frequency first; repeated to fill
    norm_eps: float = 1.0e-6
    initializer_range: float = 0.02
    max_sequence_length: int = 256  # tokens; the context
    mtp_depth: int = 1  # 0 or 1 multi-token-prediction block [R]
    vision_bits: int = 16  # d, bits of one vision code
    vision_num_scales: int = 4  # scales per frame, one learned scale embedding each
    vision_cnn_dim: int = 48  # D_cnn of the understanding path
    vision_vit_dim: int = 48  # D_vit of the understanding path
    merger_heads: int = 4
    audio_levels: int = 4  # Q, RVQ levels; heads sit at the top Q layers [R]
    audio_codebook_size: int = 256
    speaker_dim: int = 32
    recompute: bool = False  # recompute each block in the backward pass
    moe_sub_batch: int = 0  # tokens whose expert activations exist at once; the others are recomputed. 0 = all


@dataclass
class TextTokenizerConfig:
    vocab_size: int = 2048  # specials included
    bpe_dropout: float = 0.1  # merge-drop probability while training the backbone


@dataclass
class VisionTokenizerConfig:
    image_size: int = 32  # pixels, square
    frames: int = 5  # raw frames of a training clip: 1 + k * temporal_stride
    spatial_stride: int = 8
    temporal_stride: int = 2
    scales: list[int] = field(default_factory=lambda: [1, 2, 3, 4])  # side of each scale's grid; last = latent grid
    bits: list[int] = field(default_factory=lambda: [8, 16])  # the series, growing
    channels: int = 48  # width of the CNN; also D_cnn
    vit_dim: int = 48
    vit_layers: int = 1
    vit_heads: int = 2
    vit_patch: int = 4
    image_steps: int = 600  # of the widest member; the narrower ones take half as many
    video_steps: int = 300  # likewise
    vit_steps: int = 1300
    batch_size: int = 16
    video_batch_size: int = 4
    learning_rate: float = 2.0e-3
    weight_commitment: float = 0.25
    weight_entropy: float = 0.1
    weight_adversarial: float = 0.0  # > 0 trains a patch discriminator beside it
    weight_semantic: float = 0.1  # pulls latents towards the ViT's features
    seed: int = 0


@dataclass
class AudioTokenizerConfig:
    sample_rate: int = 16000
    frame_ms: int = 80  # 12.5 Hz [R]
    levels: int = 4
    codebook_size: int = 256
    latent_dim: int = 64
    channels: int = 192
    teacher_steps: int = 700
    speaker_steps: int = 400
    codec_steps: int = 800
    batch_size: int = 16  # recordings; twice as many for the speaker encoder
    learning_rate: float = 3.0e-3
    weight_semantic: float = 1.0  # distillation of the first code
    weight_commitment: float = 0.25
    speaker_dim: int = 32
    seed: int = 0


@dataclass
class TokenizersConfig:
    text: TextTokenizerConfig = field(default_factory=TextTokenizerConfig)
    vision: VisionTokenizerConfig = field(default_factory=VisionTokenizerConfig)
    audio: AudioTokenizerConfig = field(default_factory=AudioTokenizerConfig)


@dataclass
class DataConfig:
    manifests: list[str] = field(default_factory=list)  # own data: folders with a manifest.jsonl; empty = embedded data
    on_bad_line: str = "error"  # error | skip: what a bad manifest line does
    mixture: dict[str, float] = field(
        default_factory=dict
    )  # task -> share of drawn samples; empty = by number of samples
    unconditional: float = 0.1  # share of generation samples whose prompt is dropped (classifier-free guidance)
    answer_weight: float = 4.0  # loss weight of text predicted after an understood image, clip or recording
    history_mask: float = 0.0  # Bernoulli p of hiding a video history frame from later frames
    temporal_window: int = 0  # latent frames a video frame looks back; 0 = all
    flip_max: float = 0.25  # bit-flip self-correction: upper bound of p
    flip_per_frame: float = 0.01  # delta, growth of the bound per latent frame
    seed: int = 0
    workers: int = 1  # loader processes


@dataclass
class TrainerConfig:
    max_steps: int = 2000
    rows_per_step: int = 4  # packed rows of max_sequence_length in one micro-batch
    gradient_accumulation: int = 1
    batch_ramp: list[list[int]] = field(default_factory=list)  # [[step, accumulation], ...] ascending
    learning_rate: float = 2.0e-3
    schedule: str = "wsd"  # wsd | cosine
    warmup_steps: int = 50
    decay_fraction: float = 0.3  # wsd: share of steps in the 1-sqrt decay at the end; 0 = constant to the end [R]
    min_learning_rate_ratio: float = 0.02
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_eps: float = 1.0e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    router_bias_speed: float = 1.0e-3  # u of the aux-loss-free update [R: 1e-4 then 1e-5 at scale]
    mtp_weight: float = 0.3  # [R]
    modality_weight_min: float = 0.5  # clip of the posterior loss weights
    modality_weight_max: float = 2.0
    modality_weights: dict[str, float] = field(default_factory=dict)  # fixed factor on top, per text/image/video/audio
    bits_schedule: list[list[int]] = field(default_factory=list)  # [[step, bits], ...]: progressive vision-bit switch
    bf16: bool = False  # weights and activations in bfloat16; masters and moments, and checkpoints, stay float32
    save_steps: int = 500
    async_save: bool = True  # write checkpoints while training goes on, from a copy in memory
    log_steps: int = 20
    seed: int = 0


@dataclass
class ParallelConfig:
    """How the processes of a run share the work. What is left of them after the product is data parallelism."""

    tensor: int = 1  # ranks that share every matrix, and with it the tokens (sequence parallelism)
    pipeline: int = 1  # stages
    virtual_stages: int = 1  # pieces of the model a pipeline stage holds
    context: int = 1  # ranks that share every row of tokens
    sharding: int = 1  # ranks, with rows of their own, that share the optimizer's state (ZeRO); that of routed experts
    # is shared, from 2 on, by all ranks that hold the same experts: data x sharding x context x tensor / expert
    sharding_stage: int = 1  # 1: optimizer state; 2: gradients too, of each block as soon as it has run backward
    expert: int = 1  # ranks that share the routed experts, out of data x sharding x context x tensor of a stage
    dispatcher: str = "all_to_all"  # local | all_to_all | all_to_all_overlapped | deepep; expert = 1 is always local
    dispatch_chunks: int = 2  # parts in which all_to_all_overlapped moves the tokens
    timeout_seconds: float = 600.0  # how long a rank may keep others waiting; six times that at the start and in saving
    # On CPUs, with as many ranks on a host as cores: each has a core of its own, kept awake (ernie5/parallel/awake.py).
    active_wait: bool = True


@dataclass
class EvaluationConfig:
    items: int = 100  # held-out items a generated metric uses
    batch_size: int = 50
    text_chars: int = 60000  # held-out characters scored


@dataclass
class RunConfig:
    dir: str = "runs/quickstart"


@dataclass
class Config:
    """The whole YAML. ``load_config`` builds and validates it."""

    model: ModelConfig = field(default_factory=ModelConfig)
    tokenizers: TokenizersConfig = field(default_factory=TokenizersConfig)
    data: DataConfig = field(default_factory=DataConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    run: RunConfig = field(default_factory=RunConfig)
