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
from csalign.sources.records.catalog import Catalog, captions_in_json
from csalign.sources.records.tables import SUFFIXES

logger = logging.getLogger(__name__)

Sizes = Mapping[str, int | None]
TABLE_STEMS = ("captions", "metadata")  # the second is the hub's name for the table of a folder
COLUMNAR = (".parquet", ".arrow")
_TEXTS = (".json", ".caption", ".txt")  # of captions beside images; the last one has priority
# Pillow reads the preview of a camera's raw image.
_RAW = (".nef", ".nrw", ".cr2", ".cr3", ".dng", ".arw", ".orf", ".rw2", ".raf", ".pef", ".srw")
_TABLES = (*SUFFIXES, ".ndjson", ".json", ".xlsx", ".xls", ".token")
_CONTAINERS = (*COLUMNAR, ".tar", ".gz", ".tgz", ".zip", ".zst", ".7z", ".rar", ".feather")
_REMEDIES = {
    **dict.fromkeys((".heic", ".heif", ".hif"), "install pillow-heif to read HEIC"),
    ".jxl": "install pillow-jxl-plugin to read JPEG XL",
    **dict.fromkeys((*_RAW, ".svg", ".psd", ".caption"), ""),
    **dict.fromkeys(_TABLES, "if it contains the captions, pass it with --captions"),
    **dict.fromkeys(_CONTAINERS, "unpack it, or pass it as a source of its own"),
    **dict.fromkeys(pictures.SUFFIXES, "pass --kind folder to read the images"),
}
"""What to do about files that may be data, by suffix."""


def images_in(folder: Path, found: Collection[str]) -> list[str]:
    """Select the files that are images: by their suffix in any case, or else by their content.

    Of the files of another suffix a few are looked at, of those without one all; not if they are
    remote.
    """
    images: list[str] = []
    others: dict[str, list[str]] = {}
    for name in found:
        suffix = _suffix(name)
        if suffix in pictures.SUFFIXES:
            images.append(name)
        elif not (suffix in (*_TABLES, *_TEXTS, *_RAW, *_CONTAINERS) or is_remote(folder)):
            others.setdefault(suffix, []).append(name)
    unnamed = [
        name
        for suffix, names in others.items()
        if not suffix or any(_is_image(folder / name) for name in names[:16])
        for name in names
        if _is_image(folder / name)
    ]
    if not unnamed:
        return images
    logger.info(
        f"{folder}: {counted(len(unnamed), 'file')} read as images by their content, such as "
        f"{unnamed[0]}"
    )
    return sorted([*images, *unnamed])


def tables_in(folder: Path, found: Collection[str]) -> list[str]:
    """Find the captions table of a folder, or one per split, or else those of its subfolders.

    Raises:
        DataError: there are several, and none is called captions or metadata.
    """
    by_parent: dict[str, list[str]] = {"": []}
    for name in found:
        stem, suffix = posixpath.splitext(name.lower())
        is_named = posixpath.basename(stem) in TABLE_STEMS
        if suffix in (*SUFFIXES, ".parquet") and (is_named or "/" not in name):
            by_parent.setdefault(posixpath.dirname(name), []).append(name)
    own = by_parent.pop("")
    return _choose(folder, own) or [
        name for names in by_parent.values() for name in _choose(folder, names)
    ]


def _choose(folder: Path, tables: list[str]) -> list[str]:
    """Choose among the tables of one folder."""
    for stem in TABLE_STEMS:
        named = [name for name in tables if _stem(name).lower().rpartition("/")[2] == stem]
        if len(named) == 1:
            return named
    splits = {files.split_of(posixpath.basename(name)) for name in tables} - {None}
    if len(tables) > 1 and len(splits) < len(tables):
        listed = ", ".join(tables[:5]) + (", ..." if len(tables) > 5 else "")
        raise DataError(f"{folder}: contains several tables ({listed}); choose one with --captions")
    return tables


def report_unread(folder: Path, names: Iterable[str], used: Iterable[str]) -> None:
    """Count and name the files that are not read; warn of those that may be data.

    Args:
        folder: of the source.
        names: files that were not read.
        used: files that were read; what img2dataset writes beside them is not data.
    """
    stems = {part for name in used for part in (_stem(name), posixpath.dirname(name))}
    rest = [name for name in names if _stem(name).removesuffix("_stats") not in stems]
    data = [name for name in rest if _suffix(name) in _REMEDIES]
    if not rest:
        return
    kinds = Counter(_suffix(name) or "without suffix" for name in data or rest)
    listed = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(4))
    remedy = _REMEDIES.get(_suffix(data[0]), "") if data else ""
    (logger.warning if data else logger.info)(
        f"{folder}: {counted(len(data or rest), 'file')} not read ({listed}), such as "
        f"{', '.join((data or rest)[:3])}" + (f"; {remedy}" if remedy else "")
    )


