"""Keys of any type, name, place and form: the right pairs, or none."""

import decimal
import json
import logging
import unicodedata
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.numpy
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from csalign.core.errors import DataError
from csalign.features.reader import FeatureSet
from csalign.ingest.config import ImportConfig
from csalign.ingest.import_arrays import import_arrays

N = 10
IMAGES = np.random.default_rng(0).normal(size=(N, 5)).astype(np.float32)
TEXTS = np.ascontiguousarray(IMAGES[:, :3] + 2)  # so that a text can be recognised by its image
ORDER = np.array([7, 2, 0, 9, 4, 1, 8, 3, 6, 5])
COUNTS = list(range(N))
NUMBERS = [391895 + 13 * row for row in range(N)]
NAMES = [f"pic{row}a" for row in range(N)]
COUNTS = list(range(N))

Keys = list[Any]
Write = Callable[[Path, Keys, Keys, Any], tuple[Path, ...]]


def imported(folder: Path, *source: Path, **values: Any) -> tuple[FeatureSet, str | None]:
    out = folder / "out"
    result = import_arrays(ImportConfig(source=source, out=out, overwrite=True, **values))
    return FeatureSet.open(out), result.pairing


def wrong_pairs(features: FeatureSet) -> int:
    """Number of texts that have an image and not the one that they were made of."""
    row_of = {key: row for row, key in enumerate(features.images.column("id").to_pylist())}
    owners = features.texts.column("image_id").to_pylist()
    texts = features.texts.embeddings()
    images = features.images.embeddings()
    return sum(
        key is not None and not np.allclose(images[row_of[key], :3] + 2, own)
        for key, own in zip(owners, texts, strict=True)
    )


def column(values: Any) -> Any:
    return pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])


def parquet(folder: Path, images: Keys, texts: Keys, rows: Any) -> tuple[Path, ...]:
    return named_parquet("image_id", "image_id")(folder, images, texts, rows)


def named_parquet(image_name: str, text_name: str) -> Write:
    def write(folder: Path, images: Keys, texts: Keys, rows: Any) -> tuple[Path, ...]:
        pq.write_table(pa.table({image_name: images, "emb": column(IMAGES)}), folder / "i.parquet")
        pq.write_table(
            pa.table({text_name: texts, "emb": column(TEXTS[rows])}), folder / "t.parquet"
        )
        return folder / "i.parquet", folder / "t.parquet"

    return write


def beside(suffix: str, write: Callable[[Path, Keys], None]) -> Write:
    """A file of keys beside each array, in one folder."""

    def write_all(folder: Path, images: Keys, texts: Keys, rows: Any) -> tuple[Path, ...]:
        np.save(folder / "image.npy", IMAGES)
        np.save(folder / "text.npy", TEXTS[rows])
        write(folder / f"image_ids{suffix}", images)
        write(folder / f"text_image_ids{suffix}", texts)
        return folder / "image.npy", folder / "text.npy"

    return write_all


def in_folders(folder: Path, images: Keys, texts: Keys, rows: Any) -> tuple[Path, ...]:
    """Folders of shards with one list of keys each."""
    for side, values, keys in (("i", IMAGES, images), ("t", TEXTS[rows], texts)):
        (folder / side).mkdir(exist_ok=True)
        half = len(values) // 2
        np.save(folder / side / "emb_0.npy", values[:half])
        np.save(folder / side / "emb_1.npy", values[half:])
        np.save(folder / side / "ids.npy", np.array([str(key) for key in keys]))
    return folder / "i", folder / "t"


def hdf5_group(folder: Path, images: Keys, texts: Keys, rows: Any) -> tuple[Path, ...]:
    for side, values, keys in (("i", IMAGES, images), ("t", TEXTS[rows], texts)):
        with h5py.File(folder / f"{side}.h5", "w") as file:
            file["vectors/features"] = values
            file["meta/image_id"] = [str(key) for key in keys]
    return folder / "i.h5", folder / "t.h5"


