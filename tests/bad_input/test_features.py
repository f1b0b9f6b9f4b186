"""What train, apply, eval, inspect, diagnose, tune and compare read, and how it can be wrong."""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from csalign.core.atomic import sha256_file
from csalign.core.enums import Modality
from csalign.features.schema import EncoderInfo
from csalign.features.writer import FeatureWriter, Rows
from tests.bad_input.conftest import Refused

READERS = {
    "train": "train f --out out --steps 2 --batch-size 8",
    "apply": "apply f --adapter r --out out",
    "eval": "eval f --adapter r",
    "inspect": "inspect f",
    "diagnose": "diagnose f --adapter r",
    "tune": "tune f --out out --trials 1 --steps 2",
}
IMAGES = "images/part-00000.parquet"

Damage = Callable[[Path], Any]


def cut(name: str, keep: float) -> Damage:
    def damage(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(keep * len(content))])

    return damage


def overwritten(name: str, content: bytes) -> Damage:
    return lambda folder: (folder / name).write_bytes(content)


def with_column(name: str, make: Callable[[pa.Table], Any]) -> Damage:
    """The images with another column, and a manifest that agrees with the file."""

    def damage(folder: Path) -> None:
        path = folder / IMAGES
        table = pq.read_table(path)
        place = table.schema.get_field_index(name)
        column = make(table)
        table = table.set_column(place, name, column) if column is not None else table.drop([name])
        pq.write_table(table, path)
        document = json.loads((folder / "manifest.json").read_text())
        document["shards"]["images"][0] |= {
            "bytes": path.stat().st_size,
            "sha256": sha256_file(path),
            "rows": len(table),
        }
        (folder / "manifest.json").write_text(json.dumps(document))

    return damage


def vector(width: int) -> pa.DataType:
    return pa.list_(pa.field("element", pa.float32(), nullable=False), width)


def vectors(values: Any) -> pa.Array:
    flat = pa.array(np.asarray(values, np.float32).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, type=vector(len(values[0])))


def with_row(row: int, value: float) -> Damage:
    def make(table: pa.Table) -> pa.Array:
        values = np.array(table["embedding"].to_pylist())
        values[row : row + 2] = value  # of the split test, and of train
        return vectors(values)

    return with_column("embedding", make)


def manifest(change: Callable[[dict[str, Any]], Any]) -> Damage:
    def damage(folder: Path) -> None:
        document = json.loads((folder / "manifest.json").read_text())
        change(document)
        (folder / "manifest.json").write_text(json.dumps(document))

    return damage


def turned_into_a_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("x")


