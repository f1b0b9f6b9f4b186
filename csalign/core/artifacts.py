"""What is at a path: a feature set, a run or an index, by the document that completes each."""

import tomllib
from enum import StrEnum
from pathlib import Path

from csalign.core.errors import DataError


class Kind(StrEnum):
    """A kind of artifact; its value names it in messages."""

    FEATURES = "a feature set"
    RUN = "a run"
    INDEX = "an index"


DOCUMENTS = {
    Kind.FEATURES: "manifest.json",
    Kind.RUN: "adapter.json",
    Kind.INDEX: "index.json",
}
"""The file that makes a folder an artifact of a kind; written last."""

_MAKERS = {
    Kind.FEATURES: "create one with csalign extract or import",
    Kind.RUN: "train one with csalign train",
    Kind.INDEX: "build one with csalign index",
}
_ARRAYS = {".npy", ".npz", ".safetensors", ".pt", ".pth", ".h5", ".hdf5", ".parquet", ".arrow"}


def kind_of(path: Path) -> Kind | None:
    """Return the kind of artifact that a folder is; None if it is not one."""
    return next((kind for kind, name in DOCUMENTS.items() if (path / name).is_file()), None)


def require_kind(path: Path, *wanted: Kind) -> None:
    """Raise DataError, with what is there and the remedy, unless an artifact of a kind is there.

    Args:
        path: of the folder, local or a URL.
        wanted: the kinds that will do; the first is the usual one.
    """
    usual = wanted[0]
    if any((path / DOCUMENTS[kind]).is_file() for kind in wanted):
        return
    remedy = _MAKERS[usual]
    if not path.exists():
        unfinished = path.with_name(f"{path.name}.partial")
        if path.name and unfinished.exists():
            remedy = f"{unfinished} is unfinished work; rerun its command to resume"
        raise DataError(f"{path}: no such {usual.value.split(' ', 1)[1]}; {remedy}")
    found = kind_of(path)
    if found is not None:
        instead = _instead(path, found) if usual is not Kind.INDEX else remedy
        raise DataError(f"{path}: is {found.value}, not {usual.value}; {instead}")
    if usual is Kind.FEATURES and path.suffix.lower() in _ARRAYS:
        raise DataError(
            f"{path}: is an array, not a feature set; import it first: csalign import "
            "image.npy text.npy --out features"
        )
    raise DataError(f"{path}: is not {usual.value} (no {DOCUMENTS[usual]} in it); {remedy}")


def _instead(path: Path, found: Kind) -> str:
    """Say what to pass where an artifact of another kind was wanted."""
    if found is Kind.FEATURES:
        return f"train one with csalign train {path} --out run"
    try:
        made_from = tomllib.loads((path / "config.toml").read_text(encoding="utf-8"))["features"]
    except (OSError, ValueError, KeyError):
        return "pass the features that it was made from"
    return f"pass its features, {made_from}"
