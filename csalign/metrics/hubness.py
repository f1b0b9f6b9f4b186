"""Hubs, items that are near to far too many queries, and scores that correct for them.

A correction is computed from the very rows that are evaluated, as its papers do: it tells what the
model could reach with these queries known together, and is no figure of the model alone.
"""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Floats = npt.NDArray[np.float32]

NEIGHBOURS = 10
INVERSE_TEMPERATURE = 30.0
CORRECTIONS = ("csls", "inverted-softmax", "centre")
SCALES = {"csls": 2.0, "inverted-softmax": 1.0}
"""How often the cosine counts in a corrected score."""
TILE_BYTES = 64 << 20


def hubness(images: Floats, texts: Floats) -> dict[str, float]:
    """Skewness of the 10-occurrence, both ways (Radovanovic et al. 2010).

    N(g) counts the queries that have item g among their 10 nearest; the skewness is
    E[(N - mean)^3] / std^3, 0 where no item is a hub, and where all N are equal. All rows are
    queries, paired or not. Of items that tie for the tenth place any may be counted.

    Args:
        images: (n, d) float32.
        texts: (m, d) float32.

    Returns:
        "image_to_text", of texts as items, and "text_to_image".
    """
    return {
        "image_to_text": _skewness(_occurrence(images, texts)),
        "text_to_image": _skewness(_occurrence(texts, images)),
    }


def _occurrence(queries: Floats, gallery: Floats) -> npt.NDArray[np.float64]:
    """How many queries have each item among their nearest, (g,)."""
    count = torch.zeros(len(gallery), dtype=torch.int64)
    nearest = min(NEIGHBOURS, len(gallery))
    for scores in _tiles(queries, gallery):
        found = scores.topk(nearest, dim=1, sorted=False).indices.flatten()
        count += torch.bincount(found, minlength=len(gallery))
    return count.numpy().astype(np.float64)


def _skewness(values: npt.NDArray[np.float64]) -> float:
    centred = values - values.mean()
    spread = float(np.square(centred).mean())
    return float((centred**3).mean()) / spread**1.5 if spread else 0.0


def corrected(images: Floats, texts: Floats, name: str) -> tuple[Floats, Floats]:
    """Rows whose inner products are corrected scores, up to a term of the query alone.

    csls (Conneau et al. 2018): 2 cos(x, y) - r(x) - r(y), r being the mean cosine of a row to its
    10 nearest of the other modality.
    inverted-softmax (Smith et al. 2017): exp(b cos(x, y)) over its sum for all queries, with
    b = 30 as in MUSE; here in logarithms over b, for both directions at once.
    centre (Suzuki et al. 2013): cosines after the mean of its modality is taken from each row.

    Args:
        images: (n, d) float32, unit rows.
        texts: (m, d) float32, unit rows.
        name: one of `CORRECTIONS`.

    Returns:
        (n, e) and (m, e) float32, e being d or d + 2.
    """
    if name == "centre":
        means = (rows.mean(axis=0, dtype=np.float64) for rows in (images, texts))
        x, y = (centred(rows, mean) for rows, mean in zip((images, texts), means, strict=True))
        return x, y
    penalties = penalty(images, texts, name), penalty(texts, images, name)
    sides = [
        np.hstack([np.float32(np.sqrt(SCALES[name])) * rows, _extra(own, place)])
        for place, (rows, own) in enumerate(zip((images, texts), penalties, strict=True))
    ]
    return sides[0], sides[1]


def penalty(rows: Floats, others: Floats, name: str) -> Floats:
    """What a correction takes from each row's scores, for how near it is to all of the others.

    Args:
        rows: (n, d) float32, unit rows; each is judged by itself.
        others: (m, d) float32, unit rows of the other modality.
        name: "csls" or "inverted-softmax".

    Returns:
        (n,) float32; a corrected score is ``SCALES[name]`` times the cosine less both penalties.
    """
    return _mean_of_nearest(rows, others) if name == "csls" else _soft_maximum(rows, others)


def _extra(penalty: Floats, place: int) -> Floats:
    """Two columns that take the penalties of both rows from their inner product."""
    ones = np.ones_like(penalty)
    return np.stack([-penalty, ones] if place == 0 else [ones, -penalty], axis=1)


def centred(rows: Floats, mean: npt.NDArray[np.float64]) -> Floats:
    """Unit rows (n, d) after a mean (d,) is taken from each; 0 where nothing is left."""
    moved = (rows - mean).astype(np.float32)
    norms = np.linalg.norm(moved, axis=1, keepdims=True)
    found: Floats = np.divide(moved, norms, out=np.zeros_like(moved), where=norms > 0)
    return found


def _mean_of_nearest(rows: Floats, others: Floats) -> Floats:
    """Mean score of each row with its nearest of the others, (n,)."""
    nearest = min(NEIGHBOURS, len(others))
    parts = [
        tile.topk(nearest, dim=1, sorted=False).values.mean(1) for tile in _tiles(rows, others)
    ]
    found: Floats = torch.cat(parts).numpy()
    return found


def _soft_maximum(rows: Floats, others: Floats) -> Floats:
    """Soft maximum of each row's scores, log sum exp(b score) / b, (n,)."""
    parts = [
        (INVERSE_TEMPERATURE * tile).logsumexp(1) / INVERSE_TEMPERATURE
        for tile in _tiles(rows, others)
    ]
    found: Floats = torch.cat(parts).numpy()
    return found


def _tiles(queries: Floats, gallery: Floats) -> Iterator[Tensor]:
    """Scores of some queries at a time, (some, g)."""
    columns = torch.from_numpy(gallery).T
    step = max(1, TILE_BYTES // (4 * len(gallery)))
    for rows in torch.split(torch.from_numpy(queries), step):
        yield rows @ columns
