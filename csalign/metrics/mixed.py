"""Retrieval in a mixed corpus: queries of each side search one gallery of both sides.

As MixBench and GR-CLIP count it (Li et al. 2025). Where the sides are apart, items of the query's
own side come first whatever they show, which recall across sides does not notice.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from csalign.core.progress import tick
from csalign.metrics.bootstrap import Place, nested
from csalign.metrics.retrieval import STRIP_BYTES

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

DEPTH = 10
MOST_QUERIES = 2_000  # of a side
TIE = 1e-6  # scores of unit rows closer than this are equal, up to rounding


class SideRanks(NamedTuple):
    """What the queries of one side find in the gallery of both sides, (q,) each."""

    owners: Ints  # image row of each query
    ndcg: Doubles  # in [0, 1]
    recall: Doubles  # share of the right items that are among the first 10
    same_side: Doubles  # share of the first 10 that are of the query's side


class MixedRanks(NamedTuple):
    """Result of `rank_mixed`, by the side of the queries; it can be resampled."""

    image: SideRanks
    text: SideRanks

    def summary(self) -> dict[str, dict[str, float] | float]:
        """Return the means over the queries, as ``csalign eval --json`` has them under "mixed".

        ``{"image": {"ndcg@10", "recall@10", "same_side@10"}, "text": {...}, "ndcg@10", ...}``, the
        last three being means of both sides.
        """
        images = 1 + max(int(own.owners.max()) for own in self)
        found = self.figures(np.ones((1, images), np.int64))
        document: dict[str, dict[str, float] | float]
        document = nested({place[1:]: float(values[0]) for place, values in found.items()})
        return document

    def figures(self, weights: Ints) -> dict[Place, Doubles]:
        """Compute each figure on each resample, as `bootstrap.Resampled` describes."""
        found: dict[Place, Doubles] = {}
        for side, own in zip(self._fields, self, strict=True):
            drawn = weights[:, own.owners].astype(np.float64)
            means = drawn @ np.stack(own[1:], axis=1) / drawn.sum(axis=1, keepdims=True)
            for name, values in zip(own._fields[1:], means.T, strict=True):
                found["mixed", side, f"{name}@{DEPTH}"] = values
        names = [place[-1] for place in found if place[1] == "image"]
        both = {name: [found["mixed", side, name] for side in self._fields] for name in names}
        return found | {("mixed", name): np.mean(values, axis=0) for name, values in both.items()}


def rank_mixed(
    images: Floats,
    texts: Floats,
    text_image: Ints,
    *,
    seed: int,
    most: int = MOST_QUERIES,
    strip_bytes: int = STRIP_BYTES,
) -> MixedRanks:
    """Search all images and texts together for the other rows of each query's item.

    Queries are the images with texts, and the paired texts. Right items of an image are its texts;
    of a text its image, and the image's other texts. The query itself is left out. Of scores that
    are equal, up to 1e-6, wrong items of the query's side come first, then wrong ones of the other
    side, then right ones.

    Args:
        images: (n, d) float32, unit rows.
        texts: (m, d) float32, unit rows.
        text_image: (m,) row of the image that each text belongs to, -1 for none; not all -1.
        seed: draws the queries where a side has more than `most`.
        most: queries of a side.
        strip_bytes: about the size of a table of scores.
    """
    corpus, rng = _Corpus(images, texts, text_image), np.random.default_rng(seed)
    sides = [
        np.sort(rng.choice(rows, min(len(rows), most), replace=False))
        for rows in (corpus.owned[0], corpus.owned[1])
    ]
    step = max(1, strip_bytes // (4 * max(len(images), len(texts))))
    total, done, found = sum(map(len, sides)), 0, []
    for side, queries in enumerate(sides):
        parts = []
        for start in range(0, len(queries), step):
            tick("mixed corpus: queries", done, total)
            parts.append(corpus.search(side, queries[start : start + step]))
            done += len(parts[-1].owners)
        found.append(SideRanks(*map(np.concatenate, zip(*parts, strict=True))))
    tick("mixed corpus: queries", done, total)
    return MixedRanks(*found)


class _Corpus:
    """Rows of both sides; a side is 0 for images and 1 for texts."""

    def __init__(self, images: Floats, texts: Floats, text_image: Ints) -> None:
        self.rows = torch.from_numpy(images), torch.from_numpy(texts)
        self.owners = np.arange(len(images)), text_image  # image row of each row
        paired = np.flatnonzero(text_image >= 0)
        self.texts = paired[np.argsort(text_image[paired], kind="stable")]  # image by image
        self.owned = np.unique(text_image[paired]), paired  # rows that may be queries

    def search(self, side: int, queries: Ints) -> SideRanks:
        """Grade the first items of some queries, rows of a side."""
        wanted = self.owners[side][queries]
        of_text = self.owners[1][self.texts]
        starts, ends = (np.searchsorted(of_text, wanted, end) for end in ("left", "right"))
        # As many right items as texts: a text is not its own, but its image is.
        counts, here = ends - starts, np.arange(len(queries))
        before = np.repeat(np.cumsum(counts) - counts - starts, counts)
        right = (
            (here, wanted),
            (np.repeat(here, counts), self.texts[np.arange(counts.sum()) - before]),
        )
        values, are_right, are_same = [], [], []
        for gallery in (0, 1):
            scores = self.rows[side][queries] @ self.rows[gallery].T
            scores[right[gallery]] -= 2 * TIE
            if gallery == side:
                scores[here, queries] = -torch.inf
            best = scores.topk(min(DEPTH, scores.shape[1]), dim=1)
            values.append(best.values - (TIE if gallery != side else 0))
            are_right.append(self.owners[gallery][best.indices.numpy()] == wanted[:, None])
            are_same.append(np.full(best.indices.shape, gallery == side))
        listed = min(DEPTH, len(self.rows[0]) + len(self.rows[1]) - 1)
        first = torch.cat(values, dim=1).topk(listed, dim=1).indices.numpy()
        is_right, is_same = (
            np.take_along_axis(np.concatenate(own, axis=1), first, axis=1)
            for own in (are_right, are_same)
        )
        discount = 1 / np.log2(np.arange(DEPTH) + 2)
        ideal = np.cumsum(discount)[np.minimum(counts, DEPTH) - 1]
        return SideRanks(
            wanted, is_right @ discount[:listed] / ideal, is_right.sum(1) / counts, is_same.mean(1)
        )
