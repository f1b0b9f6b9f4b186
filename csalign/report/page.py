"""Write figures and tables as one self-contained HTML page."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import plotly.graph_objects as go
from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from csalign.core import __version__, atomic
from csalign.core.enums import Names, renamed
from csalign.core.progress import current_call

_TEMPLATES = Environment(
    loader=PackageLoader("csalign.report"), autoescape=True, trim_blocks=True, lstrip_blocks=True
)
_TEMPLATES.filters |= {"renamed": renamed, "base64": lambda data: base64.b64encode(data).decode()}

_GRID, _CLEAR = "rgba(128, 128, 128, 0.25)", "rgba(0, 0, 0, 0)"
_AXIS = {"gridcolor": _GRID, "zerolinecolor": _GRID, "linecolor": _GRID, "automargin": True}
# Transparent, so that the page's light or dark colours show through.
_THEME = go.layout.Template(
    layout={
        "height": 350,
        "margin": {"t": 32, "b": 45, "l": 20, "r": 20},  # axes take what more they need
        # Below the plot, however tall it is; the margin grows by as many lines as it takes.
        "legend": {"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom"},
        "paper_bgcolor": _CLEAR,
        "plot_bgcolor": _CLEAR,
        "modebar": {"bgcolor": _CLEAR, "color": "#8a8f98", "activecolor": "#3d85d1"},
        "xaxis": _AXIS,
        "yaxis": _AXIS,
    }
)
_BUTTONS = {
    "responsive": True,
    "displaylogo": False,
    "showSendToCloud": False,  # Plotly would offer to upload a figure
    "toImageButtonOptions": {"format": "svg"},
    "modeBarButtonsToRemove": ["lasso2d", "select2d"],
}


@dataclass(frozen=True)
class Entry:
    """A cell of a table: its text, small text below it, and a JPEG above it."""

    text: str
    note: str = ""
    picture: bytes = b""


@dataclass(frozen=True)
class Section:
    """A part of a page."""

    title: str  # its heading
    note: str = ""  # a sentence or two on how to read it
    figure: go.Figure | None = None  # a Plotly figure, or None
    rows: Sequence[Sequence[str | Entry]] = ()  # table, heading first
    prose: bool = False  # whether the table contains words of the user
    pictures: Sequence[Entry] = ()  # shown side by side, as many as fit


def write_page(
    path: Path,
    title: str,
    sections: Sequence[Section],
    names: Names | None = None,
    *,
    summary: str = "",
) -> None:
    """Write a page atomically, replacing an existing one.

    Its head has the date, version, command line and warnings of the current call. It is
    self-contained, with Plotly's code if it has a figure (about 5 MB), follows the reader's light
    or dark colours, prints, and may not use the network. The heading of an only section is
    omitted if it equals the title.
    """
    parts: list[tuple[Section, Markup]] = []
    for number, section in enumerate(sections):
        is_first = not any(plot for _, plot in parts)
        parts.append((section, _plot(section.figure, names, f"figure-{number}", is_first)))
    page = _TEMPLATES.get_template("page.html").render(
        title=title,
        summary=summary,
        sections=parts,
        names=names,
        call=current_call(),
        version=__version__,
    )
    atomic.remove_stale_temporaries(path)
    atomic.write_text(path, page)


def escape_label(text: str) -> str:
    """Escape text for Plotly's labels and hover boxes, which interpret tags."""
    return escape(text, quote=False)


def _plot(figure: go.Figure | None, names: Names | None, name: str, with_library: bool) -> Markup:
    if figure is None:
        return Markup("")
    figure = go.Figure(figure).update_layout(template=_THEME)
    if names:
        figure.for_each_trace(
            lambda trace: trace.update(name=renamed(trace.name or "", names) or None)
        )
        for axis in (*figure.select_xaxes(), *figure.select_yaxes()):
            axis.title.text = renamed(axis.title.text or "", names) or None
    # Plotly escapes what it embeds.
    return Markup(
        figure.to_html(config=_BUTTONS, full_html=False, include_plotlyjs=with_library, div_id=name)
    )
