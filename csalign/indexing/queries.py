"""Queries: which are asked, and their vectors in the space of an index."""

import logging
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from csalign.adapters.model import Adapter
from csalign.core.arrays import Array, Floats
from csalign.core.devices import pick_device
from csalign.core.enums import AnySide, Modality, side_of
from csalign.core.errors import ConfigError, CsalignError, DataError, EncoderError, ShapeError
from csalign.core.paths import likely_meant
from csalign.encoders.base import Embedded, EncoderOptions, is_trusted, load_encoders
from csalign.features.checks import scaled
from csalign.features.export import recorded_encoder
from csalign.features.schema import ALIGNED, EncoderInfo
from csalign.features.tokens import pad_tokens
from csalign.indexing.config import SearchConfig
from csalign.indexing.manifest import IndexManifest
from csalign.runs.load import check_encoder, index_again
from csalign.sources.images import read_image
from csalign.sources.records.files import read_lines

STDIN = "-"
QUERIES_PER_BATCH = 256
_ROWS = re.compile(r".*\.npy(:\d+)?", re.IGNORECASE)

log = logging.getLogger(__name__)

Queries = tuple[Sequence[str], Floats]  # names, and unit rows (q, d) in the shared space


class Query(NamedTuple):
    """Queries of one side."""

    side: AnySide
    form: Literal["words", "pictures", "rows"]
    value: str  # a text, a path, or "-"


def asked_queries(config: SearchConfig, manifest: IndexManifest) -> list[Query]:
    """Find which queries are asked, of one side or several."""
    if config.embedding is not None:
        return [Query(_side_of_rows(config, manifest), "rows", str(config.embedding))]
    if config.image is not None:
        return [Query(Modality.IMAGE, "pictures", config.image)]
    if not config.queries:
        return [Query(Modality.TEXT, "words", config.query or config.text or "")]
    found = []
    for name, value in config.queries.items():
        side, is_rows = side_of(name), _ROWS.fullmatch(value) is not None
        file, colon, row = value.rpartition(":")
        if colon and not is_rows and file.lower().endswith(".npy"):
            raise ConfigError(f"--query {name}={value}: {row!r} is not a row; count rows from 0")
        is_picture = side is Modality.IMAGE or (side is not Modality.TEXT and Path(value).is_file())
        found.append(
            Query(side, "rows" if is_rows else "pictures" if is_picture else "words", value)
        )
    return found


def _side_of_rows(config: SearchConfig, manifest: IndexManifest) -> AnySide:
    """Find the side of --embedding."""
    if config.query_side is not None:
        return side_of(config.query_side)
    known = [side for side, own in manifest.encoders.items() if own is not None]
    others = [side for side in known if side not in manifest.sides] or known
    if len(others) > 1:
        raise ConfigError(
            f"--embedding: may be of {' or '.join(others)}; name its side with --query-side"
        )
    return others[0]


