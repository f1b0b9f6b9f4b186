"""``csalign apply``: a feature set through trained adapters, into a feature set or other forms."""

import logging
from collections.abc import Iterator
from pathlib import Path

from csalign import files
from csalign.adapters.checkpoint import AdapterInfo
from csalign.adapters.model import Adapter
from csalign.config import ApplyConfig
from csalign.enums import Modality
from csalign.errors import ConfigError, DataError
from csalign.progress import Progress, silent
from csalign.results import FeaturesResult
from csalign.steps.adapted import ROWS_WITH_TOKENS, check_tokens, load_adapter_for
from csalign.store import schema
from csalign.store.export import ClipRetrievalExport, NpyExport, RowWriter, Side
from csalign.store.manifest import EncoderInfo
from csalign.store.reader import FeatureSet, FeatureTable, batch_tokens, batch_vectors
from csalign.store.shard import Rows
from csalign.store.tokens import pad_tokens
from csalign.store.writer import FeatureWriter

logger = logging.getLogger(__name__)


def apply(config: ApplyConfig, progress: Progress = silent) -> FeaturesResult:
    """Map every row, paired or not, into the shared space; streams by row group.

    Ids, captions, pairs and splits are kept; embeddings are unit rows, and so are tokens where
    they are asked for and the adapter was trained with them. The format "clip-retrieval" holds
    pairs alone, and a warning counts what has no partner.

    Args:
        config: what to do.
        progress: told how far it is.

    Raises:
        ConfigError: tokens are asked for in a format that has none, or of an adapter that takes
            none.
        DataError: no such feature set or run; or there are no pairs where the format needs them.
        ShapeError: the features are not of the width that the adapter takes.
        OutputError: ``config.out`` exists and is not to be replaced.
    """
    inputs = (config.features, config.adapter)
    files.check_output(config.out, overwrite=config.overwrite, inputs=inputs)
    features = FeatureSet.open(config.features)
    features.verify()
    adapter, info = load_adapter_for(features, config.adapter, config.device, config.allow_adapter)
    tokens = _sides_of_tokens(config, features, info)
    sides = [side for side in Modality if features.table(side).made_by is not None]
    total = len(features.images) + len(features.texts)
    done = 0
    with files.staged_folder(config.out) as folder:
        files.write_text(folder / "config.toml", config.to_toml())
        with _writer(folder, config, features, sides, tokens, info) as writer:
            for side in sides:
                table, keep = features.table(side), side in tokens
                for rows in _adapted(table, adapter, config.batch_size, keep_tokens=keep):
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


def _sides_of_tokens(
    config: ApplyConfig, features: FeatureSet, info: AdapterInfo
) -> list[Modality]:
    """The sides whose tokens are to be aligned."""
    if not config.tokens:
        return []
    if config.format != "parquet":
        raise ConfigError(f"tokens: the format {config.format} has none; use --format parquet")
    takes = [side for side in Modality if info.adapters[side].token_width is not None]
    if not takes:
        raise ConfigError(
            f"tokens: {config.adapter} was trained without tokens; train it with --token-weight"
        )
    found = [side for side in takes if features.table(side).has_tokens]
    if not found:
        raise DataError(
            f"{features.path}: stores no {' or '.join(takes)} tokens; make it with csalign extract "
            "--tokens both, or leave --tokens out"
        )
    for side in found:
        check_tokens(features, side, config.adapter, info.adapters[side].token_width)
    return found


def _writer(
    folder: Path,
    config: ApplyConfig,
    features: FeatureSet,
    there: list[Modality],
    tokens: list[Modality],
    info: AdapterInfo,
) -> RowWriter:
    """What writes the format that is asked for."""
    if config.format == "parquet":
        encoders = {
            side: EncoderInfo(
                spec=f"{features.table(side).encoder.spec} | {config.adapter.name}",
                width=info.adapters[side].width,
                token_width=info.adapters[side].width if side in tokens else None,
                token_space="projected" if side in tokens else None,
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


def _adapted(
    table: FeatureTable, adapter: Adapter, batch_size: int, *, keep_tokens: bool
) -> Iterator[Rows]:
    names = schema.STRING_COLUMNS[table.modality]
    with_tokens = keep_tokens or adapter.side(table.modality).embeds_with_tokens
    columns = [*names, schema.EMBEDDING, *([schema.TOKENS] if with_tokens else [])]
    for batch in table.batches(columns):
        strings = {name: batch.column(name).to_pylist() for name in names}
        vectors = batch_vectors(batch, schema.EMBEDDING)
        if not with_tokens:
            yield Rows(strings, adapter.embed(table.modality, vectors, batch_size=batch_size))
            continue
        tokens, size = batch_tokens(batch), min(batch_size, ROWS_WITH_TOKENS)
        for start in range(0, len(vectors), size):
            part = slice(start, start + size)
            padded = pad_tokens(tokens[part])
            aligned, own = adapter.embed_tokens(table.modality, vectors[part], *padded)
            kept = [row[there] for row, there in zip(own, padded.mask, strict=True)]
            yield Rows(
                {name: values[part] for name, values in strings.items()},
                aligned,
                kept if keep_tokens else None,
            )
