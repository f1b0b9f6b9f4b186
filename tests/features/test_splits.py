"""Splits that are made of a finished feature set, and how they are read."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest

import csalign
from csalign import inspect
from csalign.core.enums import Modality
from csalign.core.errors import ConfigError, DataError, OutputError, SchemaError
from csalign.evaluation.config import EvalConfig
from csalign.evaluation.evaluate import evaluate
from csalign.features.duplicates import Links, hash_ids, link_near_duplicates, merge_pairs
from csalign.features.join import ALL, join_ids, load_rows
from csalign.features.reader import FeatureSet
from csalign.features.schema import EncoderInfo
from csalign.features.splits import group_images
from csalign.features.writer import FeatureWriter, Rows
from csalign.ingest.config import SplitConfig
from csalign.ingest.split import split
from csalign.runs.apply import apply
from csalign.runs.config import ApplyConfig
from csalign.training.config import TrainConfig
from csalign.training.data import hold_out
from csalign.training.train import train

Array = npt.NDArray[Any]
V1 = Path(__file__).parent / "v1"
N, WIDTH = 300, 32
Make = Callable[..., Path]


def embeddings() -> Array:
    """Rows of which 20 to 29 equal 0 to 9, and 30 to 39 are close to 10 to 19."""
    values = np.random.default_rng(0).normal(size=(N, WIDTH))
    values[20:30] = values[0:10]
    values[30:40] = values[10:20] + 0.1 * np.random.default_rng(1).normal(size=(10, WIDTH))
    return values + 5  # as of an encoder whose rows all point one way


def captions() -> list[str]:
    """Two texts of each image; the first of 50 to 59 is that of 40 to 49 but for its case."""
    first = [f"A caption {row}" for row in range(N)]
    first[50:60] = [f" a CAPTION {row} " for row in range(40, 50)]
    return [text for row in range(N) for text in (first[row], f"another of {row}")]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Write 300 images with two texts each, 10 images and 2 texts without a partner."""

    def make(
        name: str = "set",
        *,
        order: int | None = None,
        images: Array | None = None,
        texts: list[str | None] | None = None,
        stored: dict[int, str] | None = None,
        sides: tuple[Modality, ...] = tuple(Modality),
    ) -> Path:
        values = embeddings() if images is None else images
        n = len(values)
        pictures = [f"image-{row}" for row in range(n)]
        of_text = [name for name in pictures for _ in range(2)]
        lines = captions() if texts is None else texts
        split_of = {f"image-{row}": name for row, name in (stored or {}).items()}
        alone = np.random.default_rng(2).normal(size=(10, WIDTH)) + 5
        columns: dict[Modality, dict[str, list[Any]]] = {
            Modality.IMAGE: {
                "id": [*pictures, *(f"alone-{row}" for row in range(10))],
                "split": [*map(split_of.get, pictures), *[None] * 10],
            },
            Modality.TEXT: {
                "id": [f"text-{row}" for row in range(2 * n + 2)],
                "image_id": [*of_text, None, None],
                "caption": [*lines, "a caption 42", "of nothing"],
                "split": [*map(split_of.get, of_text), None, None],
            },
        }
        rows = {
            Modality.IMAGE: np.concatenate([values, alone]),
            Modality.TEXT: np.random.default_rng(3).normal(size=(2 * n + 2, 8)),
        }
        folder = tmp_path / name
        folder.mkdir()
        encoders = {side: EncoderInfo(spec="eye", width=rows[side].shape[1]) for side in sides}
        with FeatureWriter(folder, encoders, "float32") as writer:
            for side in sides:
                places = np.arange(len(rows[side]))
                if order is not None:
                    places = np.random.default_rng(order).permutation(places)
                own = {key: [column[k] for k in places] for key, column in columns[side].items()}
                if side is Modality.TEXT and Modality.IMAGE not in sides:
                    del own["image_id"]
                writer.write(side, Rows(own, rows[side][places].astype(np.float32)))
        return folder

    return make


def divided(folder: Path, **values: Any) -> dict[str, str | None]:
    """Split a set; the split by id, of images and of texts."""
    split(SplitConfig(features=folder, **({"val": 0.1, "test": 0.2} | values)))
    return read(folder)


def read(folder: Path) -> dict[str, str | None]:
    features = FeatureSet.open(folder)
    tables = (features.images, features.texts)
    columns = [(table.column("id"), table.column("split")) for table in tables if len(table)]
    pairs = (zip(ids.to_pylist(), names.to_pylist(), strict=True) for ids, names in columns)
    return {key: name for column in pairs for key, name in column}


