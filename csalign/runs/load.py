"""Load a run for the features that go through it, and align their rows."""

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from csalign.adapters.checkpoint import AdapterInfo, load_adapter_with_info
from csalign.adapters.model import Adapter
from csalign.core.devices import pick_device
from csalign.core.enums import Modality
from csalign.core.errors import DataError, ShapeError
from csalign.features import schema
from csalign.features.checks import check_directions, unit_rows
from csalign.features.join import PairedRows
from csalign.features.reader import FeatureSet, batch_tokens, batch_vectors
from csalign.features.tokens import TokenCache, TokenRows, pad_tokens
from csalign.features.writer import Rows
from csalign.runs.metadata import ADAPTER, check_unchanged

ROWS_WITH_TOKENS = 128  # per forward pass: each is a sequence of up to hundreds of vectors
STREAMED_BYTES = 128 << 20  # a few row groups: rows come in order, so each is read once

Array = npt.NDArray[Any]


def load_run(run: Path, allow: str | None = None) -> tuple[Adapter, AdapterInfo]:
    """Load the adapter of a run or checkpoint, on the CPU, and verify its files.

    Raises:
        DataError: there is no adapter at `run`.
        SchemaError: its files are damaged, or it has a custom kind other than `allow`.
    """
    loaded = load_adapter_with_info(run, allow=() if allow is None else (allow,))
    check_unchanged(run, ADAPTER)
    return loaded


def load_adapter_for(
    features: FeatureSet, run: Path, device: str, allow: str | None = None
) -> tuple[Adapter, AdapterInfo]:
    """Load the adapter of a run onto a device; raises as `load_run` and `check_features` do."""
    adapter, info = load_run(run, allow)
    check_features(features, run, adapter)
    return adapter.to(pick_device(device)), info


def check_features(
    features: FeatureSet, run: Path, adapter: Adapter, tokens: Collection[Modality] = ()
) -> None:
    """Raise DataError or ShapeError unless features have the widths, and tokens, of training.

    Tokens are needed of the sides in `tokens`, and of those that embed with tokens.
    """
    for side in Modality:
        table, own = features.table(side), adapter.side(side)
        if table.info is None:
            continue
        if table.width != own.shape.input_width:
            raise ShapeError(
                f"{features.path}: {side} embeddings are {table.width} wide, the adapter {run} "
                f"takes {own.shape.input_width}; use features of the encoders it was trained on"
            )
        if side not in tokens and not own.embeds_with_tokens:
            continue
        if table.info.token_width is None:
            raise DataError(
                f"{features.path}: stores no {side} tokens, but the adapter {run} takes some; make "
                "the features with csalign extract --tokens both"
            )
        if table.info.token_width != own.shape.token_width:
            raise ShapeError(
                f"{features.path}: {side} tokens are {table.info.token_width} wide, the adapter "
                f"{run} takes {own.shape.token_width}; use the encoders and the --token-space that "
                "it was trained on"
            )


def embed_rows(
    adapter: Adapter, side: Modality, rows: PairedRows, features: FeatureSet | None
) -> Array:
    """Align the rows of one side: unit rows (n, width) float32.

    If the adapter embeds with tokens, they are read from `features`, or omitted if that is None.
    """
    side, values = Modality.of(side), rows.embeddings(side)
    if features is None or not adapter.side(side).embeds_with_tokens:
        return adapter.embed(side, values)
    source = TokenRows(features.table(side), TokenCache(STREAMED_BYTES))
    places = rows.table_rows(side)
    out = np.empty((len(values), adapter.side(side).shape.width), np.float32)
    for start in range(0, len(values), ROWS_WITH_TOKENS):
        part = slice(start, start + ROWS_WITH_TOKENS)
        out[part] = adapter.embed_tokens(side, values[part], *source.take(places[part]))[0]
    return out


def stream_aligned(
    features: FeatureSet,
    side: Modality,
    adapter: Adapter | None,
    rows: npt.NDArray[np.int64] | None,
    batch_size: int,
    *,
    strings: Sequence[str] = (),
    keep_tokens: bool = False,
) -> Iterator[Rows]:
    """Align stored rows of one side, in order, in batches: unit rows (n, width) float32.

    Args:
        features: the feature set.
        side: which side.
        adapter: of both sides; None only normalises the rows.
        rows: of the table, ascending; None for all.
        batch_size: rows per batch, at most.
        strings: columns to read too.
        keep_tokens: whether to align the tokens too.
    """
    side, table = Modality.of(side), features.table(side)
    with_tokens = adapter is not None and (keep_tokens or adapter.side(side).embeds_with_tokens)
    size = min(batch_size, ROWS_WITH_TOKENS) if with_tokens else batch_size
    columns = {schema.ID, schema.EMBEDDING, *strings, *([schema.TOKENS] if with_tokens else [])}
    name = f"{table.folder}: {side.plural}"
    for _, local, batch in table.parts(sorted(columns), rows):
        vectors = batch_vectors(batch, schema.EMBEDDING)
        tokens = batch_tokens(batch) if with_tokens else []
        for start in range(0, len(local), size):
            some = local[start : start + size]
            raw, ids, kept = vectors[some], batch.column(schema.ID).take(some), None
            check_directions(raw, ids, name)
            if adapter is None:
                aligned: Array = unit_rows(raw, ids, name)
            elif with_tokens:
                padded = pad_tokens([tokens[row] for row in some])
                aligned, own = adapter.embed_tokens(side, raw, *padded)
                kept = [row[mask] for row, mask in zip(own, padded.mask, strict=True)]
            else:
                aligned = adapter.embed(side, raw, batch_size=size)
            found = {column: batch.column(column).take(some).to_pylist() for column in strings}
            yield Rows(found, aligned, kept if keep_tokens else None)
