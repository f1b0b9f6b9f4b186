"""The page of ``csalign eval`` and ``csalign train``."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import plotly.graph_objects as go

from csalign.core.side_names import Names
from csalign.report.page import Entry, Section, plain, write_page

Array = npt.NDArray[Any]

IMAGES, TEXTS, MATCHED, OTHER = "#3d85d1", "#d9702b", "#2f9e63", "#8a8f98"
POINTS_OF_A_CURVE = 1_000
HOVER_LETTERS = 160


@dataclass(frozen=True)
class View:
    """The embeddings of both sides at one stage.

    Attributes:
        name: "before" or "after" the adapter, "" where there is none.
        images: (k, 2) projections of k pairs.
        texts: (k, 2) likewise.
        shares: of the variance that the two axes show, in [0, 1]; of either side where each has
            axes of its own.
        shared: whether both sides lie in one space; without one, what follows is empty.
        cosines: of matched and of unmatched pairs.
        spectra: singular values of the centred rows of images and of texts, falling.
        neighbours: (k, 2) of images and of texts by UMAP, or None.
    """

    name: str
    images: Array
    texts: Array
    shares: Sequence[float]
    shared: bool
    cosines: tuple[Array, Array]
    spectra: tuple[Array, Array]
    neighbours: tuple[Array, Array] | None = None


@dataclass(frozen=True)
class Found:
    """A query and where its best match was found.

    Attributes:
        query: what was asked.
        rank: of the best match, from 1.
        match: the best match.
        first: what came first.
    """

    query: Entry
    rank: int
    match: Entry
    first: Entry


@dataclass(frozen=True)
class RunRecord:
    """What a run wrote while it trained.

    Attributes:
        metrics: the lines of ``metrics.jsonl``.
        config: what it was told.
        environment: what it ran on.
    """

    metrics: Sequence[Mapping[str, Any]]
    config: Mapping[str, Any]
    environment: Mapping[str, Any]


def write_evaluation(
    path: Path,
    title: str,
    document: Mapping[str, Any] | None,
    views: Sequence[View],
    labels: Sequence[str],
    found: Mapping[str, Sequence[Found]],
    run: RunRecord | None,
    names: Names | None = None,
) -> None:
    """Write an evaluation as a page.

    Args:
        path: of the page.
        title: of the page.
        document: of ``csalign eval``, or None where nothing was evaluated.
        views: the embeddings, before the adapter and after it.
        labels: caption and id of each pair in the views.
        found: queries by what is said of them, such as "Worst image to text".
        run: of the adapter, if there is one.
        names: what the sides are called, None where that is image and text.
    """
    sections = []
    if document is not None:
        sections += [_retrieval(document), _gap(document)]
    for view in views:
        sections += _projections(view, labels)
    if views:
        sections += [_cosines(views), _spectra(views)]
    sections += [_queries(name, queries) for name, queries in found.items()]
    if run is not None:
        sections += [*_curves(run.metrics), *_settings(run)]
    write_page(path, title, sections, names)


def _retrieval(document: Mapping[str, Any]) -> Section:
    retrieval, intervals = document["retrieval"], document["intervals"]
    recalls = {f"R@{k}": (100, 2) for k in (1, 5, 10)}
    figures = {**recalls, "median_rank": (1, 1), "mrr": (1, 4), "map": (1, 4)}
    rows: list[list[str | Entry]] = [["", "R@1, %", "R@5, %", "R@10, %", "median", "MRR", "mAP"]]
    for direction in ("image_to_text", "text_to_image"):
        row: list[str | Entry] = [direction.replace("_", " ")]
        for name, (scale, digits) in figures.items():
            interval = intervals.get(direction, {}).get(name)
            row.append(_figure(retrieval[direction][name], interval, scale, digits))
        rows.append(row)
    mean = _figure(retrieval["mean_recall"], intervals.get("mean_recall"), 100, 2)
    rows.append(["mean recall, %", mean, *[""] * (len(figures) - 1)])
    counts = ", ".join(f"{count:,} {name}" for name, count in document["counts"].items())
    below = " Below each figure its 95 % bootstrap interval over images." if intervals else ""
    index = document["index"]["kind"]
    how = "" if index == "exact" else f" Ranked by an approximate index ({index})."
    return Section("Retrieval", f"{counts}.{below}{how}", rows=rows)


def _figure(value: float, interval: Sequence[float] | None, scale: int, digits: int) -> Entry:
    ends = [f"{scale * end:.{digits}f}" for end in interval or ()]
    return Entry(f"{scale * value:.{digits}f}", " to ".join(ends))


def _estimated(value: float, error: float | None) -> Entry:
    """A figure with its standard error, if it has one."""
    return Entry(f"{value:.4f}", "" if error is None else f"± {error:.2g}")


def _gap(document: Mapping[str, Any]) -> Section:
    rows: list[list[str | Entry]] = [["", "value"]]
    gap, around = document["gap"], document["gap"].get("standard_errors", {})
    for name, value in gap.items():
        label = name.replace("_", " ")
        if name == "standard_errors":
            continue
        if isinstance(value, Mapping):
            numbers = {part: number for part, number in value.items() if isinstance(number, float)}
            rows += [
                [f"{label}, {part}", _estimated(number, around.get(name, {}).get(part))]
                for part, number in numbers.items()
            ]
        elif name in around:
            rows.append([label, _estimated(value, around[name])])
        else:
            rows.append([label, _figure(value, document["intervals"].get(name), 1, 4)])
    return Section("The gap between the modalities", "Lower is closer, but for ranks.", rows=rows)


def _projections(view: View, labels: Sequence[str]) -> Iterator[Section]:
    title = f"The embeddings, {view.name} the adapter" if view.name else "The embeddings"
    shares = " and ".join(f"{share:.0%}" for share in view.shares)
    where = (
        f"Both sides on the first two principal axes of both together, {shares} of their variance."
        if view.shared
        else "Each side on its own two first principal axes, since before the adapter they have no "
        f"space in common; {shares} of the variance."
    )
    figure = _points(view, (view.images, view.texts), labels)
    yield Section(title, f"{where} {len(labels):,} pairs.", figure)
    if view.neighbours is not None:
        figure = _points(view, view.neighbours, labels)
        note = "By UMAP, which keeps neighbours together; distances and axes have no meaning."
        yield Section(f"{title}: neighbours", note, figure)


def _points(view: View, sides: tuple[Array, Array], labels: Sequence[str]) -> go.Figure:
    figure = go.Figure()
    hover = [_hover(label) for label in labels]
    for name, points, colour, axes in (
        ("images", sides[0], IMAGES, ("x", "y")),
        ("texts", sides[1], TEXTS, ("x", "y") if view.shared else ("x2", "y2")),
    ):
        figure.add_scatter(
            x=points[:, 0].round(4).tolist(),
            y=points[:, 1].round(4).tolist(),
            name=name,
            mode="markers",
            marker={"color": colour, "size": 5, "opacity": 0.7},
            text=hover,
            hovertemplate="%{text}",  # beside which Plotly tells the name
            xaxis=axes[0],
            yaxis=axes[1],
        )
    if view.shared:
        figure.add_scatter(
            **_lines(*sides),
            name="pairs (click)",
            mode="lines",
            line={"color": OTHER, "width": 0.5},
            hoverinfo="skip",
            visible="legendonly",
        )
        figure.update_yaxes(scaleanchor="x")
    else:
        figure.update_layout(
            xaxis_domain=[0, 0.47], xaxis2={"domain": [0.53, 1]}, yaxis2={"anchor": "x2"}
        )
    _plain_layout(figure, height=480)
    return figure


def _lines(starts: Array, ends: Array) -> dict[str, list[float | None]]:
    """One line from each start to its end, as Plotly draws many at once."""
    return {
        name: [
            value
            for start, end in zip(starts[:, axis], ends[:, axis], strict=True)
            for value in (round(float(start), 4), round(float(end), 4), None)
        ]
        for axis, name in enumerate("xy")
    }


def _hover(label: str) -> str:
    short = label if len(label) <= HOVER_LETTERS else label[:HOVER_LETTERS] + "…"
    lines = [short[start : start + 60] for start in range(0, len(short), 60)]
    return "<br>".join(plain(line) for line in lines)


def _cosines(views: Sequence[View]) -> Section:
    figure = go.Figure()
    there = [view for view in views if view.shared]
    values = [kind for view in there for kind in view.cosines]
    bins = max(10, min(60, len(values[0]) // 10))
    edges = np.linspace(min(map(np.min, values)) - 0.01, max(map(np.max, values)) + 0.01, bins + 1)
    for view in there:
        for name, kind, colour in zip(
            ("matched", "unmatched"), view.cosines, (MATCHED, OTHER), strict=True
        ):
            density, _ = np.histogram(kind, edges, density=True)
            figure.add_scatter(
                x=edges.round(4).tolist(),
                y=[*density.round(4).tolist(), 0],
                name=_of(name, view, there),
                mode="lines",
                line={"shape": "hv", "color": colour, **_dash(view, there)},
                fill=None if _dash(view, there) else "tozeroy",
            )
    figure.update_xaxes(title="cosine")
    figure.update_yaxes(title="density", rangemode="tozero")
    _plain_layout(figure)
    return Section(
        "Cosines of pairs",
        "The less the two overlap, the better images and texts find each other.",
        figure,
    )


def _spectra(views: Sequence[View]) -> Section:
    figure = go.Figure()
    for view in views:
        for name, values, colour in zip(
            ("images", "texts"), view.spectra, (IMAGES, TEXTS), strict=True
        ):
            figure.add_scatter(
                x=list(range(1, len(values) + 1)),
                y=[float(f"{value:.4g}") for value in values],
                name=_of(name, view, views),
                mode="lines",
                line={"color": colour, **_dash(view, views)},
            )
    figure.update_xaxes(title="direction")
    figure.update_yaxes(title="singular value", type="log", exponentformat="power")
    _plain_layout(figure)
    return Section(
        "Singular values",
        "Of the centred unit rows: where they fall steeply, few directions are used.",
        figure,
    )


def _of(name: str, view: View, views: Sequence[View]) -> str:
    return f"{name}, {view.name}" if len(views) > 1 else name


def _dash(view: View, views: Sequence[View]) -> dict[str, str]:
    """Dotted where it is but the one to compare with."""
    return {"dash": "dot"} if view is not views[-1] else {}


def _queries(name: str, queries: Sequence[Found]) -> Section:
    rows: list[list[str | Entry]] = [["rank", "query", "its best match", "found first"]]
    for one in queries:
        first = one.first if one.rank > 1 else "the same"
        rows.append([f"{one.rank:,}", one.query, one.match, first])
    return Section(name, rows=rows, prose=True)


def _curves(metrics: Sequence[Mapping[str, Any]]) -> Iterator[Section]:
    steps = [line for line in metrics if "loss" in line]
    thinned = steps[:: -(-len(steps) // POINTS_OF_A_CURVE) or 1]
    if steps:
        figure = go.Figure()
        for name in ("loss", "pairwise", "pairwise_others", "divergence"):
            if any(line.get(name) is not None for line in thinned):
                figure.add_scatter(
                    x=[line["step"] for line in thinned],
                    y=[line.get(name) for line in thinned],
                    name=name.replace("_", " "),
                    mode="lines",
                )
        figure.update_xaxes(title="step")
        _plain_layout(figure)
        yield Section("The loss while training", "Its terms without their weights.", figure)
    scores = [line for line in metrics if "validation" in line]
    if scores:
        figure = go.Figure()
        for name, colour, axis in (
            ("mean_recall", IMAGES, "y"),
            ("centroid_distance", TEXTS, "y2"),
        ):
            figure.add_scatter(
                x=[line["step"] for line in scores],
                y=[line["validation"].get(name) for line in scores],
                name=name.replace("_", " "),
                mode="lines+markers",
                line_color=colour,
                yaxis=axis,
            )
        figure.update_xaxes(title="step")
        figure.update_layout(
            yaxis={"title": "mean recall", "tickformat": ".0%"},
            yaxis2={
                "title": "centroid distance",
                "overlaying": "y",
                "side": "right",
                "showgrid": False,
                "tickmode": "auto",  # else where the left one has ticks, at odd values
            },
        )
        _plain_layout(figure)
        yield Section("Validation while training", "The best mean recall is kept.", figure)


def _settings(run: RunRecord) -> Iterator[Section]:
    for name, values in (("Configuration", run.config), ("Environment", run.environment)):
        if values:
            rows: list[list[str | Entry]] = [["key", "value"]]
            rows += [[key, text] for key, text in _leaves(values)]
            yield Section(name, rows=rows, prose=True)


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        elif isinstance(value, list):
            yield prefix + key, " ".join(map(str, value))
        else:
            yield prefix + key, str(value)


def _plain_layout(figure: go.Figure, **layout: Any) -> None:
    figure.update_layout(
        margin={"t": 20, "b": 45, "r": 50}, legend={"orientation": "h", "y": 1.1}, **layout
    )
