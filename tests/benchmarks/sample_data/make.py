"""Make ``sample_data`` from the Open Clip Art corpus.

Usage::

    python tests/benchmarks/sample_data/make.py --work DIR

DIR is the folder of ``tests/benchmarks/openclipart/prepare.py``; whatever is missing there is
computed first. The command writes the drawings with their captions and attribution, and the arrays
of the sample feature set, which it then imports and reduces to two small arrays. The tiny CLIP
model has a script of its own, ``train_tiny_clip.py``.
"""

from __future__ import annotations

import argparse
import csv
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from PIL import Image, ImageChops
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "tests" / "benchmarks" / "openclipart"))

import prepare  # noqa: E402  (found by the line above)
from corpus import SVG_ROOT, Drawing, picture_path  # noqa: E402

SAMPLE_DATA = ROOT / "sample_data"
DRAWING_SPLITS = {"test": 300, "val": 150, "train": 970}
DRAWING_SIZE = 80
COLOURS = 32
ARRAY_WIDTH = 128
KEYWORD_WIDTH = 64
MIN_INK = 0.02
FEATURE_SPLITS = {"test": 300, "val": 200, "train": 1000}
PUBLIC_DOMAIN = "http://web.resource.org/cc/PublicDomain"

# Flags, maps, creeds and logos need knowledge of the world rather than eyes.
SKIPPED_FOLDERS = (
    "geography/",
    "logos/",
    "people/clothing/pantyhose/",
    "recreation/religion/",
    "signs_and_symbols/flags/",
    "tools/weapons/",
)
# Found by looking at the pictures.
SKIPPED_DRAWINGS = frozenset(
    {
        # Trade marks, known characters, and people who may be recognised.
        "animals/fantasy/the_incredible_tux_giuli_01",
        "animals/mammals/emule_icon_emule.org_01",
        "animals/mascot_enrique_meza_c_01",
        "animals/tux_head_fco._andrade_01",
        "computer/chomper_charles_mccolm_01",
        "computer/games/xbox-controller_01",
        "computer/hardware/laptop_01",
        "computer/linux_powered_none_01",
        "office/telephone/sprint_cell_phone_joel_r",
        "people/a_youngster_01",
        "people/grandpa_01",
        "people/my_lovely_baby_enrique_m_01",
        "people/self_portrait_hardi1",
        "special/cdfrontcover_openclipar_01",
        "special/cdlabel_openclipart_c_01",
        "transportation/toyota_land_cruiser_ganson",
        "unsorted/otto_needs_you_01",
        # Delicate subjects.
        "animals/fantasy/mermaid_kurt_cagle_",
        "people/bad_guy_fr_1_01",
        "people/bodypart/hands_lorenzo_luengo_01",
        "people/clothing/hats/pimp_hat_james_birkett_01",
        "people/fata_fatina_architetto_f_01",
        "people/female_rollandin_frances_",
        "people/gender_jakob_chaosinfait_",
        "people/hide_girl_sergio_luiz_ar_02",
        "people/sexy_lady_01",
        "people/smilies/chav_01",
        "people/stripper_jarno_vasamaa_01r",
        "plants/cannabis_leaf_anonymous_",
        "plants/human_humain_umano_sed_r",
        "science/evolution_steps_marcelo__01",
        "shapes/shadow_babe_robert_seitz_01",
        "signs_and_symbols/flag_of_brazil_rodrigo_t1",
        "tools/gallows_frouke_01",
        "unsorted/media_as_wmd_saint_",
        "unsorted/mr_lakshman_poonyth_",
        "unsorted/ms_01",
        "unsorted/psycho_icecube_phentex_01",
        "unsorted/what_have_you_done_dani_",
    }
)
# Traces of the scripts that once filled in the keywords.
JUNK_KEYWORD = re.compile(r"hash(\(0x[0-9a-f]+\))?|0x[0-9a-f]+|unsorted", re.IGNORECASE)


def clean_captions(captions: Sequence[str]) -> list[str]:
    """Drop junk keywords, captions with an address, and those like the title but for signs."""
    kept: dict[str, str] = {}
    for caption in captions:
        if re.search("@|https?:", caption):
            continue
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
) -> dict[Drawing, str]:
    """Choose the drawings to ship, and their splits.

    They come from the splits of the corpus that are held out: their titles are unique, no other
    drawing looks the same, and the tiny CLIP model has not seen them.

    Args:
        drawings: The corpus.
        splits: Split of each drawing in the corpus.
        pictures: Folder of the rendered pictures.

    Returns:
        The split of each chosen drawing, in hash order.
    """
    by_id = {drawing.id: drawing for drawing in drawings if splits[drawing.id] != "train"}
    chosen = [
        drawing
        for drawing in map(by_id.__getitem__, prepare.hash_order(by_id))
        if drawing.license == PUBLIC_DOMAIN
        and not drawing.id.startswith(SKIPPED_FOLDERS)
        and drawing.id not in SKIPPED_DRAWINGS
        and clean_captions(drawing.captions)[:1] == [drawing.title]
        and ink(picture_path(pictures, drawing.id)) > MIN_INK
    ]
    names = [name for name, size in DRAWING_SPLITS.items() for _ in range(size)]
    return dict(zip(chosen, names, strict=False))


