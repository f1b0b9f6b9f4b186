"""Zero-shot classification: each image takes the class whose prompts lie nearest."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from csalign.metrics.bootstrap import percentiles

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

TILE_BYTES = 64 << 20
TOP = 5
CELLS = 4 << 20  # of a table of resamples, at a time


def class_vectors(prompts: Floats, classes: Ints) -> Floats:
    """One unit row a class: the mean of its prompts' unit rows, scaled to norm 1.

    Args:
        prompts: (p, d) float32, unit rows.
        classes: (p,) class of each, from 0 on, none left out.

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
    """Where the right class was found for each image.

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
        Top-5 is None for less than five classes.
        """
        top1, top5, recall = self._figures(self._cells()[None])
        return {
            "top1": float(top1[0]),
            "top5": None if self.classes < TOP else float(top5[0]),
            "mean_per_class_recall": float(recall[0]),
        }

    def intervals(self, *, resamples: int, seed: int) -> dict[str, list[float]]:
        """95 % intervals of `summary` by the bootstrap over images.

        A resample is drawn as how many images of each class fall into each outcome, which is what
        drawing the images one by one comes to.
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
        """Images of each class that are right at first, among the first five, or not at all."""
        outcome = np.where(self.ranks == 1, 0, np.where(self.ranks <= TOP, 1, 2))
        counts = np.bincount(3 * self.labels + outcome, minlength=3 * self.classes)
        return counts.reshape(-1, 3)

    @staticmethod
    def _figures(cells: Ints) -> npt.NDArray[np.float64]:
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


def classify(images: Floats, vectors: Floats, labels: Ints) -> Classified:
    """Rank the classes for each image by inner product.

    Args:
        images: (n, d) float32.
        vectors: (c, d) float32, one a class.
        labels: (n,) the right class of each image.
    """
    ranks = np.empty(len(images), np.int64)
    step = max(1, TILE_BYTES // (4 * len(vectors)))
    for start in range(0, len(images), step):
        some = slice(start, start + step)
        scores = images[some] @ vectors.T
        own = np.take_along_axis(scores, labels[some, None], axis=1)
        ranks[some] = (scores >= own).sum(axis=1)
    return Classified(ranks, labels, len(vectors))
