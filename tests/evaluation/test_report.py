"""The report holds what a run directory holds, opens without a network, and says what is missing."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from ernie5.config import Config, dump_config, model_preset
from ernie5.evaluation.report import write_report
from ernie5.evaluation.samples import Exhibit, read_index, write_samples

METRICS = {
    "params_total": 12_000_000,
    "text_bits_per_char": 2.5,
    "text_bits_per_char_xz": 2.9,
    "image_generation_accuracy": 0.8,
    "image_generation_accuracy_ceiling": 0.98,
    "image_generation_accuracy_baseline": 0.1,
}


def exhibits():
    picture = np.full((8, 8, 3), 90, np.uint8)
    return [
        Exhibit("image_generation", "image", picture, "a handwritten <seven>", "seven", True),
        Exhibit("image_generation", "image", picture + 50, "a handwritten one", "two", False),
        Exhibit("video_generation", "clip", np.stack([picture, picture + 90]), "a star moves up", "moves up", True),
        Exhibit("speech_generation", "audio", np.zeros(1600, np.float32), "say: seven", "seven", True),
        Exhibit("text", "text", " of the object & its class", "The name"),
    ]


@pytest.fixture
def run_dir(tmp_path):
    dump_config(Config(model=model_preset("nano")), tmp_path / "config.yaml")
    (tmp_path / "metrics.json").write_text(json.dumps(METRICS))
    rows = [{"step": s, "loss/text": 7 / s, "loss/image": 0.7 / s, "tokens_per_second": 3000} for s in range(1, 50)]
    (tmp_path / "train_log.jsonl").write_text("\n".join(map(json.dumps, rows)) + '\n{"step": 50, "lo')
    load = np.random.default_rng(0).integers(1, 50, (7, 32)).tolist()
    (tmp_path / "expert_load.json").write_text(json.dumps({"text": load, "image": load}))
    stages = [{"name": "pretrain", "key": "k", "state": "finished", "seconds": 480.0}]
    (tmp_path / "stages.json").write_text(json.dumps({"format_version": 1, "stages": stages}))
    write_samples(tmp_path / "samples", exhibits())
    return tmp_path


def test_report_shows_figures_samples_curves_and_times(run_dir):
    page = write_report(run_dir).read_text()
    assert "1 of 2" in page and "requirements met" in page
    assert page.count('class="badge pass"') == 1 and page.count('class="badge below"') == 1
    assert page.count('<img src="data:image/png;base64,') == 2
    assert page.count("data:image/gif;base64,") == 1
    assert page.count("data:audio/wav;base64,") == 1
    assert page.count('class="chart"') == 2
    assert "8.0 min" in page
    assert "a handwritten &lt;seven&gt;" in page and "of the object &amp; its class" in page


def test_report_needs_no_network(run_dir):
    page = write_report(run_dir).read_text()
    links = re.findall(r'(?:src|href|xlink:href)="([^"#][^"]*)"', page)
    assert all(link.startswith("data:") for link in links)
    assert "@import" not in page and "<script" not in page


def test_report_leaves_out_what_is_not_there(run_dir):
    for name in ("train_log.jsonl", "expert_load.json", "stages.json"):
        (run_dir / name).unlink()
    page = write_report(run_dir).read_text()
    assert "Loss by modality" not in page and "Time of each stage" not in page
    assert "Digits drawn on request" in page


@pytest.mark.parametrize("name", ["config.yaml", "metrics.json"])
def test_report_names_the_missing_file(run_dir, name):
    (run_dir / name).unlink()
    with pytest.raises(ValueError, match=re.escape(name)):
        write_report(run_dir)
    assert not (run_dir / "report.html").exists()


@pytest.mark.parametrize("name", ["metrics.json", "expert_load.json", "stages.json", "samples/index.json"])
@pytest.mark.parametrize("content", ['{"a": 1', "3"])
def test_report_names_the_corrupt_file(run_dir, name, content):
    (run_dir / name).write_text(content)
    with pytest.raises(ValueError, match=re.escape(str(run_dir / name))):
        write_report(run_dir)


def test_samples_are_files_a_person_can_open_and_sections_are_replaced(run_dir):
    import soundfile
    from PIL import Image

    folder = run_dir / "samples"
    entries = {entry.file: entry for entry in read_index(folder)}
    files = [file for file in entries if file]
    assert {file.rsplit(".", 1)[1] for file in files} == {"png", "gif", "wav"}
    assert Image.open(folder / next(f for f in files if f.endswith("png"))).size == (32, 32)
    assert Image.open(folder / next(f for f in files if f.endswith("gif"))).n_frames == 2
    assert soundfile.info(folder / next(f for f in files if f.endswith("wav"))).samplerate == 16000
    assert len(list(folder.glob("video_generation/*.mp4"))) == 1
    assert "of the object" in (folder / "text.txt").read_text()

    write_samples(folder, [Exhibit("text", "text", "new", "Old")])
    assert [entry.text for entry in read_index(folder) if entry.section == "text"] == ["new"]
    assert len(read_index(folder)) == len(entries)
