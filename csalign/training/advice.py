"""Warnings of rows that promise little, and advice on splits."""

import logging
from collections.abc import Mapping

from csalign.core.arrays import Array
from csalign.core.enums import Modality
from csalign.evaluation.agreement import measure_agreement, sample_rows
from csalign.features.checks import LEAST_PAIRS
from csalign.features.join import Pairs
from csalign.features.reader import FeatureSet

log = logging.getLogger(__name__)

ENOUGH_TO_VALIDATE = 100  # images
DEVIATION = 40.0  # of an image's recall, in points, where recall is around a half


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


def warn_of_pairs(rows: Pairs, unpaired: Mapping[Modality, Array]) -> None:
    """Warn of what stands in the way of an alignment; see `Agreement.findings`."""
    if rows.pairs < LEAST_PAIRS:
        return
    agreement = measure_agreement(sample_rows(rows, unpaired))
    for line in () if agreement is None else agreement.findings():
        log.warning("%s", line)


def advise_test_split(features: FeatureSet) -> None:
    """Log how to hold out a test split, if there is none."""
    if "test" not in features.splits():
        log.info(
            "no test split; to measure the run on rows it has not seen, hold one out first with "
            "csalign split %s %s",
            features.path,
            features.manifest.test_split_options,
        )
