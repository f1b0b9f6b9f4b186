"""What the page of an evaluation shows: samples, projections, and the queries worth a look."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from csalign.features.join import PairedRows, image_sources
from csalign.features.reader import FeatureSet
from csalign.metrics.retrieval import DirectionRanks
from csalign.report.evaluation import Found, RunRecord, View, write_evaluation
from csalign.report.page import Entry
from csalign.report.thumbnails import thumbnail
from csalign.runs.metadata import SUMS, read_environment, read_lines, read_settings, run_folder

DRAWN = 1_000  # pairs; more are a blot
SAMPLED = 5_000  # pairs, for cosines and spectra
QUERIES = 8  # best and worst ones of a direction
THUMBNAIL = 128  # pixels
NOTHING = 1e-8  # of the largest eigenvalue; what is below is rounding
FEWEST_TO_MAP = 20  # rows, for UMAP

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Sides = tuple[Floats, Floats]


@dataclass(frozen=True)
class Evaluated:
    """Rows, what became of them, and how they were found.

    Attributes:
        features: where the rows come from.
        rows: as they are stored.
        images: (n, d), unit rows, after the adapter if there is one.
        texts: (m, d), likewise.
        adapted: whether there is one.
        ranks: image to text, and text to image.
        document: of ``csalign eval``.
    """

    features: FeatureSet
    rows: PairedRows
    images: Floats
    texts: Floats
    adapted: bool
    ranks: tuple[DirectionRanks, DirectionRanks]
    document: Mapping[str, Any]


def write_report(
    path: Path, title: str, evaluated: Evaluated | None, run: Path | None, seed: int
) -> None:
    """Write the page of an evaluation.

    Args:
        path: of the page, an HTML file.
        title: of the page.
        evaluated: what was measured, or None where only a run is shown.
        run: folder of the adapter's run, or a checkpoint in it.
        seed: of which pairs are drawn.

    Raises:
        SchemaError: what the run wrote is damaged.
    """
    record = None if run is None else _record(run)
    if evaluated is None:
        write_evaluation(path, title, None, [], [], {}, record)
        return
    rng = np.random.default_rng(seed)
    texts = np.flatnonzero(evaluated.rows.text_image >= 0)
    texts = rng.permutation(texts)[:SAMPLED]
    labels = [_label(evaluated.rows, text) for text in texts[:DRAWN].tolist()]
    found = _found(evaluated)
    names = evaluated.features.manifest.names
    views = _views(evaluated, texts, seed)
    write_evaluation(path, title, evaluated.document, views, labels, found, record, names)


def _label(rows: PairedRows, text: int) -> str:
    image = rows.image_ids[int(rows.text_image[text])].as_py()
    caption = rows.captions[text].as_py()
    return f"{caption or rows.text_ids[text].as_py()} ({image})"


def _views(evaluated: Evaluated, texts: Ints, seed: int) -> list[View]:
    rows = evaluated.rows
    owners = rows.text_image[texts]
    after = evaluated.images[owners], evaluated.texts[texts]
    if not evaluated.adapted:
        return [_view("", *after, owners, seed)]
    before = _unit(rows.images[owners]), _unit(rows.texts[texts])
    return [_view("before", *before, owners, seed), _view("after", *after, owners, seed)]


def _unit(rows: npt.NDArray[Any]) -> Floats:
    wide = rows.astype(np.float32)
    unit: Floats = wide / np.linalg.norm(wide, axis=1, keepdims=True)
    return unit


def _view(name: str, images: Floats, texts: Floats, owners: Ints, seed: int) -> View:
    """Draw pairs, (k, d) and (k, e), and the row of each one's image, (k,)."""
    view = _measured_view(name, images, texts, owners)
    return replace(view, neighbours=_neighbours(images[:DRAWN], texts[:DRAWN], view.shared, seed))


def _neighbours(images: Floats, texts: Floats, shared: bool, seed: int) -> Sides | None:
    """Both sides by UMAP, together where they share a space; None without umap-learn."""
    if len(images) < FEWEST_TO_MAP:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what else could be installed, and of fixed seeds
        try:
            from umap import UMAP
        except ImportError:
            return None
        mapper = UMAP(metric="cosine", random_state=seed % 2**32, n_jobs=1)
        if not shared:
            return mapper.fit_transform(images), mapper.fit_transform(texts)
        points = mapper.fit_transform(np.concatenate([images, texts]))
    return points[: len(images)], points[len(images) :]


