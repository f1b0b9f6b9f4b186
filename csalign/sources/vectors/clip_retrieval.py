"""The output folder of clip-retrieval: img_emb/, text_emb/ and metadata/, numbered alike."""

import logging
import re
from collections.abc import Mapping
from pathlib import Path

from csalign.enums import Modality
from csalign.errors import DataError
from csalign.sources.vectors.arrow_files import open_table, read_labels
from csalign.sources.vectors.base import Labels, Strings, Vectors
from csalign.sources.vectors.numpy_files import read_npy

FOLDERS = {Modality.IMAGE: "img_emb", Modality.TEXT: "text_emb"}
METADATA = "metadata"
IMAGE_PATH, CAPTION, SPLIT = "image_path", "caption", "split"

log = logging.getLogger(__name__)


def is_clip_retrieval(folder: Path) -> bool:
    """Whether a folder is laid out as clip-retrieval does."""
    return any((folder / name).is_dir() for name in FOLDERS.values())


def read_clip_retrieval(folder: Path) -> dict[Modality, Vectors]:
    """Both sides, or the one that is there; row r of images, texts and metadata are one pair.

    An image's id is its path in the metadata, where no path repeats; otherwise its row number.

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
    columns = {
        name: name
        for name in (IMAGE_PATH, CAPTION, SPLIT)
        if all(name in table.schema.names for table in opened)
    }
    labels = read_labels(str(folder / METADATA), opened, columns)
    return {
        side: Vectors(vectors.name, vectors.parts, _labels(side, labels, parts))
        for side, vectors in sides.items()
    }


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
