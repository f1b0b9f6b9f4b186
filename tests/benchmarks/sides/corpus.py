"""Build corpora of several sides from public packages: drawings, icons of several sets, packages.

Usage::

    python tests/benchmarks/openclipart/prepare.py --work OC --no-import
    python tests/benchmarks/icons/prepare.py --work ICONS
    python tests/benchmarks/sides/corpus.py art --source OC --out DIR/art
    python tests/benchmarks/sides/corpus.py icons --source ICONS --out DIR/icons
    apt-get -o Acquire::Languages=en,de,fr,ja update
    python tests/benchmarks/sides/corpus.py packages --out DIR/packages

Writes an array NAME.npy per side, and tables for ``csalign import --pairs``: ``items.csv`` with a
column per side, which holds the row of an item in that side's array or nothing, and
``items-P-S.csv`` without P % of the memberships of training items, chosen by seed S. A row without
a membership is of no item in that table. Needs what the two other scripts need, and
``scikit-learn`` and ``python-debian``. Minutes on one core, once those have run.
"""

from __future__ import annotations

import argparse
import csv
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from debian import deb822
from numpy.typing import NDArray
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer

sys.path.insert(0, str(Path(__file__).parent.parent / "openclipart"))  # its corpus.py, not this one
from corpus import SVG_ROOT, Drawing, parse_drawing
from features import sentence_features
from prepare import find_eligible, hash_order

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

HELD_OUT = 0.1  # share of the items, for each of test and val
ICON_SETS = ("mdi", "hugeicons", "tabler", "lucide")  # by four designers, with the most in common
LANGUAGES = {"german": "de", "french": "fr", "japanese": "ja"}
_DRAWN = ("style", "fill", "stroke", "d", "transform", "points", "stop-color")


class Side(NamedTuple):
    """One side: what embedded it, its rows, and the row of each item, -1 where it has none."""

    encoder: str
    rows: Floats
    of_items: Ints


class Corpus(NamedTuple):
    """Items, their splits and their sides."""

    items: list[str]
    splits: list[str]
    sides: dict[str, Side]

    @property
    def present(self) -> NDArray[np.bool_]:
        """Which sides each item has, (items, sides)."""
        return np.stack([side.of_items >= 0 for side in self.sides.values()], axis=1)


def split_items(items: Sequence[str], eligible: Sequence[bool]) -> list[str]:
    """Hold out a tenth of all items for test and a tenth for val, among the eligible ones."""
    size = round(HELD_OUT * len(items))
    order = hash_order(item for item, fit in zip(items, eligible, strict=True) if fit)
    if len(order) < 2 * size:
        raise SystemExit(f"{len(order):,} items may be held out, but {2 * size:,} are to be")
    held = dict.fromkeys(order[:size], "test") | dict.fromkeys(order[size : 2 * size], "val")
    return [held.get(item, "train") for item in items]


def weighted_tokens(
    documents: Sequence[Sequence[str]], splits: Sequence[str], width: int
) -> tuple[str, Floats, Ints]:
    """Return TF-IDF reduced by SVD, both fitted on training items alone: a side.

    Documents without a known token have no row.
    """
    learned = [own for own, split in zip(documents, splits, strict=True) if split == "train"]
    vectorizer = TfidfVectorizer(analyzer=list, sublinear_tf=True, min_df=3).fit(learned)
    table = vectorizer.transform(documents)
    svd = TruncatedSVD(width, random_state=0).fit(vectorizer.transform(learned))
    rows = svd.transform(table).astype(np.float32)
    has = np.linalg.norm(rows, axis=1) > 1e-6
    of_items = np.where(has, np.cumsum(has) - 1, -1)
    return f"TF-IDF, SVD of {width}", rows[has], of_items


def every(rows: Floats) -> Ints:
    """The row of each item where each has one."""
    return np.arange(len(rows))


def art(source: Path) -> Corpus:
    """Drawings of Open Clip Art: picture, title, keywords, and the code that draws it."""
    with (source / "images.csv").open(newline="", encoding="utf-8") as stream:
        ids = [row["id"] for row in csv.DictReader(stream)]
    images: Floats = np.load(source / "images.npy")
    documents = {name: (SVG_ROOT / f"{name}.svg").read_bytes() for name in ids}
    drawings = [parse_drawing(content, name) for name, content in documents.items()]
    titles = sorted({drawing.title for drawing in drawings})
    numbers = {title: row for row, title in enumerate(titles)}
    texts = sentence_features(titles)[[numbers[drawing.title] for drawing in drawings]]
    keywords = [keywords_of(drawing) for drawing in drawings]
    codes = [code_tokens(content) for content in documents.values()]
    own = [bool(words and code) for words, code in zip(keywords, codes, strict=True)]
    eligible = find_eligible(drawings, images) & np.array(own)
    print(f"eligible: {eligible.sum():,}")
    splits = split_items(ids, eligible.tolist())
    return Corpus(
        ids,
        splits,
        {
            "image": Side("efficientnet-lite0 (ImageNet), pooled", images, every(images)),
            "title": Side("all-MiniLM-L6-v2, mean pooled", texts, every(texts)),
            "keywords": Side(*weighted_tokens(keywords, splits, 256)),
            "code": Side(*weighted_tokens(codes, splits, 256)),
        },
    )


