"""Records gathered in memory from rows that may name an image anywhere."""

import hashlib
import logging
import posixpath
import sys
import unicodedata
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

from csalign.core.enums import Modality
from csalign.core.errors import DataError
from csalign.core.figures import counted
from csalign.core.paths import is_remote
from csalign.sources.images import SUFFIXES
from csalign.sources.records import (
    ImageInput,
    IndexedFile,
    Record,
    SourceFile,
    TextInput,
    UnreadableFile,
    files,
)
from csalign.sources.records.cells import BASE64_NAMES
from csalign.sources.records.tables import Row

logger = logging.getLogger(__name__)

_MAX_PATH_LENGTH = 4096


class _File(NamedTuple):
    name: str
    prefix: str
    start: int  # its first record
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
    contradicts an earlier one becomes a record with an error.

    Args:
        root: folder that image paths start from; None for the working directory, which paths may
            leave.
        load: return the bytes of a base64 image by the offset of its row; None where the rows
            cannot be read again.
        caption_lines: each line of a .txt is a caption, rather than the whole text.
    """

    def __init__(
        self,
        root: Path | None,
        load: Callable[[int], bytes] | None = None,
        *,
        caption_lines: bool = True,
    ) -> None:
        self.description = ""
        self.fingerprint = ""
        self._root = root
        self._load = load
        self._caption_lines = caption_lines
        self._digest = hashlib.sha256(repr(caption_lines).encode())
        self._files: list[_File] = []
        self._entries: list[_Entry] = []
        self._by_id: dict[str, _Entry] = {}
        self._blank_rows = self._rows = self._rows_without_caption = 0

    def begin_file(self, name: str, prefix: str = "") -> None:
        """Start a file; `prefix` makes ids from its row numbers unique among several files."""
        self._digest.update(prefix.encode())
        self._files.append(_File(name, prefix, len(self._entries)))

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
            self._rows_without_caption += not row.captions
        except DataError as error:
            self._entries.append(_Entry("", row.number, error=str(error)))
            return
        entry.captions += [(caption, row.number) for caption in row.captions]

    def add_found(self, image_ids: Iterable[str]) -> None:
        """Add the images of a folder that no row names."""
        for image_id in image_ids:
            self._digest.update(repr(image_id).encode())
            if image_id not in self._by_id:
                error = files.name_error(image_id)
                self._entries.append(_Entry(image_id, place=image_id, error=error))

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
        if self._blank_rows:
            logger.warning("%s: %d rows without image and caption", name, self._blank_rows)
        if 0 < self._rows_without_caption < self._rows:
            rows = self._rows_without_caption, self._rows
            logger.warning("%s: %d of %d rows have no caption", name, *rows)
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
            yield IndexedFile(file.name, partial(self._record, file.name), start, stop)

    def _record(self, file: str, position: int) -> Record:
        entry = self._entries[position]
        row = entry.row or None
        if entry.error is not None:
            return Record(None, row=row, error=entry.error)
        image = None
        if entry.offset is not None:
            assert self._load is not None
            image = ImageInput(entry.label, f"{file}/{row}", partial(self._load, entry.offset))
        elif entry.place is not None:
            path = Path(entry.place) if self._root is None else self._root / entry.place
            # A remote file is looked up when it is read, which saves a request.
            if row is not None and not is_remote(path) and not files.is_file(path):
                start = "the working directory" if self._root is None else self._root
                error = (
                    f"unknown image {entry.place!r:.200}; correct the path, which starts from "
                    f"{start}, or remove the row"
                )
                for form in ("NFC", "NFD"):
                    other = Path(self._root or "", unicodedata.normalize(form, entry.place))
                    if files.is_file(other):
                        error = (
                            f"image {entry.place!r:.200} has its name in another Unicode form on "
                            f"the disk ({form}); write it so in the table"
                        )
                return Record(None, row=row, error=error)
            image = ImageInput(entry.label, path.as_posix(), partial(files.read_bounded, path))
        captions = entry.captions
        if entry.text is not None and self._root is not None:
            try:
                content = files.decode_text(
                    files.read_bounded(self._root / entry.text, files.MAX_TEXT_BYTES)
                )
            except DataError as reason:
                return Record(None, error=f"its captions {entry.text}: {reason}")
            captions = [
                (text, None) for text in files.captions_in(content, lines=self._caption_lines)
            ]
            if not captions and image is None:
                return Record(None, error=f"{entry.text}: contains no caption")
        texts: dict[str, TextInput] = {}
        for caption, number in captions:
            suffix = f"#{len(texts)}" if texts or image or entry.text else ""
            texts.setdefault(caption, TextInput(f"{entry.label}{suffix}", caption, number))
        return Record(image, tuple(texts.values()), entry.split, row)

    def _range(self, position: int) -> tuple[int, int]:
        starts = [file.start for file in self._files[position : position + 2]]
        return starts[0], starts[1] if len(starts) > 1 else len(self._entries)

    def _image(self, row: Row) -> _Entry:
        if row.offset is not None and self._load is None:
            raise DataError("has an image in base64, which only .csv, .tsv and .jsonl may have")
        if row.offset is None:
            place = self._path(row)
        else:
            place = hashlib.sha256(row.image.encode()).hexdigest()
        key = row.id or (place if row.offset is None else f"row:{row.number}")
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
        if row.image in self._by_id and row.id is None:
            return row.image  # an earlier row was checked
        if self._root is not None:
            return files.path_below(self._root, row.image)
        if "://" in row.image or "\0" in row.image:
            raise DataError(f"image {row.image!r:.200} is not a file; URLs are not fetched")
        return posixpath.normpath(row.image)


def images_in(names: Collection[str]) -> list[str]:
    """Select the files that are images by their suffix, whatever its case."""
    return [name for name in names if posixpath.splitext(name)[1].lower() in SUFFIXES]


def read_folder(folder: Path, found: Mapping[str, int | None], *, caption_lines: bool) -> Catalog:
    """Find the images of a folder and the .txt of the same stem; or its .txt alone.

    Images of the same stem share their captions, since a stem cannot say which one is meant. The
    .txt are read together with their images.

    Args:
        folder: where the files are.
        found: the result of `files_below`.
        caption_lines: each line of a .txt is a caption, rather than the whole text.

    Raises:
        DataError: there is neither an image nor a .txt.
    """
    by_stem = {posixpath.splitext(name)[0]: name for name in found if name.lower().endswith(".txt")}
    images = images_in(found)
    if not images and not by_stem:
        raise DataError(
            f"{folder}: contains no images, captions (.txt), uncompressed tar or Parquet files; "
            "pass a folder or file that does"
        )
    if others := sorted(found.keys() - {*images, *by_stem.values()}):
        logger.info(
            f"{folder}: {counted(len(others), 'file')} of other kinds not read, such as "
            f"{', '.join(others[:3])}"
        )
    stems = [posixpath.splitext(name)[0] for name in images] or list(by_stem)
    captioned = sum(stem in by_stem for stem in stems)
    description = f"folder of {captioned} .txt files with captions"
    if images:
        _warn_of_stems(folder, images, stems, by_stem)
        count = counted(len(images), "image")
        description = f"folder of {count}, {captioned} of them with a .txt of captions"
    catalog = Catalog(folder, caption_lines=caption_lines)
    catalog.begin_file(str(folder))
    for label, stem in zip(images or stems, stems, strict=True):
        text = by_stem.get(stem)
        size = None if text is None else _size(folder / text, found[text])
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
