"""Open any SOURCE of `extract`: tell what it is by its content, and read it as records."""

import logging
import posixpath
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast, get_args

from csalign.core.errors import ConfigError, DataError
from csalign.core.paths import is_remote, parse_location
from csalign.core.records import parse_json
from csalign.sources.images import SUFFIXES as IMAGE_SUFFIXES
from csalign.sources.records import annotations, tables, webdataset
from csalign.sources.records.base import Source
from csalign.sources.records.catalog import Catalog
from csalign.sources.records.columns import CAPTION_NAMES, IMAGE_NAMES, SPLIT_NAME, Columns
from csalign.sources.records.folders import images_in, read_folder
from csalign.sources.records.lists import read_captions, read_list
from csalign.sources.records.patterns import common_folder, expand
from csalign.sources.records.tree import files_below, fingerprint, name_flaw, opened, told_of

logger = logging.getLogger(__name__)

Kind = Literal[
    "auto", "folder", "table", "coco", "karpathy", "webdataset", "parquet", "captions", "list"
]
STDIN = Path("-")
_SNIFFED = 1 << 16
_COLUMNAR = (".parquet", ".arrow")
_TABLES = (*tables.SUFFIXES, ".parquet")
_METADATA = ("captions", "metadata")  # the second is the hub's name for the table of a folder
_COMPRESSED = {b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ": "unxz", b"\x28\xb5": "unzstd"}


@dataclass(frozen=True)
class SourceOptions:
    """What a user may say of a SOURCE; None means to recognise it.

    Attributes:
        kind: what it is, where its content does not tell or tells wrongly; "folder" passes over a
            table among images, "captions" reads texts alone, "list" takes a text file for a list
            of image paths.
        captions: a table or JSON document with the captions of a folder of images.
        images: folder that image paths start from (default: that of the table, or one near it).
        image_column: of paths, bytes or base64; in a tar the extension of images.
        caption_column: of captions; in a tar a json key or an extension.
        split_column: of splits. A table need not have it while it is the usual one.
        id_column: of image ids (default: paths, keys or rows are the ids).
        caption_lines: each line of a .txt, beside an image or in a tar, is a caption, rather than
            the whole of it. Default: in a folder it is, in a tar it is not unless a
            ``dataset_type.txt`` by CLIP_benchmark says "retrieval".
    """

    kind: Kind = "auto"
    captions: Path | None = None
    images: Path | None = None
    image_column: str | None = None
    caption_column: str | None = None
    split_column: str = SPLIT_NAME
    id_column: str | None = None
    caption_lines: bool | None = None

    @property
    def columns(self) -> Columns:
        """What is said of columns."""
        return Columns(
            image=self.image_column,
            caption=self.caption_column,
            split=self.split_column,
            id=self.id_column,
            captions_only=self.kind == "captions",
        )


def open_source(source: Path | str, options: SourceOptions | None = None) -> Source:
    """Recognise a SOURCE and check what can be checked cheaply.

    Args:
        source: a folder, a file, a URL, a pattern of tar or Parquet files
            (``data/{00000..00012}.tar``, ``data/*.tar``, ``a.tar::b.tar``), or ``-`` for a list of
            image paths on stdin.
        options: what is known of it (default: nothing).

    Raises:
        ConfigError: the options contradict themselves or the source.
        DataError: something is missing, or makes the whole of it unusable; the message names the
            file and the remedy.
    """
    options = options or SourceOptions()
    if options.kind not in get_args(Kind):
        raise ConfigError(f"kind: {options.kind} is none of {', '.join(get_args(Kind))}")
    is_url = "://" in str(source)
    with told_of(cast(Path, source) if is_url else Path(source)):
        return _Opener(options).open(source)


class _Opener:
    """Opens a source by the form that it has."""

    def __init__(self, options: SourceOptions) -> None:
        self._options = options
        self._columns = options.columns

    def open(self, source: Path | str) -> Source:
        if (flaw := name_flaw(str(source))) is not None:
            raise DataError(flaw)
        if str(source) == str(STDIN):
            return read_list(STDIN, sys.stdin.buffer, self._options.images, self._columns)
        # A name that holds a pattern's signs may still be a plain one.
        plain = None if "::" in str(source) else parse_location(source)
        if plain is None or not plain.exists():
            files = expand(str(source))
            if files is not None:
                return self._several(str(source), files)
            raise DataError(f"{source}: no such file or folder")
        return self._folder(plain) if plain.is_dir() else self._file(plain, None)

    def _several(self, source: str, files: Sequence[Path]) -> Source:
        self._refuse_captions(source)
        if any(file.is_absolute() for file in files if not is_remote(file)):
            files = [file if is_remote(file) else file.absolute() for file in files]
        root = common_folder(files)
        names = [str(file)[len(str(root)) :].lstrip("/") if str(root) != "." else str(file)
                 for file in files]  # fmt: skip
        suffixes = {file.suffix.lower() for file in files}
        if suffixes == {".tar"}:
            return self._tars(root, dict.fromkeys(names))
        if len(suffixes) == 1 and suffixes <= set(_COLUMNAR):
            return self._columnar(root, dict.fromkeys(names))
        listed = ", ".join(sorted(suffixes))
        raise DataError(f"{source}: several files must all be .tar or all .parquet, not {listed}")

    def _folder(self, folder: Path) -> Source:
        files = files_below(folder)
        kind = self._options.kind
        if self._options.captions is not None:
            if kind not in ("auto", "folder", "table", "coco", "karpathy"):
                raise ConfigError(f"captions: a source of kind {kind} holds its own")
            return self._file(self._options.captions, folder, files)
        by_suffix = {suffix: _with_suffix(files, suffix) for suffix in (".tar", *_COLUMNAR)}
        found = images_in(files)
        if kind in ("webdataset", "parquet"):
            return self._folder_of(folder, kind, by_suffix)
        if kind not in ("auto", "folder", "captions"):
            raise ConfigError(f"kind: {folder} is a folder, which {kind} is not; give the file")
        if kind == "captions":
            return self._captions_of(folder, files, by_suffix)
        if not found and kind == "auto":
            if any(by_suffix.values()):
                return self._folder_of(folder, None, by_suffix)
            compressed = [name for name in files if _is_compressed_tar(name)]
            if compressed:
                raise DataError(f"{folder / compressed[0]}: {_unpack('gunzip')}")
        if kind == "auto":
            table = _table_in(folder, files)
            if table is not None:
                return self._file(table, folder, files)
            if any(by_suffix.values()):
                raise DataError(
                    f"{folder}: holds images as well as tar, Parquet or Arrow files; say which "
                    "with --kind folder, webdataset or parquet"
                )
            _tell_of_documents(folder, files)
        return read_folder(folder, files, lines=self._options.caption_lines is not False)

    def _folder_of(
        self, folder: Path, kind: str | None, by_suffix: Mapping[str, dict[str, int | None]]
    ) -> Source:
        # img2dataset writes a .parquet of metadata beside each .tar.
        if kind != "parquet" and by_suffix[".tar"]:
            return self._tars(folder, by_suffix[".tar"])
        if kind != "webdataset" and by_suffix[".parquet"]:
            return self._columnar(folder, by_suffix[".parquet"])
        if kind != "webdataset" and by_suffix[".arrow"]:
            # What `datasets` keeps beside its data to save a second computation.
            data = {
                name: size
                for name, size in by_suffix[".arrow"].items()
                if not posixpath.basename(name).startswith("cache-")
            }
            return self._columnar(folder, data or by_suffix[".arrow"])
        raise DataError(f"{folder}: holds no {'tar' if kind == 'webdataset' else 'Parquet'} files")

    def _captions_of(
        self,
        folder: Path,
        files: Mapping[str, int | None],
        by_suffix: Mapping[str, dict[str, int | None]],
    ) -> Source:
        if any(by_suffix.values()):
            return self._folder_of(folder, None, by_suffix)
        table = _table_in(folder, files)
        if table is not None:
            return self._file(table, None)
        texts = {name: size for name, size in files.items() if name.lower().endswith(".txt")}
        return read_folder(folder, texts, lines=self._options.caption_lines is not False)

    def _file(
        self, file: Path, folder: Path | None, files: Mapping[str, int | None] | None = None
    ) -> Source:
        """A file that is the source, or that speaks of the images of a folder."""
        if (flaw := name_flaw(str(file))) is not None:
            raise DataError(flaw)
        if folder is None:
            self._refuse_captions(str(file))
        elif not file.is_file():
            raise DataError(f"{file}: no such file; give a captions table")
        found = images_in(files or {})
        kind, start = self._options.kind, _start_of(file)
        form = _form_of(file, start)
        if kind == "list":
            with opened(file) as lines:
                return read_list(file, lines, self._options.images, self._columns)
        if form == "webdataset":
            self._expect(file, form, "captions")
            return self._tars(file.parent, {file.name: None})
        if form == "parquet":
            self._expect(file, form, "table", "captions", "folder")
            return self._columnar(file.parent, {file.name: None}, folder, found)
        if form == ".json":
            return self._document(file, folder, found)
        if form == ".txt":
            self._expect(file, "captions")
            return read_captions(file)
        self._expect(file, "table", "captions", "folder")
        return self._table(file, folder, form, found)

    def _table(self, table: Path, folder: Path | None, form: str, found: Sequence[str]) -> Source:
        reader = tables.RowReader(table, self._columns, form)
        catalog = Catalog(self._options.images or folder or table.parent, reader.image_bytes)
        catalog.begin(table.as_posix())
        for row in reader:
            catalog.add(row)
        catalog.add_found(found)
        columns = ", ".join(
            f"{what} in column {name!r}"
            for what, name in (("images", reader.found.image), ("captions", reader.found.caption))
            if name is not None
        )
        mark = fingerprint([reader.fingerprint, *found])
        return catalog.finish(f"{form[1:].upper()} table with {columns}", mark)

    def _document(self, table: Path, folder: Path | None, found: Sequence[str]) -> Source:
        document = annotations.read_document(table)
        kind = self._options.kind
        form = annotations.form_of(document, table)
        self._expect(table, form, "folder", *(("captions",) if form == "table" else ()))
        images = self._options.images or folder
        if kind == "captions" and form != "table":
            raise ConfigError(f"kind: {table} is {form}; leave it out")
        return annotations.read_annotations(table, document, form, images, self._columns, found)

    def _tars(self, root: Path, paths: Mapping[str, int | None]) -> Source:
        lines = self._options.caption_lines
        if lines is None:
            lines = _is_clip_benchmark(root)
        return webdataset.open_tars(
            root, list(paths), self._columns, lines=lines, sizes=list(paths.values())
        )

    def _columnar(
        self,
        root: Path,
        paths: Mapping[str, int | None],
        images: Path | None = None,
        found: Sequence[str] = (),
    ) -> Source:
        from csalign.sources.records.parquet import open_parquet

        return open_parquet(
            root,
            list(paths),
            self._columns,
            images=self._options.images or images,
            found=found,
            sizes=list(paths.values()),
        )

    def _refuse_captions(self, source: str) -> None:
        if self._options.captions is not None:
            raise ConfigError(f"captions: {source} is no folder; give the folder of its images")

    def _expect(self, file: Path, *forms: str) -> None:
        kind = self._options.kind
        if kind not in ("auto", *forms):
            raise DataError(f"{file}: is no {kind} source but {forms[0]}; leave the kind out")


def _with_suffix(files: Mapping[str, int | None], suffix: str) -> dict[str, int | None]:
    return {name: size for name, size in files.items() if name.lower().endswith(suffix)}


def _table_in(folder: Path, files: Mapping[str, int | None]) -> Path | None:
    """The captions table directly in a folder.

    Raises:
        DataError: there are several.
    """
    suffixes = {name: posixpath.splitext(name)[1].lower() for name in files if "/" not in name}
    found = [name for name, suffix in suffixes.items() if suffix in _TABLES]
    for stem in _METADATA:
        named = [name for name in found if posixpath.splitext(name)[0].lower() == stem]
        if len(named) == 1:
            return folder / named[0]
    if len(found) > 1:
        names = ", ".join(found[:5]) + (", ..." if len(found) > 5 else "")
        raise DataError(f"{folder}: holds several tables ({names}); choose one with --captions")
    if found:
        return folder / found[0]
    # The Kaggle copy of Flickr8k keeps its table in captions.txt.
    text = [name for name, suffix in suffixes.items() if suffix == ".txt"]
    for name in text:
        if posixpath.splitext(name)[0].lower() in _METADATA:
            file = folder / name
            if _form_of(file, _start_of(file)) == ".csv":
                return file
    return None


def _tell_of_documents(folder: Path, files: Mapping[str, int | None]) -> None:
    documents = [name for name in files if "/" not in name and name.lower().endswith(".json")]
    if documents:
        logger.warning(
            "%s: %s is not read; if it holds the captions, name it with --captions",
            *(folder, documents[0]),
        )


def _start_of(file: Path) -> bytes:
    if not is_remote(file) and not file.is_file():
        raise DataError(f"{file}: is no regular file")
    with opened(file) as start:
        return start.read(_SNIFFED)


def _form_of(file: Path, start: bytes) -> str:
    """What a file is: "webdataset", "parquet", or the suffix that says how it is read.

    Raises:
        DataError: it is nothing that can be read.
    """
    suffix = file.suffix.lower()
    if start.startswith(b"PAR1") or suffix in _COLUMNAR or start.startswith(b"ARROW1"):
        return "parquet"
    if suffix == ".tar" or start[257:262] == b"ustar":
        return "webdataset"
    for magic, tool in _COMPRESSED.items():
        if start.startswith(magic):
            raise DataError(f"{file}: {_unpack(tool)}")
    if suffix in (*tables.SUFFIXES, ".json"):
        return suffix
    if suffix == ".ndjson":
        return ".jsonl"
    if suffix in IMAGE_SUFFIXES or b"\0" in start:
        raise DataError(
            f"{file}: is no source; give a folder of images, a table (.csv, .tsv, .jsonl, "
            ".parquet), a .json of COCO or Karpathy, a .tar, or a .txt of captions"
        )
    return _text_form(start)


def _text_form(start: bytes) -> str:
    text = start.decode("utf-8-sig", errors="replace")
    first = text.partition("\n")[0]
    if first.lstrip().startswith(("{", "[")):
        try:
            parse_json(first)
        except ValueError:
            return ".json"
        return ".jsonl" if first.lstrip().startswith("{") else ".json"
    # A header whose names are those of images and captions; a caption is hardly made so.
    for delimiter, form in (("\t", ".tsv"), (",", ".csv"), ("|", ".csv")):
        names = {name.strip().lower() for name in first.split(delimiter)}
        if names & set(IMAGE_NAMES) and names & set(CAPTION_NAMES):
            return form
    return ".txt"


def _is_compressed_tar(name: str) -> bool:
    return name.lower().endswith((".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst"))


def _unpack(tool: str) -> str:
    return f"is compressed, so that it cannot be read by parts; unpack it with {tool} first"


def _is_clip_benchmark(root: Path) -> bool:
    """Whether the tars are an export of CLIP_benchmark with captions a line."""
    for folder in (root, root.parent):
        mark = folder / "dataset_type.txt"
        try:
            if mark.is_file() and mark.read_bytes()[:100].strip() == b"retrieval":
                logger.info("%s: says retrieval, so each line of a txt is a caption", mark)
                return True
        except OSError:
            continue
    return False
