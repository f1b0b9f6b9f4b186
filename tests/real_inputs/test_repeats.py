"""One image with several captions, repeated per caption as other tools write it."""

import base64
import csv
import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import open_clip
import pandas as pd
import pytest
from PIL import Image

import csalign
from csalign.core.errors import DataError
from csalign.core.results import FeaturesResult, leaves
from csalign.features import schema
from csalign.features.join import load_rows
from csalign.features.reader import FeatureSet

PICTURES, CAPTIONS = 6, 3
ROWS = [(k, n) for k in range(PICTURES) for n in range(CAPTIONS)]
MIXED = sorted(ROWS, key=lambda row: (row[1], (row[0] - row[1]) % PICTURES))  # no copy is next
EXPECTED = {k: [f"caption {n} of {k}" for n in range(CAPTIONS)] for k in range(PICTURES)}

Extract = Callable[..., FeaturesResult]


@cache
def picture(number: int, quality: int = 90) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (36, 40, 3), np.uint8)
    Image.fromarray(pixels).save(data := io.BytesIO(), "JPEG", quality=quality)
    return data.getvalue()


@cache
def caption(k: int, n: int) -> str:
    return EXPECTED[k][n]


@pytest.fixture(scope="module", autouse=True)
def one_tokenizer() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(open_clip, "get_tokenizer", cache(open_clip.get_tokenizer))
        yield


@pytest.fixture
def extract(encoder: str, tmp_path: Path) -> Extract:
    def run(source: Path, out: str = "features", **options: Any) -> FeaturesResult:
        given: dict[str, Any] = {"encoder": encoder, "dtype": "float32", "workers": 2}
        return csalign.extract(str(source), tmp_path / out, **given | options)

    return run


@pytest.fixture(scope="module")
def encoder(tiny_clip: tuple[Path, Path]) -> str:
    return f"open_clip:{tiny_clip[0]}+{tiny_clip[1]}"


