"""The output folder of clip-retrieval: img_emb/, text_emb/ and metadata/, numbered alike."""

import logging
import re
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from csalign.core.enums import Modality
from csalign.core.errors import DataError
from csalign.core.records import parse_json
from csalign.sources.arrays.arrow_files import open_table, read_labels
from csalign.sources.arrays.base import Array, Labels, Part, Strings, Vectors
from csalign.sources.arrays.numpy_files import read_npy

FOLDERS = {Modality.IMAGE: "img_emb", Modality.TEXT: "text_emb"}
METADATA = "metadata"
IMAGE_PATH, CAPTION, SPLIT = "image_path", "caption", "split"
IMAGE_ID, TEXT_ID = "image_id", "text_id"
NOTE = "aligned.json"

log = logging.getLogger(__name__)


def is_clip_retrieval(folder: Path) -> bool:
    """Whether a folder is laid out as clip-retrieval does."""
    return any((folder / name).is_dir() for name in FOLDERS.values())


def read_clip_retrieval(folder: Path) -> dict[Modality, Vectors]:
    """Both sides, or the one that is there; row r of images, texts and metadata are one pair.

    An image's id is its path in the metadata, where no path repeats; otherwise its row number. In
    what ``csalign apply`` wrote, ids are those of the metadata, and an image that has several
    texts, whose row is there again for each of them, comes once.

    Raises:
        DataError: a part is missing, damaged, or has not as many rows as its metadata.
        ShapeError: a part cannot be embeddings.
    """
    parts = {side: _numbered(folder / name, ".npy") for side, name in FOLDERS.items()}
    parts = {side: found for side, found in parts.items() if found}
    if not parts:
        raise DataError(f"{folder}: has no img_emb_N.npy and no text_emb_N.npy; name another")
    tables = _numbered(folder / METADATA, ".parquet")
    sides = {
        side: Vectors(
            str(folder / FOLDERS[side]),
            tuple(part for path in found.values() for part in read_npy(path).parts),
        )
        for side, found in parts.items()
    }
    _check_alike(folder, parts, tables)
    _check_rows(parts, tables, sides)
    if not tables:
        return sides
    opened = [open_table(path) for path in tables.values()]
    names = (IMAGE_PATH, CAPTION, SPLIT, *((IMAGE_ID, TEXT_ID) if _is_ours(folder) else ()))
    columns = {name: name for name in names if all(name in table.schema.names for table in opened)}
    labels = read_labels(str(folder / METADATA), opened, columns)
    if IMAGE_ID in columns or TEXT_ID in columns:
        return {side: _with_ids(side, vectors, labels) for side, vectors in sides.items()}
    return {
        side: Vectors(vectors.name, vectors.parts, _labels(side, labels, parts))
        for side, vectors in sides.items()
    }


def _is_ours(folder: Path) -> bool:
    """Whether ``csalign apply`` wrote the folder."""
    try:
        note = parse_json((folder / NOTE).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(note, dict) and note.get("format") == "csalign-aligned"


def _with_ids(side: Modality, vectors: Vectors, metadata: Labels) -> Vectors:
    """One side with the ids that the metadata gives, each image once."""
    found = metadata.columns
    if side is Modality.TEXT:
        names = {"id": TEXT_ID, "image_id": IMAGE_ID, "caption": CAPTION, "split": SPLIT}
    else:
        names = {"id": IMAGE_ID, "source": IMAGE_PATH, "split": SPLIT}
    columns = {known: found[name] for known, name in names.items() if name in found}
    kept = list(range(metadata.rows))
    if side is Modality.IMAGE and IMAGE_ID in found:
        first: dict[str | None, int] = {}
        for row, own in enumerate(found[IMAGE_ID]):
            first.setdefault(own, row)
        kept = list(first.values())
    columns = {name: [values[row] for row in kept] for name, values in columns.items()}
    labels = Labels(metadata.name, len(kept), columns, lambda row: metadata.where(kept[row]))
    return Vectors(vectors.name, tuple(_chosen(vectors.parts, kept)), labels)


def _chosen(parts: Sequence[Part], rows: Sequence[int]) -> Iterator[Part]:
    """The parts with some of their rows alone; `rows` are counted through all and ascend."""
    start = 0
    for part in parts:
        stop = start + len(part)
        own = np.array(rows[bisect_left(rows, start) : bisect_left(rows, stop)]) - start
        if len(own) == len(part):
            yield part
        elif len(own):
            shape = (len(own), *part.shape[1:])
            yield replace(part, shape=shape, read=_reader(part, own), numbers=own.tolist())
        start = stop


def _reader(part: Part, rows: Array) -> Callable[[int], Iterator[Array]]:
    def read(step: int) -> Iterator[Array]:
        start = 0
        for chunk in part.read(step):
            within = rows[(rows >= start) & (rows < start + len(chunk))] - start
            if len(within):
                yield chunk[within]
            start += len(chunk)

    return read


def _labels(side: Modality, metadata: Labels, parts: Mapping[Modality, object]) -> Labels:
    paths = metadata.columns.get(IMAGE_PATH)
    ids: Strings | None = paths
    if paths is not None and (None in paths or len(set(paths)) < len(paths)):
        ids = None
        if side is Modality.IMAGE:
            log.warning(
                "%s: image_path repeats or is empty, so rows are numbered, each with an image of "
                "its own",
                metadata.name,
            )
    columns: dict[str, Strings] = {} if ids is None else {"id": ids}
    if SPLIT in metadata.columns:
        columns["split"] = metadata.columns[SPLIT]
    if side is Modality.IMAGE and paths is not None:
        columns["source"] = paths
    if side is Modality.TEXT and CAPTION in metadata.columns:
        columns["caption"] = metadata.columns[CAPTION]
    if side is Modality.IMAGE and Modality.TEXT not in parts and CAPTION in metadata.columns:
        log.warning("%s: captions are left out, they have no embeddings", metadata.name)
    return Labels(metadata.name, metadata.rows, columns, metadata.where)


def _numbered(folder: Path, suffix: str) -> dict[int, Path]:
    """The files of a folder by their number, in order."""
    found: dict[int, Path] = {}
    for path in folder.iterdir() if folder.is_dir() else ():
        number = re.fullmatch(r"\w*?_(\d+)", path.stem)
        if path.suffix != suffix or number is None:
            continue
        other = found.setdefault(int(number[1]), path)
        if other != path:
            raise DataError(f"{path}: {other.name} has the same number; remove one of them")
    return dict(sorted(found.items()))


def _check_alike(
    folder: Path, parts: Mapping[Modality, Mapping[int, Path]], tables: Mapping[int, Path]
) -> None:
    groups = {FOLDERS[side]: set(found) for side, found in parts.items()}
    if tables:
        groups[METADATA] = set(tables)
    everything = set().union(*groups.values())
    for name, numbers in groups.items():
        missing = everything - numbers
        if missing:
            raise DataError(
                f"{folder / name}: has no part {min(missing)}, though others have; copy it there, "
                "or run clip-retrieval again"
            )


def _check_rows(
    parts: Mapping[Modality, Mapping[int, Path]],
    tables: Mapping[int, Path],
    sides: Mapping[Modality, Vectors],
) -> None:
    rows = {number: (path, open_table(path).rows) for number, path in tables.items()}
    for side, found in parts.items():
        for (number, path), part in zip(found.items(), sides[side].parts, strict=True):
            other, count = rows.setdefault(number, (path, len(part)))
            if len(part) != count:
                raise DataError(
                    f"{path}: has {len(part)} rows and {other} has {count}; the part is damaged, "
                    "run clip-retrieval on it again"
                )
