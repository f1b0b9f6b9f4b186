"""Rows from which little can be learnt or told: constant, repeated, or few; warned about once."""

import logging

import numpy as np
import numpy.typing as npt

from csalign.features.join import PairedRows, Pairs
from csalign.features.keys import row_keys
from csalign.features.memory_map import Vectors

log = logging.getLogger(__name__)

LOOKED_AT = 5_000  # rows of a side, spread evenly
SPREAD = 1e-5  # of unit rows around their mean, of 1; the narrowest encoders have a hundredth
MANY = 0.1  # share of rows that equal another
FEW = 30  # queries

Ints = npt.NDArray[np.int64]


def warn_of_training_rows(rows: Pairs, name: str) -> None:
    """Warn of sides that are constant, and of rows that repeat and so contradict InfoNCE.

    Args:
        rows: to train on.
        name: what they are.
    """
    # Of texts, captions that repeat are counted once by default.
    for side, vectors in (("image", rows.images), ("text", rows.texts)):
        looked = _some(vectors)
        if len(looked) > 1 and _spread(looked) < SPREAD:
            log.warning(
                "%s: all %s embeddings are nearly the same, so nothing can be learnt from them; "
                "see what the encoder was given",
                *(name, side),
            )
        elif side == "image" and (share := _repeated(looked)) > MANY:
            log.warning(
                "%s: %.0f %% of the images have the embedding of another one, whose captions are "
                "then taken for wrong answers; give all captions to one of them",
                *(name, 100 * share),
            )
        elif side == "text" and (share := _largest_group(looked)) > 0.5:
            log.warning(
                "%s: %.0f %% of the texts are one and the same, so there is little to tell images "
                "apart by; see whether they are captions",
                *(name, 100 * share),
            )


def warn_of_queries(rows: PairedRows, name: str) -> None:
    """Warn of galleries that are too small, or of whose rows many are equal to a wrong answer's.

    Args:
        rows: to evaluate.
        name: what they are.
    """
    paired = rows.text_image >= 0
    queries = len(np.unique(rows.text_image[paired]))
    if 0 < queries < FEW:
        log.warning(
            "%s: holds %d images with texts, each of which is %.1f %% of a recall; the intervals "
            "tell how little that says",
            *(name, queries, 100 / queries),
        )
        return
    for side, owners, vectors in (
        ("images", np.arange(len(rows.images)), rows.images),
        ("texts", rows.text_image, rows.texts),
    ):
        share = _equal_to_wrong(vectors, owners)
        if share > MANY:
            log.warning(
                "%s: %.0f %% of the %s are equal to a wrong answer, and count as found after it; "
                "the recall cannot be 1",
                *(name, 100 * share, side),
            )


def _some(vectors: Vectors) -> npt.NDArray[np.float32]:
    """Up to `LOOKED_AT` rows as unit rows, (k, d)."""
    step = max(1, -(-len(vectors) // LOOKED_AT))
    found = np.asarray(vectors[np.arange(0, len(vectors), step)]).astype(np.float32)
    found /= np.linalg.norm(found, axis=1, keepdims=True)
    return found


def _spread(unit: npt.NDArray[np.float32]) -> float:
    """Variance of unit rows, all coordinates together, in [0, 1]."""
    mean = unit.mean(axis=0, dtype=np.float64)
    return float(1 - mean @ mean)


def _repeated(rows: npt.NDArray[np.float32]) -> float:
    """Share of rows that equal an earlier one."""
    return 1 - len(np.unique(row_keys(rows))) / max(1, len(rows))


def _largest_group(rows: npt.NDArray[np.float32]) -> float:
    """Share of the rows that equal the commonest one."""
    _, counts = np.unique(row_keys(rows), return_counts=True)
    return float(counts.max() / len(rows)) if len(rows) > 1 else 0.0


def _equal_to_wrong(vectors: npt.NDArray[np.float32], owners: Ints) -> float:
    """Share of rows that equal one that belongs to another image."""
    _, group = np.unique(row_keys(vectors), return_inverse=True)
    least = np.full(group.max(initial=-1) + 1, np.iinfo(np.int64).max)
    most = np.full_like(least, -2)
    np.minimum.at(least, group, owners)
    np.maximum.at(most, group, owners)
    return float((least < most)[group].mean()) if len(group) else 0.0
