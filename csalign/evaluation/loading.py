"""Load the rows to measure, and embed them in the shared space."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from csalign.adapters.checkpoint import AdapterInfo, read_info
from csalign.adapters.kinds import is_baseline
from csalign.adapters.model import Adapter
from csalign.core.arrays import Floats
from csalign.core.enums import Modality
from csalign.core.errors import ConfigError, DataError
from csalign.core.paths import is_remote
from csalign.evaluation import protocols
from csalign.evaluation.config import Protocol, SourceOptions
from csalign.evaluation.protocols import AlignedRows
from csalign.features import join
from csalign.features.checks import check_directions, unit_rows
from csalign.features.reader import FeatureSet
from csalign.features.schema import same_rows
from csalign.runs.load import check_aligned, embed_rows, load_adapter_for
from csalign.runs.metadata import ADAPTER, find_features

log = logging.getLogger(__name__)

S = TypeVar("S", bound=SourceOptions)

_TRAINED = {  # by what is known, and whether it is a baseline
    (True, False): "%s: trained on rows that are measured here (split %s of %s), so the results "
    "say little about new data; hold out a test split before training",
    (True, True): "%s: fitted on the rows that are measured here (split %s of %s); hold out a test "
    "split to measure others",
    (None, False): "%s: may have been trained on some of the rows that are measured here (split "
    "%s): %s was divided into other splits since the adapter was trained; train it again",
}


def with_features(source: S) -> S:
    """Return options whose `features` may be a run with the features of that run."""
    run = source.features
    if run is None or is_remote(run) or not (run / ADAPTER).is_file():
        return source
    if source.adapter is not None:
        raise ConfigError(
            f"{run}: is a run, not a feature set; evaluate it alone, or pass FEATURES --adapter "
            f"{source.adapter}"
        )
    features = find_features(run, read_info(run).data_fingerprint)
    log.info("%s: using the features it was trained on, %s", run, features)
    return source.model_copy(update={"features": features, "adapter": run})


class Loaded(NamedTuple):
    """Rows of a feature set that are to be measured, as they are stored."""

    features: FeatureSet
    split: str  # comma-separated names
    rows: join.PairedRows


def load(source: SourceOptions, protocol: Protocol = "all", *, images_only: bool = False) -> Loaded:
    """Load the rows to measure, or images only; raises as `evaluate`."""
    features = FeatureSet.open(source.feature_set)
    split = source.split or ("test" if "test" in features.splits() else join.ALL)
    if images_only:
        rows = join.load_side(features, split, Modality.IMAGE)
        if not len(rows.images):
            raise DataError(f"{rows.name}: contains no images; name another --split")
    else:
        rows = protocols.select(protocol, join.load_rows(features, split))
    return Loaded(features, split, rows)


def align(source: SourceOptions, loaded: Loaded) -> AlignedRows:
    """Embed rows in the shared space; raises as `evaluate`."""
    features, split, rows = loaded
    found = load_adapter(source, features, features, split)
    if found is None:
        join.check_same_width(rows)
        images, texts = (embed(None, features, rows, side) for side in Modality)
        return AlignedRows(features, split, rows, images, texts)
    adapter, info = found
    images = embed(adapter, features, rows, Modality.IMAGE, source.adapter)
    texts = images[:0]
    if len(rows.texts):
        texts = embed(adapter, features, rows, Modality.TEXT, source.adapter)
    return AlignedRows(
        *(features, split, rows, images, texts, source.adapter, info.weights_sha256),
        parameters=sum(adapter.parameter_counts().values()),
        is_trained=is_trained_on(features, info, split),
    )


def load_aligned(source: SourceOptions, *, images_only: bool = False) -> AlignedRows:
    """Load rows, or images only, embed them in the shared space, and warn of trained ones."""
    aligned = align(source, load(source, images_only=images_only))
    warn_of_trained([aligned])
    return aligned


def warn_of_trained(systems: Sequence[Any]) -> None:
    """Warn once of the adapters that were trained on rows they are measured on, or may have been.

    That is unknown where the features were divided into other splits after the training. Systems
    have the attributes of `AlignedRows` that are not rows.
    """
    for kind, message in _TRAINED.items():
        adapted = (own for own in systems if own.adapter is not None)
        found = [own for own in adapted if (own.is_trained, is_baseline(own.adapter)) == kind]
        if found:
            named = zip(*((s.adapter, s.split, s.features.path) for s in found), strict=True)
            log.warning(message, *(", ".join(dict.fromkeys(map(str, own))) for own in named))


def load_adapter(
    source: SourceOptions, features: FeatureSet, fitted_on: FeatureSet, measured: str
) -> tuple[Adapter, AdapterInfo] | None:
    """Load the adapter of the options for some features; None without one.

    A baseline is fitted on the set `fitted_on`, of which the split(s) `measured` are measured.
    """
    if source.adapter is None:
        return None
    return load_adapter_for(
        features, source.adapter, source, fitted_on=fitted_on, measured=measured
    )


def embed(
    adapter: Adapter | None,
    features: FeatureSet,
    rows: join.PairedRows,
    side: Modality,
    run: Path | str | None = None,
) -> Floats:
    """Embed the rows of one side in the shared space: unit rows (n, width) float32.

    Raises:
        DataError: a row has no direction, or the adapter `run` gives it none.
    """
    values, name = rows.embeddings(side), f"{rows.name}: {side.plural}"
    ids = rows.image_ids if side is Modality.IMAGE else rows.text_ids
    if adapter is None:
        return unit_rows(values, ids, name)
    check_directions(values, ids, name)
    return check_aligned(embed_rows(adapter, side, rows, features), ids, name, run)


def is_trained_on(features: FeatureSet, info: AdapterInfo, split: str) -> bool | None:
    """Return whether an adapter was trained on rows of a split; None if that is unknown."""
    fingerprint = features.manifest.fingerprint()
    if not same_rows(info.data_fingerprint, fingerprint):
        return False
    if info.data_fingerprint != fingerprint and info.train_split != join.ALL:
        return None
    splits = features.splits()
    measured, trained = (join.split_names(names, splits) for names in (split, info.train_split))
    return bool(measured & trained)
