"""``csalign apply``: a feature set through trained adapters, into a feature set or other forms."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Self

import numpy as np

from csalign.adapters.checkpoint import AdapterInfo
from csalign.adapters.model import Adapter
from csalign.core import atomic, distributed
from csalign.core.enums import Modality
from csalign.core.errors import ConfigError, DataError
from csalign.core.progress import Progress, silent
from csalign.core.results import FeaturesResult
from csalign.features import schema
from csalign.features.checks import check_directions
from csalign.features.export import ClipRetrievalExport, NpyExport, RowWriter
from csalign.features.reader import FeatureSet, FeatureTable, batch_tokens, batch_vectors
from csalign.features.schema import EncoderInfo
from csalign.features.tokens import pad_tokens
from csalign.features.writer import FeatureWriter, Rows
from csalign.runs.config import ApplyConfig
from csalign.runs.load import ROWS_WITH_TOKENS, check_tokens, load_adapter_for

logger = logging.getLogger(__name__)


def apply(config: ApplyConfig, progress: Progress = silent) -> FeaturesResult:
    """Map every row, paired or not, into the shared space; streams by row group.

    Ids, captions, pairs and splits are kept; embeddings are unit rows, and so are tokens where
    they are asked for and the adapter was trained with them. The format "clip-retrieval" holds
    pairs alone, and a warning counts what has no partner. Under torchrun the processes embed row
    groups in turn, and the first writes them, to the same bytes.

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
    with distributed.process_group():
        return _lead(config, progress) if distributed.is_main_process() else _follow(config)


def _lead(config: ApplyConfig, progress: Progress) -> FeaturesResult:
    """Write what all processes embed."""
    inputs = (config.features, config.adapter)
    atomic.check_output(config.out, overwrite=config.overwrite, inputs=inputs)
    work = _Work.of(config)
    work.features.verify()
    total = len(work.features.images) + len(work.features.texts)
    done = 0
    with atomic.atomic_folder(config.out) as folder:
        atomic.write_text(folder / "config.toml", config.to_toml())
        with _writer(folder, config, work) as writer:
            for side in work.sides:
                for rows in work.adapted(side, config.batch_size):
                    writer.write(side, rows)
                    done += len(rows.embeddings)
                    progress("rows", done, total)
    counts = work.features.manifest.counts
    left_out = dict.fromkeys(Modality, 0)
    if isinstance(writer, ClipRetrievalExport):
        left_out |= writer.omitted
        _warn_of(left_out)
    result = FeaturesResult(
        config.out,
        counts.images - left_out[Modality.IMAGE],
        counts.texts - left_out[Modality.TEXT],
        counts.pairs,
        0,
        names=work.features.manifest.names,
    )
    distributed.broadcast(result.to_json)
    return result


def _follow(config: ApplyConfig) -> FeaturesResult:
    """Embed rows that another process writes."""
    work = _Work.of(config)
    for side in work.sides:
        for _ in work.adapted(side, config.batch_size):
            pass
    result: dict[str, Any] = distributed.broadcast(dict)
    return FeaturesResult(**{**result, "features": config.out})


@dataclass(frozen=True)
class _Work:
    """What goes through which adapter.

    Attributes:
        features: the feature set.
        adapter: trained.
        info: what is told of it.
        sides: that the feature set has.
        tokens: of them, whose tokens are kept.
    """

    features: FeatureSet
    adapter: Adapter
    info: AdapterInfo
    sides: Sequence[Modality]
    tokens: Sequence[Modality]

    @classmethod
    def of(cls, config: ApplyConfig) -> Self:
        """That of a config; raises what `apply` does."""
        features = FeatureSet.open(config.features)
        adapter, info = load_adapter_for(
            features, config.adapter, config.device, config.allow_adapter
        )
        sides = [side for side in Modality if features.table(side).info is not None]
        return cls(features, adapter, info, sides, _sides_of_tokens(config, features, info))

    def adapted(self, side: Modality, batch_size: int) -> Iterator[Rows]:
        """The rows of a side, in order; of several processes, in the first alone.

        Each then embeds row groups in turn, as one process does it, so that all bits are the same.
        """
        table = self.features.table(side)
        groups = table.row_groups()
        starts = [0, *accumulate(group.rows for group in groups)]
        world = distributed.world()
        for first in range(0, len(groups), world.size):
            own = first + world.rank
            found: Iterator[Rows] = iter(())
            if own < len(groups):
                part = range(starts[own], starts[own + 1])
                found = self._embedded(table, batch_size, part, keep_tokens=side in self.tokens)
            if world.size == 1:
                yield from found
                continue
            for rows in distributed.gather(list(found)):
                yield from rows

    def _embedded(
        self, table: FeatureTable, batch_size: int, part: range, *, keep_tokens: bool
    ) -> Iterator[Rows]:
        """A row group through the adapter."""
        adapter, names = self.adapter, schema.STRING_COLUMNS[table.modality]
        with_tokens = keep_tokens or adapter.side(table.modality).embeds_with_tokens
        columns = [*names, schema.EMBEDDING, *([schema.TOKENS] if with_tokens else [])]
        for _, batch in table.read(*columns, rows=np.arange(part.start, part.stop)):
            strings = {name: batch.column(name).to_pylist() for name in names}
            vectors = batch_vectors(batch, schema.EMBEDDING)
            name = f"{table.folder}: {table.modality.plural}"
            check_directions(vectors, batch.column(schema.ID), name)
            if not with_tokens:
                yield Rows(strings, adapter.embed(table.modality, vectors, batch_size=batch_size))
                continue
            tokens, size = batch_tokens(batch), min(batch_size, ROWS_WITH_TOKENS)
            for start in range(0, len(vectors), size):
                some = slice(start, start + size)
                padded = pad_tokens(tokens[some])
                aligned, own = adapter.embed_tokens(table.modality, vectors[some], *padded)
                kept = [row[there] for row, there in zip(own, padded.mask, strict=True)]
                yield Rows(
                    {name: values[some] for name, values in strings.items()},
                    aligned,
                    kept if keep_tokens else None,
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
    work: _Work,
) -> RowWriter:
    """What writes the format that is asked for."""
    features, there, tokens, info = work.features, work.sides, work.tokens, work.info
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
        return FeatureWriter(folder, encoders, config.dtype, work.features.manifest.names)
    shapes = {side: (len(features.table(side)), info.adapters[side].width) for side in there}
    note = {
        "adapter": str(config.adapter),
        "adapter_sha256": info.weights_sha256,
        "features": str(config.features),
        "features_fingerprint": features.manifest.fingerprint(),
        "normalized": True,
    }
    if config.format == "npy":
        return NpyExport(folder, shapes, config.dtype, note)
    pairs = features.manifest.counts.pairs
    return ClipRetrievalExport(folder, shapes, config.dtype, note, pairs)


def _warn_of(left_out: dict[Modality, int]) -> None:
    if any(left_out.values()):
        logger.warning(
            "%d images and %d texts have no partner and were left out, since clip-retrieval's rows "
            "are pairs; --format npy keeps them",
            left_out[Modality.IMAGE],
            left_out[Modality.TEXT],
        )
