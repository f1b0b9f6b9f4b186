"""Measure what figures of the raw sides, and learning curves, foretell of recall.

Usage::

    python tests/benchmarks/forecast/forecast.py WHAT --csv FILE --oc DIR --icons DIR --packages DIR

WHAT is measure, train or fit. The folders are those of the `prepare.py` of openclipart, icons and
packages. `measure` and `train` add what the file lacks; `fit` reads it and prints the tables of
RESULTS.md.
"""

from __future__ import annotations

import argparse
import csv
import functools
import importlib.resources
import itertools
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy.stats import spearmanr
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer

sys.path.insert(0, str(Path(__file__).parent.parent / "recall"))
from common import Corpus, Paired, Problem, Side, Tree, load_corpus, mean_recall, write_sets

from csalign.adapters.canonical import PairMoments
from csalign.adapters.side import UnitRows, loud_scale
from csalign.features.join import load_rows
from csalign.features.reader import FeatureSet
from csalign.training import advice

Floats = NDArray[np.float32]
Row = Mapping[str, str]

MOST = 20_000  # training pairs kept of a corpus
SPLITS = {"oc": "train,val2", "icons": "train", "packages": "train"}
RIDGES = (0.03, 0.1, 0.3, 1.0, 3.0)
POWERS = (0.5, 1.0)
HELD = 250  # validation pairs to choose the ridge by; the others are the small gallery
GALLERY = 1_000
CHANCE = (1 + 5 + 10) / 3 / GALLERY
BLOCK = 500
TRAINED_AT = 1_500
SIZES = (313, 500, 625, 1250, 1500, 5000)
SHUFFLED_SIZES = (500, 1500, 5000)
LARGEST = 20_000  # of icons and packages
COLUMNS = (
    *("method", "corpus", "images", "texts", "shuffled", "pairs", "seed"),
    *(
        "distinct",
        "cka",
        "cka_debiased",
        "mutual_knn",
        "chance",
        "mutual_knn_500",
        "rank_x",
        "rank_y",
    ),
    *("width_x", "width_y", "recall", "refitted", "held", "setting"),
)
KEYS = COLUMNS[:7]
csv.field_size_limit(1 << 24)


class View(NamedTuple):
    """A corpus, what stands for its images and texts, and the share of pairs that are permuted."""

    corpus: str
    images: str
    texts: str
    shuffled: float = 0.0
    is_trained: bool = False


VIEWS = (
    View("oc", "net", "minilm", is_trained=True),
    View("oc", "net-pca128", "minilm"),
    View("oc", "net-pca32", "minilm", is_trained=True),
    View("oc", "net-random64", "minilm"),
    View("oc", "net-pca128", "minilm-pca32"),
    View("oc", "net-pca128", "tfidf256", is_trained=True),
    View("oc", "net-pca128", "tfidf64"),
    View("oc", "net-pca128", "dropped256"),
    View("oc", "net-pca128", "static"),
    View("oc", "pixels", "minilm", is_trained=True),
    View("oc", "colours", "minilm"),
    View("oc", "net-pca128", "minilm", 0.2),
    View("oc", "net-pca128", "minilm", 0.5, is_trained=True),
    View("oc", "net-pca128", "minilm", 1.0),
    View("icons", "net", "minilm", is_trained=True),
    View("icons", "net-pca128", "minilm"),
    View("icons", "net-pca32", "minilm"),
    View("icons", "net-random64", "minilm", is_trained=True),
    View("icons", "net-pca128", "static"),
    View("icons", "net-pca128", "tfidf256", is_trained=True),
    View("icons", "net-pca128", "minilm-pca32"),
    View("icons", "net-pca128", "dropped256"),
    View("icons", "net-pca128", "minilm", 0.2),
    View("icons", "net-pca128", "minilm", 0.5),
    View("icons", "net-pca128", "minilm", 1.0),
    View("packages", "minilm", "static", is_trained=True),
    View("packages", "minilm", "lsa", is_trained=True),
    View("packages", "minilm-pca32", "static"),
    View("packages", "minilm", "static-pca32", is_trained=True),
    View("packages", "minilm-random64", "static-random64"),
    View("packages", "minilm-pca128", "lsa-pca64"),
    View("packages", "static", "lsa"),
    View("packages", "minilm", "tfidf64"),
    View("packages", "minilm", "dropped256", is_trained=True),
    View("packages", "minilm-pca128", "static", 0.2),
    View("packages", "minilm-pca128", "static", 0.5),
    View("packages", "minilm-pca128", "static", 1.0),
)


