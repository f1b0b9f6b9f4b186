"""Records gathered in memory from rows that may speak of an image anywhere: one volume a table."""

import logging
import posixpath
from array import array
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np

from csalign.core.enums import Modality
from csalign.core.errors import DataError
from csalign.core.paths import is_remote
from csalign.sources.records.base import ImageInput, Record, TextInput, Volume
from csalign.sources.records.columns import BASE64_NAMES, Row
from csalign.sources.records.tree import fingerprint, is_file, name_flaw, path_below, read_bounded
from csalign.sources.unreadable import LostVolume

logger = logging.getLogger(__name__)

Integers: TypeAlias = "array[int]"  # not subscriptable before Python 3.12
Load: TypeAlias = Callable[[tuple[int, int]], bytes]
_IMAGE, _CAPTION, _FLAW = range(3)
_LONGEST_PATH = 4096


class Catalog:
    """Gathers rows to records and keeps them column by column, some hundred bytes a row.

    Records come in the order of their first rows. An image's captions are gathered wherever their
    rows are; a row that contradicts an earlier one becomes a record with a flaw.

    Args:
        root: folder that image paths start from; None for that of the process, where paths may
            also lead elsewhere.
        load: gives the bytes of an image by the span of its row, where images are not files.
    """

    def __init__(self, root: Path | None, load: Load | None = None) -> None:
        self._root = root
        self._load = load
        self._volumes: list[_Part] = []
        self._labels: list[str] = []  # an image's id, the start of captions' ids, or a flaw
        self._kinds = bytearray()
        self._rows = array("q")
        self._splits = array("i")
        self._split_codes: dict[str | None, int] = {}
        self._split_names: list[str | None] = []
        self._places: dict[int, str | tuple[int, int]] = {}  # of images whose path is not their id
        self._captions: list[str] = []
        self._owners = array("q")
        self._caption_rows = array("q")
        self._positions: dict[str, int] = {}
        self._blank = 0

    def begin(self, name: str, prefix: str = "") -> None:
        """Start a volume, which the rows that follow are numbered in.

        Args:
            name: the file, for messages.
            prefix: what makes ids from row numbers unique among several volumes.
        """
        self._volumes.append(_Part(name, prefix, len(self._labels)))

    def lose(self, name: str, reason: str) -> None:
        """Take in a volume that cannot be read at all."""
        self._volumes.append(_Part(name, "", len(self._labels), is_lost=True))
        self._new(_FLAW, reason, 0, None)

    def add(self, row: Row) -> None:
        """Take in a row."""
        try:
            if row.flaw is not None:
                raise DataError(row.flaw)
            owner = self._image(row) if row.image else self._caption_alone(row)
        except DataError as error:
            self._new(_FLAW, str(error), row.number, None)
            return
        for caption in row.captions:
            self._captions.append(caption)
            self._owners.append(owner)
            self._caption_rows.append(row.number)

    def add_found(self, image_ids: Iterable[str]) -> None:
        """Add the images of a folder that no row spoke of."""
        for image_id in image_ids:
            flaw = name_flaw(image_id)
            if flaw is not None:
                self._new(_FLAW, flaw, 0, None)
            elif image_id not in self._positions:
                self._positions[image_id] = self._new(_IMAGE, image_id, 0, None)

    def finish(self, description: str, fingerprint: str) -> "CatalogSource":
        """The source that the rows make; what was noticed on the way is logged.

        Raises:
            DataError: there was nothing at all.
        """
        where = self._volumes[0].name
        if not self._labels:
            raise DataError(f"{where}: names no image and no caption; fill in its columns")
        if self._blank:
            logger.warning("%s: %d rows without image and caption", where, self._blank)
        self._positions.clear()
        owners = np.frombuffer(self._owners, np.int64) if self._owners else np.empty(0, np.int64)
        order = np.argsort(owners, kind="stable")
        starts = np.searchsorted(owners[order], np.arange(len(self._labels) + 1))
        source = CatalogSource(
            *(description, fingerprint, self._root, self._load, self._volumes, self._labels),
            *(self._kinds, self._rows, self._splits, self._split_names, self._places),
            *(self._captions, self._caption_rows, order, starts),
        )
        repeated = source.repeated_captions()
        if repeated:
            logger.warning("%s: %d repeated captions were kept once", where, repeated)
        return source

    def _image(self, row: Row) -> int:
        if row.span is None:
            place, known = self._path(row)
        else:
            place, known = f"row:{row.number}", row.id
            if self._load is None:
                raise DataError("has an image in base64, which is read from files alone")
        key = known or place
        position = self._positions.get(key)
        if position is None:
            position = self._new(_IMAGE, key, row.number, row.split)
            self._positions[key] = position
            if row.span is not None:
                self._places[position] = row.span
            elif key != place:
                self._places[position] = place
            return position
        first = self._rows[position]
        if not self._is_same_image(position, key, place, row.span):
            raise DataError(
                f"has the id {key!r:.200} of another image, in row {first}; ids are unique"
            )
        split = self._split_names[self._splits[position]]
        if split != row.split:
            raise DataError(
                f"image {key[:200]} is in split {split or 'none'} in row {first} and in "
                f"{row.split or 'none'} in row {row.number}; give all its rows the same split"
            )
        return position

    def _is_same_image(
        self, position: int, key: str, place: str, span: tuple[int, int] | None
    ) -> bool:
        known = self._places.get(position, key)
        if span is None or isinstance(known, str):
            return span is None and known == place
        assert self._load is not None
        return self._load(known) == self._load(span)

    def _path(self, row: Row) -> tuple[str, str | None]:
        if len(row.image) > _LONGEST_PATH:
            raise DataError(
                f"has an image path of {len(row.image)} characters; if it is an image in base64, "
                f"call its column {BASE64_NAMES[0]}"
            )
        if row.image in self._positions and row.id is None:
            return row.image, None  # as an earlier row spelled it, which was checked
        if self._root is not None:
            return path_below(self._root, row.image), row.id
        if "://" in row.image or "\0" in row.image:
            raise DataError(f"image {row.image!r:.200} is no file; URLs are not fetched")
        return posixpath.normpath(row.image), row.id

    def _caption_alone(self, row: Row) -> int:
        if not row.captions:
            self._blank += 1
            return -1
        label = row.id or f"{self._volumes[-1].prefix}caption:{row.number}"
        if row.id is not None:
            first = self._positions.setdefault(label, len(self._labels))
            if first != len(self._labels):
                raise DataError(
                    f"has the id {label!r:.200} of row {self._rows[first]}; ids are unique"
                )
        return self._new(_CAPTION, label, row.number, row.split)

    def _new(self, kind: int, label: str, row: int, split: str | None) -> int:
        self._labels.append(label)
        self._kinds.append(kind)
        self._rows.append(row)
        code = self._split_codes.setdefault(split, len(self._split_names))
        if code == len(self._split_names):
            self._split_names.append(split)
        self._splits.append(code)
        return len(self._labels) - 1


