"""WebDataset: samples in tar files, whose members share a key; read in place, never unpacked."""

import os
import posixpath
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from csalign.core.enums import Modality
from csalign.core.errors import DataError
from csalign.core.figures import counted
from csalign.core.paths import is_remote, stand_in
from csalign.core.records import parse_json
from csalign.sources.records import (
    FileSource,
    ImageInput,
    IndexedFile,
    Record,
    SourceFile,
    TextInput,
    files,
    warn_of_unreadable,
)
from csalign.sources.records.cells import captions_in_text
from csalign.sources.records.tables import CAPTION_NAMES, Row, SourceOptions, labels_of, row_of

_BLOCK = 512
_EXTENSIONS = (
    *("jpg", "png", "jpeg", "webp"),
    *sorted(suffix[1:] for suffix in files.IMAGE_SUFFIXES),
    *("heic", "heif", "jxl"),  # fail by name where their plugin is missing
)
"""Of images; the first that a sample has is its image."""


@dataclass(frozen=True)
class TarSource(FileSource):
    """Tar files as a `Source`."""

    columns: SourceOptions
    caption_lines: bool

    @contextmanager
    def open_readable(self, path: Path, position: int) -> Iterator[SourceFile]:
        """See `FileSource`; a remote tar is copied to a temporary file first."""
        with files.local_copy(path) as local, files.open_file(local) as file:
            yield _TarFile(self, position, file)


def open_tars(
    root: Path, tars: Mapping[str, int | None], columns: SourceOptions, *, caption_lines: bool
) -> TarSource:
    """Check the tars without reading them.

    Raises:
        DataError: a file is missing, or none of them is a tar.
    """
    if len({posixpath.splitext(path)[0] for path in tars}) < len(tars):
        raise DataError(f"{root}: contains tar files that differ only in their suffix; rename one")
    sizes = [files.size_of(root / path, size) for path, size in tars.items()]
    found = {position: _tar_error(root / path) for position, path in enumerate(tars)}
    errors = {position: error for position, error in found.items() if error is not None}
    warn_of_unreadable(root, errors, len(tars))
    description = f"WebDataset of {counted(len(tars), 'tar file')}"
    sides = (Modality.TEXT,) if columns.kind == "captions" else tuple(Modality)
    settings = (columns, caption_lines)
    # How many records there are is not known before the tars are read.
    return TarSource(description, root, list(tars), sizes, errors, settings, sides, None, *settings)


def _tar_error(path: Path) -> str | None:
    """Explain why a tar is unreadable, None if it is not; remote ones are checked when read."""
    error = files.name_error(str(path))
    if error is not None or is_remote(path):
        return error
    try:
        with files.translate_errors(path), files.open_file(path) as file:
            start = file.read(_BLOCK)
        if start != bytes(_BLOCK):  # a tar without members
            tarfile.TarInfo.frombuf(start, "utf-8", "surrogateescape")
    except DataError as reason:
        return str(reason)
    except tarfile.HeaderError:
        return f"{path}: {stand_in(start) or 'is not a tar file; write or download it again'}"
    return None


@dataclass
class _Sample:
    """The members of a sample: offset and size by extension."""

    key: str
    error: str | None = None
    members: dict[str, tuple[int, int]] = field(default_factory=dict)

    def fail(self, reason: str) -> None:
        self.error = self.error or reason

    def add(self, member: tarfile.TarInfo, name: str, extension: str) -> None:
        if files.printable(name) != name:
            self.fail(f"{name!r:.200} is not a UTF-8 name")
        elif name.startswith("/") or ".." in name.split("/"):
            self.fail(f"{name!r:.200} is outside of the tar")
        elif not member.isreg() or member.sparse is not None:
            self.fail(f"{name!r:.200} is a link or special file, which is not followed")
        elif not extension:
            self.fail(f"{name!r:.200} has no extension")
        elif extension in self.members:
            self.fail(f"has two members .{extension}")
        else:
            self.members[extension] = (member.offset_data, member.size)


def _scan(file: BinaryIO) -> list[_Sample]:
    """List the samples of a tar by its headers."""
    samples: list[_Sample] = []
    keys: set[str] = set()
    reason = None
    try:
        for member in _members(file):
            name = member.name.removeprefix("./")
            folder, base = posixpath.split(name)
            if member.isdir() or base.startswith(".") or (base[:2] == base[-2:] == "__"):
                continue
            stem, _, extension = base.partition(".")
            key = files.printable(posixpath.join(folder, stem))
            if not samples or key != samples[-1].key:
                repeated = "its key is repeated; the members of a sample must be adjacent"
                samples.append(_Sample(key, repeated if key in keys else None))
                keys.add(key)
            samples[-1].add(member, name, extension.lower())
    except (tarfile.TarError, OSError, ValueError, EOFError) as error:
        reason = str(error)
    if not samples:
        samples.append(_Sample("", None if reason else "the tar contains no sample"))
    if reason is not None:
        # What follows the damage is not known, and the last sample may lack a member.
        key = samples[-1].key
        where = f"ends inside or after sample {key!r:.200}" if key else "cannot be read"
        samples[-1].fail(f"the tar {where}: {reason}; write or download it again")
    return samples


