import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.numpy

import csalign
from csalign.core import outputs
from csalign.core.enums import side_of
from csalign.core.errors import ConfigError, CsalignError, DataError, OutputError, ShapeError
from csalign.core.results import FeaturesResult
from csalign.features import schema
from csalign.features.reader import FeatureSet
from csalign.features.sides import SidedRows, load_sides
from csalign.ingest.config import ImportConfig
from csalign.ingest.import_arrays import import_arrays


def numbers(n: int, d: int) -> Any:
    return np.random.default_rng(n + d).normal(size=(n, d)).astype(np.float32)


def table(path: Path, rows: Any, **columns: Any) -> Path:
    """Write embeddings with columns as Parquet."""
    pq.write_table(pa.table({**columns, "embedding": list(rows)}), path)
    return path


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """Twelve rows of sound without ids, fifteen texts t0 to t14, ten images 100 to 109."""
    np.save(tmp_path / "audio.npy", numbers(12, 6))
    texts = table(
        tmp_path / "text.parquet",
        numbers(15, 5),
        id=[f"t{row}" for row in range(15)],
        caption=[f"caption {row}" for row in range(15)],
    )
    images = tmp_path / "image.safetensors"
    arrays = {"embeddings": numbers(10, 4), "id": np.arange(100, 110)}
    safetensors.numpy.save_file(arrays, images)
    return {"audio": tmp_path / "audio.npy", "text": texts, "image": images}


def run(files: dict[str, Path], lines: str | None, **options: Any) -> FeaturesResult:
    folder = files["audio"].parent
    if lines is not None:
        (folder / "items.csv").write_text(lines)
        options["pairs"] = folder / "items.csv"
    return import_arrays(ImportConfig(**{"side": files, "out": folder / "set"} | options))


def loaded(folder: Path) -> SidedRows:
    return load_sides(FeatureSet.open(folder))


def items_of(folder: Path, side: str, column: str = "item") -> list[Any]:
    return [*FeatureSet.open(folder).table(side).strings(column).to_pylist()]


def test_a_wide_table_names_rows_by_id_or_number(files: dict[str, Path], tmp_path: Path) -> None:
    lines = "item,audio,text,image,split\na,1,t1,100,valid\na,,t11,,\nb,2, ,101,train\nc,  ,t4,,\n"
    result = run(files, lines, encoder={"audio": "laion/clap"})
    rows = loaded(tmp_path / "set")

    assert items_of(tmp_path / "set", "audio") == [None, "a", "b", *[None] * 9]
    assert items_of(tmp_path / "set", "audio", "split")[:3] == [None, "val", "train"]
    assert items_of(tmp_path / "set", "text", "image_id")[:2] == [None, "100"]
    assert rows.sides[side_of("audio")].embeddings.tobytes() == numbers(12, 6).tobytes()
    assert rows.pairs("text", "audio")[0].tolist() == [1, 11]
    assert rows.pairs("text", "audio")[1].tolist() == [1, 1]
    assert result.sides is not None
    assert result.counts is not None
    assert result.sides["audio"] == {
        **{"rows": 12, "unpaired": 10, "width": 6},
        "encoder": "laion/clap",
    }
    assert result.counts["by_sides"] == {"1": 31, "2": 1, "3": 1}
    assert result.counts["pairs"] == {"image": {"text": 2, "audio": 2}, "text": {"audio": 2}}
    assert result.pairing == (
        f"{tmp_path}/items.csv (audio by row number from 0, text by id, image by id)"
    )


def test_a_long_table_equals_a_wide_one(files: dict[str, Path], tmp_path: Path) -> None:
    wide = "item,audio,text,image,caption\na,1,t1,100,one\na,,t2,,two\nb,2,t3,,\n"
    long = (
        "side,id,item,caption\ntext,t1,a,one\naudio,1,a,\nimage,100,a,\n"
        "text,t2,a,two\naudio,2,b,\ntext,t3,b,\n"
    )
    found = []
    for name, lines in {"wide": wide, "long": long}.items():
        run(files, lines, out=tmp_path / name)
        sides = ("audio", "text", "image")
        found.append([items_of(tmp_path / name, side) for side in sides])
        captions = items_of(tmp_path / name, "text", "caption")[:4]
        assert captions == ["caption 0", "one", "two", "caption 3"]

    assert found[0] == found[1]


