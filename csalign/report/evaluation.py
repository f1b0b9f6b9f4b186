"""The pages of ``csalign eval`` and ``csalign train``."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go

from csalign.core.arrays import Array
from csalign.core.figures import (
    baseline_table,
    figure_of,
    interval_place,
    same_side_words,
    value_at,
)
from csalign.report.page import Entry, Section, escape_label, write_page

IMAGES, TEXTS, MATCHED, OTHER = "#3d85d1", "#d9702b", "#2f9e63", "#8a8f98"
POINTS_OF_A_CURVE = 1_000
HOVER_LETTERS = 160
# Keys of a line of metrics.jsonl beside the loss terms.
NO_LOSS = {"step", "cs_weight", "logit_scale", "bandwidth", "gradient_norm", "learning_rate"}


@dataclass(frozen=True)
class View:
    """Embeddings of sampled pairs, before or after the adapter."""

    name: str  # "before" or "after"; "" without an adapter
    images: Array  # (k, 2) projections
    texts: Array  # (k, 2) likewise
    shares: Sequence[float]  # explained variance in [0, 1], of common axes or per side
    cosines: tuple[Array, Array] | None  # of matched and unmatched pairs, if comparable
    spectra: tuple[Array, Array]  # singular values of the centred images and texts, descending
    neighbours: tuple[Array, Array] | None = None  # (k, 2) of images and of texts by UMAP, or None


@dataclass(frozen=True)
class RankedQuery:
    """A query with the rank of its best match, from 1, that match, and the best wrong item."""

    query: Entry
    rank: int
    match: Entry
    first: Entry


@dataclass(frozen=True)
class RunRecord:
    """The lines of a run's ``metrics.jsonl``, its configuration and its environment."""

    metrics: Sequence[Mapping[str, Any]]
    config: Mapping[str, Any]
    environment: Mapping[str, Any]


def write_evaluation(
    path: Path,
    title: str,
    document: Mapping[str, Any] | None,
    views: Sequence[View],
    labels: Sequence[str],
    queries: Mapping[str, Sequence[RankedQuery]],
    run: RunRecord | None,
    *,
    is_training: bool = False,
) -> None:
    """Write the page of an evaluation or of a training run.

    If the document has "before", the blocks of the same rows without the adapter, tables show both.
    Labels are caption and id of each pair in the views; the queries have headings.
    """
    curves = [] if run is None else list(_curves(run.metrics))
    sections = [*curves] if is_training else []
    if document is not None:
        sections += [_retrieval(document), _gap(document), _mixed(document)]
        if "groups" in document:
            sections.append(_groups(document))
        if document.get("baselines"):
            sections.append(_baselines(document))
    for view in views:
        sections += _projections(view, labels)
    if views:
        sections += [_cosines(views), _spectra(views)]
    for heading, found in queries.items():
        rows: list[list[str | Entry]] = [["rank", "query", "its best match", "ranked first"]]
        rows += [[f"{one.rank:,}", one.query, one.match, one.first] for one in found]
        note = "Small numbers: cosine to the query."
        if not found:
            note, rows = "None: every query has its match first.", []
        sections.append(Section(heading, note, rows=rows, prose=True))
    if run is not None:
        sections += [] if is_training else curves
        for heading, values in (("Configuration", run.config), ("Environment", run.environment)):
            if values:
                leaves = [["key", "value"], *_leaves(values)]
                sections.append(Section(heading, rows=leaves, prose=True))
    names, summary = (None, "") if document is None else (document.get("names"), _summary(document))
    write_page(path, title, sections, names, summary=summary)


def _retrieval(document: Mapping[str, Any]) -> Section:
    places = [("mean_recall",)] + [
        (direction, name)
        for direction in ("image_to_text", "text_to_image")
        for name in ("R@1", "R@5", "R@10", "median_rank", "mrr", "map")
    ]
    note = _counts(document) + "."
    if document["intervals"]:
        note += " Small numbers: 95 % bootstrap intervals over images."
    if (index := document["index"]["kind"]) != "exact":
        note += f" Ranked by an approximate index ({index})."
    return Section("Retrieval", note, rows=_figures(document, "retrieval", places))


def _gap(document: Mapping[str, Any]) -> Section:
    places: list[tuple[str, ...]] = []
    for name, value in document["gap"].items():
        parts = value if isinstance(value, Mapping) else {}
        if name not in ("standard_errors", "spectrum"):
            places += [(name, part) for part in parts] or [(name,)]
    note = "Arrows: the direction of a smaller gap."
    return Section("Modality gap", note, rows=_figures(document, "gap", places))


