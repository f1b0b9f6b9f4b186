"""Pairs of every form of input: which image each text gets, and how that is said."""

import decimal
import json
import logging
import subprocess
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.numpy
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from csalign.core.errors import ConfigError, CsalignError, DataError
from csalign.features.reader import FeatureSet
from csalign.features.schema import read_manifest
from csalign.ingest.config import ImportConfig
from csalign.ingest.import_arrays import import_arrays

N = 12
IMAGES = np.random.default_rng(0).normal(size=(N, 6)).astype(np.float32)
TEXTS = IMAGES[:, :4] + 1  # so that a text can be recognised by its image
ORDER = np.random.default_rng(1).permutation(N)


def imported(out: Path, **values: Any) -> FeatureSet:
    import_arrays(ImportConfig(**values, out=out, overwrite=True))
    return FeatureSet.open(out)


def right_pairs(features: FeatureSet) -> int:
    """Number of texts whose image is the one they were made of."""
    row_of = {key: row for row, key in enumerate(features.images.column("id").to_pylist())}
    owners = [row_of[key] for key in features.texts.column("image_id").to_pylist()]
    images = features.images.embeddings()[owners, :4]
    return int((np.abs(images + 1 - features.texts.embeddings()) < 1e-6).all(axis=1).sum())


def column(values: Any) -> Any:
    return pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])


def write_parquet(folder: Path, image_keys: Any, text_keys: Any, name: str, text_name: str) -> None:
    images = pa.table({name: image_keys, "embedding": column(IMAGES)})
    pq.write_table(images, folder / "i.parquet")
    texts = {text_name: text_keys, "embedding": column(TEXTS[ORDER])}
    pq.write_table(pa.table(texts), folder / "t.parquet")


NUMBERS = [100 + row for row in range(N)]
UUIDS = [uuid.UUID(int=row).bytes for row in range(N)]


def picked(values: list[Any]) -> list[Any]:
    return [values[row] for row in ORDER]


KEYS: dict[str, tuple[Any, Any, str, str, str]] = {
    "integers": (pa.array(NUMBERS), picked(NUMBERS), "image_id", "image_id", "image_id"),
    "floats": (NUMBERS, picked([float(n) for n in NUMBERS]), "image_id", "image_id", "image_id"),
    "text": (NUMBERS, picked([str(n) for n in NUMBERS]), "image_id", "image_id", "image_id"),
    "bytes": (NUMBERS, picked([b"%d" % n for n in NUMBERS]), "id", "image_id", "image_id"),
    "decimals": (
        NUMBERS,
        picked([decimal.Decimal(n) for n in NUMBERS]),
        "image_id",
        "image_id",
        "image_id",
    ),
    "uuids": (pa.array(UUIDS, pa.binary(16)), picked(UUIDS), "uuid", "uuid", "uuid"),
    "categories": (
        pa.array([f"k{n}" for n in NUMBERS]).dictionary_encode(),
        pa.array(picked([f"k{n}" for n in NUMBERS])).dictionary_encode(),
        "key",
        "key",
        "key",
    ),
    "structs": (
        [str(n) for n in NUMBERS],
        picked([{"id": str(n)} for n in NUMBERS]),
        "image_id",
        "image_id",
        "image_id",
    ),
    "another name": (
        [f"{n}.jpg" for n in NUMBERS],
        picked([f"{n}.jpg" for n in NUMBERS]),
        "filename",
        "filename",
        "filename",
    ),
    "camel case": (NUMBERS, picked(NUMBERS), "imageId", "ImageID", "ImageID"),
    "two names": (
        [f"{n}.jpg" for n in NUMBERS],
        picked([f"{n}.jpg" for n in NUMBERS]),
        "path",
        "image",
        "image",
    ),
    "leading zeros": (
        [f"{n:012d}" for n in NUMBERS],
        picked(NUMBERS),
        "image_id",
        "image_id",
        "image_id, as numbers",
    ),
    "paths": (
        [f"images/train/{n}.jpg" for n in NUMBERS],
        picked([f".\\images\\train\\{n}.jpg" for n in NUMBERS]),
        "path",
        "path",
        "path, as clean paths",
    ),
    "file names": (
        [f"images/train/a{n}.jpg" for n in NUMBERS],
        picked([f"a{n}.jpg" for n in NUMBERS]),
        "path",
        "path",
        "path, by file name",
    ),
    "extensions": (
        [f"images/a{n}.jpg" for n in NUMBERS],
        picked([f"a{n}" for n in NUMBERS]),
        "path",
        "image_id",
        "image_id, without extensions",
    ),
    "coco": (
        [f"val2017/{n:012d}.jpg" for n in NUMBERS],
        picked(NUMBERS),
        "file_name",
        "image_id",
        "image_id, without extensions, as numbers",
    ),
    "unicode": (
        [f"caf\u00e9 {n}" for n in NUMBERS],
        picked([f"cafe\u0301 {n}" for n in NUMBERS]),
        "key",
        "key",
        "key, in Unicode form NFC",
    ),
}