@pytest.fixture(scope="module")
def right(encoder: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """The recall of the pictures in a table, one row per image."""
    folder = tmp_path_factory.mktemp("right")
    table = str(once(folder) / "captions.csv")
    out = folder / "features"
    return recall(csalign.extract(table, out, encoder=encoder, dtype="float32", workers=2))


def captions_by_image(result: FeaturesResult, split: str = "all") -> dict[str, list[str]]:
    rows = load_rows(FeatureSet.open(result.features), split)
    found: dict[str, list[str]] = {name: [] for name in rows.image_ids.to_pylist()}
    names = rows.image_ids.to_pylist()
    for owner, text in zip(rows.text_image.tolist(), rows.captions.to_pylist(), strict=True):
        if owner >= 0:
            found[names[owner]].append(text)
    return found


def pairs(result: FeaturesResult) -> list[list[str]]:
    """Return the captions of each image, in an order that no source decides."""
    return sorted(sorted(own) for own in captions_by_image(result).values())


def recall(result: FeaturesResult) -> dict[str, float]:
    found = csalign.evaluate(result.features, intervals=False)["retrieval"]
    return {".".join(path): value for path, value in leaves(found)}


def write_tar(path: Path, samples: Sequence[Mapping[str, bytes]]) -> Path:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number, sample in enumerate(samples):
            for suffix, data in sample.items():
                member = tarfile.TarInfo(f"{path.stem}{number:05d}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return path


def sample(k: int, n: int, quality: int = 90, **values: Any) -> dict[str, bytes]:
    return {
        "jpg": picture(k, quality),
        "txt": caption(k, n).encode(),
        "json": json.dumps(values).encode(),
    }


def once(folder: Path) -> Path:
    """Write one row per image, a folder with a table; returns the folder."""
    (folder / "once").mkdir(exist_ok=True)
    for k in range(PICTURES):
        (folder / "once" / f"{k}.jpg").write_bytes(picture(k))
    rows = [{"image": f"{k}.jpg", "caption": caption(k, n)} for k, n in ROWS]
    pd.DataFrame(rows).to_csv(folder / "once" / "captions.csv", index=False)
    return folder / "once"


def url(k: int) -> str:
    return f"http://images.example/{k}.jpg"


def adjacent_samples(folder: Path) -> Path:
    return write_tar(folder / "00000.tar", [sample(k, n) for k, n in ROWS])


def samples_of_several_shards(folder: Path) -> Path:
    for n in range(CAPTIONS):
        own = [sample(k, m) for k, m in MIXED if m == n]
        write_tar(folder / "tars" / f"{n:05d}.tar", own)
    return folder / "tars"


def samples_of_img2dataset(folder: Path) -> Path:
    for shard in range(2):
        rows = [
            {
                "caption": caption(k, n),
                "url": url(k),
                "key": f"{shard:05d}{row:04d}",
                "status": "success",
                "error_message": None,
                "sha256": hashlib.sha256(picture(k)).hexdigest(),
            }
            for row, (k, n) in enumerate(MIXED[shard::2])
        ]
        samples = [
            sample(k, n, 90, **row) for (k, n), row in zip(MIXED[shard::2], rows, strict=True)
        ]
        write_tar(folder / "laion" / f"{shard:05d}.tar", samples)
        pd.DataFrame(rows).to_parquet(folder / "laion" / f"{shard:05d}.parquet")
    return folder / "laion"


def samples_saved_again(folder: Path) -> Path:
    samples = [sample(k, n, 90 - n, url=url(k)) for k, n in MIXED]
    return write_tar(folder / "00000.tar", samples)


def parquet(folder: Path, rows: Sequence[tuple[int, int]], name: str = "t", **more: Any) -> Path:
    columns = {"image": [picture(k) for k, _ in rows], "caption": [caption(*row) for row in rows]}
    pd.DataFrame(columns | more).to_parquet(folder / f"{name}.parquet")
    return folder / f"{name}.parquet"


def rows_saved_again(folder: Path) -> Path:
    images = [picture(k, 90 - n) for k, n in MIXED]
    return parquet(folder, MIXED, image=images, image_id=[k for k, _ in MIXED])


def adjacent_rows(folder: Path) -> Path:
    return parquet(folder, ROWS)


def rows_apart(folder: Path) -> Path:
    return parquet(folder, MIXED)


def rows_apart_with_ids(folder: Path) -> Path:
    return parquet(folder, MIXED, image_id=[100 + k for k, _ in MIXED])


def rows_of_several_files(folder: Path) -> Path:
    (folder / "data").mkdir()
    for number in range(2):
        own = MIXED[number::2]
        parquet(folder / "data", own, f"train-{number}", image_id=[k for k, _ in own])
    return folder / "data"


def saved_dataset(folder: Path) -> Path:
    rows = [
        {"image": {"bytes": picture(k), "path": f"{k}.jpg"}, "caption": caption(k, n)}
        for k, n in MIXED
    ]
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    datasets.Dataset.from_list(rows, features).save_to_disk(folder / "saved")
    return folder / "saved"


def structs_of_paths(folder: Path) -> Path:
    root = once(folder)
    rows = [
        {"image": {"bytes": None, "path": f"{k}.jpg"}, "caption": caption(k, n)} for k, n in ROWS
    ]
    pd.DataFrame(rows).to_parquet(root / "rows.parquet")
    return root / "rows.parquet"


def spellings_of_a_path(folder: Path) -> Path:
    root = once(folder)
    forms = ("{}.jpg", "./{}.jpg", "sub/../{}.jpg")
    (root / "sub").mkdir()
    with (root / "spelled.csv").open("w", newline="") as file:
        csv.writer(file).writerows(
            [("image", "caption"), *((forms[n].format(k), caption(k, n)) for k, n in MIXED)]
        )
    return root / "spelled.csv"


def base64_cells(folder: Path) -> Path:
    lines = [
        json.dumps({"image": base64.b64encode(picture(k)).decode(), "caption": caption(k, n)})
        for k, n in MIXED
    ]
    (folder / "rows.jsonl").write_text("\n".join(lines))
    return folder / "rows.jsonl"


def coco_images_twice(folder: Path) -> Path:
    """Write a document that lists image 0 again, and a copy of 1 under another id."""
    root = once(folder)
    images = [{"id": k, "file_name": f"{k}.jpg"} for k in (*range(PICTURES), 0)]
    images.append({"id": 99, "file_name": "1.jpg"})
    notes = [
        {"image_id": 99 if (k, n) == (1, 2) else k, "id": 10 * k + n, "caption": caption(k, n)}
        for k, n in MIXED
    ]
    (root / "all.json").write_text(json.dumps({"images": images, "annotations": notes}))
    return root / "all.json"


def karpathy_images_twice(folder: Path) -> Path:
    root = once(folder)
    images = [
        {"filename": f"{k}.jpg", "split": "test", "sentences": [{"raw": caption(k, n)}]}
        for k, n in MIXED
    ]
    (root / "dataset_own.json").write_text(json.dumps({"images": images}))
    return root / "dataset_own.json"


INPUTS: dict[str, tuple[Callable[[Path], Path], dict[str, Any]]] = {
    made.__name__: (made, options)
    for made, options in (
        (adjacent_samples, {}),
        (samples_of_several_shards, {}),
        (samples_of_img2dataset, {}),
        (samples_saved_again, {"id_column": "url"}),
        (rows_saved_again, {"id_column": "image_id"}),
        (adjacent_rows, {}),
        (rows_apart, {}),
        (rows_apart_with_ids, {"id_column": "image_id"}),
        (rows_of_several_files, {"id_column": "image_id"}),
        (saved_dataset, {}),
        (structs_of_paths, {}),
        (spellings_of_a_path, {}),
        (base64_cells, {}),
        (coco_images_twice, {}),
        (karpathy_images_twice, {}),
    )
}


@pytest.mark.parametrize("name", INPUTS)
def test_an_image_per_caption_is_one_image(
    name: str, extract: Extract, tmp_path: Path, right: dict[str, float]
) -> None:
    write, options = INPUTS[name]
    source = write(tmp_path)
    result = extract(source, **options)
    small = extract(source, "small", part_rows=2, batch_size=2, **options)

    assert (result.images, result.texts, result.pairs, result.failures) == (6, 18, 18, 0)
    assert pairs(result) == sorted(EXPECTED.values())
    assert captions_by_image(small).keys() == captions_by_image(result).keys()
    assert pairs(small) == pairs(result)
    assert recall(result) == pytest.approx(right)
    # Rows of a path were one image before anything was read.
    by_path = {"spellings_of_a_path", "coco_images_twice", "karpathy_images_twice"}
    assert result.joined == small.joined == (None if name in by_path else 12)


@pytest.mark.parametrize(
    ("write", "key"), [(samples_saved_again, "url"), (rows_saved_again, "image_id")]
)
def test_images_saved_again_are_pointed_out(
    write: Callable[[Path], Path],
    key: str,
    extract: Extract,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert extract(write(tmp_path)).images == 18
    assert f"12 images with the {key} of an earlier one but other bytes" in caplog.text
    assert caplog.text.count(f"pass --id-column {key}") == 1


def test_processes_and_a_resumed_one_join_alike(
    extract: Extract, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "csalign")
    source = samples_of_several_shards(tmp_path)
    alone = extract(source, "alone")
    assert (
        "18 samples are 6 images: repeated images, by equal bytes or --id-column, were joined"
        in caplog.text
    )
    share = extract(source, shard="1/2", part_rows=4)
    assert (share.complete, share.joined) == (False, None)
    shared = extract(source, shard="0/2", part_rows=4)

    assert captions_by_image(shared) == captions_by_image(alone)
    document = csalign.inspect(shared.features)
    assert (shared.joined, document["joined"], document["counts"]["pairs"]) == (12, 12, 18)
    files = {path.name for path in shared.features.glob("*/*.parquet")}
    assert len(files) == len({name.removesuffix("-joined.parquet") for name in files})


def test_a_set_is_joined_again_if_its_completion_was_stopped(
    extract: Extract, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    source = samples_of_several_shards(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(schema, "write_manifest", stop)
        with pytest.raises(KeyboardInterrupt):
            extract(source)
    names = {path.name for path in (tmp_path / "features.partial").glob("images/*")}
    assert names > {"part-00000-00000.parquet"}

    resumed = extract(source)
    assert captions_by_image(resumed) == captions_by_image(extract(source, "again"))
    left = [path.name for path in resumed.features.glob("*/*.parquet")]
    assert sorted(left) == [
        "part-00000-00000.parquet",
        "part-00000-00000.parquet",
        "part-00001-00000-joined.parquet",
        "part-00002-00000-joined.parquet",
    ]


def test_copies_in_several_splits_are_held_out_together(
    extract: Extract, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spelled = {0: "Train", 1: "training", 2: "Testing"}  # of the captions 0, 1 and 2
    rows = [row for row in MIXED if row[0] < 2 or row[1] < 2]  # only 0 and 1 are in several splits
    source = parquet(tmp_path, rows, split=[spelled[n] for _, n in rows])
    for part_rows in (2, 100):
        caplog.clear()
        result = extract(source, f"of{part_rows}", part_rows=part_rows)

        held_out = captions_by_image(result, "test")
        assert held_out == {"t/1": EXPECTED[0], "t/2": EXPECTED[1]}
        assert sorted(captions_by_image(result, "train").values()) == [
            EXPECTED[k][:2] for k in range(2, PICTURES)
        ]
        assert "2 images in several splits, such as 't/1'" in caplog.text
        assert "held out of training, here in 'test'" in caplog.text


def test_files_of_equal_bytes_keep_their_names(
    extract: Extract, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = once(tmp_path)
    (root / "7.jpg").write_bytes(picture(2))
    table = (root / "captions.csv").read_text()
    (root / "captions.csv").write_text(f"{table}7.jpg,of a copy\n")
    result = extract(root)

    found = captions_by_image(result)
    assert (found["2.jpg"], found["7.jpg"]) == (EXPECTED[2], ["of a copy"])
    assert (len(found), result.joined) == (7, None)
    assert "1 image with the bytes of another one, such as '2.jpg' and '7.jpg'" in caplog.text

    (root / "captions.csv").unlink()
    caplog.clear()
    assert extract(root, "alone").images == 7
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert not [message for message in warned if "with the bytes" in message]


def test_captions_of_copies_are_kept_once(
    extract: Extract, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "csalign")
    samples = [{"jpg": picture(k), "txt": b"one" if n else b"other"} for k, n in MIXED]
    samples += [{"txt": b"one"}, {"txt": b"one"}]  # these belong to no image
    source = write_tar(tmp_path / "t.tar", samples)
    for part_rows in (5, 100):
        result = extract(source, f"of{part_rows}", part_rows=part_rows)

        assert (result.images, result.texts, result.pairs) == (6, 14, 12)
        assert pairs(result) == [["one", "other"]] * 6
        assert "were joined, and 6 repeated captions kept once" in caplog.text


def test_tokens_and_failures_of_copies_are_kept(extract: Extract, tmp_path: Path) -> None:
    samples = [sample(k, n) for k, n in MIXED]
    samples[1] = {"jpg": picture(1)[:200], "txt": b"lost"}
    samples += [{"jpg": picture(3)}, {"txt": b"alone"}]
    tar = write_tar(tmp_path / "t.tar", samples)
    options = {"tokens": "both", "max_failures": 0.5}
    whole, parts = (extract(tar, f"of{n}", part_rows=n, **options) for n in (100, 4))

    assert (whole.images, whole.texts, whole.pairs, whole.failures) == (6, 18, 17, 2)
    assert captions_by_image(parts) == captions_by_image(whole)
    for side in ("images", "texts"):
        found, expected = (
            pd.read_parquet(result.features / side).sort_values("id") for result in (parts, whole)
        )
        assert [list(map(len, frame.tokens)) for frame in (found,)] == [
            list(map(len, expected.tokens))
        ]
        np.testing.assert_allclose([*found.embedding], [*expected.embedding], atol=1e-5)
    samples[1] = sample(1, 0)
    write_tar(tmp_path / "t.tar", samples)
    mended = extract(tar, "of4", part_rows=4, tokens="both", overwrite=True)
    assert pairs(mended) == sorted(EXPECTED.values())


def test_splits_are_made_of_joined_images(extract: Extract, tmp_path: Path) -> None:
    source = rows_apart(tmp_path)
    whole, parts = (
        extract(source, f"of{rows}", part_rows=rows, test=2.0, group=False) for rows in (100, 4)
    )

    assert captions_by_image(parts, "test") == captions_by_image(whole, "test")
    assert [len(own) for own in captions_by_image(whole, "test").values()] == [3, 3]


SPLITS = ["TRAIN", "valid", " Validation", "dev", "testing", "Test", "restval"]
USUAL = ["train", "val", "val", "val", "test", "test", "restval"]


def splits_of_rows(folder: Path) -> Path:
    rows = [(k % PICTURES, k % CAPTIONS) for k in range(len(SPLITS))]
    columns = {"image": [picture(20 + k) for k in range(7)], "caption": [caption(*r) for r in rows]}
    pd.DataFrame(columns | {"split": SPLITS}).to_parquet(folder / "t.parquet")
    return folder / "t.parquet"


def splits_of_samples(folder: Path) -> Path:
    made = [
        {"jpg": picture(20 + k), "txt": b"x", "json": json.dumps({"split": name}).encode()}
        for k, name in enumerate(SPLITS)
    ]
    return write_tar(folder / "t.tar", made)


def splits_of_a_table(folder: Path) -> Path:
    for k in range(len(SPLITS)):
        (folder / f"{k}.jpg").write_bytes(picture(20 + k))
    rows = {"path": [f"{k}.jpg" for k in range(7)], "caption": ["x"] * 7, "split": SPLITS}
    pd.DataFrame(rows).to_csv(folder / "t.csv", index=False)
    return folder / "t.csv"


def splits_of_class_labels(folder: Path) -> Path:
    names = [*dict.fromkeys(SPLITS)]
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "caption": datasets.Value("string"),
            "split": datasets.ClassLabel(names=names),
        }
    )
    rows = [
        {"image": {"bytes": picture(20 + k), "path": None}, "caption": "x", "split": k}
        for k in range(len(names))
    ]
    datasets.Dataset.from_list(rows, features).to_parquet(folder / "t.parquet")
    return folder / "t.parquet"


@pytest.mark.parametrize(
    "write", [splits_of_rows, splits_of_samples, splits_of_a_table, splits_of_class_labels]
)
def test_splits_are_stored_by_their_usual_names(
    write: Callable[[Path], Path], extract: Extract, tmp_path: Path
) -> None:
    features = FeatureSet.open(extract(write(tmp_path)).features)

    assert features.images.column("split").to_pylist() == USUAL
    assert features.texts.column("split").to_pylist() == USUAL


def test_a_number_is_not_the_name_of_a_split(extract: Extract, tmp_path: Path) -> None:
    source = write_tar(tmp_path / "t.tar", [sample(0, 0, split=1)])
    with pytest.raises(DataError, match="its json: split must be text, not 1; name another with"):
        extract(source)
