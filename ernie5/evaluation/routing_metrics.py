"""Which experts the held-out samples of each modality go through. R routers (the MTP block's last), E experts."""

from __future__ import annotations

import numpy as np
import paddle

from ernie5.evaluation.charts import load_entropy
from ernie5.evaluation.generating import first_fit
from ernie5.evaluation.measure import Measurement, Scope, target_of
from ernie5.evaluation.text_metrics import windows
from ernie5.files import write_json
from ernie5.sequence.layout import lay_out
from ernie5.sequence.packing import collate, pack
from ernie5.sequence.parts import Audio, Image, Sample, Text, Video
from ernie5.sequence.spec import LayoutSpec

SAMPLES = 24  # of every task
FILE = "expert_load.json"


def expert_load(scope: Scope) -> Measurement:
    """Writes ``expert_load.json`` (modality -> token counts [R, E]) and gives the entropy of the load over all of it.

    The entropy is normalised (1 = every expert works equally) and averaged over the routers. Without held-out samples
    there is nothing to count.
    """
    by_modality: dict[str, list[Sample]] = {}
    for task in scope.samples:
        for sample in scope.draw(task, SAMPLES):
            by_modality.setdefault(modality(sample), []).append(sample)
    if not by_modality:
        return Measurement({})
    loads = {name: _load(scope, samples) for name, samples in sorted(by_modality.items())}
    write_json((scope.out_dir or scope.run_dir) / FILE, {name: load.tolist() for name, load in loads.items()})
    total = sum(loads.values())
    return Measurement({"expert_load_entropy": float(load_entropy(total).mean())})


def modality(sample: Sample) -> str:
    """``image``, ``video`` or ``audio`` by the first part that is one, else ``text``."""
    names = {Image: "image", Video: "video", Audio: "audio"}
    return next((names[type(part)] for part in sample.parts if type(part) in names), "text")


@paddle.no_grad()
def _load(scope: Scope, samples: list[Sample]) -> np.ndarray:
    """int64 [R, E]: tokens of each expert over the samples. The model is left as it was."""
    spec = LayoutSpec.from_config(scope.config)
    text = scope.tokenizers.text
    prose = [sample for sample in samples if len(sample.parts) == 1 and isinstance(sample.parts[0], Text)]
    others = [sample for sample in samples if not any(sample is one for one in prose)]
    coded = scope.tokenizers.encode_samples(others, progress=False)
    documents = [windows(text.encode(target_of(sample).text), spec)[0] for sample in prose]
    documents += [lay_out(sample, text, spec, training=False) for sample in coded]
    rows = [pack(group, spec.length) for group in first_fit(documents, spec.length)]
    model, size = scope.model, scope.config.evaluation.batch_size
    model.eval()
    model.update_router_bias(0.0)  # forgets earlier counts, moves nothing
    for router in model.routers():
        router.train()  # routers count in training mode only
    for start in range(0, len(rows), size):
        batch = collate(rows[start : start + size])
        model(**{name: paddle.to_tensor(array) for name, array in batch.items()})
    load = model.expert_load()
    model.update_router_bias(0.0)
    model.eval()
    return load
