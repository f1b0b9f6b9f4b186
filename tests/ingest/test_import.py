import os
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import s3fs
import safetensors.torch
import torch

from csalign.core.errors import ConfigError, CsalignError, DataError, OutputError
from csalign.core.paths import parse_location
from csalign.features.join import ALL, PairedRows, load_rows
from csalign.features.reader import FeatureSet
from csalign.ingest.config import ImportConfig
from csalign.ingest.import_arrays import import_arrays


def save(path: Path, array: Any) -> Path:
    np.save(path, array)
    return path


def numbers(n: int, d: int, dtype: Any = np.float32) -> Any:
    return np.random.default_rng(n + d).normal(size=(n, d)).astype(dtype)


def rows_of(out: Path) -> PairedRows:
    return load_rows(FeatureSet.open(out), ALL)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_rows_of_equal_number_are_pairs_and_come_back_bit_for_bit(
    tmp_path: Path, dtype: Any
) -> None:
    x, y = numbers(9_000, 8, dtype), numbers(9_000, 5, dtype)
    result = import_arrays(
        ImportConfig(
            images=save(tmp_path / "x.npy", x),
            texts=save(tmp_path / "y.npy", y),
            out=tmp_path / "out",
        )
    )
    rows = rows_of(tmp_path / "out")

    assert (result.images, result.texts, result.pairs) == (9_000, 9_000, 9_000)
    assert rows.images.tobytes() == x.tobytes()
    assert rows.texts.tobytes() == y.tobytes()
    assert rows.text_image.tolist() == list(range(9_000))


def test_an_npz_holds_both_sides_by_name(tmp_path: Path) -> None:
    both = tmp_path / "both.npz"
    np.savez(both, images=numbers(4, 3), texts=numbers(4, 2), other=numbers(4, 6))
    import_arrays(ImportConfig(source=both, out=tmp_path / "one"))
    named = ImportConfig(
        images=Path(f"{both}:other"), texts=Path(f"{both}:texts"), out=tmp_path / "two"
    )
    import_arrays(named)

    np.testing.assert_array_equal(rows_of(tmp_path / "one").images, numbers(4, 3))
    np.testing.assert_array_equal(rows_of(tmp_path / "two").images, numbers(4, 6))


