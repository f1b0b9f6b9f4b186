"""Name, direction and format of every figure, the same in tables, pages and documents."""

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

HIGHER, LOWER = "↑", "↓"
MOST_PLAIN = 1e7  # larger values are shown with an exponent
HIDDEN = 0.9  # share of the query's own side among the first 10; above it, the other is hidden


class Figure(NamedTuple):
    """How a figure is shown.

    Attributes:
        label: its name for people.
        better: arrow of the better direction, "" if neither is.
        scale: 100 for shares that are shown in percent.
        digits: decimals shown.
    """

    label: str
    better: str = ""
    scale: float = 1
    digits: int = 4

    @property
    def heading(self) -> str:
        """The label with its unit and its arrow, such as ``R@1 % ↑``."""
        return " ".join(filter(None, [self.label, "%" * (self.scale == 100), self.better]))

    def show(self, value: float | None, error: float | None = None) -> str:
        """Format a value, with ± its standard error or half an interval if given."""
        if value is None:
            return "-"
        text = self._number(value)
        return text if error is None else f"{text} ± {self._number(error)}"

    def show_between(self, value: float | None, interval: Sequence[float] | None) -> str:
        """Format a value with ± half the width of an interval, if there is one."""
        return self.show(value, (interval[1] - interval[0]) / 2 if interval else None)

    def show_difference(self, value: float, interval: Sequence[float]) -> str:
        """Format a difference with its interval, such as ``+1.20 [+0.10, +2.30]``."""
        own, low, high = (self._number(number, "+") for number in (value, *interval))
        return f"{own} [{low}, {high}]"

    def _number(self, value: float, sign: str = "") -> str:
        scaled = self.scale * value
        digits = f".{self.digits}f" if abs(scaled) < MOST_PLAIN else ".4g"
        return f"{scaled:{sign}{digits}}"


# By the place in the document of ``csalign eval``; the first pattern that fits applies.
FIGURES = {
    **{f"*.true_recall@{k}": Figure(f"true recall@{k}", HIGHER, 100, 2) for k in (1, 5, 10)},
    **{f"*.R@{k}": Figure(f"R@{k}", HIGHER, 100, 2) for k in (1, 5, 10)},
    "*.mean_recall": Figure("mean recall", HIGHER, 100, 2),
    "*.median_rank": Figure("median rank", LOWER, 1, 1),
    "*.mean_rank": Figure("mean rank", LOWER, 1, 1),
    "*.mrr": Figure("MRR", HIGHER, 100, 2),
    "*.map": Figure("mAP", HIGHER, 100, 2),
    "*.ndcg@10": Figure("NDCG@10", HIGHER, 100, 2),
    "*.r_precision": Figure("R-precision", HIGHER, 100, 2),
    "mixed.*recall@10": Figure("recall@10", HIGHER, 100, 2),
    "mixed.*same_side@10": Figure("same-side share", "", 100, 2),
    "groups.v_measure": Figure("V-measure", HIGHER),
    "groups.ami": Figure("AMI", HIGHER),
    "groups.ari": Figure("ARI", HIGHER),
    "groups.knn.image_to_text": Figure("k-NN accuracy, image to text", HIGHER, 100, 2),
    "groups.knn.text_to_image": Figure("k-NN accuracy, text to image", HIGHER, 100, 2),
    "groups.knn.mean": Figure("k-NN accuracy", HIGHER, 100, 2),
    "groups.knn.majority": Figure("largest class", "", 100, 2),
    "gap.centroid_distance": Figure("centroid distance", LOWER),
    "gap.rmg": Figure("RMG", LOWER),
    "gap.cs_divergence": Figure("CS divergence", LOWER),
    "gap.mmd": Figure("MMD", LOWER),
    "gap.frechet": Figure("Fréchet distance", LOWER),
    "gap.frechet_parts.centroid": Figure("Fréchet distance, centroids", LOWER),
    "gap.frechet_parts.distribution": Figure("Fréchet distance, distributions", LOWER),
    "gap.linear_separability": Figure("linear separability (0.5: no gap)", LOWER),
    "gap.alignment": Figure("alignment", LOWER),
    "gap.uniformity.image": Figure("uniformity, image", LOWER),
    "gap.uniformity.text": Figure("uniformity, text", LOWER),
    "gap.uniformity.cross": Figure("uniformity, cross", LOWER),
    "gap.effective_rank.image": Figure("effective rank, image", "", 1, 1),
    "gap.effective_rank.text": Figure("effective rank, text", "", 1, 1),
    "distribution.frechet": Figure("Fréchet distance", LOWER),
    "distribution.frechet_unit": Figure("Fréchet distance of unit rows", LOWER),
    "distribution.cmmd": Figure("CMMD", LOWER),
    "hubness.image_to_text": Figure("hubness, image to text", LOWER, 1, 2),
    "hubness.text_to_image": Figure("hubness, text to image", LOWER, 1, 2),
    "zero_shot.top1": Figure("top-1", HIGHER, 100, 2),
    "zero_shot.top5": Figure("top-5", HIGHER, 100, 2),
    "zero_shot.mean_per_class_recall": Figure("mean per-class recall", HIGHER, 100, 2),
}


