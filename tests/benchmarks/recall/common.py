"""Subsets of a corpus, trainings by the command line, and results that accumulate in a CSV file."""

from __future__ import annotations

import argparse
import csv
import fcntl
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from csalign.features.join import load_rows
from csalign.features.reader import FeatureSet
from csalign.ingest.config import ImportConfig
from csalign.ingest.import_arrays import import_arrays
from csalign.metrics.gap import centroid_distance, frechet_distance
from csalign.metrics.retrieval import RECALL_AT, rank_both_ways

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
Settings = Mapping[str, Any]

LOOKS = 2 * len(RECALL_AT)  # recalls per item, in both directions
PEER_MODULES = Path(__file__).parent.parent / "openclipart"
# Where a tree lacks the option, it does what these say.
OFF: dict[str, Any] = {"ensemble": "off", "refit": False, "networks": 1}
FORMER: dict[str, Any] = {"ensemble": "off", "refit": False}
csv.field_size_limit(1 << 24)


class Side(NamedTuple):
    """Rows of one side, and their captions."""

    rows: Floats  # (n, d)
    words: list[str]

    def take(self, which: Ints) -> Side:
        """Some rows, in that order."""
        return Side(self.rows[which], [self.words[row] for row in which])


@dataclass(frozen=True)
class Paired:
    """Row i of the images belongs to row i of the texts."""

    images: Floats  # (n, d)
    texts: Floats  # (n, e)
    captions: list[str]

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self.images)

    @property
    def text_image(self) -> Ints:
        """The image of each text."""
        return np.arange(len(self))

    def take(self, which: Ints) -> Paired:
        """Some pairs, in that order."""
        words = [self.captions[row] for row in which]
        return Paired(self.images[which], self.texts[which], words)

    def joined(self, other: Paired) -> Paired:
        """The pairs of both."""
        sides = ([self.images, other.images], [self.texts, other.texts])
        return Paired(*map(np.concatenate, sides), self.captions + other.captions)


@dataclass(frozen=True)
class Corpus:
    """A corpus, by first captions alone."""

    name: str
    train: Paired
    val: Paired
    test: Paired


@dataclass(frozen=True)
class Problem:
    """What a method may learn from, and what it is measured on.

    Attributes:
        train: pairs.
        val: pairs to choose settings by; None where the pairs themselves must do.
        images: (n, d) rows without a partner.
        texts: rows without a partner.
        test: pairs.
    """

    train: Paired
    val: Paired | None
    test: Paired
    images: Floats
    texts: Side

    def carved(self, seed: int, share: float = 0.2) -> tuple[Paired, Paired]:
        """Pairs to fit on and pairs to choose by."""
        if self.val is not None:
            return self.train, self.val
        order = np.random.default_rng(seed).permutation(len(self.train))
        held = max(1, round(share * len(order)))
        return self.train.take(order[held:]), self.train.take(order[:held])

    @property
    def everything(self) -> Paired:
        """All pairs, those to choose by too."""
        return self.train if self.val is None else self.train.joined(self.val)


def load_corpus(name: str, features: Path, train_split: str) -> Corpus:
    """Read a feature set with the splits val and test; each image with its first caption."""
    opened = FeatureSet.open(features)
    found = []
    for split in (train_split, "val", "test"):
        rows = load_rows(opened, split)
        images = np.flatnonzero(rows.caption_counts)
        starts = np.cumsum(rows.caption_counts[images]) - rows.caption_counts[images]
        texts = rows.texts_by_image[starts]
        captions = rows.captions.take(texts).to_pylist()
        sides = (np.asarray(side, np.float32) for side in (rows.images[images], rows.texts[texts]))
        found.append(Paired(*sides, captions))
    return Corpus(name, *found)


