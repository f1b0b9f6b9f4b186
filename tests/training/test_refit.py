"""Held-out pairs are learned from once everything is chosen; further networks."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from csalign.core.enums import Modality
from csalign.features.join import load_rows
from csalign.features.reader import FeatureSet
from csalign.ingest.config import ImportConfig
from csalign.ingest.import_arrays import import_arrays
from csalign.training.config import DataOptions
from csalign.training.data import TrainingData, load_data
from csalign.training.sampler import make_sampler


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four splits of 120 images in turn, a quarter without captions, and texts without an image."""
    folder = tmp_path_factory.mktemp("several")
    rng = np.random.default_rng(0)
    owners = [f"{image}" for image in range(120) if image % 4 for _ in range(1 + image % 2)]
    owners += [""] * 20
    latent = rng.normal(size=(121, 6))
    order = rng.permutation(len(owners))
    owners = [owners[row] for row in order]
    texts = latent[[int(owner or 120) for owner in owners]]
    for name, values, width in (("i", latent[:120], 12), ("t", texts, 8)):
        made = values @ rng.normal(size=(6, width)) + 0.3 * rng.normal(size=(len(values), width))
        np.save(folder / f"{name}.npy", made.astype(np.float32))
    splits = ["train", "val", "train", "test"]
    images = [f"{image},{splits[image // 2 % 4]}" for image in range(120)]
    (folder / "i.csv").write_text("\n".join(["id,split", *images]))
    lines = [
        f"{row},{owner},caption {row % 90},{splits[(int(owner) if owner else row) // 2 % 4]}"
        for row, owner in enumerate(owners)
    ]
    (folder / "t.csv").write_text("\n".join(["id,image_id,caption,split", *lines]))
    config = ImportConfig(
        images=folder / "i.npy",
        texts=folder / "t.npy",
        image_table=folder / "i.csv",
        text_table=folder / "t.csv",
        out=folder / "set",
    )
    return import_arrays(config).features


def load(features: Path, **values: Any) -> tuple[TrainingData, list[Any]]:
    """Load rows; return the pairs trained on first as well, as rows of the tables."""
    options = DataOptions(features=features, **values)
    data = load_data(options, out=features.parent / "run", seed=0)
    sampler = make_sampler(options, 0.3, data.rows, None, data.held_out)
    (images, texts), weights = sampler.weighted_pairs()
    places = (
        data.rows.table_rows(side)[rows].tolist()
        for side, rows in zip(Modality, (images, texts), strict=True)
    )
    return data, sorted(zip(*places, weights.tolist(), strict=True))


def pool(data: TrainingData, side: Modality) -> list[int]:
    (part,) = data.unpaired.parts[side]
    found: list[int] = data.rows.table_rows(side)[part.rows].tolist()
    return found


@pytest.mark.parametrize("split", [{}, {"val_split": "val"}, {"train_split": "train,val"}])
def test_a_refit_adds_the_held_out_rows_and_changes_nothing_before_it(
    several: Path, split: dict[str, str]
) -> None:
    before, expected = load(several, refit=False, **split)
    after, found = load(several, **split)

    assert found == expected
    assert after.trained == before.trained
    assert before.refit_split is None
    assert after.refit_split == "train,val"
    assert after.val is not None
    assert before.val is not None
    assert after.val.image_ids == before.val.image_ids
    for side in Modality:
        assert pool(after, side) == pool(before, side)
    whole = load_rows(FeatureSet.open(several), "train,val")
    assert after.rows.pairs == whole.pairs == after.trained[0] + after.val.pairs
    held_out = after.rows.take(after.folds[0])
    validated = after.val.table_rows(Modality.TEXT)[after.val.text_image >= 0]
    assert sorted(held_out.table_rows(Modality.TEXT)) == sorted(validated)
    owners = whole.text_image >= 0
    pairs = {
        whole.table_rows(Modality.TEXT)[text]: whole.table_rows(Modality.IMAGE)[image]
        for text, image in zip(np.flatnonzero(owners), whole.text_image[owners], strict=True)
    }
    for rows in (after.rows, held_out):
        for text, image in enumerate(rows.text_image):
            if image >= 0:
                text_row, image_row = (
                    rows.table_rows(side)[row]
                    for side, row in ((Modality.TEXT, text), (Modality.IMAGE, image))
                )
                assert pairs[text_row] == image_row
                np.testing.assert_array_equal(
                    rows.texts[text], FeatureSet.open(several).texts.embeddings()[text_row]
                )


def test_few_pairs_are_held_out_several_times_and_the_first_is_validated_on(several: Path) -> None:
    options = {"train_split": "train,val"}
    for refit in (False, True):
        data, _ = load(several, refit=refit, **options)
        assert len(data.folds) == 5
        for fold in data.folds:
            held_out = data.rows.take(fold)
            sampler = make_sampler(DataOptions(features=several), 0.3, data.rows, None, fold)
            (images, texts), _ = sampler.weighted_pairs()
            assert not fold[images].any()
            keys = data.rows.caption_keys
            assert not set(keys[texts]) & set(
                keys[np.isin(data.rows.text_image, np.flatnonzero(fold))]
            )
            assert 15 <= (held_out.caption_counts > 0).sum() <= 20
        assert data.val is not None
        assert (
            data.val.image_ids.to_pylist()
            == FeatureSet.open(several)
            .images.strings("id", data.rows.take(data.folds[0]).image_rows)
            .to_pylist()
        )


def test_few_held_out_rows_are_no_reason_to_refit(several: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    table = ["image_id,caption,split"]
    table += [f"{row},caption {row},{'val' if row < 9 else 'train'}" for row in range(500)]
    (tmp_path / "t.csv").write_text("\n".join(table))
    for name in ("i", "t"):
        np.save(tmp_path / f"{name}.npy", rng.normal(size=(500, 4)).astype(np.float32))
    paths = {"images": tmp_path / "i.npy", "texts": tmp_path / "t.npy", "pairs": tmp_path / "t.csv"}
    features = import_arrays(ImportConfig(out=tmp_path / "set", **paths)).features
    data, _ = load(features)

    assert data.refit_split is None
    assert data.folds == ()
    assert data.no_refit == "the 9 images held out are few beside all 500"
