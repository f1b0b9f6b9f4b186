"""The parts of documents of ``csalign eval --json`` that are compared."""

from itertools import combinations, permutations
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, FiniteFloat, ValidationError

from csalign.core.errors import DataError
from csalign.core.figures import interval_place, value_at
from csalign.core.records import parse_json

FIGURES = {
    "mean_recall": ("retrieval", "mean_recall"),
    "image_to_text_R@1": ("retrieval", "image_to_text", "R@1"),
    "text_to_image_R@1": ("retrieval", "text_to_image", "R@1"),
    "centroid_distance": ("gap", "centroid_distance"),
    "rmg": ("gap", "rmg"),
    "cs_divergence": ("gap", "cs_divergence"),
    "frechet": ("gap", "frechet"),
    "mixed_ndcg@10": ("mixed", "ndcg@10"),
    "same_side@10": ("mixed", "same_side@10"),
}
"""The compared metrics, and their places in the document of ``csalign eval --json``."""

OF_GROUPS = {"v_measure": ("groups", "v_measure"), "knn": ("groups", "knn", "mean")}
"""Further ones with labels."""

REQUIRED = ("retrieval", "gap")  # blocks that documents of all versions have
Limits = tuple[FiniteFloat, FiniteFloat]
_Parts = list[FiniteFloat] | dict[str, FiniteFloat]


class _Fingerprints(BaseModel):
    features: str
    adapter: str | None


class _Groups(BaseModel):
    column: str
    v_measure: FiniteFloat
    knn: dict[str, FiniteFloat]


class Document(BaseModel):
    """What documents of ``csalign eval --json`` have in common, as far as it is needed."""

    features: str
    adapter: str | None
    split: str
    counts: dict[str, Any]
    names: dict[str, str] | None = None
    sides: list[str] = []
    protocol: dict[str, Any] = {}
    index: dict[str, Any] = {}
    fingerprints: _Fingerprints | None = None
    parameters: int | None = None
    bandwidth: FiniteFloat | None = None
    intervals: dict[str, Any] = {}

    @property
    def rule(self) -> str:
        """Name of the protocol."""
        return str(self.protocol.get("name", "all"))

    @property
    def kind(self) -> str:
        """Kind of the index."""
        return str(self.index.get("kind", "exact"))

    def places(self, labels: str | None = None) -> dict[str, tuple[str, ...]]:
        """Return the places of the compared metrics, with those of groups if `labels` is given."""
        raise NotImplementedError

    def figures(self, labels: str | None = None) -> dict[str, float | None]:
        """Return the compared metrics, with those of groups by the column `labels` if given.

        None for those that an older document lacks, or that no query has; TypeError if one that
        all documents have is missing.
        """
        found = self.model_dump()
        return {name: value_at(found, place) for name, place in self.places(labels).items()}

    def resampled(self, figure: str) -> tuple[str, ...]:
        """Return the place of a compared metric among intervals and resamples."""
        raise NotImplementedError


class PairDocument(Document):
    """A document about images and texts, older ones included."""

    counts: dict[str, int]
    retrieval: dict[str, FiniteFloat | dict[str, FiniteFloat]]
    gap: dict[str, FiniteFloat | dict[str, FiniteFloat | _Parts]]
    mixed: dict[str, FiniteFloat | dict[str, FiniteFloat]] = {}
    groups: _Groups | None = None
    intervals: dict[str, Limits | dict[str, Limits | dict[str, Limits]]] = {}

    def places(self, labels: str | None = None) -> dict[str, tuple[str, ...]]:
        """See `Document.places`."""
        return FIGURES | (OF_GROUPS if labels else {})

    def figures(self, labels: str | None = None) -> dict[str, float | None]:
        """See `Document.figures`."""
        if self.groups is not None and self.groups.column != labels:
            return self.model_copy(update={"groups": None}).figures(labels)
        places, found = self.places(labels), dict[str, Any](super().figures(labels))
        return {
            name: None if own is None and places[name][0] not in REQUIRED else float(own)
            for name, own in found.items()
        }

    def resampled(self, figure: str) -> tuple[str, ...]:
        """See `Document.resampled`."""
        return interval_place(self.places(figure)[figure])


class SidedDocument(Document):
    """A document about any number of sides."""

    sides: list[str] = Field(min_length=2)
    mean_recall: FiniteFloat
    matrix: dict[str, dict[str, dict[str, FiniteFloat | None]]]
    gap: dict[str, dict[str, dict[str, Any]]]

    def places(self, labels: str | None = None) -> dict[str, tuple[str, ...]]:
        """See `Document.places`."""
        places: dict[str, tuple[str, ...]] = {"mean_recall": ("mean_recall",)}
        for a, b in permutations(self.sides, 2):
            places[f"{a}_to_{b}_mean_recall"] = ("matrix", a, b, "mean_recall")
        for a, b in combinations(self.sides, 2):
            places[f"{a}_{b}_centroid_distance"] = ("gap", a, b, "centroid_distance")
        return places

    def resampled(self, figure: str) -> tuple[str, ...]:
        """See `Document.resampled`."""
        return self.places()[figure]


def read_document(path: Path) -> Document:
    """Read a document of ``csalign eval --json`` with retrieval.

    Raises:
        DataError: it is something else.
    """
    try:
        found = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(
            f"{path}: no such file; write one with csalign eval --json, or pass a run"
        ) from None
    except ValueError:
        found = None
    if isinstance(found, dict) and not {"retrieval", "gap"} & found.keys():
        for key, kind in (("distribution", "image distances"), ("zero_shot", "classification")):
            if key in found:
                raise DataError(f"{path}: contains {kind} only; compare needs retrieval and gap")
    try:
        is_sided = isinstance(found, dict) and "matrix" in found
        document = (SidedDocument if is_sided else PairDocument).model_validate(found)
        document.figures()
    except (ValidationError, TypeError):
        raise DataError(
            f"{path}: is not a document of csalign eval --json; pass such documents, or runs"
        ) from None
    return document
