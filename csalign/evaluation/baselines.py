"""Measure what an adapter is to beat: the rows as they are, centred, standardised, or by CCA."""

import logging
from typing import Any

from csalign.adapters.checkpoint import read_info
from csalign.adapters.kinds import BASELINES, is_baseline
from csalign.core.enums import Modality
from csalign.core.errors import DataError, ShapeError
from csalign.core.progress import tick
from csalign.evaluation.loading import embed
from csalign.evaluation.measure import Evaluation, figures_of
from csalign.features.join import Pairs
from csalign.features.schema import same_rows
from csalign.runs.baselines import choose_split, fit_baseline, read_rows

log = logging.getLogger(__name__)


def measure_baselines(
    evaluation: Evaluation, learned: Pairs | None = None, *, intervals: bool = False
) -> dict[str, Any]:
    """Measure the baselines on the rows of an evaluation: block "baselines" of the document.

    Returns:
        By name, "raw" first, fitted on `learned` (default: what the run was trained on, or see
        `choose_split`), the blocks of figures, maybe "intervals", and "fitted_on", the rows. What
        cannot be had is absent, and logged except for sides of different widths.
    """
    aligned, found = evaluation.aligned, dict[str, Any]()
    known: dict[str, Pairs] = {}

    def describe(own: Evaluation) -> dict[str, Any]:
        around = {"intervals": own.resamples.intervals()} if intervals else {}
        return figures_of(own) | around

    raw = evaluation if aligned.adapter is None else evaluation.without_adapter
    if raw is not None:
        found["raw"] = describe(raw)
    for number, name in enumerate(BASELINES):
        tick("baselines", number, len(BASELINES))
        try:
            rows = learned
            if rows is None:
                trained = _trained_split(evaluation)
                split = choose_split(name, aligned.features, aligned.split, trained)
                rows = known[split] = known.get(split) or read_rows(aligned.features, split)
            own = evaluation
            if str(aligned.adapter) != name or not is_baseline(name):
                given = fit_baseline(name, rows)[0], aligned.features, aligned.rows
                own = evaluation.of_rows(*(embed(*given, side, name) for side in Modality))
        except ShapeError:  # of sides of different widths; the table's note says so
            continue
        except DataError as error:
            log.info("not among the baselines: %s", error)
            continue
        place = rows.name + ", which is measured here" * (rows.name == aligned.rows.name)
        found[name] = describe(own) | {"fitted_on": place}
    return found


def _trained_split(evaluation: Evaluation) -> str | None:
    """Return the split(s) that the run was trained on, if it was on these features."""
    aligned = evaluation.aligned
    if aligned.adapter is None or is_baseline(aligned.adapter):
        return None
    info = read_info(aligned.adapter)
    is_same = same_rows(info.data_fingerprint, aligned.features.manifest.fingerprint())
    return info.train_split if is_same else None
