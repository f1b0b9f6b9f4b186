"""A folder of images with a .txt of captions beside each, of images alone, or of .txt alone."""

import logging
import posixpath
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

from csalign.core.enums import Modality
from csalign.core.errors import DataError
from csalign.sources import images
from csalign.sources.records.base import ImageInput, Record, TextInput, Volume
from csalign.sources.records.tree import (
    MAX_TEXT_BYTES,
    decoded,
    fingerprint,
    name_flaw,
    read_bounded,
)

logger = logging.getLogger(__name__)


def images_in(files: Collection[str]) -> list[str]:
    """Those of the files that are images by their suffix, whatever its case."""
    return [name for name in files if _parts(name)[1] in images.SUFFIXES]


def read_folder(folder: Path, files: Mapping[str, int | None], *, lines: bool) -> "FolderSource":
    """The images of a folder with the captions in the .txt of the same stem; or its .txt alone.

    Images of the same stem share their captions, since a stem cannot say which one is meant.

    Args:
        folder: where the files are.
        files: what `files_below` found.
        lines: each line of a .txt is a caption, rather than the whole of it.

    Raises:
        DataError: there is neither an image nor a .txt.
    """
    found = images_in(files)
    texts: dict[str, str] = {}
    for name in files:
        stem, suffix = _parts(name)
        if suffix == ".txt":
            texts.setdefault(stem, name)
    if not found and not texts:
        raise DataError(
            f"{folder}: holds no images, captions (.txt), tar or Parquet files; give a folder or "
            "file that does"
        )
    stems = [_parts(name)[0] for name in found]
    if found:
        _tell_of_stems(folder, found, stems, texts)
        names, captions = found, [texts.get(stem) for stem in stems]
    else:
        names, captions = list(texts), list(texts.values())
    return FolderSource(folder, bool(found), lines, names, captions, files)


def _tell_of_stems(
    folder: Path, found: Sequence[str], stems: Sequence[str], texts: Mapping[str, str]
) -> None:
    known = set(stems)
    left = [name for stem, name in texts.items() if stem not in known]
    if left:
        logger.warning(
            "%s: %d .txt files are left out, as no image has their stem (%s)",
            *(folder, len(left), left[0]),
        )
    first: dict[str, str] = {}
    for name, stem in zip(found, stems, strict=True):
        if first.setdefault(stem, name) != name and stem in texts:
            logger.warning(
                "%s: images of the same stem share its captions, as %s and %s do; rename them if "
                "they differ",
                *(folder, first[stem], name),
            )
            break


def _parts(name: str) -> tuple[str, str]:
    stem, suffix = posixpath.splitext(name)
    return stem, suffix.lower()


@dataclass(frozen=True)
class FolderSource:
    """See `read_folder`; the .txt are read as their records are.

    Attributes:
        folder: where the files are.
        has_images: whether the records are images rather than captions alone.
        lines: each line of a .txt is a caption.
        names: images, or .txt without their suffix, below the folder; sorted.
        texts: the .txt of each, None for none.
        files: sizes of all files, where known.
    """

    folder: Path
    has_images: bool
    lines: bool
    names: Sequence[str]
    texts: Sequence[str | None]
    files: Mapping[str, int | None]

    @property
    def description(self) -> str:
        """See `Source`."""
        captioned = sum(text is not None for text in self.texts)
        if not self.has_images:
            return f"folder of {captioned} .txt files with captions"
        return f"folder of {len(self.names)} images, {captioned} of them with a .txt of captions"

    @property
    def volumes(self) -> Sequence[str]:
        """See `Source`."""
        return (str(self.folder),)

    @property
    def sides(self) -> Collection[Modality]:
        """See `Source`."""
        texts = (Modality.TEXT,) if any(self.texts) else ()
        return ((Modality.IMAGE,) if self.has_images else ()) + texts

    @property
    def total(self) -> int | None:
        """See `Source`."""
        return len(self.names)

    @property
    def total_images(self) -> int | None:
        """See `Source`."""
        return len(self.names) if self.has_images else 0

    @property
    def fingerprint(self) -> str:
        """See `Source`: the names, and the sizes of the .txt."""
        return self.stamp(0, 0, len(self.names))

    def stamp(self, position: int, start: int, stop: int) -> str:
        """See `Source`: names, and the sizes of the .txt."""
        fields = (self.names, self.texts, self._sizes)
        return fingerprint([self.lines, *(value for own in fields for value in own[start:stop])])

    @cached_property
    def _sizes(self) -> list[int | None]:
        """Bytes of the .txt of each record."""
        return [None if name is None else self._size(name) for name in self.texts]

    @contextmanager
    def open(self, position: int) -> Iterator[Volume]:
        """See `Source`."""
        yield _FolderVolume(self)

    def record(self, position: int) -> Record:
        """One of the records, for which its .txt is read."""
        name, text = self.names[position], self.texts[position]
        flaw = name_flaw(name)
        if flaw is not None:
            return Record(None, flaw=flaw)
        image = None
        if self.has_images:
            path = self.folder / name
            image = ImageInput(name, path.as_posix(), partial(read_bounded, path))
        if text is None:
            return Record(image)
        try:
            content = decoded(read_bounded(self.folder / text, MAX_TEXT_BYTES))
        except DataError as error:
            return Record(None, flaw=f"its captions {text}: {error}")
        captions = captions_in(content, lines=self.lines)
        if not captions and image is None:
            return Record(None, flaw=f"{text}: holds no caption")
        return Record(image, texts_of(name, captions))

    def _size(self, name: str) -> int:
        size = self.files[name]
        try:
            return (self.folder / name).stat().st_size if size is None else size
        except OSError:
            return -1  # its record tells why


def captions_in(content: str, *, lines: bool) -> list[str]:
    """The captions of a text: each of its lines or the whole of it; stripped, once, not empty."""
    parts = content.splitlines() if lines else [content]
    return list(dict.fromkeys(text for text in (part.strip() for part in parts) if text))


def texts_of(record_id: str, captions: Sequence[str]) -> tuple[TextInput, ...]:
    """Captions with the ids that follow from their record's."""
    return tuple(TextInput(f"{record_id}#{k}", text) for k, text in enumerate(captions))


class _FolderVolume:
    def __init__(self, source: FolderSource) -> None:
        self.name = source.volumes[0]
        self._source = source

    def __len__(self) -> int:
        return len(self._source.names)

    def records(self, start: int, stop: int) -> Iterator[Record]:
        for position in range(start, min(stop, len(self))):
            yield self._source.record(position)
