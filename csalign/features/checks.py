"""Rows that cannot be used (no direction), and warnings of rows from which little can be learnt."""

import logging

import numpy as np
import pyarrow as pa

from csalign.core.arrays import Array, Floats, Ints, Mask
from csalign.core.enums import AnySide, Modality
from csalign.core.errors import DataError
from csalign.core.figures import percent
from csalign.features import schema
from csalign.features.join import Pairs, first_alike, hash_rows
from csalign.features.reader import FeatureSet, FeatureTable

log = logging.getLogger(__name__)


CHECKED_ROWS = 65_536  # at a time, since a check makes a float32 copy
_CHECKED_VALUES = 1 << 17  # likewise, few enough to stay in the caches of a CPU
_INFINITE_HALF = 0x7C00  # bits of float16
FEW_QUERIES = 30
LEAST_PAIRS = 200  # different ones; of fewer nothing is said of both sides
COLLAPSE: dict[AnySide, float] = {Modality.IMAGE: 0.1, Modality.TEXT: 0.5}  # share of equal rows
FEW_EQUAL = 10  # may be so by chance, or copies
LEAST_SPREAD = 1e-5  # variance of unit rows, at most 1; the narrowest encoders have 0.01
WINDOW, WINDOWS = 512, 4  # of rows in a sample
LARGEST_GROUP = 8_192  # rows that are stored, and read, as one
# Beyond these `examine` warns. CLIP, MiniLM, EfficientNet and a tiny CLIP, on photos, drawings and
# captions, have mean cosines of 0.05 to 0.55 (a random ViT 0.79), top3 shares of 0.03 to 0.45, and
# 12 to 70 effective dimensions (18 where a tenth of the captions are equal).
MEAN_COSINE, TOP3_SHARE, FEW_DIMENSIONS = 0.9, 0.7, 2.5
FEW_ROWS, FEW_COLUMNS = 30, 16  # say little; of different rows


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
        if not is_good.all():
            bad = np.flatnonzero(~is_good).tolist()
            found |= {start + row: _reason(block[row], stored[row], dtype) for row in bad}
    return found


def _norms_fit(rows: Array) -> Mask:
    norms = _norms(rows.astype(np.float32, copy=False))
    fit: Mask = (norms > schema.LEAST_NORM) & (norms < schema.MOST_NORM)
    return fit


def _are_halves_good(rows: Array) -> Mask:
    """Check rows of float16, whose norms fit if they are finite and not 0, by their bits."""
    largest = (rows.astype("=f2", copy=False).view(np.uint16) & 0x7FFF).max(axis=1, initial=0)
    good: Mask = (largest > 0) & (largest < _INFINITE_HALF)
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


def unit_rows(values: Array, ids: pa.Array, where: str) -> Floats:
    """Scale rows (n, d) to norm 1, in float32, after `check_directions`."""
    check_directions(values, ids, where)
    return scaled(values)


def scaled(rows: Array) -> Floats:
    """Scale rows (n, d) to norm 1, in float32; those of norm 0 stay."""
    wide = rows.astype(np.float32)
    wide /= _scales(wide)
    return wide


def _norms(rows: Floats) -> Floats:
    norms: Floats = np.sqrt(np.einsum("ij,ij->i", rows, rows))  # without a copy
    return norms


def _scales(rows: Floats) -> Floats:
    """Return the norms of rows (n, d) as a column (n, 1), with 1 in the place of 0."""
    norms = _norms(rows)[:, None]
    norms[norms == 0] = 1
    return norms


def alike(vectors: Array) -> Ints:
    """Return for each row (n, d) the first one of its direction, in float16's precision, (n,)."""
    rows = found = np.arange(len(vectors))
    # Few rows begin as another does, and only these are compared in all columns.
    _, group, counts = np.unique(
        _hashes(vectors, rows, FEW_COLUMNS), return_inverse=True, return_counts=True
    )
    rows = rows[counts[group] > 1]
    found[rows] = rows[first_alike(_hashes(vectors, rows, None))]
    return found


