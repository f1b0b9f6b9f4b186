"""Recognise any SOURCE of `extract` by its content, and open it."""

import logging
import posixpath
import re
import sys
from collections.abc import Collection, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import cast

from csalign.core.enums import Modality
from csalign.core.errors import ConfigError, DataError
from csalign.core.paths import is_remote, likely_meant, parse_location, stand_in
from csalign.core.records import parse_json
from csalign.sources.records import Source, files
from csalign.sources.records.annotations import read_annotations, read_document
from csalign.sources.records.catalog import Catalog
from csalign.sources.records.delimited import HEAD_LINES, open_text, text_form, to_utf8
from csalign.sources.records.folder import (
    TABLE_STEMS,
    TEXTS,
    Sizes,
    images_in,
    read_folder,
    tables_in,
    warn_of_unread,
)
from csalign.sources.records.tables import KNOWN_NAMES, SUFFIXES, Kind, SourceOptions, TableReader
from csalign.sources.records.webdataset import open_tars

__all__ = ["SourceOptions", "open_source"]

logger = logging.getLogger(__name__)

STDIN = "-"
_COLUMNAR = (".parquet", ".arrow")
_JSON_LINES = (".jsonl", ".ndjson")

# What --kind may say of a file, by the form that its content has; the first is what it is.
_KINDS: dict[str, tuple[Kind, ...]] = {
    "tar": ("webdataset", "captions"),
    "parquet": ("parquet", "table", "captions", "folder"),
    "coco": ("coco", "folder"),
    "karpathy": ("karpathy", "folder"),
    **dict.fromkeys((*SUFFIXES, "table"), ("table", "captions", "folder")),
    ".txt": ("captions",),
}


def open_source(source: Path | str, options: SourceOptions | None = None) -> Source:
    """Recognise a SOURCE and check what can be checked cheaply.

    Args:
        source: a folder, a file, a URL, a pattern of tar or Parquet files
            (``data/{00000..00012}.tar``, ``data/*.tar``, ``a.tar::b.tar``), or ``-`` for a list of
            image paths on stdin.
        options: what is known of it (default: nothing).

    Raises:
        ConfigError: the options contradict each other or the source.
        DataError: the whole source is unusable; the message names the file and the remedy.
    """
    given = options or SourceOptions()  # maybe with options of a command, which decide no record
    options = SourceOptions(**{name: getattr(given, name) for name in SourceOptions.model_fields})
    encoders = {"images": "image_encoder", "captions": "text_encoder"}
    skipped = (side for side, name in encoders.items() if getattr(given, name, None) == "none")
    options._skipped = frozenset(skipped)
    path = cast(Path, source) if "://" in str(source) else Path(source)
    with files.translate_errors(path):
        return _Opener(options).open(str(source))


