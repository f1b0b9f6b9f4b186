"""A captions table and the images that it speaks of, joined by path and never by position."""

import logging
import os
import posixpath
import re
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeAlias

from csalign.errors import ConfigError, DataError
from csalign.sources import images, tables
from csalign.sources.tables import Columns, Row

logger = logging.getLogger(__name__)

Integers: TypeAlias = "array[int]"  # not subscriptable before Python 3.12
_NO_IMAGE = -1


class ImageRecord(NamedTuple):
    """An image: its id is its path below the folder, with ``/`` and its suffix."""

    id: str
    path: Path
    split: str | None


class TextRecord(NamedTuple):
    """A caption: of the image `image_id`, or of none; `row` is its line in the table."""

    id: str
    image_id: str | None
    caption: str
    split: str | None
    row: int


@dataclass(frozen=True)
class CaptionSource:
    """Images and texts of a SOURCE, checked and ready to be gone through.

    Held column by column, since a record a row would weigh several times as much.

    Attributes:
        root: folder that image paths start from.
        table: the captions table.
        image_ids: of the table in its order, then those that it does not mention, by path.
        image_splits: split of each image.
        captions: in the order of the table.
        owners: position of each caption's image in `image_ids`, -1 for none.
        ordinals: each caption's number, from 0, among those of its image or, without an image, of
            its row.
        caption_splits: split of each caption.
        rows: line of each caption in the table.
    """

    root: Path
    table: Path
    image_ids: list[str]
    image_splits: list[str | None]
    captions: list[str]
    owners: Integers
    ordinals: Integers
    caption_splits: list[str | None]
    rows: Integers

    def images(self) -> Iterator[ImageRecord]:
        """The images, in order."""
        for image_id, split in zip(self.image_ids, self.image_splits, strict=True):
            yield ImageRecord(image_id, self.root / image_id, split)

    def texts(self) -> Iterator[TextRecord]:
        """The texts, in the order of the table."""
        columns = (self.captions, self.owners, self.ordinals, self.caption_splits, self.rows)
        for caption, owner, ordinal, split, row in zip(*columns, strict=True):
            if owner == _NO_IMAGE:
                suffix = f"#{ordinal}" if ordinal else ""
                yield TextRecord(f"caption:{row}{suffix}", None, caption, split, row)
            else:
                image_id = self.image_ids[owner]
                yield TextRecord(f"{image_id}#{ordinal}", image_id, caption, split, row)


def read_captions(
    source: Path, *, captions: Path | None = None, columns: Columns | None = None
) -> CaptionSource:
    """Read SOURCE: a captions table, or a folder of images with a captions table.

    Args:
        source: a table, whose image paths start from its own folder; or a folder, which image
            paths start from and whose other images have no caption.
        captions: the table, where `source` is a folder and does not hold exactly one.
        columns: which of the table's columns hold what (default: recognised).

    Raises:
        ConfigError: `captions` is given although `source` is a table itself.
        DataError: something is missing, malformed or contradicts itself; the message names the
            file, the row and the remedy.
    """
    for path in (source, captions):
        if path is not None and re.match(r"[\w+.-]{2,}:/", str(path)):
            raise DataError(f"{path}: URLs are not fetched; download it and give a local path")
    if not source.exists():
        raise DataError(f"{source}: no such file or folder")
    if not source.is_dir():
        if captions is not None:
            raise ConfigError(f"captions: {source} is a table already; give the folder as SOURCE")
        table, root, found = _checked_table(source), source.parent, []
    else:
        table = _checked_table(captions) if captions else _table_in(source)
        root, found = source, _image_ids_in(source)
    reader = _Reader(root, table, found)
    for row in tables.read_rows(table, columns or Columns()):
        reader.add(row)
    return reader.finish()


def _checked_table(table: Path) -> Path:
    if not table.is_file():
        raise DataError(f"{table}: no such file; give a captions table")
    if table.suffix.lower() not in tables.SUFFIXES:
        raise DataError(f"{table}: is no captions table; give a .csv, .tsv or .jsonl file")
    return table


def _table_in(folder: Path) -> Path:
    found = sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in tables.SUFFIXES and path.is_file() and path.name[0] != "."
    )
    named = [path for path in found if path.stem.lower() == "captions"]
    for candidates in (named, found):
        if len(candidates) == 1:
            return candidates[0]
    if not found:
        raise DataError(
            f"{folder}: holds no captions table (.csv, .tsv or .jsonl); give one with --captions"
        )
    names = ", ".join(path.name for path in found[:5]) + (", ..." if len(found) > 5 else "")
    raise DataError(f"{folder}: holds several tables ({names}); choose one with --captions")


