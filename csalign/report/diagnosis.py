"""The page of ``csalign diagnose``."""

from collections.abc import Mapping
from math import log10
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go

from csalign.report.evaluation import IMAGES, OTHER, TEXTS
from csalign.report.page import Section, write_page

OBJECTIVES = {"infonce": ("InfoNCE", TEXTS), "objective": ("InfoNCE + CS", IMAGES)}


def write_diagnosis(path: Path, document: Mapping[str, Any]) -> None:
    """Write the page of a document of ``csalign diagnose``."""
    features, adapter = document["features"], document.get("adapter")
    title = f"Diagnosis of {Path(features).name}, {Path(adapter or 'no adapter').name}"
    forecast = document["forecast"]
    sections = [_forecast(forecast)]
    summary = " ".join(forecast["words"])
    if "gap" in document:
        share = document["gap"]["centroid_share"]
        summary += (
            f" Split {document['split']}: {100 * share:.0f} % of the gap is an offset of the "
            "centroids, which centring alone would remove; the gradients of alignment and "
            f"uniformity have a cosine of {document['objective']['gradient_cosine']:.2f} (-1: they "
            "cancel)."
        )
        sections += [_conflict(document), _terms(document), _gap_parts(document["gap"])]
    write_page(path, title, sections, document.get("names"), summary=summary)


def _forecast(found: Mapping[str, Any]) -> Section:
    figure = go.Figure()
    expected = found["expected"]
    trained = [{"pairs": found["different"], **expected}] if expected else []
    for points, name, colour in (
        (found["curve"], "linear maps, held-out pairs", IMAGES),
        (found["extrapolated"], "linear maps, foretold", TEXTS),
        (trained, "csalign train, foretold", OTHER),
    ):
        mean, low, high = (
            np.array([100 * own[key] for own in points]) for key in ("mean_recall", "low", "high")
        )
        ranges = {"array": high - mean, "arrayminus": mean - low, "symmetric": False}
        pairs = [own["pairs"] for own in points]
        figure.add_scatter(x=pairs, y=mean, error_y=ranges, name=name, line_color=colour)
    figure.update_xaxes(type="log", dtick=1, title="different pairs")
    figure.update_yaxes(title="mean recall % in a gallery of 1,000", rangemode="tozero")
    return Section(
        "What can be foretold",
        "Recall by the number of pairs, and the range where 9 of 10 lie.",
        figure if found["curve"] else None,
    )


def _conflict(document: Mapping[str, Any]) -> Section:
    figure, scale = go.Figure(), document["logit_scale"]
    for key, (name, colour) in OBJECTIVES.items():
        figure.add_scatter(
            x=[row["logit_scale"] for row in document["by_scale"]],
            y=[row[key] for row in document["by_scale"]],
            name=name,
            line_color=colour,
        )
    figure.add_vline(x=scale, line={"dash": "dot", "width": 1, "color": OTHER})
    # On a logarithmic axis annotations, unlike lines, are placed by the exponent.
    label = f"here: {scale:g}"
    side = "left" if scale < 20 else "right"  # where there is room
    place = {"x": log10(scale), "y": 1, "yref": "paper", "xanchor": side}
    figure.add_annotation(text=label, showarrow=False, **place)
    figure.update_xaxes(type="log", dtick=1, title="logit scale")
    figure.update_yaxes(title="cosine of the gradients", range=[-1.05, 1.05])
    return Section(
        "Do the two parts of the loss conflict?",
        "Cosine between the gradients of alignment, which pulls pairs together, and uniformity, "
        "which pushes everything apart, from soft temperatures to CLIP's. At -1 they cancel and "
        "the modalities stay apart. Use features from before training: at a minimum the two "
        f"gradients cancel by definition. {document['pairs']:,} pairs.",
        figure,
    )


def _terms(document: Mapping[str, Any]) -> Section:
    rows = [["", *(name for name, _ in OBJECTIVES.values())]]
    for name in ("loss", "alignment", "uniformity", "gradient_cosine"):
        label = "cosine of their gradients" if name == "gradient_cosine" else name
        rows.append([label, *(f"{document[key][name]:.4f}" for key in OBJECTIVES)])
    note = (
        f"In nats, at logit scale {document['logit_scale']:g}, CS weight "
        f"{document['cs_weight']:g}, bandwidth {document['bandwidth']:g}."
    )
    return Section("The terms", note, rows=rows)


def _gap_parts(gap: Mapping[str, float]) -> Section:
    figure = go.Figure()
    for key, label, colour in (
        ("centroid_share", "centroid offset", TEXTS),
        ("shape_share", "shape difference", IMAGES),
    ):
        name, value = f"{label} {100 * gap[key]:.0f} %", gap[key] * gap["frechet"]
        figure.add_bar(x=[value], y=["gap"], name=name, marker_color=colour, orientation="h")
    figure.update_layout(barmode="stack", height=200, legend={"traceorder": "normal"})
    figure.update_xaxes(title="Fréchet distance between images and texts")
    figure.update_yaxes(showticklabels=False)
    return Section(
        "Composition of the gap",
        "Centring removes an offset of the centroids, but not a difference in shape. Uniformity "
        f"within a side (lower is more spread out): images {gap['uniformity_image']:.3f}, texts "
        f"{gap['uniformity_text']:.3f}.",
        figure,
    )