def count(found: dict[str, str | None], prefix: str = "image") -> dict[str | None, int]:
    names = [name for key, name in found.items() if key.startswith(prefix)]
    return {name: names.count(name) for name in sorted(set(names), key=str)}


def test_images_are_divided_as_asked_and_texts_go_with_them(make: Make) -> None:
    found = divided(make())

    assert count(found) == {"test": 60, "train": 210, "val": 30}
    for row in range(N):
        assert {found[f"text-{2 * row}"], found[f"text-{2 * row + 1}"]} == {found[f"image-{row}"]}
    assert count(found, "alone") == {"train": 10}
    assert found[f"text-{2 * N}"] == found["image-42"]  # its caption is that of the image
    assert found[f"text-{2 * N + 1}"] == "train"


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_copies_near_duplicates_and_shared_captions_stay_on_one_side(make: Make, seed: int) -> None:
    found = divided(make(), seed=seed, val=0.25, test=0.25)

    pairs = [(row, row + 20) for row in range(20)] + [(row, row + 10) for row in range(40, 50)]
    assert [found[f"image-{one}"] == found[f"image-{two}"] for one, two in pairs] == [True] * 30
    assert {found[f"image-{one}"] for one, _ in pairs} == {"train", "val", "test"}


def test_the_result_counts_splits_and_groups(make: Make) -> None:
    folder = make()
    made = split(SplitConfig(features=folder, val=0.1, test=50))

    assert made.splits == {
        "train": {"images": 230, "texts": FeatureSet.open(folder).splits()["train"]["texts"]},
        "val": {"images": 30, "texts": FeatureSet.open(folder).splits()["val"]["texts"]},
        "test": {"images": 50, "texts": FeatureSet.open(folder).splits()["test"]["texts"]},
    }
    assert (made.groups, made.grouped, made.threshold) == (30, 60, 0.9)
    assert str(made) == (
        "train 230, val 30, test 50 images (60 images in 30 groups kept together: near-duplicates "
        "and shared captions)"
    )


def test_without_groups_each_image_is_drawn_for_itself(make: Make) -> None:
    found = divided(make(), group=False, val=0.25, test=0.25)

    assert count(found) == {"test": 75, "train": 150, "val": 75}
    assert any(found[f"image-{row}"] != found[f"image-{row + 20}"] for row in range(20))


def test_the_order_of_the_rows_does_not_matter_and_the_seed_does(make: Make) -> None:
    first = divided(make("first"))

    assert divided(make("second", order=5)) == first
    assert divided(make("third"), seed=1) != first


@pytest.mark.parametrize("kind", ["two dimensions", "one large coordinate"])
def test_narrow_encoders_do_not_chain_images_into_one_group(make: Make, kind: str) -> None:
    values, rng = embeddings(), np.random.default_rng(4)
    if kind == "two dimensions":
        values[:, 2:] = 5
        groups, grouped = 10, 20  # copies only
    else:
        values[:, 3] += 60 + 15 * rng.normal(size=N)
        values[20:30] = values[0:10]
        values[30:40, 3] = values[10:20, 3]
        groups, grouped = 20, 40

    made = split(SplitConfig(features=make(images=values), val=0.1, test=0.2))

    assert (made.groups, made.grouped) == (groups + 10, grouped + 20)  # 10 of captions
    assert (made.threshold is None) == (kind == "two dimensions")


def test_cells_find_the_pairs_that_comparing_all_rows_finds(make: Make) -> None:
    centres = np.random.default_rng(0).normal(size=(50, WIDTH))
    values = np.repeat(centres, 60, axis=0) + np.random.default_rng(1).normal(size=(3_000, WIDTH))
    values[2_000:] = values[:1_000] + 0.1 * np.random.default_rng(2).normal(size=(1_000, WIDTH))
    folder = make(images=values, texts=[str(row) for row in range(6_000)])
    images = FeatureSet.open(folder).images
    found = []
    for exact_rows in (len(images), 100):
        links = Links(len(images))
        link_near_duplicates(images, hash_ids(images), links, exact_rows=exact_rows)
        found.append(links.groups())

    paired = found[0][2_000:3_000] == found[0][:1_000]
    assert paired.mean() > 0.99
    assert (found[1] == found[0]).mean() > 0.99