@pytest.mark.parametrize("kind", KEYS)
def test_a_key_pairs_whatever_its_type_name_and_form(tmp_path: Path, kind: str) -> None:
    *keys, said = KEYS[kind]
    write_parquet(tmp_path, *keys)
    config = ImportConfig(
        source=(tmp_path / "i.parquet", tmp_path / "t.parquet"), out=tmp_path / "out"
    )
    result = import_arrays(config)

    assert right_pairs(FeatureSet.open(tmp_path / "out")) == N
    assert result.pairing == read_manifest(tmp_path / "out").pairing == said


def beside_npz(folder: Path, image_ids: list[str], rows: Any, text_ids: list[str]) -> list[Path]:
    np.savez(folder / "i.npz", features=IMAGES, ids=np.array(image_ids))
    np.savez(folder / "t.npz", features=TEXTS[rows], image_ids=np.array(text_ids))
    return [folder / "i.npz", folder / "t.npz"]


def beside_hdf5(folder: Path, image_ids: list[str], rows: Any, text_ids: list[str]) -> list[Path]:
    for name, values, ids in (("i", IMAGES, image_ids), ("t", TEXTS[rows], text_ids)):
        with h5py.File(folder / f"{name}.h5", "w") as file:
            file["features"] = values
            file["ids"] = ids
    return [folder / "i.h5", folder / "t.h5"]


def beside_torch(folder: Path, image_ids: list[str], rows: Any, text_ids: list[str]) -> list[Path]:
    both = {"image_features": torch.from_numpy(IMAGES), "image_ids": image_ids}
    both |= {"text_features": torch.from_numpy(TEXTS[rows]), "text_image_ids": text_ids}
    torch.save(both, folder / "both.pt")
    return [folder / "both.pt"]


def in_tables(folder: Path, image_ids: list[str], rows: Any, text_ids: list[str]) -> list[Path]:
    images, texts = {"key": image_ids, "emb": list(IMAGES)}, {"key": text_ids}
    pd.DataFrame(images).to_parquet(folder / "i.parquet")
    pl.DataFrame({**texts, "emb": TEXTS[rows]}).write_parquet(folder / "t.parquet")
    return [folder / "i.parquet", folder / "t.parquet"]


def in_safetensors(
    folder: Path, image_ids: list[str], rows: Any, text_ids: list[str]
) -> list[Path]:
    for name, values, ids in (("i", IMAGES, image_ids), ("t", TEXTS[rows], text_ids)):
        own = {"x": np.ascontiguousarray(values), "ids": np.array([int(key) for key in ids])}
        safetensors.numpy.save_file(own, folder / f"{name}.safetensors")
    return [folder / "i.safetensors", folder / "t.safetensors"]


CARRIERS = (beside_npz, beside_hdf5, beside_torch, in_tables, in_safetensors)


@pytest.mark.parametrize("write", CARRIERS)
@settings(max_examples=5, deadline=None, suppress_health_check=list(HealthCheck))
@given(rows=st.lists(st.integers(0, N - 1), min_size=1, max_size=2 * N))
def test_any_order_and_number_of_texts_pairs_by_the_key(
    tmp_path: Path, write: Callable[..., list[Path]], rows: list[int]
) -> None:
    ids = [str(1000 + row) for row in range(N)]
    sources = write(tmp_path, ids, rows, [ids[row] for row in rows])
    features = imported(tmp_path / "out", source=tuple(sources))

    assert right_pairs(features) == len(rows)


