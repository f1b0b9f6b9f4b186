"""What a file or folder of embeddings is, told from its name and content."""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from itertools import pairwise
from pathlib import Path

from csalign.core.enums import Modality
from csalign.core.errors import ConfigError, DataError
from csalign.sources.arrays.arrow_files import (
    ARROW,
    PARQUET,
    TableFile,
    dataset_tables,
    has_vectors,
    open_table,
    read_tables,
)
from csalign.sources.arrays.base import EITHER_NAMES, IMAGE_NAMES, TEXT_NAMES, Labels, Vectors
from csalign.sources.arrays.clip_retrieval import FOLDERS, is_clip_retrieval, read_clip_retrieval
from csalign.sources.arrays.hdf5_files import open_hdf5
from csalign.sources.arrays.named import Container, natural_key, read_named
from csalign.sources.arrays.numpy_files import open_npz, read_npy
from csalign.sources.arrays.tensor_files import open_safetensors, read_torch

NAMES = {Modality.IMAGE: IMAGE_NAMES, Modality.TEXT: TEXT_NAMES}
TORCH = (".pt", ".pth", ".dpt")
HDF5 = (".h5", ".hdf5")
SUFFIXES = (".npy", ".npz", ".safetensors", *TORCH, *HDF5, *PARQUET, *ARROW)
PICKLES = (".pkl", ".pickle", ".joblib")

Columns = Mapping[Modality, str | None]

log = logging.getLogger(__name__)


def read_side(spec: Path, modality: Modality, column: str | None = None) -> Vectors:
    """Open one side's embeddings; nothing but headers and labels is read.

    Args:
        spec: a file of one of `SUFFIXES`, with an array's or column's name behind a colon where
            it holds several (``both.npz:images``); or a folder of such files, taken in natural
            order as one array; or a folder of ``datasets.save_to_disk``.
        modality: which side.
        column: the name in place of the one behind the colon.

    Raises:
        ConfigError: it needs a library that is not installed.
        DataError: it is not there, is damaged, holds pickled objects, or not the name.
        ShapeError: it cannot be embeddings.
    """
    path, name = split_spec(spec)
    if name is not None and column is not None:
        raise ConfigError(f"{spec}: names {name!r}, and --{modality}-column {column!r}; give one")
    wanted = name or column
    if path.is_dir():
        return _read_folder(path, modality, wanted)
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    return _read_file(path, modality, wanted)


def read_both(source: Path, columns: Columns) -> dict[Modality, Vectors]:
    """Open what holds both sides, or what tells by itself which side it holds.

    Args:
        source: a folder of clip-retrieval; a file of named arrays; Parquet or a dataset with a
            column of vectors a side.
        columns: names of the arrays or columns, None to recognise them.

    Returns:
        By side; rows of both are pairs where labels do not say otherwise.

    Raises:
        ConfigError: it does not hold both sides by name.
        DataError: it is not there or is damaged.
        ShapeError: it cannot be embeddings.
    """
    if not source.exists():
        file, name = split_spec(source)
        if name is not None:
            raise ConfigError(
                f"{source}: is one array, and SOURCE holds both sides; write --images "
                f"{file}:NAME and --texts {file}:NAME, or {file} with --image-column and "
                "--text-column"
            )
        raise DataError(f"{source}: no such file or folder")
    if source.is_dir() and is_clip_retrieval(source):
        return read_clip_retrieval(source)
    if source.is_dir() and (source / "manifest.json").is_file():
        raise ConfigError(f"{source}: is a feature set already")
    tables = _tables(source)
    if tables is not None:
        sides = [side for side in Modality if columns[side] or has_vectors(tables[0], side)]
        if sides:
            name = str(source)
            return {side: read_tables(name, tables, side, columns[side]) for side in sides}
    elif source.is_file() and source.suffix.lower() != ".npy":
        return {side: _read_file(source, side, columns[side], guess=False) for side in Modality}
    raise ConfigError(
        f"{source}: does not say which side it holds; name each side's with --images and --texts"
    )


def split_spec(spec: Path) -> tuple[Path, str | None]:
    """A file, and the name behind its colon or None; a name may hold slashes."""
    if spec.exists():
        return spec, None
    for above in (spec, *spec.parents):
        file, colon, name = above.name.partition(":")
        if colon and file and above.with_name(file).exists():
            below = spec.relative_to(above).as_posix() if above != spec else ""
            return above.with_name(file), f"{name}/{below}" if below else name
    return spec, None


