from __future__ import annotations

import numpy as np
import pytest

from ernie5.sequence.layout import lay_out
from ernie5.sequence.mask import dense_mask
from ernie5.sequence.packing import collate, pack
from ernie5.sequence.parts import Sample, Text
from ernie5.sequence.spec import LayoutSpec
from ernie5.sequence.vocabulary import IGNORE, Kind, Special
from tests.sequence.samples import Letters, features, latent, random_sample

SPEC = LayoutSpec(bits=8, max_bits=16, scales=(1, 2, 3), cnn_dim=6, vit_dim=5, speaker_dim=7)


def documents(seed: int, count: int = 3) -> list:
    rng = np.random.default_rng(seed)
    return [lay_out(random_sample(rng, SPEC), Letters(), SPEC) for _ in range(count)]


@pytest.mark.parametrize("seed", range(5))
def test_documents_never_see_each_other(seed: int) -> None:
    batch = collate([pack(documents(seed), 400)])
    visible, number = dense_mask(batch["attention_intervals"])[0], batch["document"][0]
    rows, columns = np.nonzero(visible)
    assert (number[rows] == number[columns]).all()
    padding = number == 0
    np.testing.assert_array_equal(visible[padding][:, padding], np.eye(padding.sum(), dtype=bool))


@pytest.mark.parametrize("seed", range(5))
def test_packing_moves_documents_unchanged(seed: int) -> None:
    parts = documents(seed)
    row = pack(parts, 420, offset=4)
    start = 4
    for number, document in enumerate(parts, start=1):
        here = slice(start, start + len(document))
        for name in ("input_ids", "positions", "labels_text", "labels_bits", "labels_audio", "audio_codes", "kind"):
            np.testing.assert_array_equal(row[name][here], getattr(document, name))
        assert (row["document"][here] == number).all()
        inside = (row["vision_index"] >= start) & (row["vision_index"] < start + len(document))
        np.testing.assert_array_equal(row["vision_index"][inside] - start, document.vision_index)
        np.testing.assert_array_equal(row["vision_features"][inside], document.vision_features)
        start += len(document)
    for outside in (slice(0, 4), slice(start, None)):
        assert (row["input_ids"][outside] == Special.PAD).all() and (row["kind"][outside] == Kind.PAD).all()
        assert (row["labels_text"][outside] == IGNORE).all() and not row["loss_weight"][outside].any()


def test_placeholders_stand_at_the_flat_indices() -> None:
    batch = collate([pack(documents(seed), 400) for seed in range(6)])
    ids = batch["input_ids"].ravel()
    for index, token in (
        ("vision_index", Special.VISION),
        ("patch_index", Special.PATCH),
        ("speaker_index", Special.SPEAKER),
    ):
        np.testing.assert_array_equal(np.sort(batch[index]), np.nonzero(ids == token)[0])
    np.testing.assert_array_equal(batch["audio_codes"][..., 0].ravel() >= 0, ids == Special.AUDIO)


def test_shapes_without_any_feature() -> None:
    document = lay_out(Sample([Text("abc")]), Letters(), SPEC)
    batch = collate([pack([document], 16)] * 2)
    shapes = {name: value.shape for name, value in batch.items()}
    assert shapes == {
        "input_ids": (2, 16),
        "positions": (2, 16, 3),
        "attention_intervals": (2, 1, 16, 4),
        "vision_features": (0, 16),
        "vision_index": (0,),
        "vision_scale": (0,),
        "patch_cnn": (0, 4, 6),
        "patch_vit": (0, 4, 5),
        "patch_mask": (0, 4),
        "patch_index": (0,),
        "speaker": (0, 7),
        "speaker_index": (0,),
        "audio_codes": (2, 16, 4),
        "labels_text": (2, 16),
        "labels_mtp": (2, 16),
        "labels_bits": (2, 16, 16),
        "labels_audio": (2, 16, 4),
        "loss_weight": (2, 16),
        "kind": (2, 16),
        "document": (2, 16),
    }
    dtypes = {name: str(value.dtype) for name, value in batch.items()}
    floats = {"positions", "vision_features", "patch_cnn", "patch_vit", "patch_mask", "speaker", "loss_weight"}
    for name, dtype in dtypes.items():
        assert dtype == ("float32" if name in floats else "int32" if name == "attention_intervals" else "int64"), name


@pytest.mark.parametrize("order", [(1, 2), (2, 1)])
def test_patches_of_images_and_clips_share_a_batch(order: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    parts = [features(rng, SPEC, frames) for frames in order]
    rows = [pack([lay_out(Sample([part]), Letters(), SPEC)], 32) for part in parts]
    rows.append(pack([lay_out(Sample([latent(rng, SPEC)]), Letters(), SPEC)], 32))
    batch = collate(rows)
    counts = [len(part.cnn) for part in parts]
    assert batch["patch_cnn"].shape == (sum(counts), 16, 6)
    image = slice(0, counts[0]) if order[0] == 1 else slice(counts[0], None)
    np.testing.assert_array_equal(batch["patch_mask"][image].sum(1), 4)
    np.testing.assert_array_equal(batch["patch_cnn"][image, :4], parts[order.index(1)].cnn)
    assert not batch["patch_vit"][image, 4:].any()


def test_too_many_documents_is_our_bug() -> None:
    with pytest.raises(AssertionError, match="do not fit"):
        pack(documents(0), 20)