def read_folder(
    folder: Path, found: Sizes, images: Sequence[str], *, caption_lines: bool
) -> Catalog:
    """Read images and the .txt, .caption or .json of the same stem; or texts alone.

    Images of the same stem share their captions, since a stem cannot say which one is meant. The
    texts are read together with their images.

    Args:
        folder: where the files are.
        found: the result of `files_below`.
        images: those of them that are images.
        caption_lines: each line of a text is a caption, rather than the whole text.

    Raises:
        DataError: there is neither an image nor a text.
    """
    stems = [_stem(name) for name in images]
    by_stem = _texts_by_stem(folder, found, {*images, *stems})
    if not images and not by_stem:
        raise DataError(
            f"{folder}: contains no images, captions (.txt), uncompressed tar or Parquet files; "
            "pass a folder or file that does"
        )
    read = {*images, *by_stem.values()}
    report_unread(folder, (name for name in found if name not in read), read)
    stems = stems or list(by_stem)
    texts = [
        by_stem.get(stem) or by_stem.get(name)
        for stem, name in zip(stems, images or stems, strict=True)
    ]
    captioned = len(texts) - texts.count(None)
    suffixes = " or ".join(sorted({_suffix(text) for text in texts if text})) or ".txt"
    description = f"folder of {captioned} {suffixes} files with captions"
    if images:
        _warn_of_stems(folder, images, stems, by_stem)
        count = counted(len(images), "image")
        description = f"folder of {count}, {captioned} of them with a {suffixes} of captions"
        if not captioned:
            _say_where_captions_may_be(folder, images)
    catalog = Catalog(folder, caption_lines=caption_lines)
    catalog.begin_file(str(folder))
    for label, text in zip(images or stems, texts, strict=True):
        size = None if text is None else _size(folder / text, found[text])
        catalog.add_text(label, label if images else None, text, size)
    return catalog.finish(description)


def _texts_by_stem(folder: Path, found: Sizes, images: Collection[str]) -> dict[str, str]:
    """Find the file of captions by stem or name; a .json only beside an image."""
    kinds: dict[str, dict[str, str]] = {suffix: {} for suffix in _TEXTS}
    for name in found:
        if (suffix := _suffix(name)) in kinds and (suffix != ".json" or _stem(name) in images):
            kinds[suffix][_stem(name)] = name
    first = next(iter(kinds[".json"].values()), None)
    try:
        content = files.read_bounded(folder / first, files.MAX_TEXT_BYTES) if first else b""
        has_captions = bool(captions_in_json(files.decode_text(content)))
    except DataError:
        has_captions = False
    return {
        stem: name
        for suffix, own in kinds.items()
        if suffix != ".json" or has_captions
        for stem, name in own.items()
    }


def _say_where_captions_may_be(folder: Path, images: Sequence[str]) -> None:
    for stem in () if is_remote(folder) else TABLE_STEMS:
        for suffix in (*_TABLES, ".txt", ".parquet"):
            if files.is_file(other := folder.absolute().parent / f"{stem}{suffix}"):
                logger.warning(
                    f"{folder}: has no captions, and {other} is not read; pass it with --captions"
                )
                return
    classes = sorted({posixpath.basename(posixpath.dirname(name)) for name in images})
    if len(classes) > 1 and all(name.strip("0123456789_-") for name in classes):
        listed = ", ".join(classes[:3]) + (", ..." if len(classes) > 3 else "")
        logger.info(
            f"{folder}: names of folders ({listed}) are not captions; if they are classes, pass a "
            "table of image and caption with --captions"
        )


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


def _size(path: Path, known: int | None) -> int:
    try:
        return path.stat().st_size if known is None else known
    except OSError:
        return -1  # its record has the reason


def _stem(name: str) -> str:
    return posixpath.splitext(name)[0]


def _suffix(name: str) -> str:
    return posixpath.splitext(name)[1].lower()


def _is_image(path: Path) -> bool:
    try:
        if not files.is_file(path):
            return False
        with path.open("rb") as file:
            return pictures.is_image(file.read(16))
    except OSError:
        return False