def _mixed(document: Mapping[str, Any]) -> Section:
    names = ("ndcg@10", "recall@10", "same_side@10")
    places = [(*side, name) for side in (("image",), ("text",), ()) for name in names]
    note = (
        "Queries of each side, and right items of both. Same-side share: how many of the first 10 "
        "are of the query's own side; without a gap 50 % in the mean of both. "
    )
    note += same_side_words(document["mixed"]["same_side@10"])
    return Section("One gallery of both sides", note, rows=_figures(document, "mixed", places))


def _groups(document: Mapping[str, Any]) -> Section:
    found = document["groups"]
    knn = [("knn", name) for name in found["knn"]]
    places = [("v_measure",), ("ami",), ("ari",), *knn]
    note = (
        f"By {found['column']!r}: {found['classes']:,} classes, {found['images']:,} images, "
        f"{found['texts']:,} texts. k-means of both sides together, and k-NN that is trained on "
        "the labels of one side and tested on the other; it has to beat the share of the largest "
        "class."
    )
    return Section("Groups", note, rows=_figures(document, "groups", places))


def _figures(
    document: Mapping[str, Any], block: str, places: Iterable[tuple[str, ...]]
) -> list[list[str | Entry]]:
    """Build a table of the figures at some places of a block, before and after if both exist."""
    before, found = document.get("before"), document[block]
    rows: list[list[str | Entry]] = [["", *(["before", "after"] if before else ["value"])]]
    for place in places:
        figure = figure_of(".".join((block, *place)))
        prefix, note = "", ""
        if block == "mixed":
            prefix = f"{place[0]} queries " if place[1:] else "both "
        elif block == "retrieval" and place[1:]:
            prefix = place[0].replace("_", " ") + " "
        if ends := value_at(document["intervals"], interval_place((block, *place))):
            note = " to ".join(figure.show(end) for end in ends)
        elif error := value_at(found.get("standard_errors"), place):
            note = f"± {figure.show(error)}"
        cells: list[str | Entry] = [Entry(figure.show(value_at(found, place)), note)]
        if before:
            cells.insert(0, figure.show(value_at(before[block], place)))
        rows.append([prefix + figure.heading, *cells])
    return rows


def _counts(document: Mapping[str, Any]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in document["counts"].items())


def _summary(document: Mapping[str, Any]) -> str:
    """State the main figures, before and after if both exist."""
    said = []
    for place in (("retrieval", "mean_recall"), ("gap", "centroid_distance")):
        figure = figure_of(".".join(place))
        values = [value_at(stage, place) for stage in (document.get("before"), document) if stage]
        unit = " %" if figure.scale == 100 else ""
        said.append(f"{figure.label} " + " → ".join(figure.show(v) + unit for v in values))
    text = ", ".join(said) + f" ({_counts(document)})."
    return text[0].upper() + text[1:]


def _projections(view: View, labels: Sequence[str]) -> Iterator[Section]:
    title = f"The embeddings, {view.name} the adapter" if view.name else "The embeddings"
    shares = " and ".join(f"{share:.0%}" for share in view.shares)
    note = f"PCA of images and texts together ({shares} of the variance)."
    if view.cosines is None:
        note = (
            f"PCA of each side on its own ({shares} of the variance): before the adapter the two "
            "have no space in common."
        )
    figure = _points(view, (view.images, view.texts), labels)
    yield Section(title, f"{note} {len(labels):,} pairs.", figure)
    if view.neighbours is not None:
        note = "UMAP, which preserves neighbourhoods; distances and axes have no meaning."
        yield Section(f"{title}: neighbours", note, _points(view, view.neighbours, labels))


def _points(view: View, sides: tuple[Array, Array], labels: Sequence[str]) -> go.Figure:
    figure = go.Figure()
    shared = view.cosines is not None
    for name, points, colour, axis in (
        ("images", sides[0], IMAGES, ""),
        ("texts", sides[1], TEXTS, "" if shared else "2"),
    ):
        figure.add_scatter(
            x=points[:, 0].round(4).tolist(),
            y=points[:, 1].round(4).tolist(),
            name=name,
            mode="markers",
            marker={"color": colour, "size": 5, "opacity": 0.7},
            text=[_hover(label) for label in labels],
            hovertemplate="%{text}",  # Plotly adds the name
            xaxis=f"x{axis}",
            yaxis=f"y{axis}",
        )
    if shared:
        # One trace for all lines; NaN ends a line.
        ends = np.stack([*sides, np.full_like(sides[0], np.nan)], axis=1).reshape(-1, 2).round(4)
        x, y = ends.T.tolist()
        figure.add_scatter(
            x=x,
            y=y,
            name="pairs (click)",
            mode="lines",
            line={"color": OTHER, "width": 0.5},
            hoverinfo="skip",
            visible="legendonly",
        )
        figure.update_yaxes(scaleanchor="x")
    else:
        domains = {"xaxis_domain": [0, 0.47], "xaxis2": {"domain": [0.53, 1]}}
        figure.update_layout(**domains, yaxis2={"anchor": "x2"})
    return figure.update_layout(height=480)