def test_a_pairs_table_gives_several_captions_and_splits(tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.csv"
    pairs.write_text("image_id,caption,split\n1,a,train\n0,b,test\n1,c,train\n,d,train\n")
    import_arrays(
        ImportConfig(
            images=save(tmp_path / "x.npy", numbers(3, 4)),
            texts=save(tmp_path / "y.npy", numbers(4, 4)),
            pairs=pairs,
            out=tmp_path / "out",
        )
    )
    features = FeatureSet.open(tmp_path / "out")

    assert rows_of(tmp_path / "out").text_image.tolist() == [1, 0, 1, -1]
    assert features.texts.column("caption").to_pylist() == ["a", "b", "c", "d"]
    assert features.images.column("split").to_pylist() == ["test", "train", None]


def test_a_pairs_table_with_text_ids_may_be_in_any_order_and_leave_texts_out(
    tmp_path: Path,
) -> None:
    (tmp_path / "images.jsonl").write_text('{"id": "cat", "split": "val"}\n{"id": "dog"}\n')
    (tmp_path / "texts.tsv").write_text("id\tcaption\nt1\twoof\nt2\tmeow\nt3\tmoo\n")
    (tmp_path / "pairs.csv").write_text("text_id,image_id\nt2,cat\nt1,dog\n")
    import_arrays(
        ImportConfig(
            images=save(tmp_path / "x.npy", numbers(2, 4)),
            texts=save(tmp_path / "y.npy", numbers(3, 4)),
            image_table=tmp_path / "images.jsonl",
            text_table=tmp_path / "texts.tsv",
            pairs=tmp_path / "pairs.csv",
            out=tmp_path / "out",
        )
    )
    rows = rows_of(tmp_path / "out")

    assert rows.text_image.tolist() == [1, 0, -1]
    assert rows.captions.to_pylist() == ["woof", "meow", "moo"]
    assert FeatureSet.open(tmp_path / "out").texts.column("split").to_pylist() == [
        None,
        "val",
        None,
    ]


def with_value(row: int, value: float) -> Any:
    array = numbers(6, 4)
    array[row] = value
    return array


@pytest.mark.parametrize(
    ("images", "texts", "message"),
    [
        (numbers(6, 4), numbers(5, 4), "6 images and 5 texts: .* --pairs TABLE"),
        (numbers(6, 4)[0], numbers(6, 4), r"x\.npy: has shape \(4,\): embeddings are"),
        (numbers(0, 4), numbers(0, 4), r"x\.npy: has shape \(0, 4\)"),
        (with_value(2, np.nan), numbers(6, 4), r"x\.npy, row 2: is not finite"),
        (numbers(6, 4), with_value(5, np.inf), r"y\.npy, row 5: is not finite"),
        (numbers(6, 4), with_value(3, 0), r"y\.npy, row 3: has norm 0"),
        (numbers(6, 4).astype(np.int64), numbers(6, 4), "has dtype int64, not float16"),
        (np.array([{"a": 1}] * 6), numbers(6, 4), "never unpickled; save a plain array"),
    ],
)
def test_arrays_that_cannot_be_embeddings_are_refused_by_file_and_row(
    tmp_path: Path, images: Any, texts: Any, message: str
) -> None:
    config = ImportConfig(
        images=save(tmp_path / "x.npy", images),
        texts=save(tmp_path / "y.npy", texts),
        out=tmp_path / "out",
    )

    with pytest.raises(DataError, match=message):
        import_arrays(config)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("image_id\n0\n1\n", r"pairs\.csv: has 2 rows and there are 3 texts"),
        ("image_id\n0\n1\n7\n", r"pairs\.csv: image '7' of text row 2 is unknown \(1 texts"),
        ("image_id,image_id\n0,0\n1,1\n1,1\n", "has the column 'image_id' twice"),
        ("picture\n0\n1\n1\n", r"no? column 'image_id' \(columns: picture\)"),
        ("image_id,text_id\n0,0\n1,9\n", r"pairs\.csv, row 3: text '9' is unknown"),
        ("image_id,text_id\n0,0\n1,0\n", r"row 3: text '0' is also paired in .*pairs\.csv, row 2"),
        ("image_id,split\n0,a\n0,b\n1,a\n", "text '1' is in split 'b' and its image '0' in 'a'"),
        ('image_id,caption\n0,"a",b\n', r"pairs\.csv, row 2: has 3 cells, the header has 2"),
    ],
)
def test_a_pairs_table_that_does_not_fit_is_refused_by_row(
    tmp_path: Path, table: str, message: str
) -> None:
    pairs = tmp_path / "pairs.csv"
    pairs.write_text(table)
    config = ImportConfig(
        images=save(tmp_path / "x.npy", numbers(2, 4)),
        texts=save(tmp_path / "y.npy", numbers(3, 4)),
        pairs=pairs,
        out=tmp_path / "out",
    )

    with pytest.raises(DataError, match=message):
        import_arrays(config)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "pass embeddings of images and texts: csalign import image"),
        ({"images": "nowhere.npy", "texts": "nowhere.npy"}, "nowhere.npy: no such file"),
        (
            {"source": "both.npz", "images": "x.npy"},
            "are mixed; pass both in order: csalign import x.npy both.npz --out",
        ),
        ({"source": "nowhere"}, "nowhere: no such file or folder"),
    ],
)
def test_arrays_must_be_named_and_there(
    tmp_path: Path, values: dict[str, Any], message: str
) -> None:
    with pytest.raises((ConfigError, DataError), match=message):
        import_arrays(ImportConfig(**values, out=tmp_path / "out"))


def test_a_truncated_npy_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "x.npy", numbers(100, 8))
    path.write_bytes(path.read_bytes()[:500])

    with pytest.raises(DataError, match=r"x\.npy: is not a readable NumPy file"):
        import_arrays(ImportConfig(images=path, texts=path, out=tmp_path / "out"))
    path.write_text("<html>not found</html>")
    with pytest.raises(DataError, match=r"x\.npy: is a web page"):
        import_arrays(ImportConfig(images=path, texts=path, out=tmp_path / "out"))


def test_arrays_of_the_other_byte_order_are_read_as_what_they_are(tmp_path: Path) -> None:
    path = save(tmp_path / "x.npy", numbers(6, 4).astype(">f4"))
    import_arrays(ImportConfig(images=path, texts=path, out=tmp_path / "out"))

    np.testing.assert_array_equal(rows_of(tmp_path / "out").images, numbers(6, 4))


def test_an_output_is_replaced_only_when_asked_and_only_after_success(tmp_path: Path) -> None:
    good, bad = save(tmp_path / "x.npy", numbers(6, 4)), save(tmp_path / "b.npy", with_value(1, 0))
    out = tmp_path / "out"
    import_arrays(ImportConfig(images=good, texts=good, out=out))
    before = (out / "manifest.json").read_bytes()

    with pytest.raises(OutputError, match=r"exists; .* --overwrite"):
        import_arrays(ImportConfig(images=good, texts=good, out=out))
    with pytest.raises(DataError, match="norm 0"):
        import_arrays(ImportConfig(images=good, texts=bad, out=out, overwrite=True))
    assert (out / "manifest.json").read_bytes() == before
    import_arrays(ImportConfig(images=good, texts=good, out=out, overwrite=True, dtype="float16"))
    assert FeatureSet.open(out).manifest.dtype == "float16"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.npy", "out", "x.npy"]


