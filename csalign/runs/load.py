"""A trained adapter, checked against the features that are to go through it."""

from collections.abc import Iterator
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
from csalign.features.join import PairedRows
from csalign.features.reader import FeatureSet, batch_tokens, batch_vectors
from csalign.features.tokens import TokenCache, TokenRows, pad_tokens

ROWS_WITH_TOKENS = 128  # at a time: each is a sequence of up to hundreds of vectors
STREAMED_BYTES = 128 << 20  # a few row groups: rows come in order, so each is read once

Array = npt.NDArray[Any]


def load_adapter_for(
    features: FeatureSet, run: Path, device: str, allow: str | None = None
) -> tuple[Adapter, AdapterInfo]:
    """Load a run's adapter onto a device.

    Args:
        features: that are to go through it.
        run: the run folder, or a checkpoint in it.
        device: where to compute, as ``--device`` has it.
        allow: a kind ``package.module:Class`` that may be imported.

    Raises:
        DataError: there is no adapter at `run`, or it embeds with tokens that are not stored.
        SchemaError: its files are damaged.
        ShapeError: the features are not of the widths that it takes.
    """
    adapter, info = load_adapter_with_info(run, allow=() if allow is None else (allow,))
    for side in Modality:
        table, takes = features.table(side), info.adapters[side].input_width
        if table.info is not None and table.width != takes:
            raise ShapeError(
                f"{features.path}: {side} embeddings are {table.width} wide, the adapter {run} "
                f"takes {takes}; use features of the encoders that it was trained on"
            )
        if table.info is not None and adapter.side(side).embeds_with_tokens:
            check_tokens(features, side, run, info.adapters[side].token_width)
    return adapter.to(pick_device(device)), info


def embed_rows(
    adapter: Adapter, side: Modality, rows: PairedRows, features: FeatureSet | None
) -> Array:
    """Aligned embeddings of one side's rows, with their tokens where the adapter takes them.

    Args:
        adapter: trained, or being trained.
        side: which rows.
        rows: of `features`.
        features: where the tokens are, streamed; None embeds without them.

    Returns:
        (n, width) float32, unit rows.

    Raises:
        DataError: a token is not finite.
        SchemaError: a shard is damaged.
    """
    values = rows.embeddings(side)
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
) -> Iterator[Array]:
    """Embeddings of one side in the shared space, in order, some at a time.

    Args:
        features: where they are stored.
        side: which of them.
        adapter: what they go through, with their tokens where it takes them; None for nothing.
        rows: which rows of the table, ascending; None for all.
        batch_size: rows at a time.

    Yields:
        (some, width) float32, unit rows.

    Raises:
        DataError: a row is not finite or has norm 0.
        SchemaError: a shard is damaged.
    """
    table = features.table(side)
    with_tokens = adapter is not None and adapter.side(side).embeds_with_tokens
    size = min(batch_size, ROWS_WITH_TOKENS) if with_tokens else batch_size
    columns = [schema.ID, schema.EMBEDDING, *([schema.TOKENS] if with_tokens else [])]
    for _, local, batch in table.parts(columns, rows):
        vectors = batch_vectors(batch, schema.EMBEDDING)
        tokens = batch_tokens(batch) if with_tokens else []
        for start in range(0, len(local), size):
            some = local[start : start + size]
            raw = vectors[some].astype(np.float32)
            norms = np.linalg.norm(raw, axis=1, keepdims=True)
            bad = np.flatnonzero(~(np.isfinite(norms) & (norms > 0)))
            if len(bad):
                name = batch.column(schema.ID)[int(some[bad[0]])].as_py()
                raise DataError(
                    f"{features.path}: the embedding of {side} {name!r} has no direction (it is 0 "
                    "or not finite); encode it again or leave it out"
                )
            if adapter is None:
                yield raw / norms
            elif with_tokens:
                padded = pad_tokens([tokens[row] for row in some])
                yield adapter.embed_tokens(side, raw, *padded)[0]
            else:
                yield adapter.embed(side, raw, batch_size=size)


def check_tokens(features: FeatureSet, side: Modality, run: Path, takes: int | None) -> None:
    """Raise DataError or ShapeError unless the tokens are stored that a run takes.

    Args:
        features: that are to go through its adapter.
        side: whose tokens.
        run: for the message.
        takes: width of the tokens that it was trained with.
    """
    found = features.table(side).encoder.token_width
    if found is None:
        raise DataError(
            f"{features.path}: stores no {side} tokens, but the adapter {run} embeds with them; "
            "make the features with csalign extract --tokens both"
        )
    if found != takes:
        raise ShapeError(
            f"{features.path}: {side} tokens are {found} wide, the adapter {run} takes {takes}; "
            "use features of the encoders and the --token-space that it was trained on"
        )
