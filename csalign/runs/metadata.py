"""The files of a run beside its weights, and their checksums.

``environment.json`` is written last and contains the SHA-256 of the others; an unfinished run, or
one of csalign 0.1.0, may have none.
"""

import logging
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from csalign.core import atomic
from csalign.core.errors import DataError, SchemaError
from csalign.core.paths import is_remote, parse_location
from csalign.core.records import parse_json, read_object
from csalign.features.arrays import IN_MEMORY
from csalign.features.schema import MANIFEST, read_manifest, same_rows

log = logging.getLogger(__name__)

LINES = "metrics.jsonl"
ENVIRONMENT, CONFIG = "environment.json", "config.toml"
ADAPTER = "adapter.json"  # as in `adapters.checkpoint`, which takes seconds to import
ENTRIES = frozenset(
    {ADAPTER, "adapter.safetensors", "checkpoints", CONFIG, ENVIRONMENT, LINES}
    | {"metrics.csv", "tensorboard", "wandb"}
)
"""Names in the folder of a run."""
# Keys in ``environment.json``: the checksum of each other file, by name; the absolute path of the
# features that the run was trained on.
SUMS, FEATURES = "sha256", "features"


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


def find_refit(lines: Sequence[Mapping[str, Any]]) -> dict[str, int] | None:
    """Return the "pairs" and "steps" of the refit in a log; None if there was none."""
    return next((line["refit"] for line in reversed(lines) if "refit" in line), None)


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


def find_features(run: Path, fingerprint: str) -> Path:
    """Find the feature set that a run was trained on.

    Searched are the path that the run recorded, absolute and as it was typed, the folder of the
    run, and the working directory. A set with another fingerprint does not count; one that differs
    in nothing but its splits is used only if there is no exact match.

    Raises:
        DataError: it is in none of these places, or was changed.
        SchemaError: the run does not record its features.
    """
    folder = run_folder(run)
    recorded, typed = read_environment(folder).get(FEATURES), read_settings(folder).get("features")
    remedy = (
        f"name the set to use, as csalign eval FEATURES --adapter {run} or csalign compare {run} "
        "--features FEATURES"
    )
    known = [place for place in (typed, recorded) if isinstance(place, str)]
    if not known:
        raise SchemaError(f"{folder / CONFIG}: names no features; {remedy}")
    places = [parse_location(place) for place in known]
    if places[0].name == IN_MEMORY:
        raise DataError(
            f"{run}: was trained on arrays in memory, which are not stored with it; pass arrays: "
            f"csalign.evaluate(images, texts, adapter={str(run)!r}) or "
            f"csalign.compare((images, texts), {str(run)!r})"
        )
    local = [place for place in places if not is_remote(place)]
    places += [folder.absolute().parent / place for place in local if not place.is_absolute()]
    places += [near / place.name for place in local for near in (folder.absolute().parent, Path())]
    found = {
        place: read_manifest(place).fingerprint()
        for place in dict.fromkeys(places)
        if (place / MANIFEST).is_file()
    }
    for is_found in (str.__eq__, same_rows):  # a set with other splits is the second choice
        for place, own in found.items():
            if is_found(own, fingerprint):
                return place
    for place, own in found.items():
        raise DataError(
            f"{run}: was trained on features with the fingerprint {fingerprint[:12]}, but "
            f"{place} has {own[:12]}, so it was changed or is another set; {remedy}"
        )
    raise DataError(
        f"{run}: its features are not at {places[0]}, nor beside the run or in this folder; "
        f"{remedy}"
    )


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