def hdf5_attribute(folder: Path, images: Keys, texts: Keys, rows: Any) -> tuple[Path, ...]:
    for side, values, keys in (("i", IMAGES, images), ("t", TEXTS[rows], texts)):
        with h5py.File(folder / f"{side}.h5", "w") as file:
            file["features"] = values
            file["features"].attrs["ids"] = [str(key) for key in keys]
    return folder / "i.h5", folder / "t.h5"


def torch_list(folder: Path, images: Keys, texts: Keys, rows: Any) -> tuple[Path, ...]:
    for side, values, keys in (("i", IMAGES, images), ("t", TEXTS[rows], texts)):
        torch.save({"x": torch.from_numpy(values), "ids": keys}, folder / f"{side}.pt")
    return folder / "i.pt", folder / "t.pt"


def torch_groups(folder: Path, images: Keys, texts: Keys, rows: Any) -> tuple[Path, ...]:
    sides = {
        "image": {"features": torch.from_numpy(IMAGES), "ids": images},
        "text": {"features": torch.from_numpy(TEXTS[rows]), "ids": texts},
    }
    torch.save(sides, folder / "b.pt")
    return (folder / "b.pt",)


def npz(folder: Path, images: Keys, texts: Keys, rows: Any) -> tuple[Path, ...]:
    np.savez(folder / "i.npz", features=IMAGES, ids=np.array(images))
    np.savez(folder / "t.npz", features=TEXTS[rows], ids=np.array(texts))
    return folder / "i.npz", folder / "t.npz"


def two_lists(folder: Path, images: Keys, texts: Keys, rows: Any) -> tuple[Path, ...]:
    """Paths of which one list names its side."""
    both = {"image_emb": torch.from_numpy(IMAGES), "text_emb": torch.from_numpy(TEXTS[rows])}
    torch.save({**both, "image_paths": images, "paths": texts}, folder / "b.pt")
    return (folder / "b.pt",)


def txt2img(folder: Path, _: Keys, texts: Keys, rows: Any) -> tuple[Path, ...]:
    np.savez(folder / "b.npz", image_features=IMAGES, text_features=TEXTS[rows], txt2img=texts)
    return (folder / "b.npz",)


def npz_3d(folder: Path, images: Keys, texts: Keys, rows: Any) -> tuple[Path, ...]:
    np.savez(folder / "i.npz", features=IMAGES, ids=np.array(images))
    np.savez(folder / "t.npz", features=TEXTS[rows][:, None].repeat(2, 1), ids=np.array(texts))
    return folder / "i.npz", folder / "t.npz"


def tensor_of_keys(folder: Path, images: Keys, texts: Keys, rows: Any) -> tuple[Path, ...]:
    for side, values, keys in (("i", IMAGES, images), ("t", TEXTS[rows], texts)):
        own = {"x": values, "image_id": np.array([int(key) for key in keys])}
        safetensors.numpy.save_file(own, folder / f"{side}.safetensors")
    return folder / "i.safetensors", folder / "t.safetensors"


def rows_by_name(folder: Path, images: Keys, texts: Keys, rows: Any) -> tuple[Path, ...]:
    """A dict of vectors, whose names are the keys."""
    for side, values, keys in (("i", IMAGES, images), ("t", TEXTS[rows], texts)):
        own = {str(key): torch.tensor(vector) for key, vector in zip(keys, values, strict=True)}
        torch.save(own, folder / f"{side}.pt")
    return folder / "i.pt", folder / "t.pt"


def item_files(folder: Path, images: Keys, texts: Keys, rows: Any) -> tuple[Path, ...]:
    """A file per item, named by its key."""
    for side, values, keys in (("i", IMAGES, images), ("t", TEXTS[rows], texts)):
        (folder / side).mkdir(exist_ok=True)
        for old in (folder / side).iterdir():
            old.unlink()
        for key, vector in zip(keys, values, strict=True):
            torch.save(torch.tensor(vector)[None], folder / side / f"{key}.pt")
    return folder / "i", folder / "t"