DAMAGES: dict[str, tuple[Damage, str]] = {
    "missing": (shutil.rmtree, "f: no such f"),
    "a file": (turned_into_a_file, "f: "),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "no manifest.json"),
    "an empty manifest": (overwritten("manifest.json", b""), "manifest.json: is damaged"),
    "a cut manifest": (cut("manifest.json", 0.5), "manifest.json: is damaged"),
    "a manifest of junk": (overwritten("manifest.json", b"\xff\x00"), "manifest.json: is damaged"),
    "a deep manifest": (overwritten("manifest.json", b"[" * 100_000), "manifest.json: is damaged"),
    "a newer manifest": (manifest(lambda m: m.update(format_version=3)), "upgrade csalign"),
    "a path outside": (
        manifest(lambda m: m["shards"]["images"][0].update(path="../f/" + IMAGES)),
        "outside of the set",
    ),
    "an absolute path": (
        manifest(lambda m: m["shards"]["images"][0].update(path="/etc/passwd")),
        "outside of the set",
    ),
    "a shard missing": (lambda f: (f / IMAGES).unlink(), f"{IMAGES}: is missing"),
    "an empty shard": (overwritten(IMAGES, b""), f"{IMAGES}: has 0 bytes"),
    "a cut shard": (cut(IMAGES, 0.9), f"{IMAGES}: has"),
    "other rows": (
        with_column("embedding", lambda t: vectors(np.ones((40, 7)))),
        f"{IMAGES}: column 'embedding' is fixed_size_list<element: float not null>[7],",
    ),
    "another dtype": (
        with_column("embedding", lambda t: t["embedding"].cast(pa.list_(pa.float64(), 6))),
        f"{IMAGES}: column 'embedding' is",
    ),
    "no embeddings": (with_column("embedding", lambda t: None), "has no column 'embedding'"),
    "null ids": (
        with_column("id", lambda t: pa.array([None, *map(str, range(1, 40))])),
        f"{IMAGES}: column 'id' has null values",
    ),
    "repeated ids": (with_column("id", lambda t: pa.array(["0"] * 40)), "image id '0' appears "),
    "ids that match nothing": (
        with_column("id", lambda t: pa.array([f"x{row}" for row in range(40)])),
        "which is missing",
    ),
}
CONTENT: dict[str, tuple[Damage, str]] = {
    "NaN": (with_row(3, np.nan), "is not finite"),
    "infinity": (with_row(3, np.inf), "is not finite"),
    "a row of zeros": (with_row(3, 0), "norm 0"),
    "a null row": (
        with_column(
            "embedding", lambda t: pa.array([None, *t["embedding"].to_pylist()[1:]], vector(6))
        ),
        f"{IMAGES}: column 'embedding' has null values",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("command", READERS)
def test_a_feature_set_of_no_use_is_refused(
    features: Path, refused: Refused, command: str, damage: str
) -> None:
    harm, message = DAMAGES[damage]
    harm(features)

    refused(READERS[command], 1, message)


@pytest.mark.parametrize("damage", CONTENT)
@pytest.mark.parametrize("command", ["train", "apply", "eval", "diagnose", "tune"])
def test_rows_without_a_direction_are_refused(
    features: Path, refused: Refused, command: str, damage: str
) -> None:
    harm, message = CONTENT[damage]
    harm(features)

    refused(READERS[command], 1, message)


@pytest.mark.parametrize("damage", ["missing", "a cut manifest", "a cut shard"])
def test_unpaired_features_of_no_use_are_refused(
    features: Path, refused: Refused, damage: str
) -> None:
    shutil.copytree(features, features.parent / "u" / "f")
    harm, message = DAMAGES[damage]
    harm(features.parent / "u" / "f")

    refused(f"{READERS['train']} --unpaired u/f", 1, message)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("adapter.json", None, "no adapter.json"),
        ("adapter.json", b"", "adapter.json: is damaged"),
        ("adapter.json", b"[" * 100_000, "adapter.json: is damaged"),
        ("adapter.json", b"{}", "adapter.json: "),
        ("adapter.json", b"\xff", "adapter.json: is damaged"),
        ("adapter.safetensors", None, "adapter.safetensors: cannot be read"),
        ("adapter.safetensors", b"", "adapter.safetensors: cannot be read"),
        ("adapter.safetensors", b"\xff" * 100, "adapter.safetensors: cannot be read"),
        (".", None, "r: no such run"),
    ],
)
@pytest.mark.parametrize("command", ["apply f --adapter r --out out", "eval f --adapter r"])
def test_a_run_of_no_use_is_refused(
    features: Path, refused: Refused, command: str, name: str, content: bytes | None, message: str
) -> None:
    path = features.parent / "r" / name
    if content is not None:
        path.write_bytes(content)
    elif name == ".":
        shutil.rmtree(path)
    else:
        path.unlink()

    refused(command, 1, message)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metrics.jsonl", b"\xff\n", "metrics.jsonl: was changed or is damaged"),
        ("metrics.jsonl", b"{\n", "metrics.jsonl: was changed or is damaged"),
        ("metrics.jsonl", b"5\n", "metrics.jsonl: was changed or is damaged"),
        ("metrics.jsonl", b"", "metrics.jsonl: was changed or is damaged"),
        ("environment.json", b"\xff", "environment.json: is damaged"),
        ("environment.json", b"[]", "environment.json: is damaged"),
        ("config.toml", b"\xff", "config.toml: is damaged"),
        ("config.toml", b"[", "config.toml: is damaged"),
    ],
)
@pytest.mark.parametrize("command", ["inspect r", "eval f --adapter r --report page.html"])
def test_what_a_run_keeps_beside_its_weights_is_checked_where_it_is_shown(
    features: Path, refused: Refused, command: str, name: str, content: bytes, message: str
) -> None:
    (features.parent / "r" / name).write_bytes(content)

    refused(command, 1, message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "e.json: no such file"),
        (b"", "e.json: is not a document of csalign eval --json"),
        (b"{}", "e.json: is not a document of csalign eval --json"),
        (b"\xff", "e.json: is not a document of csalign eval --json"),
        (b"[" * 100_000, "e.json: is not a document of csalign eval --json"),
        (b'{"retrieval": NaN}', "e.json: is not a document of csalign eval --json"),
    ],
)
def test_evaluations_of_no_use_are_refused(
    features: Path, refused: Refused, content: bytes | None, message: str
) -> None:
    if content is not None:
        (features.parent / "e.json").write_bytes(content)

    refused("compare r e.json", 1, message)


