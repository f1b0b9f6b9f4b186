"""Recognise a file or folder of embeddings by its name and content."""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

from csalign.core.enums import Modality
from csalign.core.errors import ConfigError, DataError
from csalign.sources.arrays import base, files
from csalign.sources.arrays.clip_retrieval import FOLDERS, is_clip_retrieval, read_clip_retrieval
from csalign.sources.arrays.files import LABELS, dataset_files, open_table, read_labels
from csalign.sources.arrow import ARROW, PARQUET

TABLES = (*PARQUET, *ARROW)
OPENERS: dict[str, base.Opener] = {
    ".npy": files.open_npy,
    ".npz": files.open_npz,
    ".safetensors": files.open_safetensors,
    **dict.fromkeys((".pt", ".pth", ".dpt"), files.open_torch),
    **dict.fromkeys((".h5", ".hdf5"), files.open_hdf5),
    **dict.fromkeys(TABLES, open_table),
}
PICKLES = (".pkl", ".pickle", ".joblib")

log = logging.getLogger(__name__)


def read_side(spec: Path, modality: Modality, column: str | None = None) -> base.Vectors:
    """Open one side's embeddings; only headers and labels are read.

    Args:
        spec: a file of one of `OPENERS`, followed by a colon and the name of an array or column
            if it contains several (``both.npz:images``); a folder of such files, joined in natural
            order; or a folder of ``datasets.save_to_disk`` or clip-retrieval.
        modality: which side.
        column: the name, instead of after a colon.

    Raises:
        ConfigError: an optional library is not installed.
        DataError: it is missing, damaged or a pickle, or has no array of the name.
        ShapeError: it cannot be embeddings.
    """
    path, name = split_spec(spec)
    if name is not None and column is not None:
        raise ConfigError(f"{spec}: names {name!r}, and --{modality}-column {column!r}; pass one")
    wanted = name or column
    if path.is_dir() and is_clip_retrieval(path):
        sides = read_clip_retrieval(path)
        if modality not in sides:
            raise DataError(f"{path}: has no {FOLDERS[modality]}; run clip-retrieval for that side")
        return sides[modality]
    if not path.exists():
        raise DataError(f"{path}: no such file")
    return _read_all(path, modality, wanted)


def read_both(source: Path, columns: Mapping[Modality, str | None]) -> dict[Modality, base.Vectors]:
    """Open a source of both sides, or one that states which side it contains.

    Args:
        source: a folder of clip-retrieval; a file of named arrays; Parquet or a dataset with one
            column of vectors per side.
        columns: names of the arrays or columns, None to recognise them.

    Returns:
        By side; rows of both are pairs unless labels state otherwise.

    Raises:
        ConfigError: its arrays do not have the sides' names.
        DataError: it is missing or damaged.
        ShapeError: it cannot be embeddings.
    """
    if not source.exists():
        file, name = split_spec(source)
        if name is not None:
            raise ConfigError(
                f"{source}: is one array, and SOURCE contains both sides; write --images "
                f"{file}:NAME and --texts {file}:NAME, or {file} with --image-column and "
                "--text-column"
            )
        raise DataError(f"{source}: no such file or folder")
    if source.is_dir() and is_clip_retrieval(source):
        return read_clip_retrieval(source)
    if source.is_dir() and (source / "manifest.json").is_file():
        raise ConfigError(f"{source}: is a feature set already")
    first, _ = _files_of(source)[0]
    sides: Sequence[Modality] = ()
    if first.suffix.lower() in TABLES:
        with open_table(first) as table:
            sides = [
                s for s in Modality if columns[s] or base.first_of(base.NAMES[s], table.headers)
            ]
    elif source.is_file() and source.suffix.lower() != ".npy":
        sides = tuple(Modality)
    if sides:
        return {side: _read_all(source, side, columns[side], guess=False) for side in sides}
    raise ConfigError(
        f"{source}: does not state which side it contains; pass --images and --texts instead"
    )


def split_spec(spec: Path) -> tuple[Path, str | None]:
    """Split off the name after a colon, which may contain slashes; None if there is none."""
    if spec.exists():
        return spec, None
    for above in (spec, *spec.parents):
        file, colon, name = above.name.partition(":")
        if colon and file and above.with_name(file).exists():
            below = spec.relative_to(above).as_posix() if above != spec else ""
            return above.with_name(file), f"{name}/{below}" if below else name
    return spec, None


def _read_all(
    path: Path, modality: Modality, wanted: str | None, *, guess: bool = True
) -> base.Vectors:
    """Open a file or folder; without `guess` its arrays must have the side's usual name."""
    arrays = []
    for file, split in _files_of(path):
        suffix = file.suffix.lower()
        if suffix in PICKLES:
            raise DataError(
                f"{file}: is a pickle, which is never loaded, since it can run any program; save "
                "the array with numpy.save(path, array)"
            )
        if suffix not in OPENERS:
            raise DataError(f"{file}: embeddings are one of {', '.join(OPENERS)}")
        array = base.read_named(file, OPENERS[suffix], modality, wanted, guess=guess)
        if suffix in TABLES:
            array = replace(array, labels=read_labels(file, LABELS[modality], split))
        arrays.append(array)
    return base.join(str(path), arrays)


def _files_of(path: Path) -> list[tuple[Path, str | None]]:
    """Return the files to read, each with the split of its rows if known."""
    if path.is_file():
        return [(path, None)]
    if any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return dataset_files(path)
    return [(file, None) for file in _files_in(path)]


def _files_in(folder: Path) -> list[Path]:
    """Return the files of embeddings in a folder, all of one kind, in natural order."""
    found = [
        path
        for path in folder.iterdir()
        if path.suffix.lower() in OPENERS and not path.name.startswith((".", "_"))
    ]
    if not found:
        raise DataError(f"{folder}: has no file of embeddings ({', '.join(OPENERS)})")
    kinds = sorted({path.suffix.lower() for path in found})
    if len(kinds) > 1:
        raise DataError(
            f"{folder}: contains {' and '.join(kinds)} files; pass one of them, or move the others"
        )
    found.sort(key=lambda path: base.natural_key(path.stem))
    for before, after in pairwise(found):  # a missing file would shift all later rows
        low, high = (re.fullmatch(r"(.*?)(\d+)(\D*)", path.stem) for path in (before, after))
        if low and high and low[1] == high[1] and int(high[2]) > int(low[2]) + 1:
            log.warning(
                "%s: %s is followed by %s; is a file between them missing?",
                *(folder, before.name, after.name),
            )
            break
    return found
