"""The page of ``csalign eval`` for any number of sides."""

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from csalign.core.figures import Figure, by_sides, counted, figure_of, value_at
from csalign.report.page import Entry, Section, write_page

# Transparent, so that the text of a cell can be read in light and dark colours.
RECALL = [[0, "rgba(61, 133, 209, 0.04)"], [1, "rgba(61, 133, 209, 0.7)"]]
GAP = [[0, "rgba(217, 112, 43, 0.04)"], [1, "rgba(217, 112, 43, 0.7)"]]
SCORES = ("best_single", "mean", "sum", "query_weighted")
MEAN = Figure("mean recall", "↑", 100, 2)
CELL_HEIGHT, MARGINS = 40, 100  # pixels

Document = Mapping[str, Any]


def write_sides(path: Path, document: Document) -> None:
    """Write the page of a document of ``csalign eval`` with a matrix of sides."""
    features, run = (document[key] and Path(document[key]).name for key in ("features", "adapter"))
    what = f"{run} on {features}" if run else f"{features} without an adapter"
    counts, intervals = document["counts"], document["intervals"]
    mean = f"{MEAN.show(document['mean_recall'])} %{_between(MEAN, intervals.get('mean_recall'))}"
    cells = len(document["sides"]) * (len(document["sides"]) - 1)
    rows = ", ".join(f"{number:,} {name}" for name, number in counts["rows"].items())
    note = "From the side of a row to that of a column; hover for more figures and 95 % intervals."
    sections = [
        _heat_map(document, "Mean recall", note, "matrix", "mean_recall", MEAN),
        _heat_map(document, "R@1", "", "matrix", "R@1", figure_of("retrieval.R@1")),
        *(
            _heat_map(document, f"Modality gap: {figure.label}", note, "gap", name, figure)
            for name, note in (
                ("centroid_distance", "Lower is closer."),
                ("rmg", "The distance of matching rows against that within the sides."),
            )
            for figure in (figure_of(f"gap.{name}"),)
        ),
    ]
    if document["subsets"]:
        sections.append(_subsets(document))
    write_page(
        path,
        f"Evaluation of {what}, split {document['split']}",
        sections,
        summary=f"Mean recall {mean} over the {cells} directions between "
        f"{len(document['sides'])} sides ({counted(counts['items'], 'item')}; {rows}).",
    )


def _between(figure: Figure, interval: Sequence[float] | None) -> str:
    """Word an interval, "" without one."""
    return f" [{figure.show(interval[0])}, {figure.show(interval[1])}]" if interval else ""


def _heat_map(
    document: Document, title: str, note: str, block: str, name: str, figure: Figure
) -> Section:
    sides, is_recall = document["sides"], block == "matrix"
    found, around = document[block], document["intervals"].get(block, {})
    shown = figure._replace(digits=1 if figure.scale == 100 else 3)

    def table(cell: Callable[[str, str], Any], empty: Any) -> list[list[Any]]:
        return [[empty if a == b else cell(a, b) for b in sides] for a in sides]

    def hover(a: str, b: str) -> str:
        lines = [f"{a} → {b}" if is_recall else f"{a} and {b}"]
        names = ("mean_recall", "R@1", "R@5", "R@10", "median_rank", "queries", "gallery")
        for key in names if is_recall else ("centroid_distance", "rmg", "cs_divergence", "frechet"):
            value = found[a][b][key]
            if key in ("queries", "gallery"):
                lines.append(f"{key} {value:,}")
                continue
            own = MEAN if key == "mean_recall" else figure_of(f"{block}.{key}")
            interval = _between(own, value_at(around, (a, b, key)))
            lines.append(f"{own.heading} {own.show(value)}{interval}")
        return "<br>".join(lines)

    values = table(lambda a, b: found[a][b][name], None)
    plot = go.Figure(
        go.Heatmap(
            z=[[None if own is None else figure.scale * own for own in row] for row in values],
            x=sides,
            y=sides,
            text=table(lambda a, b: shown.show(found[a][b][name]), ""),
            customdata=table(hover, ""),
            texttemplate="%{text}",
            hovertemplate="%{customdata}<extra></extra>",
            hoverongaps=False,
            colorscale=RECALL if is_recall else GAP,
            zmin=0,
            zmax=100 if is_recall else max(filter(None, chain.from_iterable(values)), default=1),
            showscale=False,
            xgap=2,
            ygap=2,
        )
    )
    plot.update_xaxes(side="top", showgrid=False)
    plot.update_yaxes(autorange="reversed", showgrid=False)
    plot.update_layout(height=MARGINS + CELL_HEIGHT * len(sides), margin={"t": 60, "b": 10})
    return Section(f"{title}{' %' * (figure.scale == 100)} {figure.better}", note, plot)


def _subsets(document: Document) -> Section:
    rows: list[list[str | Entry]] = [
        ["", "best side", *(score.replace("_", " ") for score in SCORES), "gain"]
    ]
    for target, blocks in document["subsets"].items():
        for subset, block in blocks.items():
            around = value_at(document["intervals"], ("subsets", target, subset)) or {}
            cells: list[str | Entry] = []
            for place in (*((score, "mean_recall") for score in SCORES), ("gain",)):
                ends = value_at(around, place) or ()
                shown = MEAN.show(value_at(block, place))
                cells.append(Entry(shown, " to ".join(map(MEAN.show, ends))))
            label = by_sides(target, subset, document["sides"])
            rows.append([label, block["best_side"], *cells])
    note = (
        "Mean recall % ↑, both ways, between rows of one side and items that are described by "
        "several of the others. Best single: each item by the best side that it has; gain: the "
        "query-weighted score over that, in points. Small numbers: 95 % bootstrap intervals over "
        "items."
    )
    return Section("Retrieval by several sides", note, rows=rows)