def torch_index(folder: Path, images: Keys, texts: Keys, rows: Any) -> tuple[Path, ...]:
    """A dict of the row of each key, and one of the key of each row."""
    index = {key: row for row, key in enumerate(images)}
    torch.save({"x": torch.from_numpy(IMAGES), "name2idx": index}, folder / "i.pt")
    keys = dict(enumerate(texts))
    torch.save({"x": torch.from_numpy(TEXTS[rows]), "names": keys}, folder / "t.pt")
    return folder / "i.pt", folder / "t.pt"


def lists_beside(folder: Path, images: Keys, texts: Keys, rows: Any) -> tuple[Path, ...]:
    np.save(folder / "images.npy", IMAGES)
    np.save(folder / "texts.npy", TEXTS[rows])
    save_text(folder / "images.txt", images)
    save_text(folder / "texts.txt", texts)
    return folder / "images.npy", folder / "texts.npy"


def polars_ipc(folder: Path, images: Keys, texts: Keys, rows: Any) -> tuple[Path, ...]:
    """Dictionaries of string views, as polars writes categories."""
    for side, values, keys in (("i", IMAGES, images), ("t", TEXTS[rows], texts)):
        words = pa.DictionaryArray.from_arrays(
            pa.array(np.arange(N), pa.uint32()), pa.array(keys, pa.string_view())
        )
        table = pa.table({"sku": words, "emb": column(values)})
        with pa.ipc.new_file(folder / f"{side}.arrow", table.schema) as file:
            file.write_table(table)
    return folder / "i.arrow", folder / "t.arrow"


def label_tables(folder: Path, images: Keys, texts: Keys, rows: Any) -> tuple[Path, ...]:
    for side, values, keys in (("i", IMAGES, images), ("t", TEXTS[rows], texts)):
        np.save(folder / f"{side}.npy", values)
        pd.DataFrame({"file": keys, "n": range(len(keys))}).to_csv(folder / f"{side}.csv")
    return folder / "i.npy", folder / "t.npy"


def save_text(path: Path, keys: Keys) -> None:
    path.write_text("".join(f"{key}\n" for key in keys), encoding="utf-8")


def save_json(path: Path, keys: Keys) -> None:
    path.write_text(json.dumps(keys))


def save_columns(path: Path, keys: Keys) -> None:
    path.write_text(json.dumps({"key": keys, "n": list(range(100, 100 + len(keys)))}))


def save_index(path: Path, keys: Keys) -> None:
    path.write_text(json.dumps({key: row for row, key in enumerate(keys)}))


def save_rows(path: Path, keys: Keys) -> None:
    path.write_text(json.dumps({str(row): key for row, key in enumerate(keys)}))


def same(key: Any) -> Any:
    return key


def when(number: int) -> Any:
    return pd.Timestamp(number, unit="s")