class Sides:
    """Views of a corpus, of the splits train, val and test one after another."""

    def __init__(self, name: str, folder: Path) -> None:
        """Read the corpus, at most `MOST` of its training pairs."""
        corpus = load_corpus(name, folder / "features", SPLITS[name])
        order = np.random.default_rng(7).permutation(len(corpus.train))[:MOST]
        parts = (corpus.train.take(order), corpus.val, corpus.test)
        self.name, self.folder = name, folder
        self.side = functools.lru_cache(maxsize=12)(self._side)
        self.bounds = np.cumsum([len(part) for part in parts])
        self.captions = [caption for part in parts for caption in part.captions]
        self._images = np.concatenate([part.images for part in parts])
        self._texts = np.concatenate([part.texts for part in parts])
        self._keys = self._ids(corpus, order)

    def _ids(self, corpus: Corpus, order: NDArray[np.int64]) -> list[str]:
        """Ids of the images, for the corpora with pictures."""
        if self.name != "oc":
            return []
        opened = FeatureSet.open(self.folder / "features")
        found = []
        for split in (SPLITS[self.name], "val", "test"):
            rows = load_rows(opened, split)
            ids = rows.image_ids.take(np.flatnonzero(rows.caption_counts)).to_pylist()
            found += [ids[row] for row in order] if split == SPLITS[self.name] else ids
        return found

    @property
    def training(self) -> int:
        """Number of training pairs."""
        return int(self.bounds[0])

    def _side(self, is_text: bool, name: str) -> Floats:
        """Rows of a view, (n, d)."""
        base, _, cut = name.partition("-")
        rows = self._base(is_text, base)
        if cut.startswith("pca"):
            known = rows[: self.training].astype(np.float64)
            centred = known - known.mean(0)
            vectors = np.linalg.eigh(centred.T @ centred)[1][:, ::-1]
            return ((rows - known.mean(0)) @ vectors[:, : int(cut[3:])]).astype(np.float32)
        if cut.startswith("random"):
            draw = np.random.default_rng(1).standard_normal((rows.shape[1], int(cut[6:])))
            return ((rows - rows[: self.training].mean(0)) @ draw).astype(np.float32)
        return rows

    def _base(self, is_text: bool, name: str) -> Floats:
        if name.startswith(("tfidf", "dropped")):
            words = self.captions
            if name.startswith("dropped"):
                random = np.random.default_rng(2)
                words = [
                    " ".join(word for word in text.split() if random.random() < 0.5)
                    for text in words
                ]
            return _tfidf(words, int(name.removeprefix("tfidf").removeprefix("dropped")))
        if name == "lsa":
            return _lsa(self.folder, self.captions)
        if name == "static":
            if self.name == "packages":
                return self._texts
            return _static(tuple(self.captions))
        if name == "pixels":
            return self._pictures(lambda picture: np.asarray(picture.resize((16, 16))).ravel())
        if name == "colours":
            return self._pictures(_colours)
        return self._texts if is_text else self._images

    def _pictures(self, measure: Callable[[Image.Image], Any]) -> Floats:
        folder, found = self.folder / "pictures", []
        for key in self._keys:
            with Image.open(folder / f"{key}.png") as picture:
                found.append(np.asarray(measure(picture.convert("RGB")), np.float32))
        return np.stack(found) / 255 + 1e-3  # black pictures have a direction too

    def pairs(self, view: View) -> Corpus:
        """The pairs of a view; those of train and val are permuted in part where it says so."""
        images, texts = self.side(False, view.images), self.side(True, view.texts)
        parts = []
        for own in np.split(np.arange(len(images)), self.bounds[:-1]):
            partner = own.copy()
            if view.shuffled and own[0] != self.bounds[1]:
                random = np.random.default_rng(3)
                moved = np.flatnonzero(random.random(len(own)) < view.shuffled)
                partner[moved] = partner[np.roll(random.permutation(moved), 1)]
            captions = [self.captions[row] for row in partner]
            parts.append(Paired(images[own], texts[partner], captions))
        return Corpus(view.corpus, *parts)


