"""Names of sides, losses, precisions and splits, and their display under the user's own names."""

import re
from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Any, Self

from pydantic import PlainSerializer, PlainValidator

from csalign.core.errors import ConfigError

_SIDE = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")


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


class Side(str):
    """Name of a side that is neither images nor texts, with what `Modality` has."""

    @property
    def value(self) -> str:
        """The name as a plain string."""
        return str(self)

    @property
    def plural(self) -> str:
        """Name of this side's counts: the name itself, since a plural "s" would be a guess."""
        return str(self)


AnySide = Modality | Side


def side_of(name: str) -> AnySide:
    """Return the side of a name, which for images and texts may be in the plural.

    Raises:
        ConfigError: no side can have that name.

    >>> side_of("images"), side_of("audio").plural
    (<Modality.IMAGE: 'image'>, 'audio')
    """
    for side in Modality:
        if name in (side.value, side.plural):
            return side
    if not _SIDE.fullmatch(name):
        raise ConfigError(
            f"{name!r}: cannot name a side; use up to 64 lower-case letters, digits, '-' and '_', "
            "with a letter or digit first"
        )
    return Side(name)


def _read_side(name: str) -> AnySide:
    try:
        return side_of(name)
    except ConfigError as error:
        raise ValueError(str(error)) from None


SideName = Annotated[AnySide, PlainValidator(_read_side), PlainSerializer(str)]
"""A side in a document."""


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
