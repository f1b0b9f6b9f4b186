"""Named protocols of retrieval: which rows are measured, and whether in folds."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from csalign.core.errors import DataError
from csalign.features.join import PairedRows
from csalign.metrics.retrieval import DirectionRanks, mean_recall, rank_both_ways

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Name = Literal["all", "coco-5k", "coco-1k", "flickr-1k"]

DIRECTIONS = ("image_to_text", "text_to_image")
TIES = "a tied wrong item ranks ahead"


@dataclass(frozen=True)
class _Rule:
    """What a protocol asks for.

    Attributes:
        images: how many there must be.
        folds: disjoint runs of as many images, in stored order, whose figures are averaged.
        captions: the first so many of each image are taken; None for all.
    """

    images: int
    folds: int = 1
    captions: int | None = None


_RULES: dict[str, _Rule] = {
    "coco-5k": _Rule(5_000),
    "coco-1k": _Rule(5_000, folds=5, captions=5),
    "flickr-1k": _Rule(1_000),
}


@dataclass(frozen=True)
class Gallery:
    """Embeddings that are searched among each other.

    Attributes:
        images: (n, d) float32, unit rows.
        texts: (m, d) float32, unit rows.
        text_image: (m,) int64, image row of each text, -1 for none.
    """

    images: Floats
    texts: Floats
    text_image: Ints

    def rank(
        self, device: torch.device | None = None, *, divided: bool = False
    ) -> tuple[DirectionRanks, DirectionRanks]:
        """Image to text, and text to image; arguments as of `rank_both_ways`."""
        return rank_both_ways(self.images, self.texts, self.text_image, device, divided=divided)


def select(name: Name, rows: PairedRows) -> PairedRows:
    """The rows that a protocol measures; of a named one, texts image by image.

    Raises:
        DataError: a named protocol does not fit the rows; the message has the counts.
    """
    if name == "all":
        return rows
    rule = _RULES[name]
    lone = int((rows.text_image < 0).sum())
    fewest = int(rows.caption_counts.min())
    needed = rule.captions or 1
    if len(rows.images) != rule.images or lone or fewest < needed:
        asked = f"{needed} captions or more" if needed > 1 else "a caption or more"
        raise DataError(
            f"{rows.name}: holds {len(rows.images):,} images with {fewest:,} captions or more each "
            f"and {lone:,} texts without an image; protocol {name} takes {rule.images:,} images "
            f"with {asked} each and no other text; choose another --split or --protocol"
        )
    return rows.take_texts(_first_captions(rows, rule.captions))


def _first_captions(rows: PairedRows, captions: int | None) -> Ints:
    """Rows of the first captions of each image, or of all, image by image."""
    counts = rows.caption_counts
    place = np.arange(rows.pairs) - np.repeat(np.cumsum(counts) - counts, counts)
    return rows.texts_by_image if captions is None else rows.texts_by_image[place < captions]


def folds_of(name: Name, whole: Gallery) -> tuple[Gallery, ...]:
    """What is searched by itself: of the rows that `select` gave, in order and without a copy."""
    count = _RULES[name].folds if name in _RULES else 1
    if count == 1:
        return (whole,)
    step, folds = len(whole.images) // count, []
    for start in range(0, len(whole.images), step):
        some = slice(*np.searchsorted(whole.text_image, [start, start + step]))
        owners = whole.text_image[some] - start
        folds.append(Gallery(whole.images[start : start + step], whole.texts[some], owners))
    return tuple(folds)


def protocol_block(name: Name, split: str, rows: PairedRows) -> dict[str, Any]:
    """What decides a score beside the model, as ``csalign eval --json`` prints it."""
    stored = sorted({str(values.dtype) for values in (rows.images, rows.texts)})
    return {
        "name": name,
        "folds": _RULES[name].folds if name in _RULES else 1,
        "images": len(rows.images),
        "texts": len(rows.texts),
        "split": split,
        "dtype": {"stored": "/".join(stored), "scores": "float32"},
        "ties": TIES,
    }


def retrieval_block(folds: Sequence[tuple[DirectionRanks, DirectionRanks]]) -> dict[str, Any]:
    """Figures of both directions, averaged over the folds, and the mean recall."""
    block: dict[str, Any] = {
        name: mean_of([fold[side].summary() for fold in folds])
        for side, name in enumerate(DIRECTIONS)
    }
    return block | {"mean_recall": mean_recall(*block.values())}


def mean_of(documents: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The mean of documents with the same keys, number by number."""
    first = documents[0]
    if len(documents) == 1:
        return first
    return {
        key: mean_of([document[key] for document in documents])
        if isinstance(value, dict)
        else float(np.mean([document[key] for document in documents]))
        for key, value in first.items()
    }