def test_lines_without_an_item_that_repeat_a_row_are_one(
    files: dict[str, Path], tmp_path: Path
) -> None:
    result = run(files, "image,text,audio\n100,t1,\n100,t2,5\n101,t3,3\n,t4,4\n")

    assert items_of(tmp_path / "set", "text")[1:5] == ["100", "100", "101", "line 3"]
    assert items_of(tmp_path / "set", "audio")[3:6] == ["101", "line 3", "100"]
    assert "lines of one image as one item" in str(result.pairing)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("item,audio,txt,image\na,1,t1,100\n", "names no rows of text .* did you mean txt"),
        ("audio,text,image\n1,t1,100\n2,t99,101\n", r"row 3: text 't99' is not in .*1 of 2"),
        ("audio,text,image\n1,t1,100\n12,t2,101\n", r"row 3: audio '12' .* 0 to 11"),
        ("audio,text,image\na1,t1,100\n", "has no ids, so that cells are row numbers"),
        ("item,audio,text,image\na,1,t1,100\nb,1,t2,101\n", "row 3: audio '1' is of item 'b'.*row"),
        ("audio,text,image\n1,t1,100\n1,t2,101\n2,t2,103\n", "row 4: text 't2' is of item '2'"),
        ("item,audio,text,image\na,1,t1,100\n ,2,t2,101\n", "row 3: has no item"),
        ("audio,audio_row,text,image\n1,1,t1,100\n", "audio and audio_row both name rows"),
        (
            "item,audio,text,image,split\na,1,t1,100,train\na,,t2,,test\n",
            "row 3: is in split 'test', and another .* of item 'a' in 'train'",
        ),
        ("side,id,item\nimges,100,a\n", "row 2: side 'imges' is not one of audio, text, image"),
        ("side,id\nimage,100\n", "needs item, and id or row"),
        ("audio,text,image\n", "has no rows; give a line per item"),
    ],
)
def test_what_does_not_fit_is_refused(files: dict[str, Path], lines: str, message: str) -> None:
    with pytest.raises(DataError, match=f"(?s){message}"):
        run(files, lines)


def test_columns_of_no_side_are_named(
    files: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    run(files, "audio,text,image,notes\n1,t1,100,x\n")

    assert "columns that are not read: notes; those of a side have the name of" in caplog.text
    assert "items.csv: has one value per row" not in caplog.text


def test_numbers_as_text_are_the_same_ids(tmp_path: Path) -> None:
    files = {
        "audio": table(tmp_path / "a.parquet", numbers(3, 4), id=["007", "008", "009"]),
        "text": table(tmp_path / "t.parquet", numbers(3, 3), id=[9, 8, 7]),
    }
    (tmp_path / "i.csv").write_text("audio,text\n7.0,7\n9,9\n")
    import_arrays(ImportConfig(side=files, pairs=tmp_path / "i.csv", out=tmp_path / "set"))

    assert items_of(tmp_path / "set", "audio") == ["0", None, "1"]
    assert items_of(tmp_path / "set", "text") == ["1", None, "0"]

    result = import_arrays(ImportConfig(side=files, out=tmp_path / "by"))

    assert result.pairing == "id, as numbers"
    assert items_of(tmp_path / "by", "audio") == ["7", "8", "9"]


def test_a_common_column_joins_sides(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = {
        "audio": table(tmp_path / "a.parquet", numbers(4, 4), item=["x", "x", "y", None]),
        "text": table(tmp_path / "t.parquet", numbers(2, 3), item=["y", "x"]),
        "video": table(tmp_path / "v.parquet", numbers(2, 3), item=["p", "q"]),
    }
    result = import_arrays(ImportConfig(side=files, out=tmp_path / "set"))

    assert result.pairing == "item"
    assert result.counts is not None
    assert result.counts["pairs"]["text"] == {"audio": 3, "video": 0}
    assert "no row of video shares an item" in caplog.text


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ({"id": [*map(str, range(4))]}, {"id": [*map(str, range(12))]}),  # each counts its own rows
        ({"speaker_id": [*"aabb"]}, {"speaker_id": [*"aaaabbbbbbbb"]}),  # a class
        ({"file": ["1.wav", "2.wav", "3.wav", "4.wav"]}, {"file": [f"{n}.txt" for n in range(12)]}),
    ],
)
def test_a_column_that_may_be_by_chance_joins_only_when_named(
    tmp_path: Path, one: dict[str, Any], two: dict[str, Any]
) -> None:
    sides = {
        "audio": table(tmp_path / "a.parquet", numbers(4, 4), **one),
        "text": table(tmp_path / "t.parquet", numbers(12, 3), **two),
    }
    with pytest.raises(DataError, match="no column joins the sides"):
        import_arrays(ImportConfig(side=sides, out=tmp_path / "set"))
    import_arrays(ImportConfig(side=sides, out=tmp_path / "set", pair_by=next(iter(one))))