def _hashes(vectors: Array, rows: Ints, columns: int | None) -> Ints:
    """Hash the first columns of the directions of some rows, in float16's precision, (k,)."""
    found = np.empty(len(rows), np.int64)
    step = max(1, _CHECKED_VALUES // max(1, vectors.shape[1]))
    for start in range(0, len(rows), step):
        wide = vectors[rows[start : start + step]].astype(np.float32, copy=False)
        unit = (wide[:, :columns] / _scales(wide)).astype(np.float16)
        found[start : start + step] = hash_rows(unit + np.float16(0))  # -0 becomes 0
    return found


def warn_of_repeats(rows: Pairs, name: str) -> None:
    """Warn of images to train on that repeat one another, which contradicts InfoNCE."""
    repeated = 1 - len(np.unique(hash_rows(rows.images))) / max(1, len(rows.images))
    if repeated > COLLAPSE[Modality.IMAGE]:
        log.warning(
            "%s: %s of the images repeat the embedding of another image, whose captions then count "
            "as wrong answers; merge them into one image",
            *(name, percent(repeated, 0)),
        )


def warn_of_queries(rows: Pairs, name: str) -> None:
    """Warn of galleries that are too small."""
    queries = len(np.unique(rows.text_image[rows.text_image >= 0]))
    if 0 < queries < FEW_QUERIES:
        log.warning(
            "%s: only %s, so each is %.1f %% of a recall; see the intervals",
            name,
            "1 image has texts" if queries == 1 else f"{queries} images have texts",
            100 / queries,
        )


def examine(features: FeatureSet) -> tuple[dict[str, dict[str, float]], list[str]]:
    """Measure how a sample of each side's rows is spread, and word what is unusual.

    Returns:
        Per side "rows" sampled; "equal_rows", share of the most frequent, or 0; of the
        others "mean_cosine"; "top3_share", that of three dimensions in the squared norm or the
        variance; and "effective_dimensions", (sum v)^2 / sum v^2 of the variances v along principal
        axes.
    """
    tables = [table for table in map(features.table, features.sides) if len(table)]
    samples = [_sample(table) for table in tables]
    found, lines = {}, []
    for table, rows in zip(tables, samples, strict=True):
        found[table.modality.value], problem = _examine(rows, table.modality)
        lines += [f"{table.modality.plural}: {problem}"] * bool(problem)
    both = [table.modality for table in tables[:2]] == [*Modality]
    if both and samples[0].shape[1] == samples[1].shape[1]:
        first, total = len(samples[0]), sum(map(len, samples[:2]))
        equal = int((alike(np.concatenate(samples[:2]))[first:] < first).sum())
        # Of equal sides in different order, samples share few rows.
        if equal >= max(2, (total - first) * first / len(features.images) / 2):
            lines.append(
                f"{equal:,} of {total - first:,} texts have the embedding of an image, as of one "
                "file used twice, scaled or in other order; import the other side's embeddings"
            )
    return found, lines


def warn_of_rows(features: FeatureSet) -> None:
    """Log what `examine` finds unusual, as warnings."""
    for line in examine(features)[1]:
        log.warning("%s: %s", features.path, line)


def _sample(table: FeatureTable) -> Array:
    """Read some windows of rows, spread evenly, (k, d); all of a small table."""
    count = 1 if len(table) <= WINDOW else WINDOWS
    starts = np.linspace(0, max(0, len(table) - WINDOW), count).astype(np.int64)
    if len(table) > CHECKED_ROWS:
        starts -= starts % LARGEST_GROUP  # a window is then in one row group
    rows = np.unique(starts[:, None] + np.arange(min(WINDOW, len(table))))
    return table.take(rows)


def _examine(rows: Array, side: AnySide) -> tuple[dict[str, float], str]:
    """Measure rows (k, d), and word what is unusual, "" if nothing; see `examine`."""
    _, first, counts = np.unique(alike(rows), return_index=True, return_counts=True)
    unit, most = scaled(rows[first]), int(counts.max())
    mean = unit.mean(axis=0, dtype=np.float64)
    squares, centred = np.square(unit).mean(axis=0), (unit - mean).astype(np.float32)
    variances = np.square(centred).mean(axis=0)
    shares = max((squares, variances / max(variances.sum(), 1e-12)), key=_top3)
    some = centred[:: -(-len(centred) // 1_000)]
    products = float(np.square(some @ some.T, dtype=np.float64).sum())
    found = {
        "rows": len(rows),
        "equal_rows": most / len(rows) if most > 1 else 0.0,
        "mean_cosine": float(mean @ mean),
        "top3_share": _top3(shares),
        "effective_dimensions": float(np.square(some).sum()) ** 2 / products if products else 1.0,
    }
    collapsed = COLLAPSE.get(side, COLLAPSE[Modality.TEXT])
    if most >= FEW_EQUAL and found["equal_rows"] > collapsed:
        return found, (
            f"{percent(found['equal_rows'], 0)} repeat one embedding; check the input (blank "
            "pictures, no text) and the pooling (a padding token is the same everywhere)"
        )
    if len(rows) >= FEW_EQUAL and 1 - found["mean_cosine"] < LEAST_SPREAD:
        return (
            found,
            "they are nearly the same, so nothing can be learnt; check the encoder's input",
        )
    if len(unit) < FEW_ROWS or unit.shape[1] < FEW_COLUMNS:
        return found, ""
    if found["top3_share"] > TOP3_SHARE:
        loudest = ", ".join(map(str, np.sort(np.argsort(-shares)[:3])))
        return found, (
            f"dimensions {loudest} of {unit.shape[1]} have {percent(found['top3_share'], 0)} of "
            "the norm or variance; check for ids or labels among the columns, or standardise them "
            "(states of language models look like this before the last normalisation)"
        )
    if found["mean_cosine"] > MEAN_COSINE:
        return found, (
            f"two rows have a cosine of {found['mean_cosine']:.2f} on average; check the pooling "
            "(a first, last or padding token that was not trained for it); if it is right, an "
            "adapter helps, as it removes the mean"
        )
    if found["effective_dimensions"] < FEW_DIMENSIONS:
        return found, (
            f"they vary along {found['effective_dimensions']:.1f} of {unit.shape[1]} dimensions; "
            "check that the inputs differ, and the pooling"
        )
    return found, ""


def _top3(shares: Array) -> float:
    return float(np.sort(shares)[-3:].sum())