def _read_file(
    path: Path, modality: Modality, wanted: str | None, *, guess: bool = True
) -> Vectors:
    """Open a file; without a guess its arrays must say which side they are."""
    suffix = path.suffix.lower()
    known = (*NAMES[modality], *EITHER_NAMES) if guess else NAMES[modality]
    if suffix in (*PARQUET, *ARROW):
        return read_tables(str(path), [open_table(path)], modality, wanted)
    if suffix in TORCH:
        return read_torch(path, wanted, known, guess=guess)
    if suffix == ".npy":
        if wanted is not None:
            raise DataError(f"{path}: holds one array without a name; leave out {wanted!r}")
        return read_npy(path)
    return read_named(path, _opener(path, suffix), wanted, known, guess=guess)


def _opener(path: Path, suffix: str) -> Callable[[], AbstractContextManager[Container]]:
    if suffix == ".npz":
        return partial(open_npz, path)
    if suffix == ".safetensors":
        return partial(open_safetensors, path)
    if suffix in HDF5:
        return partial(open_hdf5, path)
    if suffix in PICKLES:
        raise DataError(
            f"{path}: is a pickle, which csalign never loads, since it can run any program; save "
            "the array with numpy.save(path, array)"
        )
    raise DataError(f"{path}: embeddings are one of {', '.join(SUFFIXES)}")


def _read_folder(folder: Path, modality: Modality, wanted: str | None) -> Vectors:
    if is_clip_retrieval(folder):
        sides = read_clip_retrieval(folder)
        if modality not in sides:
            raise DataError(f"{folder}: has no {FOLDERS[modality]}; clip-retrieval made none")
        return sides[modality]
    tables = _tables(folder)
    if tables is not None:
        return read_tables(str(folder), tables, modality, wanted)
    parts = [_read_file(path, modality, wanted) for path in _shards(folder)]
    return _joined(str(folder), parts)


def _joined(name: str, shards: Sequence[Vectors]) -> Vectors:
    parts = tuple(part for shard in shards for part in shard.parts)
    labels = [shard.labels for shard in shards if shard.labels is not None]
    if len(labels) != len(shards):
        return Vectors(name, parts)
    columns = {
        known: [value for part in labels for value in part.columns[known]]
        for known in labels[0].columns
        if all(known in part.columns for part in labels)
    }
    rows = [(part, row) for part in labels for row in range(part.rows)]

    def where(row: int) -> str:
        part, within = rows[row]
        return part.where(within)

    return Vectors(name, parts, Labels(name, len(rows), columns, where))


def _tables(path: Path) -> list[TableFile] | None:
    """The tables that a file or folder is, None where it is something else."""
    if not path.is_dir():
        return [open_table(path)] if path.suffix.lower() in (*PARQUET, *ARROW) else None
    dataset = dataset_tables(path)
    if dataset is not None:
        return dataset
    shards = _shards(path)
    if shards[0].suffix.lower() in (*PARQUET, *ARROW):
        return [open_table(shard) for shard in shards]
    return None


def _shards(folder: Path) -> list[Path]:
    """The files of a folder in natural order, all of one kind."""
    found = [
        path
        for path in folder.iterdir()
        if path.suffix.lower() in SUFFIXES and not path.name.startswith((".", "_"))
    ]
    if not found:
        raise DataError(f"{folder}: has no file of embeddings ({', '.join(SUFFIXES)})")
    kinds = sorted({path.suffix.lower() for path in found})
    if len(kinds) > 1:
        raise DataError(f"{folder}: holds {' and '.join(kinds)} files; name one, or move the rest")
    found.sort(key=lambda path: natural_key(path.stem))
    _warn_of_gaps(folder, found)
    return found


def _warn_of_gaps(folder: Path, shards: Sequence[Path]) -> None:
    """A lost shard would shift all rows behind it, which nothing else notices."""
    for before, after in pairwise(shards):
        low, high = natural_key(before.stem)[0], natural_key(after.stem)[0]
        differ = [(a, b) for a, b in zip(low, high, strict=False) if a != b]
        if len(low) == len(high) and len(differ) == 1:
            first, second = differ[0]
            if isinstance(first, int) and isinstance(second, int) and second != first + 1:
                log.warning(
                    "%s: %s is followed by %s; is a part between them missing?",
                    folder,
                    before.name,
                    after.name,
                )
                return
