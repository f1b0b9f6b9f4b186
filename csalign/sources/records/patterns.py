"""One SOURCE that names several files: brace ranges, globs and lists."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from csalign.core.errors import ConfigError, DataError
from csalign.core.paths import is_remote, parse_location

_MOST_FILES = 100_000
_BRACES = re.compile(r"\{([^{}]*)\}")
_FORMS = "write {00000..00012}, or {a,b}"
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


def expand(source: str) -> list[Path] | None:
    """The files that a pattern names, in its order; those of a glob are sorted.

    Args:
        source: ``{00000..00012}`` and ``{a,b}`` stand for each of what is inside, ``*``, ``?`` and
            ``[..]`` for what is there, ``::`` joins several.

    Returns:
        None for a plain path.

    Raises:
        ConfigError: its braces are not a pattern, or it names more files than any data set has.
        DataError: a glob matches nothing, a file is named twice, or one is not there.
    """
    _check_braces(source)
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
    lost = [path for path in found if not is_remote(path) and not path.exists()]
    if lost:
        raise DataError(
            f"{source}: {len(lost)} of the {len(found)} files that it names are not there, such as "
            f"{lost[0]}; correct it, or bring them"
        )
    return found


def _check_braces(source: str) -> None:
    rest = _BRACES.sub("", source)
    if "{" in rest or "}" in rest:
        raise ConfigError(f"{source}: has a brace without its other half; {_FORMS}")
    for inside in _BRACES.findall(source):
        if "," not in inside and not _RANGE.fullmatch(inside):
            raise ConfigError(f"{source}: {{{inside}}} is neither a range nor a list; {_FORMS}")


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
