"""What a run keeps beside its weights: its lines, settings and surroundings, and their checksums.

``environment.json`` is written last. It holds the SHA-256 of the other two and carries one of
itself; a run that is unfinished, or of an older csalign, has none.
"""

import logging
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from csalign.core import atomic
from csalign.core.errors import SchemaError
from csalign.core.records import parse_json, read_object

log = logging.getLogger(__name__)

LINES = "metrics.jsonl"
ENVIRONMENT, CONFIG = "environment.json", "config.toml"
SUMS = "sha256"
"""In the environment: the checksum of each other file, by name."""


def write_environment(folder: Path, environment: Mapping[str, Any]) -> None:
    """Write what a finished run was made on, with the checksums of what else it wrote."""
    sums = {name: atomic.sha256_file(folder / name) for name in (CONFIG, LINES)}
    atomic.write_json(folder / ENVIRONMENT, {**environment, SUMS: sums})


def read_environment(folder: Path) -> dict[str, Any]:
    """What a run was made on, and `SUMS`; {} if it does not say.

    Raises:
        SchemaError: it is damaged.
    """
    path = folder / ENVIRONMENT
    return read_object(path, "train again, or remove it") if path.is_file() else {}


def read_lines(folder: Path) -> list[dict[str, Any]]:
    """What a run logged, a mapping a line; [] if it did not.

    Raises:
        SchemaError: the log is damaged.
    """
    path = folder / LINES
    text = _text(path)
    try:
        lines = [parse_json(line) for line in text.splitlines()]
    except ValueError as error:
        raise SchemaError(f"{path}: is damaged ({error}); train again") from None
    if not all(isinstance(line, dict) for line in lines):
        raise SchemaError(f"{path}: is damaged (a line is no object); train again")
    if not _is_as_written(folder, LINES):
        raise SchemaError(f"{path}: was changed or is damaged, by {ENVIRONMENT}; train again")
    return lines


def read_settings(folder: Path) -> dict[str, Any]:
    """What a run was told; {} if it does not say. It may be edited, which is told.

    Raises:
        SchemaError: it is damaged.
    """
    path = folder / CONFIG
    try:
        settings = tomllib.loads(_text(path))
    except ValueError as error:
        raise SchemaError(f"{path}: is damaged ({error}); train again") from None
    if path.is_file() and not _is_as_written(folder, CONFIG):
        log.warning("%s: is not as the run wrote it, by %s", path, ENVIRONMENT)
    return settings


def _is_as_written(folder: Path, name: str) -> bool:
    """Whether a file has the checksum that the run noted, if it noted one that can be read."""
    try:
        sums = read_environment(folder).get(SUMS)
    except SchemaError:
        return True
    if not isinstance(sums, dict) or name not in sums:
        return True
    path = folder / name
    return path.is_file() and atomic.sha256_file(path) == sums[name]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8") if path.is_file() else ""
    except UnicodeDecodeError as error:
        raise SchemaError(f"{path}: is damaged ({error}); train again") from None
