"""Tables of the commands that evaluate: eval, compare and diagnose."""

from collections.abc import Iterator
from typing import Any

from rich.markup import escape
from rich.table import Table

from csalign.cli.render import (
    beside,
    column_table,
    escape_controls,
    figure_table,
    fits,
    leaves,
    percent,
    plus_minus,
    print_line,
    print_rows,
    print_table,
    signed,
)
from csalign.core.enums import Names, renamed

DIRECTIONS = ("image_to_text", "text_to_image")
_SHARE, _RANK, _PLAIN = (100, ".2f"), (1, ".1f"), (1, ".4f")
RETRIEVAL = {
    **{f"R@{k} %": (f"R@{k}", _SHARE) for k in (1, 5, 10)},
    "true recall@10 %": ("true_recall@10", _SHARE),
    "median rank": ("median_rank", _RANK),
    "mean rank": ("mean_rank", _RANK),
    "MRR": ("mrr", _PLAIN),
    "mAP": ("map", _PLAIN),
}
"""Columns of retrieval tables: which figure, its scale and its format."""


def eval_tables(document: dict[str, Any]) -> None:
    """Print the document of ``csalign eval``."""
    counts = document["counts"]
    if "distribution" in document:
        print_line(
            f"{document['generated']}: {counts['generated']:,} images, against "
            f"{document['images']}: {counts['images']:,}, by {document['encoder']}"
        )
        names = {"frechet": "Frechet distance", "frechet_unit": "of unit rows", "cmmd": "CMMD"}
        figures = document["distribution"]
        print_rows("distance", [(names[key], f"{figures[key]:.4f}") for key in names])
        _further_tables(document)
        return
    adapter = document["adapter"] or "no adapter"
    rows = f"{counts['images']:,} images, {counts['texts']:,} texts, {counts['pairs']:,} pairs"
    print_line(
        f"{document['features']}, {adapter}, split {document['split']}: "
        + renamed(rows, document.get("names"))
    )
    if "retrieval" in document:
        _retrieval_and_gap(document)
    _further_tables(document)


def _retrieval_and_gap(document: dict[str, Any]) -> None:
    names = document.get("names")
    print_line(_protocol(document["protocol"], names))
    retrieval, intervals = document["retrieval"], document["intervals"]
    print_table(_retrieval_table({"": retrieval}, intervals, names))
    whole = beside(intervals.get("mean_recall"), scale=100)
    rows = [("mean recall", percent(retrieval["mean_recall"]) + whole)]
    gap = {name: value for name, value in document["gap"].items() if name != "standard_errors"}
    errors = document["gap"].get("standard_errors", {})
    for name, value in gap.items():
        label = name.replace("_", " ")
        if isinstance(value, dict):
            own = errors.get(name, {})
            rows += [
                (f"{label}, {renamed(part, names)}", f"{number:.4f}" + plus_minus(own.get(part)))
                for part, number in value.items()
                if not isinstance(number, list)
            ]
        else:
            around = plus_minus(errors.get(name)) + beside(intervals.get(name), digits=4)
            rows.append((label, f"{value:.4f}" + around))
    print_rows("modality gap", rows)
    hubs = [
        (renamed(name.replace("_", " "), names), f"{skew:.4f}")
        for name, skew in document["hubness"].items()
    ]
    print_rows("hubness (skewness of 10-NN counts)", hubs)


def _further_tables(document: dict[str, Any]) -> None:
    """Print what was only computed on request."""
    names = document.get("names")
    if corrected := document.get("corrected"):
        print_line("retrieval with hubness correction, estimated on the evaluated rows")
        print_table(_retrieval_table(corrected, {}, names))
    if graded := document.get("graded"):
        rows = [(renamed(name, names), value) for name, value in leaves(graded)]
        print_rows(f"items with the same {graded['column']!r} count as right", rows)
    if by := document.get("by"):
        print_line(f"retrieval by {by['column']!r} of the query's {renamed('image', names)}")
        titled = {f"{name} ({block['texts']:,})": block for name, block in by["values"].items()}
        print_table(_retrieval_table(titled, {}, names))
    if "zero_shot" in document:
        _zero_shot_table(document)
    if explanations := document.get("explanations"):
        rows = [
            (name, text["formula"] + (f" ({text['source']})" if text["source"] else ""))
            for name, text in explanations.items()
        ]
        print_rows("definitions", rows)


def _zero_shot_table(document: dict[str, Any]) -> None:
    """Print zero-shot metrics with their intervals."""
    figures, intervals = document["zero_shot"], document["intervals"].get("zero_shot", {})
    shares = ("top1", "top5", "mean_per_class_recall")
    rows = [
        (name.replace("_", " "), percent(figures[name]) + beside(intervals.get(name), scale=100))
        for name in shares
        if figures[name] is not None
    ]
    counts = ", ".join(f"{figures[key]:,} {key}" for key in ("images", "classes", "prompts"))
    counts = renamed(counts, document.get("names"))
    print_rows(f"zero-shot classification: {counts}", rows)


