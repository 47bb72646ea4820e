"""Raw samples from the embedded data or from manifests, the coded corpus, and packed rows in a resumable order."""

from ernie5.data.corpus import CodedCorpus, fingerprint
from ernie5.data.embedded import raw_samples, sources, tokenizer_material
from ernie5.data.packed import PackedDataset

__all__ = ["CodedCorpus", "PackedDataset", "fingerprint", "raw_samples", "sources", "tokenizer_material"]
