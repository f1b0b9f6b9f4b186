"""WebDataset: samples in tar files, whose members share a key; read in place, never unpacked."""

import logging
import os
import posixpath
import tarfile
from array import array
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from csalign.core.enums import Modality
from csalign.core.errors import ConfigError, DataError
from csalign.core.paths import is_remote
from csalign.core.records import parse_json
from csalign.sources import images
from csalign.sources.records.base import ImageInput, Record, TextInput, Volume
from csalign.sources.records.columns import Columns
from csalign.sources.records.folders import captions_in, texts_of
from csalign.sources.records.tables import caption_of
from csalign.sources.records.tree import (
    MAX_IMAGE_BYTES,
    MAX_TEXT_BYTES,
    check_size,
    decoded,
    fingerprint,
    is_text,
    local_file,
    name_flaw,
    opened,
    shown,
    size_of,
    split_of,
    told_of,
)
from csalign.sources.unreadable import LostVolume, tell_of_lost

logger = logging.getLogger(__name__)

_BLOCK = 512
_EXTENSIONS = tuple(dict.fromkeys(("jpg", "png", "jpeg", "webp", *(
    sorted(suffix[1:] for suffix in images.SUFFIXES)
))))  # fmt: skip
"""Of images, the first of them that a sample has being its image."""


@dataclass(frozen=True)
class TarSource:
    """Tar files as a `Source`, each of them a volume.

    Attributes:
        root: folder that all of them are below.
        paths: the tars, by their path below it.
        columns: `caption` is a json key or an extension, `split` a json key.
        lines: each line of a txt is a caption, rather than the whole of it.
        sizes: bytes of each tar.
        lost: why a tar cannot be read at all, by position.
    """

    root: Path
    paths: Sequence[str]
    columns: Columns
    lines: bool
    sizes: Sequence[int]
    lost: Mapping[int, str]

    @property
    def description(self) -> str:
        """See `Source`."""
        return f"WebDataset of {len(self.paths)} tar file{'s' if len(self.paths) > 1 else ''}"

    @property
    def volumes(self) -> Sequence[str]:
        """See `Source`."""
        return [shown((self.root / path).as_posix()) for path in self.paths]

    @property
    def sides(self) -> Collection[Modality]:
        """See `Source`; what a tar holds is not known before it is read."""
        return (Modality.TEXT,) if self.columns.captions_only else tuple(Modality)

    @property
    def total(self) -> int | None:
        """See `Source`."""
        return None

    @property
    def total_images(self) -> int | None:
        """See `Source`."""
        return None

    @property
    def fingerprint(self) -> str:
        """See `Source`: names and sizes."""
        return fingerprint([self.columns, self.lines, *self.paths, *self.sizes, *self.lost.items()])

    def stamp(self, position: int, start: int, stop: int) -> str:
        """See `Source`: name and size of the tar."""
        own = (self.paths[position], self.sizes[position], self.lost.get(position))
        return fingerprint([self.columns, self.lines, *own])

    @contextmanager
    def open(self, position: int) -> Iterator[Volume]:
        """See `Source`; a remote tar is copied to a temporary file first."""
        path = self.root / self.paths[position]
        if position in self.lost:
            yield LostVolume(self.volumes[position], self.lost[position])
            return
        with local_file(path) as file:
            prefix = posixpath.splitext(self.paths[position])[0]
            yield _TarVolume(path.as_posix(), prefix, file, self)


def open_tars(
    root: Path,
    paths: Sequence[str],
    columns: Columns,
    *,
    lines: bool,
    sizes: Sequence[int | None] | None = None,
) -> TarSource:
    """Check what can be checked without reading the tars.

    Args:
        root: folder that all of them are below.
        paths: the tars, by their path below it.
        columns: see `TarSource`.
        lines: see `TarSource`.
        sizes: bytes of each tar where known already.

    Raises:
        ConfigError: an id column is named, for which tars have their keys.
        DataError: a file is not there, or none of them is a tar.
    """
    if columns.id is not None:
        raise ConfigError("id_column: tar files have the keys of their samples; leave it out")
    if len({posixpath.splitext(path)[0] for path in paths}) < len(paths):
        raise DataError(f"{root}: holds tar files that differ in their suffix alone; rename one")
    known = [
        size_of(root / path) if size is None else size
        for path, size in zip(paths, sizes or [None] * len(paths), strict=True)
    ]
    flaws = {place: _flaw_of(root, path) for place, path in enumerate(paths)}
    lost = {place: flaw for place, flaw in flaws.items() if flaw is not None}
    tell_of_lost(root, lost, len(paths))
    return TarSource(root, paths, columns, lines, known, lost)


