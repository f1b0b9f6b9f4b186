"""``csalign search``: find the nearest items of an index or a feature set."""

import logging
from collections.abc import Iterator
from typing import Any

from csalign.adapters.checkpoint import load_adapter_with_info
from csalign.core.devices import pick_device
from csalign.core.enums import renamed
from csalign.core.errors import ConfigError, SchemaError
from csalign.core.paths import is_remote
from csalign.core.results import Found, Progress, silent
from csalign.features.reader import FeatureSet
from csalign.features.schema import MANIFEST
from csalign.report.page import Entry, Section, check_page, write_page
from csalign.report.thumbnails import thumbnail
from csalign.search.build import SearchIndex, build_index
from csalign.search.config import ItemOptions, SearchConfig, VectorOptions
from csalign.search.manifest import (
    ADAPTER,
    REMEDY,
    VECTORS,
    IndexManifest,
    read_index_manifest,
    read_items,
    take_item,
)
from csalign.search.queries import QueryEncoder
from csalign.search.vectors import VectorIndex, load_correction

PAGE_QUERIES = 100  # shown on a page, at most
THUMBNAIL = 256  # pixels

log = logging.getLogger(__name__)

Document = dict[str, Any]


def search(config: SearchConfig, progress: Progress = silent) -> Document:
    """Find the items nearest to some queries.

    Returns:
        The index, how it was searched, and "queries" as `Found` has them, with cosines as scores.

    Raises:
        ConfigError: options do not go together.
        DataError: no such index or feature set, it is damaged, or a query cannot be used.
        EncoderError: the query's encoder cannot be loaded, or is not that of the items.
        OutputError: the page cannot be written.
    """
    return find(config, progress).to_json()


def find(config: SearchConfig, progress: Progress = silent) -> Found:
    """Search like `search`, but yield each query's items as soon as they are found."""
    if config.html is not None:
        check_page(config.html)
    index = _open(config)
    manifest = index.manifest
    encoder = QueryEncoder(config.index, manifest, index.adapter, config, config.device)
    _ = encoder.side  # raises where there is not exactly one kind of query
    head: Document = {
        "index": str(config.index),
        "side": manifest.side.value,
        "factory": manifest.factory,
        "rows": manifest.rows,
        "correct": manifest.correct,
        "recall@10": 1.0 if manifest.recall is None else manifest.recall.value,
        "top": config.top,
    }
    queries = _find_all(config, index, encoder, progress)
    if config.html is not None:
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
        progress("queries", done, None)


def _open(config: SearchConfig) -> SearchIndex:
    folder = config.index
    if is_remote(folder) or (folder / MANIFEST).is_file():
        options = VectorOptions(factory="Flat")
        return build_index(FeatureSet.open(folder), config, options)
    manifest = read_index_manifest(folder)
    given = (
        ItemOptions.model_fields.keys() - {"allow_adapter", "device"}
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
    assert config.html is not None
    rows = renamed(f"{manifest.rows:,} {manifest.side.plural}", manifest.names)
    sections: list[Section] = []
    count = 0
    for count, found in enumerate(queries, 1):
        if count <= PAGE_QUERIES:
            pictures = [
                Entry(
                    hit["caption"] or hit["id"],
                    f"{hit['rank']}.  {hit['score']:.3f}  {hit['image_id'] or hit['id']}",
                    thumbnail(hit["source"], THUMBNAIL, config.pictures),
                )
                for hit in found["hits"]
            ]
            note = f"The {len(pictures)} nearest of {rows}."
            sections.append(Section(found["query"], note, pictures=pictures))
        yield found
    title = sections[0].title if len(sections) == 1 else f"{len(sections)} searches"
    write_page(config.html, title, sections)
    log.info("wrote %s", config.html)
    if count > PAGE_QUERIES:
        log.warning("%s: shows the first %d queries only", config.html, PAGE_QUERIES)
