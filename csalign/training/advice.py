"""Warnings of rows that promise little: few to validate on, or pairs that hardly agree."""

import logging

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from csalign.adapters.side import UnitRows, loud_scale
from csalign.features.join import Array, Pairs

log = logging.getLogger(__name__)

ENOUGH_TO_VALIDATE = 100  # images
DEVIATION = 40.0  # of an image's recall, in points, where recall is around a half
NEIGHBOURS = 10
COMPARED = 2_000  # pairs
LEAST_TO_COMPARE = 200  # pairs; of fewer the agreement is not known well enough
HARDLY = 0.02  # above chance; encoders that reach a recall of some 10 % agree by 0.04
CHANCE_DEVIATIONS = 4


def warn_of_few(images: int) -> None:
    """Warn if there are too few images to choose settings by, of a number validated on."""
    if images < ENOUGH_TO_VALIDATE:
        log.warning(
            "validating on %d images, where the standard error of mean recall is up to %.0f "
            "points, so settings are chosen by noise in part; hold out %d or more with csalign "
            "split --val",
            images,
            DEVIATION / images**0.5,
            ENOUGH_TO_VALIDATE,
        )


def warn_of_pairs(rows: Pairs) -> None:
    """Warn if the two sides of pairs hardly agree, or only by chance."""
    pairs = _distinct_pairs(rows)
    if len(pairs) < LEAST_TO_COMPARE:
        return
    images, texts = rows.images[rows.text_image[pairs]], rows.texts[pairs]
    found, chance = neighbour_agreement(images, texts), NEIGHBOURS / (len(pairs) - 1)
    figures = f"mutual {NEIGHBOURS}-NN {found:.3f}, chance {chance:.3f}"
    # Of random pairs some NEIGHBOURS**2 neighbours agree, about as a Poisson number.
    if found < chance + CHANCE_DEVIATIONS / len(pairs):
        log.warning("the pairs look random (%s); check the keys that join them", figures)
    elif found < chance + HARDLY:
        log.warning("the encoders hardly agree (%s): expect low recall", figures)


def neighbour_agreement(images: Array, texts: Array) -> float:
    """Return the share of each image's nearest neighbours whose texts are neighbours, in [0, 1].

    Args:
        images: (n, d), row i paired with row i of `texts`; any float dtype.
        texts: (n, e), n > `NEIGHBOURS`.
    """
    near_images, near_texts = _nearest(images), _nearest(texts)
    is_near = torch.zeros(len(images), len(images), dtype=torch.bool)
    return float(is_near.scatter_(1, near_images, True).gather(1, near_texts).float().mean())


def _nearest(values: Array) -> Tensor:
    """Find the neighbours of rows (n, d) by cosine of the centred inputs of adapters, (n, k)."""
    root = bool(values.min() >= 0)
    unit = UnitRows(root, loud_scale(values, signed_sqrt=root))(values)
    unit = normalize(unit - unit.mean(0), dim=1)
    return (unit @ unit.T).fill_diagonal_(-torch.inf).topk(NEIGHBOURS, dim=1).indices


def _distinct_pairs(rows: Pairs) -> Array:
    """Sample text rows of pairs, ascending, without a second one of an image or a caption."""
    pairs = rows.texts_by_image
    for groups in (rows.text_image, rows.caption_keys):
        pairs = pairs[np.unique(groups[pairs], return_index=True)[1]]
    if len(pairs) > COMPARED:
        pairs = np.random.default_rng(0).choice(pairs, COMPARED, replace=False)
    return np.sort(pairs)
