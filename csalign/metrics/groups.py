"""Tasks over groups of items: clusters of both sides together, and k-NN from one to the other.

The only importer of scikit-learn, which is slow to import, so its functions import it on use.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from csalign.core.errors import DataError
from csalign.core.progress import tick
from csalign.metrics.bootstrap import DIRECTIONS, Place
from csalign.metrics.gap import pair_folds

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

MOST_IMAGES = 5_000
STARTS = 10  # of k-means
NEIGHBOURS = 10


@dataclass(frozen=True)
class GroupTasks:
    """Clusters and predicted labels of the labelled rows, (rows,), images first.

    It can be resampled: images are drawn with their texts, while clusters and predictions stay.
    """

    owners: Ints  # image row of each row
    labels: Ints  # from 0
    clusters: Ints
    correct: Mask  # whether k-NN among the other side's rows gives the label
    images: int  # how many of the rows are images

    def summary(self) -> dict[str, Any]:
        """Return the figures as ``csalign eval --json`` has them under "groups", but "column".

        ``{"classes", "images", "texts", "v_measure", "ami", "ari", "knn": {"image_to_text",
        "text_to_image", "mean", "majority"}}``; "image_to_text" is learned from images and tested
        on texts, "majority" the share of the largest class.
        """
        from sklearn.metrics import (
            adjusted_mutual_info_score,
            adjusted_rand_score,
            v_measure_score,
        )

        pair, shares = (self.labels, self.clusters), np.bincount(self.labels) / len(self.labels)
        return {
            "classes": len(shares),
            "images": self.images,
            "texts": len(self.labels) - self.images,
            "v_measure": float(v_measure_score(*pair)),
            "ami": float(adjusted_mutual_info_score(*pair)),
            "ari": float(adjusted_rand_score(*pair)),
            "knn": {
                **{name: float(own[0]) for name, own in self._knn(np.ones((1, len(self.labels))))},
                "majority": float(shares.max()),
            },
        }

    def figures(self, weights: Ints) -> dict[Place, Doubles]:
        """Compute each figure on each resample, as `bootstrap.Resampled` describes.

        AMI has none: what chance gives would have to be computed for each resample.
        """
        drawn = weights[:, self.owners].astype(np.float64)
        v_measure, ari = agreement(drawn, self.labels, self.clusters)
        return {
            ("groups", "v_measure"): v_measure,
            ("groups", "ari"): ari,
            **{("groups", "knn", name): values for name, values in self._knn(drawn)},
        }

    def _knn(self, weights: Doubles) -> list[tuple[str, Doubles]]:
        """Compute the accuracies with weights (resamples, rows): on texts, on images, mean."""
        sides = slice(self.images, None), slice(self.images)
        rates = [weights[:, s] @ self.correct[s] / weights[:, s].sum(axis=1) for s in sides]
        return list(zip((*DIRECTIONS, "mean"), (*rates, np.mean(rates, axis=0)), strict=True))


def agreement(weights: Doubles, labels: Ints, clusters: Ints) -> tuple[Doubles, Doubles]:
    """Compute V-measure and adjusted Rand index of weighted rows, (resamples,) each.

    Both are functions of the sums of the weights by label, by cluster and by both, so a weight is
    as many copies of a row, as scikit-learn would count them.

    Args:
        weights: (resamples, rows) float64, whole numbers; every resample has a row.
        labels: (rows,) from 0.
        clusters: (rows,) from 0.
    """
    cells = labels * (clusters.max() + 1) + clusters
    tables = [_sums(weights, groups) for groups in (cells, labels, clusters)]
    total = weights.sum(axis=1)
    joint, of_label, of_cluster = (
        np.log(total) - (table * np.log(np.maximum(table, 1))).sum(axis=1) / total
        for table in tables
    )
    both = of_label + of_cluster
    v_measure = np.divide(2 * (both - joint), both, out=np.ones_like(both), where=both > 1e-12)
    same, by_label, by_cluster = ((table * (table - 1)).sum(axis=1) / 2 for table in tables)
    chance = by_label * by_cluster / np.maximum(total * (total - 1) / 2, 1)
    most = (by_label + by_cluster) / 2 - chance
    ari = np.divide(same - chance, most, out=np.ones_like(most), where=most > 0)
    return np.maximum(v_measure, 0), ari


def _sums(weights: Doubles, groups: Ints) -> Doubles:
    """Sum the weights (resamples, rows) of each group that has rows."""
    order = np.argsort(groups, kind="stable")
    starts = np.flatnonzero(np.diff(groups[order], prepend=-1))
    found: Doubles = np.add.reduceat(weights[:, order], starts, axis=1)
    return found


def group_tasks(
    images: Floats,
    texts: Floats,
    text_image: Ints,
    labels: Sequence[str | None],
    *,
    seed: int,
    most: int = MOST_IMAGES,
) -> GroupTasks:
    """Cluster the labelled rows of both sides together, and label each side from the other.

    A text has its image's label. There are as many clusters as classes, the best of ten starts of
    k-means. Neighbours of a row are the 10 of the other side with the highest cosine, among the
    rows of four folds of the images while a row is in the fifth, so that none sees its own pair.

    Args:
        images: (n, d) float32, unit rows.
        texts: (m, d) float32, unit rows.
        text_image: (m,) row of the image that each text belongs to, -1 for none.
        labels: of the images, (n,); None for none.
        seed: of the folds, of k-means, and of the images that are drawn if more are labelled.
        most: images used; all texts of these are.

    Raises:
        DataError: fewer than two classes, or no text of a labelled image.
    """
    rng = np.random.default_rng(seed)
    labelled = np.flatnonzero([label is not None for label in labels])
    chosen = np.sort(rng.choice(labelled, min(len(labelled), most), replace=False))
    numbers = np.full(len(images) + 1, -1)  # the last is that of a text without an image
    names, numbers[chosen] = np.unique([str(labels[i]) for i in chosen], return_inverse=True)
    used = np.flatnonzero(numbers[text_image] >= 0)
    if len(names) < 2 or not len(used):
        raise DataError(
            f"the labels name {len(names)} classes of images, which have {len(used)} texts; "
            "clusters and k-NN need two classes and a text: choose another column"
        )
    sides = images[chosen], texts[used]
    owners = chosen, text_image[used]
    classes = numbers[owners[0]], numbers[owners[1]]
    places = np.searchsorted(chosen, owners[1])
    correct = _neighbours_agree(sides, classes, pair_folds(len(chosen), places, rng))
    clusters = _k_means(np.concatenate(sides), len(names), seed)
    return GroupTasks(
        np.concatenate(owners), np.concatenate(classes), clusters, correct, len(chosen)
    )


def _k_means(rows: Floats, clusters: int, seed: int) -> Ints:
    """Return the cluster of each row."""
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    tick("clusters")
    means = KMeans(clusters, n_init=STARTS, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct rows than clusters
        found: Ints = means.fit_predict(rows).astype(np.int64)
    return found


def _neighbours_agree(
    sides: tuple[Floats, Floats], classes: tuple[Ints, Ints], folds: tuple[Ints, Ints]
) -> Mask:
    """Return whether the neighbours on the other side give each row's class, images first."""
    from sklearn.neighbors import KNeighborsClassifier

    correct = [np.zeros(len(rows), np.bool_) for rows in sides]
    for fold in np.unique(folds[0]):
        tick("k-NN across sides")
        for own, other in ((0, 1), (1, 0)):
            tested, known = folds[own] == fold, folds[other] != fold
            if tested.any() and known.any():
                # Of unit rows, the nearest have the highest cosine.
                nearest = KNeighborsClassifier(min(NEIGHBOURS, known.sum()), algorithm="brute")
                nearest.fit(sides[other][known], classes[other][known])
                found = nearest.predict(sides[own][tested])
                correct[own][tested] = found == classes[own][tested]
    return np.concatenate(correct)
