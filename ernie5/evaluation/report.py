"""``report.html`` of a run: one file that shows a person what was trained, how well it does and what it makes.

Everything is embedded (pictures, clips, sound, charts), so the page opens anywhere without a network. It is made from
what lies in the run directory; a part whose file is missing is left out.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np

from ernie5.config import Config, load_config, num_params
from ernie5.evaluation.charts import expert_load_map, load_entropy, loss_curves
from ernie5.evaluation.cost_metrics import read_log
from ernie5.evaluation.requirements import Row, formatted, table
from ernie5.evaluation.samples import INDEX, IndexEntry, read_index
from ernie5.files import replacing

SIGNS = {">=": "≥", "<=": "≤", ">": "&gt;", "<": "&lt;"}
MEDIA_TYPES = {".png": "image/png", ".gif": "image/gif", ".wav": "audio/wav"}


@dataclass(frozen=True)
class Section:
    """A heading over the samples of one or several sections of ``samples/index.json``."""

    anchor: str
    title: str
    about: str
    sections: tuple[tuple[str, str], ...]  # (section of the index, its sub-heading)


SECTIONS = (
    Section(
        "images",
        "Images",
        "Drawn scale by scale, one bit vector a position. A tick means that the judge saw what was asked for.",
        (
            ("image_generation", "Digits drawn on request"),
            ("icons", "Icons: colour, thing and place in combinations that training never showed"),
            ("image_understanding", "Held-out handwriting, and what the model calls it"),
            ("icon_understanding", "Icons in unseen combinations, and what the model says"),
            ("image_reconstruction", "The vision tokenizer alone: real on the left, restored on the right"),
        ),
    ),
    Section(
        "video",
        "Video",
        "Frame by frame, each frame scale by scale.",
        (
            ("video_generation", "Clips made on request"),
            ("video_next_frame", "Continued clips: the real one on the left, the model's on the right"),
            ("video_understanding", "Held-out clips, and what the model says about them"),
        ),
    ),
    Section(
        "speech",
        "Speech",
        "The recordings in the data are synthetic voices (eSpeak NG); the figures rest on them.",
        (
            ("speech_generation", "Spoken on request; what the judge heard stands beside it"),
            ("speech_understanding", "Held-out voices, and what the model writes down"),
            ("audio_reconstruction", "The codec alone: real and restored"),
        ),
    ),
    Section("own", "Your data", "Held-out samples of your own tasks, continued by the model.", (("own", ""),)),
    Section("text", "Text", "Held-out prose in grey, the model's continuation in blue.", (("text", ""),)),
)


def write_report(run_dir: Path) -> Path:
    """Writes ``run_dir/report.html`` and returns its path.

    Raises ValueError when the folder holds no ``config.yaml`` or no ``metrics.json``.
    """
    for name, maker in (("config.yaml", "tools/pretrain.py"), ("metrics.json", "tools/evaluate.py")):
        if not (run_dir / name).is_file():
            raise ValueError(f"{run_dir / name}: not found; {maker} writes it, run that first")
    page = render(run_dir)
    with replacing(run_dir / "report.html") as temporary:
        temporary.write_text(page, encoding="utf-8")
    return run_dir / "report.html"


def render(run_dir: Path) -> str:
    """The page as one string of HTML."""
    config = load_config(run_dir / "config.yaml")
    values = _read_json(run_dir / "metrics.json")
    log, stages, entries = read_log(run_dir), _stages(run_dir), _entries(run_dir / "samples")
    rows = table(values)
    sections = [section for section in SECTIONS if any(e.section in dict(section.sections) for e in entries)]
    body = [
        _heading(config, values, rows, stages, sections),
        _metrics_table(rows, values),
        *[_sample_section(section, entries, run_dir / "samples") for section in sections],
        _training(log, _loads(run_dir), config.model.num_layers),
        _shape(config),
        _stage_table(stages),
        _going_on(run_dir),
    ]
    style = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>ERNIE 5.0 run: {escape(run_dir.name)}</title>\n<style>\n{style}</style></head>\n"
        f"<body><main>\n{''.join(body)}\n</main></body></html>\n"
    )


def _heading(
    config: Config,
    values: Mapping[str, float],
    rows: Sequence[Row],
    stages: Sequence[dict],
    sections: Sequence[Section],
) -> str:
    judged = [row for row in rows if row.verdict != "-"]
    met = sum(row.verdict == "pass" for row in judged)
    tiles = [(f"{met} of {len(judged)}", "requirements met")] if judged else []
    for key, label in (("params_total", "parameters"), ("params_active", "active for one token")):
        if key in values:
            tiles.append((_count(values[key]), label))
    if "train_tokens_per_second" in values:
        tiles.append((_count(values["train_tokens_per_second"]), "training tokens a second"))
    if stages:
        tiles.append((_duration(sum(stage["seconds"] for stage in stages)), "all stages together"))
    links = [("metrics", "Metrics"), *((s.anchor, s.title) for s in sections)]
    links += [("training", "Training"), ("model", "Model"), ("next", "Go on")]
    anchors = "".join(f'<a href="#{anchor}">{title}</a>' for anchor, title in links)
    cells = "".join(f'<div class="tile"><b>{escape(big)}</b><span>{escape(small)}</span></div>' for big, small in tiles)
    return (
        "<h1>One model, four modalities</h1>"
        '<p class="lead">A mixture-of-experts model after the ERNIE 5.0 report, trained from scratch on text, images, '
        "video and speech. Every sample below was made by its final checkpoint: answers are about held-out media, "
        "icons are asked for in held-out combinations of colour and place; words of other requests may be known.</p>"
        f"<nav>{anchors}</nav>"
        f'<div class="tiles">{cells}</div>'
    )


def _metrics_table(rows: Sequence[Row], values: Mapping[str, float]) -> str:
    head = (
        '<tr><th>What</th><th class="n">Value</th><th class="n">Required</th><th class="n">Ceiling</th>'
        '<th class="n">Baseline</th><th></th><th></th></tr>'
    )
    note = (
        "<b>Ceiling</b>: the same judge on real held-out samples, or what the tokenizer alone allows. "
        "<b>Baseline</b>: an answer that looks at nothing (the most frequent one, chance, the last frame, silence)."
    )
    through = [(key, value) for key, value in values.items() if key.endswith("_tokenizer")]
    if through:
        listed = ", ".join(f"{escape(key.removesuffix('_tokenizer'))} {formatted(value)}" for key, value in through)
        note += f" <b>Real samples through the tokenizer and back</b>, read by the same judges: {listed}."
    body = "".join(_metric_row(row) for row in rows)
    return (
        f'<h2 id="metrics">Measured on held-out items</h2><p class="note">{note}</p>'
        f'<div class="card"><table>{head}{body}</table></div>'
    )


def _metric_row(row: Row) -> str:
    required = "" if row.required is None else f"{SIGNS[row.sign]} {formatted(row.required)}"
    badge = "" if row.verdict == "-" else f'<span class="badge {row.verdict}">{row.verdict}</span>'
    bar = ""
    if row.key.endswith("_accuracy"):
        mark = "" if row.required is None else f'<u style="left:{100 * min(row.required, 1):.1f}%"></u>'
        bar = f'<div class="bar"><i style="width:{100 * min(row.value, 1):.1f}%"></i>{mark}</div>'
    cells = "".join(
        f'<td class="n">{cell}</td>' for cell in (required, formatted(row.ceiling), formatted(row.baseline))
    )
    return (
        f"<tr><td>{escape(row.meaning)}<small>{row.key}</small></td>"
        f'<td class="n"><b>{formatted(row.value)}</b></td>{cells}<td>{bar}</td><td>{badge}</td></tr>'
    )


def _sample_section(section: Section, entries: Sequence[IndexEntry], folder: Path) -> str:
    parts = [f'<h2 id="{section.anchor}">{section.title}</h2><p class="note">{section.about}</p>']
    for name, title in section.sections:
        members = [entry for entry in entries if entry.section == name]
        if not members:
            continue
        if title:
            parts.append(f"<h3>{title}{_tally(members)}</h3>")
        figures = "".join(_figure(entry, folder) for entry in members)
        inner = figures if members[0].kind == "text" else f'<div class="gallery">{figures}</div>'
        parts.append(f'<div class="card">{inner}</div>')
    return "".join(parts)


def _tally(members: Sequence[IndexEntry]) -> str:
    judged = [entry.correct for entry in members if entry.correct is not None]
    return f' <span class="note">({sum(judged)} of the {len(judged)} shown are right)</span>' if judged else ""


def _figure(entry: IndexEntry, folder: Path) -> str:
    if entry.kind == "text":
        return f'<div class="quote"><em>{escape(entry.prompt)}</em><strong>{escape(entry.text)}</strong></div>'
    path = folder / entry.file
    if not path.is_file():
        return ""
    source = f"data:{MEDIA_TYPES[path.suffix]};base64,{base64.b64encode(path.read_bytes()).decode()}"
    media = f'<audio controls preload="none" src="{source}"></audio>'
    if entry.kind != "audio":
        media = f'<img src="{source}" alt="{escape(entry.prompt, quote=True)}" loading="lazy">'
    paired = entry.section in ("image_reconstruction", "video_next_frame")
    shape = "wide" if paired else {"audio": "sound", "clip": "clip"}.get(entry.kind, "")
    mark = {True: '<span class="mark-ok">✓</span> ', False: '<span class="mark-no">✗</span> ', None: ""}[entry.correct]
    said = f'<span class="said">{mark}{escape(shortened(entry.answer))}</span>' if entry.answer else mark
    return f'<figure class="{shape}">{media}<figcaption>{escape(entry.prompt)}{said}</figcaption></figure>'


def shortened(answer: str, longest: int = 90) -> str:
    """An answer that rambles, cut where the page would suffer."""
    return answer if len(answer) <= longest else answer[:longest].rstrip() + "…"


def _training(log: Sequence[dict], loads: Mapping[str, np.ndarray], layers: int) -> str:
    curves = loss_curves(log)
    if not curves and not loads:
        return ""
    parts = ['<h2 id="training">Training</h2>']
    if curves:
        parts.append(f'<h3>Loss by modality</h3><div class="card">{curves}</div>')
    if loads:
        total = sum(loads.values())
        entropy, idle = load_entropy(total), int((total == 0).sum())
        parts.append(
            "<h3>Which experts held-out samples of each modality use</h3>"
            '<p class="note">The router never sees the modality; 1 is an expert\'s fair share. '
            f"Normalised entropy of the whole load by router: {', '.join(f'{value:.2f}' for value in entropy)}; "
            f"experts without a token: {idle} of {total.size}.</p>"
            f'<div class="card">{expert_load_map(loads, layers)}</div>'
        )
    return "".join(parts)


def _loads(run_dir: Path) -> dict[str, np.ndarray]:
    """Token counts [R, E] of held-out samples by modality; empty without the file."""
    path = run_dir / "expert_load.json"
    loads = _read_json(path) if path.is_file() else {}
    return {name: np.asarray(load) for name, load in loads.items()}


def _shape(config: Config) -> str:
    model, count = config.model, num_params(config.model)
    facts = [
        ("preset", model.preset or "none"),
        ("layers, every one a mixture of experts", str(model.num_layers)),
        ("hidden size", str(model.hidden_size)),
        ("attention", f"{model.num_heads} heads, {model.num_kv_heads} of keys and values, {model.head_dim} wide"),
        ("experts of a layer", f"{model.num_experts} routed, {model.experts_per_token} a token"),
        ("expert parameters active", f"{100 * count.expert_active_fraction:.1f} %"),
        ("parameters", f"{count.total:,} in all, {count.active:,} active for one token"),
        ("context", f"{model.max_sequence_length} positions"),
        ("vocabulary", f"{model.vocab_size} text tokens (byte pairs of UTF-16)"),
        ("image code", f"{config.tokenizers.vision.scales} grids, {model.vision_bits} bits a position"),
        ("audio code", f"{model.audio_levels} levels of {model.audio_codebook_size} at 12.5 frames a second"),
    ]
    parts = [(name.replace("_", " "), size) for name, size in sorted(count.parts.items(), key=lambda p: -p[1]) if size]
    left = "".join(f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in facts)
    right = "".join(
        f'<tr><td>{escape(name)}</td><td class="n">{size:,}</td><td><div class="bar">'
        f'<i style="width:{100 * size / parts[0][1]:.1f}%"></i></div></td></tr>'
        for name, size in parts
    )
    return (
        f'<h2 id="model">The model</h2><div class="card"><table>{left}</table></div>'
        f'<h3>Where its parameters are</h3><div class="card"><table>{right}</table></div>'
    )


def _stage_table(stages: Sequence[dict]) -> str:
    if not stages:
        return ""
    longest = max(stage["seconds"] for stage in stages) or 1.0
    rows = "".join(
        f'<tr><td>{escape(stage["name"])}</td><td class="n">{_duration(stage["seconds"])}</td><td><div class="bar">'
        f'<i style="width:{100 * stage["seconds"] / longest:.1f}%"></i></div></td></tr>'
        for stage in stages
    )
    return f'<h2 id="stages">Time of each stage</h2><div class="card"><table>{rows}</table></div>'


def _going_on(run_dir: Path) -> str:
    commands = (
        (
            "Ask for something",
            f'python tools/generate.py --checkpoint {run_dir} --prompt "a handwritten four" --to image --out 4.png',
        ),
        ("Measure again on other held-out items", f"python tools/evaluate.py {run_dir} --seed 1"),
        ("Train longer", f"python tools/pretrain.py {run_dir}/config.yaml --resume trainer.max_steps=20000"),
    )
    lines = "".join(f"<h3>{escape(title)}</h3><pre>{escape(command)}</pre>" for title, command in commands)
    return f'<h2 id="next">How to go on</h2>{lines}<p class="note">Your own data: see README.md.</p>'


def _stages(run_dir: Path) -> list[dict]:
    """Finished stages of the quickstart in order, each with ``name`` and ``seconds``; empty without the file."""
    path = run_dir / "stages.json"
    stages = _read_json(path).get("stages", []) if path.is_file() else []
    return [stage for stage in stages if stage.get("seconds") is not None]


def _entries(folder: Path) -> list[IndexEntry]:
    try:
        return read_index(folder)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{folder / INDEX}: unreadable ({error}); let tools/evaluate.py write it anew") from None


def _read_json(path: Path) -> dict:
    """The object in a file. Raises ValueError that names the file when it is cut short or holds something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: unreadable ({error}); delete it and make it anew") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: found {type(value).__name__}, expected a JSON object; delete it and make it anew")
    return value


def _count(value: float) -> str:
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "k")):
        if value >= size:
            return f"{value / (1e3 if unit == 'k' else size):.3g} {unit}"
    return f"{value:,.0f}"


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} min"
