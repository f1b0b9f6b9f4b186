"""Records gathered in memory from rows that may name an image anywhere."""

import hashlib
import logging
import os
import posixpath
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from csalign.core.enums import Modality
from csalign.core.errors import DataError
from csalign.core.paths import is_remote, likely_meant, respelled
from csalign.sources.records import (
    ImageInput,
    IndexedFile,
    Record,
    SourceFile,
    TextInput,
    UnreadableFile,
    files,
)
from csalign.sources.records.cells import BASE64_NAMES, captions_in_text
from csalign.sources.records.tables import Row

logger = logging.getLogger(__name__)

_MAX_PATH_LENGTH = 4096


class _File(NamedTuple):
    name: str
    prefix: str
    start: int  # its first record
    load: Callable[[int], bytes] | None = None
    parent: str = ""
    is_unreadable: bool = False


@dataclass(slots=True)
class _Entry:
    """A record: `label` is the id of the image, or else what the ids of captions start with."""

    label: str
    row: int = 0
    split: str | None = None
    place: str | None = None  # path of an image, or digest of one in base64
    offset: int | None = None  # of the row of an image in base64
    error: str | None = None
    captions: list[tuple[str, int | None]] = field(default_factory=list)  # with their rows
    text: str | None = None  # file of captions, which is read later
    text_size: int | None = None


