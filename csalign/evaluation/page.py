"""Select what the page of an evaluation shows: sampled pairs, projections, and ranked queries."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from csalign.core.arrays import Doubles, Floats, Ints
from csalign.core.enums import Modality
from csalign.core.errors import ConfigError
from csalign.core.outputs import check_page
from csalign.core.progress import tick
from csalign.evaluation import protocols
from csalign.evaluation.config import PageOptions
from csalign.evaluation.measure import Evaluation
from csalign.features import schema
from csalign.features.checks import scaled
from csalign.metrics.twins import Twins
from csalign.report.evaluation import RankedQuery, RunRecord, View, write_evaluation
from csalign.report.page import Entry
from csalign.report.thumbnails import Pictures
from csalign.runs import metadata

DRAWN = 1_000  # pairs in a projection
SAMPLED = 5_000  # pairs, for cosines and spectra
QUERIES = 8  # in each list
QUERIES_AT_A_TIME = 256
THUMBNAIL = 128  # pixels
ROUNDING = 1e-8  # of the largest eigenvalue; smaller ones are rounding errors
FEWEST_TO_MAP = 20  # rows, for UMAP


def write_report(
    page: PageOptions,
    title: str,
    evaluation: Evaluation | None,
    document: dict[str, Any] | None,
    run: Path | None,
    *,
    is_training: bool = False,
    drawn: int = DRAWN,
) -> None:
    """Write the page of an evaluation and a run, either of which may be None.

    Raises:
        SchemaError: the record of the run is damaged.
    """
    path, record = page.report, None
    assert path is not None
    if run is not None:
        folder = metadata.run_folder(run)
        environment = metadata.read_environment(folder)
        for private in (metadata.SUMS, metadata.FEATURES):
            environment.pop(private, None)
        record = RunRecord(metadata.read_lines(folder), metadata.read_settings(folder), environment)
    if evaluation is None:
        write_evaluation(path, title, None, [], [], {}, record, is_training=is_training)
        return
    aligned, rows, seed = evaluation.aligned, evaluation.aligned.rows, evaluation.options.seed
    tick("drawing the page")
    paired = np.flatnonzero(rows.text_image >= 0)
    texts = np.random.default_rng(seed).permutation(paired)[:SAMPLED]
    owners = rows.text_image[texts]
    stages = [("", aligned.images[owners], aligned.texts[texts])]
    if aligned.adapter is not None:
        before = ("before", scaled(rows.images[owners]), scaled(rows.texts[texts]))
        stages = [before, ("after", *stages[0][1:])]
    views = [_view(*stage, owners, drawn, seed if page.umap else None) for stage in stages]
    captions = zip(rows.captions.take(texts[:drawn]), rows.text_ids.take(texts), strict=False)
    labels = [
        f"{caption.as_py() or text.as_py()} ({rows.image_ids[int(owner)].as_py()})"
        for (caption, text), owner in zip(captions, owners, strict=False)
    ]
    tick("choosing queries")
    shown = Pictures(THUMBNAIL, page.pictures, aligned.features.manifest.source_root)
    queries = _ranked_queries(evaluation, shown)
    shown.warn()
    write_evaluation(path, title, document, views, labels, queries, record, is_training=is_training)


def check_report(page: PageOptions) -> None:
    """Raise OutputError if a page cannot be written, ConfigError if UMAP is not installed."""
    if page.report is not None:
        check_page(page.report)
    if page.umap and find_spec("umap") is None:
        raise ConfigError("umap: umap-learn is not installed; pip install 'csalign[umap]'")


def _view(
    name: str, images: Floats, texts: Floats, owners: Ints, drawn: int, seed: int | None
) -> View:
    """Compute what is drawn of pairs, (k, d) and (k, e), and each one's image row, (k,).

    UMAP is drawn if it has a seed.
    """
    _, once = np.unique(owners, return_index=True)
    spectra = _singular_values(images[once]), _singular_values(texts)
    neighbours = None if seed is None else _neighbours(images[:drawn], texts[:drawn], seed)
    if images.shape[1] != texts.shape[1]:
        (x, share_x), (y, share_y) = _project(images), _project(texts)
        return View(name, x[:drawn], y[:drawn], (share_x, share_y), None, spectra, neighbours)
    points, share = _project(np.concatenate([images, texts]))
    x, y = np.split(points, 2)
    matched = np.einsum("ij,ij->i", images, texts)
    elsewhere = np.roll(owners, 1) != owners
    unmatched = np.einsum("ij,ij->i", np.roll(images, 1, axis=0), texts)[elsewhere]
    return View(name, x[:drawn], y[:drawn], (share,), (matched, unmatched), spectra, neighbours)


def _neighbours(images: Floats, texts: Floats, seed: int) -> tuple[Floats, Floats] | None:
    """Map both sides by UMAP, together if they share a space; None of too few rows."""
    if len(images) < FEWEST_TO_MAP:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # UMAP warns of fixed seeds and of optional packages
        tick("mapping neighbours (UMAP)")
        from umap import UMAP

        mapper = UMAP(metric="cosine", random_state=seed % 2**32, n_jobs=1)
        if images.shape[1] != texts.shape[1]:
            return mapper.fit_transform(images), mapper.fit_transform(texts)
        x, y = np.split(mapper.fit_transform(np.concatenate([images, texts])), 2)
    return x, y


def _singular_values(rows: Floats) -> Doubles:
    centred = rows.astype(np.float64) - rows.mean(0, dtype=np.float64)
    values = np.linalg.eigvalsh(centred.T @ centred)[::-1]
    kept: Doubles = values[values > max(values[0], 1e-12) * ROUNDING]
    return np.sqrt(kept)


def _project(rows: Floats) -> tuple[Doubles, float]:
    """Project onto the first two principal axes, (n, 2); return their share of the variance too."""
    centred = rows - rows.mean(0, dtype=np.float64)
    values, vectors = np.linalg.eigh(centred.T @ centred)
    points = centred @ vectors[:, :-3:-1]
    if points.shape[1] < 2:
        points = np.column_stack([points, np.zeros(len(points))])
    return points, float(values[-2:].sum() / max(values.sum(), 1e-12))


@dataclass(frozen=True)
class _Side:
    """One side of the evaluated rows."""

    show: Callable[[int, str], Entry]  # a row, with a small note
    vectors: Floats  # (n, d) unit rows
    way: int  # 0 if its queries are images
    queries: Ints  # (q,) rows that have a match
    first: Ints  # (q,) rank of the best match of each, twins being matches too


def _ranked_queries(evaluation: Evaluation, pictures: Pictures) -> dict[str, list[RankedQuery]]:
    """Find the queries with the worst ranks and the most confident mistakes, both ways.

    Those are the mistakes with the highest cosine, the widest margin over the match first.
    """
    aligned, rows, seed = evaluation.aligned, evaluation.aligned.rows, evaluation.options.seed
    twins = protocols.find_twins(rows)
    to_text, to_image = map(np.concatenate, zip(*evaluation.first_ranks, strict=True))
    table, table_rows = aligned.features.images, rows.table_rows(Modality.IMAGE)

    def text(row: int, note: str) -> Entry:
        return Entry(rows.captions[row].as_py() or "", f"{rows.text_ids[row].as_py()} {note}")

    @cache
    def thumbnail(row: int) -> bytes:
        (source,) = table.strings(schema.SOURCE, table_rows[[row]]).to_pylist()
        return pictures.thumbnail(source, rows.image_ids[row].as_py())

    def image(row: int, note: str) -> Entry:
        return Entry("", f"{rows.image_ids[row].as_py()} {note}", thumbnail(row))

    asked, paired = twins.queries
    images = _Side(image, aligned.images, 0, asked, to_text)
    texts = _Side(text, aligned.texts, 1, paired, to_image)
    found: dict[str, list[RankedQuery]] = {}
    for way, side, gallery in (("image to text", images, texts), ("text to image", texts, images)):
        missed = np.flatnonzero(side.first > 1)
        missed = np.sort(np.random.default_rng(seed).permutation(missed)[:SAMPLED])
        worst = np.argsort(-side.first[missed], kind="stable")[:QUERIES]
        (match, true), (wrong, taken) = _best(twins, side, gallery, side.queries[missed])
        confident = np.argsort(-taken, kind="stable")[:QUERIES]
        confident = confident[np.argsort((true - taken)[confident], kind="stable")]
        for heading, order in (("Worst ranks", worst), ("Most confident mistakes", confident)):
            found[f"{heading}, {way}"] = [
                RankedQuery(
                    side.show(int(side.queries[missed[one]]), ""),
                    int(side.first[missed[one]]),
                    gallery.show(int(match[one]), f"{true[one]:.3f}"),
                    gallery.show(int(wrong[one]), f"{taken[one]:.3f}"),
                )
                for one in order
            ]
    return found


def _best(twins: Twins, side: _Side, gallery: _Side, queries: Ints) -> list[tuple[Ints, Floats]]:
    """Find the best match and the best wrong item of each query: rows (q,), cosines (q,)."""
    items, scores = np.zeros((2, len(queries)), np.int64), np.zeros((2, len(queries)), np.float32)
    for start in range(0, len(queries), QUERIES_AT_A_TIME):
        part = slice(start, start + QUERIES_AT_A_TIME)
        cosines = side.vectors[queries[part]] @ gallery.vectors.T
        is_match = twins.right(side.way, queries[part])
        for kind, wanted in enumerate((is_match, ~is_match)):
            kept = np.where(wanted, cosines, -np.inf)
            items[kind, part] = kept.argmax(axis=1)
            scores[kind, part] = kept.max(axis=1)
    return list(zip(items, scores, strict=True))
