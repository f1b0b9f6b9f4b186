"""Retrieval protocols: the rows that are measured, in one gallery or in folds."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from csalign.core.enums import Modality
from csalign.core.errors import DataError
from csalign.core.figures import counted, percent
from csalign.evaluation.config import Protocol
from csalign.features.checks import COLLAPSE, alike
from csalign.features.duplicates import Links
from csalign.features.join import PairedRows, first_alike, hash_rows
from csalign.features.reader import FeatureSet
from csalign.metrics.retrieval import RECALL_AT, DirectionRanks, mean_recall, rank_both_ways
from csalign.metrics.twins import Twins

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Ranks = tuple[DirectionRanks, DirectionRanks]

DIRECTIONS = ("image_to_text", "text_to_image")
FEW_TWINS = 10  # are not a collapse, unless they are all rows
NOTED = 0.01  # of R@1; twins that cost more are warned of

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class AlignedRows:
    """Rows of a feature set, and their embeddings in the shared space."""

    features: FeatureSet  # where they are stored
    split: str  # comma-separated names
    rows: PairedRows  # as stored
    images: Floats  # (n, d) float32, unit rows
    texts: Floats  # (m, d) float32, unit rows
    adapter: Path | None = None  # the run folder, or None
    weights_sha256: str | None = None  # of the adapter; None also while it is trained
    parameters: int | None = None  # of the adapter, their number; None also while it is trained
    is_trained: bool | None = False  # on some of the rows; None if that is unknown

    def describe(self) -> dict[str, Any]:
        """Return what identifies the rows, as the first keys of a JSON document."""
        names = self.features.manifest.names
        return {
            "features": str(self.features.path),
            "adapter": None if self.adapter is None else str(self.adapter),
            "split": self.split,
            **({} if names is None else {"names": dict(names)}),
        }

    def fingerprints(self) -> dict[str, str | None]:
        """Return the fingerprints of the features' content and of the adapter's weights."""
        return {"features": self.features.manifest.fingerprint(), "adapter": self.weights_sha256}


class Rule(NamedTuple):
    """Required images, folds in stored order, and captions taken per image (None: all)."""

    images: int
    folds: int = 1
    captions: int | None = None


RULES: dict[str, Rule] = {
    "coco-5k": Rule(5_000),
    "coco-1k": Rule(5_000, folds=5, captions=5),
    "flickr-1k": Rule(1_000),
}


@dataclass(frozen=True)
class Gallery:
    """Unit rows (n, d) and (m, d), float32, and the image row of each text (m,), -1 for none.

    `groups` are those of twins, (n,) and (m,), as `group_twins` finds them; None if unknown.
    """

    images: Floats
    texts: Floats
    text_image: Ints
    groups: tuple[Ints, Ints] | None = None

    @cached_property
    def twins(self) -> Twins:
        """Rows that count as one where twins are right; each by itself if unknown."""
        alone = np.arange(len(self.images)), np.arange(len(self.texts))
        return Twins(self.groups or alone, self.text_image)

    def rank(self, device: torch.device | None = None, *, divided: bool = False) -> Ranks:
        """Rank both ways; arguments as of `rank_both_ways`."""
        return rank_both_ways(self.images, self.texts, self.text_image, device, divided=divided)


def select(name: Protocol, rows: PairedRows) -> PairedRows:
    """Select the rows that a protocol measures; of a named one, texts image by image.

    Raises:
        DataError: the rows do not fit the protocol.
    """
    if name == "all":
        return rows
    rule, counts = RULES[name], rows.caption_counts
    needed, fewest = rule.captions or 1, int(counts.min())
    unpaired = int((rows.text_image < 0).sum())
    if len(rows.images) != rule.images or unpaired or fewest < needed:
        raise DataError(
            f"{rows.name}: contains {counted(len(rows.images), 'image')} with at least "
            f"{counted(fewest, 'caption')} each and {counted(unpaired, 'text')} without an image; "
            f"protocol {name} needs {rule.images:,} images with at least {needed} each and no "
            "other text; choose another --split or --protocol"
        )
    place = np.arange(rows.pairs) - np.repeat(np.cumsum(counts) - counts, counts)
    return rows.take_texts(rows.texts_by_image[place < (rule.captions or len(place))])


def split_folds(name: Protocol, whole: Gallery) -> tuple[Gallery, ...]:
    """Split the rows of `select` into the galleries of a protocol, in order, without a copy."""
    count = RULES[name].folds if name in RULES else 1
    if count == 1:
        return (whole,)
    step, folds = len(whole.images) // count, []
    for start in range(0, len(whole.images), step):
        texts = slice(*np.searchsorted(whole.text_image, [start, start + step]))
        owners = whole.text_image[texts] - start
        rows = slice(start, start + step)
        groups = whole.groups and (whole.groups[0][rows], whole.groups[1][texts])
        folds.append(Gallery(whole.images[rows], whole.texts[texts], owners, groups))
    return tuple(folds)


def group_twins(rows: PairedRows) -> tuple[Ints, Ints]:
    """Number images (n,) by their embedding, texts (m,) by embedding or caption; see `Twins`."""
    found = []
    for side in Modality:
        same = alike(rows.embeddings(side))
        links, each = Links(len(same)), np.arange(len(same))
        links.add(each, same)
        if side is Modality.TEXT:
            links.add(each, rows.caption_keys)
        groups = links.groups()
        largest = int(np.bincount(groups).max(initial=1))
        is_collapse = largest > max(FEW_TWINS, COLLAPSE[side] * len(same))
        found.append(each if is_collapse or 1 < largest == len(same) else groups)
    return found[0], found[1]


def protocol_block(name: Protocol, split: str, rows: PairedRows) -> dict[str, Any]:
    """Build the "protocol" block: what decides a score beside the model."""
    stored = sorted({str(values.dtype) for values in (rows.images, rows.texts)})
    return {
        "name": name,
        "folds": RULES[name].folds if name in RULES else 1,
        "images": len(rows.images),
        "texts": len(rows.texts),
        "split": split,
        "dtype": {"stored": "/".join(stored), "scores": "float32"},
        "ties": "a tied wrong item ranks ahead",
    }


def retrieval_block(folds: Sequence[Ranks]) -> dict[str, Any]:
    """Build the "retrieval" block: both directions, averaged over folds, and the mean recall."""
    block: dict[str, Any] = {
        name: mean_of([fold[side].summary() for fold in folds])
        for side, name in enumerate(DIRECTIONS)
    }
    return block | {"mean_recall": mean_recall(*block.values())}


def twins_block(folds: Sequence[Gallery], first: Sequence[Sequence[Ints]]) -> dict[str, Any]:
    """Build the "twins" block, {} if there are none; `first` as of `Evaluation.first_ranks`."""
    blocks, counts = [], np.zeros(2, np.int64)
    for fold, ranks in zip(folds, first, strict=True):
        equal = first_alike(hash_rows(fold.images)), first_alike(hash_rows(fold.texts))
        tied = Twins(equal, fold.text_image)
        for side, shared in enumerate(zip(tied.shared, fold.twins.shared, strict=True)):
            counts[side] += np.logical_or(*shared).sum()
        blocks.append(
            {
                way: {f"R@{k}": float((own <= k).mean()) for k in RECALL_AT} | {"R@1_limit": most}
                for way, own, most in zip(DIRECTIONS, ranks, tied.limits(), strict=True)
            }
        )
    if not counts.any():
        return {}
    found = {"images": int(counts[0]), "texts": int(counts[1]), **mean_of(blocks)}
    return {"twins": found | {"mean_recall": mean_recall(*(found[way] for way in DIRECTIONS))}}


def warn_of_twins(name: str, twins: dict[str, Any], retrieval: dict[str, Any]) -> None:
    """Log in a line how many twins there are, and what they cost; a warning if that is much."""
    counts = counted(twins["images"], "image"), counted(twins["texts"], "text")
    figures = [
        tuple(block[way][key] for way in DIRECTIONS)
        for block, key in ((twins, "R@1_limit"), (twins, "R@1"), (retrieval, "R@1"))
    ]
    cost = np.max([1 - np.array(figures[0]), np.array(figures[1]) - figures[2]])
    log.log(
        logging.WARNING if cost > NOTED else logging.INFO,
        "%s: %s and %s have the embedding or caption of another pair's; ties count as misses, so "
        "R@1 can be at most %s; with twins counted as right it is %s, else %s (image to text, text "
        "to image)",
        *(name, *counts, *(", ".join(map(percent, pair)) for pair in figures)),
    )


def mean_of(documents: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Average nested documents with the same keys, number by number."""
    if len(documents) == 1:
        return documents[0]
    found = {}
    for key, value in documents[0].items():
        values = [document[key] for document in documents]
        found[key] = mean_of(values) if isinstance(value, dict) else float(np.mean(values))
    return found