def test_columns_that_share_nothing_are_refused_and_order_is_the_way_to_insist(
    tmp_path: Path,
) -> None:
    write_parquet(tmp_path, [f"a{n}" for n in NUMBERS], [f"b{n}" for n in NUMBERS], "key", "key")
    given = {"images": tmp_path / "i.parquet", "texts": tmp_path / "t.parquet"}
    shown = "'b100', 'b101', 'b102' of the texts, 'a100', 'a101', 'a102' of the images"
    with pytest.raises(DataError, match=rf"t\.parquet: key: .*{shown}; .* --pair-by order"):
        imported(tmp_path / "out", **given)
    features = imported(tmp_path / "out", **given, pair_by="order")

    assert features.texts.column("image_id").to_pylist() == [f"a{n}" for n in NUMBERS]
    assert read_manifest(tmp_path / "out").pairing == "row order"


def test_an_ambiguous_form_is_not_used(tmp_path: Path) -> None:
    paths = [f"{row % 2}/{row // 2}.jpg" for row in range(N)]
    names = [f"{row // 2}.jpg" for row in range(N)]
    write_parquet(tmp_path, paths, names, "path", "path")

    with pytest.raises(DataError, match=r"t\.parquet: path: image '0.jpg' of text row 0 is unkno"):
        imported(tmp_path / "out", images=tmp_path / "i.parquet", texts=tmp_path / "t.parquet")


def test_a_named_column_pairs_and_must_be_there(tmp_path: Path) -> None:
    write_parquet(tmp_path, NUMBERS, picked(NUMBERS), "n", "n")
    given = {"images": tmp_path / "i.parquet", "texts": tmp_path / "t.parquet"}

    assert right_pairs(imported(tmp_path / "out", **given, pair_by="n")) == N
    with pytest.raises(DataError, match=r"has no column 'm' \(columns of the texts: n\); correct"):
        imported(tmp_path / "out", **given, pair_by="m")
    with pytest.raises(ConfigError, match="--captions-per-image and --pair-by define the pairs"):
        imported(
            tmp_path / "out", **given, pair_by="n", captions_per_image=1, caption_order="blocks"
        )


FRAMES = {
    "clip-retrieval names": ("img_emb", "txt_emb"),
    "two words": ("image_embedding", "caption_emb"),
    "with a model": ("clip_image", "clip_text"),
    "vision and language": ("vision_features", "language_features"),
    "numbered": ("imgEmb", "titleEmbedding"),
    "one is known": ("picture_vector", "v"),
    "the other is known": ("v", "description_embedding"),
    "hub": ("image_embeds", "text_embeds"),
}


@pytest.mark.parametrize("names", FRAMES.values(), ids=FRAMES)
@pytest.mark.parametrize("library", ["pandas", "polars"])
def test_two_vector_columns_of_a_frame_are_the_sides(
    tmp_path: Path, names: tuple[str, str], library: str
) -> None:
    frame = {"path": [f"{n}.jpg" for n in NUMBERS], "caption": [f"c{n}" for n in NUMBERS]}
    if library == "pandas":
        both = dict(zip(names, (list(IMAGES), list(TEXTS)), strict=True))
        pd.DataFrame(frame | both).to_parquet(tmp_path / "df.parquet")
    else:
        pl.DataFrame(frame | dict(zip(names, (IMAGES, TEXTS), strict=True))).write_parquet(
            tmp_path / "df.parquet"
        )
    features = imported(tmp_path / "out", source=tmp_path / "df.parquet")

    np.testing.assert_array_equal(features.images.embeddings(), IMAGES)
    np.testing.assert_array_equal(features.texts.embeddings(), TEXTS)
    assert right_pairs(features) == N
    assert features.images.column("source").to_pylist() == frame["path"]
    assert features.texts.column("caption").to_pylist() == frame["caption"]


REFUSED_FRAMES: list[tuple[dict[str, Any], str]] = [
    (
        {"a": IMAGES, "b": TEXTS},
        r"\(arrays: a, b\); name them, .* --image-column a --text-column b",
    ),
    ({"img_a": IMAGES, "img_b": IMAGES, "txt": TEXTS}, "img_a, img_b are all named like image"),
    ({"img_emb": IMAGES, "b": TEXTS, "c": TEXTS}, r"look.* the text .*--text-column b"),
    (
        {"img_emb": [str(row.tolist()) for row in IMAGES], "txt_emb": TEXTS},
        r"no image embeddings; img_emb contains .*string .*: store one list of floats per row: df",
    ),
]


