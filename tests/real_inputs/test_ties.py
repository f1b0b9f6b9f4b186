"""Twins as people have them: captions, pictures, prompts and class names that occur twice."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest

import csalign
from csalign.core.errors import DataError
from csalign.core.results import EvalResult
from csalign.evaluation.config import EvalConfig
from csalign.evaluation.measure import measure
from csalign.evaluation.page import _ranked_queries
from csalign.report.thumbnails import Pictures

Array = npt.NDArray[Any]
AXES = np.eye(40, dtype=np.float32)


class Case(NamedTuple):
    """Pairs by axes: text j is axis `texts[j]` and belongs to image `owners[j]`.

    Expected are the numbers of twins, R@1 with ties as misses, and R@1 with twins as right.
    """

    images: Sequence[int]
    texts: Sequence[int]
    owners: Sequence[int]
    twins: tuple[int, int]
    plain: tuple[float, float]
    right: tuple[float, float]
    captions: Sequence[str] | None = None


TEN = list(range(10))
CASES = {
    "no twins": Case(TEN, TEN, TEN, (0, 0), (1, 1), (1, 1)),
    # Texts 0 and 1 are one: images 0 and 1 miss, and of the texts the one whose image is nearest.
    "a caption twice": Case(TEN, [0, 0, *TEN[2:]], TEN, (0, 2), (0.8, 0.9), (0.9, 1)),
    "a picture twice": Case([0, 0, *TEN[2:]], TEN, TEN, (2, 0), (0.9, 0.8), (1, 0.9)),
    "a pair twice": Case([0, 0, *TEN[2:]], [0, 0, *TEN[2:]], TEN, (2, 2), (0.8, 0.8), (1, 1)),
    # One row per caption: image 0 is stored three times, with a caption each.
    "a row per caption": Case(
        [0, 0, 0, *TEN[3:]], [0, 11, 12, *TEN[3:]], TEN, (3, 0), (0.8, 0.7), (1, 0.8)
    ),
    # Two captions each; the second ones of images 0 and 1 are one, the first ones still win.
    "one of two captions": Case(
        TEN,
        [value for i in TEN for value in (i, 30 if i < 2 else 20 + i)],
        [i for i in TEN for _ in range(2)],
        (0, 2),
        (1, 0.5),
        (1, 0.5),
    ),
    "copies within an image": Case(
        TEN, [i for i in TEN for _ in range(2)], sorted(TEN * 2), (0, 0), (1, 1), (1, 1)
    ),
    "a distractor's caption": Case(TEN, [*TEN, 3], [*TEN, -1], (0, 2), (0.9, 1), (1, 1)),
    # The same words, encoded apart: nothing ties, yet image 1's twin caption is right for image 0.
    "a caption in other case": Case(
        TEN,
        [1, 0, *TEN[2:]],
        TEN,
        (0, 2),
        (0.8, 0.8),
        (1, 1),
        ["A man riding a wave", "a man riding a wave ", *(f"caption {i}" for i in TEN[2:])],
    ),
    "all pictures black": Case([0] * 10, TEN, TEN, (10, 0), (0.1, 0), (0.1, 0)),
    "all texts empty": Case(TEN, [0] * 10, TEN, (0, 10), (0, 0.1), (0, 0.1)),
    "all rows equal": Case([0] * 10, [0] * 10, TEN, (10, 10), (0, 0), (0, 0)),
}


def imported(folder: Path, case: Case) -> Path:
    ids = [f"i{row}" for row in range(len(case.images))]
    np.save(folder / "x.npy", AXES[list(case.images)])
    np.save(folder / "y.npy", AXES[list(case.texts)])
    (folder / "images.csv").write_text("\n".join(["id", *ids]))
    captions = case.captions or [f"caption {axis}" for axis in case.texts]
    rows = [
        f"{ids[own] if own >= 0 else ''},{caption}"
        for own, caption in zip(case.owners, captions, strict=True)
    ]
    (folder / "texts.csv").write_text("\n".join(["image_id,caption", *rows]))
    csalign.import_arrays(
        images=folder / "x.npy",
        texts=folder / "y.npy",
        image_table=folder / "images.csv",
        text_table=folder / "texts.csv",
        out=folder / "f",
    )
    return folder / "f"


@pytest.mark.parametrize("name", CASES)
def test_retrieval_counts_ties_as_misses_and_says_what_twins_cost(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    case = CASES[name]
    with caplog.at_level("INFO"):
        document = csalign.evaluate(imported(tmp_path, case), intervals=False)
    ways = ("image_to_text", "text_to_image")
    said = [text for text in caplog.messages if "of another pair's" in text]

    plain = [document["retrieval"][way]["R@1"] for way in ways]
    assert plain == pytest.approx(case.plain)
    if case.twins == (0, 0):
        assert "twins" not in document
        assert not said
        return
    twins = document["twins"]
    assert (twins["images"], twins["texts"]) == case.twins
    assert [twins[way]["R@1"] for way in ways] == pytest.approx(case.right)
    (line,) = said
    for number, noun in zip(case.twins, ("image", "text"), strict=True):
        assert (f" {number} {noun}" in line) is (number > 0)
    assert f"{100 * case.right[0]:.2f} % from image to text and " in line


def test_a_twin_is_not_listed_as_a_mistake(tmp_path: Path) -> None:
    case = CASES["a pair twice"]._replace(texts=[0, 0, 3, 2, *TEN[4:]])  # texts 2 and 3 swapped
    evaluation = measure(EvalConfig(features=imported(tmp_path, case), intervals=False))
    lists = _ranked_queries(evaluation, Pictures(32, None, None))

    for heading, found in lists.items():
        names = {query.query.note.split()[0] for query in found}
        assert names == ({"i2", "i3"} if heading.endswith("image to text") else {"2", "3"})


def test_twins_in_folds_are_those_of_one_gallery(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images = rng.normal(size=(5_000, 8)).astype(np.float32)
    images[1], images[4_999] = images[0], images[2]  # within a fold, and across two
    texts = np.repeat(images, 5, axis=0)
    owners = [str(row // 5) for row in range(25_000)]
    (tmp_path / "pairs.csv").write_text("\n".join(["image_id", *owners]))
    np.save(tmp_path / "x.npy", images)
    np.save(tmp_path / "y.npy", texts)
    csalign.import_arrays(
        images=tmp_path / "x.npy",
        texts=tmp_path / "y.npy",
        pairs=tmp_path / "pairs.csv",
        out=tmp_path / "f",
    )
    document = csalign.evaluate(tmp_path / "f", protocol="coco-1k", intervals=False)

    assert (document["twins"]["images"], document["twins"]["texts"]) == (2, 10)
    assert document["retrieval"]["text_to_image"]["R@1"] == pytest.approx(1 - 10 / 25_000)
    assert document["twins"]["text_to_image"]["R@1"] == 1


class Classes(NamedTuple):
    """Images by axes with labels, prompts of classes by axes; top-1 as in CLIP's code."""

    images: Sequence[int]
    labels: Sequence[str]
    prompts: Sequence[tuple[str, str, int]]  # id, caption, axis
    top1: float
    said: str | None


