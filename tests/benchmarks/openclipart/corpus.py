"""Read and render the drawings of the Debian package ``openclipart-svg``.

The package holds 8,121 SVG files of the Open Clip Art Library with their metadata (title,
description, keywords, creator, licence) as RDF inside each file. This module turns them into
records (:class:`Drawing`) and 224x224 pictures on a white ground.

663 of the files are symbolic links that show a drawing in a second folder. They are skipped: an
alias is no drawing of its own, and its copy of the title would make that title ambiguous.
"""

from __future__ import annotations

import csv
import io
import multiprocessing
import os
import re
import resource
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
from PIL import Image

SVG_ROOT = Path("/usr/share/openclipart/svg")
IMAGE_SIZE = 224
TIME_LIMIT = 20.0
MEMORY_LIMIT = 2 << 30

_CC = "{http://web.resource.org/cc/}"
_DC = "{http://purl.org/dc/elements/1.1/}"
_RDF = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}"


@dataclass(frozen=True)
class Drawing:
    """One drawing of the library.

    Attributes:
        id: Path relative to the SVG folder, without the suffix.
        title: The title, never empty.
        captions: Title, description and keywords, without repetitions; the title comes first.
        creator: Name of the author, possibly empty.
        license: URL or name of the licence, possibly empty.
    """

    id: str
    title: str
    captions: tuple[str, ...]
    creator: str
    license: str


@dataclass(frozen=True)
class Failure:
    """A drawing that was left out, and why."""

    id: str
    reason: str


def _text(element: ET.Element | None) -> str:
    """Return the text of an element with runs of white space collapsed."""
    return "" if element is None else " ".join("".join(element.itertext()).split())


def distinct(captions: Iterable[str]) -> tuple[str, ...]:
    """Drop empty captions and those that differ from an earlier one in case only."""
    kept: dict[str, str] = {}
    for caption in captions:
        if caption:
            kept.setdefault(caption.casefold(), caption)
    return tuple(kept.values())


def parse_drawing(source: bytes, drawing_id: str) -> Drawing:
    """Read the metadata of one SVG document.

    Args:
        source: The SVG file. Entities declared in its own DTD are expanded; external ones are
            never fetched, since expat does not do so unless it is told to.
        drawing_id: The identifier of the result.

    Returns:
        The record.

    Raises:
        ValueError: If the document has no title.
        xml.etree.ElementTree.ParseError: If it is not well-formed.
    """
    root = ET.fromstring(source)
    # A few drawings carry a second, empty description next to the real one.
    work = next((w for w in root.iter(f"{_CC}Work") if _text(w.find(f"{_DC}title"))), None)
    if work is None:
        raise ValueError("no title")
    title = _text(work.find(f"{_DC}title"))
    keywords = (_text(item) for item in work.iterfind(f"{_DC}subject/{_RDF}Bag/{_RDF}li"))
    license_element = work.find(f"{_CC}license")
    return Drawing(
        id=drawing_id,
        title=title,
        captions=distinct(
            (title, _text(work.find(f"{_DC}description")), ", ".join(k for k in keywords if k))
        ),
        creator=_text(work.find(f"{_DC}creator")),
        license=""
        if license_element is None
        else license_element.get(f"{_RDF}resource", "").strip(),
    )


def read_drawings(root: Path = SVG_ROOT) -> tuple[list[Drawing], list[Failure]]:
    """Read the metadata of every drawing below a folder, aliases aside.

    Args:
        root: The SVG folder of the package.

    Returns:
        The records and the drawings left out, both sorted by id.
    """
    drawings: list[Drawing] = []
    failures: list[Failure] = []
    for path in sorted(path for path in root.rglob("*.svg") if not path.is_symlink()):
        drawing_id = path.relative_to(root).with_suffix("").as_posix()
        try:
            drawings.append(parse_drawing(path.read_bytes(), drawing_id))
        except (ValueError, ET.ParseError) as error:
            failures.append(Failure(drawing_id, str(error)))
    return drawings, failures