def keywords_of(drawing: Drawing) -> list[str]:
    """The keywords of a drawing, in small letters."""
    document = ET.fromstring((SVG_ROOT / f"{drawing.id}.svg").read_bytes())
    bag = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}li"
    found = (" ".join("".join(own.itertext()).split()).casefold() for own in document.iter(bag))
    return sorted({word for word in found if word and word != "unsorted"})


def code_tokens(content: bytes) -> list[str]:
    """The elements, colours, and path commands in pairs of an SVG document; no words or names."""
    tokens = []
    for element in ET.fromstring(content).iter():
        space, _, name = str(element.tag).rpartition("}")
        if space and not space.endswith("/svg"):
            continue  # metadata
        tokens.append(name)
        for key in _DRAWN:
            value = element.get(key, "")
            if key in ("d", "points", "transform"):
                letters = re.sub(r"[^a-zA-Z]", "", value)[:400]
                tokens += [f"{key}:{pair}" for pair in map("".join, pairwise(letters))]
                continue
            for colour in re.findall(r"#([0-9a-fA-F]{6})\b", value):
                tokens.append(
                    "#" + "".join(str(int(colour[at : at + 2], 16) // 52) for at in (0, 2, 4))
                )
            tokens += re.findall(r"[a-z-]+(?=:)", value) if key == "style" else []
    return tokens


def icons(source: Path) -> Corpus:
    """Icons by name: a picture of it in each of several sets, where that has one, and the name.

    Icons of two sets are one item if they share a name, its words in any order; the name that the
    most sets know decides where an icon has several.
    """
    names: dict[str, list[str]] = defaultdict(list)
    with (source / "texts.csv").open(newline="", encoding="utf-8") as stream:
        for row in csv.DictReader(stream):
            names[row["image_id"]].append(row["caption"])
    with (source / "images.csv").open(newline="", encoding="utf-8") as stream:
        rows = {row["id"]: number for number, row in enumerate(csv.DictReader(stream))}
    known: dict[str, set[str]] = defaultdict(set)
    ours = [icon for icon in rows if icon.partition(":")[0] in ICON_SETS]
    for icon in ours:
        for name in names[icon]:
            known[item_of(name)].add(icon.partition(":")[0])
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for icon in ours:
        keys = [item_of(name) for name in names[icon]]
        found[max(keys, key=lambda key: len(known[key]))].setdefault(icon.partition(":")[0], icon)
    items = sorted(found)
    splits = split_items(items, [True] * len(items))
    pictures = np.load(source / "images.npy", mmap_mode="r")
    sides = {}
    for name in ICON_SETS:
        has = np.array([name in found[item] for item in items])
        taken = [rows[found[item][name]] for item in items if name in found[item]]
        encoder = "efficientnet-lite0 (ImageNet), 128 px, pooled"
        sides[name] = Side(
            encoder, np.array(pictures[taken]), np.where(has, np.cumsum(has) - 1, -1)
        )
    texts = sentence_features(items)
    sides["name"] = Side("all-MiniLM-L6-v2, mean pooled", texts, every(texts))
    return Corpus(items, splits, sides)


def item_of(name: str) -> str:
    """The words of a name in alphabetical order."""
    return " ".join(sorted(name.casefold().split()))


def packages(_: Path | None) -> Corpus:
    """Debian packages: the line that describes each in four languages, and its tags.

    Items are packages with current translations into two of three languages, one of each source
    package in all its versions, so that no relative of a held-out package is trained on.
    """
    tags, family, current = {}, {}, {}
    for entry in deb822.Deb822.iter_paragraphs(apt_lists("Packages", "en")):
        name = entry["Package"]
        current[name] = entry["Description-md5"]
        family[name] = re.sub(r"[\d.]+", "", entry.get("Source", name).split()[0])
        tags[name] = sorted(set(entry.get("Tag", "").replace(",", " ").split()))
    lines: dict[str, dict[str, str]] = {}
    for language in ("en", *LANGUAGES.values()):
        lines[language] = {}
        for entry in deb822.Deb822.iter_paragraphs(apt_lists("Translations", language)):
            name = entry["Package"]
            if current.get(name) == entry["Description-md5"]:
                lines[language][name] = entry[f"Description-{language}"].split("\n")[0].strip()
    english = lines.pop("en")
    one_each: dict[str, str] = {}
    for name in sorted(english):
        if sum(name in own for own in lines.values()) >= 2:
            one_each.setdefault(family[name], name)
    items = sorted(one_each.values())
    counts = Counter(english[name].casefold() for name in items)
    splits = split_items(items, [counts[english[name].casefold()] == 1 for name in items])
    texts = sentence_features([english[name] for name in items])
    sides = {"english": Side("all-MiniLM-L6-v2, mean pooled", texts, every(texts))}
    for side, language in LANGUAGES.items():
        words = [word_tokens(lines[language].get(name, "")) for name in items]
        sides[side] = Side(*weighted_tokens(words, splits, 256))
    sides["tags"] = Side(*weighted_tokens([tags[name] for name in items], splits, 128))
    return Corpus(items, splits, sides)


def apt_lists(kind: str, language: str) -> str:
    """Return the downloaded lists of a kind (Packages, Translations), whatever compresses them."""
    options = ["-o", f"Acquire::Languages={language}"]
    command = ["apt-get", *options, "indextargets", "--format", "$(FILENAME)"]
    command.append(f"Created-By: {kind}")
    names = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    command = ["/usr/lib/apt/apt-helper", *options, "cat-file", *names]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def word_tokens(line: str) -> list[str]:
    """Return the words of a line in small letters, and their letters in groups of three.

    Groups of two where words are of Chinese characters or kana.
    """
    tokens = []
    for word in re.findall(r"\w+", line.casefold()):
        size = 3 if word.isascii() or word[0] < "\u3000" else 2
        padded = f"<{word}>" if size == 3 else word
        tokens += [word, *(padded[at : at + size] for at in range(len(padded) - size + 1))]
    return tokens


def drop(corpus: Corpus, share: float, seed: int) -> NDArray[np.bool_]:
    """Take away memberships of training items at random; each item keeps one at least.

    Returns:
        The memberships that are left, (items, sides).
    """
    present = corpus.present
    keys = np.where(present, np.random.default_rng(seed).random(present.shape), -1.0)
    trained = np.array(corpus.splits) == "train"
    free = present & trained[:, None]
    free[np.arange(len(keys)), keys.argmax(axis=1)] = False
    size = round(share * present[trained].sum())
    gone = np.argsort(np.where(free, keys, 2.0), axis=None)[: min(size, int(free.sum()))]
    present.flat[gone] = False
    return present


def write_table(corpus: Corpus, present: NDArray[np.bool_], path: Path) -> None:
    """Write the table of items."""
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(("item", "split", *corpus.sides))
        for number, item in enumerate(corpus.items):
            cells = [
                str(side.of_items[number]) if here else ""
                for side, here in zip(corpus.sides.values(), present[number], strict=True)
            ]
            writer.writerow((item, corpus.splits[number], *cells))


def describe(corpus: Corpus) -> str:
    """Return the sides, widths, items and memberships as text."""
    sides = ", ".join(f"{name} {own.rows.shape[1]}" for name, own in corpus.sides.items())
    counts = dict(zip(corpus.sides, corpus.present.sum(axis=0).tolist(), strict=True))
    splits = dict(Counter(corpus.splits))
    of_item = dict(sorted(Counter(corpus.present.sum(axis=1).tolist()).items()))
    return (
        f"sides {sides}; {len(corpus.items):,} items {splits}; memberships {counts}; "
        f"items by number of sides {of_item}"
    )


CORPORA = {"art": art, "icons": icons, "packages": packages}


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("corpus", choices=tuple(CORPORA))
    parser.add_argument("--source", type=Path, help="folder of the other script, of art and icons")
    parser.add_argument("--out", type=Path, required=True, help="folder for all results")
    parser.add_argument("--missing", default="0.2,0.6", help="shares of memberships to take away")
    parser.add_argument("--seeds", default="0,1,2", help="seeds of which are taken away")
    arguments = parser.parse_args()
    corpus = CORPORA[arguments.corpus](arguments.source)
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    for name, side in corpus.sides.items():
        np.save(out / f"{name}.npy", side.rows)
    write_table(corpus, corpus.present, out / "items.csv")
    for share in map(float, arguments.missing.split(",")):
        for seed in map(int, arguments.seeds.split(",")):
            table = out / f"items-{100 * share:.0f}-{seed}.csv"
            write_table(corpus, drop(corpus, share, seed), table)
    print(f"{arguments.corpus}: {describe(corpus)}")


if __name__ == "__main__":
    main()