def test_a_series_does_not_become_one_group_and_copies_stay_together(make: Make) -> None:
    turns = np.linspace(0, 3, 150)[:, None]  # each row is near about twelve others
    first, second = np.random.default_rng(0).normal(size=(2, WIDTH))
    values = np.random.default_rng(1).normal(size=(N, WIDTH))
    values[:150] = np.cos(turns) * first + np.sin(turns) * second
    values[100:150] = values[:50] + 0.01 * np.random.default_rng(2).normal(size=(50, WIDTH))
    texts = [str(row) for row in range(2 * N)]
    tables = [
        FeatureSet.open(make(str(order), images=values, texts=list(texts), order=order))
        for order in (1, 2)
    ]
    found = []
    for features in tables:
        ids = features.images.column("id").to_pylist()
        groups = group_images(features, join_ids(features, ALL)).groups
        found.append(
            {
                name: {ids[k] for k in np.flatnonzero(groups == groups[row])}
                for row, name in enumerate(ids)
            }
        )

    sizes = [len(found[0][f"image-{row}"]) for row in range(150)]
    assert 2 <= min(sizes) <= max(sizes) <= 50
    assert all(f"image-{row + 100}" in found[0][f"image-{row}"] for row in range(50))
    assert found[0] == found[1]


def test_groups_merge_if_half_of_their_pairs_are_near() -> None:
    chain = [(0, 1), (2, 3), (1, 2), (4, 5), (0, 5)]
    pairs = np.array([*chain, (0, 2), (6, 7)]).T

    assert [len(set(merge_pairs(8, *pairs[:, :k]).tolist())) for k in range(1, 8)] == [
        *(7, 6, 6, 5, 5, 4, 3)
    ]


def test_links_make_groups() -> None:
    links = Links(7)
    links.add(np.array([5, 1]), np.array([6, 2]))
    links.add(np.array([2]), np.array([6]))
    links.add(np.array([], np.int64), np.array([], np.int64))

    assert links.groups().tolist() == [0, 1, 1, 3, 4, 1, 1]


def test_the_same_call_again_changes_nothing_and_another_is_refused(make: Make) -> None:
    folder = make()
    first = divided(folder)
    files = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}

    assert divided(folder) == first
    assert {path: path.stat().st_mtime_ns for path in files} == files
    with pytest.raises(DataError, match=r"divided by --val 0.1 --test 0.2, not .*--seed 3.*--over"):
        divided(folder, seed=3)
    assert read(folder) == first

    assert divided(folder, seed=3, overwrite=True) != first
    assert divided(folder, overwrite=True) == first
    assert not folder.with_name("set.partial").exists()


def test_rows_in_other_splits_keep_them(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "csalign")
    stored = dict.fromkeys(range(20), "val") | dict.fromkeys(range(100, 150), "train")
    found = divided(make(stored=stored | {200: "other"}))

    assert count(found) == {"other": 1, "test": 56, "train": 223, "val": 20}
    assert all(found[f"text-{row}"] == "val" for row in range(40))
    # The twins of stored rows are not given to yet another split.
    assert {found[f"image-{row}"] for row in range(20, 40)} == {"train"}
    assert "val: kept 20 stored images" in caplog.text
    with pytest.raises(DataError, match=r"divided already, into other, train, val; .* missing"):
        divided(make("again", stored=stored | {200: "other"}), test=None)