def test_a_folder_of_other_files_and_the_inputs_are_never_replaced(tmp_path: Path) -> None:
    path = save(tmp_path / "x.npy", numbers(6, 4))
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.tex").write_text("years of work")

    for out, message in ((home, "did not make"), (tmp_path, "is read from"), (path, "is read")):
        with pytest.raises(CsalignError, match=message):
            import_arrays(ImportConfig(images=path, texts=path, out=out, overwrite=True))
    assert (home / "thesis.tex").exists()


def import_files(tmp_path: Path, **values: Any) -> FeatureSet:
    import_arrays(ImportConfig(**values, out=tmp_path / "out", overwrite=True))
    return FeatureSet.open(tmp_path / "out")


def test_bfloat16_is_stored_as_float32_without_loss(tmp_path: Path) -> None:
    x = torch.from_numpy(numbers(6, 4)).bfloat16()
    safetensors.torch.save_file({"images": x, "texts": x.clone()}, tmp_path / "both.safetensors")
    features = import_files(tmp_path, source=tmp_path / "both.safetensors")

    assert features.manifest.dtype == "float32"
    np.testing.assert_array_equal(features.images.embeddings(), x.float().numpy())


@pytest.mark.parametrize(
    ("order", "owners"), [("blocks", [0, 0, 0, 1, 1, 1]), ("copies", [0, 1, 0, 1, 0, 1])]
)
def test_the_order_of_several_captions_is_as_asked(
    tmp_path: Path, order: Any, owners: list[int]
) -> None:
    given = {
        "images": save(tmp_path / "x.npy", numbers(2, 4)),
        "texts": save(tmp_path / "y.npy", numbers(6, 4)),
    }
    features = import_files(tmp_path, **given, captions_per_image=3, caption_order=order)

    assert load_rows(features, ALL).text_image.tolist() == owners
    with pytest.raises(DataError, match="2 images and 6 texts: counts differ"):
        import_files(tmp_path, **given)
    with pytest.raises(ConfigError, match="--captions-per-image and --caption-order go together"):
        import_files(tmp_path, **given, captions_per_image=3)
    with pytest.raises(ConfigError, match="--text-counts define the pairs twice"):
        import_files(
            tmp_path,
            **given,
            captions_per_image=3,
            caption_order=order,
            text_counts=tmp_path / "c.npy",
        )


def test_sail_shards_pair_by_whole_copies(tmp_path: Path) -> None:
    x, y = torch.from_numpy(numbers(5, 4)).half(), torch.from_numpy(numbers(10, 3)).half()
    for name, array, batch in (("image", x, 2), ("text", y, 4)):  # batches differ by side
        (tmp_path / name).mkdir()
        for number, start in enumerate(range(0, len(array), batch)):
            part = array[start : start + batch].clone()
            torch.save(part, tmp_path / name / f"{number}.pt")
    features = import_files(
        tmp_path,
        images=tmp_path / "image",
        texts=tmp_path / "text",
        captions_per_image=2,
        caption_order="copies",
    )
    rows = load_rows(features, ALL)

    assert features.manifest.dtype == "float16"
    assert rows.text_image.tolist() == [*range(5), *range(5)]
    assert rows.texts.tobytes() == y.numpy().tobytes()


def test_a_3d_array_and_counts_give_each_image_its_captions(tmp_path: Path) -> None:
    y = numbers(3 * 2, 4).reshape(3, 2, 4)
    x = save(tmp_path / "x.npy", numbers(3, 4))
    deep = import_files(tmp_path, images=x, texts=save(tmp_path / "y.npy", y))
    assert load_rows(deep, ALL).text_image.tolist() == [0, 0, 1, 1, 2, 2]
    np.testing.assert_array_equal(deep.texts.embeddings(), y.reshape(6, 4))

    counts = save(tmp_path / "c.npy", np.array([1, 0, 5]))
    flat = save(tmp_path / "y.npy", y.reshape(6, 4))
    ragged = import_files(tmp_path, images=x, texts=flat, text_counts=counts)
    assert load_rows(ragged, ALL).text_image.tolist() == [0, 2, 2, 2, 2, 2]
    with pytest.raises(DataError, match="is 3-D, but images need one embedding each"):
        import_files(tmp_path, images=save(tmp_path / "y.npy", y), texts=x)


