"""Tables of the commands that evaluate: eval and compare."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from csalign.adapters.kinds import is_baseline
from csalign.cli import render, side_tables
from csalign.cli.next_steps import Step, first_free, has_one_width
from csalign.core.enums import Names, renamed
from csalign.core.figures import (
    Figure,
    baseline_table,
    figure_of,
    interval_place,
    percent,
    same_side_words,
    value_at,
)
from csalign.core.results import leaves
from csalign.evaluation.config import CompareConfig, EvalConfig

DIRECTIONS = ("image_to_text", "text_to_image")
ESSENTIAL = ("R@1", "R@5", "R@10", "median_rank", "map")
RETRIEVAL = (*ESSENTIAL, "true_recall@10", "mean_rank", "mrr", "r_precision")
"""Columns of retrieval tables; without ``--all-figures`` the essential ones."""
GAP = ("centroid_distance", "rmg", "cs_divergence", "frechet", "linear_separability")
"""Figures of the gap without ``--all-figures``."""
MIXED = ("ndcg@10", "recall@10", "same_side@10")
GROUPS = ("v_measure", "ami", "ari", "knn")
ZERO_SHOT = ("top1", "top5", "mean_per_class_recall")
COMPARED = {
    "image_to_text_R@1": ("i2t", "retrieval.image_to_text.R@1"),
    "text_to_image_R@1": ("t2i", "retrieval.text_to_image.R@1"),
    **{name: ("", f"gap.{name}") for name in GAP[:4]},
    "mixed_ndcg@10": ("mixed", "mixed.ndcg@10"),
    "same_side@10": ("", "mixed.same_side@10"),
    "v_measure": ("", "groups.v_measure"),
    "knn": ("", "groups.knn.mean"),
}
"""Figures of compare beside the mean recall, with the place of each in an evaluation."""
OF_MAPS = {
    "retention@10": Figure("retention@10", "↑", 100, 1),
    "hit@1": Figure("hit@1", "↑", 100, 1),
    "median_cosine": Figure("median cosine", "↑", 1, 3),
}
"""Figures of compared embedding models."""
ARROWS = "↑ higher is better, ↓ lower is better"
MEAN = figure_of("retrieval.mean_recall")

Document = Mapping[str, Any]


def eval_tables(document: Document, settings: EvalConfig) -> None:
    """Print the document of ``csalign eval``."""
    counts, names, every = document["counts"], document.get("names"), settings.all_figures
    if "distribution" in document:
        render.print_line(
            f"{document['generated']}: {counts['generated']:,} images, compared with "
            f"{document['images']}: {counts['images']:,} images, encoded by {document['encoder']}",
            "bold",
        )
        _figures(document, "distribution")
    elif "matrix" in document:
        side_tables.eval_table(document, evaluated(document), every=every)
    else:
        rows = f"{counts['images']:,} images, {counts['texts']:,} texts, {counts['pairs']:,} pairs"
        render.print_line(f"{evaluated(document)}: {renamed(rows, names)}", "bold")
    wanted = RETRIEVAL if every else ESSENTIAL
    if "retrieval" in document:
        _retrieval_and_gap(document, names, wanted, every=every)
    _further_tables(document, names, wanted)
    if settings.baselines and "baselines" in document:
        _baselines(document)
    if "distribution" not in document:
        render.print_line()
        for note in _notes(document, every=every):
            render.print_wrapped(note)
    render.print_closing(settings, *_after_eval(document, settings.split))


def evaluated(document: Document) -> str:
    """Word what a document is about: features, adapter and split."""
    adapter = "no adapter" if document["adapter"] is None else f"adapter {document['adapter']}"
    split = "all rows" if document["split"] == "all" else f"split {document['split']}"
    return f"{document['features']}, {adapter}, {split}"


def _retrieval_and_gap(
    document: Document, names: Names | None, wanted: Sequence[str], *, every: bool
) -> None:
    retrieval, intervals, protocol = (document[k] for k in ("retrieval", "intervals", "protocol"))
    if protocol["name"] != "all" or render.is_verbose():
        render.print_wrapped(_protocol(protocol, names))
    if document["index"]["kind"] != "exact":
        render.print_wrapped(f"ranked by an approximate index ({document['index']['kind']})")
    before = document.get("before", {})
    title = MEAN.show_between(retrieval["mean_recall"], intervals.get("mean_recall"))
    if before:
        title += f" (before: {MEAN.show(before['retrieval']['mean_recall'])})"
    blocks = _beside({way: retrieval[way] for way in DIRECTIONS}, before.get("retrieval"))
    _retrieval(f"retrieval: {MEAN.heading} {title}", blocks, names, wanted, intervals)
    render.print_title("modality gap")
    _figures(document, "gap", () if every else GAP)
    if every:
        render.print_line()
        _figures(document, "hubness")
    mixed, former, around = (
        own and {f"{side} queries": own[side] for side in ("image", "text")} | {"both": own}
        for own in (document["mixed"], before.get("mixed"), intervals.get("mixed"))
    )
    title = "one gallery of both sides"
    _retrieval(title, _beside(mixed, former), names, MIXED, around, family="mixed")
    if words := same_side_words(document["mixed"]["same_side@10"]):
        render.print_wrapped(words)


def _beside(blocks: Document, before: Document | None) -> Document:
    """Put each block after that of the same name from before the adapter, if there are any."""
    if before is None:
        return blocks
    pairs = [((f"{name}, before", before[name]), (name, own)) for name, own in blocks.items()]
    return dict(one for pair in pairs for one in pair)


def _figures(document: Document, block: str, wanted: Sequence[str] = ()) -> None:
    """Print figures of a block, all if none are wanted, a row each.

    With half an interval or an error, and beside those from before the adapter if there are any.
    """
    before, names = document.get("before", {}).get(block), document.get("names")
    errors, intervals = document[block].get("standard_errors"), document.get("intervals", {})
    labels, first, last = [], [], []
    for path, value in leaves(document[block]):
        is_wanted = path[0] in wanted if wanted else path[0] != "standard_errors"
        if is_wanted and isinstance(value, int | float):
            figure, error = figure_of(".".join((block, *path))), value_at(errors, path)
            around = value_at(intervals, interval_place((block, *path)))
            labels.append(renamed(figure.heading, names))
            first.append(figure.show(value_at(before, path)))
            between = figure.show_between(value, around)
            last.append(between if error is None else figure.show(value, error))
    render.print_table(labels, {"before": first, "after": last} if before else {"": last})


def _retrieval(
    title: str,
    blocks: Document,
    names: Names | None,
    wanted: Iterable[str],
    intervals: Document | None = None,
    family: str = "retrieval",
) -> None:
    """Print a title and figures of a family, a row per block with what they all have."""
    render.print_title(title)
    columns = {}
    for name in wanted:
        if all(name in block for block in blocks.values()):
            figure, around = figure_of(f"{family}.{name}"), intervals or {}
            columns[figure.heading] = [
                figure.show_between(block[name], around.get(label, {}).get(name))
                for label, block in blocks.items()
            ]
    render.print_table([_direction(label, names) for label in blocks], columns)


def _direction(label: str, names: Names | None) -> str:
    for way in (*DIRECTIONS, "image queries", "text queries"):
        label = label.replace(way, renamed(way.replace("_", " "), names))
    return label


def _further_tables(document: Document, names: Names | None, wanted: Sequence[str]) -> None:
    """Print what was only computed on request."""
    if groups := document.get("groups"):
        counts = ", ".join(f"{groups[key]:,} {key}" for key in ("classes", "images", "texts"))
        render.print_title(f"groups by {groups['column']!r}: {renamed(counts, names)}")
        _figures(document, "groups", GROUPS)
    for name, block in document.get("corrected", {}).items():
        blocks = {way: block[way] for way in DIRECTIONS}
        _retrieval(f"retrieval with hubness correction {name}", blocks, names, wanted)
    if graded := document.get("graded"):
        blocks = {way: graded[way] for way in DIRECTIONS}
        title = f"items with the same {graded['column']!r} count as right"
        _retrieval(title, blocks, names, graded[DIRECTIONS[0]])
    if by := document.get("by"):
        for way in DIRECTIONS:
            blocks = {
                renamed(f"{value} ({own['texts']:,} texts)", names): own[way]
                for value, own in by["values"].items()
                if way in own
            }
            side = renamed("image", names)
            title = f"{_direction(way, names)} by {by['column']!r} of the query's {side}"
            _retrieval(title, blocks, names, wanted)
    if zero_shot := document.get("zero_shot"):
        counts = ", ".join(f"{zero_shot[key]:,} {key}" for key in ("images", "classes", "prompts"))
        render.print_title(f"zero-shot classification: {renamed(counts, names)}")
        _figures(document, "zero_shot", ZERO_SHOT)
    if explanations := document.get("explanations"):
        render.print_title("definitions")
        render.print_rows(
            (
                text.get("name") or place.removeprefix("corrected."),
                text["formula"] + (f" ({text['source']})" if text["source"] else ""),
            )
            for place, text in explanations.items()
            if "name" in text or place.startswith("corrected.") or render.is_verbose()
        )


def _baselines(document: Document) -> None:
    """Print what needs no training, above the adapter."""
    render.print_title("baselines: mean recall, mixed NDCG@10, same-side share and gap")
    labels, columns, note = baseline_table(document)
    render.print_table(labels, columns)
    render.print_wrapped(note)


def _protocol(protocol: Document, names: Names | None) -> str:
    """Word what determines the scores beside the model, in one line."""
    folds = f"mean of {protocol['folds']} folds of " if protocol["folds"] > 1 else ""
    dtype = protocol["dtype"]
    images, texts = (protocol[side] // protocol["folds"] for side in ("images", "texts"))
    rows = f"{images:,} images and {texts:,} " + ("texts" if names else "captions")
    return (
        f"protocol {protocol['name']}: {folds}{renamed(rows, names)}, split {protocol['split']}, "
        f"stored as {dtype['stored']}, scores in {dtype['scores']}, {protocol['ties']}"
    )


def _notes(document: Document, *, every: bool) -> Iterator[str]:
    notes = [ARROWS]
    if document["intervals"]:
        notes.append("± half of the 95 % bootstrap interval")
        if document.get("gap", {}).get("standard_errors"):
            notes.append(
                "of the CS divergence, MMD and uniformity: ± the standard error of the estimate"
            )
    yield "; ".join(notes)
    if not every and not {"retrieval", "matrix"}.isdisjoint(document):
        yield "more with --all-figures, definitions with --explain"


def _after_eval(document: Document, split: str | None) -> Iterator[Step]:
    if {"retrieval", "matrix"}.isdisjoint(document):
        return
    features, adapter = document["features"], document["adapter"]
    if adapter is None or is_baseline(adapter):
        yield ("train", features, "--out", first_free("run"))
        return
    systems = [features, adapter] if has_one_width(features) else [adapter]
    yield ("compare", *systems, *(["--split", split] if split else []))


def compare_table(document: Document, settings: CompareConfig) -> None:
    """Print the document of ``csalign compare``: what decides, then more, a row per system."""
    if "versions" in document:
        _version_tables(document, settings)
        return
    rows, called = document["evaluations"], document.get("names")
    labels = _distinct([row["name"] for row in rows], settings.systems)
    columns = {
        MEAN.heading: [
            MEAN.show_between(row["mean_recall"], row["intervals"].get("mean_recall"))
            for row in rows
        ]
    }
    if len(rows) > 1:
        differences = [row["difference"].get("mean_recall") for row in rows]
        columns["difference"] = [MEAN.show_difference(**own) if own else "" for own in differences]
        columns["verdict"] = [row["verdict"] for row in rows]
    render.print_table(labels, columns)
    if "sides" in document:
        side_tables.compare_tables(rows, labels, document["sides"])
    columns = {}
    for key, (way, place) in COMPARED.items():
        figure = figure_of(place)
        heading = renamed(f"{way} {figure.heading}".strip(), called)
        if key in rows[0]:
            columns[heading] = [figure.show(row[key]) for row in rows]
    for key, kind in (("parameters", ",.0f"), ("seconds", ",.1f")):
        if any(row[key] is not None for row in rows):
            columns[key] = ["-" if row[key] is None else format(row[key], kind) for row in rows]
    if columns:
        render.print_line()
        render.print_table(labels, columns)
    render.print_line()
    notes = [ARROWS]
    if any(row["intervals"] for row in rows):
        units = "items" if "sides" in document else "images"
        notes.append(f"± half of the 95 % bootstrap interval over {units}")
    if any(row["difference"] for row in rows):
        notes.append("differences in points, paired, with their 95 % interval")
    render.print_wrapped("; ".join(notes))
    render.print_closing(settings, *_after_compare(rows, settings.systems))


def _distinct(names: Sequence[str], paths: Sequence[object]) -> list[str]:
    """Return names that differ: equal ones with the path they are from, or else their number."""
    found = list(names)
    for more in ([f" ({path})" for path in paths], [f" #{n + 1}" for n in range(len(names))]):
        longer = [name + own for name, own in zip(found, more, strict=False)] or found
        found = [
            own if found.count(name) > 1 and longer.count(own) == 1 else name
            for name, own in zip(found, longer, strict=False)
        ]
    return found


def _after_compare(rows: Sequence[Document], systems: Sequence[Any]) -> Iterator[Step]:
    """Suggest to export the best run."""
    if len(rows) != len(systems):
        return
    best = max(zip(rows, systems, strict=True), key=lambda pair: pair[0]["mean_recall"])[1]
    if Path(best, "adapter.json").is_file():
        yield ("export", best, "--to", "onnx", "--out", first_free("exported"))


def _version_tables(document: Document, settings: CompareConfig) -> None:
    """Print each set against the first: ids, cosines and neighbours, then the maps by pairs."""
    for one in document["versions"]:
        _version_table(one)
    render.print_closing(settings, *_after_versions(document["versions"][0]))


def _version_table(one: Document) -> None:
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
        for key, figure in OF_MAPS.items()
    }
    render.print_table(labels, {"map": [row["map"] for row in lines], **columns})
    render.print_line()
    queries, gallery, learned = one["held_out"].values()
    render.print_wrapped(
        "retention@10: share of the 10 nearest re-embedded items that are among the 10 nearest; "
        f"hit@1: own item first. {queries:,} queries among {gallery:,} held-out ids, maps learned "
        f"on {learned}; ± half of the 95 % interval"
    )


def _after_versions(one: Document) -> Iterator[Step]:
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
