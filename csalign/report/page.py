"""A page of figures and tables as one self-contained HTML file."""

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from csalign.core import atomic
from csalign.core.errors import OutputError
from csalign.core.side_names import Names, renamed

# What a page may do: run what is in it. A caption or a path that got past the escaping could
# neither fetch nor send anything.
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; "
    "form-action 'none'; base-uri 'none'"
)

_PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="$policy">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light dark; --text: #1d232b; --ground: #fff; --line: #d9dee5; --dim: #5b6673 }
@media (prefers-color-scheme: dark) {
  :root { --text: #e4e8ee; --ground: #14181d; --line: #343c47; --dim: #9aa5b1 } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: var(--ground);
  max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.4rem } h2 { font-size: 1.1rem; margin: 2.2rem 0 .3rem }
p { margin: .3rem 0 .8rem; color: var(--dim) }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
td, th { padding: .25rem .9rem .25rem 0; border-bottom: 1px solid var(--line); text-align: left }
td + td, th + th { text-align: right }
.prose td, .prose th { text-align: left; vertical-align: top; overflow-wrap: anywhere }
.prose td:first-child, .prose th { white-space: nowrap }
.wide { overflow-x: auto }
small { display: block; color: var(--dim) }
td img { display: block; max-width: 5rem; max-height: 5rem; background: #fff }
.figure { width: 100% }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: 1rem;
  padding: 0; margin: 1rem 0; list-style: none }
.pictures li { border: 1px solid var(--line); border-radius: .4rem; overflow: hidden;
  overflow-wrap: anywhere; padding: 0 .7rem .6rem }
.pictures img, .pictures .none { display: block; width: calc(100% + 1.4rem); height: 9.5rem;
  margin: 0 -.7rem .5rem; object-fit: contain; background: #fff; box-sizing: border-box;
  padding: .4rem }
.pictures .none { background: var(--line) }
@media print { h2 { break-after: avoid } .figure, table { break-inside: avoid } }
</style>
</head>
<body><h1>$title</h1>
$body
$script</body></html>
""")

_SCRIPT = Template("""<script>$plotly</script>
<script>
const figures = $figures, dark = matchMedia("(prefers-color-scheme: dark)");
// Plotly would offer to upload a figure to its maker's cloud.
const options = {responsive: true, displaylogo: false, showSendToCloud: false, plotlyServerURL: "",
  toImageButtonOptions: {format: "svg"}, modeBarButtonsToRemove: ["lasso2d", "select2d"]};
function draw() {
  const style = getComputedStyle(document.documentElement);
  const [text, line] = ["--text", "--line"].map(name => style.getPropertyValue(name).trim());
  figures.forEach((figure, i) => {
    const axis = {gridcolor: line, zerolinecolor: line, linecolor: line};
    const layout = {...figure.layout, font: {color: text},
      modebar: {bgcolor: "rgba(0,0,0,0)", color: line, activecolor: text},
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)"};
    const axes = Object.keys(layout).filter(name => /^[xy]axis/.test(name));
    for (const name of new Set(["xaxis", "yaxis", ...axes]))
      layout[name] = {...layout[name], ...axis};
    layout.height ??= 350;
    Plotly.react("figure-" + i, figure.data, layout, options);
  });
}
draw();
dark.addEventListener("change", draw);
</script>
""")


@dataclass(frozen=True)
class Entry:
    """A cell of a table.

    Attributes:
        text: what it says.
        note: small, below it.
        picture: a JPEG above it, or nothing.
    """

    text: str
    note: str = ""
    picture: bytes = b""


@dataclass(frozen=True)
class Section:
    """A part of a page.

    Attributes:
        title: its heading.
        note: a sentence or two on how to read it.
        figure: what is drawn, or None.
        rows: a table, its first row the heading; no rows, no table.
        prose: whether the table holds words rather than figures.
        pictures: shown side by side, as many as there is room for.
    """

    title: str
    note: str = ""
    figure: go.Figure | None = None
    rows: Sequence[Sequence[str | Entry]] = field(default_factory=tuple)
    prose: bool = False
    pictures: Sequence[Entry] = field(default_factory=tuple)


def check_page(path: Path) -> None:
    """Raise OutputError if a page cannot be written there, before the work that fills it."""
    if path.is_dir():
        raise OutputError(f"{path}: is a folder; name a file such as {path / 'page.html'}")
    if not path.parent.is_dir():
        raise OutputError(f"{path}: there is no folder {path.parent}; make it first")


def write_page(
    path: Path, title: str, sections: Sequence[Section], names: Names | None = None
) -> None:
    """Write a page, whole or not at all; one that stands there is replaced.

    It holds everything that it shows, Plotly's code included where it draws something (about
    5 MB), follows the reader's light or dark colours, prints, and may not use the network. The
    heading of a lone section is left out where it is the title.

    Args:
        path: of the page.
        title: of the page.
        sections: of the page, in order.
        names: what the sides are called, None where that is image and text; for the words of
            csalign, not those of the data.
    """
    sections = [_called(section, names) for section in sections] if names else sections
    figures: list[Any] = []
    body = []
    for section in sections:
        is_title = len(sections) == 1 and section.title == title
        body.append("<section>" + ("" if is_title else f"<h2>{escape(section.title)}</h2>"))
        if section.note:
            body.append(f"<p>{escape(section.note)}</p>")
        if section.figure is not None:
            body.append(f'<div class="figure" id="figure-{len(figures)}"></div>')
            figures.append(json.loads(section.figure.to_json()))
        if section.rows:
            body.append(_table(section.rows, prose=section.prose))
        if section.pictures:
            body.append(_pictures(section.pictures))
        body.append("</section>")
    page = _PAGE.substitute(
        policy=_POLICY,
        title=escape(title),
        body="\n".join(body),
        script=_script(figures),
    )
    atomic.remove_stale_temporaries(path)
    atomic.write_text(path, page)


def _called(section: Section, names: Names) -> Section:
    """A section with the sides' own names in its labels."""
    figure = section.figure
    if figure is not None:
        figure = go.Figure(figure)
        figure.for_each_trace(
            lambda trace: trace.update(name=renamed(trace.name or "", names) or None)
        )
        for axis in (*figure.select_xaxes(), *figure.select_yaxes()):
            axis.title.text = renamed(axis.title.text or "", names) or None
    rows = section.rows
    if not section.prose:
        rows = [
            [renamed(cell, names) if isinstance(cell, str) else cell for cell in row]
            for row in rows
        ]
    return replace(
        section,
        title=renamed(section.title, names),
        note=renamed(section.note, names),
        figure=figure,
        rows=rows,
    )


