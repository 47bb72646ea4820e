"""Coded samples that the context cannot hold, found before training and named by the line they come from."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from ernie5.config.schema import Config
from ernie5.data.packed import is_prose
from ernie5.sequence.layout import check_length, encode_text, part_length
from ernie5.sequence.parts import CodedPart, Sample, Text
from ernie5.sequence.spec import LayoutSpec
from ernie5.tokenizers.text import TextTokenizer


def fitting(samples: Sequence[Sample], text_tokenizer: TextTokenizer, config: Config) -> list[Sample]:
    """The samples that the layout of ``config`` takes; prose always does, as it is cut.

    Texts count in their longest wording and without BPE-dropout. Another sample raises ValueError, or is reported and
    counted under ``data.on_bad_line: skip``; ``meta["source"]`` says where it stands.
    """
    spec = LayoutSpec.from_config(config)
    kept = []
    for sample in samples:
        what = f"a sample of task '{sample.task or 'unnamed'}'"
        try:
            if not is_prose(sample):
                length = 2 + sum(_longest(part, text_tokenizer, spec) for part in sample.parts)
                check_length(length, spec, what)
        except ValueError as error:
            message = f"{sample.meta['source']}: {error}" if "source" in sample.meta else str(error)
            if config.data.on_bad_line == "error":
                raise ValueError(f"{message}, or set data.on_bad_line=skip") from None
            print(f"skipped {message}", file=sys.stderr)
            continue
        kept.append(sample)
    if len(kept) < len(samples):
        print(f"{len(samples) - len(kept)} samples do not fit and were skipped, {len(kept)} kept", file=sys.stderr)
    if samples and not kept:
        raise ValueError(f"no sample fits the context of {spec.length} positions; raise model.max_sequence_length")
    return kept


def _longest(part: CodedPart, text_tokenizer: TextTokenizer, spec: LayoutSpec) -> int:
    wordings = [Text(text) for text in part.text] if isinstance(part, Text) and isinstance(part.text, tuple) else [part]
    return max(part_length(laid, spec) for laid in encode_text(wordings, text_tokenizer, spec))