CRANES = [
    ("n1/0", "a photo of a crane.", 0),
    ("n2/0", "a photo of a dog.", 1),
    ("n3/0", "a photo of a crane.", 0),
]
PLAIN = [("cat/0", "a cat", 0), ("dog/0", "a dog", 1), ("owl/0", "an owl", 2)]
CLASSES = {
    "a name twice": Classes(
        [0, 0, 0, 1], ["n1", "n3", "n3", "n2"], CRANES, 0.5, "classes 'n1' and 'n3' have equal"
    ),
    # The first by its prompts, not by its name.
    "the first by prompts": Classes(
        [0, 0, 0, 1], ["n1", "n3", "n3", "n2"], CRANES[::-1], 0.75, "'n3' and 'n1'"
    ),
    "one template for all": Classes(
        [0, 1, 2],
        ["cat", "dog", "owl"],
        [(key, "a photo", 3) for key, *_ in PLAIN],
        1 / 3,
        "'dog' have equal",
    ),
    "a class without images": Classes([0, 1], ["cat", "dog"], PLAIN, 1, None),
    "a case of its own": Classes([0, 1], ["Cat", " DOG"], PLAIN, 1, "2 labels are read as"),
    "numbers as floats": Classes(
        [0, 1], ["0.0", "1.0"], [("0/0", "cat", 0), ("1/0", "dog", 1)], 1, "2 labels are"
    ),
    "leading zeros": Classes(
        [0, 1], ["3", "10"], [("03/0", "cat", 0), ("10/0", "dog", 1)], 1, "1 labels are"
    ),
    "one name for two classes": Classes(
        [0, 1, 2, 2],
        ["cat", "dog", "owl", "owl"],
        [*PLAIN, ("owl/1", "an owl, the other", 3)],
        1,
        "class 'owl' has 2 prompts, most have 1",
    ),
    "images of one picture": Classes([0, 0, 0, 0], ["cat", "dog", "owl", "owl"], PLAIN, 0.25, None),
}