@dataclass(frozen=True)
class QueryEncoder:
    """Encode queries of one side as the items of an index were encoded."""

    index: Path  # for messages
    manifest: IndexManifest
    adapter: Adapter | None
    options: SearchConfig
    query: Query

    @property
    def side(self) -> AnySide:
        """Side of the queries."""
        return self.query.side

    def queries(self) -> Iterator[Queries]:
        """Encode all queries, in batches.

        Raises:
            ConfigError: the encoder's name has no known form.
            DataError: a query cannot be used, or has another width than the index.
            EncoderError: the encoder cannot be loaded, or is not that of the index.
        """
        form, value = self.query.form, self.query.value
        if form == "rows":
            yield from self._of_array(value)
            return
        lines = _lines(value)
        while part := list(islice(lines, QUERIES_PER_BATCH)):
            if form == "words":
                yield part, self._align(self._encoder.embed(part))
                continue
            pixels = torch.stack([self._encoder.preprocess(_read_picture(path)) for path in part])
            groups = torch.split(pixels, self._encoder.batch_size)
            parts = [self._encoder.embed(group) for group in groups]
            tokens = [item for each in parts for item in each.tokens or ()]
            rows = np.concatenate([each.embeddings for each in parts])
            yield part, self._align(Embedded(rows, tokens or None))

    @cached_property
    def _encoder(self) -> Any:
        """Load the encoder of the queries' side, and compare it with that of the index."""
        known, with_tokens = self._known, self._with_tokens
        side = Modality.TEXT if self.query.form == "words" else Modality.IMAGE
        spec = self.options.encoder or known.spec
        if ALIGNED in spec:
            raise EncoderError(
                f"{self.index}: its {self.side.plural} are aligned already ({spec}), so a query is "
                f"an embedding aligned alike, --embedding FILE.npy; or {index_again(spec)}"
            )
        try:
            if self.options.encoder is None and not is_trusted(spec):
                raise ConfigError("not an encoder of open_clip, timm or hf")
            options = EncoderOptions(
                pick_device(self.options.device),
                tokens=(side,) if with_tokens else (),
                token_space=known.token_space or "projected",
                max_tokens=known.preprocessing.get("max_tokens") if with_tokens else None,
            )
            log.info("loading %s", spec)
            image, text = (spec if side is own else None for own in Modality)
            encoder: Any = load_encoders(image, text, options).side(side)
        except CsalignError as error:
            if self.options.encoder is not None:
                raise
            option = f"--query {self.side}=" if self.options.queries else "--embedding "
            raise EncoderError(
                f"{self.index}: its {self.side} embeddings come from {spec!r}, which cannot be run "
                f"here ({error}); name the encoder with --encoder, or pass the query's own "
                f"embedding with {option}FILE.npy"
            ) from error
        self._check(encoder.info, known)
        return encoder

    @property
    def _known(self) -> EncoderInfo:
        known = self.manifest.encoders.get(self.side)
        if known is None:
            others = (side for side, own in self.manifest.encoders.items() if own is not None)
            raise DataError(
                f"{self.index}: was built from features without {self.side.plural}, so it cannot "
                f"be searched with one; query with {' or '.join(others)}"
            )
        return known

    @property
    def _with_tokens(self) -> bool:
        return self.adapter is not None and self.adapter.side(self.side).embeds_with_tokens

    def _check(self, found: EncoderInfo, known: EncoderInfo) -> None:
        if found.width != known.width:
            raise EncoderError(
                f"{found.spec}: gives embeddings of width {found.width}, those of {self.index} "
                f"have {known.width}; name their encoder with --encoder ({known.spec})"
            )
        remedy = "name that encoder with --encoder, build the index again from its features"
        reference, insist = f"{self.index} was built from", self.options.any_encoder
        pairs = {self.side: (found, known)}
        check_encoder(pairs, "the query", reference, remedy, any_encoder=insist)

    def _align(self, embedded: Embedded) -> Floats:
        rows = embedded.embeddings.astype(np.float32)
        if self.adapter is None:
            own = self.manifest.sides[0]
            known, width = self.manifest.encoders.get(own), rows.shape[1]
            if known is not None and known.width != width:
                raise ShapeError(
                    f"{self.index}: stores {own.plural} without an adapter, {known.width} wide, "
                    f"and the {self.side} query is {width} wide; build it with --adapter RUN"
                )
            return scaled(rows)
        if not self._with_tokens:
            return self.adapter.embed(self.side, rows)
        assert embedded.tokens is not None
        return self.adapter.embed_tokens(self.side, rows, *pad_tokens(embedded.tokens))[0]

    def _of_array(self, value: str) -> Iterator[Queries]:
        if self._with_tokens:
            raise ConfigError(
                "--embedding: the adapter of this index needs tokens, which an embedding does not "
                f"have; query with --{self.side}"
            )
        file, _, row = value.partition(".npy:")
        path = Path(f"{file}.npy" if row else value)
        rows, first = _read_array(path), int(row or 0)
        if first >= len(rows):
            raise DataError(
                f"{path}: has {len(rows)} rows, numbered from 0; row {first} is not one"
            )
        rows = rows[first : first + 1] if row else rows
        width = self._known.width
        if rows.shape[1] != width:
            raise ShapeError(
                f"{path}: has width {rows.shape[1]}, the {self.side} embeddings of {self.index} "
                f"have {width}; use their encoder, or name the side of the rows with "
                + ("--query SIDE=FILE.npy" if self.options.queries else "--query-side")
            )
        if (found := recorded_encoder(path.absolute())) is not None:
            self._check(found, self._known)
        for start in range(0, len(rows), QUERIES_PER_BATCH):
            part = np.asarray(rows[start : start + QUERIES_PER_BATCH], np.float32)
            norms = np.linalg.norm(part, axis=1)
            bad = np.flatnonzero(~(np.isfinite(norms) & (norms > 0)))
            if len(bad):
                raise DataError(
                    f"{path}, row {first + start + int(bad[0])}: has no direction (it is 0 or "
                    "not finite); remove it"
                )
            names = [str(first + start + row) for row in range(len(part))]
            yield names, self._align(Embedded(part, None))


def _lines(given: str) -> Iterator[str]:
    """Yield the one query that was given, or those on stdin."""
    if given != STDIN:
        if not given.strip():
            raise DataError("the query is empty; pass a text")
        yield given
        return
    for line in read_lines(Path("stdin"), sys.stdin.buffer):
        if line.error is not None:
            raise DataError(f"stdin, row {line.number}: {line.error}; correct or remove it")
        if line.text.strip():
            yield line.text.strip()


def _read_picture(path: str) -> Any:
    try:
        return read_image(Path(path).read_bytes())
    except (OSError, DataError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise DataError(f"{path}: cannot be read ({reason}); pass another image") from None


def _read_array(path: Path) -> Array:
    """Read rows (n, d) of a .npy file."""
    try:
        with path.open("rb") as file:
            rows = np.load(file, allow_pickle=False)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file{likely_meant(path)}") from None
    except (OSError, ValueError, EOFError) as error:
        raise DataError(
            f"{path}: cannot be read as .npy ({error}); save it with numpy.save"
        ) from None
    if not isinstance(rows, np.ndarray) or not np.issubdtype(rows.dtype, np.floating):
        raise DataError(f"{path}: does not contain an array of floats; save it with numpy.save")
    found: Array = np.atleast_2d(rows)
    if found.ndim != 2 or not found.size:
        raise ShapeError(f"{path}: has shape {rows.shape}; it must be (d,) or (n, d)")
    return found