class _Part(NamedTuple):
    name: str
    prefix: str
    start: int
    is_lost: bool = False


@dataclass(frozen=True)
class CatalogSource:
    """What a `Catalog` gathered, as a `Source`.

    Attributes:
        description: see `Source`.
        fingerprint: see `Source`.
        root: see `Catalog`.
        load: see `Catalog`.
        parts: its volumes and the first record of each.
        labels: of each record, an image's id, the start of its captions' ids, or its flaw.
        kinds: of each record.
        rows: of each record, 0 for none.
        splits: of each record, as positions in `split_names`.
        split_names: all that occur.
        places: path or span of the images whose path is not their id, by record.
        captions: of all records.
        caption_rows: of each caption.
        order: captions by record, and by row in each.
        starts: of each record in `order`, and the end.
    """

    description: str
    fingerprint: str
    root: Path | None
    load: Load | None
    parts: Sequence[_Part]
    labels: Sequence[str]
    kinds: bytearray
    rows: Integers
    splits: Integers
    split_names: Sequence[str | None]
    places: dict[int, str | tuple[int, int]]
    captions: Sequence[str]
    caption_rows: Integers
    order: "np.ndarray[tuple[int], np.dtype[np.int64]]"
    starts: "np.ndarray[tuple[int], np.dtype[np.int64]]"

    @property
    def volumes(self) -> Sequence[str]:
        """See `Source`."""
        return [part.name for part in self.parts]

    @property
    def sides(self) -> Collection[Modality]:
        """See `Source`; exact, since all is known."""
        sides = {Modality.IMAGE: _IMAGE in self.kinds, Modality.TEXT: bool(self.captions)}
        return tuple(side for side, there in sides.items() if there)

    @property
    def total(self) -> int | None:
        """See `Source`."""
        return len(self.labels)

    @property
    def total_images(self) -> int | None:
        """See `Source`."""
        return self.kinds.count(_IMAGE)

    def stamp(self, position: int, start: int, stop: int) -> str:
        """See `Source`: all that is known of the records."""
        if self._holds_images:
            return self.fingerprint  # their bytes are not held here, but the whole was hashed
        part = self.parts[position]
        last = min(part.start + stop, self._stop(position))
        return fingerprint(self._content(record) for record in range(part.start + start, last))

    @cached_property
    def _holds_images(self) -> bool:
        """Whether there are images that lie in the table itself."""
        return any(not isinstance(place, str) for place in self.places.values())

    def _content(self, record: int) -> tuple[object, ...]:
        own = self.order[self.starts[record] : self.starts[record + 1]]
        return (
            *(self.kinds[record], self.labels[record], self.places.get(record)),
            self.split_names[self.splits[record]],
            *(self.captions[place] for place in own),
        )

    def _stop(self, position: int) -> int:
        after = self.parts[position + 1 : position + 2]
        return after[0].start if after else len(self.labels)

    @contextmanager
    def open(self, position: int) -> Iterator[Volume]:
        """See `Source`."""
        part = self.parts[position]
        if part.is_lost:
            yield LostVolume(part.name, self.labels[part.start])
            return
        yield _CatalogVolume(self, part, self._stop(position))

    def repeated_captions(self) -> int:
        """Captions that an image has more than once, which its record gives once."""
        count = 0
        for record, (start, stop) in enumerate(zip(self.starts, self.starts[1:], strict=False)):
            if stop - start > 1 and self.kinds[record] == _IMAGE:
                captions = [self.captions[place] for place in self.order[start:stop]]
                count += len(captions) - len(set(captions))
        return count

    def record(self, position: int, volume: str) -> Record:
        """One of all volumes' records."""
        kind, label = self.kinds[position], self.labels[position]
        row = self.rows[position] or None
        if kind == _FLAW:
            return Record(None, row=row, flaw=label)
        image = None
        if kind == _IMAGE:
            place = self.places.get(position, label)
            if isinstance(place, str):
                path = Path(place) if self.root is None else self.root / place
                # A remote file is looked for when it is read, rather than asked for twice.
                if row is not None and not is_remote(path) and not is_file(path):
                    flaw = f"unknown image {place!r:.200}; correct the path, {self._start()}"
                    return Record(None, row=row, flaw=flaw)
                image = ImageInput(label, path.as_posix(), partial(read_bounded, path))
            else:
                assert self.load is not None
                image = ImageInput(label, f"{volume}/{row}", partial(self.load, place))
        split = self.split_names[self.splits[position]]
        return Record(image, tuple(self._texts(position, label, kind)), split, row)

    def _start(self) -> str:
        start = "the working directory" if self.root is None else self.root
        return f"which starts from {start}, or remove the row"

    def _texts(self, position: int, label: str, kind: int) -> Iterator[TextInput]:
        seen: dict[str, None] = {}
        for place in self.order[self.starts[position] : self.starts[position + 1]]:
            caption = self.captions[place]
            if caption in seen:
                continue
            ordinal = len(seen)
            seen[caption] = None
            suffix = f"#{ordinal}" if ordinal or kind == _IMAGE else ""
            yield TextInput(f"{label}{suffix}", caption, self.caption_rows[place])


class _CatalogVolume:
    def __init__(self, source: CatalogSource, part: _Part, stop: int) -> None:
        self.name = part.name
        self._source = source
        self._start = part.start
        self._stop = stop

    def __len__(self) -> int:
        return self._stop - self._start

    def records(self, start: int, stop: int) -> Iterator[Record]:
        for position in range(self._start + start, min(self._start + stop, self._stop)):
            yield self._source.record(position, self.name)
