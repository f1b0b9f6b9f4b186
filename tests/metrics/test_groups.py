from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from sklearn.metrics import (
    adjusted_mutual_info_score,
    adjusted_rand_score,
    normalized_mutual_info_score,
    v_measure_score,
)

from csalign.core.errors import DataError
from csalign.metrics.bootstrap import resample
from csalign.metrics.gap import pair_folds
from csalign.metrics.groups import GroupTasks, agreement, group_tasks
from csalign.metrics.retrieval import rank_both_ways

Array = npt.NDArray[Any]
NAMES = ("bird", "car", "dog", "tree")


def unit(x: Array) -> npt.NDArray[np.float32]:
    rows: npt.NDArray[np.float32] = x.astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows


def labelled(
    images: int = 120, *, spread: float = 0.5, offset: float = 0.0, seed: int = 0
) -> tuple[Array, Array, Array, list[str]]:
    """Clusters of images around a direction per class, and a text of each, at an offset."""
    rng = np.random.default_rng(seed)
    classes = rng.integers(len(NAMES), size=images)
    x = 3 * np.eye(len(NAMES), 10)[classes] + spread * rng.normal(size=(images, 10))
    y = x + spread * rng.normal(size=x.shape) + offset * np.eye(10)[9]
    return unit(x), unit(y), np.arange(images), [NAMES[own] for own in classes]


def summary(x: Array, y: Array, owners: Array, labels: list[Any]) -> Any:
    return group_tasks(x, y, owners, labels, seed=0).summary()


def test_figures_are_those_of_scikit_learn() -> None:
    tasks = group_tasks(*labelled(spread=1.2), seed=0)

    found = tasks.summary()

    pair = tasks.labels, tasks.clusters
    assert 0 < found["v_measure"] < 1
    assert found["v_measure"] == pytest.approx(v_measure_score(*pair))
    assert found["v_measure"] == pytest.approx(normalized_mutual_info_score(*pair))
    assert found["ami"] == pytest.approx(adjusted_mutual_info_score(*pair))
    assert found["ari"] == pytest.approx(adjusted_rand_score(*pair))
    assert (found["classes"], found["images"], found["texts"]) == (4, 120, 120)


@pytest.mark.parametrize("classes", [1, 2, 30])
def test_agreement_of_weighted_rows_equals_scikit_learn_on_copies(classes: int) -> None:
    rng = np.random.default_rng(classes)
    labels, clusters = rng.integers(classes, size=60), rng.integers(3, size=60)
    clusters = np.where(rng.random(60) < 0.5, labels, clusters)
    weights = rng.integers(0, 3, (5, 60)).astype(np.float64)
    weights[-1] = np.arange(60) == 7  # a single row

    v_measure, ari = agreement(weights, labels, clusters)

    for row, own in enumerate(weights.astype(int)):
        copies = np.repeat(labels, own), np.repeat(clusters, own)
        assert v_measure[row] == pytest.approx(v_measure_score(*copies), abs=1e-12)
        assert ari[row] == pytest.approx(adjusted_rand_score(*copies), abs=1e-12)


def test_neighbours_equal_an_independent_loop() -> None:
    x, y, owners, labels = labelled(60, spread=1.5)
    owners = np.concatenate([owners[:50], owners[:30], [-1, -1]])  # 10 images without texts
    y = unit(np.concatenate([y[:50], y[:30] + 0.1, y[:2]]))
    tasks = group_tasks(x, y, owners, labels, seed=3)
    rng = np.random.default_rng(3)
    rng.choice(60, 60, replace=False)  # the draw of the images
    rows, used = (x, y[:80]), owners[:80]
    folds = pair_folds(60, used, rng)
    classes = np.array(labels), np.array(labels)[used]

    correct = []
    for own, other in ((0, 1), (1, 0)):
        for row, fold, name in zip(rows[own], folds[own], classes[own], strict=True):
            known = folds[other] != fold
            nearest = np.argsort(-(rows[other][known] @ row))[:10]
            names, votes = np.unique(classes[other][known][nearest], return_counts=True)
            correct.append(names[votes.argmax()] == name)

    assert 0 < np.mean(correct) < 1
    assert tasks.correct.tolist() == correct
    found = tasks.summary()["knn"]
    assert found["text_to_image"] == pytest.approx(np.mean(correct[:60]))
    assert found["image_to_text"] == pytest.approx(np.mean(correct[60:]))
    assert found["mean"] == pytest.approx((found["text_to_image"] + found["image_to_text"]) / 2)


