"""Own data: every kind of part is read, every kind of bad line is named with its number, none is lost silently."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest

from ernie5.config.schema import AudioTokenizerConfig, Config, VisionTokenizerConfig
from ernie5.data import embedded, media
from ernie5.data.embedded import raw_samples
from ernie5.data.manifest import ManifestSource
from ernie5.sequence.parts import Audio, Image, Sample, Speaker, Text, Video


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "media").mkdir()
    media.write_image(tmp_path / "media" / "a.png", rng.integers(0, 256, (48, 64, 3), np.uint8))
    media.write_video(tmp_path / "media" / "short.gif", rng.integers(0, 256, (2, 32, 32, 3), np.uint8))
    media.write_video(tmp_path / "media" / "long.gif", rng.integers(0, 256, (9, 32, 32, 3), np.uint8))
    media.write_audio(tmp_path / "media" / "a.wav", rng.uniform(-0.1, 0.1, 22050).astype(np.float32), 22050)
    (tmp_path / "media" / "broken.png").write_bytes(b"no picture")
    return tmp_path


def read(folder, *lines, on_bad_line="error") -> ManifestSource:
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (folder / "manifest.jsonl").write_text(text + "\n", encoding="utf-8")
    return ManifestSource(folder, VisionTokenizerConfig(), AudioTokenizerConfig(), on_bad_line)


GOOD = [{"text": "what is this?", "loss": False}, {"image": "media/a.png"}, {"text": "a cat"}]


def test_every_kind_of_part_is_read(folder):
    source = read(
        folder,
        GOOD,
        "",
        {"task": "draw", "parts": [{"text": ["a cat", "one cat"]}, {"image": "media/a.png", "generate": True}]},
        {"task": "film", "split": "heldout", "parts": [{"video": "media/long.gif"}, {"video": "media/short.gif"}]},
        {"task": "say", "speaker_name": "ada", "parts": [{"speaker": "media/a.wav"}, {"audio": "media/a.wav"}]},
    )
    plain, draw, say = source.samples("train")
    (film,) = source.samples("heldout")
    assert [type(part) for part in plain.parts] == [Text, Image, Text]
    assert plain.task == folder.name and not plain.parts[0].loss and plain.parts[2].loss
    assert plain.parts[1].pixels.shape == (32, 32, 3) and not plain.parts[1].generate
    assert draw.parts[0].text == ("a cat", "one cat") and draw.parts[1].generate
    assert [type(part) for part in film.parts] == [Video, Video]
    assert all(part.frames.shape == (5, 32, 32, 3) for part in film.parts)
    np.testing.assert_array_equal(film.parts[1].frames[1], film.parts[1].frames[4])  # the last frame is repeated
    assert isinstance(say.parts[0], Speaker) and isinstance(say.parts[1], Audio)
    assert say.parts[1].wave.shape == (16000,) and say.parts[1].sample_rate == 16000
    assert say.meta == {"speaker": "ada", "source": f"{folder / 'manifest.jsonl'}:5"}
    assert set(source.tasks) == {folder.name, "draw", "film", "say"}


BAD_LINES = {
    "not JSON": ('[{"text": "a"', "not JSON"),
    "no list": ('"a cat"', "expected a list of parts"),
    "no parts": ([], "non-empty list"),
    "unknown sample key": ({"parts": GOOD, "label": 3}, "unknown key 'label'"),
    "bad split": ({"parts": GOOD, "split": "test"}, "split is 'test'"),
    "unknown part": ([{"picture": "media/a.png"}], "part 1 .*expected one of text, image"),
    "two kinds": ([{"text": "a", "image": "media/a.png"}], "part 1"),
    "part is no object": (["a cat"], "part 1"),
    "unknown part key": ([{"text": "a"}, {"image": "media/a.png", "genrate": True}], "part 2 .*'genrate'"),
    "flag is no boolean": ([{"image": "media/a.png", "generate": "yes"}], "true or false"),
    "path is no string": ([{"image": 3}], "expected a path"),
    "empty text": ([{"text": ""}], "non-empty string"),
    "no wording": ([{"text": []}], "non-empty string"),
    "missing file": ([{"image": "media/gone.png"}], "gone.png: no such image"),
    "corrupt file": ([{"image": "media/broken.png"}], "broken.png: not a readable image"),
    "wrong kind of file": ([{"audio": "media/a.png"}], "a.png: not a readable recording"),
}


@pytest.mark.parametrize(("line", "message"), BAD_LINES.values(), ids=BAD_LINES.keys())
def test_a_bad_line_is_named_with_its_number(folder, line, message):
    source = read(folder, GOOD, line)
    with pytest.raises(ValueError, match=rf"manifest.jsonl:2: .*{message}") as caught:
        source.samples("train")
    assert "\n" not in str(caught.value)


def test_skipped_lines_are_reported_and_counted(folder, capsys):
    source = read(folder, *[line for line, _ in BAD_LINES.values()], GOOD, on_bad_line="skip")
    assert len(source.samples("train")) == 1 and source.skipped == len(BAD_LINES)
    source.samples("heldout")  # reads, and reports, no second time
    report = capsys.readouterr().err
    assert report.count("skipped ") == len(BAD_LINES)
    assert f"{len(BAD_LINES)} bad lines skipped, 1 kept" in report


def test_a_missing_manifest_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"manifest.jsonl: no such manifest"):
        ManifestSource(tmp_path, VisionTokenizerConfig(), AudioTokenizerConfig()).samples("train")


def test_manifests_take_the_place_of_the_embedded_data(folder):
    read(folder, GOOD, GOOD)
    config = Config()
    config.data.manifests = [str(folder)]
    assert len(raw_samples(config, "train")) == 2 and raw_samples(config, "heldout") == []
    read(folder, {"split": "heldout", "parts": GOOD})
    with pytest.raises(ValueError, match="no training sample"):
        raw_samples(config, "train")


def test_what_manifests_lack_a_tokenizer_learns_from_the_embedded_data(folder, monkeypatch, capsys):
    spare = [
        Sample([Text("a dot"), Image(np.zeros((32, 32, 3), np.uint8))]),
        Sample([Audio(np.zeros(1600, np.float32), 16000)], meta={"voice": "eve", "text": "one"}),
    ]
    stand_in = SimpleNamespace(feeds={"text", "vision", "audio"}, samples=lambda split: spare)
    monkeypatch.setattr(embedded, "_embedded", lambda config: [stand_in])
    config = Config()
    config.data.manifests = [str(folder)]
    read(folder, [{"text": "a film"}, {"video": "media/long.gif"}])
    pictures, captions, clips = embedded.tokenizer_material(config, "vision")
    assert captions == ["a dot"] and len(pictures) == len(clips) == 1
    assert embedded.tokenizer_material(config, "audio")[1:] == (["one"], ["eve"])
    said = capsys.readouterr().out
    assert "hold no picture: the vision" in said and "hold no recording: the audio" in said
    read(folder, GOOD, [{"audio": "media/a.wav"}, {"text": "own"}])
    assert embedded.tokenizer_material(config, "vision")[1] == ["a cat"]
    assert embedded.tokenizer_material(config, "audio")[1] == ["own"]
    assert embedded.tokenizer_material(config, "text") == ["what is this?", "a cat", "own"]
    assert capsys.readouterr().out == ""
