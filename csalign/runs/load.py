"""Load a run for the features that go through it, and align their rows."""

import logging
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from csalign.adapters.checkpoint import AdapterInfo, load_adapter_with_info
from csalign.adapters.kinds import is_baseline
from csalign.adapters.model import Adapter
from csalign.core.arrays import Array, Ints
from csalign.core.devices import pick_device
from csalign.core.enums import AnySide, Modality, side_of
from csalign.core.errors import ConfigError, DataError, ShapeError
from csalign.core.progress import tick
from csalign.features import schema
from csalign.features.arrays import IN_MEMORY
from csalign.features.checks import check_directions, scaled
from csalign.features.join import Pairs
from csalign.features.reader import FeatureSet, batch_tokens, batch_vectors
from csalign.features.schema import ALIGNED, UNKNOWN, EncoderInfo
from csalign.features.tokens import TokenCache, TokenRows, pad_tokens
from csalign.features.writer import Rows
from csalign.runs.baselines import load_baseline
from csalign.runs.config import LoadOptions
from csalign.runs.metadata import ADAPTER, check_unchanged

ROWS_WITH_TOKENS = 128  # per forward pass: each is a sequence of up to hundreds of vectors
STREAMED_BYTES = 128 << 20  # a few row groups: rows come in order, so each is read once

log = logging.getLogger(__name__)


def load_run(run: Path, allow: str | None = None) -> tuple[Adapter, AdapterInfo]:
    """Load the adapter of a run or checkpoint, on the CPU, and verify its files.

    Raises:
        DataError: no adapter at `run`.
        SchemaError: its files are damaged, or it has a custom kind other than `allow`.
    """
    if not (run / ADAPTER).is_file() and (run / schema.MANIFEST).is_file():
        raise DataError(
            f"{run}: is a feature set, not a run; pass the folder of a run of csalign train"
        )
    loaded = load_adapter_with_info(run, allow=() if allow is None else (allow,))
    check_unchanged(run, ADAPTER)
    return loaded


def named_sides(features: FeatureSet, names: Collection[str]) -> tuple[AnySide, ...]:
    """Return the sides of a set that are named, in its order; ConfigError if it lacks one."""
    named = [features.table(name.strip()).modality for name in names]
    if missing := [side for side in named if side not in features.sides]:
        raise ConfigError(
            f"{features.path}: has no {missing[0].plural}; its sides are "
            f"{', '.join(features.sides) or 'none'}; name some of them"
        )
    return tuple(side for side in features.sides if side in named)


def load_adapter_for(
    features: FeatureSet,
    run: Path,
    options: LoadOptions,
    *,
    fitted_on: FeatureSet | None = None,
    measured: str | None = None,
    sides: Sequence[AnySide] = tuple(Modality),
) -> tuple[Adapter, AdapterInfo]:
    """Load the adapter of a run, for features of the encoders it was trained on.

    The name of a baseline, where no folder has it, stands for that baseline fitted on `fitted_on`
    (default: `features`), of which `measured` are the splits that are measured; `sides` are those
    that are embedded. Raises as `load_run`, `check_encoders`, `check_features` and
    `load_baseline` do.
    """
    if is_baseline(run):
        if further := [side for side in sides if side not in [*Modality]]:
            raise ConfigError(
                f"--adapter {run}: fits images and texts only, not {', '.join(further)}; pass a "
                f"run: csalign train {features.path} --out RUN"
            )
        adapter, info = load_baseline(run.name, fitted_on or features, measured=measured)
    else:
        adapter, info = load_run(run, options.allow_adapter)
    check_encoders(features, run, info, any_encoder=options.any_encoder, sides=sides)
    check_features(features, run, adapter, sides=sides)
    return adapter.to(pick_device(options.device)), info


def check_features(
    features: FeatureSet,
    run: Path,
    adapter: Adapter,
    tokens: Collection[AnySide] = (),
    *,
    sides: Sequence[AnySide] = tuple(Modality),
) -> None:
    """Raise DataError or ShapeError unless features have the widths, and tokens, of training.

    Tokens are needed of the sides in `tokens`, and of those that embed with tokens. `sides` are
    those that are embedded; ConfigError if the adapter lacks one of them.
    """
    for side in sides:
        table = features.table(side)
        if table.info is None:
            continue
        if side not in adapter.names:
            raise ConfigError(
                f"{features.path}: has the side {side}, the adapter {run} maps "
                f"{', '.join(adapter.names)}; select some of these with --sides, or add it: "
                f"csalign train {features.path} --add-side {side} --into {run} --out RUN"
            )
        own = adapter.side(side)
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


def check_encoders(
    features: FeatureSet,
    run: Path,
    info: AdapterInfo,
    *,
    any_encoder: bool = False,
    sides: Sequence[AnySide] = tuple(Modality),
) -> None:
    """Compare the encoders of features with those that a run was trained on; see `check_encoder`.

    The features that it was trained on need no check, and arrays in memory cannot name an encoder.
    """
    is_trained = schema.same_rows(features.manifest.fingerprint(), info.data_fingerprint)
    if is_trained or features.path.name == IN_MEMORY:
        return
    pairs = {
        side: (own, info.encoder(side))
        for side in sides
        if side in info.adapters and (own := features.table(side).info) is not None
    }
    check_encoder(pairs, str(features.path), f"{run} was trained on", any_encoder=any_encoder)


