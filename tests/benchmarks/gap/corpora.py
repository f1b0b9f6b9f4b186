"""Make the feature sets of gap.py from those of the other benchmarks.

Usage::

    python tests/benchmarks/gap/corpora.py --work DIR --openclipart DIR --icons DIR --packages DIR

The other folders are those of ``prepare.py`` of openclipart, icons and packages; one that is not
given is skipped. DIR/corpora receives

- ``icons``: 7,000 pairs to train on, drawn by the seed, and the splits val and test;
- ``packages``: the same of packages, both sides by all-MiniLM-L6-v2, which takes ten minutes;
- ``clip``: Open Clip Art by ``sample_data/tiny-clip``. That model was trained on the split train,
  which is left out; the 1,000 drawings of val and val2 are there to train adapters on;
- ``icons-unpaired`` and ``packages-unpaired``: 1,000 pairs, and 6,000 images and 6,000 texts of
  other items, without a partner in the set;
- ``openclipart``: a link to the feature set.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent / "openclipart"))
from prepare import ENCODERS, FloatArray, run_import

PAIRS = 7_000
FEW_PAIRS, UNPAIRED = 1_000, 6_000  # rows of a side
TINY_CLIP = Path(__file__).resolve().parents[3] / "sample_data" / "tiny-clip" / "tiny-clip"
MINILM, STATIC = ENCODERS[1], "wordllama l2_supercat_256, mean"


def read_table(path: Path) -> list[dict[str, str]]:
    """Read a CSV file with a header."""
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def write_table(path: Path, rows: Iterable[Mapping[str, str]]) -> None:
    """Write a CSV file; the first row has the columns."""
    rows = list(rows)
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def draw(source: Path, out: Path, pairs: int = PAIRS, seed: int = 0) -> list[str]:
    """Write the arrays and tables of some training images, and of val and test.

    Args:
        source: folder of ``write_sides``.
        out: receives the same files.
        pairs: training images to keep.
        seed: of the choice.

    Returns:
        The caption of each row of texts.
    """
    out.mkdir(parents=True, exist_ok=True)
    images, texts = (read_table(source / f"{side}.csv") for side in ("images", "texts"))
    trained = [row for row, own in enumerate(images) if own["split"] == "train"]
    chosen = {trained[i] for i in np.random.default_rng(seed).permutation(len(trained))[:pairs]}
    held = {"val", "test"}
    rows = [row for row, own in enumerate(images) if row in chosen or own["split"] in held]
    ids = {images[row]["id"] for row in rows}
    kept = [row for row, own in enumerate(texts) if own["image_id"] in ids]
    for side, table, which in (("images", images, rows), ("texts", texts, kept)):
        write_table(out / f"{side}.csv", (table[row] for row in which))
        np.save(out / f"{side}.npy", np.load(source / f"{side}.npy", mmap_mode="r")[which])
    return [texts[row]["caption"] for row in kept]


def make_icons(source: Path, out: Path) -> None:
    """Draw pairs of the icons."""
    draw(source, out)
    run_import(out, out / "features", *ENCODERS)


def make_unpaired(source: Path, out: Path, encoders: tuple[str, str]) -> None:
    """Draw few pairs, and rows of each side whose partners are left out."""
    draw(source, out, FEW_PAIRS + 2 * UNPAIRED)
    images, texts = (read_table(out / f"{side}.csv") for side in ("images", "texts"))
    order = np.random.default_rng(0).permutation([r["id"] for r in images if r["split"] == "train"])
    alone, missing = (set(ids.tolist()) for ids in np.split(order[FEW_PAIRS:], [UNPAIRED]))
    kept = [row for row, own in enumerate(images) if own["id"] not in missing]
    write_table(out / "images.csv", (images[row] for row in kept))
    np.save(out / "images.npy", np.load(out / "images.npy")[kept])
    kept = [row for row, own in enumerate(texts) if own["image_id"] not in alone]
    for row in kept:
        if texts[row]["image_id"] in missing:
            texts[row]["image_id"] = ""
    write_table(out / "texts.csv", (texts[row] for row in kept))
    np.save(out / "texts.npy", np.load(out / "texts.npy")[kept])
    run_import(out, out / "features", *encoders)


def make_packages(source: Path, out: Path) -> None:
    """Draw pairs of the packages, and embed the long descriptions as the short ones were."""
    from features import sentence_features

    captions = draw(source, out)
    longs: FloatArray = sentence_features(captions)
    np.save(out / "texts.npy", longs)
    run_import(out, out / "features", MINILM, MINILM)


def make_clip(source: Path, out: Path) -> None:
    """Embed the drawings and captions of Open Clip Art with a small CLIP model."""
    out.mkdir(parents=True, exist_ok=True)
    splits = {"val": "train", "val2": "train", "test": "test"}
    write_table(
        out / "captions.csv",
        (
            {"image": f"{own['image_id']}.png", "item": own["image_id"]}
            | {"caption": own["caption"], "split": splits[own["split"]]}
            for own in read_table(source / "texts.csv")
            if own["split"] in splits
        ),
    )
    command = [sys.executable, "-m", "csalign", "extract", str(out / "captions.csv")]
    command += ["--images", str(source / "pictures"), "--id-column", "item", "--dtype", "float32"]
    command += ["--encoder", f"open_clip:{TINY_CLIP}.json+{TINY_CLIP}.safetensors"]
    subprocess.run([*command, "--out", str(out / "features"), "--overwrite"], check=True)


def main() -> None:
    """Make what is not there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--work", type=Path, required=True, help="receives corpora/")
    for name in ("openclipart", "icons", "packages"):
        parser.add_argument(f"--{name}", type=Path, help="folder of its prepare.py")
    arguments = parser.parse_args()
    folder: Path = arguments.work / "corpora"
    folder.mkdir(parents=True, exist_ok=True)
    if arguments.openclipart and not (link := folder / "openclipart").exists():
        link.symlink_to(arguments.openclipart.resolve())
    for name, source, make in (
        ("clip", arguments.openclipart, make_clip),
        ("icons", arguments.icons, make_icons),
        ("packages", arguments.packages, make_packages),
        ("icons-unpaired", arguments.icons, partial(make_unpaired, encoders=ENCODERS)),
        (
            "packages-unpaired",
            arguments.packages,
            partial(make_unpaired, encoders=(MINILM, STATIC)),
        ),
    ):
        if source and not (folder / name / "features").exists():
            make(source.resolve(), folder / name)


if __name__ == "__main__":
    main()
