"""Tables of ``csalign compare`` for embeddings of the same items by several models."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from csalign.cli.next_steps import Step, first_free
from csalign.cli.render import (
    print_closing,
    print_line,
    print_rows,
    print_table,
    print_title,
    print_wrapped,
)
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
    print_closing(settings, *(step for one in document["versions"][:1] for step in _after(one)))


def _tables(one: Document) -> None:
    ids, canary, overlap, held_out = (one[key] for key in ("ids", "canary", "overlap", "held_out"))
    print_line(
        f"{one['new']} against {one['old']}: {ids['common']:,} ids in both, "
        f"{ids['distinct']:,} different vectors",
        "bold",
    )
    rows = {
        "only in one": f"{ids['only_old']:,} ids of {one['old']}, {ids['only_new']:,} of "
        f"{one['new']}; left out",
    }
    if canary:
        rows["cosine, same ids"] = (
            f"mean {canary['mean']:.4f}, 5 % are below {canary['lowest_5_percent']:.4f}, least "
            f"{canary['least']:.4f}: {canary['verdict']}"
        )
    if overlap:
        low, high = overlap["interval"]
        rows["overlap@10"] = (
            f"{percent(overlap['overlap@10'], 1)} of the 10 nearest are the same in both "
            f"[{100 * low:.1f}, {100 * high:.1f}]; by chance {percent(overlap['chance'], 1)}"
        )
    print_rows(rows.items())
    print_line()
    for sentence in one["words"]:
        print_wrapped(sentence)
    if not one["maps"]:
        return
    print_title("new queries, old vectors")
    lines = [*([one["unmapped"]] if one["unmapped"] else []), *one["maps"]]
    labels = [f"{row['pairs']:,} pairs" if row["pairs"] else "unmapped" for row in lines]
    columns = {
        figure.heading: [figure.show_between(row[key], row["intervals"][key]) for row in lines]
        for key, figure in FIGURES.items()
    }
    print_table(labels, {"map": [row["map"] for row in lines], **columns})
    print_line()
    print_wrapped(
        f"retention@10: share of the 10 nearest re-embedded items that are among the 10 nearest; "
        f"hit@1: own item first. {held_out['queries']:,} queries among {held_out['gallery']:,} "
        f"held-out ids, maps learned on {held_out['learned']}; ± half of the 95 % interval"
    )


def _after(one: Document) -> Iterator[Step]:
    """Suggest how to make and apply the map that is advised."""
    if one["advice"] != "map":
        return
    old, new, side = one["old"], one["new"], one["sides"]["old"]
    # The old set stays on its side, since `apply` maps each side with that side's adapter.
    shards = Path(old, f"{side}s"), Path(new, f"{one['sides']['new']}s")
    names, kept = (
        ("old,new", "--text-adapter") if side == "image" else ("new,old", "--image-adapter")
    )
    pairs, run = first_free("pairs"), first_free("map")
    order = shards if side == "image" else shards[::-1]
    yield ("import", *order, "--names", names, "--pair-by", "id", "--out", pairs)
    yield ("train", pairs, kept, "identity", "--adapter", "linear", "--steps", "0", "--out", run)
    yield ("apply", old, "--adapter", run, "--out", first_free("mapped"))
