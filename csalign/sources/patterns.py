"""One SOURCE that names several files: brace ranges, globs and lists."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from csalign.errors import ConfigError, DataError
from csalign.locations import parse_location

_MOST_FILES = 100_000
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


def expand(source: str) -> list[Path] | None:
    """The files that a pattern names, in its order; those of a glob are sorted.

    Args:
        source: ``{00000..00012}`` and ``{a,b}`` stand for each of what is inside, ``*``, ``?`` and
            ``[..]`` for what is there, ``::`` joins several.

    Returns:
        None for a plain path.

    Raises:
        ConfigError: it names more files than any data set has.
        DataError: a glob matches nothing, or a file is named twice.
    """
    parts = source.split("::")
    if len(parts) == 1 and not _BRACES.search(source) and not _is_glob(source):
        return None
    found: list[Path] = []
    for part in parts:
        for text in _braces(part):
            found += _glob(text) if _is_glob(text) else [parse_location(text)]
            if len(found) > _MOST_FILES:
                raise ConfigError(f"{source}: names more than {_MOST_FILES} files")
    if len({str(path) for path in found}) < len(found):
        raise DataError(f"{source}: names a file twice; name each once")
    return found


def common_folder(paths: Sequence[Path]) -> Path:
    """The deepest folder that all of the files are below."""
    folder = paths[0].parent
    while not all(_is_below(path, folder) for path in paths):
        if folder == folder.parent:
            break
        folder = folder.parent
    return folder


def _is_below(path: Path, folder: Path) -> bool:
    return folder in path.parents


def _is_glob(text: str) -> bool:
    return re.search(r"[*?[]", text) is not None


def _braces(text: str) -> Iterator[str]:
    match = _BRACES.search(text)
    if match is None:
        yield text
        return
    for choice in _choices(match[1]):
        for rest in _braces(text[match.end() :]):
            yield f"{text[: match.start()]}{choice}{rest}"


def _choices(inside: str) -> Iterator[str]:
    limits = _RANGE.fullmatch(inside)
    if limits is None:
        yield from inside.split(",")
        return
    first, last = int(limits[1]), int(limits[2])
    step = 1 if first <= last else -1
    for number in range(first, last + step, step):
        yield f"{number:0{len(limits[1])}d}"


def _glob(text: str) -> list[Path]:
    # The part before the first star is a plain path, from which both kinds of path can glob.
    plain, slash, _ = re.split(r"[*?[]", text, maxsplit=1)[0].rpartition("/")
    base = parse_location(plain + slash if plain or slash else ".")
    found = sorted(base.glob(text[len(plain + slash) :]), key=str)
    if not found:
        raise DataError(f"{text}: matches no file")
    return found