def _tfidf(texts: Sequence[str], width: int) -> Floats:
    table = TfidfVectorizer(sublinear_tf=True, min_df=2, max_df=0.2).fit_transform(texts)
    reduce = TruncatedSVD(width, random_state=0, n_iter=3).fit(table[:5_000])
    found: Floats = reduce.transform(table).astype(np.float32)
    is_empty = ~table.getnnz(axis=1).astype(bool)  # no word that another text has
    found[is_empty] = found.mean(0)
    return found


def _lsa(folder: Path, captions: Sequence[str]) -> Floats:
    """The stored TF-IDF and SVD of these captions."""
    opened = load_corpus("packages", folder / "features-lsa", "train")
    parts = (opened.train, opened.val, opened.test)
    rows = {
        word: row for part in parts for word, row in zip(part.captions, part.texts, strict=True)
    }
    return np.stack([rows[caption] for caption in captions])


@functools.lru_cache(maxsize=2)
def _static(texts: tuple[str, ...]) -> Floats:
    """The mean of static word vectors, (n, 256)."""
    from safetensors.numpy import load_file
    from tokenizers import Tokenizer

    root = Path(str(importlib.resources.files("wordllama")))
    tokenizer = Tokenizer.from_file(str(root / "tokenizers/l2_supercat_tokenizer_config.json"))
    (table,) = load_file(root / "weights/l2_supercat_256.safetensors").values()
    tokenizer.no_padding()
    encoded = tokenizer.encode_batch([text or "." for text in texts], add_special_tokens=False)
    return np.stack([table.astype(np.float32)[own.ids].mean(axis=0) for own in encoded])


def _colours(picture: Image.Image) -> Any:
    """Shares of 4 x 4 x 4 colours, square roots, (64,)."""
    levels = np.asarray(picture.resize((64, 64))).reshape(-1, 3) // 64
    shares = np.bincount(levels @ [16, 4, 1], minlength=64) / len(levels)
    return 255 * np.sqrt(shares)


def units_of(images: Floats, texts: Floats) -> tuple[UnitRows, UnitRows]:
    """The inputs that `csalign train` makes of the rows."""
    found = []
    for rows in (images, texts):
        root = bool(rows.min() >= 0)
        found.append(UnitRows(root, loud_scale(rows, signed_sqrt=root)))
    return found[0], found[1]


def cca(train: Paired, val: Paired, test: Paired) -> dict[str, Any]:
    """Mean recall, in percent, of CCA with the ridge and the power that do best on val.

    On the test pairs, fitted on train and on train and val; and on all but `HELD` pairs of val, for
    the setting that does best on those `HELD`.
    """
    units = units_of(train.images, train.texts)
    val_sides = (units[0](val.images), units[1](val.texts))
    test_sides = (units[0](test.images), units[1](test.texts))
    best: list[tuple[float, Any]] = [(-1.0, None), (-1.0, None)]
    chosen = (0.0, 0.0)
    for ridge, power, form in _forms(train, units, RIDGES, POWERS):
        x, y = (side.numpy() for side in form.outputs(*val_sides))
        if (found := mean_recall(x, y)) > best[0][0]:
            best[0], chosen = (found, form), (ridge, power)
        if (found := mean_recall(x[:HELD], y[:HELD])) > best[1][0]:
            best[1] = (found, mean_recall(x[HELD:], y[HELD:]))
    forms = _forms(train.joined(val), units, chosen[:1], chosen[1:])
    ways = {"recall": best[0][1], "refitted": next(forms)[2]}
    measured = {
        name: mean_recall(*(side.numpy() for side in form.outputs(*test_sides)))
        for name, form in ways.items()
    }
    return measured | {"held": best[1][1], "setting": ways["recall"].name}


def _forms(
    pairs: Paired,
    units: tuple[UnitRows, UnitRows],
    ridges: Sequence[float],
    powers: Sequence[float],
) -> Iterator[tuple[float, float, Any]]:
    rows = (np.arange(len(pairs)),) * 2
    moments = PairMoments.of(pairs.images, pairs.texts, rows, np.ones(len(pairs)), units)
    width = min(pairs.images.shape[1], pairs.texts.shape[1], len(pairs) - 1)
    for ridge in ridges:
        fitted = moments.cca(ridge=ridge, powers=tuple(powers), width=width)
        for power, form in zip(powers, fitted, strict=True):
            yield ridge, power, form


