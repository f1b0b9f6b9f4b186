"""What every SOURCE of `extract` turns into: a stream of records, whatever its form on disk."""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

from csalign.core.enums import Modality


class ImageInput(NamedTuple):
    """An image that is yet to be read.

    Attributes:
        id: unique in the source, the same on every machine: a path below the source's root with
            ``/``, a sample's key, or a row.
        source: where its pixels can be found again: a path or URL, with what is inside of an
            archive behind ``/`` (``00000.tar/000001.jpg``).
        read: gives the encoded bytes. May be called from any thread while the volume is open;
            raises `DataError` with the reason alone, without the path.
    """

    id: str
    source: str
    read: Callable[[], bytes]


class TextInput(NamedTuple):
    """A caption; `row` is its 1-based line or row in the volume's file, None if it has none."""

    id: str
    caption: str
    row: int | None = None


class Record(NamedTuple):
    """An image with its captions, an image alone, or captions alone.

    Attributes:
        image: None where the captions belong to no image.
        texts: its captions, stripped and not empty.
        split: of the image and its captions.
        row: 1-based number of the record in its volume, for messages; None where a file's name
            says it all.
        flaw: why the record cannot be used; image and texts are then absent.
    """

    image: ImageInput | None
    texts: tuple[TextInput, ...] = ()
    split: str | None = None
    row: int | None = None
    flaw: str | None = None


class Volume(Protocol):
    """A part of a source that can be read independently of the others: a tar, a Parquet file."""

    @property
    def name(self) -> str:
        """The file or folder, as messages and ``failures.jsonl`` name it."""

    def __len__(self) -> int:
        """How many records it holds; may have to look through its headers."""

    def records(self, start: int, stop: int) -> Iterator[Record]:
        """Records `start` to `stop` in the volume's order, without reading the others' bytes."""


class Source(Protocol):
    """Records in one or more volumes, always in the same order.

    Making one checks what can be checked cheaply; nothing of it depends on how the work is split.
    """

    @property
    def description(self) -> str:
        """What it was recognised as, in a few words: ``WebDataset of 12 tar files``."""

    @property
    def volumes(self) -> Sequence[str]:
        """Names of the volumes, in order."""

    @property
    def sides(self) -> Collection[Modality]:
        """The modalities that its records may hold."""

    @property
    def total(self) -> int | None:
        """Records in all volumes, None where counting them means reading the source."""

    @property
    def total_images(self) -> int | None:
        """Images in all volumes, likewise."""

    @property
    def fingerprint(self) -> str:
        """Hex SHA-256 of what decides the records, so that a change of the source is noticed."""

    def stamp(self, position: int, start: int, stop: int) -> str:
        """Hex SHA-256 of what decides the content of some records of a volume.

        Told without opening the volume. Where `total` is not known, it is the same for all of a
        volume's records and changes whenever their number does.
        """

    def open(self, position: int) -> AbstractContextManager[Volume]:
        """Open one of the volumes."""
