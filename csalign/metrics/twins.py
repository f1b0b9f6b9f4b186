"""Twins: images with one embedding, texts with one embedding or caption, that are not one pair."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from csalign.core.arrays import Floats, Ints, Mask
from csalign.features.checks import COLLAPSE, FEW_EQUAL

CELLS = 16 << 20  # of a table of scores


@dataclass(frozen=True)
class Twins:
    """Groups of rows that no model can distinguish, and the right items if twins count as one.

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
        _, first, group = np.unique(texts, return_index=True, return_inverse=True)
        is_mixed = np.bincount(group, self.text_image != self.text_image[first][group]) > 0
        return np.bincount(images)[images] > 1, is_mixed[group]

    @cached_property
    def _groups(self) -> list[Ints]:
        """The groups without those that are too large for twins, whose rows stay apart."""
        found = []
        for own, most in zip(self.groups, COLLAPSE.values(), strict=True):
            limit = min(max(FEW_EQUAL, most * len(own)), len(own) - 1)
            alone = own.max(initial=0) + 1 + np.arange(len(own))
            found.append(np.where(np.bincount(own)[own] > limit, alone, own))
        return found

    def right(self, way: int, queries: Ints) -> Mask:
        """Mark the right items of some queries (k,), (k, items)."""
        images, texts = self._groups
        paired = self.queries[1]
        pairs = images[self.text_image[paired]], texts[paired]
        items, own, other = self._groups[1 - way], pairs[way], pairs[1 - way]
        table = np.zeros((len(queries), int(items.max()) + 1), np.bool_)
        for row, group in enumerate(self._groups[way][queries]):
            table[row, other[own == group]] = True
        return table[:, items]

    def first_ranks(self, images: Floats, texts: Floats, first: Sequence[Ints]) -> list[Ints]:
        """Return the rank of each query's best right item, both ways.

        Args:
            images: (n, d) float32, unit rows.
            texts: (m, d) float32, unit rows.
            first: ranks of the best match, (q,) both ways, which stay where no twin is involved.
        """
        found = [ranks.copy() for ranks in first]
        (is_twin, is_mixed), (asked, paired) = self.shared, self.queries
        owners = self.text_image[paired]
        has_mixed = np.bincount(owners, is_mixed[paired], minlength=len(images)) > 0
        involved = (is_twin | has_mixed)[asked], is_mixed[paired] | is_twin[owners]
        for way, (rows, gallery) in enumerate(((images, texts), (texts, images))):
            more, step = np.flatnonzero(involved[way]), max(1, CELLS // len(gallery))
            for part in (more[start : start + step] for start in range(0, len(more), step)):
                queries = self.queries[way][part]
                scores, is_right = rows[queries] @ gallery.T, self.right(way, queries)
                best = np.where(is_right, scores, -np.inf).max(axis=1, keepdims=True)
                ahead = (~is_right & (scores >= best)).sum(axis=1)
                found[way][part] = np.minimum(found[way][part], 1 + ahead)
        return found
