import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pycocotools.coco import COCO

from csalign.core.errors import ConfigError, DataError
from csalign.sources.records import Record
from csalign.sources.records.open import SourceOptions, open_source

MakeImages = Callable[..., Path]
Records = Callable[..., list[Record]]
Outline = Callable[..., list[tuple[Any, ...]]]


def write(path: Path, document: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document))
    return path


def error_of(source: Path, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        open_source(source, SourceOptions(**options))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def coco(make_images: MakeImages) -> Path:
    """COCO's own folders: images in val2017/, captions in annotations/."""
    root = make_images("val2017/000007.jpg", "val2017/000009.jpg", "train2017/000001.jpg")
    document = {
        "info": {"year": 2017},
        "licenses": [],
        "images": [
            {"id": 9, "file_name": "000009.jpg", "height": 36, "width": 40},
            {"id": 7, "file_name": "000007.jpg", "height": 36, "width": 40},
        ],
        "annotations": [
            {"id": 1, "image_id": 7, "caption": "seven\n"},
            {"id": 2, "image_id": 9, "caption": "nine"},
            {"id": 3, "image_id": 7, "caption": "seven again"},
        ],
    }
    return write(root / "annotations" / "captions_val2017.json", document)


def test_coco_captions_find_their_images_and_split(coco: Path, records: Records) -> None:
    assert len(COCO(coco).loadAnns([1, 2, 3])) == 3

    found = records(coco)

    assert [(r.image and r.image.id, [tuple(t) for t in r.texts], r.split) for r in found] == [
        ("000009.jpg", [("000009.jpg#0", "nine", 1)], "val"),
        ("000007.jpg", [("000007.jpg#0", "seven", 2), ("000007.jpg#1", "seven again", 2)], "val"),
    ]
    assert found[0].image is not None
    assert found[0].image.source == f"{coco.parents[1]}/val2017/000009.jpg"
    assert open_source(coco).description == "COCO captions of 2 images"


def test_coco_captions_of_a_folder_and_with_their_ids(coco: Path, outline: Outline) -> None:
    folder = coco.parents[1] / "val2017"

    assert outline(folder, captions=coco) == outline(coco)
    assert [entry[0] for entry in outline(coco, id_column="id")] == ["9", "7"]
    assert outline(coco.rename(folder / "x.json"), images=folder)[1][1:] == (
        ["seven", "seven again"],
        None,
    )


@pytest.mark.parametrize("change", [str, float])
def test_ids_of_coco_are_the_same_as_numbers_and_as_text(
    coco: Path, outline: Outline, change: type
) -> None:
    expected, document = outline(coco), json.loads(coco.read_text())
    for annotation in document["annotations"]:
        annotation["image_id"] = change(annotation["image_id"])

    assert outline(write(coco, document)) == expected


def test_bad_entries_of_coco_are_flaws(coco: Path, outline: Outline) -> None:
    document = json.loads(coco.read_text())
    document["images"] += [
        {"id": 7, "file_name": "000009.jpg"},
        {"id": 8},
        {"file_name": "000009.jpg"},
        "no object",
        {"id": 10, "file_name": "../train2017/000001.jpg"},
        {"id": 11, "file_name": "gone.jpg"},
    ]
    document["annotations"] += [
        {"id": 4, "image_id": 99, "caption": "of none"},
        {"id": 5, "caption": "of nothing"},
        {"id": 6, "image_id": 9, "caption": None},
        {"id": 7, "image_id": 11, "caption": "gone"},
    ]
    folder = coco.parents[1] / "val2017"

    found = outline(write(coco, document))

    assert [entry[:2] for entry in found if entry[0]] == [
        ("000009.jpg", ["nine"]),
        ("000007.jpg", ["seven", "seven again"]),
    ]
    assert [entry[2] for entry in found if not entry[0]] == [
        "annotation 5: has no image_id",
        "annotation 6: caption must be text, not None",
        "image 3: has no id of its own (7)",
        "image 4: has no file_name",
        "image 5: has no id of its own (None)",
        "image 6: is not an object",
        f"image '../train2017/000001.jpg' is outside of {folder}; move it inside",
        f"unknown image 'gone.jpg'; correct the path, which starts from {folder}, or remove the "
        "row",
        "annotation 4: no image has the id '99'",
    ]


@pytest.mark.parametrize("folder", ["", "flickr30k-images/"])
def test_karpathys_splits_are_kept_and_restval_is_train(
    make_images: MakeImages, outline: Outline, caplog: pytest.LogCaptureFixture, folder: str
) -> None:
    splits = ("test", "restval", "train", "val")
    root = make_images(*(f"{folder}{split}.jpg" for split in splits))
    images = [
        {
            "sentids": [2 * k, 2 * k + 1],
            "imgid": k,
            "sentences": [
                {"tokens": ["a", "dog"], "raw": "A dog.", "imgid": k, "sentid": 2 * k},
                {"tokens": ["two", "dogs"], "imgid": k, "sentid": 2 * k + 1},
            ],
            "split": split,
            "filename": f"{split}.jpg",
        }
        for k, split in enumerate(splits)
    ]
    table = write(root / "dataset_flickr30k.json", {"images": images, "dataset": "flickr30k"})

    with caplog.at_level(logging.INFO):
        found = outline(table)

    assert found == [
        (f"{split}.jpg", ["A dog.", "two dogs"], "train" if split == "restval" else split)
        for split in splits
    ]
    assert "1 images of split restval are stored as train" in caplog.text


def test_karpathys_coco_names_a_folder(make_images: MakeImages, outline: Outline) -> None:
    root = make_images("val2014/x.jpg")
    entry = {"filepath": "val2014", "filename": "x.jpg", "split": "test", "cocoid": 5, "imgid": 0}
    sentences = [{"raw": f"c{k}", "sentid": k} for k in range(6)]
    document = {"images": [entry | {"sentences": sentences}], "dataset": "coco"}
    table = write(root / "karpathy" / "dataset_coco.json", document)

    assert outline(table) == [("val2014/x.jpg", [f"c{k}" for k in range(6)], "test")]
    assert outline(table, id_column="cocoid")[0][0] == "5"


def test_bad_entries_of_karpathy_are_flaws(make_images: MakeImages, outline: Outline) -> None:
    root = make_images("a.jpg")
    images = [
        {"filename": "a.jpg", "sentences": [{"raw": "x"}], "split": "val"},
        {"sentences": []},
        {"filename": "a.jpg", "sentences": [{"raw": 3}], "split": "val"},
        {"filename": "a.jpg", "sentences": [{"tokens": 3}], "split": "val"},
        {"filename": "a.jpg", "split": "val"},
        {"filename": "a.jpg", "sentences": ["x"], "split": 3},
    ]

    assert outline(write(root / "d.json", {"images": images})) == [
        ("a.jpg", ["x"], "val"),
        (None, [], "image 2: has no filename"),
        (None, [], "image 3: raw must be text, not 3"),
        (None, [], "image 4: has a sentence without raw text"),
        (None, [], "image 5: has no list of sentences"),
        (None, [], "image 6: split must be text, not 3"),
    ]


def test_a_list_of_objects_is_a_table(make_images: MakeImages, outline: Outline) -> None:
    root = make_images("a.jpg")
    entries = [{"image": "a.jpg", "caption": ["x", "y"], "image_id": "i"}, {"caption": "z"}, 3]
    table = write(root / "coco_karpathy_train.json", entries)

    assert outline(table) == [
        ("a.jpg", ["x", "y"], None),
        (None, ["z"], None),
        (None, [], "is not a JSON object; each entry must be one"),
    ]
    assert outline(table, kind="captions")[0] == (None, ["x", "y"], None)


def test_documents_of_no_use_are_refused(coco: Path, tmp_path: Path) -> None:
    other = write(tmp_path / "other.json", {"categories": [], "images": [{}]})
    assert error_of(other).endswith("and is not a list of objects (keys: categories, images)")
    (tmp_path / "cut.json").write_text('{"images": [')
    assert "cut.json: is not valid JSON (" in error_of(tmp_path / "cut.json")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    assert "deep.json: is not valid JSON (" in error_of(tmp_path / "deep.json")
    assert "is coco, not karpathy; omit --kind" in error_of(coco, kind="karpathy")
    with pytest.raises(ConfigError, match=r"captions: .* is not a folder"):
        open_source(coco, SourceOptions(captions=coco))
    (coco.parents[1] / "val2017").rename(tmp_path / "elsewhere")
    assert error_of(coco) == (
        f"{coco}: its images, such as '000009.jpg', are neither beside it nor in the folders next "
        "to it; name their folder with --images"
    )