def _protocol(protocol: dict[str, Any], names: Names | None) -> str:
    """Word what determines the scores beside the model, in one line."""
    folds = f"mean of {protocol['folds']} folds of " if protocol["folds"] > 1 else ""
    dtype = protocol["dtype"]
    images, texts = (protocol[side] // protocol["folds"] for side in ("images", "texts"))
    rows = f"{images:,} images and {texts:,} " + ("texts" if names else "captions")
    return (
        f"protocol {protocol['name']}: {folds}{renamed(rows, names)}, split {protocol['split']}, "
        f"stored as {dtype['stored']}, scores in {dtype['scores']}, {protocol['ties']}"
    )


def _retrieval_table(
    blocks: dict[str, Any], intervals: dict[str, Any], names: Names | None
) -> Table:
    """Build the table of both directions of retrieval blocks, by title."""
    table = figure_table("", *RETRIEVAL)
    for title, block in blocks.items():
        for name in DIRECTIONS:
            if name in block:
                row = block[name]
                label = f"{title} {renamed(name.replace('_', ' '), names)}".strip()
                cells = (_format(row[figure], how) for figure, how in RETRIEVAL.values())
                table.add_row(escape(label), *cells)
                if intervals:
                    table.add_row("95 %", *_ranges(intervals[name]), style="dim")
    return table


def _format(value: float, how: tuple[float, str]) -> str:
    scale, form = how
    return f"{scale * value:{form}}"


def _ranges(around: dict[str, list[float]]) -> Iterator[str]:
    """Yield the intervals of a direction in the table's columns; some metrics have none."""
    for figure, how in RETRIEVAL.values():
        ends = [_format(end, how) for end in around.get(figure, ())]
        yield f"[{', '.join(ends)}]" if ends else ""


def compare_table(document: dict[str, Any]) -> None:
    """Print the document of ``csalign compare``, one row per system, in two tables if needed."""
    rows = document["evaluations"]
    names = [escape(escape_controls(row["name"])) for row in rows]
    judged = {"mean recall": [], "difference": [], "verdict": [row["verdict"] for row in rows]}
    for row in rows:
        difference = row["difference"].get("mean_recall")
        interval = beside(row["intervals"].get("mean_recall"), scale=100)
        judged["mean recall"].append(percent(row["mean_recall"]) + interval)
        judged["difference"].append(signed(difference) if difference else "")
    called = document.get("names")
    shown = {
        renamed("i2t R@1", called): [percent(row["image_to_text_R@1"]) for row in rows],
        renamed("t2i R@1", called): [percent(row["text_to_image_R@1"]) for row in rows],
    }
    gap = {"centroid": "centroid_distance", "RMG": "rmg", "CS": "cs_divergence"}
    for title, key in {**gap, "Frechet": "frechet"}.items():
        shown[title] = [f"{row[key]:.4f}" for row in rows]
    for key, kind in (("parameters", ",.0f"), ("seconds", ",.1f")):
        if any(row[key] is not None for row in rows):
            shown[key] = ["" if row[key] is None else format(row[key], kind) for row in rows]
    one = column_table(names, judged | shown)
    for table in [one] if fits(one) else [column_table(names, judged), column_table(names, shown)]:
        print_table(table)
    if any(row["intervals"] for row in rows):
        paired = "; differences are paired" if any(row["difference"] for row in rows) else ""
        print_line(f"[..., ...]: 95 % bootstrap intervals over images{paired}")


def diagnosis_tables(document: dict[str, Any]) -> None:
    """Print the document of ``csalign diagnose``: both objectives, then the gap."""
    infonce, objective = document["infonce"], document["objective"]
    print_line(
        f"{document['features']}, {document['adapter'] or 'no adapter'}, split "
        f"{document['split']}: {document['pairs']:,} pairs at logit scale "
        f"{document['logit_scale']:g}, CS weight {document['cs_weight']:g}"
    )
    table = figure_table("", "InfoNCE", "with CS")
    for name in ("loss", "alignment", "uniformity", "gradient_cosine"):
        label = "cosine of their gradients" if name == "gradient_cosine" else name
        table.add_row(label, f"{infonce[name]:.4f}", f"{objective[name]:.4f}")
    print_table(table)
    rest = {name: value for name, value in objective.items() if name not in infonce}
    rows = list(leaves(rest | document["gap"]))
    print_rows(
        "divergence and gap",
        [(renamed(name, document.get("names")), value) for name, value in rows],
    )