def distinct(train: Paired) -> NDArray[np.int64]:
    """Rows without a second one of an image or a caption, ascending."""
    rows = np.arange(len(train))
    for keys in (np.array([hash(row.tobytes()) for row in train.images]), np.array(train.captions)):
        rows = np.sort(rows[np.unique(keys[rows], return_index=True)[1]])
    return rows


def figures(train: Paired) -> dict[str, float]:
    """Figures of the raw sides on at most 2,000 distinct pairs."""
    rows = distinct(train)
    images, texts = (side[rows[: advice.COMPARED]] for side in (train.images, train.texts))
    x, y = (
        (lambda rows: rows - rows.mean(0))(unit(side).double())
        for unit, side in zip(units_of(images, texts), (images, texts), strict=True)
    )
    n = len(x)
    kernels = [side @ side.T for side in (x, y)]
    blocks = [slice(start, start + BLOCK) for start in range(0, n - BLOCK + 1, BLOCK)]
    agreement = advice.neighbour_agreement
    in_blocks = [agreement(images[block], texts[block]) for block in blocks]
    return {
        "distinct": len(rows),
        "cka": _cosine(*kernels),
        "cka_debiased": _cosine_debiased(*kernels),
        "mutual_knn": agreement(images, texts),
        "chance": advice.NEIGHBOURS / (n - 1),
        "mutual_knn_500": float(np.mean(in_blocks)) if blocks else float("nan"),
        "rank_x": _effective_rank(x),
        "rank_y": _effective_rank(y),
        "width_x": images.shape[1],
        "width_y": texts.shape[1],
    }


def _cosine(k: torch.Tensor, other: torch.Tensor) -> float:
    return float((k * other).sum() / (k.norm() * other.norm()))


