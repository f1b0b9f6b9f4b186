import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from csalign.core.enums import Modality
from csalign.core.errors import CsalignError, DataError, SchemaError, ShapeError
from csalign.features import schema, writer
from csalign.features.join import ALL, first_alike, join_ids, load_rows
from csalign.features.reader import FeatureSet, batch_tokens
from csalign.features.schema import EncoderInfo
from csalign.features.writer import FeatureWriter, Rows

Array = npt.NDArray[Any]
Write = Callable[..., Path]

IMAGES: dict[str, list[Any]] = {
    "id": ["a", "b", "c", "alone"],
    "source": ["a.png", "b.png", None, "alone.png"],
    "split": ["train", "train", "test", "test"],
}
TEXTS: dict[str, list[Any]] = {
    "id": ["a0", "a1", "b0", "c0", "free"],
    "image_id": ["a", "a", "b", "c", None],
    "caption": ["one", "zwei", "три", "四", None],
    "split": ["train", "train", "train", "test", "train"],
}


def numbers(n: int, d: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a small feature set: 4 images 6 wide, 5 texts 3 wide with tokens 2 wide."""

    def make(
        *,
        dtype: str = "float32",
        images: Array | None = None,
        texts: Array | None = None,
        image_columns: dict[str, list[Any]] = IMAGES,
        text_columns: dict[str, list[Any]] = TEXTS,
        tokens: bool = False,
    ) -> Path:
        folder = tmp_path / "features"
        folder.mkdir()
        encoders = {
            Modality.IMAGE: EncoderInfo(spec="eye", width=6),
            Modality.TEXT: EncoderInfo(spec="ear", width=3, token_width=2 if tokens else None),
        }
        stored = [numbers(length, 2, length) for length in (1, 0, 4, 2, 3)] if tokens else None
        with FeatureWriter(folder, encoders, dtype) as out:
            out.write(
                Modality.IMAGE, Rows(image_columns, numbers(4, 6) if images is None else images)
            )
            out.write(
                Modality.TEXT,
                Rows(text_columns, numbers(5, 3) if texts is None else texts, stored),
            )
        return folder

    return make


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_embeddings_come_back_bit_for_bit(write: Write, dtype: str) -> None:
    features = FeatureSet.open(write(dtype=dtype))

    assert features.images.embeddings().dtype == dtype
    np.testing.assert_array_equal(features.images.embeddings(), numbers(4, 6).astype(dtype))
    np.testing.assert_array_equal(features.texts.embeddings(), numbers(5, 3).astype(dtype))
    assert features.texts.column("caption").to_pylist() == TEXTS["caption"]


def test_several_shards_and_row_groups_come_back_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "ROW_GROUP_ROWS", 7)
    monkeypatch.setattr(writer, "SHARD_BYTES", 1_000)
    x, y = numbers(100, 5), numbers(60, 4, 1)
    encoders = {
        Modality.IMAGE: EncoderInfo(spec="eye", width=5),
        Modality.TEXT: EncoderInfo(spec="ear", width=4),
    }
    with FeatureWriter(tmp_path, encoders, "float32") as out:
        for start in range(0, 100, 9):
            ids = [f"i{row}" for row in range(start, min(100, start + 9))]
            out.write(Modality.IMAGE, Rows({"id": ids}, x[start : start + 9]))
        out.write(Modality.TEXT, Rows({"id": [f"t{row}" for row in range(60)]}, y))
    features = FeatureSet.open(tmp_path)
    features.verify()
    first = pq.ParquetFile(tmp_path / "images/part-00000.parquet")

    assert len(features.images.shards) > 2
    assert first.metadata.num_row_groups > 1
    assert first.metadata.row_group(0).num_rows == 7
    np.testing.assert_array_equal(features.images.embeddings(), x)
    np.testing.assert_array_equal(features.texts.embeddings(), y)
    assert features.images.column("id").to_pylist() == [f"i{row}" for row in range(100)]


def test_tokens_keep_their_lengths(write: Write) -> None:
    features = FeatureSet.open(write(tokens=True))
    ((_, batch),) = features.texts.read(schema.TOKENS)

    for found, length in zip(batch_tokens(batch), (1, 0, 4, 2, 3), strict=True):
        np.testing.assert_array_equal(found, numbers(length, 2, length))


def test_reading_embeddings_leaves_the_tokens_alone(write: Write) -> None:
    folder = write(tokens=True)
    path = folder / "texts/part-00000.parquet"
    column = pq.ParquetFile(path).metadata.row_group(0).column(5)
    assert column.path_in_schema.startswith("tokens")
    start = column.dictionary_page_offset or column.data_page_offset
    damaged = bytearray(path.read_bytes())
    damaged[start : start + column.total_compressed_size] = bytes(column.total_compressed_size)
    path.write_bytes(damaged)
    features = FeatureSet.open(folder)

    np.testing.assert_array_equal(features.texts.embeddings(), numbers(5, 3))
    with pytest.raises(SchemaError, match="part-00000"):
        list(features.texts.read(schema.TOKENS))


def test_other_libraries_read_the_files_as_they_are(write: Write) -> None:
    path = write(dtype="float16") / "images/part-00000.parquet"
    expected = numbers(4, 6).astype(np.float16)

    np.testing.assert_array_equal(np.stack(pd.read_parquet(path)["embedding"]), expected)
    np.testing.assert_array_equal(pl.read_parquet(path)["embedding"].to_numpy(), expected)
    assert pa.parquet.read_table(path)["id"].to_pylist() == IMAGES["id"]


def test_texts_join_images_by_id_whatever_their_order(write: Write) -> None:
    turned = {name: values[::-1] for name, values in TEXTS.items()}
    rows = load_rows(FeatureSet.open(write(text_columns=turned)), ALL)

    assert rows.text_image.tolist() == [-1, 2, 1, 0, 0]
    assert rows.caption_counts.tolist() == [2, 1, 1, 0]
    assert rows.texts_by_image.tolist() == [3, 4, 2, 1]
    assert rows.pairs == 4


def test_a_split_selects_rows_of_both_sides(write: Write) -> None:
    rows = load_rows(FeatureSet.open(write()), "train")

    assert rows.image_ids.to_pylist() == ["a", "b"]
    assert rows.text_ids.to_pylist() == ["a0", "a1", "b0", "free"]
    assert rows.text_image.tolist() == [0, 0, 1, -1]
    np.testing.assert_array_equal(rows.images, numbers(4, 6)[:2])


def test_taking_images_takes_their_texts(write: Write) -> None:
    joined = join_ids(FeatureSet.open(write()), ALL)
    keep = np.array([False, True, True, True])
    rows = joined.take_images(keep)

    assert rows.image_rows is not None
    assert rows.image_rows.tolist() == [1, 2, 3]
    assert rows.text_rows is not None
    assert rows.text_rows.tolist() == [2, 3]
    assert rows.text_image.tolist() == [0, 1]
    assert joined.take_images(keep, unpaired_texts=True).text_image.tolist() == [0, 1, -1]


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "manifest.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def cut(folder: Path) -> None:
    path = folder / "texts/part-00000.parquet"
    path.write_bytes(path.read_bytes()[:-30])


def flip(folder: Path) -> None:
    path = folder / "images/part-00000.parquet"
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)


def rewrite_columns(folder: Path) -> None:
    path = folder / "images/part-00000.parquet"
    pq.write_table(pq.read_table(path).drop_columns(["embedding"]), path)
    size = path.stat().st_size
    edit_manifest(folder, lambda m: m["shards"]["images"][0].update(bytes=size))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, r"texts/part-00000\.parquet: has \d+ bytes, the manifest says \d+"),
        (flip, r"images/part-00000\.parquet: "),
        (rewrite_columns, r"images/part-00000\.parquet: has no column 'embedding'"),
        (lambda f: (f / "images/part-00000.parquet").unlink(), r"part-00000\.parquet: is missing"),
        (
            lambda f: shutil.copy(f / "images/part-00000.parquet", f / "images/part-00001.parquet"),
            r"part-00001\.parquet: is not listed in the manifest",
        ),
        (lambda f: shutil.rmtree(f / "texts"), r"texts/part-00000\.parquet: is missing"),
        (
            lambda f: (f / "manifest.json").unlink(),
            r"not a feature set .no manifest\.json",
        ),
        (lambda f: (f / "manifest.json").write_text("{"), r"manifest\.json: is damaged"),
        (
            lambda f: (f / "manifest.json").write_text("[]"),
            r"manifest\.json: is damaged \(not a",
        ),
        (lambda f: edit_manifest(f, lambda m: m.update(format_version=9)), "upgrade csalign"),
        (
            lambda f: edit_manifest(f, lambda m: m.update(dtype="float16")),
            "the manifest says fixed",
        ),
        (
            lambda f: edit_manifest(f, lambda m: m["encoders"]["image"].update(width=7)),
            r"says .*\[7\]",
        ),
        (lambda f: edit_manifest(f, lambda m: m["counts"].update(images=9)), "manifest counts 9"),
        (
            lambda f: edit_manifest(f, lambda m: m["shards"]["images"][0].update(sha256="0" * 64)),
            "does not match the manifest's checksum",
        ),
        (
            lambda f: edit_manifest(f, lambda m: m["shards"]["images"][0].update(path="../x")),
            "outside of the set",
        ),
        (lambda f: edit_manifest(f, lambda m: m["shards"].pop("texts")), "manifest.json: shards"),
    ],
)
def test_a_set_that_does_not_agree_with_itself_is_refused_by_name(
    write: Write, damage: Callable[[Path], Any], message: str
) -> None:
    folder = write()
    damage(folder)

    with pytest.raises(DataError, match=message):
        load_rows(FeatureSet.open(folder), ALL)


def column(base: dict[str, list[Any]], name: str, row: int, value: Any) -> dict[str, list[Any]]:
    changed = {key: list(values) for key, values in base.items()}
    changed[name][row] = value
    return changed


def row_set(array: Array, row: int, value: float) -> Array:
    array[row] = value
    return array


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"images": row_set(numbers(4, 6), 2, np.nan)}, "image 'c': is not finite"),
        ({"images": row_set(numbers(4, 6), 3, np.inf)}, "image 'alone': is not finite"),
        ({"texts": row_set(numbers(5, 3), 1, 0)}, "text 'a1': has norm 0"),
        ({"texts": row_set(numbers(5, 3), 1, 1e5), "dtype": "float16"}, "use --dtype float32"),
        ({"texts": row_set(numbers(5, 3), 1, 1e-9), "dtype": "float16"}, "norm 0 once stored"),
        ({"images": numbers(4, 5)}, r"shape \(4, 5\), expected \(4, 6\)"),
        ({"images": numbers(3, 6)}, r"shape \(3, 6\), expected \(4, 6\)"),
        ({"image_columns": column(IMAGES, "id", 1, "a")}, "image id 'a' appears more than once"),
        ({"image_columns": column(IMAGES, "id", 1, None)}, "has no id"),
        ({"text_columns": column(TEXTS, "image_id", 0, "zz")}, "belongs to image 'zz', which is"),
    ],
)
def test_rows_that_cannot_be_stored_are_refused_by_name(
    write: Write, tmp_path: Path, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises((DataError, ShapeError), match=message):
        write(**arguments)

    assert not (tmp_path / "features/manifest.json").exists()


def test_a_text_in_another_split_than_its_image_is_refused(write: Write) -> None:
    folder = write(text_columns=column(TEXTS, "split", 3, "train"))

    with pytest.raises(SchemaError, match="text 'c0' belongs to image 'c', which is in another"):
        load_rows(FeatureSet.open(folder), "train")


def test_a_split_without_pairs_is_refused_with_the_splits_there_are(write: Write) -> None:
    with pytest.raises(DataError, match=r"has no pairs; the splits .* are test: 2 images, 1 texts"):
        load_rows(FeatureSet.open(write()), "val")


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CsalignError, match="no such feature set"):
        FeatureSet.open(tmp_path / "nowhere")


def test_equal_rows_written_by_one_version_have_equal_bytes_and_fingerprint(
    write: Write, tmp_path: Path
) -> None:
    first = write()
    moved = first.rename(tmp_path / "first")
    second = write()

    assert FeatureSet.open(moved).manifest.fingerprint() == (
        FeatureSet.open(second).manifest.fingerprint()
    )
    assert FeatureSet.open(second).splits()["train"] == {"images": 2, "texts": 4}


def test_equal_keys_are_numbered_by_their_first_place() -> None:
    # Hashes of strings differ from process to process; what follows from them must not.
    keys = np.array([9, -5, 9, 7, -5])

    assert first_alike(keys).tolist() == first_alike(-keys).tolist() == [0, 1, 0, 3, 1]


@pytest.mark.parametrize(
    ("sources", "is_recorded"),
    [
        (["photos/a.png", None], True),
        (pa.array([None, "a.png"]), True),
        (["/photos/a.png"], False),
        (["s3://bucket/a.png"], False),
        (pa.array([None], pa.string()), False),
        ([], False),
    ],
)
def test_the_folder_of_relative_sources_is_the_working_directory(
    sources: Any, is_recorded: bool
) -> None:
    assert schema.source_root(sources) == (str(Path.cwd()) if is_recorded else None)