@pytest.mark.parametrize(("columns", "message"), REFUSED_FRAMES)
def test_columns_that_do_not_say_their_side_are_named_with_the_options(
    tmp_path: Path, columns: dict[str, Any], message: str
) -> None:
    pd.DataFrame({name: list(own) for name, own in columns.items()}).to_parquet(
        tmp_path / "df.parquet"
    )

    with pytest.raises(DataError, match=message):
        imported(tmp_path / "out", source=tmp_path / "df.parquet")


def test_vectors_that_are_not_imported_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    frame = {"image_emb": list(IMAGES), "text_emb": list(TEXTS), "dino": list(IMAGES)}
    pd.DataFrame(frame).to_parquet(tmp_path / "df.parquet")
    with caplog.at_level(logging.WARNING, "csalign"):
        imported(tmp_path / "out", source=tmp_path / "df.parquet")

    assert "df.parquet:dino is not imported" in caplog.text
    assert "text_emb" not in caplog.text


def long_table(path: Path, key: str, **changes: Any) -> Any:
    """Three captions per image, rows shuffled."""
    rows = np.random.default_rng(2).permutation(np.repeat(np.arange(N), 3))
    frame = {key: [f"{row}.jpg" for row in rows], "caption": [f"c{k}" for k in range(len(rows))]}
    frame |= {"img_emb": list(IMAGES[rows]), "txt_emb": list(TEXTS[rows])}
    pd.DataFrame(frame | changes).to_parquet(path)
    return rows


@pytest.mark.parametrize("key", ["path", "image_id", "url", "filename", "image", "id", "key"])
def test_rows_of_one_key_are_one_image(
    tmp_path: Path, key: str, caplog: pytest.LogCaptureFixture
) -> None:
    long_table(tmp_path / "df.parquet", key)
    with caplog.at_level(logging.INFO, "csalign"):
        features = imported(tmp_path / "out", source=tmp_path / "df.parquet")

    assert f"df.parquet: 36 rows, 12 images, by {key}" in caplog.text
    assert (len(features.images), len(features.texts)) == (N, 3 * N)
    assert right_pairs(features) == 3 * N
    assert read_manifest(tmp_path / "out").pairing == key


def test_any_column_can_be_the_key_if_asked_for(tmp_path: Path) -> None:
    rows = long_table(tmp_path / "df.parquet", "scene")
    features = imported(tmp_path / "out", source=tmp_path / "df.parquet", id_column="scene")

    assert right_pairs(features) == 3 * N
    assert features.images.column("id").to_pylist() == [
        f"{row}.jpg" for row in dict.fromkeys(rows.tolist())
    ]
    with pytest.raises(DataError, match=r"has no column 'film' .*; correct --id-column"):
        imported(tmp_path / "out", source=tmp_path / "df.parquet", id_column="film")


