"""One prompt of any mix of modalities in, one modality out, from a trained run.

    python tools/generate.py --checkpoint runs/quickstart --prompt "a handwritten seven" --to image --out seven.png
    python tools/generate.py --checkpoint runs/quickstart --image seven.png --prompt "what is this?"

The media given come before the text of the prompt, a speaker after it. Text is printed unless --out names a file.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import ernie5  # noqa: F401  (sets the environment before paddle loads)

SUFFIXES = {"text": (".txt",), "image": (".png",), "video": (".gif", ".mp4"), "audio": (".wav",)}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=Path("runs/quickstart"), metavar="RUN", help="run directory")
    parser.add_argument("--prompt", default="", help="text")
    parser.add_argument("--image", type=Path, metavar="FILE", help="a picture to understand")
    parser.add_argument("--video", type=Path, metavar="FILE", help="a clip to understand")
    parser.add_argument("--audio", type=Path, metavar="FILE", help="a recording to understand")
    parser.add_argument("--speaker", type=Path, metavar="FILE", help="a recording whose voice the audio should have")
    parser.add_argument("--context", type=Path, metavar="FILE", help="a clip that the generated video continues")
    parser.add_argument("--to", default="text", choices=tuple(SUFFIXES), help="what to generate (text)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where to write it; the suffix must suit the kind")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="most text tokens or 80 ms audio frames")
    parser.add_argument("--num-frames", type=int, metavar="N", help="frames of a generated video")
    parser.add_argument(
        "--temperature",
        type=float,
        metavar="T",
        help="0 takes the likeliest (default: 0 for answers about media, 0.7 for other text and audio, else 0.3)",
    )
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="likeliest classes kept, 0 = all (0)")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="share of probability kept (1.0)")
    parser.add_argument("--guidance", type=float, metavar="G", help="classifier-free guidance (2 for pictures, else 1)")
    parser.add_argument("--seed", type=int, default=0, metavar="S")
    return parser.parse_args()


def check_options(options: argparse.Namespace) -> None:
    """Refuses an output that cannot be written and options that do not go together before any work is done."""
    suffixes = " or ".join(SUFFIXES[options.to])
    if options.out is None:
        if options.to != "text":
            raise ValueError(f"--out is missing; name a {suffixes} file for the {options.to}")
    elif options.out.suffix.lower() not in SUFFIXES[options.to]:
        raise ValueError(f"--out {options.out}: a generated {options.to} is written as {suffixes}")
    elif not options.out.parent.is_dir() or options.out.is_dir():
        raise ValueError(f"--out {options.out}: expected a file in a folder that exists; make the folder first")
    elif not os.access(options.out.parent, os.W_OK):
        raise ValueError(f"--out {options.out}: the folder cannot be written to; choose another")
    if options.num_frames is not None and options.to != "video":
        raise ValueError(f"--num-frames: only a video has frames, this generates {options.to}; leave it out")
    if options.guidance is not None and not 0 <= options.guidance < float("inf"):
        raise ValueError(f"--guidance: found {options.guidance}, expected a number from 0 upwards (1 is none)")
    if not options.prompt.strip() and not (options.image or options.video or options.audio or options.context):
        raise ValueError("the prompt is empty; give --prompt, --image, --video, --audio or --context")


def read_prompt(options: argparse.Namespace, config: Any) -> list:
    """Parts in the order of the training samples: media, text, speaker."""
    from ernie5.data.media import read_audio, read_image, read_video
    from ernie5.sequence.parts import Audio, Image, Speaker, Text, Video

    side, rate = config.tokenizers.vision.image_size, config.tokenizers.audio.sample_rate
    parts = []
    if options.image:
        parts.append(Image(read_image(options.image, side)))
    if options.video:
        parts.append(Video(read_video(options.video, side)))
    if options.audio:
        parts.append(Audio(read_audio(options.audio, rate), rate))
    if options.prompt.strip():
        parts.append(Text(options.prompt))
    if options.speaker:
        parts.append(Speaker(read_audio(options.speaker, rate), rate))
    return parts


def run(options: argparse.Namespace) -> Any:
    """Reads everything that can be wrong first, loads the model last, generates."""
    from ernie5.generation import generate, load_run
    from ernie5.generation.load import run_config
    from ernie5.sequence.spec import LayoutSpec

    check_options(options)
    config = run_config(options.checkpoint)
    parts, context = read_prompt(options, config), None
    if options.context:
        from ernie5.data.media import read_video

        context = read_video(options.context, config.tokenizers.vision.image_size)
    model, tokenizers, _ = load_run(options.checkpoint)
    guidance = options.guidance
    if guidance is None:
        guidance = 2.0 if options.to in ("image", "video") else 1.0
    temperature = options.temperature
    if temperature is None:
        answer = options.to == "text" and len(parts) > bool(options.prompt.strip())
        temperature = 0.0 if answer else 0.7 if options.to in ("text", "audio") else 0.3
    return generate(
        model,
        tokenizers,
        parts,
        options.to,
        max_new_tokens=options.max_new_tokens,
        num_frames=options.num_frames,
        temperature=temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        guidance=guidance,
        seed=options.seed,
        context=context,
        spec=LayoutSpec.from_config(config),
    )[0]


def write(result: Any, options: argparse.Namespace) -> None:
    from ernie5.data.media import write_audio, write_image, write_video
    from ernie5.files import replacing

    if options.out is None:
        print(result)
    elif options.to == "text":
        with replacing(options.out) as temporary:
            temporary.write_text(result + "\n", encoding="utf-8")
    else:
        {"image": write_image, "video": write_video, "audio": write_audio}[options.to](options.out, result)


def main() -> int:
    options = parse_arguments()
    try:
        write(run(options), options)
    except (ValueError, OSError) as error:
        print(f"generate: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
