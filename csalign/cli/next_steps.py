"""What the next command is, which depends on the splits and the widths of a feature set."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from csalign.cli.render import command
from csalign.core.errors import CsalignError
from csalign.core.paths import parse_location

# As in `features.schema` and `evaluation.inspect`, which take a while to import.
MANIFEST, FAILURES, NO_SPLIT = "manifest.json", "failures.jsonl", "no split"
ALIGNED = " | "

Step = Sequence[object] | str
"""A command by its words, or a sentence."""


def first_free(name: str) -> str:
    """Return a name that the working directory does not have yet: run, run-2, ..."""
    number, found = 1, name
    while Path(found).exists():
        number += 1
        found = f"{name}-{number}"
    return found


def splits_of(features: Path | str) -> list[str | None]:
    """Return the names of the splits of a feature set, None for rows without one; [] if unknown."""
    from csalign.features.reader import FeatureSet

    try:
        return list(FeatureSet.open(parse_location(features)).splits())
    except CsalignError:
        return []


def has_one_width(features: Path | str) -> bool:
    """Return whether all sides of a feature set, two at least, have the same width."""
    from csalign.features.schema import read_manifest

    try:
        manifest = read_manifest(parse_location(features))
    except CsalignError:
        return False
    both = [own for own in (manifest.encoders.image, manifest.encoders.text) if own is not None]
    widths = [own.width for own in (*both, *(own.encoder for own in manifest.sides.values()))]
    return len(widths) > 1 and len({*widths}) == 1


def after_features(summary: Mapping[str, Any]) -> Iterator[Step]:
    """Suggest what to do with a feature set: split it, train on it, or index its one side."""
    counts, path = summary["counts"], summary["path"]
    pairs = counts["pairs"]
    if isinstance(pairs, Mapping):  # of each two sides
        pairs = any(number for own in pairs.values() for number in own.values())
    if pairs:
        if "test" not in summary["splits"]:
            yield no_test_split(path)
        yield ("train", path, "--out", first_free("run"))
    elif counts["images"] or counts["texts"]:
        side = [] if counts["images"] else ["--side", "text"]
        yield ("index", path, *side, "--out", first_free("index"))


def no_test_split(features: Path | str) -> str:
    """Word that no rows are held out for a test, and how to hold some out."""
    from csalign.features.schema import read_manifest

    options = read_manifest(parse_location(features)).test_split_options
    how = command("split", features, *options.split())
    return f"no test split; make one with: {how}"
