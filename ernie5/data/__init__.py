"""Raw samples from the embedded data or from manifests, the coded corpus, and packed rows in a resumable order."""

from ernie5.data.corpus import CodedCorpus
from ernie5.data.embedded import raw_samples, sources, tokenizer_material
from ernie5.data.lengths import fitting
from ernie5.data.packed import PackedDataset
from ernie5.tokenizers.fingerprint import fingerprint

__all__ = ["CodedCorpus", "PackedDataset", "fingerprint", "fitting", "raw_samples", "sources", "tokenizer_material"]
