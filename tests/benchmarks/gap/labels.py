"""Write the labels of the test items of each corpus, for ``csalign eval --labels``.

Usage::

    python tests/benchmarks/gap/labels.py --work DIR [--icons DIR]

DIR is that of gap.py, with the feature sets of corpora.py; it receives a ``labels-CORPUS.csv`` of
each, with one row per test item. A class with fewer than 10 test items is left out, and
its items have no label.

- Open Clip Art: ``keyword``, the commonest of a drawing's keywords, and ``narrow``, the rarest one
  with 10 drawings. Authors and traces of old scripts are no keywords. The features of the test
  split hold titles alone, so no encoder has seen them.
- icons: ``theme``, of the categories that a third of the sets have, merged by their first word
  ("Arrows", "Arrows Action" and "ArrowsDiagrams" are one); and ``set``, which is in the drawing
  and not in its name.
- packages: ``section`` of Debian.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from corpora import read_table, write_table

sys.path.insert(0, str(Path(__file__).parent.parent / "openclipart"))
FEWEST = 10
# Of scripts that sorted the library, and the author of many drawings.
NO_KEYWORDS = {"hash", "unsorted", "signs_and_symbols", "architetto francesco rollandin", ""}
# Themes by the first words of the sets' own categories; other categories are no theme.
THEMES = {
    "arrows": "arrow navigation",
    "brands": "brand logo",
    "building": "building home household place",
    "code": "android cloud coding developer internet programing",
    "commerce": "banking business currency money payment shopping",
    "devices": "cellphone computer device hardware phone technology",
    "documents": "content edit editor file note page text",
    "health": "blood body conditions covid health medical medication personal",
    "interface": "action interface system ui",
    "media": "audio entertainment image media multimedia music photography video",
    "messages": "chat communicate communication connect email mail message social",
    "nature": "animal food nature plant weather zoonose",
    "people": "account emoji face people person user",
    "security": "lock privacy security",
    "shapes": "abstract design shape symbol",
    "travel": "automotive map transit transport transportation travel vehicle wayfinding",
    "work": "enterprise office organization planning work",
}
THEME = {word: theme for theme, words in THEMES.items() for word in words.split()}
Labels = dict[str, str]


def settle(candidates: Mapping[str, Sequence[str]], *, rare: bool = False) -> Labels:
    """Choose one of the labels of each item, such that each class has at least 10 items.

    Args:
        candidates: labels of each item.
        rare: prefer the rarest rather than the commonest.

    Returns:
        A label of each item that keeps one. The smallest class below 10 items is dissolved first,
        and its items take the next of their labels.
    """
    left = {item: set(own) for item, own in candidates.items()}
    while True:
        counts = Counter(label for own in left.values() for label in own)
        sign = 1 if rare else -1
        chosen = {
            item: min(own, key=lambda label: (sign * counts[label], label))
            for item, own in left.items()
            if own
        }
        sizes = Counter(chosen.values())
        unused = counts.keys() - sizes.keys()
        small = [label for label in sizes if sizes[label] < FEWEST]
        if not small:
            return chosen
        gone = {min(small, key=lambda label: (counts[label], label))}
        gone |= {label for label in unused if counts[label] < FEWEST}
        left = {item: own - gone for item, own in left.items()}


def keywords(tests: set[str]) -> dict[str, Labels]:
    """Read the keywords of the drawings."""
    from corpus import read_drawings

    found = {}
    for drawing in read_drawings()[0]:
        if drawing.id in tests:
            words = drawing.captions[-1].split(",") if len(drawing.captions) > 1 else ()
            found[drawing.id] = {word.strip().casefold() for word in words} - NO_KEYWORDS
    lists = {item: sorted(own) for item, own in found.items()}
    return {"keyword": settle(lists), "narrow": settle(lists, rare=True)}


def category(name: str) -> str:
    """The first word of a category, in lower case and singular."""
    words = re.findall(r"[A-Z]?[a-z0-9]+|[A-Z0-9]+(?![a-z])", name)
    first = words[0].casefold() if words else ""
    return re.sub("ies$", "y", first) if first.endswith("ies") else re.sub(r"(?<!s)s$", "", first)


def icon_sets(tests: set[str], folder: Path) -> dict[str, Labels]:
    """Read the categories of the icon sets that have them."""
    found: dict[str, list[str]] = {}
    sets = {item: item.partition(":")[0] for item in tests}
    for name in sorted(set(sets.values())):
        path = max(folder.glob(f"iconify-json-{name}-[0-9]*.tgz"))
        with tarfile.open(path) as archive:
            if "package/metadata.json" not in archive.getnames():
                continue
            file = archive.extractfile("package/metadata.json")
            assert file is not None
            categories = json.load(file).get("categories", {})
        for title, icons in categories.items():
            if label := THEME.get(category(title)):
                for icon in icons:
                    if (item := f"{name}:{icon}") in tests:
                        found.setdefault(item, []).append(label)
    return {"theme": settle(found), "set": settle({item: [own] for item, own in sets.items()})}


def sections(tests: set[str]) -> dict[str, Labels]:
    """Read the sections of the packages from the downloaded lists."""
    from debian import deb822

    command = ["apt-cache", "dumpavail"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {
        entry["Package"]: [entry["Section"].rpartition("/")[2]]
        for entry in deb822.Deb822.iter_paragraphs(text)
        if entry["Package"] in tests
    }
    return {"section": settle(found)}


def main() -> None:
    """Write the labels of the corpora that are there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--work", type=Path, required=True, help="folder of gap.py")
    parser.add_argument("--icons", type=Path, help="folder of icons/prepare.py")
    arguments = parser.parse_args()
    for folder in sorted((arguments.work / "corpora").iterdir()):
        table = folder / ("images.csv" if (folder / "images.csv").exists() else "captions.csv")
        rows = [row for row in read_table(table) if row["split"] == "test"]
        tests = sorted({row.get("item") or row["id"] for row in rows})
        if folder.name in ("openclipart", "clip"):
            columns = keywords(set(tests))
        elif folder.name == "icons":
            columns = icon_sets(set(tests), arguments.icons / "npm")
        else:
            columns = sections(set(tests))
        path = arguments.work / f"labels-{folder.name}.csv"
        write_table(
            path,
            (
                {"image_id": item, **{name: own.get(item, "") for name, own in columns.items()}}
                for item in tests
            ),
        )
        for name, own in columns.items():
            counts = Counter(own.values())
            words = ", ".join(f"{label} {n}" for label, n in counts.most_common())
            print(f"{path.name}: {name}: {len(own)} items in {len(counts)} classes: {words}")


if __name__ == "__main__":
    main()
