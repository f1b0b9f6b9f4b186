"""Metrics by labels of images: zero-shot classification, and retrieval where a group is right."""

from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch

from csalign.core.arrays import Doubles, Floats, Ints
from csalign.features.checks import alike
from csalign.metrics.bootstrap import percentiles
from csalign.metrics.retrieval import STRIP_BYTES, score_strips

CELLS = 4 << 20  # of a table of resamples, at a time
TOP = 5
DEPTH = 10


def class_vectors(prompts: Floats, classes: Ints) -> Floats:
    """Compute one unit row per class, (c, d): the normalised mean of its prompts' unit rows.

    prompts are (p, d), classes the class of each from 0 on, none omitted. A row is 0 where the
    prompts of a class cancel out.
    """
    sums = np.zeros((int(classes.max()) + 1, prompts.shape[1]))
    np.add.at(sums, classes, prompts)
    norms = np.linalg.norm(sums, axis=1, keepdims=True)
    found: Floats = np.divide(sums, norms, out=sums, where=norms > 0).astype(np.float32)
    return found


@dataclass(frozen=True)
class Classified:
    """Rank of the right class for each image, (n,), 1-based; a tied wrong class ranks ahead.

    Of classes of one vector the first ranks ahead, as argmax does.
    """

    ranks: Ints
    labels: Ints
    classes: int

    def summary(self) -> dict[str, float | None]:
        """Return top-1, top-5 (None below five classes) and mean per-class recall, in [0, 1].

        The recall of a class is the top-1 of its images; the mean runs over classes with images.
        """
        top1, top5, recall = self._figures(self._cells()[None])
        return {
            "top1": float(top1[0]),
            "top5": None if self.classes < TOP else float(top5[0]),
            "mean_per_class_recall": float(recall[0]),
        }

    def intervals(self, *, resamples: int, seed: int) -> dict[str, list[float]]:
        """Return 95 % intervals of `summary` by the bootstrap over images.

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
        """Count each class's images right at rank 1, at ranks 2 to 5, or not at all, (c, 3)."""
        outcome = np.where(self.ranks == 1, 0, np.where(self.ranks <= TOP, 1, 2))
        counts = np.bincount(3 * self.labels + outcome, minlength=3 * self.classes)
        return counts.reshape(-1, 3)

    @staticmethod
    def _figures(cells: Ints) -> Doubles:
        """Compute top-1, top-5 and mean per-class recall of resamples, (r, c, 3) to (3, r)."""
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
    """Rank the classes of each image (n, d) by inner product with one vector per class (c, d)."""
    distinct, group, sizes = np.unique(alike(vectors), return_inverse=True, return_counts=True)
    later = np.empty(len(group), np.int64)  # twins behind each class
    later[np.argsort(group, kind="stable")] = np.cumsum(sizes).repeat(sizes) - np.arange(len(group))
    weights, rights = torch.from_numpy(sizes).float(), torch.from_numpy(group[labels])[:, None]
    ranks = [torch.empty(0)]
    for scores in score_strips(images, vectors[distinct], strip_bytes):
        right, rights = rights[: len(scores)], rights[len(scores) :]
        ranks.append((scores >= scores.gather(1, right)).float() @ weights)
    return Classified(torch.cat(ranks).long().numpy() + 1 - later[labels], labels, len(group))


@dataclass(frozen=True)
class GradedRanks:
    """Average precision over the whole gallery and nDCG@10 of each query, (q,) in [0, 1]."""

    average_precision: Doubles
    ndcg: Doubles

    def summary(self) -> dict[str, float]:
        """Return means over the queries."""
        return {
            "map": float(self.average_precision.mean()),
            f"ndcg@{DEPTH}": float(self.ndcg.mean()),
        }


def graded_both_ways(
    images: Floats, texts: Floats, text_image: Ints, groups: Ints, *, strip_bytes: int = STRIP_BYTES
) -> tuple[GradedRanks, GradedRanks]:
    """Find all captions of a group's images for each of its images, and the other way round.

    Queries are those of `rank_both_ways`, which takes the same images, texts and text_image; groups
    (n,) are numbered from 0, an image without a group being one by itself. Tables of scores have
    about `strip_bytes`. Returns image-to-text and text-to-image.
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
    min(R, K) (Jarvelin and Kekalainen 2002, with gain 1). Each wanted group has an item.
    """
    precision, ndcg = [], []
    order = np.argsort(groups, kind="stable")
    names, starts = np.unique(groups[order], return_index=True)
    items_of = dict(zip(names.tolist(), np.split(order, starts[1:]), strict=True))
    discount = 1 / np.log2(np.arange(DEPTH) + 2)
    rows = chain.from_iterable(s.numpy() for s in score_strips(queries, gallery, strip_bytes))
    for group, scores in zip(wanted.tolist(), rows, strict=True):
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
