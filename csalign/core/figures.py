"""Name, direction and format of every figure, the same in tables, pages and documents."""

from fnmatch import fnmatchcase
from typing import NamedTuple

HIGHER, LOWER = "↑", "↓"


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
        text = f"{self.scale * value:.{self.digits}f}"
        return text if error is None else f"{text} ± {self.scale * error:.{self.digits}f}"


# By the place in the document of ``csalign eval``; the first pattern that fits applies.
FIGURES = {
    "*.true_recall@10": Figure("true recall@10", HIGHER, 100, 2),
    "*.R@1": Figure("R@1", HIGHER, 100, 2),
    "*.R@5": Figure("R@5", HIGHER, 100, 2),
    "*.R@10": Figure("R@10", HIGHER, 100, 2),
    "*.mean_recall": Figure("mean recall", HIGHER, 100, 2),
    "*.median_rank": Figure("median rank", LOWER, 1, 1),
    "*.mean_rank": Figure("mean rank", LOWER, 1, 1),
    "*.mrr": Figure("MRR", HIGHER, 100, 2),
    "*.map": Figure("mAP", HIGHER, 100, 2),
    "*.ndcg@10": Figure("NDCG@10", HIGHER, 100, 2),
    "*.r_precision": Figure("R-precision", HIGHER, 100, 2),
    "gap.centroid_distance": Figure("centroid distance", LOWER),
    "gap.rmg": Figure("RMG", LOWER),
    "gap.cs_divergence": Figure("CS divergence", LOWER),
    "gap.mmd": Figure("MMD", LOWER),
    "gap.frechet": Figure("Fréchet distance", LOWER),
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
    "hubness.*": Figure("hubness (skewness of 10-NN counts)", LOWER, 1, 2),
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
