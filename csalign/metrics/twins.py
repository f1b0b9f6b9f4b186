"""Twins: images with one embedding, texts with one embedding or caption, that are not one pair."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from csalign.features.checks import is_shared

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

CELLS = 16 << 20  # of a table of scores


@dataclass(frozen=True)
class Twins:
    """Groups of rows that no model can tell apart, and which items are right if twins count as one.

    An item is right for a query if some pair joins their groups. Arguments named `way` are 0 for
    image to text and 1 for text to image; queries are the images with texts, and the paired texts.
    """

    groups: tuple[Ints, Ints]  # (n,) and (m,) number of each image's and text's group
    text_image: Ints  # (m,) row of the image that each text belongs to, -1 for none

    @cached_property
    def queries(self) -> tuple[Ints, Ints]:
        """Rows of the queries both ways, ascending."""
        paired = np.flatnonzero(self.text_image >= 0)
        return np.unique(self.text_image[paired]), paired

    @cached_property
    def shared(self) -> tuple[Mask, Mask]:
        """Images (n,) that are not alone in their group, and texts (m,) in one of other images."""
        images, texts = self.groups
        return np.bincount(images)[images] > 1, is_shared(texts, self.text_image)

    def limits(self) -> tuple[float, float]:
        """Return the largest possible R@1 both ways if twins tie, and ties count as misses."""
        (images, texts), (queried, paired) = self.groups, self.queries
        owners, (is_twin, is_mixed) = self.text_image[paired], self.shared
        # Twins among the queries have one best item, which is right for those of one image only.
        forth = np.unique(images[owners[~is_mixed[paired]]])
        alone = ~is_twin[owners]
        keys, counts = np.unique(
            texts[paired][alone] * len(images) + owners[alone], return_counts=True
        )
        best = np.zeros(int(texts.max()) + 1, np.int64)
        np.maximum.at(best, keys // len(images), counts)
        return len(forth) / len(queried), float(best.sum()) / len(paired)

    def right(self, way: int, queries: Ints) -> Mask:
        """Mark the right items of some queries (k,), (k, items)."""
        items, (own, other) = self.groups[1 - way], self._pairs[way]
        asked = self.groups[way][queries]
        table = np.zeros((len(queries), int(items.max()) + 1), np.bool_)
        bounds = np.searchsorted(own, asked, "left"), np.searchsorted(own, asked, "right")
        for row, (low, high) in enumerate(zip(*bounds, strict=True)):
            table[row, other[low:high]] = True
        return table[:, items]

    def first_ranks(self, images: Floats, texts: Floats, first: Sequence[Ints]) -> list[Ints]:
        """Return the rank of each query's best right item, both ways.

        Args:
            images: (n, d) float32, unit rows.
            texts: (m, d) float32, unit rows.
            first: ranks of the best match, (q,) both ways, which stay where no twin is involved.
        """
        found = [ranks.copy() for ranks in first]
        for way, (rows, gallery) in enumerate(((images, texts), (texts, images))):
            queries, (own, other) = self.queries[way], self._pairs[way]
            right = np.bincount(own, np.bincount(self.groups[1 - way])[other])
            matches = np.bincount(self.text_image[self.queries[1]])[queries] if way == 0 else 1
            more = np.flatnonzero(right[self.groups[way][queries]] > matches)
            step = max(1, CELLS // len(gallery))
            for part in (more[start : start + step] for start in range(0, len(more), step)):
                scores = rows[queries[part]] @ gallery.T
                is_right = self.right(way, queries[part])
                best = np.where(is_right, scores, -np.inf).max(axis=1, keepdims=True)
                ahead = (~is_right & (scores >= best)).sum(axis=1)
                found[way][part] = np.minimum(found[way][part], 1 + ahead)
        return found

    @cached_property
    def _pairs(self) -> tuple[tuple[Ints, Ints], tuple[Ints, Ints]]:
        """Pairs of groups, (k,) both, sorted by the group of images and by that of texts."""
        (images, texts), paired = self.groups, self.queries[1]
        most = int(texts.max()) + 1
        keys = np.unique(images[self.text_image[paired]] * most + texts[paired])
        own, other = keys // most, keys % most
        order = np.argsort(other, kind="stable")
        return (own, other), (other[order], own[order])
