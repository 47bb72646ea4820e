"""What every figure must reach, and the table that shows value, bound, ceiling and baseline side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

CEILING, BASELINE = "_ceiling", "_baseline"


@dataclass(frozen=True)
class Requirement:
    """What a figure must reach: ``bound(all figures)``, from above or from below."""

    meaning: str
    bound: Callable[[Mapping[str, float]], float] | None = None  # None: the figure is stated, not judged
    higher_is_better: bool = True
    strictly: bool = False  # meeting the bound exactly is not enough

    def verdict(self, key: str, values: Mapping[str, float]) -> str:
        """``pass``, ``below`` or ``-`` where nothing is required or the bound cannot be computed."""
        bound = self.bound_for(values)
        if bound is None or key not in values:
            return "-"
        margin = values[key] - bound if self.higher_is_better else bound - values[key]
        met = margin > 0 if self.strictly else margin >= 0
        return "pass" if met else "below"

    @property
    def sign(self) -> str:
        return (">" if self.higher_is_better else "<") + ("" if self.strictly else "=")

    def bound_for(self, values: Mapping[str, float]) -> float | None:
        if self.bound is None:
            return None
        try:
            return self.bound(values)
        except KeyError:
            return None


REQUIREMENTS: dict[str, Requirement] = {
    "text_bits_per_char": Requirement(
        "held-out English, bits a character (xz -9 on the same bytes is the bound)",
        lambda values: values["text_bits_per_char_xz"],
        higher_is_better=False,
        strictly=True,
    ),
    "image_understanding_accuracy": Requirement("names the held-out handwritten digit", lambda values: 0.95),
    "image_generation_accuracy": Requirement("a judge reads the digit drawn on request", lambda values: 0.90),
    "caption_attribute_accuracy": Requirement(
        "colour and place of icons drawn on request, unseen combinations", lambda values: 0.90
    ),
    "speech_understanding_accuracy": Requirement(
        "writes down spoken words and numbers, held-out voices", lambda values: 0.95
    ),
    "speech_generation_accuracy": Requirement(
        "a judge hears the word spoken on request (0.8 of its ceiling)",
        lambda values: 0.8 * values["speech_generation_ceiling"],
    ),
    "video_generation_accuracy": Requirement("direction of the motion made on request", lambda values: 0.90),
    "video_next_frame_psnr": Requirement(
        "predicted next frame, dB (copying the last frame is the bound)",
        lambda values: values["video_copy_last_psnr"],
        strictly=True,
    ),
    "video_next_frames_psnr": Requirement("the same over all frames predicted at once, dB"),
    "video_understanding_accuracy": Requirement("names the direction of motion in held-out clips"),
    "icon_understanding_accuracy": Requirement("names colour and place of icons in unseen combinations"),
    "image_reconstruction_psnr": Requirement("vision tokenizer alone, dB"),
    "audio_reconstruction_snr": Requirement("audio codec alone, waveform, dB (it makes up phases)"),
    "audio_reconstruction_spectral_snr": Requirement("audio codec alone, mel spectrum, dB"),
    "active_fraction": Requirement(
        "share of expert parameters one token uses", lambda values: 0.10, False, strictly=True
    ),
    "expert_load_entropy": Requirement("evenness of the experts' load on held-out samples, 1 = even"),
    "params_total": Requirement("parameters"),
    "params_active": Requirement("parameters one token uses"),
    "train_tokens_per_second": Requirement("training speed"),
}


@dataclass
class Row:
    """A line of the printed table and of the report."""

    key: str
    meaning: str
    value: float
    required: float | None
    sign: str  # how the figure must relate to the bound
    ceiling: float | None
    baseline: float | None
    verdict: str


def table(values: Mapping[str, float]) -> list[Row]:
    """Rows for the figures that were measured, in the order of ``REQUIREMENTS``."""
    return [
        Row(
            key,
            need.meaning,
            values[key],
            need.bound_for(values),
            need.sign,
            values.get(key + CEILING),
            values.get(key + BASELINE),
            need.verdict(key, values),
        )
        for key, need in REQUIREMENTS.items()
        if key in values
    ]


def formatted_table(values: Mapping[str, float]) -> str:
    """The table as aligned text."""
    lines = [("metric", "value", "required", "ceiling", "baseline", "")]
    for row in table(values):
        required = "" if row.required is None else f"{row.sign} {formatted(row.required)}"
        cells = (formatted(row.value), required, formatted(row.ceiling), formatted(row.baseline))
        lines.append((row.key, *cells, "" if row.verdict == "-" else row.verdict))
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i in (0, 5) else cell.rjust(width) for i, (cell, width) in enumerate(pair)
        ).rstrip()
        for pair in (list(zip(line, widths, strict=True)) for line in lines)
    )


def formatted(value: float | None) -> str:
    """A figure for people: counts whole, shares with three digits, decibels with two."""
    if value is None:
        return ""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.2f}" if abs(value) >= 10 else f"{value:.3f}"