def test_a_key_of_different_embeddings_is_no_image(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "df.parquet"
    rows = long_table(path, "path")
    changed = IMAGES[rows]
    first, second, *_ = np.flatnonzero(rows == rows[5]).tolist()
    changed[second] += 1
    long_table(path, "path", img_emb=list(changed))

    message = rf"row {second}: duplicate path '{rows[5]}\.jpg', also in .*row {first} with another"
    with pytest.raises(DataError, match=message):
        imported(tmp_path / "out", source=path, id_column="path")
    with caplog.at_level(logging.WARNING, "csalign"):
        assert len(imported(tmp_path / "out", source=path).images) == N + 1
    assert "path repeats with different embeddings" in caplog.text


def test_an_image_that_was_computed_twice_is_one(tmp_path: Path) -> None:
    path = tmp_path / "df.parquet"
    rows = long_table(path, "path")
    noise = 1 + 1e-4 * np.random.default_rng(3).normal(size=(len(rows), 6)).astype(np.float32)
    long_table(path, "path", img_emb=list(IMAGES[rows] * noise))

    assert len(imported(tmp_path / "out", source=path).images) == N


def test_images_and_texts_of_two_long_tables_are_joined(tmp_path: Path) -> None:
    rows = np.repeat(np.arange(N), 2)
    images = {"url": [f"http://x/{row}" for row in rows], "image_embedding": list(IMAGES[rows])}
    texts = {"url": [f"http://x/{row}" for row in rows[::-1]], "emb": list(TEXTS[rows[::-1]])}
    pd.DataFrame(images).to_parquet(tmp_path / "i.parquet")
    pd.DataFrame(texts).to_parquet(tmp_path / "t.parquet")
    features = imported(
        tmp_path / "out", images=tmp_path / "i.parquet", texts=tmp_path / "t.parquet"
    )

    assert (len(features.images), right_pairs(features)) == (N, 2 * N)


def test_other_counts_show_the_commands_that_work(tmp_path: Path) -> None:
    np.save(tmp_path / "i.npy", IMAGES)
    np.save(tmp_path / "t.npy", np.repeat(TEXTS, 5, axis=0))
    files = (tmp_path / "i.npy", tmp_path / "t.npy")
    for values in ({}, {"captions_per_image": 5}, {"caption_order": "blocks"}):
        with pytest.raises(CsalignError) as caught:
            import_arrays(ImportConfig(source=files, out=tmp_path / "out", **values))
        assert (
            f"csalign import {files[0]} {files[1]} --captions-per-image 5 --caption-order blocks "
            f"--out {tmp_path / 'out'}\n    (blocks: all captions of the first image, then"
        ) in str(caught.value)
    with pytest.raises(
        DataError,
        match=r"swapped\? Then, with 5 .*run\n  csalign import .*i.npy .*t.npy --captions-per",
    ):
        imported(tmp_path / "out", source=files[::-1])
    features = imported(
        tmp_path / "out", source=files, captions_per_image=5, caption_order="blocks"
    )
    assert right_pairs(features) == 5 * N


def test_a_side_is_not_lost_with_a_part_that_lacks_the_key(tmp_path: Path) -> None:
    for part in range(2):
        frame = {"image_id": NUMBERS[:6], "score": [0.5] * 6, "embedding": list(IMAGES[:6])}
        del frame["image_id" if part else "score"]
        pd.DataFrame(frame).to_parquet(tmp_path / f"{part}.parquet")

    with pytest.raises(DataError, match=r"1\.parquet: has no column 'image_id', unlike .*0\.parq"):
        imported(tmp_path / "out", images=tmp_path)


def test_the_result_says_how_rows_were_paired(tmp_path: Path) -> None:
    np.save(tmp_path / "i.npy", IMAGES)
    np.save(tmp_path / "t.npy", TEXTS)
    (tmp_path / "p.csv").write_text("image_id\n" + "".join(f"{row}\n" for row in range(N)))
    both = (tmp_path / "i.npy", tmp_path / "t.npy")
    out = tmp_path / "out"
    by_order = import_arrays(ImportConfig(source=both, out=out))
    by_table = import_arrays(
        ImportConfig(source=both, pairs=tmp_path / "p.csv", out=out, overwrite=True)
    )
    alone = import_arrays(ImportConfig(images=both[0], out=out, overwrite=True))

    assert by_order.to_dict()["pairing"] == "row order"
    assert by_table.pairing == str(tmp_path / "p.csv")
    assert "pairing" not in alone.to_dict()
    assert "pairing" not in json.loads((out / "manifest.json").read_text())


def test_import_loads_no_torch(tmp_path: Path) -> None:
    np.save(tmp_path / "i.npy", IMAGES)
    safetensors.numpy.save_file({"x": TEXTS}, tmp_path / "t.safetensors")
    code = (
        "import sys; from csalign.cli.app import app\n"
        "try: app(sys.argv[1:])\n"
        "except SystemExit as done: assert not done.code, done.code\n"
        "assert 'torch' not in sys.modules"
    )
    arguments = ["import", "i.npy", "t.safetensors", "--out", "out"]

    subprocess.run([sys.executable, "-c", code, *arguments], cwd=tmp_path, check=True)


K = [f"k{row}" for row in range(N)]


def changed(values: list[Any], row: int, value: Any) -> list[Any]:
    return [*values[:row], value, *values[row + 1 :]]


ONE_FILE: dict[str, dict[str, Any]] = {
    "ids": {"image_ids": K, "text_ids": picked(K)},
    "integers": {"image_ids": NUMBERS, "text_ids": picked(NUMBERS)},
    "caption_image_ids": {"image_ids": K, "caption_image_ids": picked(K)},
    "paths": {"image_paths": K, "text_ids": picked(K)},
    "paths of both": {"image_paths": K, "text_paths": picked(K)},
}


@pytest.mark.parametrize("suffix", ["npz", "pt"])
@pytest.mark.parametrize("kind", ONE_FILE)
def test_two_lists_of_ids_in_one_file_are_those_of_each_side(
    tmp_path: Path, kind: str, suffix: str
) -> None:
    path, lists = tmp_path / f"b.{suffix}", ONE_FILE[kind]
    if suffix == "npz":
        np.savez(path, images=IMAGES, texts=TEXTS[ORDER], **lists)
    else:
        vectors = {"images": torch.from_numpy(IMAGES), "texts": torch.from_numpy(TEXTS[ORDER])}
        torch.save({**vectors, **lists}, path)

    assert right_pairs(imported(tmp_path / "out", source=path)) == N


def test_one_list_of_image_ids_names_the_image_of_each_row(tmp_path: Path) -> None:
    np.savez(tmp_path / "b.npz", images=IMAGES, texts=TEXTS, image_ids=K)
    features = imported(tmp_path / "out", source=tmp_path / "b.npz")

    assert right_pairs(features) == N
    assert features.images.column("id").to_pylist() == K


FILES = [f"{key}.jpg" for key in K]
BAD_KEYS: dict[str, tuple[Any, Any, str, str, str]] = {
    "null image": (
        changed(FILES, 3, None),
        picked(FILES),
        "filename",
        "filename",
        "row 3: has no",
    ),
    "twice": (changed(FILES, 3, "k1.jpg"), picked(FILES), "filename", "filename", "row 3: dupli"),
    "unknown": (FILES, changed(picked(FILES), 2, "x.jpg"), "image", "image", "text row 2 is unk"),
    "null in image": (changed(FILES, 3, None), picked(FILES), "image", "image", "row 3: has no"),
    "other folders": (
        [f"train/{name}" for name in FILES],
        picked([f"val/{name}" for name in FILES]),
        "path",
        "path",
        "is unknown",
    ),
    "ends that are no suffix": (
        [f"v{n}.a" for n in NUMBERS],
        picked([f"v{n}.b" for n in NUMBERS]),
        "key",
        "key",
        "is unknown",
    ),
}


@pytest.mark.parametrize("kind", BAD_KEYS)
def test_one_bad_key_is_refused(tmp_path: Path, kind: str) -> None:
    *keys, message = BAD_KEYS[kind]
    write_parquet(tmp_path, *keys)
    given = {"images": tmp_path / "i.parquet", "texts": tmp_path / "t.parquet"}

    with pytest.raises(DataError, match=rf"{message}[\s\S]*--pair-by order"):
        imported(tmp_path / "out", **given)
    assert len(imported(tmp_path / "out", **given, pair_by="order").texts) == N


def test_a_text_without_a_key_has_no_image(tmp_path: Path) -> None:
    for missing in (None, float("nan")):
        keys = changed([float(n) for n in picked(NUMBERS)], 2, missing)
        write_parquet(tmp_path, NUMBERS, keys, "image_id", "image_id")
        features = imported(
            tmp_path / "out", images=tmp_path / "i.parquet", texts=tmp_path / "t.parquet"
        )
        owners = features.texts.column("image_id").to_pylist()
        assert owners == changed([str(n) for n in picked(NUMBERS)], 2, None)


def test_negative_numbers_pair_as_numbers(tmp_path: Path) -> None:
    numbers = [row - 6 for row in range(N)]
    texts = [f"{n}.0" for n in picked(numbers)]
    write_parquet(tmp_path, numbers, texts, "image_id", "image_id")
    sides = {"images": tmp_path / "i.parquet", "texts": tmp_path / "t.parquet"}

    assert right_pairs(imported(tmp_path / "out", **sides)) == N


def test_a_path_that_ends_in_the_other_pairs(tmp_path: Path) -> None:
    paths = [f"/data/train/{name}" for name in FILES]
    write_parquet(tmp_path, paths, picked([f"train/{name}" for name in FILES]), "path", "path")
    sides = {"images": tmp_path / "i.parquet", "texts": tmp_path / "t.parquet"}

    assert right_pairs(imported(tmp_path / "out", **sides)) == N


@pytest.mark.parametrize("ids", [NUMBERS, [str(row) for row in ORDER]])
def test_image_row_is_a_row_number_whatever_the_ids(tmp_path: Path, ids: list[Any]) -> None:
    write_parquet(tmp_path, NUMBERS, ORDER, "unused", "image_row")
    images = pa.table({"image_id": ids, "embedding": column(IMAGES)})
    pq.write_table(images, tmp_path / "i.parquet")
    given = {"images": tmp_path / "i.parquet", "texts": tmp_path / "t.parquet"}
    lines = "".join(f"{row},{place}\n" for place, row in enumerate(ORDER))
    (tmp_path / "p.csv").write_text("image_row,text_row\n" + lines)

    assert right_pairs(imported(tmp_path / "out", **given)) == N
    assert right_pairs(imported(tmp_path / "out", **given, pairs=tmp_path / "p.csv")) == N


@pytest.mark.parametrize("name", ["rank", "label", "kk"])
def test_a_column_whose_values_fit_pairs_whatever_its_name(tmp_path: Path, name: str) -> None:
    write_parquet(tmp_path, K, changed(picked(K), 2, None), name, name)
    config = ImportConfig(
        source=(tmp_path / "i.parquet", tmp_path / "t.parquet"), out=tmp_path / "out"
    )

    assert import_arrays(config).pairing == name
    owners = FeatureSet.open(tmp_path / "out").texts.column("image_id").to_pylist()
    assert owners == changed([str(row) for row in ORDER], 2, None)


def test_classes_of_both_sides_are_not_keys(tmp_path: Path) -> None:
    classes = [row % 3 for row in range(N)]
    write_parquet(tmp_path, classes, picked(classes), "class_id", "class_id")
    config = ImportConfig(
        source=(tmp_path / "i.parquet", tmp_path / "t.parquet"), out=tmp_path / "out"
    )

    assert import_arrays(config).pairing == "row order"


def as_npz(folder: Path, keys: Any) -> None:
    np.savez(folder / "i.npz", features=IMAGES, image_id=np.array(NUMBERS))
    np.savez(folder / "t.npz", features=TEXTS[ORDER], image_id=keys)


NUMPY_KEYS = np.array(NUMBERS)[ORDER]


@pytest.mark.parametrize(
    "keys",
    [NUMPY_KEYS.astype("f8"), NUMPY_KEYS.astype("f4")[:, None], NUMPY_KEYS.astype("u1")],
    ids=["float", "column", "uint8"],
)
def test_keys_of_any_number_type_pair(tmp_path: Path, keys: Any) -> None:
    as_npz(tmp_path, keys)
    given = {"images": tmp_path / "i.npz", "texts": tmp_path / "t.npz"}

    assert right_pairs(imported(tmp_path / "out", **given)) == N


@pytest.mark.parametrize("key", [float, lambda n: None if n == NUMBERS[2] else n])
def test_lists_of_floats_and_none_are_keys(tmp_path: Path, key: Callable[[int], Any]) -> None:
    np.savez(tmp_path / "i.npz", features=IMAGES, image_id=NUMBERS)
    keys = [key(n) for n in picked(NUMBERS)]
    torch.save({"x": torch.from_numpy(TEXTS[ORDER]), "image_id": keys}, tmp_path / "t.pt")
    features = imported(tmp_path / "out", images=tmp_path / "i.npz", texts=tmp_path / "t.pt")

    owners = features.texts.column("image_id").to_pylist()
    assert owners == [None if k is None else str(int(k)) for k in keys]


@pytest.mark.parametrize(
    ("keys", "message"),
    [(NUMPY_KEYS.astype(object), "contains Python objects"), (NUMPY_KEYS[1:], "has 11 values")],
)
def test_keys_that_cannot_be_read_are_refused(tmp_path: Path, keys: Any, message: str) -> None:
    as_npz(tmp_path, keys)
    given = {"images": tmp_path / "i.npz", "texts": tmp_path / "t.npz"}

    with pytest.raises(DataError, match=rf"t\.npz: image_id looks like keys but {message}"):
        imported(tmp_path / "out", **given)
    assert len(imported(tmp_path / "out", **given, pair_by="order").texts) == N


@pytest.mark.parametrize("held", [pa.bool_(), pa.list_(pa.int64())])
def test_columns_of_other_types_that_look_like_keys_are_refused(tmp_path: Path, held: Any) -> None:
    keys = [[n, n] for n in NUMBERS] if pa.types.is_list(held) else [bool(n) for n in NUMBERS]
    write_parquet(tmp_path, NUMBERS, pa.array(keys, held), "image_id", "image_id")

    with pytest.raises(DataError, match=r"t\.parquet: image_id looks like keys but contains"):
        imported(tmp_path / "out", images=tmp_path / "i.parquet", texts=tmp_path / "t.parquet")


def test_counts_and_layouts_that_contradict_keys_are_refused(tmp_path: Path) -> None:
    write_parquet(tmp_path, K, picked(K), "key", "key")
    given = {"images": tmp_path / "i.parquet", "texts": tmp_path / "t.parquet"}
    with pytest.raises(DataError, match=r"by 1 captions per image.* by key; choose with"):
        imported(tmp_path / "out", **given, captions_per_image=1, caption_order="blocks")

    np.save(tmp_path / "t.npy", TEXTS)
    for keys in (K, picked(K)):
        (tmp_path / "c.csv").write_text("id,count\n" + "".join(f"{key},1\n" for key in keys))
        counted = {**given, "texts": tmp_path / "t.npy", "text_counts": tmp_path / "c.csv"}
        if keys == K:
            assert right_pairs(imported(tmp_path / "out", **counted)) == N
        else:
            with pytest.raises(DataError, match=r"put the counts in the order of the images"):
                imported(tmp_path / "out", **counted)


def test_a_3d_array_is_not_paired_by_a_column(tmp_path: Path) -> None:
    np.save(tmp_path / "i.npy", IMAGES)
    np.save(tmp_path / "t.npy", TEXTS[:, None])
    with pytest.raises(DataError, match=r"t\.npy: is 3-D, .* --pair-by key cannot be used"):
        imported(tmp_path / "out", source=(tmp_path / "i.npy", tmp_path / "t.npy"), pair_by="key")


def test_one_file_twice_warns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    np.save(tmp_path / "i.npy", IMAGES)
    imported(tmp_path / "out", source=(tmp_path / "i.npy", tmp_path / "i.npy"))
    (line,) = [text for text in caplog.messages if "have the embedding of an image" in text]
    assert "12 of 12 texts" in line


def test_a_recognised_side_is_not_said_to_be_missing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    np.savez(tmp_path / "b.npz", image_emb=IMAGES, weird=TEXTS)
    assert right_pairs(imported(tmp_path / "out", source=tmp_path / "b.npz")) == N
    assert "not imported" not in caplog.text


def test_the_splits_of_a_repeated_image_agree(tmp_path: Path) -> None:
    path, count = tmp_path / "df.parquet", 3 * N
    rows = long_table(path, "path")
    first = {int(row): place for place, row in reversed([*enumerate(rows)])}
    splits = [None if first[int(row)] == place else "test" for place, row in enumerate(rows)]
    long_table(path, "path", split=splits)
    features = imported(tmp_path / "out", source=path)
    assert features.images.column("split").to_pylist() == ["test"] * N

    long_table(path, "path", split=["train", "test"] * (count // 2))
    with pytest.raises(DataError, match="give an image one split"):
        imported(tmp_path / "out", source=path)


def test_splits_are_stored_by_their_usual_names(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = ["Train", "training", "valid", "dev", "Validation", "TEST", "testing", "mine"]
    frame = {"image_emb": list(IMAGES[:8]), "text_emb": list(TEXTS[:8]), "split": names}
    pd.DataFrame(frame).to_parquet(tmp_path / "df.parquet")
    with caplog.at_level(logging.INFO, "csalign"):
        features = imported(tmp_path / "out", source=tmp_path / "df.parquet")

    usual = [*["train"] * 2, *["val"] * 3, *["test"] * 2, "mine"]
    assert features.images.column("split").to_pylist() == usual
    assert features.texts.column("split").to_pylist() == usual
    assert "'valid' as 'val'" in caplog.text