def classified(folder: Path, case: Classes) -> EvalResult:
    np.save(folder / "x.npy", AXES[list(case.images)])
    np.save(folder / "p.npy", AXES[[axis for *_, axis in case.prompts]])
    table = [f'{key},"{caption}"' for key, caption, _ in case.prompts]
    (folder / "prompts.csv").write_text("\n".join(["id,caption", *table]))
    labels = [f"{row},{label}" for row, label in enumerate(case.labels)]
    (folder / "labels.csv").write_text("\n".join(["id,label", *labels]))
    csalign.import_arrays(images=folder / "x.npy", out=folder / "f")
    csalign.import_arrays(
        texts=folder / "p.npy", text_table=folder / "prompts.csv", out=folder / "c"
    )
    return csalign.evaluate(
        folder / "f", zero_shot=folder / "c", labels=f"{folder / 'labels.csv'}:label"
    )


@pytest.mark.parametrize("name", CLASSES)
def test_classes_of_one_name_stay_two_and_the_first_wins(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    case = CLASSES[name]
    with caplog.at_level("INFO"):
        found = classified(tmp_path, case)["zero_shot"]

    assert found["top1"] == case.top1
    assert case.said is None or any(case.said in text for text in caplog.messages)


@pytest.mark.parametrize("id_column", [True, False])
def test_equal_prompts_have_the_class_of_their_row(id_column: bool, tmp_path: Path) -> None:
    case = CLASSES["a name twice"]
    classified(tmp_path, case)
    given = [("id,", "n1,"), ("id,", "n2,"), ("id,", "n3,")] if id_column else [("", "")] * 3
    rows = [f'{k}"{c}",{n}' for (_, k), (n, c, _) in zip(given, CRANES, strict=True)]
    table = tmp_path / "classes.csv"
    table.write_text("\n".join([f"{given[0][0]}caption,class", *rows]).replace("/0", ""))
    found = csalign.evaluate(
        tmp_path / "f",
        zero_shot=tmp_path / "c",
        labels=f"{tmp_path / 'labels.csv'}:label",
        class_of=str(table),
    )

    assert (found["zero_shot"]["classes"], found["zero_shot"]["top1"]) == (3, case.top1)


def test_a_table_of_labels_without_a_column_is_offered_with_its_own(tmp_path: Path) -> None:
    classified(tmp_path, CLASSES["a case of its own"])
    labels = str(tmp_path / "labels.csv")
    with pytest.raises(DataError, match=r"is a table; name the column too: .*labels\.csv:label$"):
        csalign.evaluate(tmp_path / "f", zero_shot=tmp_path / "c", labels=labels)


def test_labels_that_fit_two_classes_but_for_case_are_refused(tmp_path: Path) -> None:
    prompts = [("Crane/0", "the bird", 0), ("crane/0", "the machine", 1)]
    assert classified(tmp_path, Classes([0, 1], ["Crane", "crane"], prompts, 1, None))
    again = tmp_path / "again"
    again.mkdir()
    with pytest.raises(DataError, match="names 'CRANE' and 0 other labels that are not classes"):
        classified(again, Classes([0, 1], ["CRANE", "crane"], prompts, 1, None))
