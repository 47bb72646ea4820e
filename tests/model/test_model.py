import copy

import numpy as np
import paddle
import pytest
from safetensors.numpy import load_file, save_file

from ernie5.config import num_params
from ernie5.model import Ernie5ForCausalLM
from ernie5.model.losses import total_weights
from ernie5.ops import kernels
from ernie5.sequence.parts import Sample, Text
from ernie5.sequence.vocabulary import IGNORE, Special
from tests.model.helpers import SPEC, batch_of, samples, tiny_config, tiny_model


def hidden_states(model, batch):
    """State after every block, with the codec feedback of training; [B,S,D] each."""
    seen = []
    hooks = [layer.register_forward_post_hook(lambda _, __, out: seen.append(out.numpy())) for layer in model.layers]
    model(**batch)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("name", list(samples(np.random.default_rng(0))))
def test_every_modality_has_finite_losses_and_gradients(name):
    model = tiny_model()
    out = model(**batch_of([[samples(np.random.default_rng(0))[name]]]))
    out["loss"].backward()
    expected = {
        "image_gen": {"text", "mtp", "image"},
        "video_gen": {"text", "mtp", "video"},
        "audio_gen": {"text", "mtp", "audio"},
    }
    assert set(out["losses"]) == expected.get(name, {"text", "mtp"})
    assert all(np.isfinite(p.grad.numpy()).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", ["text", "image_gen", "video_gen", "audio_gen", "audio_und"])
def test_later_groups_change_nothing_before(name):
    """Replacing everything after a group boundary leaves all states up to it, at every block."""
    rng = np.random.default_rng(2)
    model = tiny_model()
    model.eval()
    batch = batch_of([[samples(rng)[name]]])
    length = int((batch["input_ids"] != Special.PAD).sum())
    starts = batch["attention_intervals"].numpy()[0, 0, :length, 3]
    boundary = int(np.unique(starts)[len(np.unique(starts)) // 2])
    changed = {key: value.clone() for key, value in batch.items()}
    changed["input_ids"][:, boundary:length] = paddle.where(
        batch["input_ids"][:, boundary:length] >= 16, paddle.to_tensor(20), batch["input_ids"][:, boundary:length]
    )
    if batch["vision_index"].shape[0]:
        later = (batch["vision_index"] >= boundary).unsqueeze(-1).astype("float64")
        changed["vision_features"] = batch["vision_features"] + later
    for key in ("audio_codes", "labels_audio"):
        values = changed[key].numpy()
        tail = values[:, boundary:]  # the label at p feeds position p itself
        tail[(tail >= 0) & (tail < SPEC.codebook_size)] = 1
        changed[key] = paddle.to_tensor(values)
    before, after = hidden_states(model, batch), hidden_states(model, changed)
    for a, b in zip(before, after, strict=True):
        np.testing.assert_allclose(a[:, :boundary], b[:, :boundary], atol=1e-12)
    assert not np.allclose(before[-1][:, boundary:length], after[-1][:, boundary:length])


def test_documents_in_a_row_are_independent():
    """Changing the first document changes no state of the second, and packing equals a row of its own."""
    rng = np.random.default_rng(3)
    model = tiny_model()
    model.eval()
    made = samples(rng)
    second = made["audio_gen"]
    states = [hidden_states(model, batch_of([[first, second]])) for first in (made["text"], made["image_und"])]
    alone = hidden_states(model, batch_of([[second]]))
    length = len("say") + 1 + 1 + 6 + 1 + 2
    starts = [2 + len("to be or not"), 2 + 3 + 4 + len("what?seven")]
    for state, start in zip(states, starts, strict=True):
        for layer, reference in zip(state, alone, strict=True):
            np.testing.assert_allclose(layer[0, start : start + length], reference[0, :length], atol=1e-10)


def test_padding_is_never_routed():
    model = tiny_model()
    model.train()
    batch = batch_of([[samples(np.random.default_rng(0))["text"]]])
    model(**batch)
    tokens = int((batch["input_ids"] != Special.PAD).sum())
    ahead = int((batch["labels_mtp"] != IGNORE).sum())
    routed = model.expert_load().sum(axis=1) / model.config.experts_per_token
    assert routed.tolist() == [tokens] * model.config.num_layers + [ahead]


def test_bias_update_moves_load_towards_the_mean_and_evaluation_does_not_count():
    model = tiny_model()
    batch = batch_of([list(samples(np.random.default_rng(0)).values())[:3]])
    model.eval()
    model(**batch)
    assert model.expert_load().sum() == 0
    model.train()
    spread = []
    for _ in range(60):
        model(**batch)
        spread.append(model.expert_load().std(axis=1).mean())
        model.update_router_bias(0.02)
    assert np.mean(spread[-5:]) < 0.6 * spread[0]
    assert model.expert_load().sum() == 0, "the update forgets the counts"


def test_losses_equal_a_float64_reference():
    """Text: weighted mean of -log p; bits: mean over bits; audio: mean over levels. All from the public logits."""
    rng = np.random.default_rng(5)
    model = tiny_model()
    model.eval()
    made = samples(rng)
    batch = batch_of([[made["text"], made["image_gen"]], [made["audio_gen"]]])
    out = model(**batch)
    states = hidden_states(model, batch)
    weight = batch["loss_weight"].numpy()

    def log_softmax(x):
        x = x - x.max(-1, keepdims=True)
        return x - np.log(np.exp(x).sum(-1, keepdims=True))

    labels = batch["labels_text"].numpy()
    at = labels != IGNORE
    logits = log_softmax(model.text_logits(paddle.to_tensor(states[-1][at])).numpy())
    text = -(logits[np.arange(at.sum()), labels[at]] * weight[at]).sum() / weight[at].sum()
    assert float(out["losses"]["text"]) == pytest.approx(text, rel=1e-10)
    bits = batch["labels_bits"].numpy()
    at = bits[..., 0] != IGNORE
    logits = log_softmax(model.bit_logits(paddle.to_tensor(states[-1][at])).numpy())
    values = -np.take_along_axis(logits, bits[at][..., None], -1)[..., 0].mean(-1)
    assert float(out["losses"]["image"]) == pytest.approx((values * weight[at]).sum() / weight[at].sum(), rel=1e-10)
    codes = batch["labels_audio"].numpy()
    at = codes[..., 0] != IGNORE
    values = 0.0
    for level in range(SPEC.levels):
        state = states[model.config.num_layers - SPEC.levels + level]
        logits = log_softmax(model.audio_logits(paddle.to_tensor(state[at]), level).numpy())
        values = values - logits[np.arange(at.sum()), codes[at][:, level]] / SPEC.levels
    assert float(out["losses"]["audio"]) == pytest.approx((values * weight[at]).sum() / weight[at].sum(), rel=1e-10)


def test_prediction_two_ahead_equals_the_block_over_the_whole_document():
    """Text alone: packing the positions with a target equals one row of each document, and documents stay apart."""
    model = tiny_model()
    model.eval()
    texts = [Sample([Text(text)]) for text in ("to be or not", "that is", "a question")]
    together = model(**batch_of([texts[:2], texts[2:]]))["losses"]["mtp"]
    total = count = 0.0
    for text in texts:
        batch = batch_of([[text]], length=len(text.parts[0].text) + 2)
        state = paddle.to_tensor(hidden_states(model, batch)[-1])
        rope, mask = model._context(batch["positions"], batch["attention_intervals"], 0)
        ahead = paddle.concat([batch["input_ids"][:, 1:], paddle.zeros([1, 1], dtype="int64")], axis=1)
        out = model.mtp(state, model.embedding.tokens(ahead), rope, mask, batch["input_ids"] != Special.PAD)
        logits = paddle.matmul(out, model.embedding.tokens.weight, transpose_y=True)[0].numpy()
        labels = batch["labels_mtp"].numpy()[0]
        at = labels != IGNORE
        logits = logits[at] - logits[at].max(-1, keepdims=True)
        total -= (logits - np.log(np.exp(logits).sum(-1, keepdims=True)))[np.arange(at.sum()), labels[at]].sum()
        count += at.sum()
    assert float(together) == pytest.approx(total / count, rel=1e-9)


def test_codec_levels_depend_on_lower_levels_only():
    """Depth-wise feedback: a code of level q changes the logits of levels above q at its position, none at or below."""
    model = tiny_model(audio_levels=2)
    model.eval()
    batch = batch_of([[samples(np.random.default_rng(0))["audio_gen"]]])
    labels = batch["labels_audio"].numpy()
    position = int(np.flatnonzero(labels[0, :, 0] != IGNORE)[2])
    other = labels.copy()
    other[0, position, 0] = (other[0, position, 0] + 1) % SPEC.codebook_size
    states = [hidden_states(model, {**batch, "labels_audio": paddle.to_tensor(x)}) for x in (labels, other)]
    same = [np.allclose(a[0, position], b[0, position], atol=1e-12) for a, b in zip(*states, strict=True)]
    assert same == [True, True, False]


def test_posterior_weights_bring_losses_to_one_interval():
    model = tiny_model(dtype="float32")
    weights = model.loss_weights
    weights.train()
    model.set_loss_weights(mtp=0.0, minimum=0.5, maximum=2.0, fixed={"audio": 3.0})
    losses = {"text": paddle.to_tensor(4.0), "image": paddle.to_tensor(1.0), "audio": paddle.to_tensor(2.0)}
    assert float(weights(losses)) == pytest.approx(4.0 + 1.0 + 3.0 * 2.0)  # nothing observed yet
    for _ in range(3):
        weights.observe(losses)
    total = weights(losses)
    middle = (4.0 * 1.0 * 2.0) ** (1 / 3)
    assert float(total) == pytest.approx(4.0 * middle / 4 + 1.0 * min(middle, 2.0) + 3.0 * 2.0 * middle / 2, rel=1e-5)


@pytest.mark.parametrize("term", ["text", "mtp", "image", "video", "audio"])
def test_accumulation_changes_no_gradient_of_any_term(term):
    """Rows one by one, divided by the weights of all, against the rows together; terms have unlike counts in them."""
    made = samples(np.random.default_rng(3))
    rows = [
        [made["text"], made["audio_gen"]],
        [made["image_gen"], made["audio_und"]],
        [made["video_gen"]],
        [made["image_und"]],
    ]
    gradients = []
    for batches in ([batch_of(rows)], [batch_of([row]) for row in rows]):
        model = tiny_model()
        total = total_weights(batches)
        assert total.keys() == {"text", "mtp", "image", "video", "audio"}
        for batch in batches:
            losses = model(total=total, **batch)["losses"]
            if term in losses:
                losses[term].backward()
        gradients.append({name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None})
    for name, together in gradients[0].items():  # what a term does not depend on has no gradient, or zeros
        np.testing.assert_allclose(gradients[1].get(name, 0.0 * together), together, atol=1e-12, err_msg=name)
    assert gradients[1].keys() <= gradients[0].keys()


@pytest.mark.parametrize("option", [{"recompute": True}, {"moe_sub_batch": 5}, {"recompute": True, "moe_sub_batch": 7}])
def test_recomputation_changes_neither_gradients_nor_counts(option):
    batch = batch_of([[samples(np.random.default_rng(0))["audio_gen"]]])
    results = []
    for chosen in ({}, option):
        model = tiny_model(**chosen)
        assert {name: getattr(model.config, name) for name in chosen} == chosen
        model.train()
        model(**batch)["loss"].backward()
        results.append(
            (model.expert_load(), {n: p.grad.numpy() for n, p in model.named_parameters() if p.grad is not None})
        )
    np.testing.assert_array_equal(results[0][0], results[1][0])
    assert set(results[0][1]) == set(results[1][1])
    for name, grad in results[0][1].items():
        np.testing.assert_allclose(grad, results[1][1][name], atol=1e-12, err_msg=name)


def test_save_and_load_is_bit_equal(tmp_path):
    model = tiny_model(dtype="float32")
    model.layers[1].moe.router.correction_bias.set_value(paddle.arange(8, dtype="float32"))
    model.loss_weights.ema.set_value(paddle.to_tensor([1.0, 2.0, 0.0, 3.0]))
    model.save_pretrained(str(tmp_path))
    assert list(tmp_path.glob("*.safetensors")), "weights are safetensors"
    save_file({"norm.weight|moment1": np.ones(24, np.float32)}, str(tmp_path / "optimizer.safetensors"))
    loaded = Ernie5ForCausalLM.from_pretrained(str(tmp_path))
    for name, value in model.state_dict().items():
        np.testing.assert_array_equal(value.numpy(), loaded.state_dict()[name].numpy(), err_msg=name)
    assert loaded.config.to_model_config() == model.config.to_model_config()


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        ("other shape", "has shape"),
        ("missing", "is missing"),
        ("unknown", "not part of the model"),
        ("corrupt", "unreadable checkpoint"),
        ("nothing", "no checkpoint here"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_in_one_line(tmp_path, damage, says):
    model = tiny_model(dtype="float32")
    model.save_pretrained(str(tmp_path))
    (file,) = tmp_path.glob("*.safetensors")
    weights = load_file(str(file))
    if damage == "other shape":
        weights["norm.weight"] = np.ones(25, np.float32)
    elif damage == "missing":
        del weights["layers.0.moe.router.correction_bias"]
    elif damage == "unknown":
        weights["layers.9.extra"] = np.ones(1, np.float32)
    save_file(weights, str(file))
    if damage == "corrupt":
        file.write_bytes(file.read_bytes()[:100])
    elif damage == "nothing":
        file.unlink()
    with pytest.raises(ValueError, match=says) as error:
        Ernie5ForCausalLM.from_pretrained(str(tmp_path))
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_initial_values_depend_on_name_and_seed_only():
    names = {"layers.1.moe.experts.down", "embedding.tokens.weight"}
    small, deep = tiny_model(dtype="float32"), tiny_model(dtype="float32", num_layers=3, mtp_depth=0)
    other = Ernie5ForCausalLM(tiny_config(), seed=1)
    for name in names:
        value = dict(small.named_parameters())[name].numpy()
        np.testing.assert_array_equal(value, dict(deep.named_parameters())[name].numpy())
        assert not np.array_equal(value, dict(other.named_parameters())[name].numpy())


def test_lazily_built_model_has_the_counted_parameters():
    with paddle.LazyGuard():
        model = Ernie5ForCausalLM(tiny_config())
    assert sum(int(np.prod(p.shape)) for p in model.parameters()) == num_params(tiny_config().to_model_config()).total


def test_a_batch_without_targets_is_refused():
    batch = copy.copy(batch_of([[samples(np.random.default_rng(0))["text"]]]))
    for name in ("labels_text", "labels_mtp"):
        batch[name] = paddle.full_like(batch[name], IGNORE)
    with pytest.raises(ValueError, match="no labelled position"):
        tiny_model()(**batch)


@pytest.mark.skipif(bool(kernels.library().problem), reason="bfloat16 on a CPU needs the compiled kernels")
def test_a_bfloat16_model_learns_what_a_float32_one_does():
    """Losses agree to bfloat16's digits, every parameter gets a gradient of its own dtype, routers stay in float32."""
    rows = [[sample] for sample in samples(np.random.default_rng(0)).values()]
    batch = batch_of(rows, dtype="float32")
    single, half = tiny_model(dtype="float32"), tiny_model(dtype="float32")
    half.to_bfloat16()
    assert half.layers[0].moe.router.weight.dtype == paddle.float32
    assert half.layers[0].moe.experts.gate_up.dtype == half.embedding.tokens.weight.dtype == paddle.bfloat16
    wanted, found = single(**batch), half(**batch)
    assert set(wanted["losses"]) == set(found["losses"])
    for name, loss in wanted["losses"].items():
        assert float(found["losses"][name]) == pytest.approx(float(loss), rel=0.02), name
    wanted["loss"].backward()
    found["loss"].backward()
    for (name, parameter), other in zip(single.named_parameters(), half.parameters(), strict=True):
        assert (parameter.grad is None) == (other.grad is None), name
        if other.grad is not None:
            assert other.grad.dtype == other.dtype and bool(paddle.isfinite(other.grad.astype("float32")).all()), name
