"""Files and folders that appear under their final name only when they are complete."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from csalign.errors import OutputError

ARTIFACT_MARKS = ("manifest.json", "adapter.json", "config.toml")
"""A folder that holds one of these was made by csalign, and ``--overwrite`` may replace it."""


def write_text(path: Path, text: str) -> None:
    r"""Write a text file whole or not at all: temporary name, fsync, rename.

    Args:
        path: final path; its folder must exist.
        text: content, written as UTF-8 with ``\n`` line ends.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_json(path: Path, document: Any) -> None:
    """Write a JSON document whole or not at all; NaN is refused rather than written."""
    write_text(path, json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def fsync_path(path: Path) -> None:
    """Force a file's content, or a folder's entries, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_output(out: Path, *, overwrite: bool, inputs: tuple[Path, ...] = ()) -> None:
    """Refuse an output folder that must not be written, before any work is done.

    Args:
        out: the folder to be made.
        overwrite: whether an artifact that is there may be replaced.
        inputs: folders and files that are read and so must not be replaced.

    Raises:
        OutputError: `out` exists and `overwrite` is false; `out` is a file, a folder that csalign
            did not make, one of `inputs`, or holds one of them.
    """
    _restore_interrupted_swap(out)
    resolved = out.resolve()
    for source in inputs:
        if source.exists() and source.resolve().is_relative_to(resolved):
            raise OutputError(f"{out}: this is where {source} is read from; choose another --out")
    if not out.exists():
        return
    if not out.is_dir():
        raise OutputError(f"{out}: is a file; choose another --out")
    empty = not any(out.iterdir())
    if empty:
        return
    if not any((out / mark).is_file() for mark in ARTIFACT_MARKS):
        raise OutputError(f"{out}: holds files that csalign did not make; choose another --out")
    if not overwrite:
        raise OutputError(f"{out}: exists; choose another --out, or replace it with --overwrite")


@contextmanager
def staged_folder(out: Path, *, keep_on_failure: bool = False) -> Iterator[Path]:
    """Build a folder under ``OUT.partial`` and move it to `out` when the block succeeds.

    What stood at `out` stays untouched until then. Callers run `check_output` first.

    Args:
        out: final folder.
        keep_on_failure: leave ``OUT.partial`` in place when the block raises, since it holds
            something that the user can use; otherwise it is removed.

    Yields:
        The folder to write into: fresh, empty, on the same file system as `out`.
    """
    partial = out.with_name(out.name + ".partial")
    _remove(partial)
    partial.mkdir(parents=True)
    try:
        yield partial
        fsync_path(partial)
    except BaseException:
        if not keep_on_failure:
            _remove(partial)
        raise
    _replace(partial, out)


def _replace(partial: Path, out: Path) -> None:
    previous = _previous(out)
    if out.exists():
        out.rename(previous)
    partial.rename(out)
    fsync_path(out.parent)
    _remove(previous)


def _restore_interrupted_swap(out: Path) -> None:
    """Undo the first half of `_replace` if a run was killed between its two renames."""
    previous = _previous(out)
    if previous.is_dir() and not out.exists():
        previous.rename(out)
    _remove(previous)


def _previous(out: Path) -> Path:
    return out.with_name(out.name + ".previous")


def _remove(folder: Path) -> None:
    if folder.is_dir():
        shutil.rmtree(folder)
