"""Records gathered in memory from rows that may name an image anywhere."""

import hashlib
import logging
import posixpath
from array import array
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from csalign.core.enums import Modality
from csalign.core.errors import DataError
from csalign.core.paths import is_remote
from csalign.sources.records import ImageInput, IndexedFile, Record, SourceFile, TextInput
from csalign.sources.records.files import fingerprint, is_file, name_error, path_below, read_bounded
from csalign.sources.records.tables import BASE64_NAMES, Row
from csalign.sources.unreadable import LostVolume

logger = logging.getLogger(__name__)

_IMAGE, _CAPTION, _ERROR = range(3)
_MAX_PATH_LENGTH = 4096


class _File(NamedTuple):
    name: str
    prefix: str
    start: int  # its first record
    is_unreadable: bool = False


class Catalog:
    """A `Source` that gathers rows to records, in columns of some hundred bytes per row.

    Begin each file, add its rows, and call `finish` before reading. Records come in the order of
    their first rows. The captions of an image are gathered wherever their rows are; a row that
    contradicts an earlier one becomes a record with an error.

    Args:
        root: folder that image paths start from; None for the working directory, which paths may
            leave.
        load: return the bytes of a base64 image by the offset of its row; None where the rows
            cannot be read again.
    """

    def __init__(self, root: Path | None, load: Callable[[int], bytes] | None = None) -> None:
        self.description = ""
        self.fingerprint = ""
        self._root = root
        self._load = load
        self._digest = hashlib.sha256()
        self._files: list[_File] = []
        # By record: image id, prefix of captions' ids or error; kind; row or 0; split.
        self._labels: list[str] = []
        self._kinds = bytearray()
        self._rows = array("q")
        self._splits: list[str | None] = []
        self._places: dict[int, str] = {}  # path or digest, where it is not the id
        self._offsets: dict[int, int] = {}  # of rows with base64 images
        # By caption, in order of rows.
        self._captions: list[str] = []
        self._owners = array("q")
        self._caption_rows = array("q")
        # Set by `finish`: captions by record, and where those of each record start.
        self._order = np.empty(0, np.int64)
        self._starts = np.empty(0, np.int64)
        self._positions: dict[str, int] = {}
        self._split_names: dict[str | None, str | None] = {}
        self._blank_rows = 0

    def begin_file(self, name: str, prefix: str = "") -> None:
        """Start a file; `prefix` makes ids from its row numbers unique among several files."""
        self._digest.update(prefix.encode())
        self._files.append(_File(name, prefix, len(self._labels)))

    def add_unreadable_file(self, name: str, reason: str) -> None:
        """Add a file that cannot be read at all."""
        self._files.append(_File(name, "", len(self._labels), is_unreadable=True))
        self._append(_ERROR, reason, 0, None)

    def add(self, row: Row) -> None:
        """Add a row."""
        self._digest.update(repr(row).encode())
        try:
            if row.error is not None:
                raise DataError(row.error)
            owner = self._add_image(row) if row.image else self._add_captions(row)
        except DataError as error:
            self._append(_ERROR, str(error), row.number, None)
            return
        for caption in row.captions:
            self._captions.append(caption)
            self._owners.append(owner)
            self._caption_rows.append(row.number)

    def add_found(self, image_ids: Iterable[str]) -> None:
        """Add the images of a folder that no row names."""
        for image_id in image_ids:
            self._digest.update(repr(image_id).encode())
            error = name_error(image_id)
            if error is not None:
                self._append(_ERROR, error, 0, None)
            elif image_id not in self._positions:
                self._positions[image_id] = self._append(_IMAGE, image_id, 0, None)

    def finish(self, description: str) -> "Catalog":
        """Sort the captions by record, and warn of repeated captions and blank rows.

        Raises:
            DataError: there are no records.
        """
        name = self._files[0].name
        if not self._labels:
            raise DataError(f"{name}: names no image and no caption; fill in its columns")
        if self._blank_rows:
            logger.warning("%s: %d rows without image and caption", name, self._blank_rows)
        self.description = description
        self.fingerprint = self._digest.hexdigest()
        self._positions.clear()
        owners = np.array(self._owners, np.int64)
        self._order = np.argsort(owners, kind="stable")
        self._starts = np.searchsorted(owners[self._order], np.arange(len(self._labels) + 1))
        several: list[int] = np.flatnonzero(np.diff(self._starts) > 1).tolist()
        captions = [self._own(record) for record in several if self._kinds[record] == _IMAGE]
        repeated = sum(len(own) - len({self._captions[k] for k in own}) for own in captions)
        if repeated:
            logger.warning("%s: %d repeated captions were kept once", name, repeated)
        return self

    @property
    def files(self) -> Sequence[str]:
        """See `Source`."""
        return [file.name for file in self._files]

    @property
    def sides(self) -> Collection[Modality]:
        """See `Source`; exact, since all records are known."""
        present = {Modality.IMAGE: _IMAGE in self._kinds, Modality.TEXT: bool(self._captions)}
        return tuple(side for side, is_present in present.items() if is_present)

    @property
    def total(self) -> int:
        """See `Source`."""
        return len(self._labels)

    @property
    def total_images(self) -> int:
        """See `Source`."""
        return self._kinds.count(_IMAGE)

    def fingerprint_of(self, position: int, start: int, stop: int) -> str:
        """See `Source`: all that is known of the records."""
        if self._offsets:
            return self.fingerprint  # the images themselves are in the rows
        first, last = self._range(position)
        return fingerprint(
            (
                *(self._kinds[record], self._labels[record], self._places.get(record)),
                self._splits[record],
                *(self._captions[k] for k in self._own(record)),
            )
            for record in range(first + start, min(first + stop, last))
        )

    @contextmanager
    def open(self, position: int) -> Iterator[SourceFile]:
        """See `Source`."""
        file, (start, stop) = self._files[position], self._range(position)
        if file.is_unreadable:
            yield LostVolume(file.name, self._labels[start])
        else:
            yield IndexedFile(file.name, partial(self._record, file.name), start, stop)

    def _record(self, file: str, position: int) -> Record:
        kind, label = self._kinds[position], self._labels[position]
        row = self._rows[position] or None
        if kind == _ERROR:
            return Record(None, row=row, error=label)
        image = None
        if position in self._offsets:
            assert self._load is not None
            read = partial(self._load, self._offsets[position])
            image = ImageInput(label, f"{file}/{row}", read)
        elif kind == _IMAGE:
            place = self._places.get(position, label)
            path = Path(place) if self._root is None else self._root / place
            # A remote file is looked up when it is read, which saves a request.
            if row is not None and not is_remote(path) and not is_file(path):
                start = "the working directory" if self._root is None else self._root
                error = (
                    f"unknown image {place!r:.200}; correct the path, which starts from {start}, "
                    "or remove the row"
                )
                return Record(None, row=row, error=error)
            image = ImageInput(label, path.as_posix(), partial(read_bounded, path))
        texts: dict[str, TextInput] = {}
        for k in self._own(position):
            suffix = f"#{len(texts)}" if texts or kind == _IMAGE else ""
            text = TextInput(f"{label}{suffix}", self._captions[k], self._caption_rows[k])
            texts.setdefault(text.caption, text)
        return Record(image, tuple(texts.values()), self._splits[position], row)

    def _own(self, record: int) -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
        return self._order[self._starts[record] : self._starts[record + 1]]

    def _range(self, position: int) -> tuple[int, int]:
        starts = [file.start for file in self._files[position : position + 2]]
        return starts[0], starts[1] if len(starts) > 1 else len(self._labels)

    def _add_image(self, row: Row) -> int:
        place = self._path(row) if row.offset is None else _digest_of(row, self._load)
        key = row.id or (place if row.offset is None else f"row:{row.number}")
        position = self._positions.get(key)
        if position is None:
            position = self._append(_IMAGE, key, row.number, row.split)
            self._positions[key] = position
            if row.offset is not None:
                self._offsets[position] = row.offset
            if key != place:
                self._places[position] = place
            return position
        first = self._rows[position]
        if self._places.get(position, key) != place:
            raise DataError(
                f"has the id {key!r:.200} of another image, in row {first}; ids are unique"
            )
        split = self._splits[position]
        if split != row.split:
            raise DataError(
                f"image {key[:200]} is in split {split or 'none'} in row {first} and in "
                f"{row.split or 'none'} in row {row.number}; give all its rows the same split"
            )
        return position

    def _path(self, row: Row) -> str:
        if len(row.image) > _MAX_PATH_LENGTH:
            raise DataError(
                f"has an image path of {len(row.image)} characters; if it is an image in base64, "
                f"call its column {BASE64_NAMES[0]}"
            )
        if row.image in self._positions and row.id is None:
            return row.image  # an earlier row was checked
        if self._root is not None:
            return path_below(self._root, row.image)
        if "://" in row.image or "\0" in row.image:
            raise DataError(f"image {row.image!r:.200} is not a file; URLs are not fetched")
        return posixpath.normpath(row.image)

    def _add_captions(self, row: Row) -> int:
        if not row.captions:
            self._blank_rows += 1
            return -1
        label = row.id or f"{self._files[-1].prefix}caption:{row.number}"
        if row.id is not None:
            first = self._positions.setdefault(label, len(self._labels))
            if first != len(self._labels):
                raise DataError(
                    f"has the id {label!r:.200} of row {self._rows[first]}; ids are unique"
                )
        return self._append(_CAPTION, label, row.number, row.split)

    def _append(self, kind: int, label: str, row: int, split: str | None) -> int:
        self._labels.append(label)
        self._kinds.append(kind)
        self._rows.append(row)
        self._splits.append(self._split_names.setdefault(split, split))  # one object per name
        return len(self._labels) - 1


def _digest_of(row: Row, load: object) -> str:
    if load is None:
        raise DataError("has an image in base64, which is supported only in .csv, .tsv and .jsonl")
    return hashlib.sha256(row.image.encode()).hexdigest()