def test_parquet_of_each_side_pairs_by_image_id_with_all_it_says(tmp_path: Path) -> None:
    x, y = numbers(3, 4), numbers(4, 5)
    images = {"image_id": [10, 20, 30], "source": ["a.jpg", "b.jpg", "c.jpg"], "embedding": [*x]}
    texts = {
        "id": ["p", "q", "r", "s"],
        "image_id": [20, 10, 20, None],
        "caption": ["one", "two", "three", "four"],
        "split": ["train", "test", "train", "train"],
        "text_embedding": [*y],
    }
    pd.DataFrame(images).to_parquet(tmp_path / "x.parquet")
    pd.DataFrame(texts).astype({"image_id": "Int64"}).to_parquet(tmp_path / "y.parquet")
    features = import_files(tmp_path, images=tmp_path / "x.parquet", texts=tmp_path / "y.parquet")

    assert features.texts.column("image_id").to_pylist() == ["20", "10", "20", None]
    assert features.texts.column("caption").to_pylist() == texts["caption"]
    assert features.images.column("source").to_pylist() == images["source"]
    assert features.images.column("split").to_pylist() == ["test", "train", None]
    np.testing.assert_array_equal(features.texts.embeddings(), y)


def test_clip_retrieval_comes_in_with_captions_and_pairs(tmp_path: Path) -> None:
    clip = tmp_path / "clip"
    for number, rows in enumerate((3, 2)):
        for name in ("img_emb", "text_emb"):
            (clip / name).mkdir(parents=True, exist_ok=True)
            np.save(clip / name / f"{name}_{number}.npy", numbers(rows, 4, np.float16) + number)
        (clip / "metadata").mkdir(exist_ok=True)
        names = [f"{number}{row}" for row in range(rows)]
        frame = pd.DataFrame({"image_path": names, "caption": [f"of {name}" for name in names]})
        frame.to_parquet(clip / "metadata" / f"metadata_{number}.parquet")
    features = import_files(tmp_path, source=clip)

    assert features.manifest.dtype == "float16"
    assert features.images.column("id").to_pylist() == ["00", "01", "02", "10", "11"]
    assert features.texts.column("image_id") == features.images.column("id")
    assert features.texts.column("caption").to_pylist()[3] == "of 10"


def test_a_bad_row_is_named_in_its_own_shard(tmp_path: Path) -> None:
    folder = tmp_path / "x"
    folder.mkdir()
    for number in range(3):
        save(folder / f"{number}.npy", numbers(6, 4))
    save(folder / "2.npy", with_value(4, np.nan))

    with pytest.raises(DataError, match=r"x/2\.npy, row 4: is not finite; encode it again or"):
        import_files(tmp_path, images=folder, texts=folder)


def test_a_folder_that_is_read_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "both.npz"
    np.savez(path, images=numbers(3, 2), texts=numbers(3, 2))

    with pytest.raises(OutputError, match=r"this is where .*both\.npz is read from"):
        import_arrays(ImportConfig(images=Path(f"{path}:images"), out=tmp_path, overwrite=True))


def test_an_object_store_that_refuses_is_named_with_the_remedy(
    tmp_path: Path, bucket: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "a.npy", numbers(3, 2))
    remedy = "check the address, the keys and the network"
    for address, reason in (("", "bucket does not exist"), ("http://127.0.0.1:9", "Could not con")):
        monkeypatch.setenv("AWS_ENDPOINT_URL", address or os.environ["AWS_ENDPOINT_URL"])
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
        s3fs.S3FileSystem.clear_instance_cache()
        out = parse_location("s3://nowhere/features")
        with pytest.raises(OutputError, match=rf"^s3://nowhere/features: .*{reason}.*; {remedy}$"):
            import_arrays(ImportConfig(images=tmp_path / "a.npy", out=out))


def test_an_import_is_divided_and_the_config_repeats_it(tmp_path: Path, bucket: Path) -> None:
    for name, width in (("a.npy", 16), ("b.npy", 8)):
        save(tmp_path / name, numbers(50, width))
    given = {"images": tmp_path / "a.npy", "texts": tmp_path / "b.npy", "val": 0.1, "test": 7}
    import_arrays(ImportConfig(out=tmp_path / "here", **given))
    import_arrays(ImportConfig(out=bucket / "there", **given))
    again = ImportConfig.resolve(tmp_path / "here/config.toml", {"out": tmp_path / "again"})
    import_arrays(again)

    sets = [
        FeatureSet.open(out) for out in (tmp_path / "here", bucket / "there", tmp_path / "again")
    ]
    assert sets[0].splits() == {
        name: {"images": count, "texts": count}
        for name, count in (("test", 7), ("train", 38), ("val", 5))
    }
    names = [own.images.column("split").to_pylist() for own in sets]
    assert names[0] == names[1] == names[2] == sets[0].texts.column("split").to_pylist()
    with pytest.raises(DataError, match=r"/none: test 50 .*nothing to train on, of 50 images"):
        import_arrays(ImportConfig(out=tmp_path / "none", **given | {"test": 50}))
    assert not (tmp_path / "none").exists()
