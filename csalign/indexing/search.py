"""``csalign search``: find the nearest items of an index or a feature set."""

import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from csalign.adapters.checkpoint import load_adapter_with_info
from csalign.adapters.model import Adapter
from csalign.core.arrays import Array, Floats
from csalign.core.devices import pick_device
from csalign.core.enums import Modality, renamed
from csalign.core.errors import (
    ConfigError,
    CsalignError,
    DataError,
    EncoderError,
    SchemaError,
    ShapeError,
)
from csalign.core.outputs import check_page
from csalign.core.paths import is_remote
from csalign.core.progress import Progress, silent, tick
from csalign.core.results import Found, SearchResult
from csalign.encoders.base import Embedded, EncoderOptions, is_trusted, load_encoders
from csalign.features.checks import scaled
from csalign.features.export import recorded_encoder
from csalign.features.reader import FeatureSet
from csalign.features.schema import ALIGNED, MANIFEST, EncoderInfo
from csalign.features.tokens import pad_tokens
from csalign.indexing.build import SearchIndex, build_index
from csalign.indexing.config import ItemOptions, SearchConfig, VectorOptions
from csalign.indexing.manifest import (
    ADAPTER,
    REMEDY,
    VECTORS,
    IndexManifest,
    read_index_manifest,
    read_items,
    take_item,
)
from csalign.indexing.vectors import VectorIndex, load_correction
from csalign.report.page import Entry, Section, write_page
from csalign.report.thumbnails import Pictures
from csalign.runs.load import check_encoder, index_again
from csalign.sources.images import read_image
from csalign.sources.records.files import read_lines

STDIN = "-"
QUERIES_PER_BATCH = 256
PAGE_QUERIES = 100  # shown on a page, at most
THUMBNAIL = 256  # pixels

log = logging.getLogger(__name__)

Document = dict[str, Any]
Queries = tuple[Sequence[str], Floats]  # names, and unit rows (q, d) in the shared space