def test_words_for_missing_values_are_no_items(tmp_path: Path) -> None:
    sides = {
        name: table(tmp_path / f"{name}.parquet", numbers(4, 4), item=["x", "nan", "None", " "])
        for name in ("audio", "text")
    }
    result = import_arrays(ImportConfig(side=sides, out=tmp_path / "set"))

    assert result.counts is not None
    assert result.counts == {
        "items": 7,
        "by_sides": {"1": 6, "2": 1},
        "pairs": {"text": {"audio": 1}},
    }


def test_the_first_column_with_common_values_joins(tmp_path: Path) -> None:
    sides = {
        name: table(
            tmp_path / f"{name}.parquet",
            numbers(3, 4),
            file=[f"{own}.{name}" for own in "abc"],
            hash=["1f", "2f", "3f"],
        )
        for name in ("audio", "text")
    }
    assert import_arrays(ImportConfig(side=sides, out=tmp_path / "set")).pairing == "hash"


def test_texts_name_their_images(tmp_path: Path) -> None:
    files = {
        "image": table(tmp_path / "i.parquet", numbers(3, 4), id=["a", "b", "c"]),
        "text": table(tmp_path / "t.parquet", numbers(3, 3), id=["1", "2", "3"], image_id=[*"bba"]),
        "depth": table(tmp_path / "d.parquet", numbers(2, 3), image_id=["c", "b"]),
    }
    result = import_arrays(ImportConfig(side=files, out=tmp_path / "set"))

    assert result.pairing == "image_id"
    assert items_of(tmp_path / "set", "text", "image_id") == ["b", "b", "a"]
    assert items_of(tmp_path / "set", "depth") == ["c", "b"]

    table(tmp_path / "d.parquet", numbers(2, 3), image_id=["c", "z"])
    with pytest.raises(DataError, match=r"d\.parquet, row 1: image_id 'z' is not in .*i.parquet"):
        import_arrays(ImportConfig(side=files, out=tmp_path / "other"))


def test_row_order_is_a_guess(tmp_path: Path) -> None:
    for name, width in {"a": 3, "b": 4}.items():
        np.save(tmp_path / f"{name}.npy", numbers(5, width))
    sides = {name: tmp_path / f"{name}.npy" for name in "ab"}
    guessed = import_arrays(ImportConfig(side=sides, out=tmp_path / "guess"))
    asked = import_arrays(ImportConfig(side=sides, pair_by="order", out=tmp_path / "order"))
    np.save(tmp_path / "b.npy", numbers(6, 4))

    assert guessed.pairing == "row order (a guess, as counts are equal)"
    assert asked.pairing == "row order"
    with pytest.raises(DataError, match=r"no column joins the sides .*a 5, b 6"):
        import_arrays(ImportConfig(side=sides, out=tmp_path / "none"))


