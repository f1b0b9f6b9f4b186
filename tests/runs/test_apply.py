import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from csalign.adapters.checkpoint import load_adapter
from csalign.core.enums import Modality
from csalign.core.errors import DataError, OutputError
from csalign.features import export
from csalign.features.join import ALL, load_rows
from csalign.features.reader import FeatureSet
from csalign.ingest.config import ImportConfig
from csalign.ingest.import_arrays import import_arrays
from csalign.runs.apply import apply
from csalign.runs.config import ApplyConfig


def applied(features: Path, run: Path, out: Path, **values: Any) -> Path:
    apply(ApplyConfig(features=features, adapter=run, out=out, **values))
    return out


def embedded(features: Path, run: Path, side: Modality) -> Any:
    table = FeatureSet.open(features).table(side)
    return load_adapter(run).embed(side, table.embeddings())


def ragged(features: Path, tmp_path: Path) -> Path:
    """The same rows, of which some have several partners and some none."""
    owners = [row % 90 for row in range(280)] + [""] * 20
    pairs = tmp_path / "ragged.csv"
    lines = [f'{owner},"caption {row}, it\'s"' for row, owner in enumerate(owners)]
    pairs.write_text("\n".join(["image_id,caption", *lines]))
    out = tmp_path / "ragged"
    import_arrays(
        ImportConfig(
            images=tmp_path / "images.npy", texts=tmp_path / "texts.npy", pairs=pairs, out=out
        )
    )
    return out


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_npy_holds_every_row_and_comes_back_as_the_same_features(
    features: Path, run: Path, tmp_path: Path, dtype: Any
) -> None:
    ragged_set = ragged(features, tmp_path)
    out = applied(ragged_set, run, tmp_path / "out", format="npy", dtype=dtype)
    parquet = applied(ragged_set, run, tmp_path / "parquet", dtype=dtype)
    import_arrays(
        ImportConfig(
            images=out / "images.npy",
            texts=out / "texts.npy",
            image_table=out / "images.csv",
            text_table=out / "texts.csv",
            out=tmp_path / "again",
        )
    )

    images = np.load(out / "images.npy", mmap_mode="r", allow_pickle=False)
    assert images.dtype == dtype
    np.testing.assert_array_equal(images, embedded(ragged_set, run, Modality.IMAGE).astype(dtype))
    one, two = (load_rows(FeatureSet.open(p), ALL) for p in (parquet, tmp_path / "again"))
    assert one.images.tobytes() == two.images.tobytes()
    assert one.texts.tobytes() == two.texts.tobytes()
    assert one.text_image.tolist() == two.text_image.tolist()
    assert one.captions == two.captions
    assert FeatureSet.open(parquet).splits() == FeatureSet.open(tmp_path / "again").splits()


def test_the_note_says_what_made_the_arrays(features: Path, run: Path, tmp_path: Path) -> None:
    out = applied(features, run, tmp_path / "out", format="npy")
    note = json.loads((out / "aligned.json").read_text())

    assert note["format"] == "csalign-aligned"
    assert (note["layout"], note["dtype"]) == ("npy", "float16")
    assert note["rows"] == {"images": 300, "texts": 300}
    assert note["widths"] == {"image": 16, "text": 16}
    assert note["adapter"] == str(run)
    assert note["features_fingerprint"] == FeatureSet.open(features).manifest.fingerprint()


