"""Compare the recall that ``csalign diagnose`` foretells with the one that is measured.

Usage::

    python tests/benchmarks/forecast/forecast.py WHAT --csv FILE --oc DIR --icons DIR --packages DIR

WHAT is measure, curves, train or report. The folders are those of the `prepare.py` of openclipart,
icons and packages. The first three add what the file lacks: recall of CCA and figures of the raw
sides; forecasts; recall of ``csalign train``. `report` prints the tables of RESULTS.md.
"""

from __future__ import annotations

import argparse
import csv
import functools
import importlib.resources
import itertools
import json
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy.stats import ConstantInputWarning, spearmanr
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer

sys.path.insert(0, str(Path(__file__).parent.parent / "recall"))
from common import Corpus, Paired, Problem, Side, Tree, load_corpus, mean_recall, write_sets

from csalign.adapters.canonical import PairMoments
from csalign.adapters.side import UnitRows
from csalign.core.enums import Modality
from csalign.evaluation.agreement import Sample, input_units, measure_agreement
from csalign.evaluation.forecast import Band, Curve, learn_curve, log_odds
from csalign.features.join import load_rows
from csalign.features.reader import FeatureSet

Floats = NDArray[np.float32]
Row = Mapping[str, str]

MOST = 20_000  # training pairs kept of a corpus
SPLITS = {"oc": "train,val2", "icons": "train", "packages": "train"}
RIDGES = (0.03, 0.1, 0.3, 1.0, 3.0)
POWERS = (0.5, 1.0)
TRAINED_AT = 1_500
SIZES = (313, 500, 625, 1250, 1500, 5000)
SHUFFLED_SIZES = (500, 1500, 5000)
LARGEST = 20_000  # of icons and packages
KNOWN = (1250, 5000)  # pairs that a curve is learnt from; four times as many are measured
COLUMNS = (
    *("method", "corpus", "images", "texts", "shuffled", "pairs", "seed"),
    *("distinct", "cka", "mutual_knn", "chance", "rank_x", "rank_y", "recall", "refitted"),
    "setting",  # of the recall, or the learning curve
)
KEYS = COLUMNS[:7]
FIGURES = {
    "mutual 10-NN above chance": lambda own: own["mutual_knn"] - own["chance"],
    "linear CKA": lambda own: own["cka"],
    "least effective rank": lambda own: min(own["rank_x"], own["rank_y"]),
}
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


def cca(train: Paired, val: Paired, test: Paired) -> dict[str, Any]:
    """Mean recall on test, in percent, of CCA with the ridge and the power that do best on val.

    Fitted on train, and refitted on train and val.
    """
    units = input_units(train.images), input_units(train.texts)
    val_sides = (units[0](val.images), units[1](val.texts))
    test_sides = (units[0](test.images), units[1](test.texts))
    best, ways, chosen = -1.0, {}, (0.0, 0.0)
    for ridge, power, form in _forms(train, units, RIDGES, POWERS):
        x, y = (side.numpy() for side in form.outputs(*val_sides))
        if (found := mean_recall(x, y)) > best:
            best, ways["recall"], chosen = found, form, (ridge, power)
    forms = _forms(train.joined(val), units, chosen[:1], chosen[1:])
    ways["refitted"] = next(forms)[2]
    return {"setting": ways["recall"].name} | {
        name: mean_recall(*(side.numpy() for side in form.outputs(*test_sides)))
        for name, form in ways.items()
    }


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


def sample_of(train: Paired) -> Sample:
    """The pairs without a second one of an image or a caption."""
    rows = np.arange(len(train))
    for keys in (np.array([hash(row.tobytes()) for row in train.images]), np.array(train.captions)):
        rows = np.sort(rows[np.unique(keys[rows], return_index=True)[1]])
    return Sample(train.images[rows], train.texts[rows], {})


def figures(train: Paired) -> dict[str, Any]:
    """Figures of the raw sides, as `csalign diagnose` measures them."""
    sample = sample_of(train)
    found = measure_agreement(sample)
    assert found is not None
    return {
        "distinct": len(sample.images),
        "cka": found.cka,
        "mutual_knn": found.mutual_knn,
        "chance": found.mutual_knn_chance,
        "rank_x": found.effective_rank[Modality.IMAGE],
        "rank_y": found.effective_rank[Modality.TEXT],
    }


