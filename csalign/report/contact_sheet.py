"""A contact sheet: small images in rows, each with its text below."""

import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

SIDE = 160
LINE = 14
LINES = 2
MARGIN = 8
MOST = 100


def draw_sheet(images: Sequence[Path], texts: Sequence[str], path: Path) -> None:
    """Draw the first `MOST` images, 10 a row at most, as a JPEG.

    Args:
        images: n >= 1 files.
        texts: n texts; what does not fit into two lines is cut.
        path: of the sheet.
    """
    count = min(len(images), MOST)
    columns = min(10, math.ceil(math.sqrt(count)))
    width, height = SIDE + MARGIN, SIDE + LINES * LINE + MARGIN
    rows = math.ceil(count / columns)
    sheet = Image.new("RGB", (columns * width + MARGIN, rows * height + MARGIN), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(LINE - 3)
    for number in range(count):
        left = MARGIN + number % columns * width
        top = MARGIN + number // columns * height
        with Image.open(images[number]) as image:
            image.thumbnail((SIDE, SIDE))
            sheet.paste(image, (left, top))
        for line, words in enumerate(_lines(texts[number], font)):
            draw.text((left, top + SIDE + line * LINE), words, fill="black", font=font)
    sheet.save(path, format="JPEG", quality=90)


def _lines(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
    """The text in lines that fit below an image."""
    lines: list[str] = []
    rest = " ".join(text.split())
    while rest and len(lines) < LINES:
        end = len(rest)
        while end > 1 and font.getlength(rest[:end]) > SIDE:
            # Between words if there are some, else anywhere.
            space = rest.rfind(" ", 0, end - 1)
            end = space if space > 0 and len(lines) + 1 < LINES else end - 1
        lines.append(rest[:end].strip())
        rest = rest[end:].strip()
    return lines
