"""``decode_step``: all layers over the few new rows of a decoding step in one call, with the cache it writes in place.

Shapes: B sequences, n new rows of each, M rows so far, D hidden, N query heads, G key/value heads, h head_dim,
E experts, F expert width, H shared expert's width, V vocabulary, C capacity of the cache. The meaning is that of the
model's own blocks, which run wherever this kernel does not serve; the cache works with both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import paddle
from paddle.utils.dlpack import from_dlpack

from ernie5.ops import kernels

MATRICES = ("query", "key", "value", "out", "gate_up", "down", "shared_gate_up", "shared_down")
_LAYER = ("attention_norm", *MATRICES[:4], "moe_norm", "router", "bias", *MATRICES[4:])  # as in decode_step.h
MOST_TOKENS = 256  # B * n of one call; more rows are a prompt, for which the blocks' own kernels are made
_SMALLEST_CAPACITY = 64


@dataclass
class DecodeWeights:
    """What the kernel reads. Each of ``layers`` has the tensors that ``_LAYER`` names; shared ones may be absent."""

    layers: Sequence[dict[str, paddle.Tensor]]
    embedding: paddle.Tensor  # [V,D], token embedding and text head
    final_norm: paddle.Tensor  # [D]
    frequencies: np.ndarray  # [3, h/2], of ``band_frequencies``
    heads: int
    groups: int
    top_k: int
    softmax: bool  # router scores; else sigmoid
    scale: float
    eps: float


def available(weights: DecodeWeights) -> bool:
    """Whether the kernel serves these weights: all matrices float32, or all bfloat16, on the CPU."""
    layers = weights.layers
    matrices = [weights.embedding, *(layer[name] for layer in layers for name in MATRICES if name in layer)]
    return bool(layers) and 2 * weights.frequencies.shape[1] > 1 and kernels.serves("decode_step", *matrices)


class DecodeStep:
    """The kernel bound to the memory of some weights: changes in place are seen, new tensors need a new object."""

    def __init__(self, weights: DecodeWeights) -> None:
        self.layers, self.groups = len(weights.layers), weights.groups
        self.head_dim = 2 * weights.frequencies.shape[1]
        self.vocabulary, self.hidden = weights.embedding.shape
        self._kept: list[paddle.Tensor | np.ndarray] = []  # keeps the memory behind the addresses alive
        self._table = paddle.to_tensor(np.array(self._describe(weights), np.int64), place=paddle.CPUPlace())

    def _describe(self, weights: DecodeWeights) -> list[int]:
        first = weights.layers[0]
        half = weights.embedding.dtype == paddle.bfloat16
        shared = first["shared_down"].shape[0] if "shared_down" in first else 0
        experts, width = first["down"].shape[:2]
        sizes = [self.layers, self.hidden, weights.heads, self.groups, self.head_dim, experts, weights.top_k, width]
        reals = [int(np.float64(value).view(np.int64)) for value in (weights.eps, weights.scale)]
        frequencies = np.ascontiguousarray(weights.frequencies, np.float32)
        self._kept.append(frequencies)
        ends = [frequencies.ctypes.data, self._address(weights.final_norm, True), self._address(weights.embedding)]
        table = [int(half), *sizes, shared, self.vocabulary, int(weights.softmax), *reals, *ends]
        for layer in weights.layers:
            table += [self._address(layer.get(name), name not in MATRICES) for name in _LAYER]
        return table

    def _address(self, tensor: paddle.Tensor | None, single: bool = False) -> int:
        if tensor is None:
            return 0
        tensor = tensor.detach()
        if single and tensor.dtype != paddle.float32:
            tensor = tensor.astype("float32")
        assert tensor.is_contiguous(), "the kernel reads contiguous weights"
        self._kept.append(tensor)
        return tensor.data_ptr()

    def takes(self, tokens: int) -> bool:
        """Whether a call of so many rows, all sequences together, is for the kernel."""
        return tokens <= MOST_TOKENS and paddle.in_dynamic_mode() and not paddle.is_grad_enabled()

    def run(
        self,
        hidden: paddle.Tensor | None,
        positions: paddle.Tensor,
        intervals: paddle.Tensor,
        valid: paddle.Tensor,
        cache: DecodeCache,
        query_start: int = 0,
        first: int = 0,
        last: int | None = None,
        ids: paddle.Tensor | None = None,
        rows: int | None = None,
        logits: bool = False,
    ) -> tuple[paddle.Tensor, paddle.Tensor]:
        """Layers ``first .. last-1`` over rows ``query_start ..`` -> hidden float32 [B,n,D], logits float32 [B,V].

        hidden float32 [B,n,D], or ids int64 [B,n] in its place; positions float32 [B,n,3]; intervals int32 [B,1,M,4]
        with M >= query_start+n, columns after these are ignored; valid bool [B,n]. With ``rows`` = n, ids, positions
        and valid may be those of whole sequences, [B,S] and [B,S,3]. Logits are those of each sequence's last row after
        norm and text head, empty unless asked for; with them, only the last rows of hidden are those behind the layers.
        """
        batch = positions.shape[0]
        rows = positions.shape[1] if rows is None else rows
        last = self.layers if last is None else last
        cache.extend(batch, query_start, query_start + rows, first, last)
        inputs = [self._table, cache.table, hidden, ids, positions, intervals, valid]
        out, scores = kernels.call("decode_step", inputs, [rows, query_start, first, last, logits])
        return out, scores

    def write(
        self,
        going: GoingText,
        positions: paddle.Tensor,
        intervals: paddle.Tensor,
        valid: paddle.Tensor,
        cache: DecodeCache,
        start: int,
    ) -> np.ndarray:
        """Feeds ``going.ids`` as row ``start``, then each token that it chooses -> tokens int64 [B, n], n >= 1.

        Stops after as many tokens as ``going`` has uniforms, or where every sequence has ended; the text that has ended
        goes on with ``going.end``. positions float32 [B,S,3], intervals int32 [B,1,M,4], valid bool [B,S] are those of
        whole sequences. Leaves the last tokens and states in ``going``.
        """
        batch, count = going.uniforms.shape
        cache.extend(batch, start, start + count, 0, self.layers)
        arrays = (going.ids, positions, intervals, valid, going.following, going.missing, going.states, going.uniforms)
        tensors = [from_dlpack(array) if isinstance(array, np.ndarray) else array for array in arrays]
        attributes = [start, going.end, going.left, going.top_k, float(going.temperature), float(going.top_p)]
        found = kernels.call("decode_text", [self._table, cache.table, *tensors], attributes)
        chosen, states, written = (tensor.numpy() for tensor in found)
        cache.lengths[:] = [start + int(written[0])] * self.layers
        chosen = chosen[:, : written[0]]
        going.ids, going.states = np.ascontiguousarray(chosen[:, -1]), states
        return chosen


@dataclass
class GoingText:
    """Texts that are being written, and the rule by which they go on. W <= V tokens may be chosen."""

    ids: np.ndarray  # int64 [B], the tokens to feed next; a text whose token is ``end`` has ended
    states: np.ndarray  # int64 [B], as ``following`` numbers them
    following: np.ndarray  # uint8 [4,W], the state after each token
    missing: np.ndarray  # uint8 [4,W], how many more tokens complete a text after each token; 255: none do
    end: int
    left: int  # tokens that may follow the next one; a token must be completed by as many as are left
    uniforms: np.ndarray  # float64 [B,n] in [0, 1), one for every token to choose
    temperature: float = 0.0  # 0: the most likely
    top_k: int = 0
    top_p: float = 1.0


class DecodeCache:
    """Keys and values of every layer, float32 [B,C,G,h] each, for the kernel and for the blocks alike.

    ``step`` is the kernel this cache may be used with, None where it does not serve.
    """

    def __init__(self, layers: int, groups: int, head_dim: int, step: DecodeStep | None = None) -> None:
        self.step = step
        self.lengths = [0] * layers
        self._row = (groups, head_dim)
        self._arrays = np.empty((layers, 2, 0, 0, *self._row), np.float32)
        self._table: paddle.Tensor | None = None

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, layer: int) -> _LayerView:
        return _LayerView(self, layer)

    @property
    def capacity(self) -> int:
        return self._arrays.shape[3]

    @property
    def table(self) -> paddle.Tensor:
        """What the kernel is told: int64 batch, capacity, and the addresses of every layer's keys and values."""
        if self._table is None:
            addresses = [part.ctypes.data for layer in self._arrays for part in layer]
            values = np.array([self._arrays.shape[2], self.capacity, *addresses], np.int64)
            self._table = paddle.to_tensor(values, place=paddle.CPUPlace())
        return self._table

    def extend(self, batch: int, start: int, stop: int, first: int, last: int) -> None:
        """Makes room for rows ``start .. stop-1`` of some layers, which they are about to get."""
        found = set(self.lengths[first:last])
        assert found == {start}, f"rows {start} to {stop} cannot follow caches of {sorted(found)} rows"
        self.reserve(batch, stop)
        self.lengths[first:last] = [stop] * (last - first)

    def reserve(self, batch: int, rows: int) -> None:
        """Room for ``rows`` rows of ``batch`` sequences; grows by doubling and keeps what is there."""
        layers, _, had, capacity = self._arrays.shape[:4]
        if had == batch and rows <= capacity:
            return
        assert had == batch or not any(self.lengths), f"a cache of {had} sequences cannot hold {batch}"
        old, kept = self._arrays, max(self.lengths)
        size = max(rows, _SMALLEST_CAPACITY, 2 * capacity if capacity else 0)
        self._arrays = np.empty((layers, 2, batch, size, *self._row), np.float32)
        if kept:
            self._arrays[:, :, :, :kept] = old[:, :, :, :kept]
        self._table = None

    def append(self, layer: int, k: paddle.Tensor, v: paddle.Tensor) -> tuple[paddle.Tensor, paddle.Tensor]:
        """Adds k, v [B,n,G,h] to a layer; returns all its keys and values [B,M,G,h], for attention by the blocks."""
        start = self.lengths[layer]
        stop = start + k.shape[1]
        self.extend(k.shape[0], start, stop, layer, layer + 1)
        mine = self._arrays[layer]
        for kept, new in zip(mine, (k, v), strict=True):
            kept[:, start:stop] = new.astype("float32").numpy()
        if start == 0:
            return k, v
        return tuple(paddle.to_tensor(kept[:, :stop], place=k.place).astype(k.dtype) for kept in mine)


@dataclass
class _LayerView:
    cache: DecodeCache
    layer: int

    def append(self, k: paddle.Tensor, v: paddle.Tensor) -> tuple[paddle.Tensor, paddle.Tensor]:
        return self.cache.append(self.layer, k, v)
