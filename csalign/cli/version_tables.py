"""Tables of ``csalign compare`` for embeddings of the same items by several models."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from csalign.cli import render
from csalign.cli.next_steps import Step, first_free
from csalign.core.figures import Figure, percent
from csalign.evaluation.config import CompareConfig

FIGURES = {
    "retention@10": Figure("retention@10", "↑", 100, 1),
    "hit@1": Figure("hit@1", "↑", 100, 1),
    "median_cosine": Figure("median cosine", "↑", 1, 3),
}

Document = Mapping[str, Any]


def version_tables(document: Document, settings: CompareConfig) -> None:
    """Print each set against the first: ids, cosines and neighbours, then the maps by pairs."""
    for one in document["versions"]:
        _tables(one)
    render.print_closing(settings, *_after(document["versions"][0]))


def _tables(one: Document) -> None:
    old, new, ids = one["old"], one["new"], one["ids"]
    counts = f"{ids['common']:,} ids in both, {ids['distinct']:,} different vectors"
    render.print_line(f"{new} against {old}: {counts}", "bold")
    apart = f"{ids['only_old']:,} ids of {old}, {ids['only_new']:,} of {new}; left out"
    rows = {"only in one": apart}
    if canary := one["canary"]:
        rows["cosine, same ids"] = (
            f"mean {canary['mean']:.4f}, 5 % are below {canary['lowest_5_percent']:.4f}, least "
            f"{canary['least']:.4f}: {canary['verdict']}"
        )
    if overlap := one["overlap"]:
        low, high = overlap["interval"]
        rows["overlap@10"] = (
            f"{percent(overlap['overlap@10'], 1)} of the 10 nearest are the same in both "
            f"[{100 * low:.1f}, {100 * high:.1f}]; by chance {percent(overlap['chance'], 1)}"
        )
    render.print_rows(rows.items())
    render.print_line()
    for sentence in one["words"]:
        render.print_wrapped(sentence)
    if not one["maps"]:
        return
    render.print_title("new queries, old vectors")
    lines = [*filter(None, [one["unmapped"]]), *one["maps"]]
    labels = [f"{row['pairs']:,} pairs" if row["pairs"] else "unmapped" for row in lines]
    columns = {
        figure.heading: [figure.show_between(row[key], row["intervals"][key]) for row in lines]
        for key, figure in FIGURES.items()
    }
    render.print_table(labels, {"map": [row["map"] for row in lines], **columns})
    render.print_line()
    queries, gallery, learned = one["held_out"].values()
    render.print_wrapped(
        "retention@10: share of the 10 nearest re-embedded items that are among the 10 nearest; "
        f"hit@1: own item first. {queries:,} queries among {gallery:,} held-out ids, maps learned "
        f"on {learned}; ± half of the 95 % interval"
    )


def _after(one: Document) -> Iterator[Step]:
    """Suggest how to make and apply the map that is advised."""
    if one["advice"] != "map":
        return
    order = [(name, Path(one[name], f"{one['sides'][name]}s")) for name in ("old", "new")]
    # The old set stays on its side, since `apply` maps each side with that side's adapter.
    is_image = one["sides"]["old"] == "image"
    (first, x), (second, y) = order if is_image else order[::-1]
    kept = "--text-adapter" if is_image else "--image-adapter"
    pairs, run = first_free("pairs"), first_free("map")
    yield ("import", x, y, "--names", f"{first},{second}", "--pair-by", "id", "--out", pairs)
    yield ("train", pairs, kept, "identity", "--adapter", "linear", "--steps", "0", "--out", run)
    yield ("apply", one["old"], "--adapter", run, "--out", first_free("mapped"))