UUIDS = [uuid.UUID(int=(1 << 100) + row) for row in range(N)]
# The place, the keys, and their form on the side of images and of texts.
CARRIERS: dict[str, tuple[Write, Keys, Callable[[Any], Any], Callable[[Any], Any]]] = {
    "integers": (parquet, NUMBERS, same, same),
    "floats": (parquet, NUMBERS, same, float),
    "floats as text": (parquet, NUMBERS, str, lambda n: f"{n}.0"),
    "decimals": (parquet, NUMBERS, same, decimal.Decimal),
    "bytes": (parquet, NUMBERS, same, lambda n: b"%d" % n),
    "written bytes": (parquet, NAMES, same, lambda n: str(n.encode())),
    "spaces": (parquet, NAMES, same, lambda n: f" {n} "),
    "lists of one": (parquet, NUMBERS, same, lambda n: [n]),
    "uuids and hex": (parquet, UUIDS, lambda u: u.bytes, lambda u: u.hex.upper()),
    "times": (parquet, NUMBERS, when, when),
    "leading zeros": (parquet, NUMBERS, lambda n: f"{n:012d}", same),
    "coco 2017": (parquet, NUMBERS, lambda n: f"{n:012d}.jpg", same),
    "coco 2014": (parquet, NUMBERS, lambda n: f"COCO_val2014_{n:012d}.jpg", same),
    "two roots": (
        parquet,
        NAMES,
        "/home/a/coco/val/{}.jpg".format,
        "/mnt/b/coco/val/{}.jpg".format,
    ),
    "folders that count": (
        *(parquet, NUMBERS, lambda n: f"/a/{n % 10}/{n // 10}.jpg"),
        lambda n: f"/b/c/{n % 10}/{n // 10}.jpg",
    ),
    "windows": (parquet, NAMES, "images/{}.jpg".format, r"D:\data\images\{}.jpg".format),
    "urls": (
        parquet,
        NAMES,
        "https://h.org/i/a {}.jpg?w=1".format,
        "file:///x/i/a%20{}.jpg".format,
    ),
    "case": (parquet, NAMES, "i/{}.jpg".format, lambda n: f"I/{n.upper()}.JPG"),
    "unicode": (
        *(parquet, NAMES, lambda n: unicodedata.normalize("NFD", f"é{n}")),
        lambda n: unicodedata.normalize("NFC", f"é{n}.jpg"),
    ),
    "another name": (named_parquet("photo", "bild"), NAMES, "{}.png".format, "{}.png".format),
    "own ids": (named_parquet("image_id", "id"), NAMES, same, same),
    "reference": (named_parquet("id", "photo_id"), NAMES, same, same),
    "npy beside": (beside(".npy", lambda p, k: np.save(p, np.array(k))), NAMES, same, same),
    "txt beside": (beside(".txt", save_text), NAMES, same, same),
    "json beside": (beside(".json", save_json), NAMES, same, same),
    "index beside": (beside(".json", save_index), NAMES, same, same),
    "columns beside": (beside(".json", save_columns), NAMES, same, same),
    "bytes beside": (beside(".npy", lambda p, k: np.save(p, np.array(k, "S"))), NAMES, same, same),
    "shards": (in_folders, NUMBERS, same, same),
    "csv beside": (label_tables, NAMES, "{}.jpg".format, "{}.jpg".format),
    "hdf5 group": (hdf5_group, NUMBERS, same, same),
    "hdf5 attribute": (hdf5_attribute, NAMES, same, same),
    "torch tensors": (torch_list, NUMBERS, same, torch.tensor),
    "torch 1-D": (torch_list, NUMBERS, same, float),
    "torch groups": (torch_groups, NAMES, same, same),
    "npz": (npz, NAMES, same, same),
    "npz of uuids": (npz, UUIDS, lambda u: np.void(u.bytes), str),
    "npz 3-D": (npz_3d, NAMES, same, same),
    "safetensors": (tensor_of_keys, NUMBERS, same, same),
    "names of rows": (rows_by_name, NAMES, same, same),
    "caption numbers": (
        *(named_parquet("image", "caption_id"), NAMES, "{}.jpg".format, "{}.jpg#3".format),
    ),
    "numbered files": (*(named_parquet("path", "image"), COUNTS, "data/{}.jpg".format, str),),
    "hash": (
        named_parquet("sha256", "sha256"),
        NAMES,
        lambda n: f"{n:0>64}",
        lambda n: f"{n:0>64}",
    ),
    "captions": (named_parquet("caption", "caption"), NAMES, same, same),
    "places of images": (named_parquet("image_id", "image_idx"), list(range(N)), same, same),
    "two lists in a file": (two_lists, NAMES, "{}.jpg".format, "{}.jpg".format),
    "txt2img": (txt2img, list(range(N)), same, same),
    "item files": (item_files, NAMES, same, same),
    "torch index": (torch_index, NAMES, same, same),
    "rows beside": (beside(".json", save_rows), NAMES, same, same),
    "names in text files": (lists_beside, NAMES, "{}.jpg".format, "{}.jpg".format),
    "numbered captions": (lists_beside, NAMES, "{}.jpg".format, "{}.jpg#0\tA dog .".format),
    "categories of polars": (polars_ipc, NAMES, same, same),
    "images of datasets": (
        *(named_parquet("image", "image"), NAMES),
        *(lambda n: {"bytes": b"x" * 90, "path": f"{n}.jpg"},) * 2,
    ),
    "places beside ids": (named_parquet("image_id", "image_idx"), COUNTS, NUMBERS.__getitem__, int),
    "counting": (parquet, list(range(N)), same, same),
}