def test_ids_beside_an_array_are_read(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", numbers(3, 4))
    (tmp_path / "a_ids.json").write_text(json.dumps({"id": ["x", "y", "z"]}))
    other = table(tmp_path / "b.parquet", numbers(3, 4), id=["z", "y", "x"])
    sides = {"a": tmp_path / "a.npy", "b": other}
    import_arrays(ImportConfig(side=sides, out=tmp_path / "set"))

    assert items_of(tmp_path / "set", "a") == ["x", "y", "z"]


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"side": {"audio": "a.npy"}}, ConfigError, "audio alone; give two sides"),
        ({"side": ["a=a.npy", "a=b.npy"]}, ConfigError, "a is given twice"),
        ({"side": ["Audio=a.npy", "text=b.npy"]}, ConfigError, "'Audio': cannot name a side"),
        ({"side": ["item=a.npy", "text=b.npy"]}, ConfigError, "item is a column of --pairs"),
        ({"side": ["a.npy", "text=b.npy"]}, ConfigError, "must be NAME=VALUE"),
        ({"side": ["image=a.npy", "images=b.npy"]}, ConfigError, "image is given twice"),
        ({"side": ["a=a.npy", "b=b.npy"], "names": "x,y"}, ConfigError, "--names: cannot be used"),
        ({"side": ["a=a.npy", "b=b.npy"], "encoder": ["c=x"]}, ConfigError, "c: is not a --side"),
        ({"images": "a.npy", "texts": "b.npy", "add": True}, ConfigError, "--add: needs --side"),
        ({"side": ["a=a.npy", "b=b.npy"]}, DataError, "a.npy: no such file"),
    ],
)
def test_options_are_checked(
    values: dict[str, Any], error: type[CsalignError], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        import_arrays(ImportConfig(**values, out=tmp_path / "set"))


def test_bad_rows_and_repeated_ids_are_refused(files: dict[str, Path], tmp_path: Path) -> None:
    rows = numbers(12, 6)
    rows[7] = 0
    np.save(files["audio"], rows)
    with pytest.raises(DataError, match=r"audio\.npy, row 7"):
        run(files, "audio,text,image\n1,t1,100\n")
    np.save(files["audio"], numbers(12, 6))
    table(files["text"], numbers(3, 5), id=["x", "y", "x"])
    with pytest.raises(DataError, match=r"row 2: duplicate id 'x', also in .*row 0"):
        run(files, "audio,text,image\n1,x,100\n")
    assert not (tmp_path / "set").exists()


def test_a_side_is_added_without_writing_the_others(files: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "set"
    run(files, "item,audio,text,image,split\na,1,t1,100,test\nb,2,t2,101,train\n")
    kept = {path: path.stat().st_ino for path in out.rglob("*.parquet")}
    np.save(tmp_path / "depth.npy", numbers(4, 3))
    depth = {"side": {"depth": tmp_path / "depth.npy"}, "add": True}
    result = run(files, "text,depth\nt1,3\nt2,0\n,1\n", **depth)

    assert {path: path.stat().st_ino for path in kept} == kept
    assert items_of(out, "depth") == ["b", "line 2", None, "a"]
    assert items_of(out, "depth", "split") == ["train", None, None, "test"]
    assert result.sides is not None
    assert list(result.sides) == ["image", "text", "audio", "depth"]
    assert "depth: " in str(result.pairing)

    with pytest.raises(ConfigError, match="has a side depth already"):
        run(files, "text,depth\nt1,3\n", **depth)
    run(files, "image,depth\n101,2\n", **depth, overwrite=True)
    assert items_of(out, "depth") == [None, None, "b", None]
    assert not (tmp_path / "set.partial").exists()


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("text,image,depth\nt1,101,0\n", "row 2: text 't1' is of item 'a', and the rest"),
        ("text,depth\nt9,0\n", "row 2: text 't9' belongs to no item of the set"),
        ("text,depth\nt1,0\nt2,0\n", "row 3: depth '0' is of item 'b'"),
        (None, "no column joins the sides"),
    ],
)
def test_what_cannot_be_added_leaves_the_set(
    files: dict[str, Path], tmp_path: Path, lines: str | None, message: str
) -> None:
    run(files, "item,audio,text,image\na,1,t1,100\nb,2,t2,101\n")
    before = (tmp_path / "set" / "manifest.json").read_bytes()
    np.save(tmp_path / "depth.npy", numbers(4, 3))
    with pytest.raises(DataError, match=message):
        run(files, lines, side={"depth": tmp_path / "depth.npy"}, add=True)
    with pytest.raises(ConfigError, match="image cannot be added"):
        run(files, None, side={"image": tmp_path / "depth.npy"}, add=True)

    assert (tmp_path / "set" / "manifest.json").read_bytes() == before


