"""A folder of images with a .txt of captions beside each, of images alone, or of .txt alone."""

import logging
import posixpath
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

from csalign.core.enums import Modality
from csalign.core.errors import DataError
from csalign.sources.images import SUFFIXES
from csalign.sources.records import ImageInput, IndexedFile, Record, SourceFile, TextInput
from csalign.sources.records.files import (
    MAX_TEXT_BYTES,
    decode_text,
    fingerprint,
    name_error,
    read_bounded,
)

logger = logging.getLogger(__name__)


def images_in(files: Collection[str]) -> list[str]:
    """Select the files that are images by their suffix, whatever its case."""
    return [name for name in files if posixpath.splitext(name)[1].lower() in SUFFIXES]


@dataclass(frozen=True)
class FolderSource:
    """A folder as a `Source`: images, or else stems, each with its .txt and the size of it."""

    folder: Path
    caption_lines: bool
    names: Sequence[str]
    texts: Sequence[str | None]
    sizes: Sequence[int | None]
    description: str
    files: Sequence[str]
    sides: Collection[Modality]
    total: int
    total_images: int

    @property
    def fingerprint(self) -> str:
        """See `Source`."""
        return self.fingerprint_of(0, 0, self.total)

    def fingerprint_of(self, position: int, start: int, stop: int) -> str:
        """See `Source`: names, and the sizes of the .txt."""
        rows = zip(self.names, self.texts, self.sizes, strict=True)
        return fingerprint([self.caption_lines, *islice(rows, start, stop)])

    @contextmanager
    def open(self, position: int) -> Iterator[SourceFile]:
        """See `Source`."""
        yield IndexedFile(self.files[0], self._record, 0, self.total)

    def _record(self, position: int) -> Record:
        name, text = self.names[position], self.texts[position]
        if (error := name_error(name)) is not None:
            return Record(None, error=error)
        image = None
        if self.total_images:
            path = self.folder / name
            image = ImageInput(name, path.as_posix(), partial(read_bounded, path))
        if text is None:
            return Record(image)
        try:
            content = decode_text(read_bounded(self.folder / text, MAX_TEXT_BYTES))
        except DataError as reason:
            return Record(None, error=f"its captions {text}: {reason}")
        captions = captions_in(content, lines=self.caption_lines)
        if not captions and image is None:
            return Record(None, error=f"{text}: contains no caption")
        return Record(image, texts_of(name, captions))


def read_folder(
    folder: Path, files: Mapping[str, int | None], *, caption_lines: bool
) -> FolderSource:
    """Find the images of a folder and the .txt of the same stem; or its .txt alone.

    Images of the same stem share their captions, since a stem cannot say which one is meant.

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
    texts = [by_stem.get(stem) for stem in stems]
    captioned = sum(text is not None for text in texts)
    description = f"folder of {captioned} .txt files with captions"
    if images:
        _warn_of_stems(folder, images, stems, by_stem)
        description = f"folder of {len(images)} images, {captioned} of them with a .txt of captions"
    sides = {Modality.IMAGE: bool(images), Modality.TEXT: captioned > 0}
    return FolderSource(
        folder,
        caption_lines,
        images or stems,
        texts,
        sizes=[None if name is None else _size(folder / name, files[name]) for name in texts],
        description=description,
        files=(str(folder),),
        sides=tuple(side for side, is_present in sides.items() if is_present),
        total=len(stems),
        total_images=len(images),
    )


def captions_in(content: str, *, lines: bool) -> list[str]:
    """Split a text into its captions, its lines or the whole text: stripped, once, not empty."""
    parts = content.splitlines() if lines else [content]
    return list(dict.fromkeys(text for text in (part.strip() for part in parts) if text))


def texts_of(
    record_id: str, captions: Sequence[str], row: int | None = None
) -> tuple[TextInput, ...]:
    """Give captions the ids that follow from the id of their record."""
    return tuple(TextInput(f"{record_id}#{k}", text, row) for k, text in enumerate(captions))


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
