"""A folder of images with a .txt of captions beside each, of images alone, or of .txt alone."""

import logging
import posixpath
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from csalign.core.errors import DataError
from csalign.sources.images import SUFFIXES
from csalign.sources.records.catalog import Catalog

logger = logging.getLogger(__name__)


def images_in(files: Collection[str]) -> list[str]:
    """Select the files that are images by their suffix, whatever its case."""
    return [name for name in files if posixpath.splitext(name)[1].lower() in SUFFIXES]


def read_folder(folder: Path, files: Mapping[str, int | None], *, caption_lines: bool) -> Catalog:
    """Find the images of a folder and the .txt of the same stem; or its .txt alone.

    Images of the same stem share their captions, since a stem cannot say which one is meant. The
    .txt are read together with their images.

    Args:
        folder: where the files are.
        files: the result of `files_below`.
        caption_lines: each line of a .txt is a caption, rather than the whole text.

    Raises:
        DataError: there is neither an image nor a .txt.
    """
    by_stem = {posixpath.splitext(name)[0]: name for name in files if name.lower().endswith(".txt")}
    images = images_in(files)
    if not images and not by_stem:
        raise DataError(
            f"{folder}: contains no images, captions (.txt), uncompressed tar or Parquet files; "
            "pass a folder or file that does"
        )
    stems = [posixpath.splitext(name)[0] for name in images] or list(by_stem)
    captioned = sum(stem in by_stem for stem in stems)
    description = f"folder of {captioned} .txt files with captions"
    if images:
        _warn_of_stems(folder, images, stems, by_stem)
        description = f"folder of {len(images)} images, {captioned} of them with a .txt of captions"
    catalog = Catalog(folder, caption_lines=caption_lines)
    catalog.begin_file(str(folder))
    for label, stem in zip(images or stems, stems, strict=True):
        text = by_stem.get(stem)
        size = None if text is None else _size(folder / text, files[text])
        catalog.add_text(label, label if images else None, text, size)
    return catalog.finish(description)


def _warn_of_stems(
    folder: Path, found: Sequence[str], stems: Sequence[str], texts: Mapping[str, str]
) -> None:
    unused = [texts[stem] for stem in texts.keys() - set(stems)]
    if unused:
        logger.warning(
            f"{folder}: {len(unused)} .txt files are omitted, as no image has their stem "
            f"({min(unused)})"
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
