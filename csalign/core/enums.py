"""Names of sides, losses, precisions and splits, and their display under the user's own names."""

import re
from collections.abc import Mapping
from enum import StrEnum
from typing import Any, Self

from csalign.core.errors import ConfigError


class Modality(StrEnum):
    """One side of a feature set; wherever one is taken, its name does as well.

    >>> Modality.IMAGE == "image", Modality.IMAGE.plural
    (True, 'images')
    """

    IMAGE = "image"
    TEXT = "text"

    @classmethod
    def of(cls, name: str) -> Self:
        """Return the side that is named, in the singular or the plural.

        Raises:
            ConfigError: no such side.

        >>> Modality.of("images")
        <Modality.IMAGE: 'image'>
        """
        for side in cls:
            if name in (side.value, side.plural):
                return side
        raise ConfigError(f"{name!r} is not a side; use 'image' or 'text'")

    @property
    def other(self) -> "Modality":
        """The other side."""
        return Modality.TEXT if self is Modality.IMAGE else Modality.IMAGE

    @property
    def plural(self) -> str:
        """Name of this side's folder in a feature set and of its counts."""
        return f"{self.value}s"


class PairwiseName(StrEnum):
    """A loss on matched rows."""

    INFONCE = "infonce"
    SIGMOID = "sigmoid"
    ALIGN_UNIFORM = "align-uniform"
    NONE = "none"


class DivergenceName(StrEnum):
    """A divergence between the distributions of two sets of rows."""

    CS = "cs"
    HOLDER = "holder"
    MMD = "mmd"
    GAUSSIAN_KL = "gaussian-kl"
    SINKHORN = "sinkhorn"
    PAIRS_MSE = "pairs-mse"
    NONE = "none"


class Precision(StrEnum):
    """Precision of matrix multiplications."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}


def usual_split(name: str) -> str | None:
    """Spell a split as train, val or test; None if it is another.

    >>> usual_split("Validation"), usual_split("restval")
    ('val', None)
    """
    return SPLITS.get(name.strip().lower())


Names = Mapping[Any, str]
"""By modality, or "image" and "text" in JSON; keys of documents keep those words."""

_SIDES = re.compile(r"(?<![\w-])(image|text)(s?)(?![\w-])")
_DIRECTIONS = {"i2t": "image to text", "t2i": "text to image"}


def renamed(label: str, names: Names | None) -> str:
    """Replace image, images, text and texts in a label by the sides' own names.

    >>> renamed("text to image, 3 images", {"image": "audio", "text": "text"})
    'text to audio, 3 audio'
    """
    if not names:
        return label
    for short, long in _DIRECTIONS.items():
        label = label.replace(short, long)
    # A plural "s" after a name of the user would be a guess.
    plural = {f"{side}s": name if name != side else f"{side}s" for side, name in names.items()}
    return _SIDES.sub(lambda found: {**names, **plural}.get(found[0], found[0]), label)