def figure_of(place: str) -> Figure:
    """Return how the figure at a place in a document is shown.

    Raises:
        KeyError: the place holds no figure.
    """
    for pattern, figure in FIGURES.items():
        if fnmatchcase(place, pattern):
            return figure
    raise KeyError(place)


def value_at(document: Any, place: Iterable[str]) -> Any:
    """Return what is at a place of a nested document; None if nothing is."""
    for key in place:
        document = document.get(key) if isinstance(document, Mapping) else None
    return document


def interval_place(place: Sequence[str]) -> tuple[str, ...]:
    """Return where the interval of a figure is in "intervals": retrieval and gap are not named."""
    return tuple(place[1:] if place[0] in ("retrieval", "gap") else place)


def same_side_words(share: float) -> str:
    """Say that a gap hides one side from the other in a mixed gallery; "" unless it does."""
    if share <= HIDDEN:
        return ""
    return (
        "The first 10 are nearly all of the query's own side: the gap hides the other side in a "
        "mixed index."
    )


def counted(number: int, noun: str) -> str:
    """Count something, with thousands separators: "1 image", "3,000 images"."""
    return f"{number:,} {noun}" + ("s" if number != 1 else "")


def percent(share: float, digits: int = 2) -> str:
    """Format a fraction in percent."""
    return f"{100 * share:.{digits}f} %"


def by_sides(target: str, subset: str, sides: Sequence[str]) -> str:
    """Word that items are described by a subset "a+b" of the sides other than the target.

    >>> by_sides("text", "audio+image", ["audio", "image", "text", "video"])
    'text by audio+image'
    >>> by_sides("text", "audio+depth+image", ["audio", "depth", "image", "text", "video"])
    'text by all but video'
    """
    own = subset.split("+")
    missing = [name for name in sides if name not in own and name != target]
    if len(own) > 2 and len(missing) < 2:
        return f"{target} by all {'others' if not missing else f'but {missing[0]}'}"
    return f"{target} by {subset}"


ALL_BASELINES = 4  # with "raw"
_BASELINES = {
    "recall": ("retrieval", "mean_recall"),
    "mixed": ("mixed", "ndcg@10"),
    "same side": ("mixed", "same_side@10"),
    "centroid": ("gap", "centroid_distance"),
    "Fréchet": ("gap", "frechet"),
    "V-measure": ("groups", "v_measure"),
    "k-NN": ("groups", "knn", "mean"),
}
"""Columns of the table of baselines, shorter than the labels, and their places in a document."""


def baseline_table(document: Mapping[str, Any]) -> tuple[list[str], dict[str, list[str]], str]:
    """Return the labels, the columns and the note of the table of baselines, the adapter last."""
    rows: dict[str, Any] = dict(document["baselines"])
    columns: dict[str, list[str]] = {}
    fitted = sorted({own["fitted_on"] for own in rows.values() if "fitted_on" in own})
    note = f"Fitted on {' or '.join(fitted)}; nothing is trained." if fitted else ""
    if len(rows) < ALL_BASELINES:
        note += " Those missing need sides of one width, or pairs that are not measured."
    if document["adapter"] is not None:
        rows[Path(document["adapter"]).name] = document
    for heading, place in _BASELINES.items():
        if place[0] not in document:
            continue
        figure = figure_of(".".join(place))._replace(label=heading)
        # Of the recall alone, so that the table fits a narrow screen.
        name = place[-1] if heading == "recall" else ""
        columns[figure.heading] = [
            figure.show_between(value_at(own, place), own.get("intervals", {}).get(name))
            for own in rows.values()
        ]
    return [*rows], columns, note.strip()


def recall_range(own: Mapping[str, Any]) -> str:
    """Word a recall and its range, in percent."""
    mean, low, high = (f"{100 * own[key]:.0f}" for key in ("mean_recall", "low", "high"))
    return f"{mean} % ({low} to {high})"
