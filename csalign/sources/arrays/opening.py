"""Recognise a file or folder of embeddings by its name and content."""

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa

from csalign.core.enums import Modality
from csalign.core.errors import ConfigError, CsalignError, DataError
from csalign.core.paths import is_remote, likely_meant, stand_in
from csalign.sources.arrays import base, files, naming
from csalign.sources.arrays.clip_retrieval import FOLDERS, is_clip_retrieval, read_clip_retrieval
from csalign.sources.arrays.tables import LISTS, dataset_files, open_table, read_label_table
from csalign.sources.arrow import ARROW, PARQUET
from csalign.sources.labels import Labels
from csalign.sources.records.files import translate_errors

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
_MAX_BYTES = 256 << 20  # of files beside arrays, except Parquet
# How a file begins, with the suffixes of its kind.
_BEGINNINGS = {
    b"\x93NUMPY": (".npy",),
    b"PK\x03\x04": (".npz", ".pt", ".pth", ".dpt"),
    b"\x89HDF\r\n\x1a\n": (".h5", ".hdf5"),
    b"PAR1": PARQUET,
    b"ARROW1": ARROW,
}

log = logging.getLogger(__name__)


def read_side(spec: Path, modality: str, column: str | None = None) -> base.Vectors:
    """Open one side's embeddings; only headers and labels are read.

    Args:
        spec: a file of one of `OPENERS`, followed by a colon and the name of an array or column
            if it contains several (``both.npz:images``); a folder of such files, joined in natural
            order; or a folder of ``datasets.save_to_disk`` or clip-retrieval.
        modality: the side: a `Modality`, or the name of any other.
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
        sides = {str(side): own for side, own in read_clip_retrieval(path).items()}
        if modality not in sides:
            folders = {str(side): folder for side, folder in FOLDERS.items()}
            missing = folders.get(modality, f"side {modality}")
            raise DataError(f"{path}: has no {missing}; run clip-retrieval for that side")
        return sides[modality]
    if not path.exists():
        raise DataError(f"{path}: no such file{likely_meant(path)}")
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
        ConfigError: it contains one array.
        DataError: it is missing or damaged, or its arrays are not recognised.
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
        raise DataError(f"{source}: no such file or folder{likely_meant(source)}")
    if source.is_dir() and is_clip_retrieval(source):
        return read_clip_retrieval(source)
    if source.is_dir() and (source / "manifest.json").is_file():
        raise ConfigError(f"{source}: is a feature set already")
    first, _ = _files_of(source)[0]
    chosen = _both_names(first, columns)
    return {side: _read_all(source, side, name) for side, name in chosen.items()}


def _both_names(path: Path, columns: Mapping[Modality, str | None]) -> dict[Modality, str]:
    """Choose the array of each side in a file, or of the only side that it has."""
    with _opener(path)(path) as file:
        pass
    if base.UNNAMED in file.headers:
        raise ConfigError(
            f"{path}: contains one array, which has no name and no side; pass both files: csalign "
            f"import {path} text.npy --out features, or name the side of this one: csalign import "
            f"--texts {path} --out features"
        )
    fitting = {
        side: [name] if (name := columns[side]) else naming.of_side(file.vectors, side)
        for side in Modality
    }
    chosen = {side: names[0] for side, names in fitting.items() if len(names) == 1}
    rest = [name for name in file.vectors if name not in chosen.values()]
    missing = [side for side in Modality if side not in chosen]
    several = next((side for side in missing if len(fitting[side]) > 1), None)
    if len(missing) == 1 and len(rest) == 1 and len(file.vectors) == 2:
        side = missing.pop()
        chosen[side] = rest[0]
        log.info("%s: %s are the %s embeddings, as the other vectors", path, rest[0], side)
    elif several is not None:
        names = fitting[several]
        raise DataError(
            f"{path}: {', '.join(names)} are all named like {several} embeddings; choose one, such "
            f"as --{several}-column {names[0]}"
        )
    elif (missing and rest) or not chosen:
        options = " ".join(f"--{s}-column {n}" for s, n in zip(missing, rest, strict=False))
        raise DataError(
            f"{path}: no array looks like the {' or the '.join(missing)} embeddings (arrays: "
            f"{file}); name {'them' if len(missing) > 1 else 'it'}, such as with "
            f"{options or '--image-column NAME --text-column NAME'}{file.remedy(missing)}"
        )
    for side in missing:
        if remedy := file.remedy([side]):
            raise DataError(f"{path}: has no {side} embeddings{remedy}")
        log.warning("%s: has no %s embeddings, so %ss are not imported", path, side, side)
    return chosen


def split_spec(spec: Path) -> tuple[Path, str | None]:
    """Split off the name after a colon, which may contain slashes; None if there is none."""
    if spec.exists():
        return spec, None
    for above in (spec, *spec.parents):
        file, colon, name = above.name.partition(":")
        if colon and file and above.with_name(file).exists():
            below = spec.relative_to(above).as_posix() if above != spec else ""
            name = name.removeprefix(":")
            return above.with_name(file), f"{name}/{below}" if below else name
    return spec, None


def _read_all(path: Path, modality: str, wanted: str | None) -> base.Vectors:
    arrays = []
    found = _files_of(path)
    for file, split in found:
        array = base.read_named(file, _opener(file), modality, wanted)
        if split is not None and "split" not in array.labels.names:
            column = pa.repeat(pa.scalar(split, pa.large_string()), len(array))
            array = replace(array, labels=array.labels.with_columns({"split": column}))
        arrays.append(array)
    if len(found) > 1 and all(len(array) == 1 and not array.labels for array in arrays):
        for row, (file, _) in enumerate(found):  # an item each
            name = pa.array([file.stem], pa.large_string())
            labels = arrays[row].labels.with_columns({"file": name})
            arrays[row] = replace(arrays[row], labels=labels)
    gap = _gap_in([file for file, _ in found])
    if gap:
        log.warning("%s: %s", path, gap)
    return replace(base.join(str(path), arrays), gap=gap)


def labels_beside(
    sides: Mapping[Any, base.Vectors], *, of_all: bool = True, given: Iterable[Path] = ()
) -> dict[Any, Labels]:
    """Return the lists and tables of keys beside arrays without labels, `of_all` sides or of some.

    They have one value per row, and begin with the array's name, name its side, as
    ``image_ids.json`` does, or are named like keys in a folder of their own with it. Others with
    such names are warned about, unless they are read because they were `given`.
    """
    read_otherwise = {path.absolute() for path in given if not is_remote(path)}
    arrays = {side: Path(vectors.name) for side, vectors in sides.items()}
    folders = {side: path if path.is_dir() else path.parent for side, path in arrays.items()}
    found: dict[Any, list[Labels]] = {side: [] for side in sides}
    unread: dict[str, None] = {}
    for side, folder in folders.items():
        if sides[side].labels or is_remote(folder) or not folder.is_dir():
            continue
        near = {own: arrays[own] for own, other in folders.items() if other == folder}
        files = {*folder.iterdir()} - {*near.values()}
        for file in sorted(own for own in files if own.absolute() not in read_otherwise):
            owners = _owners_of(file, near)
            if side in owners and (labels := _read_beside(file, len(sides[side]))):
                unread[labels.name] = None
                found[side] += [labels] if len(owners) == 1 else []
    used: dict[Any, Labels] = {}
    if of_all and not (len(sides) == 2 and all(found.values())):
        found = {}
    for side, named in ((side, own) for side, own in found.items() if own):
        columns = {name: own.column(name) for own in reversed(named) for name in own.names}
        used[side] = named[0].with_columns(columns)
        for own in named:
            log.info("%s: is read as keys of %s", own.name, arrays[side])
            unread.pop(own.name, None)
    if unread:
        first, *others = unread
        log.warning(
            "%s: has one value per row and is not read; %s%s",
            first,
            "pass it with --image-table or --text-table" if of_all else "name it after its array",
            f" ({len(others)} more files are like it)" if others else "",
        )
    return used


def _owners_of(file: Path, arrays: Mapping[Any, Path]) -> list[Any]:
    """Return the sides whose array in the folder a file may contain the keys of, by its name."""
    if file.suffix.lower() not in (*LISTS, ".csv", ".tsv", ".jsonl", ".parquet", *PICKLES):
        return []
    named = {
        side: len(path.stem)
        for side, path in arrays.items()
        if re.match(rf"{re.escape(path.stem)}([_.-]|$)", file.stem)
    }
    if named:
        return [side for side, length in named.items() if length == max(named.values())]
    if (side := naming.label_side(file.stem)) is not None:
        return [side]
    is_of_ids = naming.is_key(file.stem) or naming.words_of(file.stem) & {"metadata", "meta"}
    return [*arrays] if is_of_ids else []


def _read_beside(file: Path, rows: int) -> Labels | None:
    try:
        if file.is_file() and (file.suffix == ".parquet" or file.stat().st_size <= _MAX_BYTES):
            labels = read_label_table(file)
            return labels if labels.rows == rows and labels.names else None
    except (CsalignError, OSError) as error:
        if file.suffix in PICKLES or (naming.is_key(file.stem) and file.suffix != ".npy"):
            log.warning("%s, so it is not read as keys", error)
    return None


def _opener(path: Path) -> base.Opener:
    """Return what opens a file, after a look at how it begins.

    Raises:
        DataError: it is a pickle, a Git LFS pointer, or of another kind than its suffix.
    """
    suffix = path.suffix.lower()
    if suffix in PICKLES:
        raise DataError(
            f"{path}: is a pickle, which is never loaded, since it can run any program; save "
            "the array with numpy.save(path, array)"
        )
    with translate_errors(path), path.open("rb") as file:
        start = file.read(1024)
    if (problem := stand_in(start)) is not None:
        raise DataError(f"{path}: {problem}")
    kinds = next((own for begin, own in _BEGINNINGS.items() if start.startswith(begin)), ())
    if kinds and suffix not in kinds:
        names = " or ".join(path.with_suffix(own).name for own in kinds[:2])
        raise DataError(
            f"{path}: has the content of another format than its name; rename it {names}"
        )
    if suffix not in OPENERS:
        remedy = {
            **dict.fromkeys(
                (".csv", ".tsv"), "; pandas.read_csv(path).to_parquet('x.parquet') does"
            ),
            **dict.fromkeys((".txt", ".json", ".jsonl"), "; numpy.save(path, array) writes .npy"),
        }.get(suffix, "")
        raise DataError(f"{path}: embeddings are one of {', '.join(OPENERS)}{remedy}")
    return OPENERS[suffix]


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
        if not _is_list(path)
    ]
    if not found:
        raise DataError(f"{folder}: has no file of embeddings ({', '.join(OPENERS)})")
    kinds = sorted({path.suffix.lower() for path in found})
    if len(kinds) > 1:
        raise DataError(
            f"{folder}: contains {' and '.join(kinds)} files; pass one of them, or move the others"
        )
    return sorted(found, key=lambda path: base.natural_key(path.stem))


def _gap_in(paths: list[Path]) -> str:
    """Say after which numbered file one is missing, which would shift all later rows."""
    for before, after in pairwise(paths):
        low, high = (re.fullmatch(r"(.*?)(\d+)(\D*)", path.stem) for path in (before, after))
        if low and high and low[1] == high[1] and int(high[2]) > int(low[2]) + 1:
            return f"{before.name} is followed by {after.name}; is a file between them missing?"
    return ""


def _is_list(path: Path) -> bool:
    """Return whether a file in a folder of arrays contains their keys."""
    if path.suffix.lower() != ".npy" or not naming.is_key(path.stem):
        return False
    with files.open_npy(path) as file:
        return len(file.headers[base.UNNAMED].shape) == 1
