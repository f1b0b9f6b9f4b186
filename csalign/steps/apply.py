"""``csalign apply``: a feature set through trained adapters, into a feature set again."""

from collections.abc import Iterator

from csalign import files
from csalign.adapters.model import Adapter
from csalign.config import ApplyConfig
from csalign.enums import Modality
from csalign.progress import Progress, silent
from csalign.results import FeaturesResult
from csalign.steps.adapted import load_adapter_for
from csalign.store import schema
from csalign.store.manifest import EncoderInfo
from csalign.store.reader import FeatureSet, FeatureTable, batch_vectors
from csalign.store.shard import Rows
from csalign.store.writer import FeatureWriter


def apply(config: ApplyConfig, progress: Progress = silent) -> FeaturesResult:
    """Map every row, paired or not, into the shared space; streams by row group.

    Ids, captions, pairs and splits are kept; embeddings are unit rows; tokens are not carried
    over, since the adapters act on whole embeddings.

    Args:
        config: what to do.
        progress: told how far it is.

    Raises:
        DataError: no such feature set or run.
        ShapeError: the features are not of the width that the adapter takes.
        OutputError: ``config.out`` exists and is not to be replaced.
    """
    inputs = (config.features, config.adapter)
    files.check_output(config.out, overwrite=config.overwrite, inputs=inputs)
    features = FeatureSet.open(config.features)
    features.verify()
    adapter, info = load_adapter_for(features, config.adapter, config.device)
    encoders = {
        side: EncoderInfo(
            spec=f"{features.table(side).encoder.spec} | {config.adapter.name}",
            width=info.adapters[side].width,
            preprocessing={"adapter_trained_on": info.data_fingerprint, "normalized": True},
        )
        for side in Modality
    }
    total = len(features.images) + len(features.texts)
    done = 0
    with files.staged_folder(config.out) as folder:
        files.write_text(folder / "config.toml", config.to_toml())
        with FeatureWriter(folder, encoders, config.dtype) as writer:
            for side in Modality:
                for rows in _adapted(features.table(side), adapter, config.batch_size):
                    writer.write(side, rows)
                    done += len(rows.embeddings)
                    progress("rows", done, total)
    counts = features.manifest.counts
    return FeaturesResult(config.out, counts.images, counts.texts, counts.pairs, 0)


def _adapted(table: FeatureTable, adapter: Adapter, batch_size: int) -> Iterator[Rows]:
    names = schema.STRING_COLUMNS[table.modality]
    for batch in table.batches([*names, schema.EMBEDDING]):
        vectors = batch_vectors(batch, schema.EMBEDDING)
        aligned = adapter.embed(table.modality, vectors, batch_size=batch_size)
        yield Rows({name: batch.column(name).to_pylist() for name in names}, aligned)
