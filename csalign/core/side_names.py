"""What the two sides are called where people read of them."""

import re
from collections.abc import Mapping
from typing import Any

Names = Mapping[Any, str]
"""By modality, or "image" and "text" in JSON; what programs read keeps those words."""

_SIDES = re.compile(r"(?<![\w-])(image|text)(s?)(?![\w-])")
_DIRECTIONS = {"i2t": "image to text", "t2i": "text to image"}


def renamed(label: str, names: Names | None) -> str:
    """A label with the sides' own names in place of image, images, text and texts.

    >>> renamed("text to image, 3 images", {"image": "audio", "text": "text"})
    'text to audio, 3 audio'
    """
    if not names:
        return label
    for short, long in _DIRECTIONS.items():
        label = label.replace(short, long)
    return _SIDES.sub(lambda found: _own(found, names), label)


def _own(found: re.Match[str], names: Names) -> str:
    side, plural = found.groups()
    name = names.get(side, side)
    # Whoever names a side says whether it can be counted; an "s" of ours would be a guess.
    return name + plural if name == side else name
