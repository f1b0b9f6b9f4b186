"""Metrics by labels of images: zero-shot classification, and retrieval where a group is right."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from csalign.metrics.bootstrap import percentiles

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Doubles = npt.NDArray[np.float64]

STRIP_BYTES = 64 << 20  # of a table of scores
CELLS = 4 << 20  # of a table of resamples, at a time
TOP = 5
DEPTH = 10


def class_vectors(prompts: Floats, classes: Ints) -> Floats:
    """Compute one unit row per class: the normalised mean of its prompts' unit rows.

    Args:
        prompts: (p, d) float32, unit rows.
        classes: (p,) class of each, from 0 on, none omitted.

    Returns:
        (c, d) float32; a row of zeros where the prompts of a class cancel out.
    """
    sums = np.zeros((int(classes.max()) + 1, prompts.shape[1]))
    np.add.at(sums, classes, prompts)
    norms = np.linalg.norm(sums, axis=1, keepdims=True)
    found: Floats = np.divide(sums, norms, out=sums, where=norms > 0).astype(np.float32)
    return found


@dataclass(frozen=True)
class Classified:
    """Rank of the right class for each image.

    Attributes:
        ranks: (n,) int64, 1-based; a tied wrong class ranks ahead.
        labels: (n,) int64, the right class.
        classes: how many there are.
    """

    ranks: Ints
    labels: Ints
    classes: int

    def summary(self) -> dict[str, float | None]:
        """Top-1, top-5 and mean per-class recall, in [0, 1].

        The recall of a class is the top-1 of its images; the mean runs over classes with images.
        Top-5 is None for fewer than five classes.
        """
        top1, top5, recall = self._figures(self._cells()[None])
        return {
            "top1": float(top1[0]),
            "top5": None if self.classes < TOP else float(top5[0]),
            "mean_per_class_recall": float(recall[0]),
        }

    def intervals(self, *, resamples: int, seed: int) -> dict[str, list[float]]:
        """95 % intervals of `summary` by the bootstrap over images.

        A resample is drawn as the number of images of each class with each outcome, which is
        equivalent to drawing the images one by one.
        """
        cells, rng = self._cells(), np.random.default_rng(seed)
        shares = cells.ravel() / cells.sum()
        at_a_time = max(1, CELLS // cells.size)
        parts = [
            self._figures(rng.multinomial(cells.sum(), shares, size=rows).reshape(rows, -1, 3))
            for rows in (min(at_a_time, resamples - i) for i in range(0, resamples, at_a_time))
        ]
        values = np.concatenate(parts, axis=1)
        return {
            name: list(percentiles(drawn))
            for (name, figure), drawn in zip(self.summary().items(), values, strict=True)
            if figure is not None
        }

    def _cells(self) -> Ints:
        """Images of each class that are right at rank 1, at ranks 2 to 5, or not at all, (c, 3)."""
        outcome = np.where(self.ranks == 1, 0, np.where(self.ranks <= TOP, 1, 2))
        counts = np.bincount(3 * self.labels + outcome, minlength=3 * self.classes)
        return counts.reshape(-1, 3)

    @staticmethod
    def _figures(cells: Ints) -> Doubles:
        """Top-1, top-5 and mean per-class recall of some resamples: (r, c, 3) to (3, r)."""
        of_class = cells.sum(axis=2)
        total = of_class.sum(axis=1)
        recall = cells[:, :, 0] / np.maximum(of_class, 1)
        return np.stack(
            [
                cells[:, :, 0].sum(axis=1) / total,
                cells[:, :, :2].sum(axis=(1, 2)) / total,
                recall.sum(axis=1) / (of_class > 0).sum(axis=1),
            ]
        )


def classify(
    images: Floats, vectors: Floats, labels: Ints, *, strip_bytes: int = STRIP_BYTES
) -> Classified:
    """Rank the classes for each image by inner product.

    Args:
        images: (n, d) float32.
        vectors: (c, d) float32, one per class.
        labels: (n,) the right class of each image.
        strip_bytes: size of the table of scores held at a time.
    """
    ranks = [np.empty(0, np.int64)]
    for some, scores in _score_strips(images, vectors, strip_bytes):
        own = np.take_along_axis(scores, labels[some, None], axis=1)
        ranks.append((scores >= own).sum(axis=1))
    return Classified(np.concatenate(ranks), labels, len(vectors))


@dataclass(frozen=True)
class GradedRanks:
    """Retrieval figures of each query's group, in one direction.

    Attributes:
        average_precision: (q,) in [0, 1], over the whole gallery.
        ndcg: (q,) in [0, 1], of the first `DEPTH` items.
    """

    average_precision: Doubles
    ndcg: Doubles

    def summary(self) -> dict[str, float]:
        """Means over the queries."""
        return {
            "map": float(self.average_precision.mean()),
            f"ndcg@{DEPTH}": float(self.ndcg.mean()),
        }


def graded_both_ways(
    images: Floats,
    texts: Floats,
    text_image: Ints,
    groups: Ints,
    *,
    strip_bytes: int = STRIP_BYTES,
) -> tuple[GradedRanks, GradedRanks]:
    """Find all captions of a group's images for each of its images, and the other way round.

    Queries are those of `rank_both_ways`: images with texts, and texts with an image.

    Args:
        images: (n, d) float32, unit rows.
        texts: (m, d) float32, unit rows.
        text_image: (m,) image row of each text, -1 for none.
        groups: (n,) group of each image, from 0 on; an image without one is a group by itself.
        strip_bytes: size of the table of scores held at a time.

    Returns:
        Image-to-text and text-to-image.
    """
    paired = np.flatnonzero(text_image >= 0)
    of_text = np.where(text_image >= 0, groups[text_image], -1)
    queried = np.unique(text_image[paired])
    return (
        _grade(images[queried], groups[queried], texts, of_text, strip_bytes),
        _grade(texts[paired], of_text[paired], images, groups, strip_bytes),
    )


def _grade(
    queries: Floats, wanted: Ints, gallery: Floats, groups: Ints, strip_bytes: int
) -> GradedRanks:
    """Grade each query's list of the whole gallery; ties are broken against the model.

    With its group's R items at ranks r_1 < ... < r_R, average precision is the mean of i / r_i,
    and nDCG@K the sum of 1 / log2(r_i + 1) over r_i <= K, over the same sum for ranks 1 to
    min(R, K) (Jarvelin and Kekalainen 2002, with gain 1).

    Args:
        queries: (q, d).
        wanted: (q,) group of each query, which has at least one item in the gallery.
        gallery: (g, d).
        groups: (g,) group of each item, -1 for none.
        strip_bytes: size of the table of scores held at a time.
    """
    precision, ndcg = [], []
    order = np.argsort(groups, kind="stable")
    names, starts = np.unique(groups[order], return_index=True)
    items_of = dict(zip(names.tolist(), np.split(order, starts[1:]), strict=True))
    discount = 1 / np.log2(np.arange(DEPTH) + 2)
    for some, strip in _score_strips(queries, gallery, strip_bytes):
        for group, scores in zip(wanted[some].tolist(), strip, strict=True):
            own = np.sort(scores[items_of[group]])[::-1]
            scores.sort()
            # Items at least as high, less the right ones among them, are wrong and rank ahead.
            ahead = len(gallery) - np.searchsorted(scores, own, side="left")
            ahead -= len(own) - np.searchsorted(own[::-1], own, side="left")
            place = np.arange(1, len(own) + 1)
            ranks = ahead + place
            precision.append((place / ranks).mean())
            gains = discount[ranks[ranks <= DEPTH] - 1].sum()
            ndcg.append(gains / discount[: len(own)].sum())
    return GradedRanks(np.array(precision), np.array(ndcg))


def _score_strips(
    queries: Floats, gallery: Floats, strip_bytes: int
) -> Iterator[tuple[slice, Floats]]:
    """Scores of some queries at a time, (some, g)."""
    step = max(1, strip_bytes // (4 * len(gallery)))
    for start in range(0, len(queries), step):
        some = slice(start, start + step)
        yield some, queries[some] @ gallery.T
