from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from sklearn.metrics import recall_score, top_k_accuracy_score

from csalign.metrics.labels import Classified, class_vectors, classify

Array = npt.NDArray[Any]


def unit(rows: Array) -> npt.NDArray[np.float32]:
    scaled: npt.NDArray[np.float32] = rows.astype(np.float32)
    scaled /= np.linalg.norm(scaled, axis=1, keepdims=True)
    return scaled


def test_class_vectors_are_unit_means_of_unit_prompts() -> None:
    prompts = unit(np.random.default_rng(0).normal(size=(7, 4)))
    classes = np.array([1, 0, 1, 2, 0, 1, 2])
    found = class_vectors(prompts, classes)

    for number in range(3):
        mean = prompts[classes == number].astype(np.float64).mean(axis=0)
        np.testing.assert_allclose(found[number], mean / np.linalg.norm(mean), atol=1e-6)


def test_figures_equal_sklearns() -> None:
    rng = np.random.default_rng(1)
    vectors = unit(rng.normal(size=(9, 6)))
    labels = rng.integers(0, 8, 100)  # of the last class there are no images
    images = unit(vectors[labels] + 0.6 * rng.normal(size=(100, 6)))
    # Strips of eleven images.
    found = classify(images, vectors, labels, strip_bytes=4 * 9 * 11).summary()

    scores = images @ vectors.T
    assert found == pytest.approx(
        {
            "top1": top_k_accuracy_score(labels, scores, k=1, labels=np.arange(9)),
            "top5": top_k_accuracy_score(labels, scores, k=5, labels=np.arange(9)),
            "mean_per_class_recall": recall_score(
                labels, scores.argmax(axis=1), average="macro", labels=np.arange(8)
            ),
        }
    )


def test_a_tied_wrong_class_ranks_ahead_but_of_equal_ones_the_first_and_few_have_no_top5() -> None:
    images, labels = np.array([[1, 0]] * 4, np.float32), np.array([0, 1, 2, 3])
    tied = np.array([[0.6, 0.8], [0.6, -0.8], [0, 1], [-1, 0]], np.float32)
    equal = tied[[2, 0, 2, 0]]

    assert classify(images, tied, labels).ranks.tolist() == [2, 2, 3, 4]
    assert classify(images, equal, labels).ranks.tolist() == [3, 1, 4, 2]
    assert classify(images, equal[[0, 0, 0, 0]], labels).summary() == {
        "top1": 0.25,
        "top5": None,
        "mean_per_class_recall": 0.25,
    }


def test_intervals_are_those_of_drawing_images() -> None:
    rng = np.random.default_rng(2)
    ranks, labels = rng.integers(1, 9, 400), rng.integers(0, 10, 400)
    found = Classified(ranks, labels, 10)
    intervals = found.intervals(resamples=4_000, seed=0)
    drawn = [
        Classified(ranks[rows], labels[rows], 10).summary()
        for rows in rng.integers(0, 400, (2_000, 400))
    ]

    for name, (low, high) in intervals.items():
        expected = np.quantile([summary[name] for summary in drawn], [0.025, 0.975])
        assert [low, high] == pytest.approx(expected, abs=0.008), name
    assert found.intervals(resamples=100, seed=3) == found.intervals(resamples=100, seed=3)
