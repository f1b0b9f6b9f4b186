"""``csalign apply``: a feature set through trained adapters, into a feature set or other forms."""

import logging
from collections.abc import Iterator
from pathlib import Path

from csalign import files
from csalign.adapters.checkpoint import AdapterInfo
from csalign.adapters.model import Adapter
from csalign.config import ApplyConfig
from csalign.enums import Modality
from csalign.progress import Progress, silent
from csalign.results import FeaturesResult
from csalign.steps.adapted import load_adapter_for
from csalign.store import schema
from csalign.store.export import ClipRetrievalExport, NpyExport, RowWriter, Side
from csalign.store.manifest import EncoderInfo
from csalign.store.reader import FeatureSet, FeatureTable, batch_vectors
from csalign.store.shard import Rows
from csalign.store.writer import FeatureWriter

logger = logging.getLogger(__name__)


def apply(config: ApplyConfig, progress: Progress = silent) -> FeaturesResult:
    """Map every row, paired or not, into the shared space; streams by row group.

    Ids, captions, pairs and splits are kept; embeddings are unit rows; tokens are not carried
    over, since the adapters act on whole embeddings. The format "clip-retrieval" holds pairs
    alone, and a warning counts what has no partner.

    Args:
        config: what to do.
        progress: told how far it is.

    Raises:
        DataError: no such feature set or run; or there are no pairs where the format needs them.
        ShapeError: the features are not of the width that the adapter takes.
        OutputError: ``config.out`` exists and is not to be replaced.
    """
    inputs = (config.features, config.adapter)
    files.check_output(config.out, overwrite=config.overwrite, inputs=inputs)
    features = FeatureSet.open(config.features)
    features.verify()
    adapter, info = load_adapter_for(features, config.adapter, config.device, config.allow_adapter)
    sides = [side for side in Modality if features.table(side).made_by is not None]
    total = len(features.images) + len(features.texts)
    done = 0
    with files.staged_folder(config.out) as folder:
        files.write_text(folder / "config.toml", config.to_toml())
        with _writer(folder, config, features, sides, info) as writer:
            for side in sides:
                for rows in _adapted(features.table(side), adapter, config.batch_size):
                    writer.write(side, rows)
                    done += len(rows.embeddings)
                    progress("rows", done, total)
    counts = features.manifest.counts
    left_out = dict.fromkeys(Modality, 0)
    if isinstance(writer, ClipRetrievalExport):
        left_out |= writer.left_out
        _warn_of(left_out)
    return FeaturesResult(
        config.out,
        counts.images - left_out[Modality.IMAGE],
        counts.texts - left_out[Modality.TEXT],
        counts.pairs,
        0,
    )


def _writer(
    folder: Path,
    config: ApplyConfig,
    features: FeatureSet,
    there: list[Modality],
    info: AdapterInfo,
) -> RowWriter:
    """What writes the format that is asked for."""
    if config.format == "parquet":
        encoders = {
            side: EncoderInfo(
                spec=f"{features.table(side).encoder.spec} | {config.adapter.name}",
                width=info.adapters[side].width,
                preprocessing={"adapter_trained_on": info.data_fingerprint, "normalized": True},
            )
            for side in there
        }
        return FeatureWriter(folder, encoders, config.dtype)
    sides = {side: Side(len(features.table(side)), info.adapters[side].width) for side in there}
    note = {
        "adapter": str(config.adapter),
        "adapter_sha256": info.weights_sha256,
        "features": str(config.features),
        "features_fingerprint": features.manifest.fingerprint(),
        "normalized": True,
    }
    if config.format == "npy":
        return NpyExport(folder, sides, config.dtype, note)
    pairs = features.manifest.counts.pairs
    return ClipRetrievalExport(folder, sides, config.dtype, note, pairs)


def _warn_of(left_out: dict[Modality, int]) -> None:
    if any(left_out.values()):
        logger.warning(
            "%d images and %d texts have no partner and were left out, since clip-retrieval's rows "
            "are pairs; --format npy keeps them",
            left_out[Modality.IMAGE],
            left_out[Modality.TEXT],
        )


def _adapted(table: FeatureTable, adapter: Adapter, batch_size: int) -> Iterator[Rows]:
    names = schema.STRING_COLUMNS[table.modality]
    for batch in table.batches([*names, schema.EMBEDDING]):
        vectors = batch_vectors(batch, schema.EMBEDDING)
        aligned = adapter.embed(table.modality, vectors, batch_size=batch_size)
        yield Rows({name: batch.column(name).to_pylist() for name in names}, aligned)
