"""``generate`` from raw prompts to raw results."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import paddle
import pytest

from ernie5.generation import generate
from ernie5.generation.decode import TOKENS_A_CALL
from ernie5.generation.walk import Walk
from ernie5.ops import kernels
from ernie5.sequence.parts import Audio, Image, RawPart, Speaker, Text, Video
from ernie5.sequence.vocabulary import NUM_SPECIALS, Special
from ernie5.tokenizers.text import TextTokenizer
from tests.generation.stand_ins import MODEL as SHAPE
from tests.generation.stand_ins import StandIns, tiny_model

MODEL, TOKENIZERS = tiny_model(), StandIns()
RNG = np.random.default_rng(0)
PICTURE = RNG.integers(0, 256, (12, 12, 3), dtype=np.uint8)
CLIP = RNG.integers(0, 256, (5, 12, 12, 3), dtype=np.uint8)
WAVE = RNG.uniform(-1, 1, 4000).astype(np.float32)
PROMPTS: list[list[RawPart]] = [
    [Text("a red star")],
    [Image(PICTURE), Text("what is this?")],
    [Video(CLIP), Text("and now")],
    [Audio(WAVE), Text("say"), Speaker(WAVE)],
]
TARGETS = ("text", "image", "video", "audio")


@pytest.mark.parametrize("to", TARGETS)
def test_every_target_from_every_mix(to: str) -> None:
    results = generate(MODEL, TOKENIZERS, PROMPTS, to, max_new_tokens=7, num_frames=4)
    assert len(results) == len(PROMPTS)
    for result in results:
        if to == "text":
            assert isinstance(result, str) and len(result) <= 7
        elif to == "audio":
            assert result.dtype == np.float32 and len(result) % 1280 == 0 and 1 <= len(result) // 1280 <= 7
        else:
            assert result.dtype == np.uint8 and result.shape == ((12, 12, 3) if to == "image" else (4, 12, 12, 3))


@pytest.mark.parametrize("to", TARGETS)
def test_seed_decides_and_one_prompt_may_stand_alone(to: str) -> None:
    options = {"max_new_tokens": 12, "num_frames": 3}
    first = generate(MODEL, TOKENIZERS, PROMPTS[0], to, seed=3, **options)
    again = generate(MODEL, TOKENIZERS, PROMPTS, to, seed=3, **options)
    other = generate(MODEL, TOKENIZERS, PROMPTS[0], to, seed=4, **options)
    assert len(first) == 1
    assert np.array_equal(first[0], again[0])
    assert not np.array_equal(first[0], other[0])


@pytest.mark.parametrize("to", ["image", "video", "audio"])
def test_guidance_combines_prompt_and_no_prompt(to: str) -> None:
    """At 1 the prompt-free rows change nothing, at 0 only they count, and then prompts cannot matter."""
    options = {"temperature": 0.0, "max_new_tokens": 6, "num_frames": 3}
    plain = generate(MODEL, TOKENIZERS, PROMPTS, to, **options)
    near = generate(MODEL, TOKENIZERS, PROMPTS, to, guidance=1 + 1e-9, **options)
    for a, b in zip(plain, near, strict=True):
        np.testing.assert_array_equal(a, b)
    free = generate(MODEL, TOKENIZERS, PROMPTS, to, guidance=0.0, **options)
    for result in free[1:]:
        np.testing.assert_array_equal(result, free[0])
    strong = generate(MODEL, TOKENIZERS, PROMPTS, to, guidance=6.0, **options)
    assert any(not np.array_equal(a, b) for a, b in zip(plain, strong, strict=True))


def with_logits(monkeypatch: pytest.MonkeyPatch, name: str, change) -> None:
    original = getattr(MODEL, name)

    def changed(*args):
        return paddle.to_tensor(change(original(*args).numpy().copy()))

    monkeypatch.setattr(MODEL, name, changed)


def with_text_logits(monkeypatch: pytest.MonkeyPatch, change) -> None:
    """Changes the logits of every token, which are then chosen in Python, one a call."""
    original = Walk.text_logits
    monkeypatch.setattr(Walk, "can_write", lambda *args: False)
    monkeypatch.setattr(Walk, "text_logits", lambda *args: change(original(*args).copy()))


def test_text_stops_at_its_end_and_holds_no_other_special(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def change(logits: np.ndarray) -> np.ndarray:
        calls.append(None)
        logits[:, :NUM_SPECIALS] += 100.0
        logits[:, Special.EOS] = -100.0
        for row in range(len(logits)):
            if len(calls) > 2 * (row + 1):
                logits[row, Special.EOS] = 1000.0
        return logits

    with_text_logits(monkeypatch, change)
    results = generate(MODEL, TOKENIZERS, PROMPTS[:2], "text", max_new_tokens=30)
    assert [len(result) for result in results] == [2, 4]
    assert len(calls) == 5


def test_ids_without_a_text_are_never_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    text = TOKENIZERS.text
    drawn: list[int] = []

    def change(logits: np.ndarray) -> np.ndarray:
        logits[:, text.vocab_size :] += 100.0
        logits[:, Special.EOS] = -100.0
        return logits

    with_text_logits(monkeypatch, change)
    monkeypatch.setattr(text, "decode", lambda ids: drawn.extend(ids) or "", raising=False)
    generate(MODEL, TOKENIZERS, PROMPTS[:2], "text", max_new_tokens=9)
    assert len(drawn) == 18 and min(drawn) >= NUM_SPECIALS and max(drawn) < text.vocab_size


@pytest.mark.parametrize("options", [{}, {"temperature": 0.0}, {"top_k": 3}, {"top_p": 0.3}, {"temperature": 3.0}])
@pytest.mark.parametrize("size", [1, 2, 40])
def test_text_is_well_formed_and_complete(size: int, options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model with random weights is as likely to stop inside a character as anywhere; every row has its own state."""
    text = TextTokenizer.train(["the heart 😀 world 世界"] * 3, 330, progress=False)
    text.parities = None
    with_text_logits(monkeypatch, _keen_on_surrogates)
    tokenizers = SimpleNamespace(text=text, vision=TOKENIZERS.vision)
    prompts = [[Text(f"{number} red stars")] for number in range(6)]
    results = generate(MODEL, tokenizers, prompts, "text", max_new_tokens=size, **options)
    for result in results:
        assert result.encode("utf-16-be").decode("utf-16-be") == result and "\ufffd" not in result
    alone = generate(MODEL, tokenizers, prompts[0], "text", max_new_tokens=size, **options)
    assert alone == results[:1]


