"""Text: bits a character on held-out prose against xz on the same bytes, and continuations to read.

S positions of the context, n tokens of a document.
"""

from __future__ import annotations

import lzma
import math

import numpy as np
import paddle
from tqdm import tqdm

from ernie5.evaluation.generating import first_fit, generate_all
from ernie5.evaluation.measure import Measurement, Scope, target_of
from ernie5.evaluation.samples import Exhibit
from ernie5.sequence.document import Document, Writer
from ernie5.sequence.packing import collate, pack
from ernie5.sequence.parts import Text
from ernie5.sequence.spec import LayoutSpec
from ernie5.sequence.vocabulary import IGNORE, Special

OVERLAP = 0.5  # share of the context that a later window of a long text repeats, so that no token is read cold
ROWS = 8  # rows of one forward pass
SEPARATOR = "\n\n"  # between documents in what xz compresses; the model pays for EOS instead
CONTINUED, PROMPT_SHARE, CONTINUATION_TOKENS = 6, 0.4, 60
CONTINUATION_TEMPERATURE, CONTINUATION_TOP_P = 0.7, 0.9


def bits_per_char(scope: Scope) -> Measurement:
    """Bits that next-token prediction needs for held-out text, ends of documents included, by its characters.

    Long documents are read in overlapping windows; every token is scored once. Baseline: ``xz -9`` on the same text as
    UTF-8. There is no judge, so there is no ceiling.
    """
    texts = held_out_texts(scope)
    spec = LayoutSpec.from_config(scope.config)
    documents = [d for text in texts for d in windows(scope.tokenizers.text.encode(text), spec)]
    rows = [pack(group, spec.length) for group in first_fit(documents, spec.length)]
    nats = 0.0
    for start in tqdm(range(0, len(rows), ROWS), desc="held-out text", unit="batch", leave=False):
        nats += text_nats(scope.model, collate(rows[start : start + ROWS]))
    joined = SEPARATOR.join(texts)
    compressed = len(lzma.compress(joined.encode("utf-8"), preset=9))
    key = "text_bits_per_char"
    values = {
        key: nats / math.log(2.0) / len(joined),
        "text_bits_per_char_xz": 8.0 * compressed / len(joined),
        "text_chars_scored": len(joined),
    }
    values[f"{key}_baseline"] = values["text_bits_per_char_xz"]
    return Measurement(values)


def continuations(scope: Scope) -> Measurement:
    """Held-out texts cut after their beginning and continued by the model; read, not judged."""
    texts = [text for text in held_out_texts(scope) if len(text) > 80][:CONTINUED]
    openings = [text[: max(40, min(240, int(PROMPT_SHARE * len(text))))].rsplit(" ", 1)[0] for text in texts]
    options = {
        "max_new_tokens": CONTINUATION_TOKENS,
        "temperature": CONTINUATION_TEMPERATURE,
        "top_p": CONTINUATION_TOP_P,
    }
    endings = generate_all(scope, "continuations", [[Text(opening)] for opening in openings], "text", **options)
    return Measurement({}, [Exhibit("text", "text", e, o) for o, e in zip(openings, endings, strict=True)])


def held_out_texts(scope: Scope) -> list[str]:
    """Held-out documents in the order of this seed, as many as ``evaluation.text_chars`` asks for."""
    texts, characters = [], 0
    for sample in scope.draw("text", len(scope.samples["text"])):
        text = target_of(sample).text[: scope.config.evaluation.text_chars - characters]
        texts.append(text)
        characters += len(text)
        if characters >= scope.config.evaluation.text_chars:
            break
    return texts


def windows(ids: list[int], spec: LayoutSpec) -> list[Document]:
    """A text of n tokens as documents of at most S positions, each from BOS; every token and the EOS is scored once."""
    room = spec.length - 1  # beside BOS
    tokens = np.array([*ids, int(Special.EOS)], np.int64)
    documents, scored = [], 0
    while scored < len(tokens):
        known = min(scored, int(room * OVERLAP))
        until = min(len(tokens), scored + room - known)
        writer = Writer(spec, 1 + known + until - scored)
        writer.special(Special.BOS)
        writer.text(tokens[scored - known : scored], loss=False)
        writer.text(tokens[scored:until], loss=True)
        documents.append(writer.document("text"))
        scored = until
    return documents


@paddle.no_grad()
def text_nats(model: paddle.nn.Layer, batch: dict[str, np.ndarray]) -> float:
    """Sum of -log p over the labelled text positions of a numpy batch whose loss weights are all 0 or 1."""
    labelled = int((batch["labels_text"] != IGNORE).sum())
    model.eval()
    alone = {**batch, "labels_mtp": np.full_like(batch["labels_mtp"], IGNORE)}  # spares the extra block
    tensors = {name: paddle.to_tensor(array) for name, array in alone.items()}
    return float(model(**tensors)["losses"]["text"]) * labelled
