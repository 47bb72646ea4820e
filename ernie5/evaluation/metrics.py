"""The metrics of a run: which there are, and the call that measures them all."""

from __future__ import annotations

from collections.abc import Sequence

from tqdm import tqdm

from ernie5.evaluation import (
    audio_metrics,
    cost_metrics,
    routing_metrics,
    showcase,
    text_metrics,
    video_metrics,
    vision_metrics,
)
from ernie5.evaluation.measure import Measurement, Metric, Scope

REGISTRY: tuple[Metric, ...] = (
    Metric(
        ("params_total", "params_active", "active_fraction", "train_tokens_per_second"),
        (),
        cost_metrics.cost,
        "counting parameters",
    ),
    Metric(("expert_load_entropy",), (), routing_metrics.expert_load, "routing held-out samples"),
    Metric(
        ("text_bits_per_char", "text_bits_per_char_xz"),
        ("text",),
        text_metrics.bits_per_char,
        "scoring held-out text",
    ),
    Metric((), ("text",), text_metrics.continuations, "continuing held-out text"),
    Metric(
        ("image_understanding_accuracy",), ("digit_und",), vision_metrics.image_understanding, "reading held-out digits"
    ),
    Metric(("icon_understanding_accuracy",), ("icon_und",), vision_metrics.icon_understanding, "reading icons"),
    Metric(("image_generation_accuracy",), ("digit_gen",), vision_metrics.image_generation, "drawing digits"),
    Metric(
        ("caption_attribute_accuracy",), ("icon_gen",), vision_metrics.caption_attributes, "drawing unseen combinations"
    ),
    Metric(
        ("speech_understanding_accuracy",),
        ("speech_und",),
        audio_metrics.speech_understanding,
        "listening to held-out voices",
    ),
    Metric(
        ("speech_generation_accuracy", "speech_generation_ceiling"),
        ("speech_gen",),
        audio_metrics.speech_generation,
        "speaking words",
    ),
    Metric(("video_generation_accuracy",), ("clip_gen",), video_metrics.video_generation, "making clips"),
    Metric(
        ("video_next_frame_psnr", "video_next_frames_psnr", "video_copy_last_psnr"),
        ("clip_gen",),
        video_metrics.next_frame,
        "continuing clips",
    ),
    Metric(("video_understanding_accuracy",), ("clip_und",), video_metrics.video_understanding, "watching clips"),
    Metric(
        ("image_reconstruction_psnr",),
        ("digit_gen", "icon_gen"),
        vision_metrics.image_reconstruction,
        "restoring images",
    ),
    Metric(
        ("audio_reconstruction_snr", "audio_reconstruction_spectral_snr"),
        ("speech_gen",),
        audio_metrics.audio_reconstruction,
        "restoring speech",
    ),
)


def chosen_metrics(only: Sequence[str], tasks: Sequence[str] | None) -> list[Metric]:
    """The metrics that give the keys in ``only`` (all when empty) and whose tasks the run's data hold.

    ``tasks`` None: whatever the data hold. Raises ValueError for a key that no metric gives, and for a key asked for by
    name whose data are missing.
    """
    known = {key: metric for metric in REGISTRY for key in metric.keys}
    unknown = [key for key in only if key not in known]
    if unknown:
        raise ValueError(f"unknown metric {unknown[0]!r}; known: {', '.join(known)}")
    wanted = [metric for metric in REGISTRY if not only or any(key in only for key in metric.keys)]
    if tasks is None:
        return wanted
    missing = [metric for metric in wanted if not set(metric.tasks) <= set(tasks)]
    if only and missing:
        lacking = sorted(set(missing[0].tasks) - set(tasks))
        raise ValueError(
            f"metric {missing[0].keys[0]!r} needs held-out samples of {', '.join(lacking)} (embedded data); "
            "the data have none"
        )
    return [metric for metric in wanted if metric not in missing]


def measure(scope: Scope, only: Sequence[str] = (), progress: bool = True) -> Measurement:
    """Measures the chosen metrics one after another; figures flat by key, exhibits in the same order.

    Metrics of a task know what the embedded data say of its samples. Own data, whatever their tasks are called, are
    shown and not judged.
    """
    total = Measurement({})
    own = bool(scope.config.data.manifests)
    present = [] if own else [task for task, samples in scope.samples.items() if len(samples)]
    bar = tqdm(chosen_metrics(only, present), desc="evaluate", unit="metric", disable=not progress)
    for metric in bar:
        bar.set_description(f"evaluate: {metric.doing}")
        result = metric.measure(scope)
        total.values.update(result.values)
        total.exhibits += result.exhibits
    if not only:
        judged = frozenset() if own else frozenset(task for metric in REGISTRY for task in metric.tasks)
        total.exhibits += showcase.own_tasks(scope, judged).exhibits
    return total
