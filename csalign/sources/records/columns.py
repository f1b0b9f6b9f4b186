"""Which column of a table holds what, and what one of its rows gives."""

import base64
import binascii
import logging
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from csalign.core.errors import DataError
from csalign.sources.records.tree import check_size

logger = logging.getLogger(__name__)

IMAGE_NAMES = (
    *("image", "image_path", "image path", "image_file", "image_name", "img", "img_path"),
    *("filepath", "file_path", "file_name", "filename", "path", "file", "jpg", "jpeg", "png"),
    *("webp", "image_bytes", "img_bytes", "image_base64", "img_base64", "image_b64", "base64"),
)
CAPTION_NAMES = (
    *("caption", "title", "text", "txt", "sentence", "captions", "caption_text", "sentences_raw"),
    *("raw_caption", "sentences", "texts", "raw", "alt_text", "comment", "description"),
)
BASE64_NAMES = ("image_base64", "img_base64", "image_b64", "base64")
SPLIT_NAME = "split"
# How JPEG, PNG, GIF and WebP begin in base64. "/9j/" alone may be a path, but none of this length.
_BASE64 = re.compile(r"data:image/[\w.+-]+;base64,|(?=.{100})(?:/9j/|iVBORw0KGgo|R0lGOD|UklGR)")
_URL_SAFE = str.maketrans("-_", "+/", " \n\r")


class Row(NamedTuple):
    """One row of a captions table.

    Attributes:
        number: its first line in the file, counted from 1, the header included.
        image: path as the table gives it, "" if there is none.
        captions: stripped and not empty; several only where the row lists them.
        split: None if there is none.
        id: of the image, None where the table has no such column.
        flaw: why the row cannot be used; all else but its number is then absent.
        span: where its bytes start and end, where `image` is not a path but base64.
    """

    number: int
    image: str = ""
    captions: tuple[str, ...] = ()
    split: str | None = None
    id: str | None = None
    flaw: str | None = None
    span: tuple[int, int] | None = None


@dataclass(frozen=True)
class Columns:
    """Which columns to read; None means to recognise the column by its name.

    Attributes:
        image: of image paths.
        caption: of captions.
        split: of splits. A table need not have it while it is the usual one.
        id: of image ids; None for no such column.
        captions_only: the table has no image column, whatever its names.
    """

    image: str | None = None
    caption: str | None = None
    split: str = SPLIT_NAME
    id: str | None = None
    captions_only: bool = False

    @property
    def named(self) -> dict[str, str]:
        """The columns that a table must have because they were asked for, by their option."""
        split = None if self.split == SPLIT_NAME else self.split
        names = {"image": self.image, "caption": self.caption, "split": split, "id": self.id}
        return {option: name for option, name in names.items() if name is not None}

    def find(self, names: Collection[str], table: Path) -> "Found":
        """Tell which of a table's columns are meant.

        Raises:
            DataError: a column that was named is not there, or neither images nor captions are;
                the message lists the columns that are.
        """
        listed = ", ".join(names) or "none"
        for option, name in self.named.items():
            if name not in names:
                raise DataError(
                    f"{table}: has no column {name!r:.200} (columns: {listed:.300}); name it with "
                    f"--{option}-column"
                )
        found = self.pick(names)
        if found.image is None and found.caption is None:
            raise DataError(
                f"{table}: no column looks like images or captions (columns: {listed:.300}); name "
                "them with --image-column and --caption-column, or read a folder's images without "
                "the table by --kind folder"
            )
        return found

    def pick(self, names: Collection[str]) -> "Found":
        """Those of the columns that are among `names`."""
        by_name = {name.lower(): name for name in reversed(list(names))}

        def pick(given: str | None, known: Iterable[str]) -> str | None:
            if given is not None:
                return given if given in names else None
            return next((by_name[name] for name in known if name in by_name), None)

        image = None if self.captions_only else pick(self.image, IMAGE_NAMES)
        # The same column is not both, as it would be for an image column that was named "text".
        rest = [name for name in CAPTION_NAMES if image is None or name != image.lower()]
        split = pick(None if self.split == SPLIT_NAME else self.split, (SPLIT_NAME,))
        return Found(image, pick(self.caption, rest), split, pick(self.id, ()))


class Found(NamedTuple):
    """The columns of a table by what they hold; None where there is none."""

    image: str | None
    caption: str | None
    split: str | None
    id: str | None

    def warn_of_one_side(self, names: Collection[str], table: Path) -> None:
        """Say that one side is missing, where another column may have been meant."""
        others = [name for name in names if name not in self]
        if not others or (self.image is not None and self.caption is not None):
            return
        lacking, kept = ("captions", "images") if self.image else ("images", "captions")
        logger.warning(
            "%s: no column looks like %s, only %s are read (columns: %s); name it with --%s-column",
            table,
            *(lacking, kept, ", ".join(names), lacking[:-1]),
        )


def is_base64_name(name: str | None) -> bool:
    """Whether all cells of a column by that name hold base64."""
    return name is not None and name.lower() in BASE64_NAMES


def is_base64(cell: str) -> bool:
    """Whether a cell holds an image in base64 rather than a path, told by how it begins."""
    return len(cell) > 20 and _BASE64.match(cell) is not None


def from_base64(text: str) -> bytes:
    """Decode base64, with or without a ``data:`` header, plain or URL-safe.

    Raises:
        DataError: it is not valid; the message is the reason alone.
    """
    body = text.partition(",")[2] if text.startswith("data:") else text
    check_size(len(body) * 3 // 4)
    try:
        return base64.b64decode(body.translate(_URL_SAFE), validate=True)
    except (binascii.Error, ValueError):
        raise DataError("is not valid base64") from None