@dataclass(frozen=True)
class QueryEncoder:
    """Encode queries as the items of an index were encoded."""

    index: Path  # for messages
    manifest: IndexManifest
    adapter: Adapter | None
    options: SearchConfig

    @cached_property
    def side(self) -> Modality:
        """Side of the queries."""
        if self.options.embedding is None:
            return Modality.IMAGE if self.options.image is not None else Modality.TEXT
        other, encoders = self.manifest.side.other, self.manifest.encoders
        default = other if encoders[other] is not None else self.manifest.side
        return Modality(self.options.query_side or default)

    def queries(self) -> Iterator[Queries]:
        """Encode all queries, in batches.

        Raises:
            ConfigError: the encoder's name has no known form.
            DataError: a query cannot be used, or has another width than the index.
            EncoderError: the encoder cannot be loaded, or is not that of the index.
        """
        options = self.options
        if options.embedding is not None:
            yield from self._of_array(options.embedding)
            return
        lines = _lines(options.query or options.text or options.image or "")
        while part := list(islice(lines, QUERIES_PER_BATCH)):
            if self.side is Modality.TEXT:
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
                tokens=(self.side,) if with_tokens else (),
                token_space=known.token_space or "projected",
                max_tokens=known.preprocessing.get("max_tokens") if with_tokens else None,
            )
            log.info("loading %s", spec)
            specs = {self.side: spec}
            image, text = specs.get(Modality.IMAGE), specs.get(Modality.TEXT)
            encoder: Any = load_encoders(image, text, options).side(self.side)
        except CsalignError as error:
            if self.options.encoder is not None:
                raise
            raise EncoderError(
                f"{self.index}: its {self.side.plural} were encoded with {spec!r}, which cannot "
                f"be run here ({error}); name the encoder with --encoder, or pass the query's own "
                "embedding with --embedding FILE.npy"
            ) from error
        self._check(encoder.info, known)
        return encoder

    @property
    def _known(self) -> EncoderInfo:
        known = self.manifest.encoders[self.side]
        if known is None:
            other = "text" if self.side is Modality.IMAGE else "image"
            raise DataError(
                f"{self.index}: was built from features without {self.side.plural}, so it cannot "
                f"be searched with one; query with {other}"
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
            return scaled(rows)
        if not self._with_tokens:
            return self.adapter.embed(self.side, rows)
        assert embedded.tokens is not None
        return self.adapter.embed_tokens(self.side, rows, *pad_tokens(embedded.tokens))[0]

    def _of_array(self, path: Path) -> Iterator[Queries]:
        if self._with_tokens:
            raise ConfigError(
                "--embedding: the adapter of this index needs tokens, which an embedding does not "
                f"have; query with --{self.side}"
            )
        rows = _read_array(path)
        width = self._known.width
        if rows.shape[1] != width:
            raise ShapeError(
                f"{path}: has width {rows.shape[1]}, the {self.side} embeddings of {self.index} "
                f"have {width}; use their encoder, or name the side with --query-side"
            )
        if (found := recorded_encoder(path.absolute())) is not None:
            self._check(found, self._known)
        for start in range(0, len(rows), QUERIES_PER_BATCH):
            part = np.asarray(rows[start : start + QUERIES_PER_BATCH], np.float32)
            norms = np.linalg.norm(part, axis=1)
            bad = np.flatnonzero(~(np.isfinite(norms) & (norms > 0)))
            if len(bad):
                raise DataError(
                    f"{path}, row {start + int(bad[0])}: has no direction (it is 0 or not finite); "
                    "remove it"
                )
            names = [str(start + row) for row in range(len(part))]
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


def search(config: SearchConfig, progress: Progress = silent) -> SearchResult:
    """Find the items nearest to some queries.

    Returns:
        The index, how it was searched, and "queries" as `Found` has them, with cosines as scores.

    Raises:
        ConfigError: options do not go together.
        DataError: no such index or feature set, it is damaged, or a query cannot be used.
        EncoderError: the query's encoder cannot be loaded, or is not that of the items.
        OutputError: the page cannot be written.

    >>> import csalign, numpy
    >>> images, texts = numpy.random.default_rng(0).normal(size=(2, 60, 8))
    >>> csalign.search((images, texts), embedding=images[:1], query_side="image", top=1)
    SearchResult
      0  1.0000  0
    """
    return SearchResult(find(config, progress).to_json())


def find(config: SearchConfig, progress: Progress = silent) -> Found:
    """Search like `search`, but yield each query's items as soon as they are found."""
    config.check()
    if config.report is not None:
        check_page(config.report)
    tick("opening the index")
    index = _open(config)
    manifest = index.manifest
    encoder = QueryEncoder(config.index, manifest, index.adapter, config)
    head: Document = {
        "index": str(config.index),
        "side": manifest.side.value,
        "factory": manifest.factory,
        "rows": manifest.rows,
        "correct": manifest.correct,
        "recall@10": 1.0 if manifest.recall is None else manifest.recall.value,
        "top": config.top,
    }
    found = _find_all(config, index, encoder, progress)
    first = list(islice(found, 1))  # loads the encoder now, while progress is shown
    queries: Iterator[Document] = chain(first, found)
    if config.report is not None:
        queries = _with_page(config, manifest, queries)
    return Found(head, queries, config.jsonl)


def _find_all(
    config: SearchConfig, index: SearchIndex, encoder: QueryEncoder, progress: Progress
) -> Iterator[Document]:
    done = 0
    for names, rows in encoder.queries():
        is_items_side = encoder.side is index.manifest.side
        vectors = index.correction.queries(rows, of_items_side=is_items_side)
        scores, found = index.vectors.search(vectors, config.top)
        for name, numbers, values in zip(names, found.tolist(), scores.tolist(), strict=True):
            hits = [(row, score) for row, score in zip(numbers, values, strict=True) if row >= 0]
            items = [
                {"rank": rank, "score": score, **take_item(index.items, row)}
                for rank, (row, score) in enumerate(hits, 1)
            ]
            yield {"query": name, "hits": items}
        done += len(names)
        progress("searching: queries", done, None)


def _open(config: SearchConfig) -> SearchIndex:
    folder = config.index
    if is_remote(folder) or (folder / MANIFEST).is_file():
        options = VectorOptions(factory="Flat")
        return build_index(FeatureSet.open(folder), config, options)
    manifest = read_index_manifest(folder)
    given = (
        ItemOptions.model_fields.keys() - {"allow_adapter", "any_encoder", "device"}
    ) & config.model_fields_set
    if given:
        raise ConfigError(
            f"{', '.join(sorted(given))}: {folder} is an index, which was built with its own; omit "
            "it, or search the feature set"
        )
    vectors = VectorIndex.open(folder / VECTORS, manifest.factory)
    if len(vectors) != manifest.rows or vectors.width != manifest.width:
        raise SchemaError(
            f"{folder}: has {len(vectors)} vectors of width {vectors.width}, index.json says "
            f"{manifest.rows} of {manifest.width}; {REMEDY}"
        )
    for value in manifest.effort.values():
        vectors.set_effort(value)
    adapter = None
    if manifest.adapter_sha256 is not None:
        allow = () if config.allow_adapter is None else (config.allow_adapter,)
        adapter, info = load_adapter_with_info(folder / ADAPTER, allow=allow)
        if info.weights_sha256 != manifest.adapter_sha256:
            raise SchemaError(f"{folder / ADAPTER}: is not the index's own adapter; {REMEDY}")
        adapter.to(pick_device(config.device))
    items, correction = read_items(folder, manifest.rows), load_correction(folder, manifest.correct)
    return SearchIndex(manifest, vectors, items, correction, adapter)


def _with_page(
    config: SearchConfig, manifest: IndexManifest, queries: Iterator[Document]
) -> Iterator[Document]:
    """Pass the queries on; write the page after the last of them."""
    assert config.report is not None
    rows = renamed(f"{manifest.rows:,} {manifest.side.plural}", manifest.names)
    sections: list[Section] = []
    count, shown = 0, Pictures(THUMBNAIL, config.pictures, manifest.source_root)
    for count, found in enumerate(queries, 1):
        if count <= PAGE_QUERIES:
            pictures = [
                Entry(
                    hit["caption"] or "",
                    f"{hit['rank']}.  {hit['score']:.3f}  {hit['image_id'] or hit['id']}",
                    shown.thumbnail(hit["source"], hit["image_id"] or hit["id"]),
                )
                for hit in found["hits"]
            ]
            note = f"The {len(pictures)} nearest of {rows}."
            array = config.embedding and config.embedding.name
            query = found["query"] if array is None else f"{array}, row {found['query']}"
            sections.append(Section(query, note, pictures=pictures))
        yield found
    shown.warn()
    title = sections[0].title if len(sections) == 1 else f"{len(sections)} searches"
    summary = f"{config.index.name}: {rows}."
    write_page(config.report, title, sections, summary=summary)
    if config.jsonl:  # else the tables end with it
        log.info("wrote %s", config.report)
    if count > PAGE_QUERIES:
        log.warning("%s: shows the first %d queries only", config.report, PAGE_QUERIES)