def _measured_view(name: str, images: Floats, texts: Floats, owners: Ints) -> View:
    _, once = np.unique(owners, return_index=True)
    spectra = _singular_values(images[once]), _singular_values(texts)
    if images.shape[1] != texts.shape[1]:
        (x, share_x), (y, share_y) = (_project(rows, rows) for rows in (images, texts))
        none = np.empty(0)
        return View(name, x[:DRAWN], y[:DRAWN], (share_x, share_y), False, (none, none), spectra)
    both = np.concatenate([images, texts])
    points, share = _project(both, both)
    x, y = points[: len(images)], points[len(images) :]
    matched = np.einsum("ij,ij->i", images, texts)
    elsewhere = np.roll(owners, 1) != owners
    unmatched = np.einsum("ij,ij->i", np.roll(images, 1, axis=0), texts)[elsewhere]
    return View(name, x[:DRAWN], y[:DRAWN], (share,), True, (matched, unmatched), spectra)


def _singular_values(rows: Floats) -> npt.NDArray[np.float64]:
    centred = rows.astype(np.float64) - rows.mean(0, dtype=np.float64)
    values = np.linalg.eigvalsh(centred.T @ centred)[::-1]
    kept: npt.NDArray[np.float64] = values[values > max(values[0], 1e-12) * NOTHING]
    return np.sqrt(kept)


def _project(rows: Floats, fitted: Floats) -> tuple[npt.NDArray[np.float64], float]:
    """Rows on the first two principal axes, (n, 2), and the share of the variance on them."""
    mean = fitted.mean(0, dtype=np.float64)
    centred = fitted - mean
    values, vectors = np.linalg.eigh(centred.T @ centred)
    points = (rows - mean) @ vectors[:, :-3:-1]
    if points.shape[1] < 2:
        points = np.column_stack([points, np.zeros(len(points))])
    return points, float(values[-2:].sum() / max(values.sum(), 1e-12))


def _found(evaluated: Evaluated) -> dict[str, list[Found]]:
    """The worst and the best queries of both directions."""
    rows, (to_text, to_image) = evaluated.rows, evaluated.ranks
    paired = np.flatnonzero(rows.text_image >= 0)
    owners = rows.text_image[paired]
    cosines = np.einsum("ij,ij->i", evaluated.images[owners], evaluated.texts[paired])
    best = np.full(len(rows.images), -np.inf)
    np.maximum.at(best, owners, cosines)
    queried = np.unique(owners)
    gallery = _Gallery(evaluated)
    found = {}
    for what, pick in (("Worst", _worst), ("Best", _best)):
        images, texts = pick(to_text.first, best[queried]), pick(to_image.first, cosines)
        found[f"{what} from image to text"] = [
            gallery.text_of(int(queried[one]), int(to_text.first[one])) for one in images
        ]
        found[f"{what} from text to image"] = [
            gallery.image_of(int(paired[one]), int(to_image.first[one])) for one in texts
        ]
    return found


def _worst(rank: Ints, cosine: npt.NDArray[Any]) -> Ints:
    return np.lexsort((cosine, -rank))[: _how_many(rank)]


def _best(rank: Ints, cosine: npt.NDArray[Any]) -> Ints:
    return np.lexsort((-cosine, rank))[: _how_many(rank)]


def _how_many(queries: Sequence[Any] | Ints) -> int:
    return max(1, min(QUERIES, len(queries) // 2))


class _Gallery:
    """Looks up what a query found, and shows images and texts."""

    def __init__(self, evaluated: Evaluated) -> None:
        self._of = evaluated
        self._pictures: dict[int, bytes] = {}

    def text_of(self, image: int, rank: int) -> Found:
        scores = self._of.texts @ self._of.images[image]
        match, wrong = _first_of(scores, self._of.rows.text_image == image)
        return Found(self._image(image), rank, self._text(match), self._text(wrong))

    def image_of(self, text: int, rank: int) -> Found:
        scores = self._of.images @ self._of.texts[text]
        owner = self._of.rows.text_image[text]
        match, wrong = _first_of(scores, np.arange(len(scores)) == owner)
        return Found(self._text(text), rank, self._image(match), self._image(wrong))

    def _text(self, row: int) -> Entry:
        name = self._of.rows.text_ids[row].as_py()
        caption = self._of.rows.captions[row].as_py()
        return Entry(caption, name) if caption else Entry(name)

    def _image(self, row: int) -> Entry:
        name = self._of.rows.image_ids[row].as_py()
        if row not in self._pictures:
            (source,) = image_sources(self._of.features, [name])
            self._pictures[row] = thumbnail(source, THUMBNAIL)
        return Entry(name, picture=self._pictures[row])


def _first_of(scores: Floats, matches: npt.NDArray[np.bool_]) -> tuple[int, int]:
    """The best match and the best of the others."""
    match = int(np.where(matches, scores, -np.inf).argmax())
    return match, int(np.where(matches, -np.inf, scores).argmax())


def _record(run: Path) -> RunRecord:
    folder = run_folder(run)
    environment = read_environment(folder)
    environment.pop(SUMS, None)
    return RunRecord(read_lines(folder), read_settings(folder), environment)
