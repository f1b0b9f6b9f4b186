"""``csalign search``: find the nearest items of an index or a feature set."""

import logging
from collections.abc import Iterator, Sequence
from itertools import chain, islice, zip_longest
from typing import Any, cast

import numpy as np

from csalign.adapters.checkpoint import load_adapter_with_info
from csalign.core.devices import pick_device
from csalign.core.enums import renamed
from csalign.core.errors import ConfigError, SchemaError, ShapeError
from csalign.core.outputs import check_page
from csalign.core.paths import is_remote
from csalign.core.progress import Progress, silent, tick
from csalign.core.results import Found, SearchResult
from csalign.features.reader import FeatureSet
from csalign.features.schema import MANIFEST
from csalign.indexing.build import SearchIndex, build_index
from csalign.indexing.combined import search_combined
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
from csalign.indexing.queries import Queries, QueryEncoder, asked_queries
from csalign.indexing.vectors import VectorIndex, load_correction
from csalign.report.page import Entry, Section, write_page
from csalign.report.thumbnails import Pictures

PAGE_QUERIES = 100  # shown on a page, at most
THUMBNAIL = 256  # pixels

log = logging.getLogger(__name__)

Document = dict[str, Any]


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
    asked = asked_queries(config, manifest)
    if asked[1:] and manifest.correct is not None:
        raise ConfigError(
            f"{config.index}: has corrected scores (--correct {manifest.correct}), which a query "
            "of several sides cannot use; build an index without --correct"
        )
    if asked[1:] and not index.vectors.keeps_vectors:
        log.warning(
            "%s: %s stores compressed vectors, so combined scores are approximate",
            *(config.index, manifest.factory),
        )
    encoders = [
        QueryEncoder(config.index, manifest, index.adapter, config, query) for query in asked
    ]
    head: Document = {
        "index": str(config.index),
        "side": manifest.side,
        "factory": manifest.factory,
        "rows": manifest.rows,
        "correct": manifest.correct,
        "recall@10": 1.0 if manifest.recall is None else manifest.recall.value,
        "top": config.top,
    }
    found = _find_all(config, index, encoders, progress)
    first = list(islice(found, 1))  # loads the encoder now, while progress is shown
    queries: Iterator[Document] = chain(first, found)
    if config.report is not None:
        queries = _with_page(config, manifest, queries)
    return Found(head, queries, config.jsonl)


def _find_all(
    config: SearchConfig,
    index: SearchIndex,
    encoders: Sequence[QueryEncoder],
    progress: Progress,
) -> Iterator[Document]:
    done = 0
    none: Queries = ((), np.empty((0, 0), np.float32))
    asked = zip_longest(*(encoder.queries() for encoder in encoders), fillvalue=none)
    for parts in cast(Iterator[Sequence[Queries]], asked):
        names, rows = parts[0]
        if config.queries:
            names = _names(config, [own for own, _ in parts])
        if encoders[1:]:
            scores, found = search_combined(
                index.vectors, np.stack([own for _, own in parts]), config.top
            )
        else:
            is_items_side = encoders[0].side in index.manifest.sides
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


def _names(config: SearchConfig, names: Sequence[Sequence[str]]) -> list[str]:
    """Name queries of several sides; ShapeError unless there are as many of each."""
    if len({*map(len, names)}) > 1:
        raise ShapeError(
            f"--query: {' and '.join(config.queries)} have different numbers of queries; pass one "
            "row per query for each side, or FILE.npy:ROW"
        )
    return [
        " + ".join(f"{side}: {own}" for side, own in zip(config.queries, each, strict=True))
        for each in zip(*names, strict=True)
    ]


def _shown(hit: Document) -> str:
    return f"{hit['side']} {hit['id']}" if "side" in hit else hit["image_id"] or hit["id"]


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
    items, correction = (
        read_items(folder, manifest.rows, sided=manifest.is_sided),
        load_correction(folder, manifest.correct),
    )
    return SearchIndex(manifest, vectors, items, correction, adapter)


def _with_page(
    config: SearchConfig, manifest: IndexManifest, queries: Iterator[Document]
) -> Iterator[Document]:
    """Pass the queries on; write the page after the last of them."""
    assert config.report is not None
    rows = renamed(f"{manifest.rows:,} {manifest.plural}", manifest.names)
    sections: list[Section] = []
    count, shown = 0, Pictures(THUMBNAIL, config.pictures, manifest.source_root)
    for count, found in enumerate(queries, 1):
        if count <= PAGE_QUERIES:
            pictures = [
                Entry(
                    hit["caption"] or "",
                    f"{hit['rank']}.  {hit['score']:.3f}  {_shown(hit)}",
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