def _cosine_debiased(k: torch.Tensor, other: torch.Tensor) -> float:
    """CKA of the unbiased estimate of HSIC (Song et al. 2012)."""

    def hsic(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        n = len(a)
        a, b = (side - torch.diag(side.diag()) for side in (a, b))
        mean = a.sum() * b.sum() / ((n - 1) * (n - 2))
        return (a * b).sum() + mean - 2 * (a.sum(0) @ b.sum(0)) / (n - 2)

    return float(hsic(k, other) / (hsic(k, k) * hsic(other, other)).clamp(min=1e-12).sqrt())


def _effective_rank(centred: torch.Tensor) -> float:
    values = torch.linalg.eigvalsh(centred.T @ centred).clamp(min=0)
    shares = (values / values.sum()).clamp(min=1e-12)
    return float(torch.exp(-(shares * shares.log()).sum()))


class Table:
    """Rows of the CSV file; each key is measured once."""

    def __init__(self, path: Path) -> None:
        """Read the file, if it is there."""
        self.path = path
        self.rows: list[dict[str, str]] = []
        if path.exists():
            with path.open(newline="", encoding="utf-8") as stream:
                self.rows = list(csv.DictReader(stream))
        self.known = {tuple(row[key] for key in KEYS) for row in self.rows}

    def add(self, keys: Sequence[Any], measure: Callable[[], Mapping[str, Any]]) -> None:
        """Measure and write down a row, unless it is there."""
        texts = tuple(map(str, keys))
        if texts in self.known:
            return
        found = {
            key: f"{value:.5f}" if isinstance(value, float) else str(value)
            for key, value in measure().items()
        }
        with self.path.open("a", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
            if not stream.tell():
                writer.writeheader()
            writer.writerow(dict(zip(KEYS, texts, strict=True)) | found)
        print(*texts, found.get("recall"), found.get("mutual_knn", ""), flush=True)


def in_turn() -> list[View]:
    """The views, of all corpora in turn."""
    own = [[view for view in VIEWS if view.corpus == name] for name in SPLITS]
    return [view for views in itertools.zip_longest(*own) for view in views if view]


def measured(train: Paired, corpus: Corpus) -> dict[str, Any]:
    """The figures and the recalls of a row."""
    return figures(train) | cca(train, corpus.val, corpus.test)


def measure(corpora: Mapping[str, Callable[[], Sides]], table: Table) -> None:
    """Add figures and the recall of CCA of all views."""
    for view in in_turn():
        sizes = SHUFFLED_SIZES if view.shuffled else SIZES
        if not view.shuffled and view.corpus != "oc":
            sizes = (*sizes, LARGEST)
        wanted = {pairs: ("cca", *view[:4], pairs, 0) for pairs in sizes}
        if all(tuple(map(str, key)) in table.known for key in wanted.values()):
            continue
        corpus = corpora[view.corpus]().pairs(view)
        order = np.random.default_rng(0).permutation(len(corpus.train))
        for pairs, key in wanted.items():
            train = corpus.train.take(order[:pairs])
            table.add(key, functools.partial(measured, train, corpus))


def train(corpora: Mapping[str, Callable[[], Sides]], table: Table) -> None:
    """Add the recall of ``csalign train --networks 1`` of some views."""
    tree = Tree(Path(__file__).resolve().parents[3], "")
    for view in in_turn():
        key = ("train", *view[:4], TRAINED_AT, 0)
        if not view.is_trained or tuple(map(str, key)) in table.known:
            continue
        corpus = corpora[view.corpus]().pairs(view)
        order = np.random.default_rng(0).permutation(len(corpus.train))[:TRAINED_AT]
        rows = corpus.train.take(order)
        none = np.arange(0)
        unpaired = (rows.images[none], Side(rows.texts, rows.captions).take(none))
        problem = Problem(rows, corpus.val, corpus.test, *unpaired)

        def run(problem: Problem = problem) -> dict[str, Any]:
            with tempfile.TemporaryDirectory(prefix="calibrate-") as folder:
                sets = write_sets(problem, Path(folder))
                outcome = tree.outcome(sets, {"networks": 1})
            return {
                "recall": mean_recall(outcome.images, outcome.texts),
                "setting": outcome.note.replace("\n", " "),
            }

        table.add(key, run)


def log_odds(share: Any) -> Any:
    """Log-odds of shares in (0, 1)."""
    share = np.clip(share, CHANCE, 1 - CHANCE)
    return np.log(share / (1 - share))


def share_of(odds: Any) -> Any:
    """Shares of log-odds."""
    return 1 / (1 + np.exp(-odds))


class Point(NamedTuple):
    """A view at a number of pairs; recalls are shares."""

    view: tuple[str, ...]
    pairs: int
    figures: dict[str, float]
    recall: float
    refitted: float
    held: float

    @property
    def corpus(self) -> str:
        """Name of the corpus."""
        return self.view[0]

    @property
    def distinct(self) -> float:
        """Distinct pairs."""
        return self.figures["distinct"]

    @property
    def excess(self) -> float:
        """Log of the agreement above chance, at least the deviation by chance."""
        apart = self.figures["mutual_knn"] - self.figures["chance"]
        return float(np.log(max(apart, 1 / min(self.distinct, advice.COMPARED))))

    @property
    def excess_in_500(self) -> float:
        """The same in blocks of 500 pairs, where there are as many."""
        apart = self.figures["mutual_knn_500"] - advice.NEIGHBOURS / (BLOCK - 1)
        return self.excess if np.isnan(apart) else float(np.log(max(apart, 1 / BLOCK)))

    def log(self, *names: str) -> float:
        """Log of a figure, or of the least of some."""
        return float(np.log(max(min(self.figures[name] for name in names), 1e-3)))


def points_of(rows: Sequence[Row], method: str = "cca") -> list[Point]:
    """The rows of a method."""
    found = []
    for row in rows:
        if row["method"] == method:
            values = {key: float(row[key] or "nan") for key in COLUMNS[7:17]}
            view = tuple(row[key] for key in KEYS[1:5])
            shares = [float(row[key] or "nan") / 100 for key in ("recall", "refitted", "held")]
            found.append(Point(view, int(row["pairs"]), values, *shares))
    return found


TERMS: dict[str, Callable[[Point], list[float]]] = {
    "no figure": lambda own: [],
    "excess": lambda own: [own.excess],
    "excess in 500": lambda own: [own.excess_in_500],
    "CKA": lambda own: [own.log("cka")],
    "CKA, debiased": lambda own: [own.log("cka_debiased")],
    "rank": lambda own: [own.log("rank_x", "rank_y")],
    "excess, CKA": lambda own: [own.excess, own.log("cka")],
    "excess, debiased": lambda own: [own.excess, own.log("cka_debiased")],
    "excess, rank": lambda own: [own.excess, own.log("rank_x", "rank_y")],
    "excess, excess x pairs": lambda own: [own.excess, own.excess * np.log(own.distinct / 1_000)],
    "excess, rank, debiased": lambda own: [
        own.excess,
        own.log("rank_x", "rank_y"),
        own.log("cka_debiased"),
    ],
}


def design(points: Sequence[Point], terms: str) -> NDArray[np.float64]:
    """Rows 1, log(distinct pairs / 1,000), terms."""
    return np.array([[1, np.log(own.distinct / 1_000), *TERMS[terms](own)] for own in points])


def solve(points: Sequence[Point], terms: str) -> NDArray[np.float64]:
    """Least squares of the log-odds of recall."""
    target = log_odds(np.array([own.recall for own in points]))
    return np.linalg.lstsq(design(points, terms), target, rcond=None)[0]


def left_out(points: Sequence[Point], terms: str) -> NDArray[np.float64]:
    """Predicted log-odds of each point from the other corpora, (n,)."""
    found = np.full(len(points), np.nan)
    for corpus in sorted({own.corpus for own in points}):
        own = np.array([point.corpus == corpus for point in points])
        others = [point for point in points if point.corpus != corpus]
        found[own] = design(points, terms)[own] @ solve(others, terms)
    return found


def rank_correlation(
    predicted: NDArray[np.float64], points: Sequence[Point]
) -> tuple[float, float, float]:
    """Spearman's, with its 95 % bootstrap interval over views."""
    measured = np.array([own.recall for own in points])
    views = sorted({own.view for own in points})
    rows = [np.flatnonzero([own.view == view for own in points]) for view in views]
    random = np.random.default_rng(0)
    draws = []
    for _ in range(2_000):
        picked = np.concatenate([rows[i] for i in random.integers(0, len(rows), len(rows))])
        draws.append(spearmanr(predicted[picked], measured[picked]).statistic)
    low, high = np.nanpercentile(draws, (2.5, 97.5))
    return float(spearmanr(predicted, measured).statistic), float(low), float(high)


def print_formulas(rows: Sequence[Row]) -> None:
    """The table of formulas, each tested on the corpus that it was not fitted on."""
    own_sizes = [own for own in points_of(rows) if own.pairs in (500, 1500, 5000)]
    points = [own for own in own_sizes if not float(own.view[3])]
    print(f"\n{len(points)} points, {len({own.view for own in points})} views\n")
    print(
        "| terms beside log pairs | RMSE, log-odds | bias oc / icons / packages | within 1.64 SD "
        "| mean error, points | rank correlation at 5,000 | at 1,500 | at 500 |"
    )
    print("|---" * 8 + "|")
    target = log_odds(np.array([own.recall for own in points]))
    for terms in TERMS:
        predicted = left_out(points, terms)
        residual = target - predicted
        bias = [
            f"{residual[[own.corpus == corpus for own in points]].mean():+.2f}" for corpus in SPLITS
        ]
        spread = 0.0
        covered = np.zeros(len(points), bool)
        for corpus in SPLITS:
            is_own = np.array([own.corpus == corpus for own in points])
            spread = np.sqrt(np.mean(residual[~is_own] ** 2))
            covered[is_own] = np.abs(residual[is_own]) <= 1.64 * spread
        apart = 100 * np.abs(share_of(predicted) - share_of(target)).mean()
        cells = [f"{np.sqrt(np.mean(residual**2)):.3f}", " / ".join(bias)]
        cells += [f"{100 * covered.mean():.0f} %", f"{apart:.1f}"]
        for size in (5000, 1500, 500):
            which = np.array([own.pairs == size for own in points])
            some = [own for own in points if own.pairs == size]
            value, low, high = rank_correlation(predicted[which], some)
            cells.append(f"{value:.2f} [{low:.2f}, {high:.2f}]")
        print(f"| {terms} | {' | '.join(cells)} |")


def print_shuffled(rows: Sequence[Row], terms: str = "excess, rank, debiased") -> None:
    """Controls whose training pairs are permuted in part; the test pairs are not."""
    points = [own for own in points_of(rows) if own.pairs in SHUFFLED_SIZES]
    constants = solve([own for own in points if not float(own.view[3])], terms)
    print(f"\nControls, foretold by: {terms}\n")
    print("| corpus | permuted | pairs | mutual k-NN | chance | deviations | foretold | CCA |")
    print("|---" * 8 + "|")
    for own in points:
        if not float(own.view[3]):
            continue
        figures = own.figures
        apart = figures["mutual_knn"] - figures["chance"]
        deviations = apart * min(own.distinct, advice.COMPARED)
        foretold = share_of(float((design([own], terms) @ constants)[0]))
        print(
            f"| {own.corpus} | {100 * float(own.view[3]):.0f} % | {own.pairs:,} "
            f"| {figures['mutual_knn']:.4f} | {figures['chance']:.4f} | {deviations:.0f} "
            f"| {100 * foretold:.1f} | {100 * own.recall:.1f} |"
        )


def print_within(rows: Sequence[Row]) -> None:
    """Rank correlation of single figures with recall, over the views of a corpus."""
    print("\n| figure | pairs | oc | icons | packages | all |")
    print("|---" * 6 + "|")
    for terms in ("excess", "CKA", "CKA, debiased", "rank"):
        for pairs in (500, 1500, 5000):
            points = [own for own in points_of(rows) if own.pairs == pairs]
            points = [own for own in points if not float(own.view[3])]
            cells = []
            for name in (*SPLITS, ""):
                some = [own for own in points if name in ("", own.corpus)]
                values = np.array([TERMS[terms](own)[0] for own in some])
                found, low, high = rank_correlation(values, some)
                cells.append(f"{found:.2f} [{low:.2f}, {high:.2f}], {len(some)}")
            print(f"| {terms} | {pairs:,} | {' | '.join(cells)} |")


def print_constants(rows: Sequence[Row]) -> None:
    """The constants of the formulas, of all views that are not permuted."""
    points = [own for own in points_of(rows) if not float(own.view[3])]
    points = [own for own in points if own.pairs in (500, 1500, 5000)]
    target = log_odds(np.array([own.recall for own in points]))
    print()
    for terms in TERMS:
        constants = solve(points, terms)
        inside = np.std(target - design(points, terms) @ constants)
        outside = np.sqrt(np.nanmean((target - left_out(points, terms)) ** 2))
        listed = ", ".join(f"{value:.3f}" for value in constants)
        print(
            f"{terms}: 1, log(distinct / 1,000), terms = [{listed}]; residual {inside:.3f}, "
            f"on a corpus left out {outside:.3f}"
        )


def print_trained(rows: Sequence[Row]) -> None:
    """The recall of ``csalign train`` beside that of CCA."""
    trained = points_of(rows, "train")
    known = {(own.view, own.pairs): own for own in points_of(rows)}
    both = [(own, known[own.view, own.pairs]) for own in trained if (own.view, own.pairs) in known]
    print("\n| corpus | images | texts | shuffled | CCA | CCA, val too | train | log-odds apart |")
    print("|---" * 8 + "|")
    apart = np.array([log_odds(own.recall) - log_odds(base.refitted) for own, base in both])
    for (own, base), off in zip(both, apart, strict=True):
        shares = f"{100 * base.recall:.1f} | {100 * base.refitted:.1f} | {100 * own.recall:.1f}"
        print(f"| {' | '.join(own.view)} | {shares} | {off:+.2f} |")
    value, low, high = rank_correlation(
        np.array([base.refitted for _, base in both]), [own for own, _ in both]
    )
    print(
        f"\nmean {apart.mean():+.3f}, SD {apart.std(ddof=1):.3f}; rank correlation of CCA and "
        f"train {value:.2f} [{low:.2f}, {high:.2f}], {len(both)} views"
    )


Fit = Callable[[NDArray[np.float64], NDArray[np.float64], float], float]


def _line(x: Any, y: Any, at: float, degree: int = 1) -> float:
    return float(np.polyval(np.polyfit(x, y, min(degree, len(x) - 1)), at))


def _damped(x: Any, y: Any, at: float, factor: float) -> float:
    """A smoothed last value and a share of the slope."""
    slope, level = np.polyfit(x, y, 1)
    last = (slope * x[-1] + level + y[-1]) / 2
    return float(last + factor * slope * (at - x[-1]))


CURVES: dict[str, Fit] = {
    "the same as now": lambda x, y, at: log_odds(float(y[-1])),
    "log-odds, line": lambda x, y, at: _line(x, log_odds(y), at),
    "log-odds, line of the last 3": lambda x, y, at: _line(x[-3:], log_odds(y[-3:]), at),
    "log-odds, line of the last 2": lambda x, y, at: _line(x[-2:], log_odds(y[-2:]), at),
    "log-odds, parabola": lambda x, y, at: _line(x, log_odds(y), at, 2),
    **{
        f"log-odds, last + {factor} slope": functools.partial(
            lambda x, y, at, factor: _damped(x, log_odds(y), at, factor), factor=factor
        )
        for factor in (1.0, 0.9, 0.8, 0.7, 0.6)
    },
    "power law of error": lambda x, y, at: log_odds(1 - np.exp(_line(x, np.log(1 - y), at))),
    "power law of error, last 3": lambda x, y, at: log_odds(
        1 - np.exp(_line(x[-3:], np.log(1 - y[-3:]), at))
    ),
    "power law of recall": lambda x, y, at: log_odds(np.exp(_line(x, np.log(y), at))),
    "recall linear in log pairs": lambda x, y, at: log_odds(_line(x, y, at)),
}


class Curve(NamedTuple):
    """A view's recall by pairs, and that to be foretold."""

    view: tuple[str, ...]
    log_pairs: NDArray[np.float64]
    recall: NDArray[np.float64]
    target: float


def curves_of(rows: Sequence[Row], known: int, wanted: int, name: str) -> list[Curve]:
    """Subsets of 1/16 to all of the known pairs; means of the draws."""
    sizes = [size for size in SIZES if known / 17 < size <= known]
    table: dict[tuple[tuple[str, ...], int], list[float]] = {}
    for own in points_of(rows):
        table.setdefault((own.view, own.pairs), []).append(getattr(own, name))
    found = []
    for view in sorted({view for view, _ in table}):
        keys = [(view, size) for size in sizes]
        if float(view[3]) == 1 or not all(key in table for key in (*keys, (view, wanted))):
            continue
        means = np.array([np.mean(table[key]) for key in keys])
        found.append(Curve(view, np.log(sizes), means, float(np.mean(table[view, wanted]))))
    return found


def print_curves(rows: Sequence[Row], known: int, wanted: int, name: str = "recall") -> None:
    """The table of extrapolations."""
    curves = curves_of(rows, known, wanted, name)
    print(f"\n{name}: {known} pairs to {wanted}, {len(curves)} views\n")
    print(
        "| extrapolation | bias, log-odds | RMSE | mean error, points | worst "
        "| within 1.64 RMSE of the other corpora |"
    )
    print("|---" * 6 + "|")
    for label, fit in CURVES.items():
        values = [fit(own.log_pairs, own.recall, np.log(wanted)) for own in curves]
        predicted = np.array(values, float)
        target = log_odds(np.array([own.target for own in curves]))
        residual = target - predicted
        covered = np.zeros(len(curves), bool)
        for corpus in SPLITS:
            is_own = np.array([own.view[0] == corpus for own in curves])
            if not is_own.any() or is_own.all():
                continue
            spread = np.sqrt(np.mean(residual[~is_own] ** 2))
            covered[is_own] = np.abs(residual[is_own]) <= 1.64 * spread
        apart = 100 * np.abs(share_of(predicted) - share_of(target))
        print(
            f"| {label} | {residual.mean():+.3f} | {np.sqrt(np.mean(residual**2)):.3f} "
            f"| {apart.mean():.1f} | {apart.max():.1f} | {covered.sum()} of {len(curves)} |"
        )


def report(rows: Sequence[Row]) -> None:
    """Print the tables."""
    print_formulas(rows)
    print_within(rows)
    print_constants(rows)
    print_shuffled(rows)
    print_trained(rows)
    for known, wanted in ((1250, 5000), (5000, 20_000)):
        for name in ("recall", "held"):
            print_curves(rows, known, wanted, name)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("what", choices=("measure", "train", "fit"))
    parser.add_argument("--csv", type=Path, required=True, help="results, old and new")
    for name in SPLITS:
        parser.add_argument(f"--{name}", type=Path, help="folder of its prepare.py")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    table = Table(arguments.csv)
    if arguments.what == "fit":
        return report(table.rows)
    corpora = {
        name: functools.cache(functools.partial(Sides, name, getattr(arguments, name)))
        for name in SPLITS
    }
    (measure if arguments.what == "measure" else train)(corpora, table)
    return None


if __name__ == "__main__":
    main()
