"""Make ``sample_data/report.png``, for the README, of the page that the demo writes.

Usage::

    bash sample_data/demo.sh DIR
    python tests/benchmarks/sample_data/picture.py DIR/report.html

Needs Chromium. The picture has the first rows of the page's two tables, and the projections before
and after side by side.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from pathlib import Path

from PIL import Image, ImageChops

PICTURE = Path(__file__).resolve().parents[3] / "sample_data" / "report.png"
SECTIONS = ("Retrieval", "Modality gap", "The embeddings, before", "The embeddings, after")
WIDTH, HEIGHT, MARGIN = 1200, 1600, 16
STYLE = """<style>
body { display: grid; grid-template-columns: 1fr 1fr; column-gap: 2rem; max-width: none; margin: 0;
  padding: 1rem }
body > :not(section) { grid-column: 1 / 3; margin: 0 } section { min-width: 0 }
h2 { margin: 1.2rem 0 .3rem } section p, .modebar-container { display: none }
section:nth-of-type(n+5), tr:nth-child(n+6), section:nth-of-type(-n+2) td small { display: none }
</style></head>"""


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("page", type=Path, help="the demo's report.html")
    page = parser.parse_args().page.read_text(encoding="utf-8")
    found = re.findall(r"<h2>(.*?)</h2>", page)[: len(SECTIONS)]
    if not all(title.startswith(name) for title, name in zip(found, SECTIONS, strict=True)):
        raise SystemExit(f"the page begins with {found}, not with {SECTIONS}")
    with tempfile.TemporaryDirectory() as folder:
        html, png = Path(folder, "page.html"), Path(folder, "page.png")
        html.write_text(page.replace("</head>", STYLE, 1), encoding="utf-8")
        options = ("--headless", "--no-sandbox", "--hide-scrollbars", "--virtual-time-budget=5000")
        size = f"--window-size={WIDTH},{HEIGHT}"
        subprocess.run(["chromium", *options, size, f"--screenshot={png}", html], check=True)
        picture = Image.open(png).convert("RGB")
    left, top, right, bottom = ImageChops.invert(picture).getbbox()
    box = (left - MARGIN, top - MARGIN, right + MARGIN, bottom + MARGIN)
    picture.crop(box).quantize(64, dither=Image.Dither.NONE).save(PICTURE, optimize=True)


if __name__ == "__main__":
    main()
