"""Retrieval in a mixed corpus: queries of each side search one gallery of both sides.

As MixBench and GR-CLIP count it (Li et al. 2025). Where the sides are apart, items of the query's
own side come first whatever they show, which recall across sides does not notice.
"""

from typing import Any, NamedTuple

import numpy as np
import torch

from csalign.core.arrays import Doubles, Floats, Ints
from csalign.core.progress import tick
from csalign.metrics.bootstrap import Place, nested
from csalign.metrics.neighbours import NEIGHBOURS, TIE, Both, largest, unpacked
from csalign.metrics.retrieval import STRIP_BYTES
from csalign.objective.products import product

DEPTH = NEIGHBOURS
MOST_QUERIES = 2_000  # per side
LAST = -9.0  # below any cosine


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

    def summary(self) -> dict[str, Any]:
        """Return the means over the queries, as ``csalign eval --json`` has them under "mixed".

        ``{"image": {"ndcg@10", "recall@10", "same_side@10"}, "text": {...}, "ndcg@10", ...}``, the
        last three being means of both sides.
        """
        once = np.ones((1, 1 + max(own.owners.max() for own in self)), np.int64)
        return nested({place[1:]: float(own[0]) for place, own in self.figures(once).items()})

    def figures(self, weights: Ints) -> dict[Place, Doubles]:
        """Compute each figure on each resample, as `bootstrap.Resampled` describes."""
        found: dict[Place, Doubles] = {}
        drawn = [weights[:, own.owners].astype(np.float64) for own in self]
        for name in SideRanks._fields[1:]:
            means = [w @ getattr(own, name) / w.sum(1) for w, own in zip(drawn, self, strict=True)]
            figure = f"{name}@{DEPTH}"
            found |= {
                ("mixed", "image", figure): means[0],
                ("mixed", "text", figure): means[1],
                ("mixed", figure): np.mean(means, axis=0),
            }
        return found


def rank_mixed(
    images: Floats,
    texts: Floats,
    text_image: Ints,
    *,
    seed: int,
    neighbours: Both | None = None,
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
        seed: draws the queries where one has more than `most`.
        neighbours: of all images and texts on the other side, as `rank_both_ways` finds them.
        most: queries per side.
        strip_bytes: about the size of a table of scores.
    """
    rng = np.random.default_rng(seed)
    paired = np.flatnonzero(text_image >= 0)
    asked = np.unique(text_image[paired]), paired
    drawn = [np.sort(rng.choice(own, min(len(own), most), replace=False)) for own in asked]
    corpus, done = _Corpus(images, texts, text_image, neighbours), 0
    step, found = max(1, strip_bytes // (4 * max(map(len, corpus.sides)))), []
    for side, queries in enumerate(drawn):
        parts = []
        for start in range(0, len(queries), step):
            tick("mixed corpus: queries", done, sum(map(len, drawn)))
            parts.append(corpus.search(side, queries[start : start + step]))
            done += len(parts[-1].owners)
        found.append(SideRanks(*map(np.concatenate, zip(*parts, strict=True))))
    tick("mixed corpus: queries", done, done)
    return MixedRanks(*found)


class _Corpus:
    """Rows of both sides, numbered images first; side 0 is images, 1 texts."""

    def __init__(self, images: Floats, texts: Floats, text_image: Ints, known: Both | None) -> None:
        self.neighbours = known
        self.sides = torch.from_numpy(images), torch.from_numpy(texts)
        self.starts = 0, len(images)
        self.owners = np.concatenate([np.arange(len(images)), text_image])
        self.by_owner = np.argsort(self.owners, kind="stable")

    def search(self, side: int, queries: Ints) -> SideRanks:
        """Grade the first items of some queries, rows of a side."""
        wanted, here = self.owners[self.starts[side] + queries], np.arange(len(queries))
        ordered = self.owners[self.by_owner]
        starts, ends = (np.searchsorted(ordered, wanted, end) for end in ("left", "right"))
        counts = ends - starts  # rows of the item, the query among them
        members = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - ends, counts)
        members, asking = self.by_owner[members], np.repeat(here, counts)
        values, places = [], []
        for other, (rows, start) in enumerate(zip(self.sides, self.starts, strict=True)):
            if other != side and self.neighbours is not None:
                best, found = self.neighbours[side].best(queries)
            else:
                scores = product(self.sides[side][queries], rows)
                is_there = (members >= self.starts[1]) == other
                scores[asking[is_there], members[is_there] - start] -= 2 * TIE
                if other == side:
                    scores[here, queries] = LAST
                best, found = unpacked(largest(scores, DEPTH))
            values.append(best - TIE * (other != side))
            places.append(found + start)
        listed = torch.cat(values, dim=1).topk(min(DEPTH, len(self.owners) - 1), dim=1).indices
        first = torch.cat(places, dim=1).gather(1, listed).numpy()
        is_right = self.owners[first] == wanted[:, None]
        is_same = (first >= self.starts[1]) == side
        discount = 1 / np.log2(np.arange(DEPTH) + 2)
        ideal = np.cumsum(discount)[np.minimum(counts - 1, DEPTH) - 1]
        ndcg = is_right @ discount[: first.shape[1]] / ideal
        return SideRanks(wanted, ndcg, is_right.sum(1) / (counts - 1), is_same.mean(1))