@pytest.mark.parametrize("kind", CARRIERS)
@settings(max_examples=4, deadline=None, suppress_health_check=list(HealthCheck))
@given(rows=st.permutations(range(N)))
def test_any_order_of_the_rows_gives_the_same_pairs(
    tmp_path: Path, kind: str, rows: list[int]
) -> None:
    write, keys, image_form, text_form = CARRIERS[kind]
    sources = write(tmp_path, [*map(image_form, keys)], [text_form(keys[r]) for r in rows], rows)
    features, pairing = imported(tmp_path, *sources)

    assert (wrong_pairs(features), features.manifest.counts.pairs % N) == (0, 0)
    assert pairing != "row order"


def tables(folder: Path, images: dict[str, Any], texts: dict[str, Any], rows: Any = None) -> Any:
    """Parquet of both sides as pandas writes it; the texts are those of `rows`."""
    rows = np.arange(N) if rows is None else rows
    pd.DataFrame({**images, "emb": list(IMAGES)}).to_parquet(folder / "i.parquet")
    pd.DataFrame({**texts, "emb": list(TEXTS[rows])}).to_parquet(folder / "t.parquet")
    return folder / "i.parquet", folder / "t.parquet"


# Columns that fit by chance, or not at all, and are not keys of images: pairs by the order of rows.
UNRELATED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "own counters": ({"image_id": COUNTS}, {"text_id": COUNTS}),
    "own ids": ({"image_id": NAMES}, {"caption_id": [f"t{n}" for n in COUNTS]}),
    "lengths": ({"image_id": COUNTS}, {"n_tokens": [7, 7, 5, 6, 7, 5, 6, 7, 7, 9]}),
    "lengths and numbered files": (
        {"path": [f"data/{n}.jpg" for n in COUNTS]},
        {"n_tokens": [7, 7, 5, 6, 7, 5, 6, 7, 7, 9]},
    ),
    "ranks and numbered names": (
        {"name": [f"sample{n}" for n in COUNTS]},
        {"rank": [1, 0, 3, 2, 1, 0, 3, 2, 1, 0]},
    ),
    "classes": ({"label": [0, 1] * 5}, {"label": [1, 0] * 5}),
    "users": ({"user_id": NAMES[:5] * 2}, {"user_id": NAMES[3:8] * 2}),
    "scores": ({"score": np.linspace(0, 1, N)}, {"score": np.linspace(1, 2, N)}),
    "one side": ({"image_id": NAMES}, {"lang": ["en"] * N}),
    "years": ({"year": [1999, 2003, 2003, *range(2008, 2015)]}, {"year": [2010, 2003] * 5}),
    "lengths of texts": ({"year": [*range(2000, 2010)]}, {"n_chars": [*range(1995, 2005)]}),
    "ranks": ({"rank": COUNTS}, {"rank": COUNTS[::-1]}),
    "numbers of things": ({"number_of_objects": COUNTS[::-1]}, {"position": COUNTS[::-1]}),
    "no key": ({"width": [640] * N}, {"lang": ["en"] * N}),
}


@pytest.mark.parametrize("kind", UNRELATED)
def test_chance_does_not_pair(tmp_path: Path, kind: str) -> None:
    features, pairing = imported(tmp_path, *tables(tmp_path, *UNRELATED[kind]))

    assert (wrong_pairs(features), features.manifest.counts.pairs, pairing) == (0, N, "row order")