def rasterise(source: bytes, size: int = IMAGE_SIZE) -> Image.Image:
    """Render an SVG document on a white square, its aspect ratio kept, centred.

    Args:
        source: The SVG file.
        size: Width and height of the result.

    Returns:
        An RGB image.

    Raises:
        ValueError: If nothing but white comes out.
    """
    import cairosvg  # Only rendering needs Cairo; reading the cached pictures does not.

    root = ET.fromstring(source)
    # The document is written out anew because CairoSVG refuses files with entities.
    if "viewBox" in root.attrib:
        root.set("preserveAspectRatio", "xMidYMid meet")
    elif root.get("width") and root.get("height"):
        # Without a viewBox, the drawing would not scale along with its page.
        width, height = (_pixels(root.attrib[name]) for name in ("width", "height"))
        if width and height:
            root.set("viewBox", f"0 0 {width:g} {height:g}")
            root.set("preserveAspectRatio", "xMidYMid meet")
    png = cairosvg.svg2png(
        bytestring=ET.tostring(root),
        parent_width=size,
        parent_height=size,
        output_width=size,
        output_height=size,
        background_color="white",
    )
    image = Image.open(io.BytesIO(png)).convert("RGB")
    if np.asarray(image).min() == 255:
        raise ValueError("blank picture")
    return image


_UNITS = {"": 1.0, "px": 1.0, "pt": 4 / 3, "pc": 16.0, "mm": 96 / 25.4, "cm": 96 / 2.54, "in": 96.0}


def _pixels(length: str) -> float | None:
    """Convert an absolute SVG length to pixels; ``None`` for percentages and the like."""
    match = re.fullmatch(r"\s*([-+.\deE]+?)\s*(px|pt|pc|mm|cm|in|)\s*", length)
    return float(match[1]) * _UNITS[match[2]] if match else None


def picture_path(folder: Path, drawing_id: str) -> Path:
    """Return where the picture of a drawing is cached."""
    return folder / f"{drawing_id}.png"


def _render_one(source: Path, target: Path, connection: Connection) -> None:
    """Render one drawing in a process of its own and send an error message or nothing."""
    # The limit is on address space, of which the parent's libraries take a share already.
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY_LIMIT
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    try:
        image = rasterise(source.read_bytes())
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(".part")
        image.save(partial, format="PNG")
        partial.replace(target)
        connection.send("")
    except Exception as error:  # Old drawings fail in many ways; each is reported, none is fatal.
        connection.send(f"{type(error).__name__}: {error}"[:200])


@dataclass
class _Job:
    """A rendering process under way."""

    drawing_id: str
    process: BaseProcess
    deadline: float


def _render_all(
    ids: Sequence[str], root: Path, folder: Path, workers: int
) -> Iterator[tuple[str, str]]:
    """Render drawings in parallel and yield (id, error message) as they finish.

    Each drawing has a process of its own: a pool's worker that hangs inside Cairo could be neither
    interrupted nor replaced.
    """
    import cairosvg  # noqa: F401  Imported once here rather than in every forked process.

    context = multiprocessing.get_context("fork")
    waiting = list(reversed(ids))
    running: dict[Connection, _Job] = {}
    while waiting or running:
        while waiting and len(running) < workers:
            drawing_id = waiting.pop()
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(
                target=_render_one,
                args=(root / f"{drawing_id}.svg", picture_path(folder, drawing_id), sender),
            )
            process.start()
            sender.close()
            running[receiver] = _Job(drawing_id, process, time.monotonic() + TIME_LIMIT)
        wait(list(running), timeout=0.5)
        for receiver, job in list(running.items()):
            if receiver.poll():
                try:
                    reason = receiver.recv()
                except EOFError:
                    reason = "the renderer died"
            elif time.monotonic() > job.deadline:
                job.process.kill()
                reason = f"more than {TIME_LIMIT:g} s"
            else:
                continue
            job.process.join()
            receiver.close()
            del running[receiver]
            yield job.drawing_id, reason


def render_drawings(
    drawings: Sequence[Drawing],
    folder: Path,
    root: Path = SVG_ROOT,
    workers: int | None = None,
) -> list[Failure]:
    """Render all drawings to PNG files; those done before are skipped.

    Args:
        drawings: What to render.
        folder: Receives the pictures and the list of failures, ``failures.csv``.
        root: The SVG folder of the package.
        workers: Number of processes; the number of processors unless given.

    Returns:
        The drawings that could not be rendered, sorted by id.
    """
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "failures.csv"
    failures: dict[str, str] = {}
    if log.exists():
        with log.open(newline="", encoding="utf-8") as stream:
            failures = {row["id"]: row["reason"] for row in csv.DictReader(stream)}
    todo = [
        drawing.id
        for drawing in drawings
        if drawing.id not in failures and not picture_path(folder, drawing.id).exists()
    ]
    for done, (drawing_id, reason) in enumerate(
        _render_all(todo, root, folder, workers or os.cpu_count() or 1), start=1
    ):
        if reason:
            failures[drawing_id] = reason
        if done % 500 == 0:
            print(f"rendered {done} of {len(todo)}", flush=True)
    with log.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(("id", "reason"))
        writer.writerows(sorted(failures.items()))
    return [Failure(*item) for item in sorted(failures.items())]