class Catalog:
    """A `Source` that gathers rows to records in memory.

    Begin each file, add its rows, and call `finish` before reading. Records come in the order of
    their first rows. The captions of an image are gathered wherever their rows are; a row that
    contradicts an earlier one becomes a record with an error. Image paths start from `root`; from
    the working directory without one, which they may leave.
    """

    def __init__(self, root: Path | None, *, caption_lines: bool = True) -> None:
        self.description = ""
        self.fingerprint = ""
        self._root = root
        self._caption_lines = caption_lines
        self._digest = hashlib.sha256(repr(caption_lines).encode())
        self._files: list[_File] = []
        self._entries: list[_Entry] = []
        self._by_id: dict[str, _Entry] = {}
        self._was_respelled = False
        self._found: list[str] = []
        self._stems: dict[str, dict[str, list[str]]] = {}  # files by stem, by folder
        self._blank_rows = self._rows = self._rows_without_caption = 0

    def begin_file(
        self,
        name: str,
        prefix: str = "",
        load: Callable[[int], bytes] | None = None,
        parent: str = "",
    ) -> None:
        """Start a file.

        `prefix` makes ids from its row numbers unique among several files, `load` returns a base64
        image by the offset of its row, and `parent` is where its image paths start below the root.
        """
        self._digest.update(prefix.encode())
        self._files.append(_File(name, prefix, len(self._entries), load, parent))

    def add_unreadable_file(self, name: str, reason: str) -> None:
        """Add a file that cannot be read at all."""
        self._files.append(_File(name, "", len(self._entries), is_unreadable=True))
        self._entries.append(_Entry("", error=reason))

    def add(self, row: Row) -> None:
        """Add a row."""
        self._digest.update(repr(row).encode())
        try:
            if row.error is not None:
                raise DataError(row.error)
            if row.image:
                entry = self._image(row)
            elif row.captions:
                entry = self._captions(row)
            else:
                self._blank_rows += 1
                return
            self._rows += 1
            self._rows_without_caption += row.lacks_caption
        except DataError as error:
            self._entries.append(_Entry("", row.number, error=str(error)))
            return
        entry.captions += [(caption, row.number) for caption in row.captions]

    def add_found(self, image_ids: Iterable[str]) -> None:
        """Add the images of a folder that no row names."""
        self._found = found = list(image_ids)
        known, named = set(found), {entry.place for entry in self._entries}
        inside = self._folder_inside(known, named) if known and known.isdisjoint(named) else None
        for entry in self._entries if known else ():
            if entry.place is not None and entry.offset is None and entry.place not in known:
                place = self._respelled(entry.place)
                if place is None and inside is not None and f"{inside}{entry.place}" in known:
                    place = f"{inside}{entry.place}"
                if place is not None and place not in named:
                    entry.place = place
                    self._by_id.setdefault(place, entry)
        for image_id in found:
            self._digest.update(repr(image_id).encode())
            if image_id not in self._by_id:
                error = files.name_error(image_id)
                self._entries.append(_Entry(image_id, place=image_id, error=error))

    def check_pairs(self) -> None:
        """Raise `DataError` if there are captions and images, and no caption has an image."""
        entries = [entry for entry in self._entries if entry.row]
        errors = [f", row {entry.row} {entry.error}" for entry in entries if entry.error]
        if any(self._is_there(entry) for entry in entries) or not entries:
            return
        unknown = (f", row {own.row} {self._unknown(own.place)}" for own in entries if own.place)
        errors += islice(unknown, 1)
        reason = (
            errors[0]
            if errors
            else (
                ": names no image; write image,caption with the file name of each image, or name "
                "the column of file names with --image-column"
            )
        )
        raise DataError(f"{self._files[0].name}{reason}")

    def _is_there(self, entry: _Entry) -> bool:
        if entry.place is None or entry.offset is not None or not self._found:
            return entry.place is not None
        path = (self._root or Path()) / entry.place
        return is_remote(path) or files.is_file(path)

    def add_text(self, label: str, place: str | None, text: str | None, size: int | None) -> None:
        """Add a record of an image, of a .txt of captions of some bytes, or of both."""
        error = files.name_error(label)
        entry = _Entry(label, place=place, error=error, text=text, text_size=size)
        self._digest.update(repr(entry).encode())
        self._entries.append(entry)

    def finish(self, description: str) -> "Catalog":
        """Complete the catalog, and warn of repeated captions and blank rows.

        Raises:
            DataError: there are no records.
        """
        name = self._files[0].name
        if not self._entries:
            raise DataError(
                f"{name}: has no row with an image or a caption (it is empty, or a heading alone); "
                "add rows with the columns image and caption"
            )
        self.description = description
        self.fingerprint = self._digest.hexdigest()
        self._by_id.clear()
        repeated = 0
        for entry in self._entries:
            if entry.place is not None and len(entry.captions) > 1:
                repeated += len(entry.captions) - len({text for text, _ in entry.captions})
        if not any(entry.split for entry in self._entries):
            self._split_by_folder()
        if self._blank_rows:
            logger.warning("%s: %d rows without image and caption", name, self._blank_rows)
        if self._rows_without_caption:
            logger.warning(
                "%s: %d of %d rows have no caption, or a missing value such as nan",
                *(name, self._rows_without_caption, self._rows),
            )
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
        has_texts = any(entry.captions or entry.text for entry in self._entries)
        present = {Modality.IMAGE: self.total_images > 0, Modality.TEXT: has_texts}
        return tuple(side for side, is_present in present.items() if is_present)

    @property
    def total(self) -> int:
        """See `Source`."""
        return len(self._entries)

    @property
    def total_images(self) -> int:
        """See `Source`."""
        return sum(entry.place is not None and entry.error is None for entry in self._entries)

    def fingerprint_of(self, position: int, start: int, stop: int) -> str:
        """See `Source`: all that is known of the records."""
        first, last = self._range(position)
        entries = self._entries[first + start : min(first + stop, last)]
        return files.fingerprint([self._caption_lines, *entries])

    @contextmanager
    def open(self, position: int) -> Iterator[SourceFile]:
        """See `Source`."""
        file, (start, stop) = self._files[position], self._range(position)
        if file.is_unreadable:
            yield UnreadableFile(file.name, str(self._entries[start].error))
        else:
            yield IndexedFile(file.name, partial(self._record, file), start, stop)

    def _split_by_folder(self) -> None:
        """Take the splits from the folders if all images lie in those of two or more splits."""
        entries = [entry for entry in self._entries if entry.place and entry.offset is None]
        if not entries and all(entry.text for entry in self._entries):
            splits = {entry.label: files.split_of(entry.label) for entry in self._entries}
            if len(names := {*splits.values()}) > 1 and None not in names:
                logger.info("%s: splits are taken from file names", self._root)
                for entry in self._entries:
                    entry.split = splits[entry.label]
        folders = {posixpath.dirname(str(entry.place)) for entry in entries}
        # The outermost, since a class may be called train too.
        splits = {folder: files.split_of(folder, inwards=True) for folder in folders}
        if len(names := set(splits.values())) > 1 and None not in names:
            # Images of the training split may lie in val2014, as those of Karpathy do.
            own = files.split_of(posixpath.basename(self._files[0].name))
            own = own if len(self._files) == 1 and any(entry.row for entry in entries) else None
            where = f"the name {self._files[0].name}" if own else "folder names"
            logger.info("%s: splits are taken from %s", self._root, where)
            for entry in entries:
                entry.split = (entry.row and own) or splits[posixpath.dirname(str(entry.place))]

    def _record(self, file: _File, position: int) -> Record:
        entry = self._entries[position]
        row = entry.row or None
        if entry.error is not None:
            return Record(None, row=row, error=entry.error)
        image = None
        if entry.offset is not None:
            assert file.load is not None
            image = ImageInput(entry.label, f"{file.name}/{row}", partial(file.load, entry.offset))
        elif entry.place is not None:
            path = Path(entry.place) if self._root is None else self._root / entry.place
            # A remote file is looked up when it is read, which saves a request.
            if row is not None and not is_remote(path) and not files.is_file(path):
                place = self._respelled(entry.place)
                if place is None:
                    return Record(None, row=row, error=self._unknown(entry.place))
                path = Path(self._root or "", place)
            read = partial(files.read_bounded, path)
            image = ImageInput(entry.label, path.as_posix(), read, is_named=True)
        captions = entry.captions
        if entry.text is not None and self._root is not None:
            try:
                content = files.decode_text(
                    files.read_bounded(self._root / entry.text, files.MAX_TEXT_BYTES)
                )
                found = captions_in_text(content, lines=self._caption_lines)
            except DataError as reason:
                return Record(None, error=f"its captions {entry.text}: {reason}")
            captions = [(text, None) for text in found]
            if not captions and image is None:
                return Record(None, error=f"{entry.text}: contains no caption")
        texts: dict[str, TextInput] = {}
        for caption, number in captions:
            suffix = f"#{len(texts)}" if texts or image or entry.text else ""
            texts.setdefault(caption, TextInput(f"{entry.label}{suffix}", caption, number))
        return Record(image, tuple(texts.values()), entry.split, row)

    def _unknown(self, place: str) -> str:
        """Say that an image is missing, with the remedy."""
        start = "the working directory" if self._root in (None, Path()) else self._root
        remedy = likely_meant(Path(place), self._root)
        if not remedy and (alike := self._by_stem(place)):
            remedy = f"; did you mean {' or '.join(map(repr, alike[:3]))}?"
        remedy = remedy or f"; correct the path, which starts from {start}, or remove the row"
        return f"unknown image {place!r:.200}{remedy}"

    def _respelled(self, place: str) -> str | None:
        """Find the only file that differs from a missing one in spelling alone; warn once."""
        if self._root is not None and is_remote(self._root):
            return None
        found = respelled(place, self._root)
        found = [own for own in found if files.is_file(Path(self._root or "", own))]
        found = found or self._by_stem(place)
        if len(found) != 1:
            return None
        if found[0] != place and not self._was_respelled:
            self._was_respelled = True
            logger.warning(
                "%s: image paths are spelled otherwise on the disk, and are read as there: %a is "
                "%a, and so on",
                *(self._files[0].name, place, found[0]),
            )
        return found[0]

    def _by_stem(self, place: str) -> list[str]:
        """List the images of a folder, or of all, that differ from a name in suffix or zeros."""
        folder, base = posixpath.split(place)
        if folder not in self._stems:
            names = [] if folder else self._found
            with suppress(OSError):
                names = names or os.listdir(Path(self._root or "", folder))  # noqa: PTH208
            index = self._stems[folder] = {}
            for name in sorted(names):
                if _stem(name) != name:
                    own = posixpath.join(folder, name)
                    index.setdefault(_stem(posixpath.basename(name)), []).append(own)
        return self._stems[folder].get(_stem(base), [])

    def _folder_inside(self, known: Collection[str], named: Collection[str | None]) -> str | None:
        """Find the only folder of images that the paths of all rows may start from; say so."""
        starts = {
            name[: -len(end)]
            for name in known
            for cut in range(1, name.count("/") + 1)
            if (end := name.split("/", cut)[-1]) in named
        }
        if len(starts) != 1:
            return None
        logger.info(
            "%s: image paths start from %s", self._files[0].name, f"{self._root}/{min(starts)}"
        )
        return min(starts)

    def _range(self, position: int) -> tuple[int, int]:
        starts = [file.start for file in self._files[position : position + 2]]
        return starts[0], starts[1] if len(starts) > 1 else len(self._entries)

    def _image(self, row: Row) -> _Entry:
        if row.offset is not None and self._files[-1].load is None:
            raise DataError("has an image in base64, which only .csv, .tsv and .jsonl may have")
        if row.offset is None:
            place = self._path(row)
        else:
            place = hashlib.sha256(row.image.encode()).hexdigest()
        prefix = self._files[-1].prefix
        key = row.id or (place if row.offset is None else f"{prefix}row:{row.number}")
        entry = self._by_id.get(key)
        if entry is None:
            split = row.split and sys.intern(row.split)
            entry = self._by_id[key] = _Entry(key, row.number, split, place, row.offset)
            self._entries.append(entry)
        elif entry.place != place:
            raise DataError(
                f"has the id {key!r:.200} of another image, in row {entry.row}; ids are unique"
            )
        elif entry.split != row.split:
            raise DataError(
                f"image {key[:200]} is in split {entry.split or 'none'} in row {entry.row} and in "
                f"{row.split or 'none'} in row {row.number}; give all its rows the same split"
            )
        return entry

    def _captions(self, row: Row) -> _Entry:
        if row.id is not None and row.id in self._by_id:
            first = self._by_id[row.id].row
            raise DataError(f"has the id {row.id!r:.200} of row {first}; ids are unique")
        label = row.id or f"{self._files[-1].prefix}caption:{row.number}"
        entry = _Entry(label, row.number, row.split)
        if row.id is not None:
            self._by_id[row.id] = entry
        self._entries.append(entry)
        return entry

    def _path(self, row: Row) -> str:
        if len(row.image) > _MAX_PATH_LENGTH:
            raise DataError(
                f"has an image path of {len(row.image)} characters; if it is an image in base64, "
                f"call its column {BASE64_NAMES[0]}"
            )
        if (parent := self._files[-1].parent) and "://" not in row.image:
            row = row._replace(image=posixpath.join(parent, row.image))
        if row.image in self._by_id and row.id is None:
            return row.image  # an earlier row was checked
        if self._root is not None:
            return files.path_below(self._root, row.image)
        if "://" in row.image or "\0" in row.image:
            raise DataError(f"image {row.image!r:.200} is not a file; URLs are not fetched")
        return posixpath.normpath(row.image)


def _stem(name: str) -> str:
    """Return the name of an image without suffix, a number without zeros in front."""
    stem, suffix = posixpath.splitext(name)
    stem = stem if suffix.lower() in files.IMAGE_SUFFIXES else name
    return (stem.lstrip("0") or "0") if stem.isdecimal() else stem