def take(values: list[Any], rows: Any = ORDER) -> list[Any]:
    return [values[row] for row in rows]


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "nothing shared": (
        *({"image_id": NAMES}, {"image_id": [f"x{n}" for n in COUNTS]}),
        "'x0', 'x1', 'x2' of the texts, 'pic0a', 'pic1a', 'pic2a' of the images; .*--pair-by order",
    ),
    "one is missing": (
        *({"file": NAMES}, {"file": take([*NAMES[:9], "other"])}),
        r"t\.parquet: file: image 'other' of text row 3 is unknown",
    ),
    "counters in another order": (
        *({"image_id": COUNTS}, {"text_id": take(COUNTS)}),
        "text_id has the numbers of image_id .* may be chance; .* --pair-by text_id",
    ),
    "two keys": (
        *({"image_id": COUNTS, "file": NAMES}, {"image_id": COUNTS, "file": take(NAMES)}),
        r"row 0: belongs to image '0' by image_id, and to '7' by file; .* --pair-by file",
    ),
    "index of a table": (
        *({"width": [640] * N}, {"__index_level_0__": take(COUNTS)}),
        "__index_level_0__ numbers the rows in another order",
    ),
    "index with gaps": (
        *({"idx": [0, 1, *range(3, 11)]}, {"idx": [*range(7), 8, 9, 10]}),
        "idx: image '2' of text row 2 is unknown",
    ),
    "two columns": (
        {"video": NAMES[:5] * 2, "frame": [0] * 5 + [9] * 5},
        {"video": take(NAMES[:5] * 2), "frame": take([0] * 5 + [9] * 5)},
        "video and frame together name the rows, which are in another order",
    ),
    "large floats": (
        *({"tweet_id": [10**18 + n for n in COUNTS]}, {"tweet_id": [1e18 + n for n in COUNTS]}),
        "row 0: tweet_id is 1e[+]18, and floats above 2[*][*]53 do not keep every integer",
    ),
    "an image twice": (
        *({"file": [*NAMES[:9], NAMES[0]]}, {"file": take(NAMES[:9] + NAMES[:1])}),
        r"i\.parquet, row 9: duplicate file 'pic0a'",
    ),
    "splits of one name": (
        {"path": [f"data/train/{n}.jpg" for n in NAMES]},
        {"path": [f"data/val/{n}.jpg" for n in take(NAMES)]},
        "path: image 'data/val/pic7a.jpg' of text row 0 is unknown",
    ),
    "names and numbers": (
        *({"image_id": NUMBERS}, {"image_path": take(NAMES)}),
        "'pic7a', 'pic2a', 'pic0a' of the texts, '391895', '391908', '391921' of the images",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_keys_that_do_not_fit_are_refused(tmp_path: Path, kind: str) -> None:
    images, texts, message = REFUSED[kind]
    sources = tables(tmp_path, images, texts)

    with pytest.raises(DataError, match=message):
        imported(tmp_path, *sources)
    features, pairing = imported(tmp_path, *sources, pair_by="order")
    assert (wrong_pairs(features), pairing) == (0, "row order")


def test_objects_are_refused_as_keys_and_named_as_captions(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for side, values in (("i", IMAGES), ("t", TEXTS)):
        np.savez(tmp_path / f"{side}.npz", x=values, names=np.array(NAMES, object))
    with pytest.raises(DataError, match=r"names looks like keys but contains Python objects"):
        imported(tmp_path, tmp_path / "i.npz", tmp_path / "t.npz")

    np.savez(tmp_path / "i.npz", x=IMAGES)
    np.savez(tmp_path / "t.npz", text_features=TEXTS, captions=np.array(NAMES, object))
    assert wrong_pairs(imported(tmp_path, tmp_path / "i.npz", tmp_path / "t.npz")[0]) == 0
    assert "captions contains Python objects and is not read" in caplog.text


def test_item_files_of_other_items_are_refused(tmp_path: Path) -> None:
    sources = item_files(tmp_path, NAMES, [*NAMES[:9], "other"], np.arange(N))
    with pytest.raises(DataError, match="file: image 'other' of text row 0 is unknown"):
        imported(tmp_path, *sources)


def test_texts_without_a_key_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sources = tables(tmp_path, {"image_id": NAMES}, {"image_id": [*NAMES[:9], None]})
    assert imported(tmp_path, *sources)[0].manifest.counts.pairs == 9
    assert "t.parquet: 1 texts have no image, as they have no image_id" in caplog.text


def test_a_table_beside_a_file_of_both_sides_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    np.savez(tmp_path / "0001.npz", b32_img=IMAGES, b32_txt=TEXTS)
    pd.DataFrame({"uid": NAMES}).to_parquet(tmp_path / "0001.parquet")
    assert wrong_pairs(imported(tmp_path, tmp_path / "0001.npz")[0]) == 0
    assert "0001.parquet: has one value per row and is not read" in caplog.text


def test_keys_beside_arrays_that_cannot_be_read_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    np.save(tmp_path / "image.npy", IMAGES)
    np.save(tmp_path / "text.npy", TEXTS)
    (tmp_path / "image_ids.json").write_text("[1, 2")
    imported(tmp_path, tmp_path / "image.npy", tmp_path / "text.npy")
    assert "image_ids.json: cannot be read" in caplog.text


def test_fewer_texts_that_count_from_0_are_not_the_first_images(tmp_path: Path) -> None:
    pd.DataFrame({"id": COUNTS, "emb": list(IMAGES)}).to_parquet(tmp_path / "i.parquet")
    pd.DataFrame({"id": COUNTS[:6], "emb": list(TEXTS[:6])}).to_parquet(tmp_path / "t.parquet")

    with pytest.raises(DataError, match="10 images and 6 texts: counts differ"):
        imported(tmp_path, tmp_path / "i.parquet", tmp_path / "t.parquet")


def test_a_column_of_one_side_pairs_with_what_fits_if_asked_for(tmp_path: Path) -> None:
    sources = tables(tmp_path, {"image_id": COUNTS}, {"text_id": take(COUNTS)}, ORDER)
    features, pairing = imported(tmp_path, *sources, pair_by="text_id")

    assert (wrong_pairs(features), pairing) == (0, "text_id")


def shards(folder: Path, values: Any, ends: list[int], numbers: list[int]) -> Path:
    folder.mkdir(exist_ok=True)
    for number, part in zip(numbers, np.split(values, ends), strict=True):
        np.save(folder / f"emb_{number}.npy", part)
    return folder


def test_shards_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    texts = shards(tmp_path / "t", TEXTS, [4, 8], [0, 1, 2])
    cases = {
        r"a: emb_1\.npy is followed by emb_3\.npy": ([4, 8], [0, 1, 3]),
        r"emb_1\.npy: has 2 rows and .*emb_1\.npy has 4, so parts do not belong": (
            *([4, 6], [0, 1, 2]),
        ),
    }
    for message, (ends, numbers) in cases.items():
        for path in (tmp_path / "a").glob("*"):
            path.unlink()
        images = shards(tmp_path / "a", IMAGES, ends, numbers)
        with pytest.raises(DataError, match=message + "[\\s\\S]* --pair-by order"):
            imported(tmp_path, images, texts)
        assert wrong_pairs(imported(tmp_path, images, texts, pair_by="order")[0]) == 0


def test_unnamed_arrays_of_both_sides_are_not_one_array(tmp_path: Path) -> None:
    both = tmp_path / "both.npz"
    np.savez(both, IMAGES, IMAGES + 1)
    np.save(tmp_path / "t.npy", TEXTS)

    with pytest.raises(DataError, match=r"both\.npz:arr_0 and 1 more are read as one array"):
        imported(tmp_path, both, both)
    with pytest.raises(
        DataError, match=r"both\.npz:arr_0 and 1 more arrays .* 20 rows, and .* 10;"
    ):
        imported(tmp_path, both, tmp_path / "t.npy")
    features, _ = imported(tmp_path, Path(f"{both}:arr_0"), tmp_path / "t.npy")
    assert wrong_pairs(features) == 0


@pytest.mark.parametrize(
    ("different", "said"), [(N, "30 image rows are 10 images"), (1, "3 image rows are 1 image,")]
)
def test_rows_of_equal_embeddings_are_one_image(
    different: int, said: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    np.save(tmp_path / "image.npy", np.tile(IMAGES[:different], (3, 1)).astype(np.float16))
    np.save(tmp_path / "text.npy", np.tile(TEXTS[:different], (3, 1)))
    with caplog.at_level(logging.INFO, "csalign"):
        features, pairing = imported(tmp_path, tmp_path / "image.npy", tmp_path / "text.npy")

    each, counts = 3 * different, features.manifest.counts
    assert (counts.images, counts.texts, counts.pairs, pairing) == (
        *(different, each, each),
        "row order",
    )
    owners = [str(row) for row in range(different)] * 3
    assert features.texts.column("image_id").to_pylist() == owners
    assert said in caplog.text


def test_rows_of_equal_embeddings_with_own_ids_or_splits_stay_apart(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "df.parquet"
    frame = {"image_emb": list(IMAGES) * 2, "text_emb": list(TEXTS) * 2}
    pd.DataFrame({**frame, "key": range(2 * N)}).to_parquet(path)
    assert imported(tmp_path, path)[0].manifest.counts.images == 2 * N
    assert "20 image rows have 10 embeddings, but each its own key" in caplog.text

    pd.DataFrame({**frame, "split": ["train"] * N + ["test"] * N}).to_parquet(path)
    assert imported(tmp_path, path)[0].manifest.counts.images == 2 * N
    pd.DataFrame({**frame, "width": [640] * 2 * N}).to_parquet(path)
    assert imported(tmp_path, path)[0].manifest.counts.images == N


@pytest.mark.parametrize("name", ["ids.npy", "image_names.txt", "metadata.csv"])
def test_keys_beside_one_array_are_named(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    np.save(tmp_path / "image.npy", IMAGES)
    np.save(tmp_path / "text.npy", TEXTS)
    if name.endswith(".npy"):
        np.save(tmp_path / name, np.array(NAMES))
    else:
        (tmp_path / name).write_text("id\n" * name.endswith("csv") + "\n".join(NAMES))
    features, _ = imported(tmp_path, tmp_path / "image.npy", tmp_path / "text.npy")
    assert wrong_pairs(features) == 0
    assert f"{name}: has one value per row and is not read; pass it with --image-t" in caplog.text

    table = {"image_table": tmp_path / name}
    features, _ = imported(tmp_path, tmp_path / "image.npy", tmp_path / "text.npy", **table)
    ids = [str(row) for row in COUNTS] if name.startswith("image_names") else NAMES
    assert features.images.column("id").to_pylist() == ids


def test_files_beside_arrays_are_named_in_one_line_if_they_may_be_keys(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    np.save(tmp_path / "image.npy", IMAGES)
    np.save(tmp_path / "text.npy", TEXTS)
    for name in ("a_ids.csv", "b_keys.csv", "metadata.csv", "results.csv", "prices.csv"):
        (tmp_path / name).write_text("x\n" + "\n".join(NAMES))
    features, pairing = imported(tmp_path, tmp_path / "image.npy", tmp_path / "text.npy")

    assert (wrong_pairs(features), pairing) == (0, "row order")
    warnings = [
        record.message for record in caplog.records if "one value per row" in record.message
    ]
    assert len(warnings) == 1
    assert "a_ids.csv: has one value per row and is not read" in warnings[0]
    assert warnings[0].endswith("(2 more files are like it)")


def test_some_known_keys_beside_a_layout_must_agree_with_it(tmp_path: Path) -> None:
    layout = {"captions_per_image": 1, "caption_order": "blocks"}
    keys = [*NAMES[:8], "x", "y"]
    sources = tables(tmp_path, {"file": NAMES}, {"file": keys})
    assert wrong_pairs(imported(tmp_path, *sources, **layout)[0]) == 0

    sources = tables(tmp_path, {"file": NAMES}, {"file": [keys[1], keys[0], *keys[2:]]})
    with pytest.raises(DataError, match=r"row 0: belongs to image '0' by 1 captions .*'1' by file"):
        imported(tmp_path, *sources, **layout)