def foretold(train: Paired) -> dict[str, Any]:
    """The learning curve of `csalign diagnose`."""
    sample = sample_of(train)
    found = learn_curve(sample)
    if found is None:
        return {"distinct": len(sample.images)}
    text = json.dumps([found.pairs.tolist(), found.odds.round(5).tolist(), found.gallery])
    return {"distinct": len(sample.images), "setting": text}


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
            rows = corpus.train.take(order[:pairs])
            table.add(
                key,
                lambda rows=rows, own=corpus: figures(rows) | cca(rows, own.val, own.test),
            )


def curves(corpora: Mapping[str, Callable[[], Sides]], table: Table) -> None:
    """Add the forecasts of measured views; of trained ones also that of train and val."""
    known = sorted(key for key in table.known if key[0] in ("cca", "train"))
    for view in in_turn():
        own = {(key[0], int(key[5])) for key in known if key[1:5] == tuple(map(str, view[:4]))}
        wanted = [("curve", n) for n in KNOWN if ("cca", 4 * n) in own]
        wanted += [("expected", n) for method, n in own if method == "train"]
        wanted += [("curve", n) for method, n in own if view.shuffled and n == TRAINED_AT]
        keys = {("method", *view[:4], n, 0)[1:]: method for method, n in wanted}
        for key, method in keys.items():
            if (method, *map(str, key)) in table.known:
                continue
            corpus = corpora[view.corpus]().pairs(view)
            order = np.random.default_rng(0).permutation(len(corpus.train))
            rows = corpus.train.take(order[: key[4]])
            rows = rows.joined(corpus.val) if method == "expected" else rows
            table.add((method, *key), functools.partial(foretold, rows))


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
            with tempfile.TemporaryDirectory(prefix="forecast-") as folder:
                sets = write_sets(problem, Path(folder))
                outcome = tree.outcome(sets, {"networks": 1})
            return {
                "recall": mean_recall(outcome.images, outcome.texts),
                "setting": outcome.note.replace("\n", " "),
            }

        table.add(key, run)


def numbers(row: Row) -> dict[str, float]:
    """The figures of a row; recalls are shares."""
    found = {key: float(row[key] or "nan") for key in COLUMNS[5:15]}
    return found | {key: found[key] / 100 for key in ("recall", "refitted")}


def key_of(row: Row, method: str = "", pairs: int = 0) -> tuple[str, ...]:
    """The key of a row of a view, by default the one of this row."""
    own = (method or row["method"], *(row[key] for key in KEYS[1:5]))
    return (*own, str(pairs or row["pairs"]))


def spearman(first: Sequence[float], second: Sequence[float]) -> str:
    """Spearman's rank correlation, with its 95 % bootstrap interval over views."""
    pairs, random, draws = np.array([first, second]), np.random.default_rng(0), []
    warnings.simplefilter("ignore", ConstantInputWarning)
    for _ in range(2_000):
        draws.append(spearmanr(*pairs[:, random.integers(0, len(first), len(first))]).statistic)
    low, high = np.nanpercentile(draws, (2.5, 97.5))
    return f"{spearmanr(*pairs).statistic:.2f} [{low:.2f}, {high:.2f}]"


def print_order(rows: Sequence[Row]) -> None:
    """Rank correlation of figures with the recall of CCA, over the views that are not permuted."""
    print("\n| figure | " + " | ".join(f"{n:,} pairs" for n in SHUFFLED_SIZES) + " |")
    print("|---" * 4 + "|")
    for name, figure in FIGURES.items():
        cells = []
        for n in SHUFFLED_SIZES:
            some = [row for row in rows if row["method"] == "cca" and not float(row["shuffled"])]
            own = [numbers(row) for row in some if row["pairs"] == str(n)]
            found = spearman([figure(one) for one in own], [one["recall"] for one in own])
            cells.append(f"{found}, {len(own)} views")
        print(f"| {name} | {' | '.join(cells)} |")


def curve_of(row: Row) -> Curve | None:
    """The stored learning curve."""
    if not row["setting"]:
        return None
    pairs, odds, gallery = json.loads(row["setting"])
    return Curve(np.array(pairs), np.array(odds), gallery)


