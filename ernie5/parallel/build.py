"""The part of the model that belongs to one rank: the stage's layers, and of each parameter the rank's part.

The model is declared whole, without memory; what is elsewhere is taken out, what is split is swapped for Fleet's
layers, and the rest comes into being with the values it has in every other layout.
"""

from __future__ import annotations

import numpy as np
import paddle
from paddle import nn

from ernie5.model import Ernie5Config, Ernie5ForCausalLM
from ernie5.model.initialise import initial_value
from ernie5.model.layers import Linear, MoE, SharedExpert
from ernie5.parallel.dispatch import make_dispatcher
from ernie5.parallel.layers import ContextKeys, SplitEmbedding, SplitExperts, SplitSharedExpert, SpreadTextLosses
from ernie5.parallel.layers import column as column_layer
from ernie5.parallel.layers import row as row_layer
from ernie5.parallel.plan import Kind, Placement, kind_of, placement, split
from ernie5.parallel.topology import Topology


def local_model(
    config: Ernie5Config, topology: Topology, seed: int = 0
) -> tuple[Ernie5ForCausalLM, dict[str, Placement]]:
    """(the rank's part of the model, placement by global name). Its names are those of the whole model."""
    with paddle.LazyGuard():
        model = Ernie5ForCausalLM(config)
        shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
        _keep_stage(model, topology)
        _swap_layers(model, topology)
    placements = {name: placement(name, topology) for name, _ in model.named_parameters()}
    for name, parameter in list(model.named_parameters()):
        where = placements[name]
        whole = initial_value(name, shapes[name], seed, config.initializer_range, config.num_layers)
        value = split(where.kind, whole, where.part, where.parts)
        _materialise(model, name, str(parameter.dtype).rsplit(".", 1)[-1], value, where.parts > 1)
    return model, placements


def _keep_stage(model: Ernie5ForCausalLM, topology: Topology) -> None:
    """Puts empty layers where another stage has the real ones."""
    here = {block for piece in topology.blocks() for block in piece}
    for i in range(len(model.layers)):
        if i not in here:
            model.layers[i] = nn.Layer()
    top = len(model.layers) - model.config.audio_levels
    for level in range(model.config.audio_levels):
        if top + level not in here:
            model.audio_heads[level] = nn.Layer()
    embedding = model.embedding
    if not topology.is_first_stage:
        embedding.vision, embedding.patches, embedding.speaker = nn.Layer(), nn.Layer(), nn.Layer()
    if topology.place.pipeline not in topology.audio_stages:
        embedding.audio = nn.Layer()
    if topology.place.pipeline not in topology.text_stages:
        embedding.tokens = nn.Layer()
    if not topology.is_last_stage:
        model.norm, model.bit_head = nn.Layer(), nn.Layer()
        model.mtp = None


def _swap_layers(model: Ernie5ForCausalLM, topology: Topology) -> None:
    config, degrees = model.config, topology.config
    if degrees.tensor > 1:
        for path, layer in list(model.named_sublayers()):
            replacement = _tensor_layer(path, layer)
            if replacement is not None:
                owner, name = _owner(model, path)
                setattr(owner, name, replacement)
    for layer in model.sublayers():
        if isinstance(layer, MoE) and degrees.expert > 1:
            dispatcher = make_dispatcher(degrees.dispatcher, topology.experts, degrees.dispatch_chunks)
            layer.experts = SplitExperts(config, dispatcher)
    if topology.spread:
        model.text_losses = SpreadTextLosses(topology.tensor)
    if topology.context is not None:
        model.context = ContextKeys(topology.context)


def _tensor_layer(path: str, layer: nn.Layer) -> nn.Layer | None:
    """What stands for ``layer`` where the tensor ranks share it; None: it stays."""
    if isinstance(layer, SharedExpert):
        width, hidden = layer.down.shape
        return SplitSharedExpert(hidden, width)
    kind = kind_of(f"{path}.weight")
    if isinstance(layer, Linear) and kind is Kind.COLUMN:
        return column_layer(*layer.weight.shape)
    if isinstance(layer, Linear) and kind is Kind.ROW:
        return row_layer(*layer.weight.shape)
    if isinstance(layer, nn.Embedding) and kind is Kind.VOCAB:
        return SplitEmbedding(*layer.weight.shape)
    return None


def _materialise(model: nn.Layer, path: str, dtype: str, value: np.ndarray, distributed: bool) -> None:
    """A real parameter with this value in place of the declared one."""
    made = paddle.create_parameter(list(value.shape), dtype, default_initializer=nn.initializer.Constant(0.0))
    made.set_value(paddle.to_tensor(np.ascontiguousarray(value).astype(dtype)))
    made.is_distributed = distributed
    owner, name = _owner(model, path)
    owner._parameters[name] = made


def _owner(model: nn.Layer, path: str) -> tuple[nn.Layer, str]:
    """The layer that has the attribute at the end of ``path``, and the attribute."""
    *parents, name = path.split(".")
    for part in parents:
        model = getattr(model, part)
    return model, name