def test_an_offset_parts_the_clusters_and_a_mean_shift_joins_them() -> None:
    x, y, owners, labels = labelled(offset=8)
    shifted_x, shifted_y = (unit(rows - rows.mean(axis=0)) for rows in (x, y))

    gap, closed = summary(x, y, owners, labels), summary(shifted_x, shifted_y, owners, labels)

    assert gap["v_measure"] < 0.8
    assert closed["v_measure"] > 0.95
    assert closed["ari"] > 0.95
    assert closed["knn"]["mean"] > 0.95


def test_random_sides_give_chance() -> None:
    rng = np.random.default_rng(0)
    x, y = unit(rng.normal(size=(300, 16))), unit(rng.normal(size=(300, 16)))
    labels = rng.choice(NAMES, 300).tolist()

    found = summary(x, y, np.arange(300), labels)

    assert found["ari"] == pytest.approx(0, abs=0.02)
    assert found["ami"] == pytest.approx(0, abs=0.02)
    assert found["knn"]["mean"] == pytest.approx(0.25, abs=0.06)
    assert found["knn"]["majority"] == pytest.approx(0.25, abs=0.06)


def test_a_row_is_not_labelled_by_its_own_pair() -> None:
    rng = np.random.default_rng(0)
    x = unit(rng.normal(size=(300, 200)))

    found = summary(x, x, np.arange(300), rng.choice(NAMES, 300).tolist())

    assert found["knn"]["mean"] < 0.4


def test_rows_without_a_label_take_no_part() -> None:
    x, y, owners, labels = labelled(60)
    owners = np.where(np.arange(60) < 3, -1, owners)

    tasks = group_tasks(x, y, owners, [*labels[:50], *[None] * 10], seed=0)

    assert tasks.images == 50
    assert tasks.owners.tolist() == [*range(50), *range(3, 50)]
    few = group_tasks(x, y, owners, labels, seed=0, most=20)
    assert few.images == 20
    assert set(few.owners[20:]) <= set(few.owners[:20])


@pytest.mark.parametrize("labels", [["a"] * 60, [None] * 60, ["a", "b"] + [None] * 58])
def test_labels_without_two_classes_or_texts_are_refused(labels: list[str | None]) -> None:
    x, y, owners, _ = labelled(60)
    owners = np.where(np.arange(60) < 3, -1, owners)

    with pytest.raises(DataError, match="choose another column"):
        group_tasks(x, y, owners, labels, seed=0)


def repeated(tasks: GroupTasks, weights: Array) -> Any:
    copies = weights[tasks.owners]
    fields: Any = (tasks.owners, tasks.labels, tasks.clusters, tasks.correct)
    images = int(copies[: tasks.images].sum())
    owners, labels, clusters, correct = (np.repeat(own, copies) for own in fields)
    return GroupTasks(owners, labels, clusters, correct, images).summary()


def test_resamples_equal_repeated_rows() -> None:
    x, y, owners, labels = labelled(40, spread=1.5)
    tasks = group_tasks(x, y, owners, labels, seed=0)
    weights = np.random.default_rng(0).integers(0, 3, (4, 40))

    found = tasks.figures(weights)

    for row, own in enumerate(weights):
        copies = repeated(tasks, own)
        assert found["groups", "v_measure"][row] == pytest.approx(copies["v_measure"])
        assert found["groups", "ari"][row] == pytest.approx(copies["ari"])
        for name in ("image_to_text", "text_to_image", "mean"):
            assert found["groups", "knn", name][row] == pytest.approx(copies["knn"][name])


@pytest.mark.parametrize("spread", [0.5, 1.5, 50])
def test_intervals_contain_the_figures(spread: float) -> None:
    x, y, owners, labels = labelled(spread=spread)
    tasks = group_tasks(x, y, owners, labels, seed=0)
    ranks = rank_both_ways(x, y, owners)

    found = resample(ranks, x, y, owners, resamples=200, seed=0, further=[tasks]).intervals()

    measured = tasks.summary()
    for name in ("v_measure", "ari"):
        low, high = found["groups"][name]
        assert low <= measured[name] + 1e-9
        assert high >= measured[name] - 1e-9
    low, high = found["groups"]["knn"]["mean"]
    assert low <= measured["knn"]["mean"] <= high


def test_a_draw_without_any_labelled_image_is_the_sample_itself() -> None:
    x, y, owners, labels = labelled(60)
    tasks = group_tasks(x, y, owners, [*labels[:6], *[None] * 54], seed=0)
    weights = np.stack([np.arange(60) >= 6, np.ones(60)]).astype(np.int64)

    for values in tasks.figures(weights).values():
        assert values[0] == values[1]
