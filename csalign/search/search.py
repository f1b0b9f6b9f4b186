"""``csalign search``: the nearest items of an index."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from csalign.adapters.checkpoint import load_adapter_with_info
from csalign.adapters.model import Adapter
from csalign.core.devices import pick_device
from csalign.core.errors import SchemaError
from csalign.core.progress import Progress, silent
from csalign.core.results import Found
from csalign.core.side_names import renamed
from csalign.report.page import Entry, Section, check_page, write_page
from csalign.report.thumbnails import thumbnail
from csalign.search.config import SearchConfig
from csalign.search.corrections import Corrected, load_correction
from csalign.search.items import Items
from csalign.search.manifest import ADAPTER, IndexManifest, read_index_manifest
from csalign.search.queries import Asker, Queries
from csalign.search.vectors import VectorIndex, threads

PAGE_QUERIES = 100  # of more, a page shows the first
THUMBNAIL = 256  # pixels

log = logging.getLogger(__name__)

Document = dict[str, Any]


def search(config: SearchConfig, progress: Progress = silent) -> Document:
    """Look for the items nearest to some queries.

    Args:
        config: the index and the queries.
        progress: told how many queries were asked.

    Returns:
        The index, how it was asked, and "queries" as `Found` has them. A score is the cosine in
        the shared space, or the corrected score up to a term of the query alone.

    Raises:
        ConfigError: options do not go together.
        DataError: no such index, or a query that cannot be used.
        EncoderError: the query's encoder cannot be had, or is not that of the index.
        SchemaError: the index is damaged.
        ShapeError: an embedding is of another width.
        OutputError: the page cannot be written where it is wanted.
    """
    return find(config, progress).to_json()


def find(config: SearchConfig, progress: Progress = silent) -> Found:
    """Like `search`, but gives each query's items as soon as they are found."""
    if config.html is not None:
        check_page(config.html)
    manifest = read_index_manifest(config.index)
    opened = _open(config, manifest)
    _ = opened.asker.side  # raises for what makes no query
    head: Document = {
        "index": str(config.index),
        "side": manifest.side.value,
        "kind": manifest.kind,
        "rows": manifest.rows,
        "correct": manifest.correct,
        "recall@10": None if manifest.recall is None else manifest.recall.value,
        "top": config.top,
    }
    queries = opened.found(progress)
    if config.html is not None:
        queries = _with_page(config, manifest, queries)
    return Found(head, queries, config.jsonl)


@dataclass(frozen=True)
class _Opened:
    """An index that is ready to be asked."""

    config: SearchConfig
    manifest: IndexManifest
    vectors: VectorIndex
    items: Items
    correction: Corrected | None
    asker: Asker

    def found(self, progress: Progress) -> Iterator[Document]:
        done = 0
        with threads(self.config.threads):
            for queries in self.asker.queries():
                yield from self._asked(queries)
                done += len(queries.names)
                progress("queries", done, None)

    def _asked(self, queries: Queries) -> Iterator[Document]:
        rows = queries.rows
        if self.correction is not None:
            rows = self.correction.queries(rows, of_items=self.asker.side is self.manifest.side)
        scores, found = self.vectors.search(rows, self.config.top)
        for name, own, values in zip(queries.names, found.tolist(), scores.tolist(), strict=True):
            there = [(row, score) for row, score in zip(own, values, strict=True) if row >= 0]
            items = self.items.take([row for row, _ in there])
            yield {
                "query": name,
                "hits": [
                    {"rank": rank, "score": score, **item}
                    for rank, ((_, score), item) in enumerate(
                        zip(there, items, strict=True), start=1
                    )
                ],
            }


def _open(config: SearchConfig, manifest: IndexManifest) -> _Opened:
    folder = config.index
    vectors = VectorIndex.open(folder, manifest.kind, manifest.search_effort())
    if len(vectors) != manifest.rows or vectors.width != manifest.width:
        raise SchemaError(
            f"{folder}: holds {len(vectors)} vectors of width {vectors.width}, index.json says "
            f"{manifest.rows} of {manifest.width}; build the index again"
        )
    return _Opened(
        config,
        manifest,
        vectors,
        Items(folder, manifest.rows),
        load_correction(folder, manifest.correct),
        Asker(config, manifest, _adapter(config, manifest)),
    )


def _adapter(config: SearchConfig, manifest: IndexManifest) -> Adapter | None:
    if manifest.adapter_sha256 is None:
        return None
    allow = () if config.allow_adapter is None else (config.allow_adapter,)
    adapter, info = load_adapter_with_info(config.index / ADAPTER, allow=allow)
    if info.weights_sha256 != manifest.adapter_sha256:
        raise SchemaError(
            f"{config.index / ADAPTER}: is not the adapter that index.json names; build the index "
            "again"
        )
    return adapter.to(pick_device(config.device))


def _with_page(
    config: SearchConfig, manifest: IndexManifest, queries: Iterator[Document]
) -> Iterator[Document]:
    """The same queries; once they are all there the page is."""
    sections: list[Section] = []
    left_out = 0
    for found in queries:
        if len(sections) < PAGE_QUERIES:
            sections.append(_section(config, manifest, found))
        else:
            left_out += 1
        yield found
    assert config.html is not None
    title = sections[0].title if len(sections) == 1 else f"{len(sections)} searches"
    write_page(config.html, title, sections)
    log.info("%s: a page of what was found", config.html)
    if left_out:
        log.warning("%s: shows the first %d queries of all", config.html, PAGE_QUERIES)


def _section(config: SearchConfig, manifest: IndexManifest, found: Document) -> Section:
    pictures = [
        Entry(
            hit["caption"] or hit["id"],
            f"{hit['rank']}.  {hit['score']:.3f}  {hit['image_id'] or hit['id']}",
            thumbnail(hit["source"], THUMBNAIL, config.pictures),
        )
        for hit in found["hits"]
    ]
    rows = renamed(f"{manifest.rows:,} {manifest.side.plural}", manifest.names)
    note = f"The {len(pictures)} nearest of {rows}."
    return Section(found["query"], note, pictures=pictures)