def subset(
    corpus: Corpus,
    pairs: int,
    seed: int,
    *,
    pool: int = 0,
    partners: bool = True,
    validation: bool = True,
) -> Problem:
    """Keep some training pairs, and some other rows without their partners.

    Args:
        corpus: where they are from.
        pairs: to keep; at most all.
        seed: of the choice.
        pool: unpaired rows per side; fewer where the corpus has no more.
        partners: whether the unpaired texts are those of the unpaired images, in another order.
            Otherwise no item has both sides in the pool.
        validation: whether to keep the split val.
    """
    order = np.random.default_rng(seed).permutation(len(corpus.train))
    rest = order[pairs:]
    pool = min(pool, len(rest) if partners else len(rest) // 2)
    images = rest[:pool]
    texts = np.random.default_rng(seed + 99).permutation(images if partners else rest[-pool:])
    if not pool:
        texts = rest[:0]
    train = corpus.train
    return Problem(
        train.take(order[:pairs]),
        corpus.val if validation else None,
        corpus.test,
        train.images[images],
        Side(train.texts, train.captions).take(texts),
    )


def write_sets(problem: Problem, folder: Path) -> tuple[Path, Path]:
    """Write the feature set to train on (splits train and val) and that of the test pairs."""
    pairs = [(problem.train, "train"), *([(problem.val, "val")] if problem.val else [])]
    found = []
    for name, parts, images, texts in (
        ("features", pairs, problem.images, problem.texts),
        ("test", [(problem.test, "test")], problem.images[:0], problem.texts.take(np.arange(0))),
    ):
        splits = [split for part, split in parts for _ in range(len(part))]
        ids = [f"image-{row}" for row in range(len(splits))]
        alone = [f"alone-{row}" for row in range(len(images))]
        captions = [word for part, _ in parts for word in part.captions] + texts.words
        text_ids = [f"text-{row}" for row in range(len(captions))]
        owners = ids + [""] * len(texts.words)
        text_splits = splits + ["train"] * len(texts.words)
        arrays = {
            "images": np.concatenate([*(part.images for part, _ in parts), images]),
            "texts": np.concatenate([*(part.texts for part, _ in parts), texts.rows]),
        }
        tables = {
            "images": [
                ("id", "split"),
                *zip(ids + alone, splits + ["train"] * len(alone), strict=True),
            ],
            "texts": [
                ("id", "image_id", "caption", "split"),
                *zip(text_ids, owners, captions, text_splits, strict=True),
            ],
        }
        work = folder / f"{name}-arrays"
        work.mkdir()
        for side, rows in arrays.items():
            np.save(work / f"{side}.npy", rows)
            with (work / f"{side}.csv").open("w", newline="", encoding="utf-8") as stream:
                csv.writer(stream, lineterminator="\n").writerows(tables[side])
        import_arrays(
            ImportConfig(
                images=work / "images.npy",
                texts=work / "texts.npy",
                image_table=work / "images.csv",
                text_table=work / "texts.csv",
                out=folder / name,
            )
        )
        shutil.rmtree(work)
        found.append(folder / name)
    return found[0], found[1]


class Outcome(NamedTuple):
    """A method's outputs for the test pairs, and what they took."""

    images: Floats  # (n, k)
    texts: Floats  # (n, k)
    cpu_s: float
    memory_mb: float = 0.0
    note: str = ""


@dataclass(frozen=True)
class Tree:
    """A checkout of csalign, which is measured by its command line in processes of its own."""

    path: Path
    label: str

    @functools.cached_property
    def options(self) -> set[str]:
        """Options of its ``csalign train``."""
        text = self._run(["train", "--help-all"])[0]
        return set(re.findall(r"--(?:no-)?([a-z][a-z-]+)", text))

    def missing(self, settings: Settings) -> list[str]:
        """Settings that the tree has no option for and that differ from what it does."""
        return [
            f"--{_flag(name)}"
            for name, value in settings.items()
            if _flag(name) not in self.options and OFF.get(name) != value
        ]

    def train(self, features: Path, out: Path, settings: Settings) -> tuple[Any, float, float]:
        """Train: the document of ``--json``, CPU seconds and the peak of memory in MiB."""
        known = {name: value for name, value in settings.items() if _flag(name) in self.options}
        command = ["train", str(features), "--out", str(out), "--json", *_arguments(known)]
        text, cpu_s, memory_mb = self._run(command)
        return json.loads(text), cpu_s, memory_mb

    def outcome(
        self, sets: tuple[Path, Path], settings: Settings, *, kind: str | None = None
    ) -> Outcome:
        """Train and embed the test pairs.

        Args:
            sets: of `write_sets`.
            settings: of ``csalign train``.
            kind: of an adapter from outside.
        """
        with tempfile.TemporaryDirectory(prefix="recall-") as folder:
            run, out = Path(folder) / "run", Path(folder) / "out"
            document, cpu_s, memory_mb = self.train(sets[0], run, settings)
            command = ["apply", str(sets[1]), "--adapter", str(run), "--out", str(out)]
            command += ["--format", "npy", "--dtype", "float32"]
            self._run([*command, *(["--allow-adapter", kind] if kind else [])])
            sides = (np.load(out / f"{side}.npy") for side in ("images", "texts"))
            warnings = "; ".join(_words(warning) for warning in document.get("warnings", []))
            note = " | ".join(filter(None, (document["start"], warnings)))
            return Outcome(*sides, cpu_s, memory_mb, note)

    def _run(self, command: Sequence[str]) -> tuple[str, float, float]:
        paths = os.pathsep.join([str(self.path), str(PEER_MODULES)])
        environment = {**os.environ, "PYTHONPATH": paths, "COLUMNS": "200"}
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
            process = subprocess.Popen(
                [sys.executable, "-m", "csalign", *command],
                stdout=out,
                stderr=errors,
                cwd=tempfile.gettempdir(),
                env=environment,
            )
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            out.seek(0)
            errors.seek(0)
            if process.returncode:
                raise RuntimeError(f"csalign {' '.join(command)}\n{errors.read()[-2000:]}")
            return out.read(), usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def _words(warning: Any) -> str:
    return str(warning.get("message", warning)) if isinstance(warning, dict) else str(warning)


def _flag(name: str) -> str:
    return name.replace("_", "-")


def _arguments(settings: Settings) -> Iterator[str]:
    for name, value in settings.items():
        if isinstance(value, bool):
            yield f"--{'' if value else 'no-'}{_flag(name)}"
        else:
            yield from (f"--{_flag(name)}", str(value))


KEYS = ("table", "corpus", "pairs", "pool", "validation", "seed", "row", "tree")
FIGURES = ("recall", "centroid", "frechet", "width", "cpu_s", "memory_mb", "note", "hits")


@dataclass
class Results:
    """Rows of a CSV file; each key is measured once.

    `hits` holds a digit per test pair: how many of its six recalls are 1.
    """

    path: Path
    table: str
    rows: list[dict[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            with self.path.open(newline="", encoding="utf-8") as stream:
                self.rows = [row for row in csv.DictReader(stream) if row["table"] == self.table]

    def find(self, **keys: Any) -> dict[str, str] | None:
        """The last row with these keys."""
        wanted = {name: str(value) for name, value in keys.items()}
        fits = (row for row in reversed(self.rows) if wanted.items() <= row.items())
        return next(fits, None)

    def measure(self, make: Callable[[], Outcome], **keys: Any) -> None:
        """Make and write down a row, unless it is there; a failure is printed and left out."""
        if self.find(**keys):
            return
        began = time.monotonic()
        try:
            outcome = make()
        except (RuntimeError, ValueError) as error:
            print(f"{list(keys.values())} failed: {error}", file=sys.stderr, flush=True)
            return
        figures = figures_of(outcome)
        row = {name: str(value) for name, value in {"table": self.table, **keys, **figures}.items()}
        with self.path.open("a", newline="", encoding="utf-8") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)  # several scripts may add to one file
            writer = csv.DictWriter(stream, (*KEYS, *FIGURES), lineterminator="\n")
            if not stream.tell():
                writer.writeheader()
            writer.writerow(row)
        self.rows.append(row)
        print(
            f"{' '.join(map(str, keys.values()))}: {row['recall']} %, centroid {row['centroid']}, "
            f"{float(row['cpu_s']):.0f} s of CPU, {time.monotonic() - began:.0f} s",
            file=sys.stderr,
            flush=True,
        )


def hits_of(images: Floats, texts: Floats) -> Ints:
    """How many of the six recalls of each pair are 1, (n,); ranks by cosine."""
    sides = (_unit(images), _unit(texts))
    ranks = rank_both_ways(*sides, np.arange(len(images)))
    found: Ints = np.sum([way.first <= k for way in ranks for k in RECALL_AT], axis=0)
    return found


def mean_recall(images: Floats, texts: Floats) -> float:
    """Mean of recall at 1, 5 and 10 in both directions, in percent."""
    return 100 * float(hits_of(images, texts).mean()) / LOOKS


def figures_of(outcome: Outcome) -> dict[str, Any]:
    """The figures of a row."""
    hits = hits_of(outcome.images, outcome.texts)
    x, y = (torch.from_numpy(_unit(side)) for side in outcome[:2])
    return {
        "recall": f"{100 * hits.mean() / LOOKS:.3f}",
        "centroid": f"{float(centroid_distance(x, y)):.4f}",
        "frechet": f"{float(frechet_distance(x, y)):.4f}",
        "width": x.shape[1],
        "cpu_s": f"{outcome.cpu_s:.1f}",
        "memory_mb": f"{outcome.memory_mb:.0f}",
        "note": outcome.note,
        "hits": "".join(map(str, hits)),
    }


def _unit(rows: Floats) -> Floats:
    rows = np.asarray(rows, np.float32)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


class Difference(NamedTuple):
    """Mean recall less another row's, in points, over the seeds that both have."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        null = ", null" if self.low <= 0 <= self.high else ""
        return f"{self.mean:+.2f} [{self.low:+.2f}, {self.high:+.2f}]{null}"


def difference(
    rows: Sequence[Mapping[str, str]], baseline: Sequence[Mapping[str, str]]
) -> Difference | None:
    """Difference with its 95 % bootstrap interval over test pairs, of the mean over seeds."""
    by_seed = {row["seed"]: row for row in baseline}
    both = [(row, by_seed[row["seed"]]) for row in rows if row["seed"] in by_seed]
    if not both:
        return None
    apart = np.mean([_hits(row) - _hits(base) for row, base in both], axis=0) * 100 / LOOKS
    picked = np.random.default_rng(0).integers(0, len(apart), (2_000, len(apart)))
    low, high = np.percentile(apart[picked].mean(axis=1), (2.5, 97.5))
    return Difference(float(apart.mean()), float(low), float(high))


def _hits(row: Mapping[str, str]) -> NDArray[np.float64]:
    return np.array(list(row["hits"]), float)


def mean_of(rows: Sequence[Mapping[str, str]], name: str) -> float:
    """A figure's mean over seeds."""
    return float(np.mean([float(row[name]) for row in rows]))


def table_lines(groups: Mapping[str, Sequence[Mapping[str, str]]], title: str) -> Iterator[str]:
    """Lines of Markdown: a row per method, differences to the first."""
    yield (
        f"| {title} | mean recall, % | difference [95 %] | centroid | Frechet | width | CPU s "
        "| MiB | recall per CPU s | seeds |"
    )
    yield "|---" * 10 + "|"
    baseline = next(iter(groups.values()))
    for name, rows in groups.items():
        recalls = [float(row["recall"]) for row in rows]
        spread = f" ± {np.std(recalls):.2f}" if len(recalls) > 1 else ""
        apart = "0" if rows is baseline else difference(rows, baseline)
        cpu_s, memory_mb = mean_of(rows, "cpu_s"), mean_of(rows, "memory_mb")
        cells = [
            f"{np.mean(recalls):.2f}{spread}",
            str(apart or ""),
            *(f"{mean_of(rows, key):.3f}" for key in ("centroid", "frechet")),
            f"{mean_of(rows, 'width'):.0f}",
            f"{cpu_s:.1f}" if cpu_s < 10 else f"{cpu_s:.0f}",
            f"{memory_mb:,.0f}" if memory_mb else "",
            f"{np.mean(recalls) / max(cpu_s, 0.1):.2f}",
            str(len(rows)),
        ]
        yield f"| {name} | {' | '.join(cells)} |"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that the scripts have in common."""
    parser.add_argument("--csv", type=Path, required=True, help="results, old and new")
    parser.add_argument("--csalign", type=Path, help="tree to measure (default: this one)")
    parser.add_argument("--label", help="name of the tree in the results (default: its commit)")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--print", action="store_true", help="only print what is in the CSV file")


def tree_of(arguments: argparse.Namespace) -> Tree:
    """The tree to measure; its label is the commit, with + for uncommitted changes."""
    path = (arguments.csalign or Path(__file__).parents[3]).resolve()
    if arguments.label:
        return Tree(path, arguments.label)
    git = ["git", "-C", str(path), "-c", "safe.directory=*"]
    commit = subprocess.run(
        [*git, "log", "-1", "--format=%h", "--", "csalign"], capture_output=True, text=True
    ).stdout.strip()
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "csalign"]).returncode
    return Tree(path, commit + "+" * bool(changed))


def numbers(text: str) -> list[int]:
    """Split whole numbers at commas."""
    return [int(part) for part in text.split(",")]


@contextmanager
def counted() -> Iterator[Callable[[], float]]:
    """Give a function of the CPU seconds since."""
    began = time.process_time()
    yield lambda: time.process_time() - began
