"""A plan is the layout of training with the target still empty."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from ernie5.sequence.layout import lay_out
from ernie5.sequence.mask import dense_mask
from ernie5.sequence.packing import collate, pack
from ernie5.sequence.parts import Sample, Text
from ernie5.sequence.plan import plan_batch, plan_generation
from ernie5.sequence.spec import LayoutSpec
from ernie5.sequence.vocabulary import IGNORE, Special
from tests.sequence.samples import Letters, audio, features, latent

SPEC = LayoutSpec(bits=8, scales=(1, 2, 3), temporal_window=1)
RNG = np.random.default_rng(0)
TARGETS = {
    "text": (Text("abcde"), 5),
    "image": (latent(RNG, SPEC), 1),
    "video": (latent(RNG, SPEC, 3), 3),
    "audio": (audio(RNG, SPEC, 4, True), 4),
}
PROMPT = [features(RNG, SPEC), Text("what is it"), audio(RNG, SPEC, 2, False)]


@pytest.mark.parametrize("name", TARGETS)
def test_plan_stands_where_training_does(name: str) -> None:
    target, size = TARGETS[name]
    trained = lay_out(Sample([*PROMPT, target]), Letters(), SPEC)
    plan = plan_generation(PROMPT, name, Letters(), SPEC, size).document
    count = len(plan)
    assert count == len(trained) - (1 if name == "text" else 2)
    np.testing.assert_array_equal(plan.positions, trained.positions[:count])
    np.testing.assert_array_equal(plan.kind, trained.kind[:count])
    if name != "text":
        np.testing.assert_array_equal(plan.input_ids, trained.input_ids[:count])
    seen = dense_mask(collate([pack([trained], len(trained))])["attention_intervals"])[0]
    planned = dense_mask(collate([pack([plan], count)])["attention_intervals"])[0]
    np.testing.assert_array_equal(planned, seen[:count, :count])
    assert (plan.labels_text[-size:] == IGNORE).all()


@pytest.mark.parametrize("name", TARGETS)
def test_steps_feed_whole_groups_once_in_order(name: str) -> None:
    plan = plan_generation(PROMPT, name, Letters(), SPEC, TARGETS[name][1])
    assert plan.steps[0].start == 0
    for before, after in zip(plan.steps, plan.steps[1:], strict=False):
        assert after.start == before.stop
        group = plan.document.group_start[after.start : after.stop]
        assert group[-1] + after.predicts == after.stop or after.predicts == 1
    predicted = sum(step.predicts for step in plan.steps)
    assert predicted == TARGETS[name][1] * (SPEC.frame_tokens if name in ("image", "video") else 1)


def test_given_frames_are_context() -> None:
    clip = latent(RNG, SPEC, 3)
    plan = plan_generation([Text("ab")], "video", Letters(), SPEC, 3, clip.latents[8][:1])
    trained = lay_out(Sample([Text("ab"), clip]), Letters(), SPEC)
    fed = SPEC.frame_tokens
    np.testing.assert_array_equal(plan.document.vision_features, trained.vision_features[:fed])
    np.testing.assert_array_equal(plan.document.vision_index, trained.vision_index[:fed])
    assert plan.steps[0].stop == 4 + fed and plan.steps[0].frame == 1


@pytest.mark.parametrize("name", TARGETS)
def test_batch_lines_targets_up_and_prompt_free_rows_follow(name: str) -> None:
    prompts = [[Text("ab")], PROMPT]
    fields, steps = plan_batch(prompts, name, Letters(), SPEC, TARGETS[name][1], guided=True)
    longest = len(plan_generation(PROMPT, name, Letters(), SPEC, TARGETS[name][1]).document)
    assert fields["input_ids"].shape == (4, longest)
    np.testing.assert_array_equal(fields["input_ids"][2], fields["input_ids"][3])
    known = steps[0].stop
    if name != "text":
        assert (fields["input_ids"][:, known - 1] == fields["input_ids"][0, known - 1]).all()
        assert fields["input_ids"][2, known - 2] == Special.BOS and fields["document"][2, known - 3] == 0
    visible = dense_mask(fields["attention_intervals"])
    padding = fields["document"] == 0
    for row in range(4):
        alone = np.eye(longest, dtype=bool)[padding[row]]
        np.testing.assert_array_equal(visible[row][padding[row]], alone)
        np.testing.assert_array_equal(visible[row][:, padding[row]], alone.T)


def test_text_shrinks_to_what_every_prompt_leaves() -> None:
    spec = replace(SPEC, length=30)
    _, steps = plan_batch([[Text("a" * 9)], [Text("a" * 19)]], "text", Letters(), spec, 100)
    assert len(steps) == 10


@pytest.mark.parametrize(("target", "message"), [("taste", "cannot generate 'taste'"), ("image", "context holds 10")])
def test_impossible_plans(target: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_generation([Text("a")], target, Letters(), replace(SPEC, length=10), 1)
