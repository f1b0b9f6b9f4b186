"""Retrieval protocols: the rows that are measured, in one gallery or in folds."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from csalign.core.arrays import Floats, Ints
from csalign.core.enums import Modality
from csalign.core.errors import DataError
from csalign.core.figures import counted, percent
from csalign.evaluation.config import Protocol
from csalign.features.checks import alike
from csalign.features.duplicates import Links
from csalign.features.join import PairedRows
from csalign.features.reader import FeatureSet
from csalign.metrics.retrieval import RECALL_AT, DirectionRanks, mean_recall, rank_both_ways
from csalign.metrics.twins import Twins

Ranks = tuple[DirectionRanks, DirectionRanks]

DIRECTIONS = ("image_to_text", "text_to_image")
NOTED = 0.05  # share of a side; more twins are warned of

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

    `twins` are as `find_twins` finds them; None if unknown.
    """

    images: Floats
    texts: Floats
    text_image: Ints
    twins: Twins | None = None

    def rank(self, device: torch.device | None = None, **options: Any) -> Ranks:
        """Rank both ways; arguments as of `rank_both_ways`."""
        return rank_both_ways(self.images, self.texts, self.text_image, device, **options)


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
        groups = whole.twins and (whole.twins.groups[0][rows], whole.twins.groups[1][texts])
        twins = groups and Twins(groups, owners)
        folds.append(Gallery(whole.images[rows], whole.texts[texts], owners, twins))
    return tuple(folds)


def find_twins(rows: PairedRows) -> Twins:
    """Group images by their embedding, and texts by embedding or caption."""
    links, each = Links(len(rows.texts)), np.arange(len(rows.texts))
    links.add(each, alike(rows.texts))
    links.add(each, rows.caption_keys)
    return Twins((alike(rows.images), links.groups()), rows.text_image)


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


def twins_block(twins: Sequence[Twins], first: Sequence[Sequence[Ints]]) -> dict[str, Any]:
    """Build the "twins" block, {} without any, from `Twins.first_ranks` (empty if unknown)."""
    images, texts = (sum(int(own.shared[side].sum()) for own in twins) for side in (0, 1))
    if not images + texts:
        return {}
    ways = {
        name: mean_of(
            [{f"R@{k}": float((own[side] <= k).mean()) for k in RECALL_AT} for own in first]
        )
        for side, name in enumerate(DIRECTIONS)
        if first
    }
    means = {"mean_recall": mean_recall(*ways.values())} if first else {}
    return {"twins": {"images": images, "texts": texts, **ways, **means}}


def warn_of_twins(rows: PairedRows, twins: dict[str, Any]) -> None:
    """Log how many twins there are and recall with them as right; a warning if they are many."""
    share = max(twins["images"] / len(rows.images), twins["texts"] / len(rows.texts))
    sides = [counted(twins[side.plural], side) for side in Modality if twins[side.plural]]
    named = {way: way.replace("_", " ") for way in DIRECTIONS if way in twins}
    ways = [f"{percent(twins[way]['R@1'])} from {name}" for way, name in named.items()]
    log.log(
        logging.WARNING if share > NOTED else logging.INFO,
        "%s: %s have the embedding or caption of another pair's, which counts as a wrong "
        "answer, also if tied%s",
        *(rows.name, " and ".join(sides)),
        f"; with twins as right, R@1 is {' and '.join(ways)}" if ways else "",
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