def file_names(drawings: Sequence[Drawing]) -> list[str]:
    """Return a file name for each drawing, made of its title."""
    names: list[str] = []
    for drawing in drawings:
        stem = re.sub(r"[^a-z0-9]+", "-", drawing.title.casefold()).strip("-") or "drawing"
        taken = f"{stem}.png" in names
        names.append(f"{stem}-{len(names)}.png" if taken else f"{stem}.png")
    return names


def thumbnail(picture: Image.Image) -> Image.Image:
    """Return a small picture with a palette, without the white around the drawing."""
    box = ImageChops.invert(picture).convert("L").point(lambda value: 255 * (value > 8)).getbbox()
    drawing = picture.crop(box)
    side = max(drawing.size) * 26 // 25 + 4
    square = Image.new("RGB", (side, side), "white")
    square.paste(drawing, tuple((side - length) // 2 for length in drawing.size))
    small = square.resize((DRAWING_SIZE, DRAWING_SIZE), Image.Resampling.LANCZOS)
    return small.quantize(COLOURS, dither=Image.Dither.NONE)


def write_drawings(chosen: Mapping[Drawing, str], pictures: Path) -> None:
    """Write the drawings, their captions and their attribution below ``sample_data``.

    Drawings of the split "train" bring all their captions; the others only their title, which is
    the query.
    """
    folder = SAMPLE_DATA / "drawings"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    captions = [("image", "caption", "split")]
    attribution = [("file", "title", "creator", "origin")]
    rows = zip(file_names(list(chosen)), chosen.items(), strict=True)
    for name, (drawing, split) in sorted(rows, key=lambda row: row[0]):
        picture = Image.open(picture_path(pictures, drawing.id)).convert("RGB")
        thumbnail(picture).save(folder / name, optimize=True)
        texts = clean_captions(drawing.captions)
        captions += [(name, text, split) for text in (texts if split == "train" else texts[:1])]
        attribution.append((name, drawing.title, drawing.creator, f"{drawing.id}.svg"))
    for path, table in (
        (folder / "captions.csv", captions),
        (SAMPLE_DATA / "attribution.csv", attribution),
    ):
        with path.open("w", newline="", encoding="utf-8") as stream:
            csv.writer(stream, lineterminator="\n").writerows(table)


def write_arrays() -> None:
    """Write the features of the drawings and of their titles as two arrays of 128 columns.

    Row i of one belongs with row i of the other; the order of the rows is random. The columns are
    principal components, taken about the origin and without a look at the pairs.
    """
    features = SAMPLE_DATA / "features"
    images, texts = (pq.read_table(features / side).to_pandas() for side in ("images", "texts"))
    titles = texts[texts["id"].str.endswith("#0")].set_index("image_id").loc[images["id"]]
    order = np.random.default_rng(0).permutation(len(images))
    folder = SAMPLE_DATA / "arrays"
    folder.mkdir(exist_ok=True)
    for name, table in (("image", images), ("text", titles)):
        rows = np.stack(table["embedding"].to_numpy()).astype(np.float64)[order]
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        _, _, axes = np.linalg.svd(rows, full_matrices=False)
        np.save(folder / f"{name}.npy", (rows @ axes[:ARRAY_WIDTH].T).astype(np.float16))


def write_third_side() -> None:
    """Write the keywords of the drawings as a third array, and which rows belong together.

    Keywords are weighted by TF-IDF, as sets of words, and reduced to 64 columns. Drawings without
    known keywords have no row, so that items.csv has empty cells.
    """
    features, folder = SAMPLE_DATA / "features", SAMPLE_DATA / "arrays"
    images, texts = (pq.read_table(features / side).to_pandas() for side in ("images", "texts"))
    words = texts[texts["id"].str.endswith("#1")].set_index("image_id")["caption"]
    order = np.random.default_rng(0).permutation(len(images))  # as in `write_arrays`
    documents = [re.findall(r"[^,\s]+", words.get(name, "").casefold()) for name in images["id"]]
    documents = [documents[row] for row in order]
    table = TfidfVectorizer(analyzer=list, sublinear_tf=True, min_df=3).fit_transform(documents)
    rows = TruncatedSVD(KEYWORD_WIDTH, random_state=0).fit_transform(table)
    has = np.linalg.norm(rows, axis=1) > 1e-3
    np.save(folder / "keywords.npy", rows[has].astype(np.float16))
    number = np.cumsum(has) - 1
    with (folder / "items.csv").open("w", newline="", encoding="utf-8") as stream:
        table = csv.writer(stream, lineterminator="\n")
        table.writerow(["image", "text", "keywords"])
        table.writerows([row, row, number[row] if has[row] else ""] for row in range(len(rows)))


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
    write_drawings(choose_drawings(corpus.drawings, splits, pictures), pictures)
    prepare.write_tables(corpus, choose_features(corpus), work / "sample")
    if not arguments.no_import:
        prepare.run_import(
            work / "sample", SAMPLE_DATA / "features", *prepare.ENCODERS, dtype="float16"
        )
        # It names folders of this machine, which mean nothing elsewhere.
        (SAMPLE_DATA / "features" / "config.toml").unlink()
    write_arrays()
    write_third_side()


if __name__ == "__main__":
    main()