def test_what_repeats_a_stored_split_is_reported_and_texts_follow_it(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    # 20 equals 0 and 30 is close to 10; image 42 has the caption of a text without an image.
    folder = make(stored={0: "test", 10: "test", 42: "test"})
    found = divided(folder, val=0.1)

    assert "3 images in train, where copies, near-duplicates or captions of them" in caplog.text
    assert "are in test, as stored; remove these from train" in caplog.text
    assert [found[f"image-{row}"] for row in (20, 30, 52)] == ["train"] * 3
    assert (found["text-600"], found["text-601"]) == ("test", "train")


def test_captions_in_two_unicode_forms_are_one(make: Make) -> None:
    lines: list[str | None] = [*captions()]
    lines[400], lines[500] = "Un caf\u00e9", "un cafe\u0301"  # of the images 200 and 250
    features = FeatureSet.open(make(texts=lines))
    groups = group_images(features, join_ids(features, ALL), near=False).groups

    assert groups[200] == groups[250]


def test_what_cannot_be_divided_is_refused(make: Make) -> None:
    with pytest.raises(DataError, match="contains texts only; splits are made by image"):
        divided(make("texts", sides=(Modality.TEXT,)))
    with pytest.raises(DataError, match=r"test 250 and val 50 .* nothing .* of 300 images with"):
        divided(make("few"), val=50, test=250)
    with pytest.raises(ConfigError, match="pass --val or --test"):
        split(SplitConfig(features=make("none")))
    with pytest.raises(ConfigError, match=r"0.5 and 0.5 leave nothing to train on"):
        divided(make("half"), val=0.5, test=0.5)
    with pytest.raises(DataError, match="no such feature set"):
        divided(make("there").with_name("nowhere"))
    for part in ("0", "-1", "1.5", "nan", "some", True):
        with pytest.raises(
            ConfigError, match=r"--val must be a fraction below 1, such as .* or a number"
        ):
            SplitConfig.resolve(None, {"features": "set", "val": part})


def test_images_alone_are_divided(make: Make) -> None:
    found = divided(make(sides=(Modality.IMAGE,)))

    assert count(found, "") == {"test": 62, "train": 217, "val": 31}


def test_captions_of_many_images_do_not_keep_them_together(make: Make) -> None:
    lines = ["a photo", "another"] * (N - 40) + captions()[2 * (N - 40) :]
    lines[-8:] = ["of four"] * 8
    folder = make(texts=list(lines))
    made = split(SplitConfig(features=folder, val=0.1, test=0.2))

    assert count(read(folder)) == {"test": 60, "train": 210, "val": 30}
    assert (made.groups, made.grouped) == (20 + 1, 40 + 4)
    assert len({read(folder)[f"image-{row}"] for row in range(N - 4, N)}) == 1


def test_a_group_that_is_too_large_stays_in_train(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "csalign")
    folder = make(images=np.ones((N, WIDTH)))
    with pytest.raises(DataError, match=r"test has 0 of 60 images.* largest has 300; .*-group"):
        divided(folder)
    assert read(folder)["image-0"] is None
    assert "a group of 300 images is too large" in caplog.text

    assert count(divided(folder, group=False)) == {"test": 60, "train": 210, "val": 30}


def test_a_split_that_its_groups_cannot_fill_is_said(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    fives = [f"caption {row // 10}" for row in range(2 * N)]  # groups of five images
    divided(
        make(images=np.random.default_rng(9).normal(size=(N, WIDTH)), texts=list(fives)), val=33
    )

    assert "val has 30 of 33 images" in caplog.text


def test_every_reader_sees_the_splits(make: Make, tmp_path: Path) -> None:
    folder = make()
    found = divided(folder)
    features = FeatureSet.open(folder)
    rows = load_rows(features, "test")
    wanted = [key for key, name in found.items() if name == "test" and key.startswith("image")]
    streamed = [
        name for _, batch in features.images.read("id", "split") for name in batch[1].to_pylist()
    ]
    some = features.images.strings("split", np.array([3, 77, 200])).to_pylist()

    assert rows.image_ids.to_pylist() == wanted
    assert streamed == [found[key] for key in features.images.column("id").to_pylist()]
    assert some == [found[f"image-{row}"] for row in (3, 77, 200)]
    assert features.splits()["test"] == {"images": 60, "texts": len(rows.texts)}
    assert inspect(folder)["splits"]["test"]["images"] == 60

    train(TrainConfig(features=folder, out=tmp_path / "run", steps=0))
    document = evaluate(EvalConfig(features=folder, adapter=tmp_path / "run", resamples=100))
    assert document["split"] == "test"
    applied = apply(ApplyConfig(features=folder, adapter=tmp_path / "run", out=tmp_path / "out"))
    assert read(applied.features) == found
    assert not (applied.features / "splits").exists()


def test_the_vectors_are_not_written_again_and_the_format_says_it(make: Make) -> None:
    folder = make()
    before = {path: path.read_bytes() for path in folder.rglob("*.parquet")}
    version = json.loads((folder / "manifest.json").read_text())["format_version"]
    divided(folder)

    assert {path: path.read_bytes() for path in before} == before
    # csalign 0.1.0 would train on the test split, so it must refuse the set.
    assert (version, json.loads((folder / "manifest.json").read_text())["format_version"]) == (1, 2)


def test_a_set_of_version_1_is_divided(tmp_path: Path) -> None:
    shutil.copytree(V1 / "features", tmp_path / "v1")
    found = divided(tmp_path / "v1", val=5, test=None, group=False)

    assert count(found, "i")["val"] == 5
    assert FeatureSet.open(tmp_path / "v1").splits()["test"] == {"images": 4, "texts": 4}


def test_pandas_joins_them_by_id(make: Make) -> None:
    folder = make()
    found = divided(folder)

    images = pd.read_parquet(folder / "images").drop(columns="split")
    images = images.merge(pd.read_parquet(folder / "splits/images.parquet"), on="id")

    assert len(images) == N + 10
    assert dict(zip(images["id"], images["split"], strict=True)).items() <= found.items()


def damaged(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damaged, "does not match the manifest's checksum"),
        (Path.unlink, "is missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "bytes, the manifest says"),
    ],
)
def test_damaged_splits_are_named_with_the_call_that_mends_them(
    make: Make, damage: Callable[[Path], Any], message: str
) -> None:
    folder = make()
    first = divided(folder)
    damage(folder / "splits/texts.parquet")
    remedy = f"csalign split {folder} --val 0.1 --test 0.2 --overwrite"

    for reads in (inspect, divided, lambda path: load_rows(FeatureSet.open(path), "test")):
        with pytest.raises(SchemaError, match=rf"splits/texts.parquet: .*{message}.*{remedy}"):
            reads(folder)
    assert divided(folder, overwrite=True) == first


def test_a_folder_in_use_or_not_of_csalign_is_left_alone(make: Make) -> None:
    folder = make()
    partial = folder.with_name("set.partial")
    partial.mkdir()
    (partial / "mine.txt").touch()

    with pytest.raises(OutputError, match="in the way"):
        divided(folder)
    assert (partial / "mine.txt").exists()


def test_training_holds_out_whole_groups(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    features = FeatureSet.open(make())
    for seed in range(3):
        joined = join_ids(features, ALL)
        folds = hold_out(features, joined, seed)
        assert [int(fold.sum()) for fold in folds] == [75] * 5
        assert len({fold.tobytes() for fold in folds}) == 5
        rows = joined.take_images(folds[seed])
        held_out: dict[str, set[int]] = {"image": set(), "alone": set()}
        for name in features.images.column("id", rows.image_rows).to_pylist():
            held_out[name.split("-")[0]].add(int(name.split("-")[1]))

        assert len(held_out["image"]) == 75
        assert not held_out["alone"]
        for one, two in [*((k, k + 20) for k in range(20)), *((k, k + 10) for k in range(40, 50))]:
            assert (one in held_out["image"]) == (two in held_out["image"])
    assert "most images" not in caplog.text

    same = FeatureSet.open(make("same", images=np.ones((N, WIDTH))))
    assert [int(fold.sum()) for fold in hold_out(same, join_ids(same, ALL), 0)] == [75] * 5
    assert "most images are near-duplicates or share captions" in caplog.text


def test_results_of_other_splits_are_told_apart(
    make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, run = make(), tmp_path / "run"
    train(TrainConfig(features=folder, out=run, steps=0))
    divided(folder)
    evaluate(EvalConfig(features=folder, adapter=run, resamples=100))
    assert "trained on rows that are measured here" in caplog.text

    caplog.clear()
    train(TrainConfig(features=folder, out=run, steps=0, overwrite=True))
    before = evaluate(EvalConfig(features=folder, adapter=run, resamples=100))
    assert "trained on" not in caplog.text

    divided(folder, seed=7, overwrite=True)
    after = evaluate(EvalConfig(features=folder, adapter=run, resamples=100))
    assert "was divided into other splits since the adapter was trained" in caplog.text
    assert before["fingerprints"]["features"] != after["fingerprints"]["features"]


def test_sets_without_the_named_split_say_how_to_make_it(make: Make) -> None:
    folder = make()
    with pytest.raises(DataError, match=f"has no splits, .* csalign split {folder} --test 0.1"):
        evaluate(EvalConfig(features=folder, split="test"))
    texts = make("texts", sides=(Modality.TEXT,))
    with pytest.raises(DataError, match="contains texts only, but both sides are needed"):
        train(TrainConfig(features=texts, out=folder.with_name("run")))


def test_sets_in_an_object_store_are_divided(make: Make, bucket: Path) -> None:
    folder = make()
    there = bucket / "set"
    for path in folder.rglob("*"):
        if path.is_file():
            there.joinpath(*path.relative_to(folder).parts).write_bytes(path.read_bytes())

    csalign.split(SplitConfig(features=there, val=0.1, test=0.2))

    assert read(there) == divided(folder)
