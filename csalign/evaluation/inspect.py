"""``csalign inspect``: summarise and verify an artifact."""

from pathlib import Path
from typing import Any

from csalign.core.calls import command
from csalign.core.errors import DataError
from csalign.core.paths import is_remote
from csalign.core.results import Progress, Result, silent
from csalign.evaluation.config import InspectConfig
from csalign.features.join import ALL, join_ids
from csalign.features.reader import FeatureSet
from csalign.features.schema import MANIFEST
from csalign.ingest.locks import merge_parts
from csalign.runs.metadata import read_environment, read_lines, read_settings


@command(
    InspectConfig,
    "path",
    example='csalign.inspect("features")',
)
def inspect(config: InspectConfig, progress: Progress = silent) -> Result:
    """Verify a feature set, a run or an index, and summarise it.

    The path is the folder, or a file in it. With `merge` the feature set is first built from the
    parts in ``PATH.partial``.

    Returns:
        Plain JSON values; "kind" is "features", "run" or "index".

    Raises:
        DataError: there is no such artifact, or parts of it are missing.
        SchemaError: it is damaged; the file is named.

    >>> import csalign, numpy
    >>> images, texts = numpy.random.default_rng(0).normal(size=(2, 60, 8))
    >>> csalign.import_arrays(images, texts, out="features").pairs
    60
    >>> csalign.inspect("features")["counts"]
    {'images': 60, 'texts': 60, 'pairs': 60, 'failures': 0}
    """
    path = config.path
    if config.merge:
        merge_parts(path)
    if not path.exists():
        raise DataError(f"{path}: no such file or folder")
    folder = path.parent if path.is_file() else path
    if (folder / MANIFEST).is_file():
        return Result(_inspect_features(folder))
    # Torch and FAISS take seconds to import, which feature sets need not wait for.
    from csalign.adapters.checkpoint import DESCRIPTION
    from csalign.indexing.manifest import DESCRIPTION as INDEX
    from csalign.indexing.manifest import describe_index, read_index_manifest
    from csalign.runs.load import load_run

    if not is_remote(folder) and (folder / DESCRIPTION).is_file():
        adapter, info = load_run(folder)
        scores = [line for line in read_lines(folder) if "validation" in line]
        read_settings(folder)
        read_environment(folder)
        return Result(
            kind="run",
            path=str(folder),
            written_by=info.csalign_version,
            **info.model_dump(mode="json", exclude={"format", "csalign_version", "validation"}),
            parameters=adapter.parameter_counts(),
            validation=scores,
        )
    if not is_remote(folder) and (folder / INDEX).is_file():
        return Result(describe_index(folder, read_index_manifest(folder, whole=True)))
    raise DataError(
        f"{path}: is neither a feature set (it has no {MANIFEST}) nor a run (no {DESCRIPTION}) nor "
        f"an index (no {INDEX})"
    )


def _inspect_features(folder: Path) -> dict[str, Any]:
    features = FeatureSet.open(folder)
    features.verify()
    join_ids(features, ALL)  # finds repeated ids and texts without their image
    manifest = features.manifest
    shards = [*manifest.shards.images, *manifest.shards.texts]
    return {
        "kind": "features",
        "path": str(folder),
        "format_version": manifest.format_version,
        **({} if manifest.names is None else {"names": manifest.names}),
        "dtype": manifest.dtype,
        "encoders": manifest.encoders.model_dump(mode="json"),
        "counts": manifest.counts.model_dump(),
        "splits": {name or "(none)": counts for name, counts in features.splits().items()},
        "bytes": sum(shard.bytes for shard in shards),
        "shards": len(shards),
        "fingerprint": manifest.fingerprint(),
    }
