"""Tables of the commands that evaluate, for feature sets of more sides than images and texts."""

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations, permutations
from typing import Any

from csalign.cli import render
from csalign.core.figures import Figure, by_sides, counted, figure_of, value_at

SHORT = Figure("mean recall", "↑", 100, 1)
WITH_INTERVALS = 4  # sides, of which a matrix with intervals fits 80 columns
FURTHER = ("R@1", "R@5", "R@10", "median_rank", "mrr")
GAPS = ("rmg", "cs_divergence", "mmd", "frechet", "linear_separability", "alignment")
ONE_WAY = "rows: from, columns: to"

Document = Mapping[str, Any]
Cell = Callable[[str, str], str]


def eval_table(document: Document, about: str, *, every: bool) -> None:
    """Print the document of ``csalign eval``, with all figures if they are wanted."""
    counts, sides, intervals = document["counts"], document["sides"], document["intervals"]
    render.print_line(f"{about}: {counted(counts['items'], 'item')}", "bold")
    render.print_wrapped(", ".join(f"{name} {own:,}" for name, own in counts["rows"].items()))
    mean = SHORT._replace(digits=2)
    title = mean.show_between(document["mean_recall"], intervals.get("mean_recall"))
    figures = {f"{mean.heading} {title}; {ONE_WAY}": ("matrix", "mean_recall", SHORT)}
    for name in FURTHER if every else ():
        figure = figure_of(f"retrieval.{name}")._replace(digits=1)
        figures[f"{figure.heading}; {ONE_WAY}"] = ("matrix", name, figure)
    for name in ("centroid_distance", *(GAPS if every else ())):
        figure = figure_of(f"gap.{name}")._replace(digits=3)
        figures[f"modality gap: {figure.heading}"] = ("gap", name, figure)
    for heading, (block, name, figure) in figures.items():

        def cell(a: str, b: str, block: str = block, name: str = name, own: Figure = figure) -> str:
            is_twice = block == "gap" and sides.index(a) > sides.index(b)
            if a == b or is_twice:
                return ""
            around = value_at(intervals, (block, a, b, name))
            around = around if len(sides) <= WITH_INTERVALS else None
            return own.show_between(document[block][a][b][name], around)

        render.print_title(heading)
        rows, columns = (sides, sides) if block == "matrix" else (sides[:-1], sides[1:])
        render.print_table([*rows], {b: [cell(a, b) for a in rows] for b in columns})
    _subsets(document, every=every)


def _subsets(document: Document, *, every: bool) -> None:
    """Print retrieval by several sides: of more than four, by all of the others alone."""
    sides, others = document["sides"], len(document["sides"]) - 1
    rows, hidden = {}, 0
    for target, blocks in document["subsets"].items():
        for subset, block in blocks.items():
            is_all = subset.count("+") == others - 1
            if every or is_all or len(sides) <= WITH_INTERVALS:
                around = value_at(document["intervals"], ("subsets", target, subset, "gain"))
                rows[by_sides(target, subset, sides)] = block, around
            else:
                hidden += 1
    if not rows:
        return
    render.print_title("mean recall % ↑ by several sides, both ways")
    columns = {
        title: [SHORT.show(block[score]["mean_recall"]) for block, _ in rows.values()]
        for score, title in (("mean", "mean"), ("sum", "sum"), ("query_weighted", "weighted"))
    }
    best = [
        f"{block['best_side']} {SHORT.show(block['best_single']['mean_recall'])}"
        for block, _ in rows.values()
    ]
    gain = [
        ("+" if block["gain"] >= 0 else "") + SHORT.show_between(block["gain"], around)
        for block, around in rows.values()
    ]
    render.print_table([*rows], {"best side": best, **columns, "gain": gain})
    more = f"; {hidden} more subsets with --all-figures" if hidden else ""
    render.print_wrapped(
        "best side: each item by the best side that it has; gain: of the query-weighted score over "
        f"that, in points{more}"
    )


def compare_tables(rows: Sequence[Document], labels: Sequence[str], sides: Sequence[str]) -> None:
    """Print recalls of each system against the baseline, and gaps, by pairs of sides."""
    baseline = next((row for row in rows if row["verdict"] == "baseline"), rows[0])
    ways = {f"{a} to {b}": f"{a}_to_{b}_mean_recall" for a, b in permutations(sides, 2)}
    for row, label in zip(rows, labels, strict=True):
        if row is baseline and len(rows) > 1:
            continue
        columns = {} if row is baseline else {"baseline": _shown(baseline, ways, SHORT)}
        columns["recall"] = _shown(row, ways, SHORT)
        if row["difference"]:
            found = [row["difference"].get(name) for name in ways.values()]
            columns["difference"] = [SHORT.show_difference(**own) if own else "" for own in found]
            columns["verdict"] = [row["verdicts"].get(name, "") for name in ways.values()]
        render.print_title(f"{label}: {SHORT.heading} by direction")
        render.print_table([*ways], columns)
    gaps = {f"{a}, {b}": f"{a}_{b}_centroid_distance" for a, b in combinations(sides, 2)}
    figure = figure_of("gap.centroid_distance")._replace(digits=3)
    render.print_title(f"modality gap: {figure.heading}")
    columns = {own: _shown(row, gaps, figure) for own, row in zip(labels, rows, strict=True)}
    render.print_table([*gaps], columns)


def _shown(row: Document, places: Mapping[str, str], figure: Figure) -> list[str]:
    return [figure.show(row[name]) for name in places.values()]


def diagnosis_tables(document: Document) -> None:
    """Print the document of ``csalign diagnose``: words, items, and agreement by pairs of sides."""
    split = "all rows" if document["split"] == "all" else document["split"].replace(",", " and ")
    counts, sides = document["counts"], document["sides"]
    about = f"{document['features']}, {split}: {counted(counts['items'], 'item')}"
    render.print_line(about, "bold")
    for sentence in document["forecast"]["words"]:
        render.print_wrapped(sentence)
    render.print_title("items by the number of their sides")
    numbers = counts["items_by_sides"]
    render.print_rows((name, f"{own:,}") for name, own in numbers.items())
    for name, title, form in (
        ("items", "items that both have", ",d"),
        ("mutual_knn", "mutual 10-NN before training ↑", ".3f"),
        ("cka", "linear CKA before training ↑", ".3f"),
    ):
        _triangle(title, sides, document["forecast"]["pairs"], name, form)


def _triangle(title: str, sides: Sequence[str], pairs: Document, name: str, form: str) -> None:
    def cell(a: str, b: str) -> str:
        value = pairs[a][b][name]
        return "-" if value is None else format(value, form)

    render.print_title(title)
    columns = {
        b: [cell(a, b) if sides.index(a) < sides.index(b) else "" for a in sides[:-1]]
        for b in sides[1:]
    }
    render.print_table([*sides[:-1]], columns)