def _script(figures: list[Any]) -> str:
    if not figures:
        return ""
    return _SCRIPT.substitute(plotly=get_plotlyjs(), figures=_as_script(figures))


def _as_script(document: Any) -> str:
    """JSON that may stand in a script element, whatever its strings hold."""
    return json.dumps(document).replace("<", "\\u003c")


def plain(text: str) -> str:
    """Text as Plotly's labels and hover boxes take it, which read tags of their own in it."""
    return escape(text, quote=False)


def _table(rows: Sequence[Sequence[str | Entry]], *, prose: bool) -> str:
    heading, *others = rows
    lines = ["".join(f"<th>{_cell(cell)}</th>" for cell in heading)]
    lines += ["".join(f"<td>{_cell(cell)}</td>" for cell in row) for row in others]
    table = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="wide"><table{" class=prose" if prose else ""}>{table}</table></div>'


def _pictures(entries: Sequence[Entry]) -> str:
    items = (
        f"<li>{_image(entry.picture) or '<div class=none></div>'}{escape(entry.text)}"
        f"<small>{escape(entry.note)}</small></li>"
        for entry in entries
    )
    return f'<ul class="pictures">{"".join(items)}</ul>'


def _cell(cell: str | Entry) -> str:
    if isinstance(cell, str):
        return escape(cell)
    note = f"<small>{escape(cell.note)}</small>" if cell.note else ""
    return _image(cell.picture) + escape(cell.text) + note


def _image(jpeg: bytes) -> str:
    data = base64.b64encode(jpeg).decode()
    return f'<img alt="" src="data:image/jpeg;base64,{data}">' if jpeg else ""