class _Opener:
    def __init__(self, options: SourceOptions) -> None:
        self._options = options
        self._kind = options.kind

    def open(self, source: str) -> Source:
        if (error := files.name_error(source)) is not None:
            raise DataError(error)
        if source == STDIN:
            return self._rows(Path(STDIN), "list", self._options.images)
        # A name with the signs of a pattern may still be that of a file.
        path = None if "::" in source else parse_location(source)
        if path is not None and path.exists() and path.is_dir():
            return self._folder(path)
        if self._options.captions is not None:
            raise ConfigError(
                f"--captions: {source} is not a folder; pass the folder of its images"
            )
        if path is not None and path.exists():
            return self._file(path, None)
        paths = files.expand_pattern(source)
        if paths is None:
            raise DataError(f"{source}: no such file or folder{likely_meant(Path(source))}")
        return self._several(source, paths)

    def _several(self, source: str, paths: Sequence[Path]) -> Source:
        if any(path.is_absolute() for path in paths if not is_remote(path)):
            paths = [path if is_remote(path) else path.absolute() for path in paths]
        root = files.common_folder(paths)
        start = 0 if str(root) == "." else len(str(root))
        sizes: Sizes = {
            str(path)[start:].lstrip("/") if start else str(path): None for path in paths
        }
        suffixes = {path.suffix.lower() for path in paths}
        if re.search(r"[*?[]", source):
            files.warn_of_gaps(root, sizes)
        if suffixes == {".tar"}:
            return self._tars(root, sizes)
        if len(suffixes) == 1 and suffixes <= set(_COLUMNAR):
            return self._columnar(root, sizes)
        listed = ", ".join(sorted(suffixes))
        raise DataError(f"{source}: several files must all be .tar or all .parquet, not {listed}")

    def _folder(self, folder: Path) -> Source:
        kind, found = self._kind, files.files_below(folder)
        if self._options.captions is not None:
            if kind not in ("auto", "folder", "table", "coco", "karpathy"):
                raise ConfigError(
                    f"--captions: a source of kind {kind} has its own; omit --captions"
                )
            if not self._options.captions.is_file():
                meant = likely_meant(self._options.captions) or "; pass a captions table"
                raise DataError(f"{self._options.captions}: no such file{meant}")
            images = images_in(folder, found)
            source = self._file(self._options.captions, folder, self._below_images(folder, images))
            if isinstance(source, Catalog):
                source.check_pairs()
            if Modality.TEXT not in source.sides:
                raise DataError(
                    f"{self._options.captions}: contains no captions; fill in its column of "
                    "captions, or omit --captions to embed images alone"
                )
            return source
        if kind not in ("auto", "folder", "captions", "webdataset", "parquet"):
            raise ConfigError(f"--kind: {folder} is a folder, not {kind}; pass the file")
        images = [] if kind == "captions" else images_in(folder, found)
        if kind != "parquet":  # img2dataset writes these beside each tar or folder of images
            shards = {posixpath.dirname(name) for name in images}
            shards |= {name[: -len(".tar")] for name in found if name.lower().endswith(".tar")}
            beside = {f"{own}{end}" for own in shards for end in (".parquet", "_stats.json")}
            found = {name: size for name, size in found.items() if name not in beside}
        containers = any(name.lower().endswith((".tar", *_COLUMNAR)) for name in found)
        if kind in ("webdataset", "parquet") or (containers and kind != "folder" and not images):
            return self._containers(folder, found)
        if tables := [] if kind == "folder" else _tables_in(folder, found):
            warn_of_unread(folder, found, {*tables, *images})
            source = self._tables(folder, tables, self._below_images(folder, images))
            if images and isinstance(source, Catalog):
                source.check_pairs()
            return source
        if containers and kind == "auto":
            raise DataError(
                f"{folder}: contains images as well as tar, Parquet or Arrow files; choose with "
                "--kind folder, webdataset or parquet"
            )
        if kind == "captions":
            found = {name: found[name] for name in found if name.lower().endswith(TEXTS)}
        lines = self._options.caption_lines is not False
        return read_folder(folder, found, images, caption_lines=lines)

    def _below_images(self, folder: Path, images: list[str]) -> list[str]:
        """List images relative to --images, where that is given."""
        root = self._options.images
        return images if root in (None, folder) else images_in(root, files.files_below(root))

    def _tables(self, folder: Path, tables: Sequence[str], images: Sequence[str]) -> Source:
        """Open the captions tables of a folder; their paths start from their own folders."""
        if tables == [posixpath.basename(tables[0])]:
            is_auto = self._kind == "auto"
            return self._file(folder / tables[0], folder if is_auto else None, images)
        is_given = self._options.images is not None
        parents = {} if is_given else {name: posixpath.dirname(name) for name in tables}
        forms = {name: recognise(folder / name) for name in tables}
        if set(forms.values()) == {"parquet"}:
            sizes = dict.fromkeys(tables)
            return self._columnar(folder, sizes, folder, found=images, parents=parents.values())
        if "parquet" in forms.values():
            raise DataError(f"{folder}: contains Parquet and other tables; choose with --captions")
        catalog = Catalog(self._options.images or folder)
        for name, form in forms.items():
            parent = parents.get(name, "")
            self._add_rows(catalog, folder / name, form, name, parent, has_images=bool(images))
        catalog.add_found(images)
        return catalog.finish(f"{len(tables)} tables, such as {tables[0]}")

    def _containers(self, folder: Path, found: Sizes) -> Source:
        """Open the tars of a folder, else its Parquet files, else its Arrow files."""
        tars, parquet, arrow = (
            {name: size for name, size in found.items() if name.lower().endswith(suffix)}
            for suffix in (".tar", *_COLUMNAR)
        )
        # `datasets` keeps results of its computations beside its data.
        data = {k: v for k, v in arrow.items() if not posixpath.basename(k).startswith("cache-")}
        read = tars if tars and self._kind != "parquet" else parquet or data or arrow
        if read and not (self._kind == "webdataset" and read is not tars):
            files.warn_of_gaps(folder, read)
            rest = (name for name in found if not name.lower().endswith((".json", ".txt")))
            rest = (name for name in rest if not posixpath.basename(name).startswith("cache-"))
            warn_of_unread(folder, rest, read)
            return (self._tars if read is tars else self._columnar)(folder, read)
        form = "tar" if self._kind == "webdataset" else "Parquet"
        raise DataError(f"{folder}: contains no {form} files; correct --kind")

    def _file(self, file: Path, folder: Path | None, images: Sequence[str] = ()) -> Source:
        """Open a file that is the source, or that has the captions of a folder's images."""
        if (error := files.name_error(str(file))) is not None:
            raise DataError(error)
        form = recognise(file)
        root = self._options.images or folder
        if self._kind == "list":
            return self._rows(file, "list", self._options.images)
        document = None
        if form == ".json":
            form, document = read_document(file, self._options)
        if self._kind not in ("auto", *_KINDS[form]):
            raise DataError(f"{file}: is {_KINDS[form][0]}, not {self._kind}; omit --kind")
        if form == "tar":
            return self._tars(file.parent, {file.name: None})
        if form == "parquet":
            return self._columnar(file.parent, {file.name: None}, root, found=images)
        if document is not None:
            return read_annotations(file, form, document, root, self._options, images)
        return self._rows(file, form, root or file.parent, images)

    def _rows(self, table: Path, form: str, root: Path | None, found: Sequence[str] = ()) -> Source:
        """Gather the rows of a text file, or of stdin."""
        catalog = Catalog(root)
        description = self._add_rows(catalog, table, form, has_images=bool(found))
        catalog.add_found(found)
        return catalog.finish(description)

    def _add_rows(
        self,
        catalog: Catalog,
        table: Path,
        form: str,
        name: str = "",
        parent: str = "",
        *,
        has_images: bool = False,
    ) -> str:
        """Add the rows of a text file, with the split in its `name` if it is one of several."""
        is_stdin = str(table) == STDIN
        table = Path("stdin") if is_stdin else table
        options = SourceOptions() if form == ".txt" else self._options
        reader = TableReader(table, options, form, has_images=has_images)
        load = reader.read_image if form in SUFFIXES else None
        prefix = name and f"{posixpath.splitext(name)[0]}/"
        catalog.begin_file(table.as_posix(), prefix, load, parent)
        split, before = files.split_of(name), catalog.total
        with nullcontext(sys.stdin.buffer) if is_stdin else open_text(table) as file:
            for row in reader.rows(file):
                catalog.add(row._replace(split=split) if split and not row.split else row)
        if catalog.total == before:
            logger.warning(f"{table}: adds no image or caption")
        return reader.description

    def _tars(self, root: Path, sizes: Sizes) -> Source:
        lines = self._options.caption_lines
        if lines is None:
            lines = _is_clip_benchmark(root)
        return open_tars(root, sizes, self._options, caption_lines=lines)

    def _columnar(
        self, root: Path, sizes: Sizes, images: Path | None = None, **given: Collection[str]
    ) -> Source:
        from csalign.sources.records.parquet import open_parquet

        images = self._options.images or images
        return open_parquet(root, sizes, self._options, images=images, **given)