def _image_ids_in(folder: Path) -> list[str]:
    ids = []
    for parent, folders, names in os.walk(folder, onerror=_raise_unreadable):
        # Hidden entries are what editors and file managers leave behind, such as ._photo.jpg.
        folders[:] = [name for name in folders if name[0] != "."]
        for name in names:
            if name[0] != "." and Path(name).suffix.lower() in images.SUFFIXES:
                ids.append(Path(parent, name).relative_to(folder).as_posix())
    if not ids:
        raise DataError(f"{folder}: holds no images")
    for image_id in ids:
        if not _is_text(image_id):
            raise DataError(f"{folder}: file name {image_id!r} is not UTF-8; rename the file")
    return sorted(ids)


def _raise_unreadable(error: OSError) -> None:
    raise DataError(f"{error.filename}: cannot be read ({error.strerror})") from None


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


class _Reader:
    """Builds a `CaptionSource` row by row, with what is needed to check the rows.

    Args:
        root: folder that image paths start from.
        table: the captions table, for messages.
        found: images that are known to exist, whether or not a row mentions them.
    """

    def __init__(self, root: Path, table: Path, found: list[str]) -> None:
        self._source = CaptionSource(
            root, table, [], [], [], array("q"), array("q"), [], array("q")
        )
        self._found = dict.fromkeys(found)
        self._positions: dict[str, int] = {}
        self._first_rows = array("q")
        self._caption_counts = array("q")
        self._seen: set[tuple[int, str]] = set()
        self._repeated = self._blank = self._unknown = 0
        self._first_unknown = ""

    def add(self, row: Row) -> None:
        """Take in a row.

        Raises:
            DataError: its image path is not allowed, or its split contradicts an earlier row.
        """
        owner = self._owner(row) if row.image else _NO_IMAGE
        if owner == _NO_IMAGE and not row.captions:
            self._blank += 1
        for position, caption in enumerate(row.captions):
            self._add_caption(row, owner, position, caption)

    def finish(self) -> CaptionSource:
        """Add the images that no row mentions, and tell of what was noticed on the way.

        Raises:
            DataError: rows name images that do not exist, or there is no image at all.
        """
        source = self._source
        if self._unknown:
            raise DataError(
                f"{self._first_unknown} ({self._unknown} such images in all); correct the path, "
                f"which starts from {source.root}, or remove the row"
            )
        for image_id in self._found:
            if image_id not in self._positions:
                source.image_ids.append(image_id)
                source.image_splits.append(None)
        if not source.image_ids:
            raise DataError(f"{source.table}: names no image; fill in the image column")
        if self._repeated:
            logger.warning("%s: %d repeated captions were kept once", source.table, self._repeated)
        if self._blank:
            logger.warning("%s: %d rows without image and caption", source.table, self._blank)
        return source

    def _add_caption(self, row: Row, owner: int, position: int, caption: str) -> None:
        ordinal = position
        if owner != _NO_IMAGE:
            if (owner, caption) in self._seen:
                self._repeated += 1
                return
            self._seen.add((owner, caption))
            ordinal = self._caption_counts[owner]
            self._caption_counts[owner] += 1
        source = self._source
        source.captions.append(caption)
        source.owners.append(owner)
        source.ordinals.append(ordinal)
        source.caption_splits.append(row.split)
        source.rows.append(row.number)

    def _owner(self, row: Row) -> int:
        position = self._positions.get(row.image)
        if position is None:  # a new image, or another spelling of a known one
            image_id = self._image_id(row)
            position = self._positions.get(image_id)
            if position is None:
                return self._add_image(image_id, row)
        split = self._source.image_splits[position]
        if split != row.split:
            raise DataError(
                f"{self._source.table}: image {row.image} is in split {split or 'none'} in row "
                f"{self._first_rows[position]} and in {row.split or 'none'} in row {row.number}; "
                "give all its rows the same split"
            )
        return position

    def _add_image(self, image_id: str, row: Row) -> int:
        source = self._source
        if image_id not in self._found and not (source.root / image_id).is_file():
            self._unknown += 1
            if self._unknown == 1:
                where = f"{source.table}, row {row.number}"
                self._first_unknown = f"{where}: unknown image {row.image!r}"
        position = len(source.image_ids)
        source.image_ids.append(image_id)
        source.image_splits.append(row.split)
        self._positions[image_id] = position
        self._first_rows.append(row.number)
        self._caption_counts.append(0)
        return position

    def _image_id(self, row: Row) -> str:
        where = f"{self._source.table}, row {row.number}: image {row.image!r}"
        if "://" in row.image:
            raise DataError(f"{where} is a URL, which is not fetched; download it first")
        path = row.image
        if Path(path).is_absolute():
            path = os.path.relpath(path, self._source.root)
        image_id = posixpath.normpath(path.replace(os.sep, "/"))
        if image_id == ".." or image_id.startswith("../"):
            raise DataError(f"{where} lies outside of {self._source.root}; move it inside")
        return image_id
