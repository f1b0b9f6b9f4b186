"""Tasks over groups of items: clusters of both sides together, and k-NN from one to the other.

The only importer of scikit-learn, which is slow to import, so its functions import it on use.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from csalign.core.arrays import Doubles, Floats, Ints, Mask
from csalign.core.errors import DataError
from csalign.core.progress import tick
from csalign.metrics.bootstrap import DIRECTIONS, Place, nested
from csalign.metrics.gap import pair_folds
from csalign.metrics.retrieval import STRIP_BYTES

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
        from sklearn.metrics import adjusted_mutual_info_score

        once = np.ones((1, 1 + self.owners.max()), np.int64)
        found = {place[1:]: float(own[0]) for place, own in self.figures(once).items()}
        sizes = np.bincount(self.labels)
        return nested(
            {
                ("classes",): len(sizes),
                ("images",): self.images,
                ("texts",): len(self.labels) - self.images,
                ("v_measure",): found["v_measure",],
                ("ami",): float(adjusted_mutual_info_score(self.labels, self.clusters)),
                **found,
                ("knn", "majority"): float(sizes.max() / sizes.sum()),
            }
        )

    def figures(self, weights: Ints) -> dict[Place, Doubles]:
        """Compute each figure on each resample, as `bootstrap.Resampled` describes.

        AMI has none: what chance gives would have to be computed for each resample.
        """
        drawn = weights[:, self.owners].astype(np.float64)
        sides = slice(self.images, None), slice(self.images)  # tested on texts, on images
        # Where few images are labelled, a draw may miss them all: then it is the sample itself.
        drawn[np.any([drawn[:, side].sum(axis=1) == 0 for side in sides], axis=0)] = 1
        v_measure, ari = agreement(drawn, self.labels, self.clusters)
        rates = [drawn[:, s] @ self.correct[s] / drawn[:, s].sum(axis=1) for s in sides]
        knn = dict(zip(DIRECTIONS, rates, strict=True)) | {"mean": np.mean(rates, axis=0)}
        return {
            ("groups", "v_measure"): v_measure,
            ("groups", "ari"): ari,
            **{("groups", "knn", name): values for name, values in knn.items()},
        }


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
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

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
    sides, owners = (images[chosen], texts[used]), (chosen, text_image[used])
    classes = numbers[owners[0]], numbers[owners[1]]
    folds = pair_folds(len(chosen), np.searchsorted(chosen, owners[1]), rng)
    correct = np.concatenate(
        [_neighbours_agree(sides[::step], classes[::step], folds[::step]) for step in (1, -1)]
    )
    tick("clusters")
    means = KMeans(len(names), n_init=STARTS, random_state=seed % 2**32)
    # Products of a few hundred rows: on a busy machine two threads took 16 times as long as one.
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct rows than clusters
        clusters = means.fit_predict(np.concatenate(sides)).astype(np.int64)
    return GroupTasks(
        np.concatenate(owners), np.concatenate(classes), clusters, correct, len(chosen)
    )


def _neighbours_agree(
    rows: Sequence[Floats], classes: Sequence[Ints], folds: Sequence[Ints]
) -> Mask:
    """Return whether k-NN among the second side's rows gives the class of each of the first."""
    from sklearn import config_context
    from sklearn.neighbors import KNeighborsClassifier

    correct = np.zeros(len(rows[0]), np.bool_)
    for fold in np.unique(folds[0]):
        tick("k-NN across sides")
        tested, known = folds[0] == fold, folds[1] != fold
        if known.any():
            nearest = KNeighborsClassifier(min(NEIGHBOURS, known.sum()), metric="cosine")
            nearest.fit(rows[1][known], classes[1][known])
            with config_context(working_memory=STRIP_BYTES >> 20):
                correct[tested] = nearest.predict(rows[0][tested]) == classes[0][tested]
    return correct
