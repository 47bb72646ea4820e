"""``Ernie5ForCausalLM``: embeddings -> blocks -> heads; the codec heads sit between the top Q blocks (report §2.3.2).

Shapes: B batch, S positions, D hidden, L layers, Q codec levels, d bits, E experts. The fields of a batch, and with
them the hidden states, may also be flat, without the axes B and S; then only ``positions`` and the intervals have rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import nn
from safetensors import SafetensorError, safe_open

from ernie5.checkpoint import Checkpoint, Part, is_complete
from ernie5.checkpoint.state import MODEL, load_weights
from ernie5.model.configuration import Ernie5Config
from ernie5.model.decoding import new_cache
from ernie5.model.embedding import Embedding
from ernie5.model.heads import AudioHead, BitHead, MultiTokenPrediction, TextLosses, text_logits
from ernie5.model.initialise import initialise
from ernie5.model.layers import Block, LayerCache, MoE, RMSNorm, to_bfloat16
from ernie5.model.losses import LossWeights, bit_loss, token_loss, total_weights
from ernie5.ops import kernels
from ernie5.ops.attention import IntervalMask
from ernie5.ops.decode import DecodeCache
from ernie5.ops.elementwise import add
from ernie5.ops.recompute import recompute
from ernie5.ops.rope import RopeTables, rope_tables
from ernie5.paddlenlp import PretrainedModel
from ernie5.sequence.vocabulary import IGNORE, Kind, Special

FLOAT32_PARTS = ("embedding.vision", "embedding.patches", "embedding.audio", "embedding.speaker")


@dataclass
class MicroBatch:
    """What the blocks and heads of one forward pass read."""

    batch: Mapping[str, paddle.Tensor]
    valid: paddle.Tensor  # bool, False on padding
    rope: RopeTables
    mask: IntervalMask
    at_audio: paddle.Tensor  # flat positions that generate audio

    @property
    def weight(self) -> paddle.Tensor:
        return self.batch["loss_weight"].flatten()


class Ernie5PretrainedModel(PretrainedModel):
    config_class = Ernie5Config
    base_model_prefix = "ernie5"
    main_input_name = "input_ids"

    def _init_weights(self, layer: nn.Layer) -> None:
        """Nothing: ``initialise`` fills the whole model by parameter name."""


class Ernie5ForCausalLM(Ernie5PretrainedModel):
    """One model that reads and predicts text, images, video and audio.

    ``forward(**batch)`` takes the batch fields of ``ernie5.sequence.packing.collate`` and returns ``loss``, ``losses``
    (text, mtp, image, video, audio, those present) and ``tokens`` (positions that are not padding). ``context`` may
    hold keys and values of positions that are elsewhere: ``append(k, v)`` as a cache does it, and ``start(S)``, the
    first row that is here.
    """

    def __init__(self, config: Ernie5Config, seed: int = 0) -> None:
        super().__init__(config)
        self.embedding = Embedding(config)
        self.layers = nn.LayerList([Block(config) for _ in range(config.num_layers)])
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.bit_head = BitHead(config)
        self.audio_heads = nn.LayerList([AudioHead(config) for _ in range(config.audio_levels)])
        self.mtp = MultiTokenPrediction(config) if config.mtp_depth else None
        self.text_losses = TextLosses()
        self.context = None
        self.loss_weights = LossWeights()
        if not _is_lazy(self.norm.weight):
            self.initialise(seed)

    @classmethod
    def from_pretrained(cls, path: str, *args: object, **kwargs: object) -> Ernie5ForCausalLM:
        """The model saved in the folder ``path``, a checkpoint of training or what ``save_pretrained`` wrote.

        Raises a one-line ValueError unless every name and shape fits.
        """
        if is_complete(Path(path)):
            return _from_parts(Path(path))
        _check_weights(Path(path))
        return super().from_pretrained(str(path), *args, **kwargs)

    def save_pretrained(self, save_dir: str, **kwargs: object) -> None:
        """``config.json`` and safetensors weights in ``save_dir``."""
        kwargs.setdefault("safe_serialization", True)
        super().save_pretrained(save_dir, **kwargs)

    def initialise(self, seed: int) -> None:
        """Fills every parameter from its name and ``seed``."""
        initialise(self, seed, self.config.initializer_range, self.config.num_layers)

    def to_bfloat16(self) -> None:
        """Turns the blocks, the heads and the token table to bfloat16, in place, for compute at twice the rate or more.

        Routers stay in float32, and so do the small embeddings of pictures, codes and speakers. Call it before an
        optimizer is built, which then needs ``multi_precision`` (``Ernie5Trainer`` sees to that). ``ValueError`` on a
        CPU without the compiled kernels: Paddle's own lack bfloat16 there.
        """
        if not (kernels.on_gpu(next(iter(self.parameters()))) or kernels.available("linear")):
            raise ValueError(
                "bfloat16 on a CPU needs the compiled kernels, which are not in use "
                f"({kernels.library().problem or 'tools/doctor.py says why'}); leave trainer.bf16 off, or mend that"
            )
        to_bfloat16(self, FLOAT32_PARTS)

    def set_loss_weights(
        self, mtp: float, minimum: float, maximum: float, fixed: dict[str, float] | None = None
    ) -> None:
        """MTP factor, clip of the posterior weights, and fixed factors per modality on top of them."""
        self.loss_weights.mtp, self.loss_weights.minimum, self.loss_weights.maximum = mtp, minimum, maximum
        self.loss_weights.fixed.update(fixed or {})

    # ------------------------------------------------------------------ pieces, shared by training and decoding

    def embed(self, batch: dict[str, paddle.Tensor]) -> paddle.Tensor:
        """Batch fields -> [B,S,D]."""
        return self.embedding(batch)

    def new_cache(self) -> DecodeCache | list[LayerCache]:
        """One empty key/value cache a layer; see ``run_layers``."""
        return new_cache(self)

    def run_layers(
        self,
        hidden: paddle.Tensor,
        positions: paddle.Tensor,
        attention_intervals: paddle.Tensor,
        valid: paddle.Tensor,
        cache: DecodeCache | list[LayerCache] | None = None,
        query_start: int = 0,
        first: int = 0,
        last: int | None = None,
    ) -> paddle.Tensor:
        """Blocks ``first .. last-1`` on hidden [B,n,D], rows ``query_start ..`` of the sequence.

        positions [B,n,3]; attention_intervals [B,1,query_start+n,4]; valid bool [B,n], False on padding. With a cache
        that is bound to the decoding kernel, few rows go through that, all layers in one call.
        """
        step = getattr(cache, "step", None)
        if step is not None and step.takes(hidden.shape[0] * hidden.shape[1]):
            state, given = hidden.astype("float32"), (positions, attention_intervals, valid)
            return step.run(state, *given, cache, query_start, first, last)[0].astype(hidden.dtype)
        rope, mask = self._context(positions, attention_intervals, query_start)
        last = len(self.layers) if last is None else last
        for i in range(first, last):
            hidden = self.layers[i](hidden, rope, mask, valid, cache[i] if cache is not None else None)
        return hidden

    def text_logits(self, hidden: paddle.Tensor) -> paddle.Tensor:
        """Rows of the last block's output [...,D] -> [...,V]."""
        return text_logits(self.norm(hidden), self.embedding.tokens.weight)

    def bit_logits(self, hidden: paddle.Tensor) -> paddle.Tensor:
        """Rows of the last block's output [...,D] -> [...,d,2]."""
        return self.bit_head(self.norm(hidden))

    def audio_logits(self, hidden: paddle.Tensor, level: int) -> paddle.Tensor:
        """Rows after block L-Q+1+level (counted from 1) -> [..., C+1]; class C ends the audio."""
        return self.audio_heads[level](hidden)

    def audio_feedback(self, codes: paddle.Tensor, level: int) -> paddle.Tensor:
        """Code of ``level`` -> what is added to the state before the next block, [...,D]."""
        return self.embedding.audio.level(codes, level)

    # ------------------------------------------------------------------ training

    def forward(self, total: Mapping[str, float] | None = None, **batch: paddle.Tensor) -> dict[str, object]:
        """``total``: ``total_weights`` of the step of which this is a micro-batch; without it, of this batch alone."""
        total = total_weights([batch], self.mtp is not None) if total is None else total
        micro = self.open(batch)
        hidden, sums = self.embed(batch), {}
        for i in range(len(self.layers)):
            hidden = self.run_block(i, hidden, micro, sums)
        self.add_head_losses(hidden, micro, sums)
        if not sums:
            raise ValueError("the batch has no labelled position; every row must hold at least one target")
        losses = {name: value / total[name] for name, value in sums.items()}
        return {"loss": self.loss_weights(losses), "losses": losses, "tokens": micro.valid.sum()}

    def open(self, batch: Mapping[str, paddle.Tensor]) -> MicroBatch:
        """What ``run_block`` and ``add_head_losses`` share."""
        rope, mask = self._context(batch["positions"], batch["attention_intervals"], self._first_row(batch))
        at_audio = paddle.nonzero(batch["labels_audio"][..., 0].flatten() != IGNORE).flatten()
        return MicroBatch(batch, batch["input_ids"] != Special.PAD, rope, mask, at_audio)

    def run_block(
        self, i: int, hidden: paddle.Tensor, micro: MicroBatch, sums: dict[str, paddle.Tensor]
    ) -> paddle.Tensor:
        """Block ``i`` and the codec head behind it, whose weighted losses are added to ``sums["audio"]``."""
        hidden = self._run(self.layers[i], hidden, micro.rope, micro.mask, micro.valid)
        level = i - (len(self.layers) - self.config.audio_levels)
        if level < 0 or not micro.at_audio.shape[0]:
            return hidden
        labels = micro.batch["labels_audio"]
        rows = hidden.reshape([-1, hidden.shape[-1]]).gather(micro.at_audio)
        codes = labels.reshape([-1, labels.shape[-1]]).gather(micro.at_audio)[:, level]
        losses = token_loss(self.audio_logits(rows, level), codes)
        added = (losses * micro.weight.gather(micro.at_audio)).sum() / self.config.audio_levels
        sums["audio"] = sums["audio"] + added if "audio" in sums else added
        if i + 1 < len(self.layers):
            hidden = add(hidden, self.audio_feedback(labels[..., level], level).astype(hidden.dtype))
        return hidden

    def add_head_losses(self, hidden: paddle.Tensor, micro: MicroBatch, sums: dict[str, paddle.Tensor]) -> None:
        """Adds the weighted losses of every other head, those with a label here, to ``sums``."""
        flat, batch, weight = hidden.reshape([-1, hidden.shape[-1]]), micro.batch, micro.weight
        must = self.text_losses.collective
        labels = batch["labels_text"].flatten()
        rows = _labelled(labels)
        if rows.shape[0] or must:
            self._add_text("text", self.norm(flat.gather(rows)), labels.gather(rows), weight.gather(rows), sums)
        if self.mtp is not None:
            labels = batch["labels_mtp"].flatten()
            rows = _labelled(labels)
            if "mtp_intervals" in batch:
                states = self._ahead_everywhere(hidden, labels, batch).gather(rows)
                self._add_text("mtp", states, labels.gather(rows), weight.gather(rows), sums)
            elif rows.shape[0]:
                states = self._ahead(flat, batch, rows)
                self._add_text("mtp", states, labels.gather(rows), weight.gather(rows), sums)
        labels = batch["labels_bits"].reshape([-1, self.config.vision_bits])
        kind = batch["kind"].flatten()
        for name, wanted in (("image", Kind.IMAGE_GEN), ("video", Kind.VIDEO_GEN)):
            rows = paddle.nonzero((labels[:, 0] != IGNORE) & (kind == int(wanted))).flatten()
            if rows.shape[0]:
                values = bit_loss(self.bit_logits(flat.gather(rows)), labels.gather(rows))
                sums[name] = (values * weight.gather(rows)).sum()

    def _add_text(
        self, name: str, states: paddle.Tensor, labels: paddle.Tensor, weight: paddle.Tensor, sums: dict
    ) -> None:
        losses = self.text_losses(states, labels, self.embedding.tokens.weight)
        sums[name] = (losses * weight).sum()

    def _run(
        self, block: Block, hidden: paddle.Tensor, rope: RopeTables, mask: IntervalMask, valid: paddle.Tensor
    ) -> paddle.Tensor:
        if not (self.config.recompute and self.training):
            return block(hidden, rope, mask, valid, self.context)
        return _recompute(block, hidden, rope, mask, valid, self.context)

    def _ahead(self, flat: paddle.Tensor, batch: dict[str, paddle.Tensor], rows: paddle.Tensor) -> paddle.Tensor:
        """MTP states [N,D] of the positions ``rows`` [N] (flat, ascending) of the last block's output ``flat`` [B*S,D].

        The block runs over these positions alone, packed into one row: others have nothing to predict two tokens
        ahead. They attend causally within their document.
        """
        width = batch["input_ids"].shape[1]
        ahead = F.pad(batch["input_ids"][:, 1:], [0, 1], value=0).flatten().gather(rows)
        document = (batch["document"].flatten() + paddle.arange(flat.shape[0]) // width * (width + 1)).gather(rows)
        count = rows.shape[0]
        end = paddle.searchsorted(document, document, right=True)
        columns = paddle.arange(count)
        intervals = paddle.stack([end, paddle.full_like(end, count), paddle.zeros_like(end), columns], axis=-1)
        rope, mask = self._context(
            batch["positions"].reshape([-1, 3]).gather(rows).unsqueeze(0),
            intervals.astype("int32").reshape([1, 1, count, 4]),
            0,
        )
        every = paddle.ones([1, count], dtype="bool")
        state = self.mtp(flat.gather(rows).unsqueeze(0), self.embedding.tokens(ahead).unsqueeze(0), rope, mask, every)
        return state.squeeze(0)

    def _ahead_everywhere(
        self, hidden: paddle.Tensor, labels: paddle.Tensor, batch: Mapping[str, paddle.Tensor]
    ) -> paddle.Tensor:
        """The same states at every position [N,D], for rows of which only a part is here.

        ``mtp_intervals`` hide the positions without a label, and ``next_ids`` are the tokens that follow.
        """
        rope, mask = self._context(batch["positions"], batch["mtp_intervals"], self._first_row(batch))
        labelled = (labels != IGNORE).reshape(batch["input_ids"].shape)
        state = self.mtp(hidden, self.embedding.tokens(batch["next_ids"]), rope, mask, labelled, self.context)
        return state.reshape([-1, state.shape[-1]])

    def _first_row(self, batch: Mapping[str, paddle.Tensor]) -> int:
        return 0 if self.context is None else self.context.start(batch["positions"].shape[1])

    def _context(
        self, positions: paddle.Tensor, intervals: paddle.Tensor, query_start: int
    ) -> tuple[RopeTables, IntervalMask]:
        config = self.config
        router = next(layer.moe.router for layer in self.layers if isinstance(layer, Block))
        dtype = router.weight.dtype  # float32 in a bfloat16 model too
        rope = rope_tables(positions.astype(dtype), config.head_dim, config.rope_base, config.rope_pattern)
        return rope, IntervalMask(intervals, positions.shape[1], query_start)

    # ------------------------------------------------------------------ routing

    def routers(self) -> list[nn.Layer]:
        """Every router, bottom to top, the MTP block's last."""
        return [layer.router for layer in self.sublayers() if isinstance(layer, MoE)]

    def update_router_bias(self, speed: float) -> None:
        """Aux-loss-free balancing after an optimiser step, from the tokens counted since the last call."""
        for router in self.routers():
            router.update_bias(speed)

    def expert_load(self) -> np.ndarray:
        """int64 [routers, E]: tokens of each expert since the last bias update."""
        return np.stack([router.counts.numpy() for router in self.routers()])


def _from_parts(folder: Path) -> Ernie5ForCausalLM:
    try:
        config = Ernie5Config.from_pretrained(str(folder))
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder}: unreadable config.json ({error}); choose another checkpoint") from None
    model = Ernie5ForCausalLM(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    with Checkpoint(folder) as saved:
        saved.check_names(MODEL, shapes)
        load_weights(model, saved, lambda name: Part(shapes[name]))
    return model


def _check_weights(folder: Path) -> None:
    """Compares the safetensors headers in ``folder`` with the model that its ``config.json`` describes."""
    files = sorted(folder.glob("model*.safetensors"))
    if not files or not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: no checkpoint here; expected config.json and safetensors weights")
    found: dict[str, list[int]] = {}
    try:
        for file in files:
            with safe_open(str(file), framework="np") as weights:
                found.update({name: list(weights.get_slice(name).get_shape()) for name in weights.keys()})  # noqa: SIM118
        config = Ernie5Config.from_pretrained(str(folder))
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{folder}: unreadable checkpoint ({error}); save it again or choose another") from None
    with paddle.LazyGuard():
        expected = {name: list(value.shape) for name, value in Ernie5ForCausalLM(config).state_dict().items()}
    faults = [f"{name} is missing" for name in expected if name not in found]
    faults += [f"{name} is not part of the model" for name in found if name not in expected]
    faults += [
        f"{name} has shape {found[name]}, expected {shape}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    if faults:
        more = f" and {len(faults) - 1} more" if len(faults) > 1 else ""
        raise ValueError(
            f"{folder}: weights do not fit config.json: {faults[0]}{more}; is it a checkpoint of another shape?"
        )


def _is_lazy(parameter: paddle.Tensor) -> bool:
    """True for a parameter declared under ``paddle.LazyGuard``, which has a shape but no memory."""
    return not parameter._is_initialized()


def _labelled(labels: paddle.Tensor) -> paddle.Tensor:
    return paddle.nonzero(labels != IGNORE).flatten()


def _recompute(
    block: Block,
    hidden: paddle.Tensor,
    rope: RopeTables,
    mask: IntervalMask,
    valid: paddle.Tensor,
    context: object | None,
) -> paddle.Tensor:
    """Block without kept activations; its router does not count the second pass."""
    router, passes = block.moe.router, []

    def run(x: paddle.Tensor) -> paddle.Tensor:
        router.recomputing = bool(passes)
        passes.append(None)
        out = block(x, rope, mask, valid, context)
        router.recomputing = False
        return out

    return recompute(run, hidden)
