"""The output folder of clip-retrieval: img_emb/, text_emb/ and metadata/, with the same numbers."""

import logging
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from csalign.core.enums import Modality
from csalign.core.errors import DataError
from csalign.core.records import parse_json
from csalign.sources.arrays.base import Vectors, join, join_labels, read_named
from csalign.sources.arrays.files import open_npy
from csalign.sources.arrays.tables import read_label_table

FOLDERS = {Modality.IMAGE: "img_emb", Modality.TEXT: "text_emb"}
METADATA = "metadata"
NOTE = "aligned.json"

log = logging.getLogger(__name__)


def is_clip_retrieval(folder: Path) -> bool:
    """Return whether a folder has the layout of clip-retrieval."""
    return any((folder / name).is_dir() for name in FOLDERS.values())


def read_clip_retrieval(folder: Path) -> dict[Modality, Vectors]:
    """Open both sides, or the only one; row r of images, texts and metadata are one pair.

    An image's id is its path in the metadata if all paths differ, otherwise its row number. In the
    output of ``csalign apply``, ids are those of the metadata, and an image that is repeated for
    each of its texts is read once.

    Raises:
        DataError: a part is missing, damaged, or differs from its metadata in its number of rows.
        ShapeError: a part cannot be embeddings.
    """
    parts = {FOLDERS[side]: _by_number(folder / FOLDERS[side], ".npy") for side in Modality}
    parts = {name: files for name, files in parts.items() if files}
    if not parts:
        raise DataError(f"{folder}: has no img_emb_N.npy and no text_emb_N.npy; use another folder")
    tables = _by_number(folder / METADATA, ".parquet")
    _check_numbers(folder, {**parts, METADATA: tables} if tables else parts)
    labels = {n: read_label_table(path) for n, path in tables.items()}
    rows = {number: (tables[number], own.rows) for number, own in labels.items()}
    sides = {}
    for side, name in FOLDERS.items():
        if name not in parts:
            continue
        arrays = []
        for number, path in parts[name].items():
            array = read_named(path, open_npy, side, None)
            other, count = rows.setdefault(number, (path, len(array)))
            if len(array) != count:
                raise DataError(
                    f"{path}: has {len(array)} rows and {other} has {count}; the part is damaged, "
                    "run clip-retrieval on it again"
                )
            arrays.append(array)
        sides[side] = join(str(folder / name), arrays)
    if not tables:
        return sides
    metadata = join_labels(str(folder / METADATA), list(labels.values()))
    if Modality.TEXT not in sides and "caption" in metadata.names:
        log.warning("%s: captions are not imported, they have no embeddings", metadata.name)
    names = ["image_path", "caption", "split"]
    if _is_aligned(folder):
        names += ["image_id", "text_id"]
    own = replace(metadata, names=[name for name in names if name in metadata.names])
    if "image_path" in own.names and not {"image_id", "text_id"} & {*own.names}:
        paths = metadata.column("image_path")
        if not paths.null_count and len(paths.unique()) == len(paths):
            own = own.with_columns({"id": paths})
    return {
        side: replace(vectors, name=str(folder), labels=own, in_table=True)
        for side, vectors in sides.items()
    }


def _is_aligned(folder: Path) -> bool:
    """Return whether ``csalign apply`` wrote the folder."""
    try:
        note = parse_json((folder / NOTE).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(note, dict) and note.get("format") == "csalign-aligned"


def _by_number(folder: Path, suffix: str) -> dict[int, Path]:
    """Return the files of a folder by their number, in order."""
    found: dict[int, Path] = {}
    for path in folder.iterdir() if folder.is_dir() else ():
        number = re.fullmatch(r"\w*?_(\d+)", path.stem)
        if path.suffix != suffix or number is None:
            continue
        other = found.setdefault(int(number[1]), path)
        if other != path:
            raise DataError(f"{path}: {other.name} has the same number; remove one of them")
    return dict(sorted(found.items()))


def _check_numbers(folder: Path, groups: Mapping[str, Mapping[int, Path]]) -> None:
    for name, files in groups.items():
        missing = set().union(*groups.values()) - files.keys()
        if missing:
            raise DataError(
                f"{folder / name}: has no part {min(missing)}, unlike the other folders; copy it "
                "there, or run clip-retrieval again"
            )
