"""Sources of image-text data, whatever their form, as streams of records; see `records.open`."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

from csalign.core.enums import Modality
from csalign.core.errors import DataError
from csalign.sources.records import files

logger = logging.getLogger(__name__)


class ImageInput(NamedTuple):
    """An image that has not been read yet.

    Attributes:
        id: unique in the source and the same on every machine: a path relative to the source's
            folder with ``/``, the key of a sample, or a row.
        source: path or URL of its pixels, with the member of an archive behind ``/``
            (``00000.tar/000001.jpg``).
        read: return the encoded bytes. Any thread may call it while the file is open; raises
            `DataError` with the reason alone, without the path.
        key: what images with the same one are equal by; None for their bytes.
        labels: name and value of what may say which images are one, the likeliest first.
        is_named: a user chose its id, so that a copy with another id is an image of its own.
    """

    id: str
    source: str
    read: Callable[[], bytes]
    key: str | None = None
    labels: Sequence[tuple[str, str]] = ()
    is_named: bool = False


class TextInput(NamedTuple):
    """A caption; `row` is its 1-based line or row in the file, None if it has none."""

    id: str
    caption: str
    row: int | None = None


class Record(NamedTuple):
    """An image with its captions, an image alone, or captions alone."""

    image: ImageInput | None  # None where the captions belong to no image
    texts: tuple[TextInput, ...] = ()  # its captions, stripped and not empty
    split: str | None = None  # of the image and its captions
    row: int | None = None  # in its file, from 1, for messages; None if the file's name suffices
    error: str | None = None  # why it is unusable; it then has neither image nor texts


class SourceFile(Protocol):
    """One open file of a source, read independently of the others: a tar, a table, a folder."""

    @property
    def name(self) -> str:
        """Path or URL of the file, as messages and ``failures.jsonl`` name it."""

    def __len__(self) -> int:
        """Count its records; may have to scan its headers."""

    def records(self, start: int, stop: int) -> Iterator[Record]:
        """Yield records `start` to `stop` in file order, without reading the bytes of others."""


@dataclass(frozen=True)
class IndexedFile:
    """A `SourceFile` whose record `k` is ``record(start + k)``."""

    name: str
    record: Callable[[int], Record]
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def records(self, start: int, stop: int) -> Iterator[Record]:
        """See `SourceFile`."""
        return map(self.record, range(self.start + start, min(self.start + stop, self.stop)))


class Source(Protocol):
    """Records in one or more files, always in the same order, however the work is divided."""

    @property
    def description(self) -> str:
        """The form that was recognised, in a few words: ``WebDataset of 12 tar files``."""

    @property
    def files(self) -> Sequence[str]:
        """Names of the files, in order."""

    @property
    def sides(self) -> Collection[Modality]:
        """The modalities that its records may hold."""

    @property
    def total(self) -> int | None:
        """Records in all files, None where counting them means reading the source."""

    @property
    def total_images(self) -> int | None:
        """Images in all files, None where counting them means reading the source."""

    @property
    def fingerprint(self) -> str:
        """Hex SHA-256 of what decides the records, so that a change of the source is noticed."""

    def fingerprint_of(self, position: int, start: int, stop: int) -> str:
        """Return the hex SHA-256 of what decides some records of a file, without opening it.

        Where `total` is None it is the same for all records of the file.
        """

    def open(self, position: int) -> AbstractContextManager[SourceFile]:
        """Open one of the files."""


class UnreadableFile:
    """An unreadable file as a `SourceFile` of one record, whose error is the reason."""

    def __init__(self, name: str, reason: str) -> None:
        self.name = name
        self._reason = reason.removeprefix(f"{name}: ")

    def __len__(self) -> int:
        return 1

    def records(self, start: int, stop: int) -> Iterator[Record]:
        """See `SourceFile`."""
        if start < 1 <= stop:
            yield Record(None, error=self._reason)


@dataclass(frozen=True)
class FileSource(ABC):
    """Files as a `Source` that are read while they are open.

    Attributes:
        root: folder that all of them are below.
        paths: of the files, relative to it.
        sizes: of the files in bytes.
        lost: why files cannot be read, by position.
        settings: what decides the records besides the files.
    """

    description: str
    root: Path
    paths: Sequence[str]
    sizes: Sequence[int]
    lost: Mapping[int, str]
    settings: tuple[object, ...]
    sides: Collection[Modality]
    total: int | None

    @property
    def total_images(self) -> int | None:
        """See `Source`; a record may lack its image."""
        return self.total if Modality.IMAGE in self.sides else 0

    @property
    def files(self) -> Sequence[str]:
        """See `Source`."""
        return [files.printable((self.root / path).as_posix()) for path in self.paths]

    @property
    def fingerprint(self) -> str:
        """See `Source`."""
        return files.fingerprint(self.fingerprint_of(k, 0, 0) for k in range(len(self.paths)))

    def fingerprint_of(self, position: int, start: int, stop: int) -> str:
        """See `Source`: of the name and size of the file."""
        own = (self.paths[position], self.sizes[position], self.lost.get(position))
        return files.fingerprint([*self.settings, *own])

    @contextmanager
    def open(self, position: int) -> Iterator[SourceFile]:
        """See `Source`."""
        if position in self.lost:
            yield UnreadableFile(self.files[position], self.lost[position])
            return
        with self.open_readable(self.root / self.paths[position], position) as file:
            yield file

    @abstractmethod
    def open_readable(self, path: Path, position: int) -> AbstractContextManager[SourceFile]:
        """Open a file that is not lost."""


def warn_of_unreadable(root: Path, lost: Mapping[int, str], count: int) -> None:
    """Warn of unreadable files.

    Raises:
        DataError: no file can be read.
    """
    if not lost:
        return
    first = lost[min(lost)]
    if len(lost) == count:
        raise DataError(first if count == 1 else f"none of {count} files can be read: {first}")
    logger.warning("%s: %d of %d files cannot be read (%s)", root, len(lost), count, first)
