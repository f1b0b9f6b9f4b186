"""``csalign compare``: several evaluations side by side."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from csalign.errors import DataError

FIGURES = {
    "mean_recall": ("retrieval", "mean_recall"),
    "image_to_text_R@1": ("retrieval", "image_to_text", "R@1"),
    "text_to_image_R@1": ("retrieval", "text_to_image", "R@1"),
    "centroid_distance": ("gap", "centroid_distance"),
    "rmg": ("gap", "rmg"),
    "cs_divergence": ("gap", "cs_divergence"),
    "frechet": ("gap", "frechet"),
}
"""What is compared, and where ``csalign eval --json`` has it."""


def compare(paths: Sequence[Path]) -> dict[str, Any]:
    """Read documents of ``csalign eval --json`` and line up their figures.

    Args:
        paths: the documents.

    Returns:
        ``{"evaluations": [{"name": ..., "split": ..., FIGURES...}, ...]}`` in the order given.
        A name is the adapter's path, or the features' without one, less a folder that all share.

    Raises:
        DataError: a file is missing or is no such document; it is named.
    """
    documents = [_read(path) for path in paths]
    sources = [Path(document["adapter"] or document["features"]) for document in documents]
    apart = len({source.parent for source in sources}) > 1
    rows = []
    for source, document in zip(sources, documents, strict=True):
        name = (str(source) if apart else source.name) + (
            "" if document["adapter"] else " (no adapter)"
        )
        figures = {figure: _at(document, place) for figure, place in FIGURES.items()}
        rows.append({"name": name, "split": document["split"], **figures})
    return {"evaluations": rows}


def _read(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        for place in (*FIGURES.values(), ("adapter",), ("features",), ("split",)):
            _at(document, place)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; make one with csalign eval --json") from None
    except (ValueError, KeyError, TypeError, IsADirectoryError):
        raise DataError(
            f"{path}: is not what csalign eval --json prints; give files of it"
        ) from None
    return dict(document)


def _at(document: Any, place: Sequence[str]) -> Any:
    for key in place:
        document = document[key]
    return document