def is_tar(start: bytes) -> bool:
    """Whether the first 512 bytes of a file are a tar's."""
    if start[:_BLOCK] == bytes(_BLOCK):
        return True  # of no member
    try:
        tarfile.TarInfo.frombuf(start[:_BLOCK], "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


def _flaw_of(root: Path, name: str) -> str | None:
    """Why a tar cannot be read at all; that of a remote one shows when it is read."""
    path = root / name
    flaw = name_flaw(str(path))
    if flaw is not None or is_remote(path):
        return flaw
    try:
        with opened(path) as file, told_of(path):
            start = file.read(_BLOCK)
    except DataError as error:
        return str(error)
    return None if is_tar(start) else f"{path}: is no tar file; write or download it again"


@dataclass
class _Index:
    """Where the members of each sample are, column by column."""

    keys: list[str] = field(default_factory=list)
    flaws: dict[int, str] = field(default_factory=dict)
    starts: "array[int]" = field(default_factory=lambda: array("q"))
    extensions: list[str] = field(default_factory=list)
    offsets: "array[int]" = field(default_factory=lambda: array("q"))
    sizes: "array[int]" = field(default_factory=lambda: array("q"))

    def members(self, sample: int) -> dict[str, tuple[int, int]]:
        """Offset and size of a sample's members by extension."""
        last = sample + 1 == len(self.keys)
        stop = len(self.extensions) if last else self.starts[sample + 1]
        return {
            self.extensions[member]: (self.offsets[member], self.sizes[member])
            for member in range(self.starts[sample], stop)
        }


class _Scanner:
    """Builds an index from the headers of a tar."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._size = os.fstat(file.fileno()).st_size
        self._index = _Index()
        self._seen: set[str] = set()
        self._own: set[str] = set()  # extensions of the sample at hand
        self._names: dict[str, str] = {}

    def scan(self) -> _Index:
        reason = self._scan_members()
        if reason is not None:
            # What is behind the cut is not known, and the last sample may lack a member.
            if not self._index.keys:
                self._begin("")
            key = self._index.keys[-1]
            where = f"ends inside of or after sample {key!r:.200}" if key else "cannot be read"
            self._flaw(f"the tar {where}: {reason}; write or download it again")
        elif not self._index.keys:
            self._begin("")
            self._flaw("the tar holds no sample")
        return self._index

    def _scan_members(self) -> str | None:
        """Take in all members; tells why the rest of the tar cannot be read."""
        self._file.seek(0)
        try:
            with tarfile.open(fileobj=self._file, mode="r:") as tar:
                members: list[tarfile.TarInfo] = vars(tar)["members"]
                while (member := tar.next()) is not None:
                    members.clear()  # it would keep them all
                    if member.offset_data + member.size > self._size:
                        self._add(member)
                        return f"{member.name!r:.200} is cut short"
                    self._add(member)
                end = tar.offset
        except (tarfile.TarError, OSError, ValueError, EOFError) as error:
            return str(error)
        self._file.seek(end)
        block = self._file.read(_BLOCK)
        if block == bytes(_BLOCK):
            return None
        return "a header is damaged" if len(block) == _BLOCK else "its end is missing"

    def _add(self, member: tarfile.TarInfo) -> None:
        name = member.name.removeprefix("./")
        folder, base = posixpath.split(name)
        if member.isdir() or base.startswith(".") or (base[:2] == base[-2:] == "__"):
            return
        stem, dot, extension = base.partition(".")
        key = posixpath.join(folder, stem)
        if not self._index.keys or key != self._index.keys[-1]:
            self._begin(key)
        if not is_text(name):
            self._index.keys[-1] = ascii(key)
            self._flaw(f"{name!r:.200} is no UTF-8 name")
        elif name.startswith("/") or ".." in name.split("/"):
            self._flaw(f"{name!r:.200} leads out of the tar")
        elif not member.isreg() or member.sparse is not None:
            self._flaw(f"{name!r:.200} is a link or special file, which is not followed")
        elif not dot:
            self._flaw(f"{name!r:.200} has no extension")
        else:
            self._member(extension.lower(), member.offset_data, member.size)

    def _begin(self, key: str) -> None:
        index = self._index
        index.keys.append(key)
        index.starts.append(len(index.extensions))
        if key in self._seen:
            self._flaw("its key was there before; the members of a sample must be adjacent")
        self._seen.add(key)
        self._own.clear()

    def _member(self, extension: str, offset: int, size: int) -> None:
        index = self._index
        if extension in self._own:
            self._flaw(f"has two members .{extension}")
        self._own.add(extension)
        index.extensions.append(self._names.setdefault(extension, extension))
        index.offsets.append(offset)
        index.sizes.append(size)

    def _flaw(self, reason: str) -> None:
        self._index.flaws.setdefault(len(self._index.keys) - 1, reason)


class _TarVolume:
    """One open tar; its headers are read when they are needed first."""

    def __init__(self, name: str, prefix: str, file: BinaryIO, source: TarSource) -> None:
        self.name = name
        self._prefix = prefix
        self._file = file
        self._columns = source.columns
        self._lines = source.lines
        self._split = split_of(prefix)
        self._scanned: _Index | None = None

    def __len__(self) -> int:
        return len(self._index.keys)

    def records(self, start: int, stop: int) -> Iterator[Record]:
        for sample in range(start, min(stop, len(self))):
            key = self._index.keys[sample]
            try:
                flaw = self._index.flaws.get(sample)
                if flaw is not None:
                    raise DataError(flaw)
                yield self._record(sample, key)
            except DataError as error:
                reason = f"{key:.200}: {error}" if key else str(error)
                yield Record(None, row=sample + 1, flaw=reason)

    @property
    def _index(self) -> _Index:
        if self._scanned is None:
            self._scanned = _Scanner(self._file).scan()
        return self._scanned

    def _record(self, sample: int, key: str) -> Record:
        members = self._index.members(sample)
        record_id = f"{self._prefix}/{key}"
        image = self._image(members, record_id, f"{self.name}/{key}")
        entry = self._json(members)
        texts = texts_of(record_id, self._captions(members, entry))
        if image is None and not texts:
            listed = ", ".join(f".{extension}" for extension in islice(members, 5))
            listed += ", ..." if len(members) > 5 else ""
            raise DataError(f"has neither an image nor a caption (members: {listed})")
        row = sample + 1
        named = tuple(TextInput(text.id, text.caption, row) for text in texts)
        return Record(image, named, self._split_in(entry), row)

    def _image(
        self, members: dict[str, tuple[int, int]], record_id: str, source: str
    ) -> ImageInput | None:
        if self._columns.captions_only:
            return None
        for extension in (self._columns.image, *_EXTENSIONS):
            if extension in members:
                read = partial(_read_member, self._file, members[extension])
                return ImageInput(record_id, f"{source}.{extension}", read)
        for extension in members:
            if f".{extension.rpartition('.')[2]}" in images.SUFFIXES:
                raise DataError(
                    f"its image ends in .{extension}, as a name's key ends at its first dot; name "
                    f"it .{extension.rpartition('.')[2]}, or choose it with --image-column"
                )
        return None

    def _captions(self, members: dict[str, tuple[int, int]], entry: dict[str, Any]) -> list[str]:
        wanted = self._columns.caption
        name = "txt" if wanted is None else wanted
        if name in members and name != "json":
            return captions_in(self._text(members[name], name), lines=self._lines)
        key = Columns(caption=wanted, captions_only=True).pick(entry).caption
        if key is None:
            return []
        try:
            return list(dict.fromkeys(caption_of(entry[key], key)))
        except ValueError as error:
            raise DataError(f"its json: {error}") from None

    def _split_in(self, entry: dict[str, Any]) -> str | None:
        key = Columns(split=self._columns.split).pick(entry).split
        value = None if key is None else entry[key]
        return (value.strip() or None) if isinstance(value, str) else self._split

    def _json(self, members: dict[str, tuple[int, int]]) -> dict[str, Any]:
        if "json" not in members:
            return {}
        try:
            entry = parse_json(self._text(members["json"], "json"))
        except ValueError as error:
            raise DataError(f"its json is not valid ({error})") from None
        if not isinstance(entry, dict):
            raise DataError("its json is no object")
        return entry

    def _text(self, member: tuple[int, int], extension: str) -> str:
        try:
            return decoded(_read_member(self._file, member, MAX_TEXT_BYTES))
        except DataError as error:
            raise DataError(f"its {extension} {error}") from None


def _read_member(file: BinaryIO, member: tuple[int, int], limit: int = MAX_IMAGE_BYTES) -> bytes:
    offset, size = member
    check_size(size, limit)
    try:
        data = os.pread(file.fileno(), size, offset)
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror})") from None
    if len(data) < size:
        raise DataError("is cut short")
    return data
