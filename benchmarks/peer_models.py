"""The models of the benchmarks, by library: the same shapes everywhere. Imported where that library is installed.

Names of layers' weights are ours: router [D,E], gate_up [E,D,2F], down [E,F,D], shared_gate_up [D,2S],
shared_down [S,D].
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from benchmarks.common import Shape

LIMIT = 1024  # positions every model is built for


def prepare_paddle() -> None:
    """BLAS, allocator and threads as this project sets them; PaddleNLP gains as much. Before anything of Paddle."""
    from ernie5 import environment

    environment.use_cores()
    import paddle

    paddle.seed(0)


def ours_config(shape: Shape, **options: Any) -> Any:
    """``Ernie5Config`` of a benchmark's shape, everything that is not text as small as it gets."""
    prepare_paddle()
    from ernie5.model.configuration import Ernie5Config

    fields = {
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "num_layers": shape.layers,
        "num_heads": shape.heads,
        "num_kv_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "num_experts": shape.experts,
        "experts_per_token": shape.top_k,
        "expert_intermediate_size": shape.width,
        "shared_expert_intermediate_size": shape.shared,
        "router_activation": "softmax",
        "rope_base": 10000.0,
        "max_sequence_length": LIMIT,
        "mtp_depth": 0,
        "audio_levels": 1,
        "audio_codebook_size": 8,
    }
    return Ernie5Config(**{**fields, **options})


def huggingface_config(kind: str, shape: Shape, experts: str = "grouped_mm", attention: str = "sdpa") -> Any:
    """Configuration of ``ernie`` (Ernie-4.5-MoE) or ``qwen3`` (Qwen3-MoE, which has no shared expert)."""
    from transformers import Ernie4_5_MoeConfig, Qwen3MoeConfig

    fields = {
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": LIMIT,
        "moe_intermediate_size": shape.width,
        "rms_norm_eps": 1.0e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": True,
        "use_cache": False,
        "attn_implementation": attention,
    }
    if kind == "ernie":
        fields |= {"moe_k": shape.top_k, "moe_num_experts": shape.experts, "moe_layer_start_index": 0}
        config = Ernie4_5_MoeConfig(**fields, moe_num_shared_experts=shape.shared // shape.width)
    else:
        fields |= {"num_experts_per_tok": shape.top_k, "num_experts": shape.experts, "norm_topk_prob": True}
        config = Qwen3MoeConfig(**fields)
    config._experts_implementation = experts
    return config


def huggingface_model(kind: str, shape: Shape, experts: str = "grouped_mm") -> Any:
    from transformers import Ernie4_5_MoeForCausalLM, Qwen3MoeForCausalLM

    cls = Ernie4_5_MoeForCausalLM if kind == "ernie" else Qwen3MoeForCausalLM
    return cls(huggingface_config(kind, shape, experts))


def mend_paddlenlp() -> None:
    """Two functions as they were in the Paddle that PaddleNLP 3.0.0b4 was written for; neither model trains without.

    ``cumsum`` kept the type of integers; ``where`` of a condition alone returned columns.
    """
    import paddle

    cumsum, where = paddle.cumsum, paddle.where

    def kept_cumsum(x: Any, axis: int | None = None, dtype: Any = None, name: str | None = None) -> Any:
        return cumsum(x, axis, dtype or x.dtype, name)

    def where_columns(condition: Any, *rest: Any, **named: Any) -> Any:
        found = where(condition, *rest, **named)
        return found if rest or named else tuple(index.unsqueeze(-1) for index in found)

    paddle.cumsum, paddle.where = kept_cumsum, where_columns


def paddlenlp_config(kind: str, shape: Shape) -> Any:
    """Configuration of PaddleNLP's ``qwen2`` (Qwen2-MoE, shared expert) or ``mixtral`` (no shared expert)."""
    prepare_paddle()
    from paddlenlp.transformers import MixtralConfig, Qwen2MoeConfig

    mend_paddlenlp()

    fields = {
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "max_position_embeddings": LIMIT,
        "seq_length": LIMIT,
        "num_experts_per_tok": shape.top_k,
        "rms_norm_eps": 1.0e-6,
        "tie_word_embeddings": False,
        "use_flash_attention": False,
        "use_cache": False,
    }
    if kind == "mixtral":
        return MixtralConfig(**fields, intermediate_size=shape.width, num_local_experts=shape.experts)
    return Qwen2MoeConfig(
        **fields,
        intermediate_size=shape.width,
        num_experts=shape.experts,
        moe_intermediate_size=shape.width,
        shared_expert_intermediate_size=shape.shared,
        norm_topk_prob=True,
    )


def paddlenlp_model(kind: str, shape: Shape) -> Any:
    config = paddlenlp_config(kind, shape)
    from paddlenlp.transformers import MixtralForCausalLM, Qwen2MoeForCausalLM

    return (MixtralForCausalLM if kind == "mixtral" else Qwen2MoeForCausalLM)(config)


def paddleformers_model(shape: Shape) -> Any:
    """Ernie-4.5-MoE of PaddleFormers without its extra prediction layer and its router losses.

    As shipped, its routing calls operators without a CPU kernel; the benchmark then says which.
    """
    import paddle
    from paddleformers.transformers import Ernie4_5_MoeConfig, Ernie4_5_MoeForCausalLM

    paddle.seed(0)
    paddle.base.core.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    config = Ernie4_5_MoeConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.hidden,
        max_position_embeddings=LIMIT,
        max_sequence_length=LIMIT,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        moe_num_experts=shape.experts,
        moe_intermediate_size=shape.width,
        moe_num_shared_experts=shape.shared // shape.width,
        moe_layer_start_index=0,
        moe_k=shape.top_k,
        num_nextn_predict_layers=0,
        fuse_rms_norm=False,
        tie_word_embeddings=True,
    )
    return Ernie4_5_MoeForCausalLM(config)


