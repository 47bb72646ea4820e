import numpy as np
import paddle
import pytest

from ernie5.ops.experts import ExpertsInParts, moe_ffn
from ernie5.ops.route import permutation, route


def swiglu_expert(x, gate_up, down):
    gate, up = np.split(x @ gate_up, 2, axis=-1)
    return (gate / (1 + np.exp(-gate)) * up) @ down


def loop(x, experts, weights, gate_up, down):
    out = np.zeros_like(x)
    for t, k in np.ndindex(*experts.shape):
        if experts[t, k] >= 0:
            e = experts[t, k]
            out[t] += weights[t, k] * swiglu_expert(x[t], gate_up[e], down[e])
    return out


def case(kind, rng, tokens=11, num_experts=5, top_k=3):
    experts = np.stack([rng.permutation(num_experts)[:top_k] for _ in range(tokens)])
    if kind == "one expert":
        experts = np.full((tokens, 1), 2)
    elif kind == "padding":
        experts[::2] = -1
    elif kind == "all padding":
        experts[:] = -1
    elif kind == "one token":
        experts = experts[:1]
    weights = rng.uniform(0.1, 1, experts.shape) * (experts >= 0)
    return experts, weights


KINDS = ["spread", "one expert", "padding", "all padding", "one token"]


@pytest.mark.parametrize("kind", KINDS)
def test_forward_and_gradients_equal_a_loop(kind):
    rng = np.random.default_rng(0)
    experts, weights = case(kind, rng)
    arrays = {
        "x": rng.standard_normal((len(experts), 6)),
        "weights": weights,
        "gate_up": rng.standard_normal((5, 6, 8)),
        "down": rng.standard_normal((5, 4, 6)),
    }
    tensors = {name: paddle.to_tensor(value, stop_gradient=False) for name, value in arrays.items()}
    _, order, offsets = permutation(paddle.to_tensor(experts.astype(np.int32)), 5)
    out = moe_ffn(tensors["x"], tensors["weights"], order, offsets, tensors["gate_up"], tensors["down"])
    np.testing.assert_allclose(out.numpy(), loop(experts=experts, **arrays), atol=1e-10)
    upstream = rng.standard_normal(out.shape)
    out.backward(paddle.to_tensor(upstream))

    def value(changed):
        return (loop(experts=experts, **changed) * upstream).sum()

    for name, array in arrays.items():
        for index in rng.permutation(array.size)[:8]:
            if name == "weights" and experts.ravel()[index] < 0:
                continue
            step = np.zeros(array.size)
            step[index] = 1e-6
            step = step.reshape(array.shape)
            slope = (value({**arrays, name: array + step}) - value({**arrays, name: array - step})) / 2e-6
            assert tensors[name].grad.numpy().ravel()[index] == pytest.approx(slope, abs=1e-6), (name, index)


@pytest.mark.parametrize("frozen", ["", "x", "weights", "gate_up", "gate_up down"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])  # by the kernels where there are any, by the reference
def test_parts_have_the_gradients_of_the_whole(dtype, kind, frozen):
    rng = np.random.default_rng(2)
    experts, weights = case(kind, rng)
    shapes = {"gate_up": (5, 6, 8), "down": (5, 4, 6), "x": (len(experts), 6), "grad_y": (len(experts), 6)}
    arrays = {"weights": weights, **{name: rng.standard_normal(shape) for name, shape in shapes.items()}}
    t = {name: paddle.to_tensor(array.astype(dtype)) for name, array in arrays.items()}
    for name in ("x", "weights", "gate_up", "down"):
        t[name].stop_gradient = name in frozen.split()
    routed = paddle.to_tensor(experts.astype(np.int32))
    whole = moe_ffn(t["x"], t["weights"], *permutation(routed, 5)[1:], t["gate_up"], t["down"])
    whole.backward(t["grad_y"])

    wanted = not t["x"].stop_gradient, not t["weights"].stop_gradient
    parts = ExpertsInParts(t["gate_up"], t["down"], wanted, keep_graph=True)
    pieces = [slice(0, 1), slice(1, 1), slice(1, len(experts))]
    found = {"y": [], "x": [], "weights": []}
    for number, piece in enumerate(pieces):
        routing = permutation(routed[piece], 5)[1:]
        found["y"].append(parts.forward(number, t["x"][piece], t["weights"][piece], *routing))
    for number, piece in enumerate(pieces):
        for name, grad in zip(("x", "weights"), parts.backward(number, t["grad_y"][piece]), strict=True):
            found[name].append(grad)
    sums = dict(zip(("gate_up", "down"), parts.weight_gradients(), strict=True))
    tolerance = 1e-5 if dtype == "float32" else 1e-12
    np.testing.assert_allclose(paddle.concat(found.pop("y")).numpy(), whole.numpy(), atol=tolerance)
    for name, grad in {**found, **sums}.items():
        if t[name].stop_gradient:
            assert grad in (None, [None] * 3), name
            continue
        grad = paddle.concat(grad) if name in found else grad
        np.testing.assert_allclose(grad.numpy(), t[name].grad.numpy(), atol=tolerance, err_msg=name)


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_routing_rules(activation):
    """Bias moves the selection alone; weights are the unbiased scores over their sum; padding is left out."""
    rng = np.random.default_rng(1)
    x, weight = rng.standard_normal((9, 6)), rng.standard_normal((6, 8))
    bias = np.zeros(8)
    bias[3] = 10.0
    valid = np.arange(9) < 7
    routing = route(*(paddle.to_tensor(a) for a in (x, weight, bias, valid)), 2, activation, 2.5)
    logits = x @ weight
    scores = 1 / (1 + np.exp(-logits))
    if activation == "softmax":
        scores = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    experts, weights = routing.experts.numpy(), routing.weights.numpy()
    for t in range(9):
        if not valid[t]:
            assert (experts[t] == -1).all() and (weights[t] == 0).all()
            continue
        wanted = np.argsort(-(scores[t] + bias))[:2]
        assert set(experts[t]) == set(wanted) and 3 in experts[t]
        np.testing.assert_allclose(weights[t], 2.5 * scores[t, experts[t]] / scores[t, experts[t]].sum(), atol=1e-12)
    counted = np.bincount(experts[experts >= 0], minlength=8)
    np.testing.assert_array_equal(routing.counts.numpy(), counted)