def test_clip_retrieval_rows_are_pairs_and_the_rest_is_counted(
    features: Path, run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ragged_set = ragged(features, tmp_path)
    with caplog.at_level(logging.WARNING, "csalign"):
        out = applied(ragged_set, run, tmp_path / "out", format="clip-retrieval")
    images = np.load(out / "img_emb" / "img_emb_0.npy")
    texts = np.load(out / "text_emb" / "text_emb_0.npy")
    metadata = pd.read_parquet(out / "metadata" / "metadata_0.parquet")

    assert "210 images and 20 texts have no partner" in caplog.text
    assert images.dtype == texts.dtype == np.float16
    assert len(images) == len(texts) == len(metadata) == 280
    assert metadata["caption"][7] == "caption 7, it's"
    assert metadata["image_path"].tolist() == [str(row % 90) for row in range(280)]
    expected = embedded(ragged_set, run, Modality.IMAGE).astype(np.float16)
    np.testing.assert_array_equal(images, expected[np.arange(280) % 90])
    np.testing.assert_array_equal(
        texts, embedded(ragged_set, run, Modality.TEXT)[:280].astype(np.float16)
    )
    np.testing.assert_allclose(np.linalg.norm(images.astype(np.float32), axis=1), 1, atol=2e-3)
    assert sorted(path.name for path in out.iterdir()) == [
        "aligned.json",
        "config.toml",
        "img_emb",
        "metadata",
        "text_emb",
    ]


def test_clip_retrieval_comes_back_as_the_same_features(
    features: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "PART_ROWS", 27)  # twelve parts, so that names need two digits
    out = applied(features, run, tmp_path / "out", format="clip-retrieval")
    parquet = applied(features, run, tmp_path / "parquet")
    import_arrays(ImportConfig(source=out, out=tmp_path / "again"))
    one, two = (load_rows(FeatureSet.open(p), ALL) for p in (parquet, tmp_path / "again"))

    parts = sorted(path.name for path in (out / "img_emb").iterdir())
    assert parts == [f"img_emb_{part:02d}.npy" for part in range(12)]
    assert one.images.tobytes() == two.images.tobytes()
    assert one.texts.tobytes() == two.texts.tobytes()
    assert one.image_ids == two.image_ids
    assert one.captions == two.captions
    assert FeatureSet.open(parquet).splits() == FeatureSet.open(tmp_path / "again").splits()


def test_clip_retrieval_comes_back_with_ids_and_each_image_once(
    features: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "PART_ROWS", 100)
    for name, rows in (("images", 300), ("texts", 300)):
        owner = ",image_id,caption,split" if name == "texts" else ",source,split"
        values = [
            f"t{row},i{row % 90},of {row},{'val' if row % 90 < 9 else 'train'}"
            if name == "texts"
            else f"i{row},{row}.jpg,{'val' if row < 9 else 'train'}"
            for row in range(rows)
        ]
        (tmp_path / f"{name}.csv").write_text("\n".join([f"id{owner}", *values]))
    import_arrays(
        ImportConfig(
            images=tmp_path / "images.npy",
            texts=tmp_path / "texts.npy",
            image_table=tmp_path / "images.csv",
            text_table=tmp_path / "texts.csv",
            out=tmp_path / "named",
        )
    )
    out = applied(tmp_path / "named", run, tmp_path / "out", format="clip-retrieval")
    import_arrays(ImportConfig(source=out, out=tmp_path / "again"))
    whole = FeatureSet.open(applied(tmp_path / "named", run, tmp_path / "parquet"))
    again = FeatureSet.open(tmp_path / "again")

    for name in ("id", "image_id", "caption", "split"):
        assert again.texts.column(name) == whole.texts.column(name)
    for name in ("id", "source", "split"):
        assert again.images.column(name) == whole.images.column(name).slice(0, 90)
    np.testing.assert_array_equal(again.texts.embeddings(), whole.texts.embeddings())
    np.testing.assert_array_equal(again.images.embeddings(), whole.images.embeddings()[:90])


@pytest.mark.parametrize("first", ["parquet", "npy", "clip-retrieval"])
@pytest.mark.parametrize("second", ["parquet", "npy", "clip-retrieval"])
def test_each_format_is_replaced_by_each_when_asked(
    features: Path, run: Path, tmp_path: Path, first: str, second: str
) -> None:
    out = applied(features, run, tmp_path / "out", format=first)
    with pytest.raises(OutputError, match="--overwrite"):
        applied(features, run, out, format=second)
    applied(features, run, out, format=second, overwrite=True)
    alone = applied(features, run, tmp_path / "alone", format=second)

    there = {path.relative_to(out).as_posix() for path in out.rglob("*")}
    assert there == {path.relative_to(alone).as_posix() for path in alone.rglob("*")}


def test_a_folder_of_clip_retrieval_itself_is_never_replaced(
    features: Path, run: Path, tmp_path: Path
) -> None:
    theirs = tmp_path / "theirs"
    (theirs / "img_emb").mkdir(parents=True)

    with pytest.raises(OutputError, match="did not make"):
        applied(features, run, theirs, format="clip-retrieval", overwrite=True)


def test_pairs_are_needed_where_rows_are_pairs(features: Path, run: Path, tmp_path: Path) -> None:
    pairs = tmp_path / "none.csv"
    pairs.write_text("image_id,caption\n" + ",x\n" * 300)
    unpaired = tmp_path / "unpaired"
    import_arrays(
        ImportConfig(
            images=tmp_path / "images.npy", texts=tmp_path / "texts.npy", pairs=pairs, out=unpaired
        )
    )

    with pytest.raises(DataError, match=r"no text has an image, .* --format npy"):
        applied(unpaired, run, tmp_path / "out", format="clip-retrieval")
    assert not list(tmp_path.glob("out*"))
