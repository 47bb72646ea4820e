"""The compiled kernels inside a saved static graph, run by Paddle Inference."""

from __future__ import annotations

import numpy as np
import paddle
import pytest
from paddle import inference, nn
from paddle.static import InputSpec

from ernie5.model import Ernie5Config
from ernie5.model.layers import Block, RMSNorm
from ernie5.ops import kernels
from ernie5.ops.attention import IntervalMask
from ernie5.ops.cross_entropy import cross_entropy
from ernie5.ops.linear import linear
from ernie5.ops.patch_embed import patch_embed
from ernie5.ops.rope import rope_tables


class Reader(nn.Layer):
    """Every op of the forward pass once: patches and text rows through a block, then a loss."""

    def __init__(self) -> None:
        super().__init__()
        config = Ernie5Config(hidden_size=32, num_heads=4, num_kv_heads=2, head_dim=8, num_experts=4)
        self.block, self.norm = Block(config), RMSNorm(32, 1e-6)
        self.patch = self.create_parameter([4 * 4 * 3, 32])
        self.bias = self.create_parameter([32], is_bias=True)
        self.head = self.create_parameter([11, 32])

    def forward(self, x, pictures, positions, intervals, labels):
        patches = patch_embed(pictures, self.patch, self.bias, (1, 4, 4), [0.5] * 3, [0.2] * 3)
        x = paddle.concat([patches, x], axis=1)
        mask = IntervalMask(intervals, x.shape[1])
        valid = paddle.ones(x.shape[:2], dtype="bool")
        x = self.block(x, rope_tables(positions, 8, 1e4, "hwt"), mask, valid)
        logits = linear(self.norm(x), self.head, transposed=True)
        return logits, cross_entropy(logits.reshape([-1, 11]), labels)


def example(rng, batch, text):
    length = text + 4
    intervals = np.zeros((batch, 1, length, 4), np.int32)
    intervals[..., :2], intervals[..., 3] = length, np.arange(length)
    return [
        rng.standard_normal((batch, text, 32)).astype(np.float32),
        rng.integers(0, 256, (batch, 1, 8, 8, 3)).astype(np.uint8),
        rng.uniform(0, 9, (batch, length, 3)).astype(np.float32),
        intervals,
        rng.integers(0, 11, batch * length),
    ]


@pytest.mark.skipif(bool(kernels.library().problem), reason="the kernels are not compiled here")
def test_a_saved_graph_answers_as_the_layer_does(tmp_path):
    layer = Reader()
    layer.eval()
    specs = [
        InputSpec([None, None, 32], "float32", "x"),
        InputSpec([None, 1, 8, 8, 3], "uint8", "pictures"),
        InputSpec([None, None, 3], "float32", "positions"),
        InputSpec([None, 1, None, 4], "int32", "intervals"),
        InputSpec([None], "int64", "labels"),
    ]
    paddle.jit.save(paddle.jit.to_static(layer, input_spec=specs, full_graph=True), str(tmp_path / "reader"))
    text = (tmp_path / "reader.json").read_text(encoding="utf-8")
    for name in ("moe_ffn", "swiglu", "flashmask_attention", "uni_rope", "route", "add_rms_norm", "patch_embed"):
        assert f"{kernels.PREFIX}{name}" in text, f"{name} is not in the graph"
    config = inference.Config(str(tmp_path / "reader.json"), str(tmp_path / "reader.pdiparams"))
    config.disable_gpu()
    predictor = inference.create_predictor(config)
    for batch, length in ((1, 3), (2, 7)):
        inputs = example(np.random.default_rng(batch), batch, length)
        with paddle.no_grad():
            wanted = [value.numpy() for value in layer(*(paddle.to_tensor(value) for value in inputs))]
        for name, value in zip(predictor.get_input_names(), inputs, strict=True):
            predictor.get_input_handle(name).copy_from_cpu(value)
        predictor.run()
        got = [predictor.get_output_handle(name).copy_to_cpu() for name in predictor.get_output_names()]
        for have, want in zip(got, wanted, strict=True):
            np.testing.assert_allclose(have, want, atol=1e-5)
