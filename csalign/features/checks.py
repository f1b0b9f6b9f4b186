"""Rows that cannot be used (no direction), and warnings of rows from which little can be learnt."""

import logging
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from csalign.core.enums import Modality
from csalign.core.errors import DataError
from csalign.features import schema
from csalign.features.join import PairedRows, Pairs, first_alike, hash_rows

log = logging.getLogger(__name__)

Array = npt.NDArray[Any]
Ints = npt.NDArray[np.int64]

CHECKED_ROWS = 65_536  # at a time, since a check makes a float32 copy
_CHECKED_VALUES = 1 << 17  # likewise, few enough to stay in the caches of a CPU
_INFINITE_HALF = 0x7C00  # bits of float16
SAMPLED_ROWS = 5_000  # of a side, spread evenly
SPREAD = 1e-5  # variance of unit rows, at most 1; the narrowest encoders have 0.01
REPEATED = 0.1  # share of rows that equal another one
FEW_QUERIES = 30


def find_unusable(embeddings: Array, dtype: str | None = None) -> dict[int, str]:
    """Find rows (n, d) without a direction: not finite, or of a norm that float32 cannot square.

    Args:
        embeddings: any float dtype.
        dtype: "float16" or "float32", as they will be stored; None as they are.

    Returns:
        Reason and remedy by row, ascending.
    """
    found: dict[int, str] = {}
    step = max(1, _CHECKED_VALUES // max(1, embeddings.shape[1]))
    for start in range(0, len(embeddings), step):
        block = embeddings[start : start + step]
        with np.errstate(over="ignore"):  # an overflow is reported with its row
            stored = block if dtype is None else block.astype(schema.DTYPES[dtype], copy=False)
            is_good = _are_halves_good(stored) if stored.dtype == np.float16 else _norms_fit(stored)
        bad = np.flatnonzero(~is_good)
        found |= {start + row: _reason(block[row], stored[row], dtype) for row in bad.tolist()}
    return found


def _norms_fit(rows: Array) -> npt.NDArray[np.bool_]:
    wide = rows.astype(np.float32, copy=False)
    norms = np.sqrt(np.einsum("ij,ij->i", wide, wide))
    fit: npt.NDArray[np.bool_] = (norms > schema.LEAST_NORM) & (norms < schema.MOST_NORM)
    return fit


def _are_halves_good(rows: Array) -> npt.NDArray[np.bool_]:
    """Check rows of float16, whose norms fit if they are finite and not 0, by their bits."""
    largest = (rows.astype("=f2", copy=False).view(np.uint16) & 0x7FFF).max(axis=1, initial=0)
    good: npt.NDArray[np.bool_] = (largest > 0) & (largest < _INFINITE_HALF)
    return good


def _reason(given: Array, stored: Array, dtype: str | None) -> str:
    finite = np.isfinite(stored).all()
    if finite and stored.any():
        return f"has norm {np.linalg.norm(stored.astype(np.float64)):.3g}; {schema.RESCALE}"
    reason = "has norm 0" if finite else "is not finite"
    if dtype is None or not np.isfinite(given).all() or not given.any():
        return f"{reason}; encode it again or omit it"
    remedy = "use --dtype float32" if dtype == "float16" else schema.RESCALE
    return f"{reason} once stored as {dtype}; {remedy}"


def check_directions(vectors: Array, ids: pa.Array, where: str) -> None:
    """Raise DataError if a row (n, d) has no direction, naming `where`, its id and a remedy."""
    for start in range(0, len(vectors), CHECKED_ROWS):
        for row, reason in find_unusable(vectors[start : start + CHECKED_ROWS]).items():
            raise DataError(f"{where}: the embedding of {ids[start + row].as_py()!r} {reason}")


def unit_rows(values: Array, ids: pa.Array, where: str) -> npt.NDArray[np.float32]:
    """Scale rows (n, d) to norm 1, in float32, after `check_directions`."""
    check_directions(values, ids, where)
    wide = values.astype(np.float32)
    wide /= np.linalg.norm(wide, axis=1, keepdims=True)
    return wide


def alike(vectors: Array) -> Ints:
    """Return for each row (n, d) the first one of its direction, in float16's precision, (n,)."""
    found = [np.empty(0, np.int64)]
    for start in range(0, len(vectors), CHECKED_ROWS):
        wide = vectors[start : start + CHECKED_ROWS].astype(np.float32)
        norms = np.linalg.norm(wide, axis=1, keepdims=True)
        np.divide(wide, norms, out=wide, where=norms > 0)
        found.append(hash_rows(wide.astype(np.float16) + np.float16(0)))  # -0 becomes 0
    return first_alike(np.concatenate(found))


def warn_of_training_rows(rows: Pairs, name: str) -> None:
    """Warn of constant sides, and of repeated rows, which contradict InfoNCE."""
    for side, vectors in (("image", rows.images), ("text", rows.texts)):
        if len(vectors) < 2:
            continue
        if _spread(vectors) < SPREAD:
            problem = (
                f"all {side} embeddings are nearly the same, so nothing can be learnt from them; "
                "check the input of the encoder"
            )
        else:
            counts = np.unique(hash_rows(vectors), return_counts=True)[1]
            repeated, largest = 1 - len(counts) / len(vectors), counts.max() / len(vectors)
            if side == "image" and repeated > REPEATED:
                problem = (
                    f"{100 * repeated:.0f} % of the images repeat the embedding of another image, "
                    "whose captions then count as wrong answers; merge them into one image"
                )
            elif side == "text" and largest > 0.5:  # captions that repeat are counted once
                problem = (
                    f"{100 * largest:.0f} % of the texts are identical, so they hardly distinguish "
                    "images; check that they are captions"
                )
            else:
                continue
        log.warning("%s: %s", name, problem)


def warn_of_queries(rows: PairedRows, name: str, *, ties: bool = True) -> None:
    """Warn of galleries that are too small, or (`ties`) where many rows equal a wrong answer."""
    queries = len(np.unique(rows.text_image[rows.text_image >= 0]))
    if 0 < queries < FEW_QUERIES:
        log.warning(
            "%s: only %d images have texts, so each is %.1f %% of a recall; see the intervals",
            name,
            queries,
            100 / queries,
        )
        return
    if not ties:
        return
    owners = {Modality.IMAGE: np.arange(len(rows.images)), Modality.TEXT: rows.text_image}
    for side, own in owners.items():
        share = _equal_to_wrong(rows.embeddings(side), own)
        if share > REPEATED:
            log.warning(
                "%s: %.0f %% of the %s equal a wrong answer; ties count as misses, so recall "
                "cannot reach 100 %%",
                name,
                100 * share,
                side.plural,
            )


def _spread(vectors: Array) -> float:
    """Return the variance of unit rows, summed over coordinates, in [0, 1]; of a sample."""
    step = -(-len(vectors) // SAMPLED_ROWS)
    unit = vectors[np.arange(0, len(vectors), step)].astype(np.float32)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    mean = unit.mean(axis=0, dtype=np.float64)
    return float(1 - mean @ mean)


def _equal_to_wrong(vectors: Array, owners: Ints) -> float:
    """Return the share of rows that equal a row of another image."""
    if not len(vectors):
        return 0.0
    _, first, group = np.unique(hash_rows(vectors), return_index=True, return_inverse=True)
    is_mixed = np.bincount(group, owners != owners[first][group]) > 0
    return float(is_mixed[group].mean())
