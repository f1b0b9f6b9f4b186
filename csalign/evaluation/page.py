"""Select what the page of an evaluation shows: sampled pairs, projections, and ranked queries."""

import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from csalign.core.enums import Modality
from csalign.core.results import tick
from csalign.evaluation.protocols import AlignedRows, Ranks
from csalign.features import schema
from csalign.metrics.bootstrap import Resamples
from csalign.report.evaluation import RankedQuery, RunRecord, View, write_evaluation
from csalign.report.page import Entry
from csalign.report.thumbnails import thumbnail
from csalign.runs.metadata import SUMS, read_environment, read_lines, read_settings, run_folder

DRAWN = 1_000  # pairs in a projection
SAMPLED = 5_000  # pairs, for cosines and spectra
QUERIES = 8  # best and worst ones, in each direction
THUMBNAIL = 128  # pixels
ROUNDING = 1e-8  # of the largest eigenvalue; smaller ones are rounding errors
FEWEST_TO_MAP = 20  # rows, for UMAP

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class EvaluationReport:
    """The measured rows, their ranks, resamples if there are intervals, and the JSON document."""

    aligned: AlignedRows
    ranks: Ranks
    resamples: Resamples | None
    document: dict[str, Any]


def write_report(
    path: Path,
    title: str,
    report: EvaluationReport | None,
    run: Path | None,
    seed: int,
    *,
    drawn: int = DRAWN,
) -> None:
    """Write the page of an evaluation and a run, either of which may be None.

    Pairs are sampled by `seed`; at most `drawn` of them are in a projection.

    Raises:
        SchemaError: the record of the run is damaged.
    """
    record = None
    if run is not None:
        folder = run_folder(run)
        environment = read_environment(folder)
        environment.pop(SUMS, None)
        record = RunRecord(read_lines(folder), read_settings(folder), environment)
    if report is None:
        write_evaluation(path, title, None, [], [], {}, record)
        return
    aligned, rows = report.aligned, report.aligned.rows
    tick("drawing the page")
    paired = np.flatnonzero(rows.text_image >= 0)
    texts = np.random.default_rng(seed).permutation(paired)[:SAMPLED]
    owners = rows.text_image[texts]
    stages = [("", aligned.images[owners], aligned.texts[texts])]
    if aligned.adapter is not None:
        before = ("before", _unit(rows.images[owners]), _unit(rows.texts[texts]))
        stages = [before, ("after", *stages[0][1:])]
    views = [_view(*stage, owners, drawn, seed) for stage in stages]
    captions = zip(rows.captions.take(texts[:drawn]), rows.text_ids.take(texts), strict=False)
    labels = [
        f"{caption.as_py() or text.as_py()} ({rows.image_ids[int(owner)].as_py()})"
        for (caption, text), owner in zip(captions, owners, strict=False)
    ]
    tick("choosing queries")
    queries, names = _ranked_queries(report), aligned.features.manifest.names
    write_evaluation(path, title, report.document, views, labels, queries, record, names)


def _unit(rows: npt.NDArray[Any]) -> Floats:
    wide = rows.astype(np.float32)
    unit: Floats = wide / np.linalg.norm(wide, axis=1, keepdims=True)
    return unit


def _view(name: str, images: Floats, texts: Floats, owners: Ints, drawn: int, seed: int) -> View:
    """Compute what is drawn of pairs, (k, d) and (k, e), and each one's image row, (k,)."""
    _, once = np.unique(owners, return_index=True)
    spectra = _singular_values(images[once]), _singular_values(texts)
    neighbours = _neighbours(images[:drawn], texts[:drawn], seed)
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
    """Map both sides by UMAP, together if they share a space; None without umap-learn."""
    if len(images) < FEWEST_TO_MAP:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # UMAP warns of fixed seeds and of optional packages
        try:
            from umap import UMAP
        except ImportError:
            return None
        tick("mapping neighbours (UMAP)")
        mapper = UMAP(metric="cosine", random_state=seed % 2**32, n_jobs=1)
        if images.shape[1] != texts.shape[1]:
            return mapper.fit_transform(images), mapper.fit_transform(texts)
        x, y = np.split(mapper.fit_transform(np.concatenate([images, texts])), 2)
    return x, y


def _singular_values(rows: Floats) -> npt.NDArray[np.float64]:
    centred = rows.astype(np.float64) - rows.mean(0, dtype=np.float64)
    values = np.linalg.eigvalsh(centred.T @ centred)[::-1]
    kept: npt.NDArray[np.float64] = values[values > max(values[0], 1e-12) * ROUNDING]
    return np.sqrt(kept)


def _project(rows: Floats) -> tuple[npt.NDArray[np.float64], float]:
    """Project onto the first two principal axes, (n, 2); return their share of the variance too."""
    centred = rows - rows.mean(0, dtype=np.float64)
    values, vectors = np.linalg.eigh(centred.T @ centred)
    points = centred @ vectors[:, :-3:-1]
    if points.shape[1] < 2:
        points = np.column_stack([points, np.zeros(len(points))])
    return points, float(values[-2:].sum() / max(values.sum(), 1e-12))


def _ranked_queries(report: EvaluationReport) -> dict[str, list[RankedQuery]]:
    """Find the worst and the best queries of both directions."""
    aligned, rows = report.aligned, report.aligned.rows
    to_text, to_image = (ranks.first for ranks in report.ranks)
    table, table_rows = aligned.features.images, rows.table_rows(Modality.IMAGE)

    def text(row: int) -> Entry:
        name, caption = rows.text_ids[row].as_py(), rows.captions[row].as_py()
        return Entry(caption, name) if caption else Entry(name)

    @cache
    def image(row: int) -> Entry:
        (source,) = table.strings(schema.SOURCE, table_rows[[row]]).to_pylist()
        return Entry(rows.image_ids[row].as_py(), picture=thumbnail(source, THUMBNAIL))

    paired = np.flatnonzero(rows.text_image >= 0)
    owners = rows.text_image[paired]
    cosines = np.einsum("ij,ij->i", aligned.images[owners], aligned.texts[paired])
    best = np.full(len(rows.images), -np.inf)
    np.maximum.at(best, owners, cosines)
    asked = np.unique(owners)
    images = (image, aligned.images, np.arange(len(rows.images)), asked, best[asked], to_text)
    texts = (text, aligned.texts, rows.text_image, paired, cosines, to_image)
    ways = (("image to text", images, texts), ("text to image", texts, images))
    found: dict[str, list[RankedQuery]] = {}
    for heading, sign in (("Worst", -1), ("Best", 1)):
        for way, (entry, vectors, owner, queries, score, first), gallery in ways:
            show, others, owners, *_ = gallery
            found[f"{heading} from {way}"] = ranked = []
            order = np.lexsort((-sign * score, sign * first))
            for one in order[: max(1, min(QUERIES, len(order) // 2))].tolist():
                row = int(queries[one])
                scores, is_match = others @ vectors[row], owners == owner[row]
                match = int(np.where(is_match, scores, -np.inf).argmax())
                wrong = int(np.where(is_match, -np.inf, scores).argmax())
                ranked.append(RankedQuery(entry(row), int(first[one]), show(match), show(wrong)))
    return found
