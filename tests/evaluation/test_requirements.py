"""Bounds: a figure passes on the right side of its bound, and only there."""

from __future__ import annotations

import pytest

from ernie5.evaluation.metrics import REGISTRY, chosen_metrics
from ernie5.evaluation.requirements import REQUIREMENTS, formatted_table, table


@pytest.mark.parametrize(
    ("key", "values", "verdict"),
    [
        ("text_bits_per_char", {"text_bits_per_char": 2.5, "text_bits_per_char_xz": 2.9}, "pass"),
        ("text_bits_per_char", {"text_bits_per_char": 2.9, "text_bits_per_char_xz": 2.9}, "below"),
        ("image_generation_accuracy", {"image_generation_accuracy": 0.90}, "pass"),
        ("image_generation_accuracy", {"image_generation_accuracy": 0.89}, "below"),
        ("speech_generation_accuracy", {"speech_generation_accuracy": 0.75, "speech_generation_ceiling": 0.9}, "pass"),
        ("speech_generation_accuracy", {"speech_generation_accuracy": 0.70, "speech_generation_ceiling": 0.9}, "below"),
        ("speech_generation_accuracy", {"speech_generation_accuracy": 0.70}, "-"),
        ("video_next_frame_psnr", {"video_next_frame_psnr": 15.0, "video_copy_last_psnr": 16.0}, "below"),
        ("video_next_frame_psnr", {"video_next_frame_psnr": 16.0, "video_copy_last_psnr": 16.0}, "below"),
        ("video_next_frame_psnr", {"video_next_frame_psnr": 16.1, "video_copy_last_psnr": 16.0}, "pass"),
        ("image_reconstruction_psnr", {"image_reconstruction_psnr": 1.0}, "-"),
    ],
)
def test_verdict(key, values, verdict):
    assert {row.key: row.verdict for row in table(values)}[key] == verdict


def test_every_required_figure_is_given_by_one_metric():
    given = [key for metric in REGISTRY for key in metric.keys]
    assert len(given) == len(set(given))
    assert set(REQUIREMENTS) <= set(given)


def test_table_prints_value_bound_ceiling_and_baseline():
    values = {"image_generation_accuracy": 0.91, "image_generation_accuracy_ceiling": 0.985, "unknown": 3.0}
    line = formatted_table(values).splitlines()[1].split()
    assert line == ["image_generation_accuracy", "0.910", ">=", "0.900", "0.985", "pass"]


def test_metrics_are_chosen_by_key_and_by_data():
    assert [metric.keys for metric in chosen_metrics(["video_copy_last_psnr"], ["clip_gen"])] == [
        ("video_next_frame_psnr", "video_next_frames_psnr", "video_copy_last_psnr")
    ]
    assert all(not metric.tasks for metric in chosen_metrics([], []))
    with pytest.raises(ValueError, match="unknown metric 'beauty'; known: params_total"):
        chosen_metrics(["beauty"], [])
    with pytest.raises(ValueError, match="needs held-out samples of clip_gen"):
        chosen_metrics(["video_generation_accuracy"], ["text"])


def test_a_missing_run_and_a_misspelt_metric_are_told_before_any_work(tmp_path):
    from ernie5.evaluation.run import evaluate

    with pytest.raises(ValueError, match="no such run"):
        evaluate(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="unknown metric 'beauty'"):
        evaluate(tmp_path / "nowhere", only=["beauty"])
    assert not list(tmp_path.iterdir())