def layer_weights(shape: Shape, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Weights of one MoE layer, scaled so that states keep their size; exact in bfloat16."""
    from benchmarks.common import as_bfloat16

    d, f, s, e = shape.hidden, shape.width, shape.shared, shape.experts
    shapes = {
        "router": (d, e),
        "gate_up": (e, d, 2 * f),
        "down": (e, f, d),
        "shared_gate_up": (d, 2 * s),
        "shared_down": (s, d),
    }
    return {
        name: as_bfloat16(rng.standard_normal(size, np.float32) * size[-2] ** -0.5) for name, size in shapes.items()
    }


def load_huggingface_layer(block: Any, weights: dict[str, np.ndarray], shared: Any) -> None:
    """Copies ``layer_weights`` into a sparse block of transformers and its shared expert (an MLP of theirs)."""
    import torch

    def tensor(values: np.ndarray) -> Any:
        return torch.from_numpy(np.ascontiguousarray(values))

    gate, up = np.split(weights["shared_gate_up"], 2, axis=-1)
    pairs = [
        (block.gate.weight, weights["router"].T),
        (block.experts.gate_up_proj, weights["gate_up"].swapaxes(1, 2)),
        (block.experts.down_proj, weights["down"].swapaxes(1, 2)),
        (shared.gate_proj.weight, gate.T),
        (shared.up_proj.weight, up.T),
        (shared.down_proj.weight, weights["shared_down"].T),
    ]
    with torch.no_grad():
        for parameter, values in pairs:
            parameter.copy_(tensor(values))


HUGGINGFACE_NAMES = {  # of Ernie-4.5-MoE -> ours; {} is the layer
    "model.embed_tokens.weight": "embedding.tokens.weight",
    "model.norm.weight": "norm.weight",
    "input_layernorm.weight": "attention_norm.weight",
    "post_attention_layernorm.weight": "moe_norm.weight",
    "self_attn.q_proj.weight": "attention.q_proj.weight",
    "self_attn.k_proj.weight": "attention.k_proj.weight",
    "self_attn.v_proj.weight": "attention.v_proj.weight",
    "self_attn.o_proj.weight": "attention.o_proj.weight",
    "mlp.gate.weight": "moe.router.weight",
    "mlp.experts.gate_up_proj": "moe.experts.gate_up",
    "mlp.experts.down_proj": "moe.experts.down",
    "mlp.shared_experts.down_proj.weight": "moe.shared.down",
}
SHARED_HALVES = {"mlp.shared_experts.gate_proj.weight": 0, "mlp.shared_experts.up_proj.weight": 1}


def huggingface_weight(name: str, ours: dict[str, np.ndarray]) -> np.ndarray | None:
    """The weight of Ernie-4.5-MoE called ``name``, out of a model of ours; None for its router's bias of zeros."""
    rest = name.partition("model.layers.")[2]
    layer, _, inner = rest.partition(".")
    if not rest:
        return ours[HUGGINGFACE_NAMES[name]]
    if inner in SHARED_HALVES:
        return np.split(ours[f"layers.{layer}.moe.shared.gate_up"], 2, axis=-1)[SHARED_HALVES[inner]].T
    if inner not in HUGGINGFACE_NAMES:
        return None
    values = ours[f"layers.{layer}.{HUGGINGFACE_NAMES[inner]}"]
    return values.swapaxes(-1, -2) if values.ndim > 1 else values


def load_huggingface_model(model: Any, path: str) -> None:
    """Copies the weights that ``save_ours`` wrote into an Ernie-4.5-MoE of transformers."""
    import torch

    with np.load(path) as ours, torch.no_grad():
        for name, parameter in model.named_parameters():
            values = huggingface_weight(name, ours)
            if values is not None:
                parameter.copy_(torch.from_numpy(np.ascontiguousarray(values)))


def save_ours(model: Any, path: str) -> None:
    np.savez(path, **{name: values.astype("float32").numpy() for name, values in model.state_dict().items()})
