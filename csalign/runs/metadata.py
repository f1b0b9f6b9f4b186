"""The files of a run beside its weights, and their checksums.

``environment.json`` is written last and contains the SHA-256 of the others; an unfinished run, or
one of csalign 0.1.0, may have none.
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
ADAPTER = "adapter.json"  # as in `adapters.checkpoint`, which takes seconds to import
ENTRIES = frozenset(
    {ADAPTER, "adapter.safetensors", "checkpoints", CONFIG, ENVIRONMENT, LINES}
    | {"metrics.csv", "tensorboard", "wandb"}
)
"""Names in the folder of a run."""
SUMS = "sha256"  # key in ``environment.json``: the checksum of each other file, by name


def write_environment(folder: Path, environment: Mapping[str, Any]) -> None:
    """Write the environment of a finished run, with the checksums of its other files."""
    sums = {name: atomic.sha256_file(folder / name) for name in (CONFIG, LINES, ADAPTER)}
    atomic.write_json(folder / ENVIRONMENT, {**environment, SUMS: sums})


def read_environment(folder: Path) -> dict[str, Any]:
    """Read the environment of a run, with `SUMS`; {} if there is none, SchemaError if damaged."""
    path = folder / ENVIRONMENT
    return read_object(path, "train again, or remove it") if path.is_file() else {}


def read_lines(folder: Path) -> list[dict[str, Any]]:
    """Read the log of a run, one mapping per line; [] if there is none, SchemaError if damaged."""
    path = folder / LINES
    check_unchanged(folder, LINES)
    if not path.is_file():
        return []
    try:
        lines = [parse_json(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if not all(isinstance(line, dict) for line in lines):
            raise ValueError("a line is not an object")
    except ValueError as error:
        raise SchemaError(f"{path}: is damaged ({error}); train again") from None
    return lines


def read_settings(folder: Path) -> dict[str, Any]:
    """Read the settings of a run; {} if there are none, SchemaError if damaged; warn if edited."""
    path = folder / CONFIG
    try:
        settings = tomllib.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (ValueError, RecursionError) as error:
        raise SchemaError(f"{path}: is damaged ({error}); train again") from None
    try:
        check_unchanged(folder, CONFIG)
    except SchemaError as error:
        log.warning("%s", error)
    return settings


def check_unchanged(folder: Path, name: str) -> None:
    """Raise SchemaError if a file lacks the checksum that the run recorded, if it recorded one."""
    try:
        expected = read_environment(folder)[SUMS][name]
    except (SchemaError, KeyError, TypeError):
        return
    path = folder / name
    found = atomic.sha256_file(path) if path.is_file() else None
    if found != expected:
        raise SchemaError(
            f"{path}: was changed or is damaged (SHA-256 {found}, in {ENVIRONMENT} {expected}); "
            "restore it, or train again"
        )


def run_folder(run: Path) -> Path:
    """Return the run that a checkpoint belongs to, or the run itself."""
    return run.parent.parent if run.parent.name == "checkpoints" else run