class Check(NamedTuple):
    """A forecast and what was measured, shares."""

    view: str
    foretold: Band
    measured: float

    @property
    def residual(self) -> float:
        """What is measured beyond the forecast, in log-odds."""
        own, other = log_odds(np.array([self.measured, self.foretold.mean_recall]))
        return float(own - other)


def print_checks(title: str, checks: Sequence[Check]) -> None:
    """A table of forecasts and measurements, and its summary."""
    print(f"\n{title}\n\n| corpus, images, texts | foretold | measured | log-odds apart | within |")
    print("|---" * 5 + "|")
    within = [own.foretold.low <= own.measured <= own.foretold.high for own in checks]
    for own, is_within in zip(checks, within, strict=True):
        mean, low, high = (100 * value for value in own.foretold)
        print(
            f"| {own.view} | {mean:.1f} ({low:.1f} to {high:.1f}) | {100 * own.measured:.1f} "
            f"| {own.residual:+.2f} | {'yes' if is_within else 'no'} |"
        )
    apart = np.array([own.residual for own in checks])
    points = [100 * (own.measured - own.foretold.mean_recall) for own in checks]
    error = f"{np.abs(points).mean():.1f} points, worst {np.abs(points).max():.1f}"
    order = spearman([own.foretold.mean_recall for own in checks], [own.measured for own in checks])
    print(
        f"\n{len(checks)} views: bias {apart.mean():+.2f}, SD {apart.std(ddof=1):.2f}, RMSE "
        f"{np.sqrt((apart**2).mean()):.2f} log-odds; mean error {error}; {sum(within)} of "
        f"{len(checks)} within; rank "
        f"correlation {order}"
    )


def report(rows: Sequence[Row]) -> None:
    """Print the tables."""
    print_order(rows)
    table = {key_of(row): row for row in rows}

    def checks(method: str, known: int, wanted: int, name: str, control: bool) -> Iterator[Check]:
        measured_by = "train" if method == "expected" else "cca"
        for row in rows:
            target = table.get(key_of(row, measured_by, wanted))
            if (row["method"], row["pairs"]) != (method, str(known)) or target is None:
                continue
            curve = curve_of(row)
            if curve is None or bool(float(row["shuffled"])) is not control:
                continue
            # More of the same corpus: of its pairs a share are different ones.
            source = row if method == "expected" else target
            pairs, is_trained = int(source["distinct"]), method == "expected"
            view = ", ".join(row[key] for key in KEYS[1 : 5 if control else 4])
            band = curve.extrapolated(pairs, trained=is_trained)
            yield Check(view, band, numbers(target)[name])

    for known in KNOWN:
        for wanted in (known, 4 * known):
            found = [*checks("curve", known, wanted, "recall", False)]
            print_checks(f"From {known:,} pairs to {wanted:,}, CCA", found)
    print_checks(
        f"`csalign train`, {TRAINED_AT:,} pairs",
        [*checks("expected", TRAINED_AT, TRAINED_AT, "recall", False)],
    )
    print_checks("Permuted in part", [*checks("curve", TRAINED_AT, TRAINED_AT, "recall", True)])
    print("\n| corpus | permuted | pairs | mutual 10-NN | chance | CKA | CCA |")
    print("|---" * 7 + "|")
    for row in rows:
        if row["method"] == "cca" and float(row["shuffled"]) and row["pairs"] != "500":
            own = numbers(row)
            shares = f"{100 * float(row['shuffled']):.0f} % | {own['pairs']:,.0f}"
            agreed = f"{own['mutual_knn']:.4f} | {own['chance']:.4f} | {own['cka']:.3f}"
            print(f"| {row['corpus']} | {shares} | {agreed} | {100 * own['recall']:.1f} |")


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("what", choices=("measure", "curves", "train", "report"))
    parser.add_argument("--csv", type=Path, required=True, help="results, old and new")
    for name in SPLITS:
        parser.add_argument(f"--{name}", type=Path, help="folder of its prepare.py")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    table = Table(arguments.csv)
    if arguments.what == "report":
        return report(table.rows)
    corpora = {
        name: functools.cache(functools.partial(Sides, name, getattr(arguments, name)))
        for name in SPLITS
    }
    {"measure": measure, "curves": curves, "train": train}[arguments.what](corpora, table)
    return None


if __name__ == "__main__":
    main()
