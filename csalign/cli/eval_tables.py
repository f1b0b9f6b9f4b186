"""Tables of the commands that evaluate: eval, compare and diagnose."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from csalign.cli.layout import Row
from csalign.cli.next_steps import Step, first_free, has_one_width
from csalign.cli.render import (
    is_verbose,
    print_closing,
    print_line,
    print_rows,
    print_table,
    print_wrapped,
)
from csalign.core.enums import Names, renamed
from csalign.core.figures import figure_of, percent
from csalign.evaluation.config import CompareConfig, DiagnoseConfig, EvalConfig

DIRECTIONS = ("image_to_text", "text_to_image")
ESSENTIAL = ("R@1", "R@5", "R@10", "median_rank", "map")
RETRIEVAL = (*ESSENTIAL, "true_recall@10", "mean_rank", "mrr", "r_precision")
"""Columns of retrieval tables; without ``--all-figures`` the essential ones."""
GAP = ("centroid_distance", "rmg", "cs_divergence", "frechet", "linear_separability")
"""Figures of the gap without ``--all-figures``."""
COMPARED = {
    "image_to_text_R@1": ("i2t", "retrieval.image_to_text.R@1"),
    "text_to_image_R@1": ("t2i", "retrieval.text_to_image.R@1"),
    **{name: ("", f"gap.{name}") for name in GAP[:4]},
}
"""Columns of compare beside those that decide, with the place of each in an evaluation."""

Document = Mapping[str, Any]


def eval_tables(document: Document, settings: EvalConfig) -> None:
    """Print the document of ``csalign eval``."""
    counts, names = document["counts"], document.get("names")
    if "distribution" in document:
        print_line(
            f"{document['generated']}: {counts['generated']:,} images, compared with "
            f"{document['images']}: {counts['images']:,} images, encoded by {document['encoder']}",
            "bold",
        )
        _figures("distribution", document["distribution"])
        _further_tables(document, every=True)
        print_closing(settings)
        return
    rows = f"{counts['images']:,} images, {counts['texts']:,} texts, {counts['pairs']:,} pairs"
    print_line(f"{_evaluated(document)}: {renamed(rows, names)}", "bold")
    if "retrieval" in document:
        _retrieval_and_gap(document, every=settings.all_figures)
    _further_tables(document, every=settings.all_figures)
    if notes := list(_notes(document, settings)):
        print_line()
        for note in notes:
            print_wrapped(note)
    print_closing(settings, *_after_eval(document, settings.split))


def _evaluated(document: Document) -> str:
    adapter = "no adapter" if document["adapter"] is None else f"adapter {document['adapter']}"
    splits = document["split"]
    return f"{document['features']}, {adapter}, " + (
        "all rows" if splits == "all" else f"split {splits}"
    )


def _retrieval_and_gap(document: Document, *, every: bool) -> None:
    names, retrieval = document.get("names"), document["retrieval"]
    intervals, protocol = document["intervals"], document["protocol"]
    if protocol["name"] != "all" or is_verbose():
        print_wrapped(_protocol(protocol, names))
    if document["index"]["kind"] != "exact":
        print_wrapped(f"ranked by an approximate index ({document['index']['kind']})")
    mean = figure_of("retrieval.mean_recall")
    shown = mean.show_between(retrieval["mean_recall"], intervals.get("mean_recall"))
    print_line()
    print_line(f"retrieval: {mean.heading} {shown}", "bold")
    _retrieval(
        [(direction, retrieval[direction]) for direction in DIRECTIONS],
        {name: intervals.get(name, {}) for name in DIRECTIONS},
        names,
        every=every,
    )
    print_line()
    gap, errors = dict(document["gap"]), document["gap"].get("standard_errors", {})
    print_line("modality gap", "bold")
    wanted = {name: value for name, value in gap.items() if every or name in GAP}
    _figures("gap", wanted, intervals, errors, names)
    if every:
        print_line()
        hubness = figure_of("hubness.image_to_text")
        print_line(hubness.heading, "bold")
        rows = document["hubness"].items()
        print_table([""], [(_direction(way, names), [hubness.show(value)]) for way, value in rows])


def _figures(
    block: str,
    figures: Document,
    intervals: Document | None = None,
    errors: Document | None = None,
    names: Names | None = None,
) -> None:
    """Print the figures of a block one below another, with half an interval or an error."""
    print_table([""], list(_figure_rows(block, figures, intervals or {}, errors or {}, names)))


def _figure_rows(
    place: str, figures: Document, intervals: Document, errors: Document, names: Names | None
) -> Iterator[Row]:
    for name, value in figures.items():
        own = errors.get(name)
        if name == "standard_errors" or isinstance(value, list) or value is None:
            continue
        if isinstance(value, Mapping):
            around = intervals.get(name, {})
            yield from _figure_rows(f"{place}.{name}", value, around, own or {}, names)
            continue
        figure = figure_of(f"{place}.{name}")
        shown = (
            figure.show_between(value, intervals.get(name))
            if own is None
            else figure.show(value, own)
        )
        yield renamed(figure.heading, names), [shown]


def _retrieval(
    blocks: Sequence[tuple[str, Document]],
    intervals: Mapping[str, Document],
    names: Names | None,
    *,
    every: bool,
    first: Mapping[str, Sequence[str]] | None = None,
) -> None:
    """Print retrieval figures, a row per block; `first` are columns before them."""
    first = first or {}
    wanted = RETRIEVAL if every else ESSENTIAL
    present = [name for name in wanted if all(name in block for _, block in blocks)]
    figures = {name: figure_of(f"retrieval.{DIRECTIONS[0]}.{name}") for name in present}
    rows = []
    for row, (label, block) in enumerate(blocks):
        around = intervals.get(label, {})
        cells = [f.show_between(block[name], around.get(name)) for name, f in figures.items()]
        shown = _direction(label, names) if label in DIRECTIONS else label
        rows.append((shown, [*(column[row] for column in first.values()), *cells]))
    print_table([*first, *(figure.heading for figure in figures.values())], rows)


def _direction(name: str, names: Names | None) -> str:
    return renamed(name.replace("_", " "), names)


def _further_tables(document: Document, *, every: bool) -> None:
    """Print what was only computed on request."""
    names = document.get("names")
    if corrected := document.get("corrected"):
        for name, block in corrected.items():
            print_line()
            print_line(f"retrieval with hubness correction {name}", "bold")
            _retrieval([(d, block[d]) for d in DIRECTIONS], {}, names, every=every)
    if graded := document.get("graded"):
        print_line()
        print_line(f"items with the same {graded['column']!r} count as right", "bold")
        own = [(d, graded[d]) for d in DIRECTIONS]
        figures = {name: figure_of(f"graded.{DIRECTIONS[0]}.{name}") for name in own[0][1]}
        print_table(
            [figure.heading for figure in figures.values()],
            [
                (
                    _direction(direction, names),
                    [figure.show(block[name]) for name, figure in figures.items()],
                )
                for direction, block in own
            ],
        )
    if by := document.get("by"):
        for direction in DIRECTIONS:
            blocks = [(n, value) for n, value in by["values"].items() if direction in value]
            way = _direction(direction, names)
            print_line()
            print_line(
                f"{way} by {by['column']!r} of the query's {renamed('image', names)}", "bold"
            )
            counts = {renamed("texts", names): [f"{value['texts']:,}" for _, value in blocks]}
            own = [(name, value[direction]) for name, value in blocks]
            _retrieval(own, {}, names, every=every, first=counts)
    if "zero_shot" in document:
        _zero_shot_table(document)
    if explanations := document.get("explanations"):
        print_line()
        print_rows(
            "definitions",
            [
                (
                    text.get("name") or place.removeprefix("corrected."),
                    text["formula"] + (f" ({text['source']})" if text["source"] else ""),
                )
                for place, text in explanations.items()
                if "name" in text or place.startswith("corrected.") or is_verbose()
            ],
        )


def _zero_shot_table(document: Document) -> None:
    """Print zero-shot metrics with their intervals."""
    figures, intervals = document["zero_shot"], document["intervals"].get("zero_shot", {})
    counts = ", ".join(f"{figures[key]:,} {key}" for key in ("images", "classes", "prompts"))
    print_line()
    print_line(
        f"zero-shot classification: {renamed(counts, document.get('names'))}",
        "bold",
    )
    names = ("top1", "top5", "mean_per_class_recall")
    _figures("zero_shot", {name: figures[name] for name in names}, intervals)


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


def _notes(document: Document, settings: EvalConfig) -> Iterator[str]:
    if document["intervals"]:
        yield "↑ higher is better, ↓ lower is better; ± half of the 95 % bootstrap interval" + (
            "; of the CS divergence, MMD and uniformity: ± the standard error of the estimate"
            if document.get("gap", {}).get("standard_errors")
            else ""
        )
    else:
        yield "↑ higher is better, ↓ lower is better"
    if "retrieval" in document and not settings.all_figures:
        yield "more with --all-figures, definitions with --explain"


def _after_eval(document: Document, split: str | None) -> Iterator[Step]:
    if "retrieval" not in document:
        return
    features, adapter = document["features"], document["adapter"]
    if adapter is None:
        yield ("train", features, "--out", first_free("run"))
        return
    systems = [features, adapter] if has_one_width(features) else [adapter]
    yield ("compare", *systems, *(["--split", split] if split else []))


def compare_table(document: Document, settings: CompareConfig) -> None:
    """Print the document of ``csalign compare``, one row per system."""
    rows, called = document["evaluations"], document.get("names")
    labels = _distinct([row["name"] for row in rows], settings.systems)
    mean = figure_of("retrieval.mean_recall")
    columns: dict[str, list[str]] = {
        mean.heading: [
            mean.show_between(row["mean_recall"], row["intervals"].get("mean_recall"))
            for row in rows
        ]
    }
    if len(rows) > 1:
        differences = [row["difference"].get("mean_recall") for row in rows]
        columns["difference"] = [difference(own) if own else "" for own in differences]
        columns["verdict"] = [row["verdict"] for row in rows]
    for key, (way, place) in COMPARED.items():
        figure = figure_of(place)
        heading = renamed(f"{way} {figure.heading}".strip(), called)
        columns[heading] = [figure.show(row[key]) for row in rows]
    for key, kind in (("parameters", ",.0f"), ("seconds", ",.1f")):
        if any(row[key] is not None for row in rows):
            columns[key] = ["-" if row[key] is None else format(row[key], kind) for row in rows]
    cells = list(zip(*columns.values(), strict=True))
    print_table(list(columns), list(zip(labels, cells, strict=True)))
    print_line()
    notes = "↑ higher is better, ↓ lower is better"
    if any(row["intervals"] for row in rows):
        notes += "; ± half of the 95 % bootstrap interval over images"
    if any(row["difference"] for row in rows):
        notes += "; differences in points, paired, with their 95 % interval"
    print_wrapped(notes)
    print_closing(settings, *_after_compare(rows, settings.systems))


def difference(found: Document, scale: float = 100, digits: int = 2) -> str:
    """Format a difference with its interval."""
    value, low, high = (scale * number for number in (found["value"], *found["interval"]))
    return f"{value:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


def _distinct(names: Sequence[str], paths: Sequence[object]) -> list[str]:
    """Return names that differ: equal ones with the path they are from, or else their number."""
    places = paths if len(paths) == len(names) else [""] * len(names)
    located = [f"{name} ({path})" for name, path in zip(names, places, strict=True)]
    found = []
    for number, name in enumerate(names):
        is_unique = located.count(located[number]) == 1
        found.append(located[number] if names.count(name) > 1 and is_unique else name)
    return [
        f"{name} #{number}" if found.count(name) > 1 else name
        for number, name in enumerate(found, 1)
    ]


def _after_compare(rows: Sequence[Document], systems: Sequence[Any]) -> Iterator[Step]:
    """Suggest to export the best run."""
    if len(rows) != len(systems):
        return
    best = max(zip(rows, systems, strict=True), key=lambda pair: pair[0]["mean_recall"])[1]
    if Path(best, "adapter.json").is_file():
        yield ("export", best, "--to", "onnx", "--out", first_free("exported"))


TERMS = {
    "loss": "the total",
    "alignment": "pulls the two rows of a pair together",
    "uniformity": "pushes all rows apart, those of a pair included",
    "gradient_cosine": "between the gradients of the two: -1 cancel, 0 unrelated, 1 agree",
}
LABELS = {"gradient_cosine": "cosine of gradients"}
NAMED = {"logit_scale": "logit scale", "cs_weight": "CS weight  "}
NEARLY, CLEARLY, SLIGHTLY = -0.9, -0.5, -0.1  # cosines from which on gradients conflict


def diagnosis_tables(document: Document, settings: DiagnoseConfig) -> None:
    """Print the document of ``csalign diagnose``: a verdict, both objectives, then the gap."""
    infonce, objective, gap = document["infonce"], document["objective"], document["gap"]
    names = document.get("names")
    print_line(f"{_evaluated(document)}: {document['pairs']:,} pairs", "bold")
    has_run = document["adapter"] is not None
    for name, given in (("logit_scale", settings.logit_scale), ("cs_weight", settings.cs_weight)):
        source = "this run: " if has_run and given is None else ""
        print_line(f"  {NAMED[name]}   {source}{document[name]:g}")
    print_line()
    for sentence in verdict(document):
        print_wrapped(sentence)
    print_line()
    print_table(
        ["InfoNCE", "with CS"],
        [
            (LABELS.get(name, name), [f"{block[name]:.4f}" for block in (infonce, objective)])
            for name in TERMS
        ],
        [*TERMS.values()],
    )
    print_line()
    frechet = figure_of("gap.frechet").label
    meanings = [
        ("CS divergence", f"{objective['cs_divergence']:.4f}", "between the two distributions"),
        ("CS, cross term", f"{objective['cs_cross']:.4f}", "attracts the two sides"),
        ("CS, terms within", f"{objective['cs_intra']:.4f}", "spread each side"),
        (
            "InfoNCE and CS",
            f"{objective['infonce_cs_gradient_cosine']:+.2f}",
            "cosine of their gradients: -1 oppose, 1 agree",
        ),
        (frechet, f"{gap['frechet']:.4f}", "size of the gap, as Gaussians"),
        ("centroid offset", percent(gap["centroid_share"], 0), "of it; centring removes this"),
        ("shape difference", percent(gap["shape_share"], 0), "of it; only training removes this"),
        *(
            (
                renamed(f"uniformity, {side}", names),
                f"{gap[f'uniformity_{side}']:.4f}",
                "lower is more spread out",
            )
            for side in ("image", "text")
        ),
    ]
    print_line("divergence and gap", "bold")
    print_table(
        [""], [(name, [value]) for name, value, _ in meanings], [text for *_, text in meanings]
    )
    features, adapter = document["features"], document["adapter"]
    if adapter is None:
        print_closing(settings, ("train", features, "--out", first_free("run")))
    else:
        print_closing(settings, ("eval", features, "--adapter", adapter))


def verdict(document: Document) -> Iterable[str]:
    """Word what a diagnosis means, in three or four sentences."""
    infonce, objective, gap = document["infonce"], document["objective"], document["gap"]
    plain, full = infonce["gradient_cosine"], objective["gradient_cosine"]
    degree = (
        "nearly cancel"
        if plain < NEARLY
        else "conflict"
        if plain < CLEARLY
        else "conflict slightly"
        if plain < SLIGHTLY
        else "do not conflict"
    )
    change = "changes that little" if abs(full - plain) < 0.05 else "raises that"
    if full <= plain - 0.05:
        change = "lowers that"
    yield (
        f"InfoNCE's alignment and uniformity {degree} here (cosine of gradients {plain:+.2f}; at "
        f"-1 they cancel and the gap stays). CS at weight {document['cs_weight']:g} {change} "
        f"({full:+.2f})."
    )
    both = objective["infonce_cs_gradient_cosine"]
    relation = (
        "pull the same way"
        if both > 0.5
        else "oppose each other"
        if both < CLEARLY
        else "are nearly independent, so CS adds what InfoNCE lacks"
    )
    yield f"The gradients of InfoNCE and of CS {relation} (cosine {both:+.2f})."
    yield (
        f"{percent(gap['centroid_share'], 0)} of the gap is a centroid offset, which centring "
        f"alone would remove; {percent(gap['shape_share'], 0)} is a difference in shape."
    )
    if document["adapter"] is not None:
        yield (
            "Read the conflict on embeddings from before training, without --adapter: at a minimum "
            "the two gradients cancel by definition."
        )