def recognise(file: Path) -> str:
    """Recognise the form of a file by its suffix and first bytes.

    Returns:
        "tar", "parquet", ".json", ".txt", or one of `tables.SUFFIXES`.

    Raises:
        DataError: it cannot be read as records.
    """
    if not is_remote(file) and not file.is_file():
        raise DataError(f"{file}: is not a regular file")
    with files.open_file(file) as opened:
        start = opened.read(1 << 16)
    suffix = file.suffix.lower()
    if start.startswith((b"PAR1", b"ARROW1")) or suffix in _COLUMNAR:
        return "parquet"
    if suffix == ".tar" or start[257:262] == b"ustar":
        return "tar"
    if start and (problem := stand_in(start)) is not None:
        raise DataError(f"{file}: {problem}")
    if suffix in (".csv", ".tsv"):
        return suffix
    start = to_utf8(start)
    if suffix in files.IMAGE_SUFFIXES or b"\0" in start:
        raise DataError(
            f"{file}: is not a source; pass a folder of images, a table (.csv, .tsv, .jsonl, "
            ".parquet), a .json of COCO or Karpathy, a .tar, or a .txt of captions"
        )
    head = start.decode("utf-8-sig", errors="replace").strip().split("\n")
    if suffix in (".json", *_JSON_LINES) or re.match(r'\{\s*("|$)|\[\s*([\[{"]|$)', head[0]):
        return _json_form(head, suffix)
    is_cut = len(start) >= 1 << 15 and len(head) > 1  # in its last line
    return text_form(head[: len(head) - is_cut][:HEAD_LINES], KNOWN_NAMES)


def _json_form(head: Sequence[str], suffix: str) -> str:
    """Return ".jsonl" for one object per line, ".json" for a document, maybe of many lines."""
    if re.match(r"(\{|\[)\s*$|\[\s*\{", head[0]):
        return ".json"
    try:
        is_object = isinstance(parse_json(head[0].strip().rstrip(",")), dict)
    except ValueError:
        is_object = False
    return ".jsonl" if suffix in _JSON_LINES or (is_object and len(head) > 1) else ".json"


def _tables_in(folder: Path, found: Sizes) -> list[str]:
    """Find the captions tables of a folder."""
    if tables := tables_in(folder, found):
        return tables
    # The Kaggle copy of Flickr8k keeps its table in captions.txt.
    texts = [f"{stem}.txt" for stem in TABLE_STEMS]
    names = (name for name in found if name.lower() in texts)
    return [name for name in names if recognise(folder / name) == ".csv"][:1]


def _is_clip_benchmark(root: Path) -> bool:
    """Check whether the tars are an export of CLIP_benchmark with one caption per line."""
    for folder in (root, root.parent):
        mark = folder / "dataset_type.txt"
        if files.is_file(mark) and files.read_bounded(mark)[:100].strip() == b"retrieval":
            logger.info(f"{mark}: says retrieval, so each line of a txt is a caption")
            return True
    return False