@pytest.mark.parametrize(
    ("command", "code", "message"),
    [
        ("train f --out out --train-split nope", 1, "nope"),
        ("train f --out out --val-split nope", 1, "nope"),
        ("train f --out out --report none/page.html", 1, "the folder none does not exist"),
        ("train f --out s3://bucket/run", 2, "must be on a local disk"),
        ("train f --out f", 1, "f: this is where f is read from"),
        ("train f --out f/run", 1, "is inside f"),
        ("train f --out out --learning-rate nan", 2, "learning-rate"),
        ("train f --out out --learning-rate inf", 2, "learning-rate"),
        ("train f --out out --seed -1", 2, "seed"),
        ("train f --out out --steps 1e9", 2, "steps"),
        ("train f --out out --bandwidth 0", 2, "bandwidth"),
        ("train f --out out --bandwidth nan", 2, "bandwidth"),
        ("train f --out out --token-weight 1", 1, "tokens"),
        ("apply f --adapter r --out out --format npz", 2, "format"),
        ("apply f --adapter f --out out", 1, "f: is a feature set, not a run"),
        ("apply f --adapter r --out out --tokens", 2, "trained without tokens"),
        ("apply r --adapter r --out out", 1, "r: is a run, not a feature set"),
        ("eval f", 1, "6"),
        ("eval f --adapter r --split nope", 1, "nope"),
        ("eval f --adapter r --report .", 1, ".: is a folder"),
        ("eval f --adapter r --resamples 1", 2, "resamples"),
        ("eval f --adapter r --protocol coco-5k", 1, "5"),
        ("eval f --adapter r --by nope", 1, "nope"),
        ("eval f --adapter r --groups none.csv --by x", 1, "none.csv"),
        ("inspect pairs.csv", 1, "pairs.csv: "),
        ("compare r nowhere", 1, "nowhere: no such file or folder"),
        ("compare r --baseline 7", 2, "7"),
        ("tune f --out out --trials 0", 2, "trials"),
        ("tune f --out out --search nope", 2, "nope"),
    ],
)
def test_options_that_are_wrong_are_refused(
    features: Path, refused: Refused, command: str, code: int, message: str
) -> None:
    refused(command, code, message)


def write_rows(folder: Path, images: Any, texts: Any, owners: list[str | None]) -> None:
    folder.mkdir()
    infos = {
        side: EncoderInfo(spec="x", width=values.shape[1])
        for side, values in zip(Modality, (images, texts), strict=True)
    }
    with FeatureWriter(folder, infos, "float32") as writer:
        ids = [str(row) for row in range(len(images))]
        writer.write(Modality.IMAGE, Rows({"id": ids}, images))
        names = [f"t{row}" for row in range(len(texts))]
        columns: Mapping[str, Sequence[str | None]]
        columns = {"id": names, "image_id": owners, "caption": names}
        writer.write(Modality.TEXT, Rows(columns, texts))


@pytest.mark.parametrize("command", ["train", "eval", "diagnose"])
@pytest.mark.parametrize("rows", [0, 3])
def test_sets_without_pairs_are_refused(
    tmp_path: Path, refused: Refused, command: str, rows: int
) -> None:
    values = np.random.default_rng(0).normal(size=(rows, 4)).astype(np.float32)
    write_rows(tmp_path / "f", values, values, [None] * rows)

    refused(READERS[command].replace(" --adapter r", ""), 1, "f")