@pytest.mark.skipif(not kernels.available("decode_text"), reason="no compiled kernels on this machine")
@pytest.mark.parametrize("options", [{"temperature": 0.0}, {}, {"top_k": 3}, {"top_p": 0.5, "temperature": 2.0}])
def test_the_kernel_writes_what_python_chooses(options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over more tokens than it writes a call, one of them for the prompts together and one for the first alone."""
    text = TextTokenizer.train(["the heart 😀 world 世界"] * 3, 330, progress=False)
    tokenizers = SimpleNamespace(text=text, vision=TOKENIZERS.vision)
    prompts = [[Text(f"{number} red stars")] for number in range(4)]
    written, write = [], Walk.write
    monkeypatch.setattr(Walk, "write", lambda *args: written.append(write(*args)) or written[-1])
    given = {"max_new_tokens": TOKENS_A_CALL + 9, **options}
    found = generate(MODEL, tokenizers, prompts, "text", **given)
    assert [part.shape[1] for part in written] == [TOKENS_A_CALL, 8]
    alone = generate(MODEL, tokenizers, prompts[0], "text", **given)
    monkeypatch.setattr(Walk, "can_write", lambda *args: False)
    assert found == generate(MODEL, tokenizers, prompts, "text", **given)
    assert alone == found[:1]


def _keen_on_surrogates(logits: np.ndarray) -> np.ndarray:
    logits[:, NUM_SPECIALS + 0xD8 : NUM_SPECIALS + 0xE0] += 2.0
    logits[:, Special.EOS] += 1.0
    return logits


def test_audio_ends_by_its_first_level_and_never_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def change(logits: np.ndarray) -> np.ndarray:
        level = len(calls) % SHAPE.audio_levels
        frame = len(calls) // SHAPE.audio_levels
        calls.append(None)
        logits[:, -1] = 100.0 if level else -100.0
        for row in range(len(logits)):
            if level == 0 and (frame == 0 or frame > 2 + row):
                logits[row, -1] = 100.0
        return logits

    with_logits(monkeypatch, "audio_logits", change)
    results = generate(MODEL, TOKENIZERS, PROMPTS[:2], "audio", max_new_tokens=30)
    assert [len(result) // 1280 for result in results] == [3, 4]


def test_text_and_audio_fill_the_context_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    def change(logits: np.ndarray) -> np.ndarray:
        logits[:, Special.EOS] = -100.0
        return logits

    with_text_logits(monkeypatch, change)
    (text,) = generate(MODEL, TOKENIZERS, [Text("a" * 140)], "text", temperature=0.0)
    assert len(text) == SHAPE.max_sequence_length - 141


def test_a_video_continues_real_frames() -> None:
    clips = [CLIP[:3], CLIP[2:]]
    options = {"num_frames": 6, "temperature": 0.0}
    results = generate(MODEL, TOKENIZERS, [[Text("left")], []], "video", context=clips, **options)
    vision = TOKENIZERS.vision
    for clip, result in zip(clips, results, strict=True):
        assert result.shape == (6, 12, 12, 3)
        np.testing.assert_allclose(result[:3].mean(), vision.decode(vision.encode(clip[None], 8), 8).mean(), atol=40)
    same = generate(MODEL, TOKENIZERS, [[Text("left")], []], "video", context=[clips[0]] * 2, **options)
    np.testing.assert_array_equal(same[0], results[0])
    assert not np.array_equal(same[1], results[1])


def test_the_model_returns_to_its_mode() -> None:
    MODEL.train()
    generate(MODEL, TOKENIZERS, [Text("a")], "text", max_new_tokens=1)
    training = MODEL.training
    MODEL.eval()
    assert training
    assert not any(router.counts.any() for router in MODEL.routers())


@pytest.mark.parametrize(
    ("prompt", "to", "options", "message"),
    [
        ([], "text", {}, "prompt 0 is empty"),
        ([[Text("a")], [Text("  ")]], "image", {}, "prompt 1 is empty"),
        ([Text("a")], "smell", {}, "cannot generate 'smell'; choose one of text, image, video, audio"),
        ([Text("a" * 160)], "text", {}, "takes 162 positions, the context holds 160"),
        ([Text("a" * 150)], "image", {}, "prompt .151 positions. with the image to generate takes 166"),
        ([Text("a" * 159)], "audio", {}, "takes 162 positions"),
        ([Text("a")], "video", {"num_frames": 30}, "with the video to generate takes"),
        ([Text("a")], "video", {"num_frames": 0}, "num_frames"),
        ([Text("a")], "text", {"max_new_tokens": 0}, "max_new_tokens"),
        ([Text("a")], "text", {"guidance": 2.0}, "guidance"),
        ([Text("a")], "image", {"temperature": -1.0}, "temperature"),
        ([Text("a")], "image", {"context": CLIP}, "only be continued as a video"),
        ([Text("a")], "video", {"context": CLIP, "num_frames": 5}, "fills 5 frames already"),
        ([[Text("a")]] * 2, "video", {"context": [CLIP]}, "1 clips"),
        ([[Text("a")]] * 2, "video", {"context": [CLIP, CLIP[:2]]}, "one shape"),
    ],
)
def test_bad_requests_get_one_line(prompt: list, to: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        generate(MODEL, TOKENIZERS, prompt, to, **options)
    assert "\n" not in str(error.value)