def _hover(label: str) -> str:
    short = label if len(label) <= HOVER_LETTERS else label[:HOVER_LETTERS] + "…"
    lines = [short[start : start + 60] for start in range(0, len(short), 60)]
    return "<br>".join(escape_label(line) for line in lines)


def _add_line(figure: go.Figure, name: str, view: View, views: Sequence[View], **line: Any) -> None:
    """Draw a line of a view, dotted unless it is the last one."""
    line["line"]["dash"] = "solid" if view is views[-1] else "dot"
    label = f"{name}, {view.name}" if len(views) > 1 else name
    figure.add_scatter(name=label, mode="lines", **line)


def _cosines(views: Sequence[View]) -> Section:
    figure, shared = go.Figure(), [view for view in views if view.cosines is not None]
    values = np.concatenate([kind for view in shared for kind in view.cosines or ()])
    bins = max(10, min(60, len(values) // 20))
    edges = np.linspace(values.min() - 0.01, values.max() + 0.01, bins + 1)
    names = (("matched", MATCHED), ("unmatched", OTHER))
    for view in shared:
        for (name, colour), cosines in zip(names, view.cosines or (), strict=True):
            if not len(cosines):
                continue  # no pair is unmatched if all belong to one image
            density, _ = np.histogram(cosines, edges, density=True)
            x, y = edges.round(4).tolist(), [*density.round(4).tolist(), 0]
            line = {"shape": "hv", "color": colour}
            fill = "tozeroy" if view is shared[-1] else None
            _add_line(figure, name, view, shared, x=x, y=y, line=line, fill=fill)
    figure.update_xaxes(title="cosine")
    figure.update_yaxes(title="density", rangemode="tozero")
    note = "The less the two distributions overlap, the better retrieval between images and texts."
    return Section("Cosines of pairs", note, figure)


def _spectra(views: Sequence[View]) -> Section:
    figure = go.Figure()
    for view in views:
        names = (("images", IMAGES), ("texts", TEXTS))
        for (name, colour), values in zip(names, view.spectra, strict=True):
            x, y = list(range(1, len(values) + 1)), [float(f"{value:.4g}") for value in values]
            _add_line(figure, name, view, views, x=x, y=y, line={"color": colour})
    figure.update_xaxes(title="direction")
    figure.update_yaxes(title="singular value", type="log", exponentformat="power")
    note = "Of the centred unit rows: a steep drop means that few directions are used."
    return Section("Singular values", note, figure)


def _curves(metrics: Sequence[Mapping[str, Any]]) -> Iterator[Section]:
    steps = [line for line in metrics if "loss" in line]
    thinned = steps[:: -(-len(steps) // POINTS_OF_A_CURVE) or 1]
    if steps:
        figure = go.Figure()
        terms = dict.fromkeys(name for line in thinned for name in line if name not in NO_LOSS)
        x = [line["step"] for line in thinned]
        for name in terms:
            y = [line.get(name) for line in thinned]
            if any(value is not None for value in y):
                figure.add_scatter(x=x, y=y, name=name.replace("_", " "), mode="lines")
        figure.update_xaxes(title="step")
        yield Section("Training loss", "The total, and its terms without their weights.", figure)
    scores = [line for line in metrics if "validation" in line and not line.get("matched")]
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
                "tickmode": "auto",  # else at the left axis' ticks, with odd values
            },
        )
        yield Section("Validation", " ".join(_after_steps(metrics)), figure)


def _after_steps(metrics: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Say what became of the weights after the last step."""
    yield "The weights with the best mean recall are kept."
    if later := [line["validation"] for line in metrics if line.get("matched")]:
        recall = figure_of("retrieval.mean_recall").show(later[-1]["mean_recall"])
        gap = figure_of("gap.centroid_distance").show(later[-1]["centroid_distance"])
        yield f"With moments matched and all parts: recall {recall} %, centroid distance {gap}."
    for refit in (line["refit"] for line in metrics if "refit" in line):
        yield f"Then all is fitted again on {refit['pairs']:,} pairs, held-out ones too."


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[list[str]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
            yield [prefix + key, text]


def _baselines(document: Mapping[str, Any]) -> Section:
    """Build the table of the baselines, with the evaluated adapter as its last row."""
    labels, columns, note = baseline_table(document)
    rows: list[list[str | Entry]] = [["", *columns]]
    rows += [[*row] for row in zip(labels, *columns.values(), strict=True)]
    return Section("Baselines", note, rows=rows)
