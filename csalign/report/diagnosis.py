"""The page of ``csalign diagnose``."""

from collections.abc import Mapping
from math import log10
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from csalign.report.page import Section, write_page

INFONCE, FULL = "#c2571a", "#2f6fb0"
_NAMES = {"infonce": "InfoNCE", "objective": "InfoNCE + CS"}


def write_diagnosis(path: Path, document: Mapping[str, Any]) -> None:
    """Write the document of ``csalign diagnose`` as a page."""
    adapter = document["adapter"] or "no adapter"
    write_page(
        path,
        f"{document['features']}, {adapter}, split {document['split']}",
        [_conflict(document), _terms(document), _gap(document["gap"])],
        document.get("names"),
    )


def _conflict(document: Mapping[str, Any]) -> Section:
    scales = [row["logit_scale"] for row in document["by_scale"]]
    figure = go.Figure()
    for key, colour in (("infonce", INFONCE), ("objective", FULL)):
        cosines = [row[key] for row in document["by_scale"]]
        figure.add_scatter(x=scales, y=cosines, name=_NAMES[key], line_color=colour)
    here = document["logit_scale"]
    figure.add_vline(x=here, line={"dash": "dot", "width": 1, "color": "#888"})
    # On a logarithmic axis annotations, unlike lines, are placed by the exponent.
    figure.add_annotation(
        x=log10(here), y=1, yref="paper", text=f"{here:g}", showarrow=False, xshift=14
    )
    figure.update_xaxes(type="log", dtick=1, title="logit scale")
    figure.update_yaxes(title="cosine of the gradients", range=[-1.05, 1.05])
    figure.update_layout(margin_t=20, legend_orientation="h", legend_y=1.12)
    return Section(
        "Does the objective work against itself?",
        "Cosine between the gradients of what pulls (alignment) and what pushes (uniformity), for "
        "temperatures from soft to CLIP's. At -1 they undo each other and the modalities stay "
        "apart. Read it on embeddings before training: where an objective is at its minimum, pull "
        f"and push cancel in any case. {document['pairs']:,} pairs.",
        figure,
    )


def _terms(document: Mapping[str, Any]) -> Section:
    rows = [["", *_NAMES.values()]]
    for name in ("loss", "alignment", "uniformity", "gradient_cosine"):
        label = "cosine of their gradients" if name == "gradient_cosine" else name
        rows.append([label, *(f"{document[key][name]:.4f}" for key in _NAMES)])
    return Section(
        "The terms",
        f"In nats, at logit scale {document['logit_scale']:g}, CS weight "
        f"{document['cs_weight']:g}, bandwidth {document['bandwidth']:g}.",
        rows=rows,
    )


def _gap(gap: Mapping[str, float]) -> Section:
    figure = go.Figure()
    for key, label, colour in (
        ("centroid_share", "centroids apart", INFONCE),
        ("shape_share", "other shape", FULL),
    ):
        name, value = f"{label}: {gap[key]:.0%}", gap[key] * gap["frechet"]
        figure.add_bar(x=[value], y=["gap"], name=name, marker_color=colour, orientation="h")
    figure.update_layout(
        barmode="stack",
        height=200,
        margin_t=20,
        legend={"orientation": "h", "y": 1.3, "traceorder": "normal"},
    )
    figure.update_xaxes(title="Frechet distance between images and texts")
    figure.update_yaxes(showticklabels=False)
    return Section(
        "What the gap is made of",
        "An offset of the centroids can be removed by centring; a difference in shape cannot. "
        f"Uniformity inside: images {gap['uniformity_image']:.3f}, texts "
        f"{gap['uniformity_text']:.3f} (lower is more spread out).",
        figure,
    )