def _members(file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """Yield the members of a tar; raises ValueError for one that is cut short or damaged."""
    size = os.fstat(file.fileno()).st_size
    file.seek(0)
    with tarfile.open(fileobj=file, mode="r:") as tar:
        kept: list[tarfile.TarInfo] = vars(tar)["members"]
        while (member := tar.next()) is not None:
            kept.clear()  # tarfile would keep all of them in memory
            yield member
            if member.offset_data + member.size > size:
                raise ValueError(f"{member.name!r:.200} is cut short")
        end = tar.offset
    # tarfile ends silently at a damaged header; a sound tar ends with an empty block.
    file.seek(end)
    block = file.read(_BLOCK)
    if block != bytes(_BLOCK):
        raise ValueError("a header is damaged" if len(block) == _BLOCK else "its end is missing")


class _TarFile:
    """One open tar; its headers are read when they are needed first."""

    def __init__(self, source: TarSource, position: int, file: BinaryIO) -> None:
        self.name = source.files[position]
        self._prefix = posixpath.splitext(source.paths[position])[0]
        self._split = files.split_of(self._prefix)
        self._file = file
        self._source = source
        self._scanned: list[_Sample] | None = None

    def __len__(self) -> int:
        if self._scanned is None:
            self._scanned = _scan(self._file)
        return len(self._scanned)

    def records(self, start: int, stop: int) -> Iterator[Record]:
        """See `SourceFile`."""
        return IndexedFile(self.name, self._record, 0, len(self)).records(start, stop)

    def _record(self, position: int) -> Record:
        assert self._scanned is not None
        sample, row = self._scanned[position], position + 1
        try:
            if sample.error is not None:
                raise DataError(sample.error)
            values = self._json(sample)
            read = self._row(sample, row, values)
            image = self._image(sample, read.id, labels_of(values))
            texts = tuple(
                TextInput(f"{self._prefix}/{sample.key}#{k}", caption, row)
                for k, caption in enumerate(dict.fromkeys(read.captions))
            )
            if image is None and not texts:
                listed = [f".{extension}" for extension in sample.members]
                listed[5:] = ["..."] if len(listed) > 5 else []
                raise DataError(
                    f"has neither an image nor a caption (members: {', '.join(listed)})"
                )
        except DataError as error:
            reason = f"{sample.key:.200}: {error}" if sample.key else str(error)
            return Record(None, row=row, error=reason)
        return Record(image, texts, read.split or self._split, row)

    def _row(self, sample: _Sample, number: int, values: dict[str, Any]) -> Row:
        """Read the captions, split and key of a sample."""
        columns = self._source.columns
        name = columns.id_column
        if name not in (None, *values):
            listed = ", ".join(values) or "none"
            raise DataError(f"its json has no {name!r} (keys: {listed:.200}); correct --id-column")
        found = columns.model_copy(update={"kind": "captions"}).pick(values)
        others = () if found.caption else CAPTION_NAMES
        names = (columns.caption_column,) if columns.caption_column else ("txt", *others)
        own = next((name for name in names if name in sample.members and name != "json"), None)
        if own is not None:
            found = found._replace(caption=None, more=())
        row = row_of(number, values, found)
        if row.error is not None:
            options = "--caption-column or --split-column"
            raise DataError(f"its json: {row.error}; name another with {options}")
        if own is None:
            return row
        content = self._text(sample, own)
        return row._replace(
            captions=tuple(captions_in_text(content, lines=self._source.caption_lines))
        )

    def _image(
        self, sample: _Sample, key: str | None, labels: Sequence[tuple[str, str]]
    ) -> ImageInput | None:
        if self._source.columns.kind == "captions":
            return None
        for extension in (self._source.columns.image_column, *_EXTENSIONS):
            if extension in sample.members:
                read = partial(_read_member, self._file, sample.members[extension])
                path = f"{self.name}/{sample.key}.{extension}"
                return ImageInput(f"{self._prefix}/{sample.key}", path, read, key, labels)
        for extension in sample.members:
            last = extension.rpartition(".")[2]
            if f".{last}" in files.IMAGE_SUFFIXES:
                raise DataError(
                    f"its image ends in .{extension}, as the key of a member ends at the first "
                    f"dot; name it .{last}, or choose it with --image-column"
                )
        return None

    def _json(self, sample: _Sample) -> dict[str, Any]:
        if "json" not in sample.members:
            return {}
        try:
            values = parse_json(self._text(sample, "json"))
        except ValueError as error:
            raise DataError(f"its json is not valid ({error})") from None
        if not isinstance(values, dict):
            raise DataError("its json is not an object")
        return values

    def _text(self, sample: _Sample, extension: str) -> str:
        try:
            return files.decode_text(
                _read_member(self._file, sample.members[extension], files.MAX_TEXT_BYTES)
            )
        except DataError as error:
            raise DataError(f"its {extension} {error}") from None


def _read_member(
    file: BinaryIO, member: tuple[int, int], limit: int = files.MAX_IMAGE_BYTES
) -> bytes:
    offset, size = member
    files.check_size(size, limit)
    with files.translate_errors(Path(), named=False):
        data = os.pread(file.fileno(), size, offset)
    if len(data) < size:
        raise DataError("is cut short")
    return data
