"""Measure what an adapter is to beat: the rows as they are, centred, standardised, or by CCA."""

import logging
from typing import Any

from csalign.adapters.checkpoint import read_info
from csalign.adapters.kinds import BASELINES, is_baseline
from csalign.core.enums import Modality
from csalign.core.errors import DataError, SchemaError, ShapeError
from csalign.core.figures import LEARNED
from csalign.core.progress import tick
from csalign.evaluation.loading import embed
from csalign.evaluation.measure import Evaluation, figures_of
from csalign.features.join import Pairs
from csalign.features.schema import same_rows
from csalign.runs.baselines import choose_split, fit_baseline, read_rows

log = logging.getLogger(__name__)


def measure_baselines(evaluation: Evaluation, learned: Pairs | None = None) -> dict[str, Any]:
    """Measure the baselines on the rows of an evaluation: block "baselines" of the document.

    Args:
        evaluation: of a run, or of rows without an adapter.
        learned: rows to fit on (default: what the run was trained on, or see `choose_split`).

    Returns:
        By name, "raw" first, the blocks of figures, "intervals" if the options want them, and
        "fitted_on", the split(s). What cannot be had is absent, and logged.
    """
    aligned, found = evaluation.aligned, {}
    raw = evaluation if aligned.adapter is None else evaluation.without_adapter
    if raw is not None:
        found["raw"] = _describe(raw)
    known: dict[str, Pairs] = {}
    for number, name in enumerate(BASELINES):
        tick("baselines", number, len(BASELINES))
        try:
            split = LEARNED
            if learned is None:
                trained = _trained_split(evaluation)
                split = choose_split(name, aligned.features, aligned.split, trained)
                known[split] = known.get(split) or read_rows(aligned.features, split)
            adapter, _ = fit_baseline(name, learned or known[split])
        except SchemaError:
            raise
        except (DataError, ShapeError) as error:
            log.info("not among the baselines: %s", error)
            continue
        rows = (embed(adapter, aligned.features, aligned.rows, side) for side in Modality)
        found[name] = _describe(evaluation.of_rows(*rows)) | {"fitted_on": split}
    return found


def _trained_split(evaluation: Evaluation) -> str | None:
    """Return the split(s) that the run was trained on, if it was on these features."""
    aligned = evaluation.aligned
    if aligned.adapter is None or is_baseline(aligned.adapter):
        return None
    info = read_info(aligned.adapter)
    is_same = same_rows(info.data_fingerprint, aligned.features.manifest.fingerprint())
    return info.train_split if is_same else None


def _describe(evaluation: Evaluation) -> dict[str, Any]:
    wanted = evaluation.options.intervals
    around = {"intervals": evaluation.resamples.intervals()} if wanted else {}
    return figures_of(evaluation) | around
