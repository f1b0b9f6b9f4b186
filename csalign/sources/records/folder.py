"""Sort the files of a folder: images, captions beside them, tables, and what is not read."""

import logging
import posixpath
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from csalign.core.errors import DataError
from csalign.core.figures import counted
from csalign.core.paths import is_remote
from csalign.sources import images as pictures
from csalign.sources.records import files
from csalign.sources.records.catalog import Catalog
from csalign.sources.records.tables import SUFFIXES

logger = logging.getLogger(__name__)

Sizes = Mapping[str, int | None]
TEXTS = (".caption", ".txt")  # of captions beside images; the last one has priority
TABLE_STEMS = ("captions", "metadata")  # the second is the hub's name for the table of a folder
# Of a raw image Pillow would read the preview.
_NOT_IMAGES = {
    *(".nef", ".nrw", ".cr2", ".cr3", ".dng", ".arw", ".orf", ".rw2", ".raf", ".pef", ".srw"),
    *(*TEXTS, *SUFFIXES, ".json", ".md", ".parquet", ".arrow", ".tar"),
}


def images_in(folder: Path, found: Iterable[str]) -> list[str]:
    """Select the files that are images by suffix or, if that is unknown and local, by content."""
    images: list[str] = []
    others: dict[str, list[str]] = {}
    for name in found:
        if (suffix := _suffix(name)) in files.IMAGE_SUFFIXES:
            images.append(name)
        elif suffix not in _NOT_IMAGES and not is_remote(folder):
            others.setdefault(suffix, []).append(name)
    for suffix, names in others.items():
        # A few files of a suffix say what it means.
        if not suffix or any(pictures.is_image(folder / name) for name in names[:16]):
            own = [name for name in names if pictures.is_image(folder / name)]
            images += own
            if own:
                logger.info(f"{folder}: {counted(len(own), 'image')} by content, such as {own[0]}")
    return sorted(images)


def tables_in(folder: Path, found: Iterable[str]) -> list[str]:
    """Find the captions table of a folder, or one per split, or else those of its subfolders.

    Raises:
        DataError: there are several, and none is called captions or metadata.
    """
    by_parent: dict[str, list[str]] = {"": []}
    for name in found:
        parent, base = posixpath.split(name)
        stem, suffix = posixpath.splitext(base.lower())
        if suffix in (*SUFFIXES, ".parquet") and (not parent or stem in TABLE_STEMS):
            by_parent.setdefault(parent, []).append(name)
    chosen = {parent: _choose(folder, names) for parent, names in by_parent.items()}
    return chosen.pop("") or [name for names in chosen.values() for name in names]


def _choose(folder: Path, tables: list[str]) -> list[str]:
    """Choose among the tables of one folder."""
    for stem in TABLE_STEMS:
        named = [name for name in tables if Path(name).stem.lower() == stem]
        if len(named) == 1:
            return named
    splits = {files.split_of(posixpath.basename(name)) for name in tables}
    if len(tables) > 1 and (None in splits or len(splits) < len(tables)):
        listed = ", ".join(tables[:5]) + (", ..." if len(tables) > 5 else "")
        raise DataError(f"{folder}: contains several tables ({listed}); choose one with --captions")
    return tables


def warn_of_unread(folder: Path, found: Iterable[str], read: Collection[str]) -> None:
    """Count and name the files that are not read, but for the documentation."""
    rest = [name for name in found if name not in read and _suffix(name) != ".md"]
    if rest:
        kinds = Counter(_suffix(name) or "without suffix" for name in rest)
        listed = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(4))
        remedy = "pass it with --captions if it contains the captions, or write .txt files"
        if kinds.keys() & {".heic", ".heif", ".jxl"}:
            remedy = "for HEIC install pillow-heif, for JPEG XL pillow-jxl-plugin"
        logger.warning(
            f"{folder}: {counted(len(rest), 'file')} not read ({listed}), such as "
            f"{', '.join(map(files.printable, rest[:3]))}; {remedy}"
        )


def read_folder(
    folder: Path, found: Sizes, images: Sequence[str], *, caption_lines: bool
) -> Catalog:
    """Read images with the .txt or .caption of the same stem or name; or texts alone.

    Images of the same stem share their captions, since a stem cannot say which one is meant. The
    texts are read together with their images, with `caption_lines` a caption per line.

    Raises:
        DataError: there is neither an image nor a text.
    """
    by_stem: dict[str, str] = {}
    for kind in TEXTS:
        by_stem |= {_stem(name): name for name in found if _suffix(name) == kind}
    if not images:  # numbers of images beside captions, as train_ids.txt of VSE++, are not captions
        ids = [stem for stem in by_stem if stem.endswith("ids")]
        by_stem = {k: v for k, v in by_stem.items() if k not in ids or not _is_of_ids(folder / v)}
    stems = [_stem(name) for name in images]
    if not images and not by_stem:
        raise DataError(
            f"{folder}: contains no images, captions (.txt), uncompressed tar or Parquet files; "
            "pass a folder or file that does"
        )
    read = {*images, *by_stem.values(), *(f"{stem}.json" for stem in by_stem)}
    warn_of_unread(folder, found, read)
    stems = stems or list(by_stem)
    texts = [by_stem.get(a) or by_stem.get(b) for a, b in zip(stems, images or stems, strict=True)]
    captioned = len(texts) - texts.count(None)
    kinds = " or ".join(sorted({_suffix(text) for text in texts if text})) or ".txt"
    description = f"folder of {captioned} {kinds} files with captions"
    if images:
        _warn_of_stems(folder, images, stems, by_stem)
        count = counted(len(images), "image")
        description = f"folder of {count}, {captioned} of them with a {kinds} of captions"
    if not captioned and not is_remote(folder):
        near = sorted(folder.absolute().parent.glob("captions*.*"))
        logger.info(
            f"{folder}: contains no captions, and names of folders are not captions; a table of "
            f"image and caption is passed with --captions {near[0] if near else 'FILE'}"
        )
    catalog = Catalog(folder, caption_lines=caption_lines)
    catalog.begin_file(str(folder))
    for label, text in zip(images or stems, texts, strict=True):
        size = None if text is None else _size(folder / text, found[text])
        catalog.add_text(label, label if images else None, text, size)
    return catalog.finish(description)


def _warn_of_stems(
    folder: Path, found: Sequence[str], stems: Sequence[str], texts: Mapping[str, str]
) -> None:
    unused = [texts[stem] for stem in texts.keys() - {*stems, *found}]
    if unused:
        logger.warning(
            f"{folder}: {len(unused)} {_suffix(min(unused))} files are omitted, as no image has "
            f"their stem ({min(unused)})"
        )
    first: dict[str, str] = {}
    for name, stem in zip(found, stems, strict=True):
        if first.setdefault(stem, name) != name and stem in texts:
            logger.warning(
                f"{folder}: images of the same stem share its captions, as {first[stem]} and "
                f"{name} do; rename them if they differ"
            )
            return


def _is_of_ids(path: Path) -> bool:
    with files.open_file(path) as file:
        return file.read(4096).translate(None, b" \t\r\n").isdigit()


def _size(path: Path, known: int | None) -> int:
    try:
        return path.stat().st_size if known is None else known
    except OSError:
        return -1  # its record has the reason


def _stem(name: str) -> str:
    return posixpath.splitext(name)[0]


def _suffix(name: str) -> str:
    return posixpath.splitext(name)[1].lower()