def check_encoder(
    pairs: Mapping[Any, tuple[EncoderInfo, EncoderInfo]],
    name: str,
    reference: str,
    remedy: str = "extract again with --{side}-encoder {spec}, train on these features",
    *,
    any_encoder: bool = False,
) -> None:
    """Decide whether embeddings fit what was made from others: an adapter, an index, a set.

    Encoders must agree in weights, or in name where weights are unknown, and in those
    `EncoderInfo.settings` that both record; neither may be aligned more often. All else may differ.
    One warning lists what cannot be compared.

    Args:
        pairs: of each side, the encoder of the embeddings and the one that they must agree with.
        name: of the embeddings, for messages.
        reference: what the other encoder is, for messages, as "RUN was trained on".
        remedy: what to do, for messages, with the side and the encoder that is needed.
        any_encoder: whether to warn of another encoder instead of refusing it.

    Raises:
        DataError: the encoders differ, or the embeddings are aligned already.
    """
    doubts = []
    for side, (found, known) in pairs.items():
        needed = remedy.format(side=side, spec=public_spec(known.spec))
        is_loaded = ":" in known.spec and side in [*Modality]  # else a label of import
        if not is_loaded and "{spec}" in remedy:
            needed = "import embeddings of that encoder, or train on these features"
        problem, doubt = _differences(found, known, reference, needed)
        if problem and not any_encoder:
            raise DataError(
                f"{name}: the {side} embeddings {problem}, or insist with --any-encoder"
            )
        if problem:
            log.warning("%s: the %s embeddings %s", name, side, problem.partition(";")[0])
        if doubt:
            doubts.append(f"{side}: {doubt}")
    if doubts:
        log.warning(
            "%s: may come from other encoders than %s (%s); results mean little if so",
            *(name, reference, "; ".join(doubts)),
        )


def _differences(
    found: EncoderInfo, known: EncoderInfo, reference: str, remedy: str
) -> tuple[str, str]:
    """Return how two encoders differ and the remedy, and what is unknown of them; "" if nothing."""
    spec, own = public_spec(found.spec), public_spec(known.spec)
    is_known = [bool(found.weights), bool(known.weights)]
    if found.spec.count(ALIGNED) > known.spec.count(ALIGNED):
        return f"are aligned already ({spec}); use the features they come from", ""
    if spec != UNKNOWN and found.spec.count(ALIGNED) < known.spec.count(ALIGNED):
        run = own.rpartition(ALIGNED)[2]
        return f"come from {spec}, {reference} {own}; align them with csalign apply and {run}", ""
    if UNKNOWN in (spec, own) and not all(is_known):
        names = ("no encoder recorded" if one == UNKNOWN else one for one in (spec, own))
        return "", "{}, there {}".format(*names)
    here, there = (
        one.settings | ({"weights": one.weights[:12]} if one.weights else {})
        for one in (found, known)
    )
    differing = sorted(key for key in here.keys() & there.keys() if here[key] != there[key])
    if differing or not (all(is_known) or spec == own):
        listed = (
            ", ".join(f"{key} {str(one[key]) or repr('')}" for key in differing)
            for one in (here, there)
        )
        shown = [f" ({some})" if some else "" for some in listed]
        return f"come from {spec}{shown[0]}, {reference} {own}{shown[1]}; {remedy}", ""
    return "", f"{spec} by its name, weights unknown" if any(is_known) and not all(is_known) else ""


def public_spec(spec: str) -> str:
    """Return the spec of an encoder with the names of its local files alone.

    >>> public_spec("open_clip:/home/me/tiny.json+/home/me/tiny.safetensors")
    'open_clip:tiny.json+tiny.safetensors'
    """
    return re.sub(r"(^|[:+|]\s?)(?:[~.]{0,2}/)(?:(?![^/+|]*\.json/)[^/+|]*/)*", r"\1", spec)


def index_again(aligned: str) -> str:
    """Word how to build an index that takes words, instead of one of aligned rows, by their spec.

    >>> index_again("hf:A | a")
    'index the features that they came from: csalign index FEATURES --adapter a'
    """
    run = aligned.rpartition(ALIGNED)[2]
    return f"index the features that they came from: csalign index FEATURES --adapter {run}"


def embed_rows(adapter: Adapter, side: Modality, rows: Pairs, features: FeatureSet | None) -> Array:
    """Align the rows of one side: unit rows (n, width) float32.

    If the adapter embeds with tokens, they are read from `features`, or omitted if that is None.
    """
    tick("embedding")
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


def check_aligned(rows: Array, ids: Sequence[Any], name: str, run: object = None) -> Array:
    """Return rows (n, d) of an adapter; DataError if one is 0 or not finite, and ranks perfect."""
    squares = np.einsum("ij,ij->i", rows, rows)
    if len(bad := np.flatnonzero(~(squares > 0) | np.isinf(squares))):
        raise DataError(
            f"{name}: {run or 'the adapter'} maps the embedding of {ids[int(bad[0])].as_py()!r} to "
            f"nan, infinity or 0 ({len(bad)} of {len(rows)} rows); look for extreme values with "
            "csalign inspect, or train with a lower --learning-rate"
        )
    return rows


def stream_aligned(
    features: FeatureSet,
    side: AnySide,
    adapter: Adapter | None,
    rows: Ints | None,
    batch_size: int,
    *,
    strings: Sequence[str] = (),
    keep_tokens: bool = False,
) -> Iterator[Rows]:
    """Align some rows (ascending) of a side, in batches: unit rows (n, width) float32."""
    side, table = side_of(side), features.table(side)
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
                aligned: Array = scaled(raw)
            elif with_tokens:
                padded = pad_tokens([tokens[row] for row in some])
                aligned, own = adapter.embed_tokens(side, raw, *padded)
                kept = [row[mask] for row, mask in zip(own, padded.mask, strict=True)]
            else:
                aligned = adapter.embed(side, raw, batch_size=size)
            found = {column: batch.column(column).take(some).to_pylist() for column in strings}
            yield Rows(found, check_aligned(aligned, ids, name), kept if keep_tokens else None)