def test_an_addition_that_is_killed_leaves_the_set(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "set"
    run(files, "item,audio,text,image\na,1,t1,100\n")
    np.save(tmp_path / "depth.npy", numbers(4, 3))
    added = {"side": {"depth": tmp_path / "depth.npy"}, "add": True}
    with monkeypatch.context() as patch:
        patch.setattr(outputs, "commit", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        patch.setattr(outputs, "cleanup", lambda _: None)  # as of a process that is gone
        with pytest.raises(KeyboardInterrupt):
            run(files, "text,depth\nt1,0\n", **added)

    assert FeatureSet.open(out).sides == ("image", "text", "audio")
    assert (tmp_path / "set.partial" / "sides" / "depth").is_dir()
    run(files, "text,depth\nt1,0\n", **added)
    assert FeatureSet.open(out).sides == ("image", "text", "audio", "depth")
    assert not (tmp_path / "set.partial").exists()


def test_sides_are_added_to_a_set_of_two(tmp_path: Path) -> None:
    out = tmp_path / "set"
    np.save(tmp_path / "d.npy", numbers(40, 3))
    csalign.import_arrays(numbers(40, 4), numbers(40, 5), out=out, test=0.25)
    before = FeatureSet.open(out)
    csalign.import_arrays(side={"depth": tmp_path / "d.npy"}, out=out, add=True, pair_by="order")
    after = FeatureSet.open(out)

    assert after.manifest.shards == before.manifest.shards
    assert after.table("depth").strings("split").equals(after.images.strings("split"))
    assert loaded(out).present.all()
    csalign.split(out, test=0.5, overwrite=True)
    counts = FeatureSet.open(out).splits()
    assert counts["test"] == {"images": 20, "texts": 20, "depth": 20}


def test_pairs_that_two_sides_lose_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sides = {
        "image": table(tmp_path / "i.parquet", numbers(3, 4), id=[*"abc"], item=[*"xxy"]),
        "text": table(tmp_path / "t.parquet", numbers(2, 3), item=[*"xy"]),
    }
    import_arrays(ImportConfig(side=sides, out=tmp_path / "set"))

    assert "several images are paired with the first of these, 2 of 3 pairs" in caplog.text


def test_a_side_is_added_by_the_ids_that_fit(tmp_path: Path) -> None:
    sides = {
        name: table(
            tmp_path / f"{name}.parquet",
            numbers(3, 4),
            id=[f"{name}{row}" for row in range(3)],
            item=[*"xyz"],
        )
        for name in ("audio", "text")
    }
    out = tmp_path / "set"
    import_arrays(ImportConfig(side=sides, out=out))
    depth = table(tmp_path / "d.parquet", numbers(2, 3), id=["audio2", "audio0"])
    added = import_arrays(ImportConfig(side={"depth": depth}, out=out, add=True))

    assert added.pairing == "item; depth: id of audio"
    assert items_of(out, "depth") == ["z", "x"]


def test_a_side_is_added_to_texts_alone(tmp_path: Path) -> None:
    out = tmp_path / "set"
    texts = table(tmp_path / "t.parquet", numbers(3, 4), text_id=[*"abc"])
    csalign.import_arrays(texts=texts, out=out)
    audio = table(tmp_path / "a.parquet", numbers(2, 3), text_id=["c", "a"])
    added = import_arrays(ImportConfig(side={"audio": audio}, out=out, add=True))

    assert added.counts is not None
    assert added.counts["by_sides"] == {"1": 1, "2": 2}
    assert items_of(out, "audio") == ["c", "a"]


def test_an_addition_to_a_set_that_another_changes_is_refused(
    files: dict[str, Path], tmp_path: Path
) -> None:
    run(files, "item,audio,text,image\na,1,t1,100\n")
    out = tmp_path / "set"
    np.save(tmp_path / "depth.npy", numbers(12, 3))

    def change(*_: Any) -> None:
        changed = schema.read_manifest(out).model_copy(update={"pairing": "of another process"})
        schema.write_manifest(out, changed)

    side = {"depth": tmp_path / "depth.npy"}
    config = ImportConfig(side=side, out=out, add=True, pair_by="order")
    with pytest.raises(DataError, match="was changed meanwhile; run the same command again"):
        import_arrays(config, change)
    assert FeatureSet.open(out).sides == ("image", "text", "audio")


def test_columns_of_items_have_one_length(tmp_path: Path) -> None:
    sides = {"audio": np.eye(3), "video": np.eye(3)}
    items = {"audio": [0, 1, 2], "video": [0, 1, 2], "depth": []}
    with pytest.raises(ShapeError, match="items: columns have different lengths"):
        csalign.import_arrays(sides=sides, items=items, out=tmp_path / "set")


def test_arrays_in_memory(tmp_path: Path) -> None:
    sides = {"audio": numbers(6, 3), "text": numbers(5, 4), "video": numbers(4, 2)}
    items = {"audio": [0, 1, None], "text": np.array([4, 3, 2]), "video": [1.0, np.nan, 2.0]}
    result = csalign.import_arrays(sides=sides, items=items, out=tmp_path / "set")
    frame = result.to_frame()

    assert isinstance(frame, pd.DataFrame)
    assert frame["side"].tolist() == ["text", "audio", "video"]
    assert result.counts is not None
    assert result.counts["pairs"] == {"text": {"audio": 2, "video": 2}, "audio": {"video": 1}}

    frame = pd.DataFrame({**items, "video": pd.array([1, None, 2], dtype="Int64")})
    again = csalign.import_arrays(sides=sides, items=frame, out=tmp_path / "again")
    assert again.counts == result.counts


def test_all_rows_of_an_item_are_in_one_split(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    sides = {"audio": rng.normal(size=(300, 8)), "text": rng.normal(size=(200, 8))}
    sides["video"] = rng.normal(size=(100, 8))
    items = {
        "item": [*range(100)] * 3,
        "audio": [*range(300)],
        "text": [*range(200), *[None] * 100],
        "video": [*range(100), *[None] * 200],
    }
    csalign.import_arrays(sides=sides, items=items, out=tmp_path / "set")
    result = csalign.split(tmp_path / "set", val=0.1, test=20)

    assert {name: own["items"] for name, own in result.splits.items()} == {
        **{"train": 70, "val": 10},
        "test": 20,
    }
    assert result.splits["test"] == {
        "images": 0,
        "audio": 60,
        "texts": 40,
        "video": 20,
        "items": 20,
    }
    split_of: dict[Any, set[Any]] = {}
    for side in sides:
        for item, split in zip(
            items_of(tmp_path / "set", side),
            items_of(tmp_path / "set", side, "split"),
            strict=True,
        ):
            split_of.setdefault(item, set()).add(split)
    assert {len(own) for own in split_of.values()} == {1}

    order = rng.permutation(300)
    shuffled = {**sides, "audio": sides["audio"][order]}
    rows = {**items, "audio": np.argsort(order).tolist()}
    swapped = dict(reversed(shuffled.items()))
    csalign.import_arrays(sides=swapped, items=rows, out=tmp_path / "again")
    csalign.split(tmp_path / "again", val=0.1, test=20)
    found = items_of(tmp_path / "again", "video"), items_of(tmp_path / "again", "video", "split")
    assert (
        dict(zip(*found, strict=True)).items()
        <= {item: next(iter(own)) for item, own in split_of.items()}.items()
    )


def test_copies_of_a_side_stay_together(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    audio, text = rng.normal(size=(60, 8)), rng.normal(size=(60, 8))
    audio[30:] = audio[:30]
    csalign.import_arrays(sides={"audio": audio, "text": text}, out=tmp_path / "set")
    result = csalign.split(tmp_path / "set", test=0.2)
    splits = items_of(tmp_path / "set", "audio", "split")

    assert (result.groups, result.grouped) == (30, 60)
    assert splits[:30] == splits[30:]
    assert "items in 30 groups" in result.kept_together


def test_copies_with_other_captions_stay_together_and_stored_splits_are_of_items(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    audio = numbers(60, 8)
    audio[30:] = audio[:30]
    splits = ["test", *[None] * 59]
    sides = {
        "audio": table(
            tmp_path / "a.parquet",
            audio,
            item=[*map(str, range(60))],
            caption=[f"sound {row}" for row in range(60)],
            split=splits,
        ),
        "text": table(tmp_path / "t.parquet", numbers(60, 4), item=[*map(str, range(60))]),
    }
    out = tmp_path / "set"
    import_arrays(ImportConfig(side=sides, out=out, val=10))
    found = items_of(out, "audio", "split")

    assert found[0] == "test"
    assert found[30] == "train"
    assert found[1:30] == found[31:]
    assert items_of(out, "text", "split") == found
    assert FeatureSet.open(out).splits()["val"] == {"images": 0, "texts": 10, "audio": 10}
    assert "1 item in train, where copies, near-duplicates or captions" in caplog.text


def test_two_sides_are_copied_by_item_with_their_splits(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sides = {"audio": numbers(40, 3), "text": numbers(40, 4), "video": numbers(40, 2)}
    items = {"audio": [*range(30)], "text": [*range(39, 9, -1)], "video": [*range(30)]}
    csalign.import_arrays(sides=sides, items=items, out=tmp_path / "set")
    csalign.split(tmp_path / "set", test=0.5)
    copy = {"names": ("audio", "text"), "pair_by": "item", "out": tmp_path / "pair"}
    result = csalign.import_arrays(tmp_path / "set/sides/audio", tmp_path / "set/texts", **copy)

    assert (result.images, result.texts, result.pairs) == (40, 40, 30)
    pair = FeatureSet.open(tmp_path / "pair")
    assert pair.texts.strings("image_id")[39].as_py() == "0"
    audio = FeatureSet.open(tmp_path / "set").table("audio")
    assert pair.images.strings("split").equals(audio.strings("split"))


def test_the_saved_configuration_imports_again(files: dict[str, Path], tmp_path: Path) -> None:
    run(files, "audio,text,image\n1,t1,100\n", encoder={"audio": "laion/clap"})
    saved = tmp_path / "set" / "config.toml"
    import_arrays(ImportConfig.resolve(saved, {"out": tmp_path / "again"}))

    assert (
        FeatureSet.open(tmp_path / "again").manifest.sides[side_of("audio")].encoder.spec
        == "laion/clap"
    )


def test_an_existing_set_is_not_replaced(files: dict[str, Path], tmp_path: Path) -> None:
    lines = "audio,text,image\n1,t1,100\n"
    run(files, lines)
    with pytest.raises(OutputError, match="exists"):
        run(files, lines)
    with pytest.raises(DataError, match="none: no such"):
        run(files, lines, add=True, out=tmp_path / "none")
